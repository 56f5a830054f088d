"""A network whose code looks at its input's values is refused with the line, and one that looks at sizes is not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import nn

from edgeship.calibration.errors import StageError
from edgeship.calibration.graph.onnx_file import to_bytes
from edgeship.pipeline import torch_export
from edgeship.pipeline.cli import cli
from edgeship.pipeline.data_dependence import InputDependence, input_dependence
from edgeship.pipeline.models import open_source_session
from edgeship.pipeline.recipe import Recipe, load_recipe
from edgeship.pipeline.stages.export import export_model
from edgeship.pipeline.summary import warnings
from edgeship.targets.onnxruntime import open_reference

PICTURE = np.linspace(0, 1, 48, dtype=np.float32).reshape(1, 3, 4, 4)


class Computes(nn.Module):
    """A module of one function of its input."""

    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.function = function
        self.register_buffer("gain", torch.tensor(2.0))

    def forward(self, picture: torch.Tensor) -> torch.Tensor:
        return self.function(picture * self.gain)


def into_a_slice(x: torch.Tensor) -> torch.Tensor:
    seen = torch.zeros(4)
    seen[1:3] = x.mean()
    return x * seen.tolist()[1]


def on_sizes(x: torch.Tensor) -> torch.Tensor:
    batch, _, height, width = x.shape
    if height % 2 or x.size(0) != batch or x.numel() > 10**6:
        x = nn.functional.pad(x, (0, 1))
    mask = torch.zeros_like(x) + x.new_ones(1)
    return x * torch.tensor(width / 2) if bool(mask.any()) else x


def branching(x: torch.Tensor) -> torch.Tensor:
    if bool(x.mean() > 0.5):  # noqa: SIM108 - the branch is what is tried
        y = x * 2
    else:
        y = x * 3
    return y


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x if x.mean() > 0 else -x,
        lambda x: x * x.mean().item(),
        lambda x: x * float(x.max()),
        lambda x: x[:, : int(x.sum()) % 3 + 1],
        lambda x: x * float(np.asarray(x).max()),
        lambda x: x if torch.equal(x, x * 2) else -x,
        lambda x: x if torch.allclose(x, x * 2) else -x,
        into_a_slice,
    ],
)
def test_a_value_of_the_input_is_found_where_it_is_taken(function: Callable[[torch.Tensor], torch.Tensor]) -> None:
    found = input_dependence(Computes(function), [[PICTURE]]).values
    assert len(found) == 1
    assert found[0].place.startswith("test_data_dependence.py:")
    assert "x" in found[0].code


@pytest.mark.parametrize("function", [on_sizes, lambda x: torch.where(x.mean() > 0, x, -x)])
def test_sizes_and_operations_on_tensors_keep_nothing(function: Callable[[torch.Tensor], torch.Tensor]) -> None:
    assert input_dependence(Computes(function), [[PICTURE]]) == InputDependence()


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
def test_a_script_keeps_its_branches_itself() -> None:
    assert input_dependence(Computes(torch.jit.script(branching)), [[PICTURE]]) == InputDependence()
    assert len(input_dependence(Computes(branching), [[PICTURE]]).values) == 1


def test_a_weights_value_is_no_value_of_the_input() -> None:
    class Scaled(Computes):
        def forward(self, picture: torch.Tensor) -> torch.Tensor:
            return picture * self.gain.item() if self.gain > 1 else picture

    assert input_dependence(Scaled(torch.relu), [[PICTURE]]) == InputDependence()


@pytest.mark.parametrize(
    ("function", "count"),
    [
        (lambda x: x[x > 1], 1),
        (torch.nonzero, 1),
        (lambda x: torch.masked_select(x, x > 1), 1),
        (lambda x: x.flatten()[x.flatten().argsort()], 0),
        (lambda x: x[torch.ones_like(x) > 0], 0),
    ],
)
def test_a_size_that_depends_on_the_input_is_told_from_a_fixed_one(
    function: Callable[[torch.Tensor], torch.Tensor], count: int
) -> None:
    found = input_dependence(Computes(function), [[PICTURE]])
    assert (len(found.values), len(found.sizes)) == (0, count)


SOURCE = """
import torch
from torch import nn


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.dark, self.bright = nn.Linear(27, 5), nn.Linear(27, 5)

    def forward(self, picture):
        return self.bright(picture.flatten(1)) if picture.mean() > 30 else self.dark(picture.flatten(1))


