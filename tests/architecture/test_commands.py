"""The commands that the documents and CI name exist."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted([ROOT / "README.md", *ROOT.glob("docs/*.md"), *ROOT.glob("examples/*/README.md")])
PROMISED = ("setup", "deploy", "test", "lint", "types", "bench", "clean", "help")


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def dry_run(*arguments: str) -> str:
    """What make would run with every stamp in place."""
    stamps = [option for stamp in ("deploy", "dev", "tensorflow") for option in ("-o", f".venv/{stamp}.stamp")]
    alone = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
    command = ["make", "-n", *stamps, *arguments]  # alone: the suite itself may be run by make
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, env=alone)
    return done.stdout


def test_the_makefile_has_what_is_promised() -> None:
    assert make_targets() >= set(PROMISED)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_make_commands_in_documents_exist(path: Path) -> None:
    named = set(re.findall(r"(?:^|`)\s*make ([a-z-]+)", path.read_text(), re.MULTILINE))
    assert named <= make_targets()


@pytest.mark.parametrize(
    "path", [ROOT / ".ci" / "run", ROOT / ".github" / "workflows" / "ci.yml"], ids=lambda p: p.name
)
def test_ci_runs_make_targets(path: Path) -> None:
    lines = re.findall(r"(?:^|run: )make ([a-z -]+)$", path.read_text(), re.MULTILINE)
    named = {target for line in lines for target in line.split()}
    assert {"lint", "types", "test"} <= named <= make_targets()


def test_ci_runs_the_test_command_of_the_readme() -> None:
    assert re.search(r"^\s*make test$", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert re.search(r"^make test$", (ROOT / ".ci" / "run").read_text(), re.MULTILINE)


@pytest.mark.parametrize(
    ("target", "options"),
    [("all", ""), ("tflite", "--target tflite"), ("tflite onnxruntime", "--target tflite --target onnxruntime")],
)
def test_make_deploy_passes_the_targets_on(target: str, options: str) -> None:
    command = shlex.split(dry_run("deploy", f"TARGET={target}"))
    assert command[0].endswith("edgeship")
    assert command[1:] == ["deploy", "examples/digits/recipe.toml", *options.split()]


@pytest.mark.parametrize("target", ["deploy", "release"])
def test_make_takes_a_recipe_whose_path_has_blanks(target: str) -> None:
    command = shlex.split(dry_run(target, "RECIPE=my models/my recipe.toml").splitlines()[0])
    assert command[1:3] == ["deploy", "my models/my recipe.toml"]


def test_make_help_lists_every_target() -> None:
    done = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert set(re.findall(r"^  make ([a-z-]+)", done.stdout, re.MULTILINE)) == make_targets()


def test_the_documents_name_every_gate_and_every_command() -> None:
    from edgeship.pipeline.cli import cli
    from edgeship.pipeline.recipe import GATES

    text = (ROOT / "docs" / "cli.md").read_text()
    assert [gate for gate in GATES if f"| `{gate}` |" not in text] == []
    assert [name for name in cli.commands if f"\nedgeship {name} " not in text] == []
