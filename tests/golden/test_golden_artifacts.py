"""Drift is noticed: the same QDQ model gives the bytes it gave when the golden files were made."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def golden() -> ModuleType:
    spec = importlib.util.spec_from_file_location("golden_make", HERE / "make.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_target_writes_the_golden_bytes(golden: ModuleType) -> None:
    assert golden.digests() == json.loads((HERE / "artifacts.json").read_text())


def test_the_golden_digests_cover_every_target(golden: ModuleType) -> None:
    from edgeship.targets.base import names

    recorded = {name.split("/")[0] for name in json.loads((HERE / "artifacts.json").read_text())}
    assert recorded == set(names()) == set(golden.TARGETS)
