"""The documentation is current: generated pages are what the code says, and the tutorial runs as it stands."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from edgeship.pipeline.cli import cli
from edgeship.pipeline.recipe_manual import manual

ROOT = Path(__file__).parents[2]
WORKFLOWS = [*(ROOT / ".github/workflows").glob("*.yml"), ROOT / ".github/actions/deploy/action.yml"]


def blocks(page: str) -> list[tuple[str, str]]:
    """The code blocks of a page: (language, code)."""
    return re.findall(r"^```(\w+)\n(.*?)^```$", (ROOT / "docs" / page).read_text(), re.MULTILINE | re.DOTALL)


def test_the_recipe_reference_is_the_generated_one() -> None:
    page = (ROOT / "docs/recipe.md").read_text()
    assert page == manual(), "python -m edgeship.pipeline.recipe_manual > docs/recipe.md"


def test_the_tutorial_runs_as_it_stands(tmp_path: Path) -> None:
    binaries = Path(sys.executable).parent
    environment = {**os.environ, "PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    ran = 0
    for language, code in blocks("tutorial.md"):
        if language in ("python", "toml"):
            name = re.match(r"# file: (\S+)\n", code)
            assert name, f"a {language} block of the tutorial does not say which file it is"
            (tmp_path / name[1]).write_text(code)
        elif language == "bash":
            command = ["bash", "-euo", "pipefail", "-c", code]
            done = subprocess.run(command, check=False, cwd=tmp_path, env=environment, capture_output=True, text=True)
            assert done.returncode == 0, f"{code}\n{done.stdout}\n{done.stderr}"
            ran += 1
    assert ran >= 4
    assert (tmp_path / "build/shapes/report.html").is_file()


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_workflows_call_make_targets_and_options_that_exist(path: Path) -> None:
    text = path.read_text()
    assert yaml.safe_load(text)
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for call in re.findall(r"^\s*- run: make ([a-z -]+?)(?: [A-Z]|$)", text, re.MULTILINE):
        assert set(call.split()) <= targets
    options = {option for parameter in cli.commands["deploy"].params for option in parameter.opts}
    assert set(re.findall(r"arguments\+=\((--[a-z]+)", text)) <= options


def test_every_page_is_in_the_contents() -> None:
    listed = set(re.findall(r"^([a-z-]+)$", (ROOT / "docs/index.md").read_text(), re.MULTILINE))
    pages = {path.stem for path in (ROOT / "docs").glob("*.md")} - {"index"}
    assert pages == listed
