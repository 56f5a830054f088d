"""Each rewrite does what it says, where it is exact, and nothing where it is not; ONNX Runtime is the judge."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from edgeship.calibration.graph.onnx_file import to_bytes
from edgeship.pipeline import isolation
from edgeship.pipeline.simplification import simplifier
from edgeship.pipeline.simplification.simplifier import Simplified, simplify_model

Array = np.ndarray[Any, np.dtype[Any]]
RNG = np.random.default_rng(7)
IMAGE = (1, 4, 8, 8)


def normal(*shape: int) -> Array:
    return np.random.default_rng(sum(shape) + 3).normal(size=shape).astype(np.float32)


def node(op: str, inputs: str, output: str, **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(op, inputs.split(), output.split(), **attributes)


def build(
    nodes: Sequence[onnx.NodeProto],
    shape: Sequence[int | str] = IMAGE,
    outputs: Sequence[str] = ("y",),
    opset: int = 18,
    **constants: Any,
) -> bytes:
    """A model from `x` of `shape` to `outputs`, whose shapes are left to inference."""
    graph = helper.make_graph(
        nodes,
        "test",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    return bytes(onnx.shape_inference.infer_shapes(model).SerializeToString())


def run(model: bytes, feeds: dict[str, Array]) -> list[Array]:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"]).run(None, feeds)


def simplified(model: bytes, shape: Sequence[int] = IMAGE) -> dict[str, int]:
    """The operators after our own rewrites alone, once the outputs were found equal on data of our own."""
    result = simplify_model(model, onnxsim=False)
    check_same(model, result, shape)
    return dict(result.after)


def check_same(model: bytes, result: Simplified, shape: Sequence[int]) -> None:
    data = np.random.default_rng(11).normal(size=shape).astype(np.float32) * 3
    for before, after in zip(run(model, {"x": data}), run(to_bytes(result.model), {"x": data}), strict=True):
        assert before.shape == after.shape
        np.testing.assert_allclose(after, before, rtol=0, atol=2e-5 * max(1.0, float(np.abs(before).max())))


def normalization(channels: int) -> dict[str, Array]:
    return {
        "gamma": normal(channels),
        "beta": normal(channels + 0),
        "mean": normal(channels) * 0.5,
        "var": np.abs(normal(channels)) + 0.1,
    }


BATCH_NORM = node("BatchNormalization", "c gamma beta mean var", "y", epsilon=1e-3)


# ---- normalization and affine operators ----------------------------------------------------------------------------


@pytest.mark.parametrize("group", [1, 2, 4])
@pytest.mark.parametrize("bias", [True, False])
def test_a_normalization_after_a_convolution_is_folded(group: int, bias: bool) -> None:
    weights = {"w": normal(8, 4 // group, 3, 3)} | ({"b": normal(8)} if bias else {})
    nodes = [node("Conv", "x w b" if bias else "x w", "c", group=group, pads=[1] * 4), BATCH_NORM]
    assert simplified(build(nodes, **weights, **normalization(8))) == {"Conv": 1}


@pytest.mark.parametrize("group", [1, 2, 4])
def test_a_normalization_after_a_transposed_convolution_is_folded(group: int) -> None:
    nodes = [node("ConvTranspose", "x w b", "c", group=group, strides=[2, 2]), BATCH_NORM]
    model = build(nodes, w=normal(4, 8 // group, 2, 2), b=normal(8), **normalization(8))
    assert simplified(model) == {"ConvTranspose": 1}


@pytest.mark.parametrize("turned", [0, 1])
def test_a_normalization_after_a_fully_connected_layer_is_folded(turned: int) -> None:
    weight = normal(6, 4) if turned else normal(4, 6)
    nodes = [node("Gemm", "x w b", "c", transB=turned, alpha=0.5, beta=2.0), BATCH_NORM]
    assert simplified(build(nodes, (1, 4), w=weight, b=normal(6), **normalization(6)), (1, 4)) == {"Gemm": 1}


def test_a_normalization_before_a_convolution_is_folded_where_nothing_is_padded() -> None:
    before = node("BatchNormalization", "x gamma beta mean var", "n")
    plain = [before, node("Conv", "n w", "y", group=2)]
    assert simplified(build(plain, w=normal(6, 2, 3, 3), **normalization(4))) == {"Conv": 1}
    padded = [before, node("Conv", "n w", "y", group=2, pads=[1] * 4)]
    assert simplified(build(padded, w=normal(6, 2, 3, 3), **normalization(4))) == {"Conv": 2}


def test_a_normalization_that_no_layer_takes_becomes_a_depthwise_convolution() -> None:
    nodes = [node("BatchNormalization", "x gamma beta mean var", "n"), node("Relu", "n", "y")]
    result = simplify_model(build(nodes, **normalization(4)), onnxsim=False)
    assert result.after == {"Conv": 1, "Relu": 1}
    convolution = next(each for each in result.model.graph if each.op_type == "Conv")
    assert convolution.attributes["group"].as_int() == 4


@pytest.mark.parametrize("shape", [(1, 4), (1, 4, 5), (1, 4, 5, 3, 2)])
def test_a_normalization_alone_of_another_rank_becomes_arithmetic(shape: tuple[int, ...]) -> None:
    nodes = [node("BatchNormalization", "x gamma beta mean var", "n"), node("Neg", "n", "y")]
    assert simplified(build(nodes, shape, **normalization(4)), shape) == {"Add": 1, "Mul": 1, "Neg": 1}


@pytest.mark.parametrize(
    ("operator", "constant"),
    [
        ("Mul", np.float32(0.25)),
        ("Mul", normal(8, 1, 1)),
        ("Div", normal(1, 8, 1, 1)),
        ("Add", normal(8, 1, 1)),
        ("Sub", np.float32(1.5)),
    ],
)
def test_arithmetic_per_channel_after_a_convolution_is_folded(operator: str, constant: Array) -> None:
    nodes = [node("Conv", "x w", "c"), node(operator, "c k", "y")]
    assert simplified(build(nodes, w=normal(8, 4, 3, 3), k=constant)) == {"Conv": 1}


def test_the_order_of_a_product_or_sum_does_not_matter() -> None:
    nodes = [node("Conv", "x w", "c"), node("Mul", "k c", "m"), node("Add", "k m", "y")]
    assert simplified(build(nodes, w=normal(8, 4, 3, 3), k=normal(8, 1, 1))) == {"Conv": 1}


@pytest.mark.parametrize(
    ("operator", "inputs", "constant"),
    [
        ("Add", "c k", normal(1, 1, 6, 6)),  # one value per place, not per channel
        ("Mul", "c k", normal(6)),  # along the width
        ("Sub", "k c", normal(8, 1, 1)),  # constant minus data
        ("Add", "c k", normal(2, 8, 1, 1)),  # makes the batch larger
    ],
)
def test_arithmetic_that_is_not_per_channel_stays(operator: str, inputs: str, constant: Array) -> None:
    nodes = [node("Conv", "x w", "c"), node(operator, inputs, "y")]
    assert simplified(build(nodes, w=normal(8, 4, 3, 3), k=constant)) == {"Conv": 1, operator: 1}


def test_a_convolution_with_another_consumer_is_left_alone() -> None:
    nodes = [node("Conv", "x w", "c"), node("Mul", "c k", "m"), node("Add", "m c", "y")]
    assert simplified(build(nodes, w=normal(8, 4, 3, 3), k=normal(8, 1, 1))) == {"Add": 1, "Conv": 1, "Mul": 1}


def test_a_convolution_whose_output_is_the_models_is_left_alone() -> None:
    nodes = [node("Conv", "x w", "c"), node("Mul", "c k", "y")]
    model = build(nodes, outputs=("c", "y"), w=normal(8, 4, 3, 3), k=normal(8, 1, 1))
    assert simplified(model) == {"Conv": 1, "Mul": 1}


def test_weights_that_two_layers_share_are_not_overwritten() -> None:
    nodes = [
        node("Conv", "x w", "c", pads=[1] * 4),
        node("Mul", "c k", "m"),
        node("Conv", "m w", "d", pads=[1] * 4),
        node("Add", "d l", "y"),
    ]
    model = build(nodes, w=normal(4, 4, 3, 3), k=normal(4, 1, 1), l=normal(4, 1, 1) * 2)
    assert simplified(model) == {"Conv": 2}


@pytest.mark.parametrize(
    ("operator", "pads", "after"), [("Mul", 1, {"Conv": 1}), ("Add", 0, {"Conv": 1}), ("Add", 1, {"Add": 1, "Conv": 1})]
)
def test_arithmetic_before_a_convolution_is_folded_where_that_is_exact(
    operator: str, pads: int, after: dict[str, int]
) -> None:
    nodes = [node(operator, "x k", "m"), node("Conv", "m w b", "y", group=2, pads=[pads] * 4)]
    assert simplified(build(nodes, k=normal(4, 1, 1), w=normal(6, 2, 3, 3), b=normal(6))) == after


def test_input_scaling_is_folded_into_a_transposed_convolution() -> None:
    nodes = [node("Mul", "x k", "m"), node("ConvTranspose", "m w", "y", group=2)]
    assert simplified(build(nodes, k=normal(4, 1, 1), w=normal(4, 3, 2, 2))) == {"ConvTranspose": 1}


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    group=st.sampled_from([1, 2]),
    operators=st.lists(st.sampled_from(["Mul", "Add", "Sub", "Div"]), min_size=1, max_size=3),
    scalar=st.booleans(),
    before=st.booleans(),
)
def test_any_chain_of_affine_operators_around_a_convolution_is_folded(
    group: int, operators: list[str], scalar: bool, before: bool
) -> None:
    constants = {f"k{place}": np.float32(1.7) if scalar else normal(4, 1, 1) + 2 for place in range(len(operators))}
    names = ["x"] if before else ["x", "c"]
    nodes = [] if before else [node("Conv", "x w", "c", group=group)]
    data = names[-1]
    for place, operator in enumerate(operators):
        nodes.append(node(operator, f"{data} k{place}", f"m{place}"))
        data = f"m{place}"
    last = node("Conv", f"{data} w", "y", group=group) if before else node("Identity", data, "y")
    model = build([*nodes, last], w=normal(4, 4 // group, 3, 3), **constants)
    assert simplified(model) == {"Conv": 1}


# ---- fully connected layers ----------------------------------------------------------------------------------------


def test_a_product_of_matrices_with_a_bias_becomes_a_fully_connected_layer() -> None:
    model = build([node("MatMul", "x w", "m"), node("Add", "m b", "y")], (1, 4), w=normal(4, 6), b=normal(6))
    result = simplify_model(model, onnxsim=False)
    check_same(model, result, (1, 4))
    (gemm,) = result.model.graph
    assert gemm.op_type == "Gemm"
    assert gemm.attributes["transB"].as_int() == 1
    assert tuple(gemm.inputs[1].shape) == (6, 4)


def test_a_product_of_higher_rank_stays() -> None:
    model = build([node("MatMul", "x w", "m"), node("Add", "m b", "y")], (1, 3, 4), w=normal(4, 6), b=normal(6))
    assert simplified(model, (1, 3, 4)) == {"Add": 1, "MatMul": 1}


def test_a_bias_that_differs_along_the_batch_stays_outside() -> None:
    model = build([node("Gemm", "x w b", "y", transB=1)], (5, 4), w=normal(5, 4), b=normal(5, 1))
    assert simplified(model, (5, 4)) == {"Gemm": 1}


# ---- pooling -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("opset", [17, 18])
@pytest.mark.parametrize(("keep", "after"), [(1, {}), (0, {"Reshape": 1})])
@pytest.mark.parametrize("axes", [[2, 3], [-1, -2]])
def test_a_mean_over_the_map_becomes_a_global_pool(
    opset: int, keep: int, after: dict[str, int], axes: list[int]
) -> None:
    if opset < 18:
        model = build([node("ReduceMean", "x", "y", axes=axes, keepdims=keep)], opset=opset)
    else:
        model = build([node("ReduceMean", "x a", "y", keepdims=keep)], a=np.array(axes, np.int64))
    assert simplified(model) == {"GlobalAveragePool": 1} | after


def test_a_mean_over_the_channels_stays() -> None:
    assert simplified(build([node("ReduceMean", "x a", "y")], a=np.array([1], np.int64))) == {"ReduceMean": 1}


@pytest.mark.parametrize("keep", [0, 1])
def test_a_mean_over_width_and_then_height_becomes_one_pool(keep: int) -> None:
    nodes = [node("ReduceMean", "x a", "m", keepdims=keep), node("ReduceMean", "m b", "y", keepdims=keep)]
    model = build(nodes, a=np.array([3], np.int64), b=np.array([2], np.int64))
    assert simplified(model) == {"GlobalAveragePool": 1} | ({} if keep else {"Reshape": 1})


@pytest.mark.parametrize(
    ("attributes", "after"),
    [
        ({"kernel_shape": [8, 8]}, "GlobalAveragePool"),
        ({"kernel_shape": [8, 8], "strides": [8, 8]}, "GlobalAveragePool"),
        ({"kernel_shape": [4, 4], "strides": [4, 4]}, "AveragePool"),
        ({"kernel_shape": [8, 8], "pads": [1, 1, 1, 1], "strides": [8, 8]}, "AveragePool"),
    ],
)
def test_an_average_over_the_whole_map_becomes_a_global_pool(attributes: dict[str, Any], after: str) -> None:
    assert simplified(build([node("AveragePool", "x", "y", **attributes)])) == {after: 1}


# ---- padding -------------------------------------------------------------------------------------------------------

PADS = np.array([0, 0, 0, 1, 0, 0, 1, 0], np.int64)


def test_zero_padding_is_folded_into_a_convolution() -> None:
    nodes = [node("Pad", "x p", "q"), node("Conv", "q w", "y", pads=[1, 0, 0, 0], strides=[2, 2])]
    result = simplify_model(build(nodes, p=PADS, w=normal(4, 4, 3, 3)), onnxsim=False)
    (convolution,) = result.model.graph
    assert list(convolution.attributes["pads"].as_ints()) == [1, 1, 1, 0]


@pytest.mark.parametrize(
    ("pads", "value"),
    [(PADS, 1.0), (np.array([0, 1, 0, 0, 0, 0, 0, 0]), 0.0), (np.array([0, 0, -1, 0, 0, 0, 0, 0]), 0.0)],
    ids=["ones", "channels", "cropping"],
)
def test_other_padding_before_a_convolution_stays(pads: Array, value: float) -> None:
    channels = 4 + int(pads[1])
    nodes = [node("Pad", "x p v", "q"), node("Conv", "q w", "y")]
    model = build(nodes, p=pads.astype(np.int64), v=np.float32(value), w=normal(4, channels, 3, 3))
    assert simplified(model) == {"Conv": 1, "Pad": 1}


@pytest.mark.parametrize(
    ("before", "value", "after"),
    [
        ("Relu", 0.0, {"MaxPool": 1, "Relu": 1}),
        ("Relu", -1.0, {"MaxPool": 1, "Relu": 1}),
        ("Neg", 0.0, {"MaxPool": 1, "Neg": 1, "Pad": 1}),
        ("Neg", -np.inf, {"MaxPool": 1, "Neg": 1}),
        ("Relu", 1.0, {"MaxPool": 1, "Pad": 1, "Relu": 1}),
    ],
)
def test_padding_is_folded_into_a_maximum_where_it_never_wins(before: str, value: float, after: dict[str, int]) -> None:
    nodes = [node(before, "x", "r"), node("Pad", "r p v", "q"), node("MaxPool", "q", "y", kernel_shape=[3, 3])]
    assert simplified(build(nodes, p=PADS, v=np.float32(value))) == after


def test_padding_as_large_as_the_window_stays_before_a_maximum() -> None:
    nodes = [node("Relu", "x", "r"), node("Pad", "r p", "q"), node("MaxPool", "q", "y", kernel_shape=[1, 1])]
    assert simplified(build(nodes, p=PADS)) == {"MaxPool": 1, "Pad": 1, "Relu": 1}


@pytest.mark.parametrize(
    ("own", "counts", "after"),
    [([0] * 4, 0, {"AveragePool": 1}), ([1] * 4, 1, {"AveragePool": 1}), ([1] * 4, 0, {"AveragePool": 1, "Pad": 1})],
)
def test_zero_padding_is_folded_into_an_average_that_counts_it(
    own: list[int], counts: int, after: dict[str, int]
) -> None:
    pool = node("AveragePool", "q", "y", kernel_shape=[3, 3], pads=own, count_include_pad=counts)
    assert simplified(build([node("Pad", "x p", "q"), pool], p=PADS)) == after


@pytest.mark.parametrize("mode", ["SAME_UPPER", "SAME_LOWER", "VALID"])
@pytest.mark.parametrize("operator", ["Conv", "MaxPool", "AveragePool"])
def test_automatic_padding_is_written_out(operator: str, mode: str) -> None:
    attributes: dict[str, Any] = {"auto_pad": mode, "kernel_shape": [3, 2], "strides": [2, 3]}
    weights = {"w": normal(4, 4, 3, 2)} if operator == "Conv" else {}
    model = build([node(operator, "x w" if weights else "x", "y", **attributes)], (1, 4, 9, 8), **weights)
    result = simplify_model(model, onnxsim=False)
    check_same(model, result, (1, 4, 9, 8))
    (found,) = result.model.graph
    assert "auto_pad" not in found.attributes


# ---- limits --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("chain", "after"),
    [
        (["Max lo", "Min hi"], {"Clip": 1}),
        (["Min hi", "Max lo"], {"Clip": 1}),
        (["Max zero"], {"Relu": 1}),
        (["Relu", "Relu"], {"Relu": 1}),
        (["Relu", "Clip lo hi"], {"Clip": 1}),
        (["Clip lo hi", "Relu"], {"Clip": 1}),
        (["Clip lo hi", "Clip zero six"], {"Clip": 1}),
        (["Relu", "Min six"], {"Clip": 1}),
        (["Clip zero"], {"Relu": 1}),
        (["Min six"], {"Clip": 1}),
        (["Clip six seven", "Clip lo hi"], {"Clip": 1}),
    ],
)
def test_limits_in_a_row_become_one(chain: list[str], after: dict[str, int]) -> None:
    limits = {"lo": -1.0, "hi": 2.0, "zero": 0.0, "six": 6.0, "seven": 7.0}
    nodes, data = [], "x"
    for place, step in enumerate(chain):
        operator, *bounds = step.split()
        output = "y" if place == len(chain) - 1 else f"v{place}"
        nodes.append(node(operator, " ".join([data, *bounds]), output))
        data = output
    assert simplified(build(nodes, **{name: np.float32(value) for name, value in limits.items()})) == after


def test_a_limit_per_channel_stays() -> None:
    assert simplified(build([node("Max", "x k", "y")], k=normal(4, 1, 1))) == {"Max": 1}


def test_a_limit_with_another_consumer_stays() -> None:
    nodes = [node("Relu", "x", "r"), node("Min", "r six", "m"), node("Add", "r m", "y")]
    assert simplified(build(nodes, six=np.float32(6))) == {"Add": 1, "Clip": 1, "Relu": 1}


# ---- hard swish ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "nodes",
    [
        [node("Clip", "a zero six", "c"), node("Div", "c six", "d"), node("Mul", "x d", "y")],
        [node("Clip", "a zero six", "c"), node("Mul", "c x", "d"), node("Div", "d six", "y")],
        [node("Clip", "a zero six", "c"), node("Mul", "sixth c", "d"), node("Mul", "d x", "y")],
        [node("Relu", "a", "r"), node("Min", "r six", "c"), node("Mul", "x c", "d"), node("Mul", "d sixth", "y")],
    ],
)
def test_a_hard_swish_in_parts_becomes_one_operator(nodes: list[onnx.NodeProto]) -> None:
    constants = {"three": 3.0, "zero": 0.0, "six": 6.0, "sixth": 1 / 6}
    model = build(
        [node("Add", "x three", "a"), *nodes], **{name: np.float32(value) for name, value in constants.items()}
    )
    assert simplified(model) == {"HardSwish": 1}


EXACT = [node("Div", "x root", "a"), node("Erf", "a", "b"), node("Add", "b one", "c")]
TANH = [
    node("Pow", "x three", "p"),
    node("Mul", "p cubic", "q"),
    node("Add", "x q", "r"),
    node("Mul", "r slope", "s"),
    node("Tanh", "s", "b"),
    node("Add", "one b", "c"),
]
FAST = [
    node("Mul", "x cubic", "p"),
    node("Mul", "p x", "q"),
    node("Add", "q one", "r"),
    node("Mul", "x slope", "s"),
    node("Mul", "s r", "t"),
    node("Tanh", "t", "b"),
    node("Add", "b one", "c"),
]
"""The same as TANH, factored."""
GELU = {"root": np.sqrt(2), "one": 1, "half": 0.5, "three": 3, "cubic": 0.044715, "slope": np.sqrt(2 / np.pi)}


@pytest.mark.parametrize("gate", [EXACT, TANH, FAST], ids=["exact", "tanh", "fast"])
@pytest.mark.parametrize(
    "product",
    [
        [node("Mul", "x c", "d"), node("Mul", "d half", "y")],
        [node("Mul", "x half", "d"), node("Mul", "d c", "y")],
        [node("Mul", "c half", "d"), node("Mul", "d x", "y")],
    ],
)
def test_a_gelu_in_parts_becomes_one_operator(gate: list[onnx.NodeProto], product: list[onnx.NodeProto]) -> None:
    model = build([*gate, *product], **{name: np.float32(value) for name, value in GELU.items()})
    result = simplify_model(model, onnxsim=False)
    check_same(model, result, IMAGE)
    assert result.after == {"Gelu": 1}
    (found,) = result.model.graph
    assert found.attributes.get_string("approximate", "none") == ("none" if gate is EXACT else "tanh")


@pytest.mark.parametrize(("name", "value"), [("root", 1.5), ("one", 1.1), ("half", 0.4)])
def test_what_is_almost_a_gelu_stays_in_parts(name: str, value: float) -> None:
    nodes = [*EXACT, node("Mul", "x c", "d"), node("Mul", "d half", "y")]
    model = build(nodes, **{key: np.float32(number) for key, number in {**GELU, name: value}.items()})
    assert simplified(model)["Erf"] == 1


def test_a_gelu_stays_in_parts_where_its_opset_would_change_another_operator() -> None:
    pool = node("AveragePool", "e", "y", kernel_shape=[3, 3], strides=[2, 2], ceil_mode=1)
    nodes = [*EXACT, node("Mul", "x c", "d"), node("Mul", "d half", "e"), pool]
    constants = {key: np.float32(number) for key, number in GELU.items()}
    assert simplified(build(nodes, **constants))["Erf"] == 1
    assert simplified(build(nodes, opset=20, **constants)) == {"AveragePool": 1, "Gelu": 1}


@pytest.mark.parametrize("square", ["Pow", "Mul"])
@pytest.mark.parametrize("affine", [True, False])
def test_a_layer_normalization_in_parts_becomes_one_operator(square: str, affine: bool) -> None:
    nodes = [
        node("ReduceMean", "x axes", "m"),
        node("Sub", "x m", "d"),
        node("Pow", "d two", "s") if square == "Pow" else node("Mul", "d d", "s"),
        node("ReduceMean", "s axes", "v"),
        node("Add", "v epsilon", "e"),
        node("Sqrt", "e", "r"),
        node("Div", "d r", "n" if affine else "y"),
    ]
    if affine:
        nodes += [node("Mul", "gain n", "g"), node("Add", "g shift", "y")]
    numbers = {"two": np.float32(2), "epsilon": np.float32(1e-5), "gain": normal(8), "shift": normal(1, 8)}
    result = simplify_model(build(nodes, axes=np.array([-1]), **numbers), onnxsim=False)
    check_same(build(nodes, axes=np.array([-1]), **numbers), result, IMAGE)
    assert result.after == {"LayerNormalization": 1}
    across = build(nodes, axes=np.array([1]), **numbers)
    assert "LayerNormalization" not in simplified(across)


@pytest.mark.parametrize("epsilon", [1e-12, 1e-3])
def test_a_division_by_the_length_becomes_one_operator_where_epsilon_cannot_matter(epsilon: float) -> None:
    nodes = [
        node("ReduceL2", "x axes", "l", keepdims=1),
        node("Clip", "l epsilon", "m"),
        node("Expand", "m sizes", "e"),
        node("Div", "x e", "y"),
    ]
    constants = {"axes": np.array([-1]), "epsilon": np.float32(epsilon), "sizes": np.array(IMAGE)}
    after = simplified(build(nodes, **constants))
    assert (after == {"LpNormalization": 1}) == (epsilon == 1e-12)


def test_a_product_with_a_hard_sigmoid_becomes_a_hard_swish_where_the_slope_is_a_sixth() -> None:
    for alpha, after in ((1 / 6, {"HardSwish": 1}), (0.2, {"HardSigmoid": 1, "Mul": 1})):
        nodes = [node("HardSigmoid", "x", "h", alpha=alpha, beta=0.5), node("Mul", "h x", "y")]
        assert simplified(build(nodes)) == after


def test_a_swish_stays() -> None:
    assert simplified(build([node("Sigmoid", "x", "s"), node("Mul", "x s", "y")])) == {"Mul": 1, "Sigmoid": 1}


# ---- shapes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "nodes",
    [
        [node("Flatten", "x", "y")],
        [node("Unsqueeze", "x one", "y")],
        [node("Unsqueeze", "x one", "u"), node("Flatten", "u", "y")],
        [node("Reshape", "x zeros", "y")],
    ],
)
def test_changes_of_shape_become_one_reshape(nodes: list[onnx.NodeProto]) -> None:
    model = build(nodes, one=np.array([1], np.int64), zeros=np.array([0, 2, -1], np.int64))
    assert simplified(model) == {"Reshape": 1}


def test_operators_that_change_nothing_go() -> None:
    nodes = [
        node("Identity", "x", "a"),
        node("Dropout", "a", "b"),
        node("Mul", "b one", "c"),
        node("Add", "c zeros", "d"),
        node("Transpose", "d", "e", perm=[0, 1, 2, 3]),
        node("Slice", "e start end", "f"),
        node("Pad", "f nothing", "g"),
        node("Concat", "g", "h", axis=1),
        node("Reshape", "h same", "i"),
        node("Neg", "i", "y"),
    ]
    model = build(
        nodes,
        one=np.float32(1),
        zeros=np.zeros((4, 1, 1), np.float32),
        start=np.array([0, 0, 0, 0], np.int64),
        end=np.array([9, 9, 9, 9], np.int64),
        nothing=np.zeros(8, np.int64),
        same=np.array(IMAGE, np.int64),
    )
    assert simplified(model) == {"Neg": 1}


def test_adding_zeros_that_broadcast_stays() -> None:
    assert simplified(
        build([node("Add", "x k", "y")], (1, 4, 1, 1), k=np.zeros((1, 1, 3, 3), np.float32)), (1, 4, 1, 1)
    ) == {"Add": 1}


def test_what_is_constant_is_computed_ahead_and_what_nobody_uses_goes() -> None:
    nodes = [
        node("Shape", "x", "s"),
        node("Gather", "s zero", "n"),
        node("Unsqueeze", "n first", "m"),
        node("Concat", "m rest", "t", axis=0),
        node("Reshape", "x t", "y"),
        node("Relu", "x", "unused"),
    ]
    model = build(nodes, zero=np.int64(0), first=np.array([0], np.int64), rest=np.array([-1], np.int64))
    assert simplified(model) == {"Reshape": 1}


def test_equal_computations_and_constants_are_kept_once() -> None:
    nodes = [node("Mul", "x a", "p"), node("Mul", "x b", "q"), node("Add", "p q", "s"), node("Relu", "s", "y")]
    result = simplify_model(build(nodes, a=normal(1, 1, 8, 8), b=normal(1, 1, 8, 8)), onnxsim=False)
    assert result.after == {"Add": 1, "Mul": 1, "Relu": 1}
    assert len(result.model.graph.initializers) == 1


@pytest.mark.parametrize(
    ("nodes", "after"),
    [
        ([node("Relu", "x", "y"), node("Identity", "y", "z")], {"Identity": 1, "Relu": 1}),
        ([node("Relu", "x", "y"), node("Relu", "x", "z")], {"Identity": 1, "Relu": 1}),
        ([node("Dropout", "x", "y"), node("Neg", "x", "z")], {"Identity": 1, "Neg": 1}),
        ([node("Relu", "x", "y"), node("Add", "k k", "z")], {"Relu": 1}),
    ],
    ids=["copied", "computed twice", "input", "constant"],
)
def test_every_output_keeps_its_name(nodes: list[onnx.NodeProto], after: dict[str, int]) -> None:
    model = build(nodes, outputs=("y", "z"), k=normal(3))
    result = simplify_model(model, onnxsim=False)
    check_same(model, result, IMAGE)
    assert [value.name for value in result.model.graph.outputs] == ["y", "z"]
    assert result.after == after


def test_softmax_is_taken_out_of_the_reshapes_around_it() -> None:
    nodes = [node("Flatten", "x", "f", axis=2), node("Softmax", "f", "s", axis=-1), node("Reshape", "s t", "y")]
    model = build(nodes, (1, 5, 3), t=np.array([1, 5, 3], np.int64))
    assert simplified(model, (1, 5, 3)) == {"Softmax": 1}


@pytest.mark.parametrize("first", ["b h i k", "bhki"])
@pytest.mark.parametrize("second", ["bhkj", "b h j k"])
@pytest.mark.parametrize("result", ["b h i j", "bhji"])
def test_an_einsum_of_two_stacks_of_matrices_becomes_a_product(first: str, second: str, result: str) -> None:
    shape = (2, 3, 4, 5)
    turned = node("Transpose", "x", "a", perm=[0, 1, 3, 2] if first == "bhki" else [0, 1, 2, 3])
    other = normal(2, 3, 5, 6) if second == "bhkj" else normal(2, 3, 6, 5)
    product = node("Einsum", "a w", "y", equation=f"{first}, {second} -> {result}")
    after = simplified(build([turned, product], shape, w=other), shape)
    assert after["MatMul"] == 1
    assert "Einsum" not in after


@pytest.mark.parametrize(
    ("equation", "other"),
    [
        ("bik,bkj->bi", (2, 4, 5)),
        ("bik,bij->bij", (2, 3, 5)),
        ("bik,kj->bij", (4, 5)),
        ("bik,bik->bki", (2, 3, 4)),
        ("...ik,...kj->...ij", (2, 4, 5)),
        ("bik,ckj->bij", (1, 4, 5)),
        ("bik,bkj", (2, 4, 5)),
    ],
)
def test_other_einsums_stay(equation: str, other: tuple[int, ...]) -> None:
    model = build([node("Einsum", "x w", "y", equation=equation)], (2, 3, 4), w=normal(*other))
    assert simplified(model, (2, 3, 4)) == {"Einsum": 1}


# ---- the whole -----------------------------------------------------------------------------------------------------


def test_every_value_has_a_type_and_a_shape(tiny_models: dict[str, bytes]) -> None:
    for content in tiny_models.values():
        model = simplify_model(content).model
        for each in model.graph:
            assert each.name
            for value in each.outputs:
                assert value.dtype is not None
                assert value.shape is not None
                assert all(isinstance(size, int) for size in value.shape)
        names = [each.name for each in model.graph]
        assert len(names) == len(set(names))


def test_the_same_model_gives_the_same_bytes(tiny_models: dict[str, bytes]) -> None:
    for content in tiny_models.values():
        assert to_bytes(simplify_model(content).model) == to_bytes(simplify_model(content).model)


def test_simplifying_twice_changes_nothing_more(tiny_models: dict[str, bytes]) -> None:
    for content in tiny_models.values():
        once = simplify_model(content)
        twice = simplify_model(once.model)
        assert twice.after == once.after
        assert to_bytes(twice.model) == to_bytes(once.model)


def test_the_model_is_not_modified_and_its_metadata_is_kept(tiny_models: dict[str, bytes]) -> None:
    proto = onnx.load_from_string(tiny_models["plain"])
    helper.set_model_props(proto, {"edgeship.preprocessing.mean": "[1.0]"})
    content = proto.SerializeToString()
    model = simplifier.parse(content)
    before = to_bytes(model)
    result = simplify_model(model)
    assert to_bytes(model) == before
    assert result.model.metadata_props["edgeship.preprocessing.mean"] == "[1.0]"


def test_a_dynamic_batch_stays_dynamic() -> None:
    nodes = [
        node("Conv", "x w", "c"),
        node("BatchNormalization", "c gamma beta mean var", "n"),
        node("ReduceMean", "n a", "m", keepdims=0),
        node("MatMul", "m v", "y"),
    ]
    weights = {"w": normal(8, 4, 3, 3), "v": normal(8, 3), "a": np.array([2, 3], np.int64)}
    model = build(nodes, ("batch", 4, 8, 8), **weights, **normalization(8))
    for onnxsim in (False, True):
        result = simplify_model(model, onnxsim=onnxsim)
        assert result.after == {"Conv": 1, "Gemm": 1, "GlobalAveragePool": 1, "Reshape": 1}
        check_same(model, result, (3, 4, 8, 8))
        shapes = [value.shape for each in result.model.graph for value in each.outputs]
        assert all(shape is not None and not isinstance(shape[0], int) for shape in shapes)
        assert not result.notes


def test_a_model_of_an_old_opset_with_weights_among_the_inputs_is_upgraded() -> None:
    proto = onnx.load_from_string(
        build([node("Upsample", "x s", "u", mode="nearest"), node("Conv", "u w", "y")], opset=9,
              s=np.array([1, 1, 2, 2], np.float32), w=normal(2, 4, 3, 3))
    )  # fmt: skip
    proto.graph.input.append(helper.make_tensor_value_info("w", TensorProto.FLOAT, (2, 4, 3, 3)))
    proto.ir_version = 3
    proto.graph.input.append(helper.make_tensor_value_info("s", TensorProto.FLOAT, (4,)))
    result = simplify_model(proto.SerializeToString())
    check_same(proto.SerializeToString(), result, IMAGE)
    assert [value.name for value in result.model.graph.inputs] == ["x"]
    assert result.after == {"Conv": 1, "Resize": 1}


@pytest.mark.parametrize("failure", ["crash", "timeout", "wrong"])
def test_without_onnxsim_the_graph_goes_on_with_a_note(
    tiny_models: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, failure: str
) -> None:
    def fail(*_: Any, **__: Any) -> bytes:
        if failure == "wrong":
            return tiny_models["concat"]
        raise isolation.IsolationError(f"run_onnxsim failed: {failure}", "crash")

    monkeypatch.setattr(simplifier, "run_isolated", fail)
    result = simplify_model(tiny_models["plain"])
    assert len(result.notes) == 1
    assert result.notes[0].startswith("went on without onnxsim: ")
    check_same_logits(tiny_models["plain"], result)


def check_same_logits(model: bytes, result: Simplified) -> None:
    data = {"image": normal(1, 3, 12, 12)}
    np.testing.assert_allclose(run(to_bytes(result.model), data)[0], run(model, data)[0], atol=1e-5)


@pytest.mark.parametrize(
    ("indices", "axis", "becomes"),
    [
        (np.arange(4).reshape(2, 2), 1, {"Reshape": 1}),
        (np.arange(8), -1, {}),
        (np.arange(1).reshape(1, 1), 0, {"Reshape": 1}),
        (np.arange(4)[::-1].copy().reshape(2, 2), 1, {"Gather": 1}),
        (np.arange(3), 1, {"Gather": 1}),
        (np.array([0, 1, 2, 2]), 1, {"Gather": 1}),
    ],
)
def test_a_gather_of_everything_in_order_is_a_reshape(indices: Array, axis: int, becomes: dict[str, int]) -> None:
    nodes = [node("Relu", "x", "r"), node("Gather", "r i", "g", axis=axis), node("Neg", "g", "y")]
    assert simplified(build(nodes, i=indices)) == {"Relu": 1, **becomes, "Neg": 1}
