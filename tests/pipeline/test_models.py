"""Loading what a recipe names: factories, weights and exported programs; data never runs code."""

from __future__ import annotations

import argparse
import io
import json
import os
import pickle
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from edgeship.calibration.errors import InputError
from edgeship.pipeline.models import build_module
from edgeship.pipeline.pt2 import load_exported
from edgeship.pipeline.state_dict import load_weights, read_state_dict

SOURCE = """
import torch
from layers_of_this_test import block

def build(width=4):
    return torch.nn.Sequential(block(3, width), torch.nn.Flatten(), torch.nn.Linear(width * 36, 2))

def number():
    return 7

def broken():
    raise RuntimeError("no such width")
"""
LAYERS = """
import torch

def block(inputs, outputs):
    return torch.nn.Sequential(torch.nn.Conv2d(inputs, outputs, 3), torch.nn.BatchNorm2d(outputs), torch.nn.ReLU())
"""


class _Runs:
    """Unpickling it makes a folder: a stand-in for what a hostile file would do."""

    def __init__(self, mark: Path) -> None:
        self._mark = mark

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self._mark),)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    (tmp_path / "layers_of_this_test.py").write_text(LAYERS)
    path = tmp_path / "model.py"
    path.write_text(SOURCE)
    return path


@pytest.fixture
def model(source: Path) -> torch.nn.Module:
    torch.manual_seed(0)
    return build_module(source, "build")


def test_a_factory_of_a_file_may_import_its_neighbours(source: Path) -> None:
    module = build_module(source, "build", {"width": 5})
    assert module(torch.zeros(1, 3, 8, 8)).shape == (1, 2)
    assert not module.training


def test_importing_leaves_no_trace(source: Path) -> None:
    modules, path = set(sys.modules), list(sys.path)
    build_module(source, "build")
    left = {name for name in set(sys.modules) - modules if "layers_of_this_test" in name or "edgeship_model" in name}
    assert not left
    assert sys.path == path
    assert not list(source.parent.glob("__pycache__"))


def test_two_files_of_the_same_name_do_not_mix(tmp_path: Path) -> None:
    for folder, width in (("a", 1), ("b", 2)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "size.py").write_text(f"WIDTH = {width}\n")
        text = "import torch\nfrom size import WIDTH\ndef build():\n    return torch.nn.Linear(WIDTH, 1)\n"
        (tmp_path / folder / "net.py").write_text(text)
    widths = [build_module(tmp_path / folder / "net.py", "build").in_features for folder in ("a", "b")]
    assert widths == [1, 2]


def test_a_factory_of_an_installed_module_is_found() -> None:
    assert isinstance(build_module("torch.nn", "Identity"), torch.nn.Identity)


