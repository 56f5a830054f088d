"""The source keeps the house rules that a linter cannot check."""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("calibration", "pipeline", "targets")
FILES = sorted(path for name in PACKAGES for path in (ROOT / name).rglob("*.py"))
LONGEST_FILE, LONGEST_FUNCTION = 400, 60
VAGUE = ("common", "helper", "helpers", "manager", "misc", "util", "utils")

each_file = pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


@each_file
def test_files_and_functions_are_short_enough_to_read(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= LONGEST_FILE
    lengths = {node.name: (node.end_lineno or node.lineno) - node.lineno + 1 for node in functions(path)}
    assert not {name: lines for name, lines in lengths.items() if lines > LONGEST_FUNCTION}


@each_file
def test_names_say_what_is_inside(path: Path) -> None:
    assert not set(path.stem.split("_")) & set(VAGUE)


@each_file
def test_no_exception_is_swallowed(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ExceptHandler):
            every = node.type is None or getattr(node.type, "id", "") in ("Exception", "BaseException")
            silent = all(isinstance(statement, ast.Pass) for statement in node.body)
            assert not (every and silent), f"{path}:{node.lineno} hides every failure"


def test_every_ignored_finding_carries_its_reason() -> None:
    """`# noqa: X - why`, `# type: ignore[x]  # why`: without a reason nobody dares to remove it."""
    comment = re.compile(r"#\s*(noqa|type:\s*ignore)(?P<rest>.*)")
    places = [
        path for folder in (*PACKAGES, "tests", "examples", "benchmarks") for path in (ROOT / folder).rglob("*.py")
    ]
    bare = []
    for path in places:
        for number, line in enumerate(path.read_text().splitlines(), 1):
            found = comment.search(line)
            if found and "`#" not in line and not re.search(r"[\w\])]\s+[#-]\s*\w.{5,}", found["rest"]):
                bare.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()}")
    assert not bare


def test_no_machine_path_is_written_down() -> None:
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if listed.returncode:
        pytest.skip("not a git checkout: no list of the project's own files")
    marks = ("/" + "home/", "/" + "Users/", "/" + "work/")
    found = []
    for name in listed.stdout.splitlines():
        path = ROOT / name
        if path.suffix in {".py", ".md", ".toml", ".yml", ".txt", ""} and path.is_file():
            text = path.read_bytes().decode("utf-8", "ignore")
            found += [f"{name}: {mark}" for mark in marks if mark in text]
    assert not found
