"""The operator table in docs/ is what the converter's entries say."""

from __future__ import annotations

from pathlib import Path

import onnx

from edgeship.targets.tflite.manual import table
from edgeship.targets.tflite.ops import EXPANSIONS, REGISTRY
from edgeship.targets.tflite.ops.loop import UPDATE

PAGE = Path(__file__).parents[3] / "docs" / "operators.md"


def test_the_page_is_the_generated_one() -> None:
    assert PAGE.read_text() == table(), "python -m edgeship.targets.tflite.manual > docs/operators.md"


def test_every_entry_is_an_operator_of_the_standard_and_every_limit_says_what_it_is() -> None:
    standard = {schema.name for schema in onnx.defs.get_all_schemas_with_history() if not schema.domain}
    assert set(REGISTRY) - {UPDATE} <= standard
    assert set(EXPANSIONS) <= standard
    for op in REGISTRY.values():
        for limit in (*op.limits, *(op.int8.limits if op.int8 else ())):
            assert limit.__doc__, f"{op.onnx}: {limit.__name__} has no docstring"
