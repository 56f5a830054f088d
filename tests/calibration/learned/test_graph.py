"""A graph run by torch computes what ONNX Runtime computes, for any batch, and says what it cannot run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch

from edgeship.calibration.errors import InputError, UnsupportedError
from edgeship.calibration.learned.graph import TorchGraph

Build = Callable[..., ir.Model]
Run = Callable[[ir.Model, Mapping[str, Any]], dict[str, Any]]
RNG = np.random.default_rng(7)
NETWORK = """(float[1,3,9,9] x) => (float[1,5] y) {
    a = Conv <pads=[1,1,0,0], strides=[2,2]> (x, w1, b1)
    r = Relu (a)
    p = MaxPool <kernel_shape=[2,2], ceil_mode=1, strides=[2,2]> (r)
    d = Conv <pads=[1,1,1,1], group=6> (p, w2)
    h = HardSwish (d)
    s = Add (h, p)
    g = GlobalAveragePool (s)
    f = Reshape (g, shape)
    l = LayerNormalization (f, gamma, beta)
    y = Gemm <transB=1> (l, w3, b3)
}"""
WEIGHTS: dict[str, Any] = {
    "w1": RNG.normal(size=(6, 3, 3, 3)),
    "b1": RNG.normal(size=6),
    "w2": RNG.normal(size=(6, 1, 3, 3)),
    "shape": np.array([1, 6]),
    "gamma": RNG.normal(size=6),
    "beta": RNG.normal(size=6),
    "w3": RNG.normal(size=(5, 6)),
    "b3": RNG.normal(size=5),
}


def test_a_network_computes_what_onnx_runtime_does(build: Build, run_exactly: Run) -> None:
    model = build(NETWORK, **WEIGHTS)
    x = RNG.normal(size=(1, 3, 9, 9)).astype(np.float32)
    result = TorchGraph(model)({"x": torch.from_numpy(x)})["y"].numpy()
    np.testing.assert_allclose(result, run_exactly(model, {"x": x})["y"], rtol=1e-4, atol=1e-5)


def test_a_graph_of_a_single_sample_takes_many_as_if_each_ran_alone(build: Build, run_exactly: Run) -> None:
    model = build(NETWORK, **WEIGHTS)
    x = RNG.normal(size=(4, 3, 9, 9)).astype(np.float32)
    result = TorchGraph(model)({"x": torch.from_numpy(x)})["y"].numpy()
    alone = np.concatenate([run_exactly(model, {"x": sample[np.newaxis]})["y"] for sample in x])
    np.testing.assert_allclose(result, alone, rtol=1e-4, atol=1e-5)


def test_gradients_reach_the_input_and_whatever_is_given_from_outside(build: Build) -> None:
    graph = TorchGraph(build(NETWORK, **WEIGHTS))
    x = torch.randn(2, 3, 9, 9, requires_grad=True)
    weight = torch.tensor(WEIGHTS["w1"], dtype=torch.float32, requires_grad=True)
    graph({"x": x}, {"w1": weight})["y"].square().sum().backward()
    for tensor in (x, weight):
        assert tensor.grad is not None
        assert tensor.grad.abs().max() > 0


def test_values_inside_can_be_kept(build: Build) -> None:
    graph = TorchGraph(build(NETWORK, **WEIGHTS))
    kept = graph({"x": torch.randn(3, 3, 9, 9)}, keep=["r"])["r"]
    assert kept.shape == (3, 6, 4, 4)
    assert kept.min() == 0


def test_every_operator_without_a_form_is_named_at_once(build: Build) -> None:
    model = build("(float[2,4,4] x) => (float[2] y) { a = Det (x) y = Relu (a) }")
    model.graph.node(1).op_type = "Unheard"
    with pytest.raises(UnsupportedError) as caught:
        TorchGraph(model)
    assert "Det" in str(caught.value)
    assert "Unheard" in str(caught.value)
    assert len(caught.value.findings) == 2


def test_a_missing_input_is_named(build: Build) -> None:
    graph = TorchGraph(build("(float[1,3] x, float[1,3] z) => (float[1,3] y) { y = Add (x, z) }"))
    with pytest.raises(InputError, match="z"):
        graph({"x": torch.zeros(1, 3)})


def test_a_dynamic_batch_runs_as_it_is(build: Build, run_exactly: Run) -> None:
    model = build(
        "(float[N,4] x) => (float[N,2] y) { m = MatMul (x, w) y = Softmax <axis=-1> (m) }", w=RNG.normal(size=(4, 2))
    )
    x = RNG.normal(size=(5, 4)).astype(np.float32)
    result = TorchGraph(model)({"x": torch.from_numpy(x)})["y"].numpy()
    np.testing.assert_allclose(result, run_exactly(model, {"x": x})["y"], rtol=1e-4, atol=1e-6)