class Counting(Branching):
    def forward(self, picture):
        many = picture[picture > 30].numel() > 5
        head = self.bright if many else self.dark
        return head(picture.flatten(1))


class Plain(nn.Module):
    def forward(self, picture):
        return torch.relu(picture)


class Windowed(nn.Module):
    # fixed sizes decide, as in networks with windows, and a buffer, which torch.export refuses
    def __init__(self):
        super().__init__()
        self.register_buffer("scale", torch.tensor(3.0))

    def forward(self, picture):
        height, width = picture.shape[2:]
        if height % 2 or width % 2:
            picture = nn.functional.pad(picture, (0, 1, 0, 1))
        return torch.relu(picture) * self.scale.item() if self.scale > 0 else picture
"""


def write_recipe(folder: Path, factory: str, samples: np.ndarray[tuple[int, ...], np.dtype[np.float32]]) -> Recipe:
    (folder / "model.py").write_text(SOURCE)
    np.savez(folder / "data.npz", picture=samples)
    (folder / "recipe.toml").write_text(
        f'name = "test"\n[model]\nsource = "model.py:{factory}"\n[input]\nshape = {json.dumps([1, 3, 3, 3])}\n'
        '[data]\ncalibration = "data.npz"\n[targets.onnxruntime]\n'
    )
    return load_recipe(folder / "recipe.toml")


def one_of_many_is_bright() -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    samples = np.random.default_rng(0).normal(size=(16, 3, 3, 3)).astype(np.float32)
    samples[-1] += 100  # no golden sample: those are the first four of a fixed order
    return samples


def test_a_branch_on_the_input_is_refused_with_its_line(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, "Branching", one_of_many_is_bright())
    message = (
        r"dynamo: .*data-dependent.*; torchscript: model\.py:13 \(`return self\.bright.*`\) makes a Python value of a "
        r"tensor that depends on the input.*accepted: tensor operations, such as torch\.where"
    )
    with pytest.raises(StageError, match=message):
        export_model(recipe)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_branch_on_a_number_of_values_is_refused_where_it_is(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, "Counting", one_of_many_is_bright()[:8])
    with pytest.raises(StageError, match=r"torchscript: model\.py:\d\d \(`(many|head) = .*`\) makes a Python value"):
        export_model(recipe)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_real_samples_beside_the_golden_ones_tell_a_frozen_branch_by_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(*_: object) -> InputDependence:
        return InputDependence()

    monkeypatch.setattr(torch_export, "input_dependence", none)
    recipe = write_recipe(tmp_path, "Branching", one_of_many_is_bright())
    with pytest.raises(StageError, match="the torchscript exporter changed output 'output' by up to"):
        export_model(recipe)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_branch_on_fixed_sizes_and_weights_is_traced(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, "Windowed", one_of_many_is_bright())
    result = export_model(recipe)
    assert result.facts["exporter"] == "torchscript"
    feeds = {"picture": one_of_many_is_bright()[:1]}
    expected = open_source_session(recipe).run(feeds)["output"]
    np.testing.assert_allclose(open_reference(to_bytes(result.model)).run(feeds)["output"], expected, atol=1e-5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(("factory", "exporter"), [("Windowed", "torchscript"), ("Plain", "dynamo")])
def test_the_report_and_the_summary_tell_of_a_fallback(tmp_path: Path, factory: str, exporter: str) -> None:
    recipe = write_recipe(tmp_path, factory, one_of_many_is_bright())
    out = tmp_path / "run"
    result = CliRunner().invoke(cli, ["deploy", str(recipe.path), "--out", str(out), "--to", "export", "--json"])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["model"]["exporter"] == exporter
    assert bool(report["model"]["fallback_reason"]) == (exporter == "torchscript")
    noted = [line for line in warnings(report) if f"exported with torch's {exporter} exporter" in line]
    assert len(noted) == (exporter == "torchscript")
    assert all(report["model"]["fallback_reason"] in line for line in noted)
