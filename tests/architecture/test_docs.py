"""The documentation is current: generated pages are what the code says, and workflows call what there is."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from edgeship.pipeline.cli import cli
from edgeship.pipeline.recipe_manual import manual

ROOT = Path(__file__).parents[2]
WORKFLOWS = [*(ROOT / ".github/workflows").glob("*.yml"), ROOT / ".github/actions/deploy/action.yml"]


def test_the_recipe_reference_is_the_generated_one() -> None:
    page = (ROOT / "docs/recipe.md").read_text()
    assert page == manual(), "python -m edgeship.pipeline.recipe_manual > docs/recipe.md"


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
