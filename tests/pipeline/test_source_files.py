"""What a stage's result depends on outside the run folder: a change there is noticed, wherever it lies."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgeship.calibration.errors import InputError
from edgeship.pipeline.recipe import Recipe, load_recipe
from edgeship.pipeline.source_files import source_files


def make(folder: Path, source: str, more: str = "") -> Recipe:
    path = folder / "recipe.toml"
    path.write_text(f'name = "tiny"\nmodel.source = "{source}"\n{more}\n[targets.onnxruntime]\n')
    return load_recipe(path)


def write(path: Path, text: str = "") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def names(recipe: Recipe, folder: Path) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in source_files(recipe)]


def test_packages_beside_the_models_file_are_part_of_it(tmp_path: Path) -> None:
    for name in ("model.py", "layers.py", "nets/resnet.py", "nets/parts/block.py"):
        write(tmp_path / name)
    assert names(make(tmp_path, "model.py:build"), tmp_path) == [
        *("model.py", "layers.py", "nets/parts/block.py", "nets/resnet.py")
    ]


def test_data_caches_and_environments_beside_the_models_file_are_not_looked_into(tmp_path: Path) -> None:
    for name in ("model.py", "data/deep/odd.py", ".venv/x.py", "env/pyvenv.cfg", "env/y.py", "__pycache__/z.py"):
        write(tmp_path / name)
    assert names(make(tmp_path, "model.py:build"), tmp_path) == ["model.py"]


def save_with_external_data(folder: Path, weights: np.ndarray) -> None:
    node = helper.make_node("Gemm", ["x", "w"], ["y"])
    infos = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 4]) for name in ("x", "y")]
    graph = helper.make_graph([node], "g", infos[:1], infos[1:], [numpy_helper.from_array(weights, "w")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.save(model, folder / "model.onnx", save_as_external_data=True, location="weights.data", size_threshold=0)


def test_the_external_data_of_an_onnx_file_is_part_of_it(tmp_path: Path) -> None:
    save_with_external_data(tmp_path, np.eye(4, dtype=np.float32))
    assert names(make(tmp_path, "model.onnx"), tmp_path) == ["model.onnx", "weights.data"]


def test_external_data_that_is_gone_is_told_before_anything_runs(tmp_path: Path) -> None:
    save_with_external_data(tmp_path, np.eye(4, dtype=np.float32))
    (tmp_path / "weights.data").unlink()
    with pytest.raises(InputError, match=r"external data of 'w' should be in 'weights\.data', which does not exist"):
        source_files(make(tmp_path, "model.onnx"))


@pytest.mark.parametrize("change", ["data.seed = 1", "quantize.samples = 3"])
def test_another_choice_of_calibration_arrays_has_another_digest(tmp_path: Path, change: str) -> None:
    np.savez(tmp_path / "data.npz", x=np.zeros((5, 4), np.float32))
    data = 'data.calibration = "data.npz"\n'
    before = make(tmp_path, "model.onnx", data).data_digest("calibration")
    assert make(tmp_path, "model.onnx", data).data_digest("calibration") == before
    assert make(tmp_path, "model.onnx", data + change).data_digest("calibration") != before


def test_another_number_of_evaluation_arrays_has_another_digest(tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", x=np.zeros((5, 4), np.float32))
    data = 'data.evaluation = "data.npz"\n'
    digests = [
        make(tmp_path, "model.onnx", f"{data}{more}").data_digest("evaluation")
        for more in ("", "data.evaluation_samples = 3", "data.evaluation_samples = 4")
    ]
    assert len(set(digests)) == 3