@pytest.mark.parametrize(
    ("factory", "message"),
    [("biuld", "did you mean 'build'"), ("number", "returned int"), ("broken", "RuntimeError: no such width")],
)
def test_a_wrong_factory_is_told_in_one_sentence(source: Path, factory: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        build_module(source, factory)


@pytest.mark.parametrize("text", ["def build(:\n", "import not_installed_anywhere\n", "raise SystemExit(1)\n"])
def test_a_file_that_cannot_be_imported_is_told_in_one_sentence(tmp_path: Path, text: str) -> None:
    (tmp_path / "model.py").write_text(text)
    with pytest.raises(InputError, match="cannot be imported"):
        build_module(tmp_path / "model.py", "build")


def test_a_missing_source_is_told(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not a file"):
        build_module(tmp_path / "model.py", "build")


def test_without_torch_the_command_that_installs_it_is_told(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(InputError, match=r"pip install edgeship\[torch\]"):
        build_module(source, "build")


def _nested(state: dict[str, Any]) -> dict[str, Any]:
    return {"epoch": 3, "state_dict": {f"module.{key}": value for key, value in state.items()}}


def _training_run(state: dict[str, Any]) -> dict[str, Any]:
    """What training scripts save, with the types that they save beside the weights."""
    beside = {"args": argparse.Namespace(lr=0.1, output=Path("runs")), "best": np.float64(0.9), "step": np.int64(7)}
    optimizer = {"state": {0: {"momentum": torch.zeros(2)}}, "param_groups": [{"lr": 0.1}]}
    return {"net": {f"model.net.{key}": value for key, value in state.items()}, "optimizer": optimizer, **beside}


def _averaged(state: dict[str, Any]) -> dict[str, Any]:
    return {"n_averaged": torch.tensor(3), **{f"module.{key}": value for key, value in state.items()}}


@pytest.mark.parametrize(
    "wrap",
    [dict, _nested, _training_run, _averaged],
    ids=["plain", "nested with prefixes", "of a training run", "averaged"],
)
def test_a_state_dict_is_loaded_into_the_model(model: torch.nn.Module, source: Path, tmp_path: Path, wrap: Any) -> None:
    torch.save(wrap(model.state_dict()), tmp_path / "weights.pt")
    loaded = build_module(source, "build", weights=tmp_path / "weights.pt")
    for key, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value)


def test_of_several_state_dicts_the_recipe_says_which(model: torch.nn.Module, tmp_path: Path) -> None:
    path, state = tmp_path / "checkpoint.pt", model.state_dict()
    torch.save({"model": state, "model_ema": {key: value + 1 for key, value in state.items()}}, path)
    with pytest.raises(InputError, match=r"several state dicts: model, model_ema; .* model\.weights_key"):
        read_state_dict(path)
    with pytest.raises(InputError, match=r"no state dict under 'ema'.*there are: model, model_ema"):
        read_state_dict(path, "ema")
    assert torch.equal(read_state_dict(path, "model_ema")["2.bias"], state["2.bias"] + 1)


def test_safetensors_are_loaded_into_the_model(model: torch.nn.Module, source: Path, tmp_path: Path) -> None:
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    loaded = build_module(source, "build", weights=tmp_path / "weights.safetensors")
    assert torch.equal(loaded.state_dict()["2.weight"], model.state_dict()["2.weight"])


def test_keys_that_do_not_fit_are_listed(model: torch.nn.Module, tmp_path: Path) -> None:
    state = dict(model.state_dict())
    state["0.0.weights"] = state.pop("0.0.weight")
    state["2.bias"] = torch.zeros(3)
    torch.save(state, tmp_path / "weights.pt")
    with pytest.raises(InputError) as caught:
        load_weights(model, tmp_path / "weights.pt")
    for part in ("1 missing: 0.0.weight;", "1 unexpected: 0.0.weights", "2.bias (3,) instead of (2,)"):
        assert part in str(caught.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_named(model: torch.nn.Module, tmp_path: Path, value: float) -> None:
    state = model.state_dict()
    state["2.weight"][0, 0] = value
    torch.save(state, tmp_path / "weights.pt")
    with pytest.raises(InputError, match=r"2\.weight \(1 of 288 values\)"):
        load_weights(model, tmp_path / "weights.pt")


def test_a_pickle_that_runs_code_is_refused_and_does_not_run(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    torch.save({"weight": _Runs(mark)}, tmp_path / "new.pt")
    (tmp_path / "old.pt").write_bytes(pickle.dumps(_Runs(mark)))
    for name in ("new.pt", "old.pt"):
        with pytest.raises(InputError, match=name):
            read_state_dict(tmp_path / name)
    assert not mark.exists()


def test_a_pickled_module_is_refused_with_what_to_do(tmp_path: Path) -> None:
    torch.save(torch.nn.Linear(2, 2), tmp_path / "model.pt")
    with pytest.raises(InputError, match=r"refused \(torch\.nn\.\S+Linear\); save the state dict alone: torch\.save"):
        read_state_dict(tmp_path / "model.pt")


@pytest.mark.parametrize("content", [[1, 2], {"a": 1}, torch.zeros(2)], ids=["list", "numbers", "tensor"])
def test_what_is_no_state_dict_is_refused(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "weights.pt")
    with pytest.raises(InputError, match="state dict"):
        read_state_dict(tmp_path / "weights.pt")


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("damage", ["missing", "empty", "random", "truncated"])
def test_damaged_weights_are_told_in_one_sentence(
    model: torch.nn.Module, tmp_path: Path, suffix: str, damage: str
) -> None:
    path = tmp_path / f"weights{suffix}"
    if suffix == ".pt":
        torch.save(model.state_dict(), path)
    else:
        save_file(model.state_dict(), path)
    content = {"empty": b"", "random": bytes(range(256)) * 4, "truncated": path.read_bytes()[:-500], "missing": None}[
        damage
    ]
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=f"weights{suffix}"):
        read_state_dict(path)


@pytest.fixture
def program(model: torch.nn.Module, tmp_path: Path) -> Path:
    path = tmp_path / "model.pt2"
    exported = torch.export.export(model, (torch.zeros(2, 3, 8, 8),), dynamic_shapes=({0: torch.export.Dim("n")},))
    torch.export.save(exported, path)
    return path


def _rewritten(path: Path, change: Callable[[str, bytes], bytes | None], extra: dict[str, bytes] | None = None) -> None:
    """Writes the archive anew with each member changed, None leaving it out, and `extra` members."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(buffer, "w") as new:
        root = old.namelist()[0].split("/")[0]
        for name in old.namelist():
            content = change(name.split("/", 1)[1], old.read(name))
            if content is not None:
                new.writestr(name, content)
        for name, content in (extra or {}).items():
            new.writestr(f"{root}/{name}", content)
    path.write_bytes(buffer.getvalue())


def test_an_exported_program_is_loaded(program: Path, model: torch.nn.Module) -> None:
    data = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(load_exported(program).module(check_guards=False)(data), model(data))


def _unsafe_inputs(mark: Path) -> bytes:
    buffer = io.BytesIO()
    torch.save(((_Runs(mark),), {}), buffer)
    return buffer.getvalue()


def test_example_inputs_that_run_code_are_refused_and_do_not_run(program: Path, tmp_path: Path) -> None:
    unsafe = _unsafe_inputs(tmp_path / "mark")
    _rewritten(program, lambda name, old: unsafe if name.startswith("data/sample_inputs/") else old)
    with pytest.raises(InputError, match="could run code"):
        load_exported(program)
    assert not (tmp_path / "mark").exists()


def test_pickled_weights_are_refused(program: Path) -> None:
    def change(name: str, old: bytes) -> bytes:
        if not name.endswith("weights_config.json"):
            return old
        config = json.loads(old)
        next(iter(config["config"].values()))["use_pickle"] = True
        return json.dumps(config).encode()

    _rewritten(program, change)
    with pytest.raises(InputError, match="stored as a pickled object"):
        load_exported(program)


@pytest.mark.parametrize(
    "target", ["torch.serialization.os.system", "_operator.attrgetter", "torch.ops.load_library", "#other:call"]
)
def test_a_call_of_what_is_no_operator_is_refused(program: Path, target: str) -> None:
    _rewritten(program, lambda name, old: old.replace(b"torch.ops.aten.relu.default", target.encode()))
    with pytest.raises(InputError, match="not one of PyTorch's operators"):
        load_exported(program)


@pytest.mark.parametrize("size", ["exec(chr(112))", "().__class__", "Symbol('x.y')", "[s0 for s0 in s1]"])
def test_a_size_that_is_code_is_refused(program: Path, size: str) -> None:
    def change(name: str, old: bytes) -> bytes:
        return _with_sizes(old, size) if name == "models/model.json" else old

    _rewritten(program, change)
    with pytest.raises(InputError, match="symbolic size"):
        load_exported(program)


def _with_sizes(content: bytes, size: str) -> bytes:
    def change(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: size if key == "expr_str" else change(part) for key, part in value.items()}
        return [change(part) for part in value] if isinstance(value, list) else value

    return json.dumps(change(json.loads(content))).encode()


def test_compiled_code_in_an_archive_is_refused(program: Path) -> None:
    _rewritten(program, lambda _, old: old, {"data/aotinductor/model/model.so": b"\x7fELF"})
    with pytest.raises(InputError, match="may be executable code"):
        load_exported(program)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 broken", b"random" * 50])
def test_a_damaged_archive_is_told_in_one_sentence(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.pt2").write_bytes(content)
    with pytest.raises(InputError, match=r"model\.pt2 is not a \.pt2 archive"):
        load_exported(tmp_path / "model.pt2")
