"""Layers that a runtime executes in float are explained: by the plan, by the target, or as not known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from edgeship.calibration.planning.overrides import Override
from edgeship.calibration.types import Finding
from edgeship.pipeline.float_layers import QUANTIZED, FloatLayer, explained
from edgeship.pipeline.quantizing.calibrated import quantize_model
from edgeship.pipeline.quantizing.weight_only import float16_weights, int8_weights
from edgeship.targets.base import ConvertOptions, load

Array = np.ndarray[Any, np.dtype[Any]]


class Shot:
    def __init__(self, name: str, feeds: Mapping[str, Array]) -> None:
        self.name, self.feeds = name, feeds


def float_model(tiny_models: Mapping[str, bytes], name: str) -> ir.Model:
    return ir.from_proto(onnx.load_model_from_string(tiny_models[name]))


def left(target: str, model: ir.Model, folder: Path) -> list[FloatLayer]:
    chosen = load(target)
    path = folder / f"model{chosen.suffix}"
    path.write_bytes(chosen.convert(model, ConvertOptions()))
    return explained(chosen.integer_share(path).float_layers, model, chosen.notes(model))


@pytest.mark.parametrize("target", ["onnxruntime", "tflite"])
@pytest.mark.parametrize(
    ("net", "patterns", "nodes"),
    [
        ("plain", ["second"], ["Conv_second (Conv)"]),
        ("residual", ["stem", "logits"], ["Conv_stem (Conv)", "Gemm_logits (Gemm)"]),
        ("depthwise", ["depthwise", "stem"], ["Conv_stem (Conv)", "Conv_depthwise (Conv)"]),
    ],
)
def test_a_layer_that_the_recipe_keeps_float_is_said_to_be(  # noqa: PLR0917 - two parameters of three values
    tiny_models: dict[str, bytes],
    tiny_images: Array,
    tmp_path: Path,
    target: str,
    net: str,
    patterns: Sequence[str],
    nodes: Sequence[str],
) -> None:
    shots = [Shot(str(i), {"image": image[np.newaxis]}) for i, image in enumerate(tiny_images[:4])]
    wishes = [Override(pattern, stays_float=True) for pattern in patterns]
    result = quantize_model(float_model(tiny_models, net), shots, [load(target).rules], overrides=wishes)
    found = left(target, result.models["full"], tmp_path)
    assert [layer.node for layer in found] == nodes
    assert {layer.reason for layer in found} == {f"the recipe keeps {pattern!r} float" for pattern in patterns}


@pytest.mark.parametrize("target", ["onnxruntime", "tflite"])
def test_weights_that_stay_float_have_a_reason_too(tiny_models: dict[str, bytes], tmp_path: Path, target: str) -> None:
    wishes = [Override("second", stays_float=True)]
    small = int8_weights(float_model(tiny_models, "plain"), load(target).rules, ["full"], wishes, per_tensor=False)
    found = left(target, small.models["full"], tmp_path)
    assert ("Conv_second (Conv)", "the recipe keeps 'second' float") in [(each.node, each.reason) for each in found]


def test_what_the_target_has_no_kernel_for_is_said_in_its_own_words(
    tiny_models: dict[str, bytes], tiny_images: Array, tmp_path: Path
) -> None:
    shots = [Shot(str(i), {"image": image[np.newaxis]}) for i, image in enumerate(tiny_images[:4])]
    target = load("tflite")
    model = quantize_model(float_model(tiny_models, "plain"), shots, [target.rules]).models["full"]
    for value in model.graph.initializers.values():
        if value.name == "second_weight__zero_point":
            assert value.const_value is not None
            value.const_value = ir.tensor(value.const_value.numpy() + np.int8(3), name=value.name)
    (found,) = left("tflite", model, tmp_path)
    assert found.node == "Conv_second (Conv)"
    assert found.reason is not None
    assert "zero points" in found.reason


def test_what_nobody_wanted_in_float_is_told_from_what_is_not_known(tiny_models: dict[str, bytes]) -> None:
    half = float16_weights(float_model(tiny_models, "plain"), []).models["full"]
    notes = [Finding("Conv 'Conv_first'", "no kernel for this dilation")]
    found = explained(["Conv_first (Conv)", "second_relu/float", "logits", "odd"], half, notes)
    assert found == [
        FloatLayer("Conv_first (Conv)", "Conv_first (Conv)", "no kernel for this dilation"),
        FloatLayer("second_relu/float", "Conv_second (Conv)", QUANTIZED),
        FloatLayer("logits", "Gemm_logits (Gemm)", QUANTIZED),
        FloatLayer("odd", None, None),
    ]
