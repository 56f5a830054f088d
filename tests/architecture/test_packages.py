"""What is installed is what lies in the folders, and what is needed is declared, pinned and explained."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("calibration", "pipeline", "targets")


@cache
def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def canonical(requirement: str) -> str:
    """The normalized name of a requirement such as `Foo_bar[extra]>=1.2`."""
    name = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert name, requirement
    return re.sub(r"[-_.]+", "-", name[0]).lower()


def declared() -> list[str]:
    sections = [project()["project"]["dependencies"], *project()["project"]["optional-dependencies"].values()]
    return sorted({canonical(requirement) for section in sections for requirement in section})


def pins() -> dict[str, str]:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    return {canonical(name): version for name, version in (line.split("==") for line in lines)}


def test_every_folder_with_code_is_a_listed_package() -> None:
    folders = {path.parent.relative_to(ROOT) for name in PACKAGES for path in (ROOT / name).rglob("*.py")}
    found = {".".join(("edgeship", *folder.parts)) for folder in folders}
    assert sorted(found) == sorted(project()["tool"]["setuptools"]["packages"])


def test_every_package_has_an_init_file() -> None:
    for package in project()["tool"]["setuptools"]["packages"]:
        folder = ROOT.joinpath(*package.split(".")[1:])
        assert (folder / "__init__.py").is_file(), f"{folder} has no __init__.py"


def test_the_wheel_holds_every_module_and_the_command(tmp_path: Path) -> None:
    source = tmp_path / "source"
    for name in PACKAGES:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path)]
    done = subprocess.run([*build, str(source)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(next(tmp_path.glob("edgeship-*.whl"))) as wheel:
        names = set(wheel.namelist())
        scripts = wheel.read(next(name for name in names if name.endswith("entry_points.txt"))).decode()
    modules = {
        f"edgeship/{path.relative_to(ROOT).as_posix()}" for name in PACKAGES for path in (ROOT / name).rglob("*.py")
    }
    assert modules <= names
    assert {f"edgeship/{name}/py.typed" for name in PACKAGES} <= names
    assert "edgeship = edgeship.pipeline.cli:main" in scripts


def test_every_dependency_is_pinned() -> None:
    missing = [name for name in declared() if name not in pins()]
    assert not missing, "not in constraints.txt"


def test_pins_are_exact_and_free_of_local_builds() -> None:
    odd = {name: version for name, version in pins().items() if not re.fullmatch(r"[0-9][0-9A-Za-z.]*", version)}
    assert not odd, "a local version such as 2.13.0+cpu is on no public index"


def test_every_pin_satisfies_its_range() -> None:
    from packaging.requirements import Requirement

    sections = [project()["project"]["dependencies"], *project()["project"]["optional-dependencies"].values()]
    for text in (text for section in sections for text in section):
        requirement = Requirement(text)
        assert requirement.specifier.contains(pins()[canonical(requirement.name)]), text


@pytest.mark.parametrize("name", declared())
def test_every_dependency_is_explained(name: str) -> None:
    explained = (ROOT / "docs" / "dependencies.md").read_text().lower()
    assert f"`{name}`" in explained, "docs/dependencies.md says what each dependency is for and what was rejected"


def test_the_architecture_page_names_files_that_exist() -> None:
    named = set(re.findall(r"\b([a-z_0-9]+\.py)\b", (ROOT / "docs" / "architecture.md").read_text()))
    there = {path.name for name in (*PACKAGES, "benchmarks") for path in (ROOT / name).rglob("*.py")}
    assert named <= there
