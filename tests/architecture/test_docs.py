"""The documentation is current: generated pages are what the code says, and workflows call what there is."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from edgeship.pipeline.cli import cli
from edgeship.pipeline.recipe import GATES, json_schema
from edgeship.pipeline.recipe_manual import manual
from edgeship.pipeline.report import QUANTIZATION
from edgeship.targets.base import Target

ROOT = Path(__file__).parents[2]
FILES = (".py", ".md", ".json", ".csv", ".onnx", ".toml", ".npz", ".pt2", ".sig", ".c", ".h", ".tflite")
FIGURES = ("parity.agreement", "parity.strict_agreement")
"""Of a report, whose sections have the names of the recipe's."""
PAGES = sorted([ROOT / "README.md", *ROOT.glob("docs/*.md"), *ROOT.glob("examples/*/README.md")])
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


def test_the_page_on_targets_lists_every_member_of_the_protocol() -> None:
    page = (ROOT / "docs/adding-a-target.md").read_text()
    listed = set(re.findall(r"`(\w+)(?:\([^`]*\))?`", "".join(re.findall(r"^\| (.*?) \|", page, re.MULTILINE))))
    assert listed - {"member"} == {name for name in vars(Target) if not name.startswith("_")}


def options_of(command: str) -> set[str]:
    return {
        option for parameter in cli.commands[command].params for option in (*parameter.opts, *parameter.secondary_opts)
    }


def test_the_command_line_page_names_what_a_report_says_of_quantization() -> None:
    page = (ROOT / "docs/cli.md").read_text()
    assert [key for key in QUANTIZATION if f"`{key}`" not in page] == []


def test_the_command_line_page_lists_every_option() -> None:
    block = (ROOT / "docs/cli.md").read_text().split("```")[1]
    calls = dict(re.findall(r"^edgeship ([a-z]+)(.*?)(?=^edgeship |\Z)", block, re.MULTILINE | re.DOTALL))
    for name in cli.commands:
        listed = set(re.findall(r"--[a-z-]+", calls[name]))
        short = {"--out"} if re.search(r" \[?-o ", calls[name]) else set()
        assert listed | short == {option for option in options_of(name) if option.startswith("--")}, name


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_options_that_documents_give_a_command_exist(path: Path) -> None:
    for name, given in re.findall(r"edgeship ([a-z]+)((?:[^`\n]|\\\n)*)", path.read_text()):
        if name in cli.commands:
            assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", given)) <= options_of(name) | {"--help"}, (name, given)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_that_documents_name_exist(path: Path) -> None:
    folders = "benchmarks|calibration|docs|examples|pipeline|targets|tests"
    named = re.findall(rf"(?<![\w/.-])((?:{folders})/[\w./-]+\.(?:py|md|toml|csv|json|yml))\b", path.read_text())
    assert [name for name in named if not (ROOT / name).exists()] == []


def is_key(schema: dict[str, Any], parts: list[str]) -> bool:
    """Whether a recipe has the dotted key; a table under any name (a target's) takes any."""
    definitions = json_schema()["$defs"]
    for part in parts:
        for each in (schema, *schema.get("anyOf", ())):
            schema = definitions[each["$ref"].rpartition("/")[2]] if "$ref" in each else schema
        schema = schema.get("items", schema)
        schema = definitions[schema["$ref"].rpartition("/")[2]] if "$ref" in schema else schema
        more = schema.get("additionalProperties")
        schema = schema.get("properties", {}).get(part) or (more if isinstance(more, dict) else {})
        if not schema:
            return False
    return True


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_recipe_keys_that_documents_name_exist(path: Path) -> None:
    schema = json_schema()
    named = set(re.findall(r"`([a-z_]+(?:\.[a-z_0-9]+)+)(?: = [^`]*)?`", path.read_text())) - GATES.keys()
    keys = [key.split(".") for key in named if not key.endswith(FILES) and key not in FIGURES]
    assert [key for key in keys if key[0] in schema["properties"] and not is_key(schema, key)] == []
