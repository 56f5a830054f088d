"""Index, sorting, reduction and matrix operators beyond the standard's own vectors, against ONNX Runtime."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from edgeship.calibration.errors import UnsupportedError
from edgeship.targets.tflite.flatfile import element_types, load
from edgeship.targets.tflite.session import TFLiteSession

Array = np.ndarray[Any, np.dtype[Any]]
RNG = np.random.default_rng(5)


@dataclass(frozen=True)
class Case:
    """One node: its computed inputs, and those that are constants (they follow)."""

    op: str
    inputs: tuple[Array, ...]
    constants: tuple[Array, ...] = ()
    attributes: Mapping[str, Any] = field(default_factory=dict)
    outputs: int = 1
    operators: tuple[str, ...] = ()


def _real(*shape: int) -> Array:
    return RNG.normal(size=shape).astype(np.float32)


def _whole(low: int, high: int, *shape: int, dtype: Any = np.int64) -> Array:
    return RNG.integers(low, high, size=shape).astype(dtype)


def _ints(*values: int) -> Array:
    return np.array(values, np.int64)


def _einsum(equation: str, *shapes: tuple[int, ...]) -> Case:
    return Case("Einsum", tuple(_real(*shape) for shape in shapes), attributes={"equation": equation})


CASES = {
    "gather_computed_negative": Case("Gather", (_real(3, 4, 5), _whole(-4, 4, 2, 3)), attributes={"axis": 1}),
    "gather_elements_last_axis": Case("GatherElements", (_real(3, 5), _whole(-5, 5, 3, 7)), attributes={"axis": 1}),
    "gather_elements_smaller": Case("GatherElements", (_real(4, 5, 6), _whole(-5, 5, 2, 3, 4)), attributes={"axis": 1}),
    "gather_elements_constant": Case(
        "GatherElements", (_real(4, 5),), (_whole(-4, 4, 3, 5),), {"axis": 0}, operators=("GATHER", "RESHAPE")
    ),
    "gather_nd_batches": Case("GatherND", (_real(2, 3, 4, 5), _whole(-4, 4, 2, 3, 6, 1)), attributes={"batch_dims": 2}),
    "gather_nd_wide_indices": Case("GatherND", (_real(3, 4), _whole(-3, 3, 2, 1, 2, 2, 2))),
    "scatter_nd_slices": Case("ScatterND", (_real(4, 5, 6), _ints(2, 0)[:, None], _real(2, 5, 6))),
    "scatter_nd_constant": Case("ScatterND", (_real(4, 5),), (np.array([[1, -1], [0, 2]]), _real(2))),
    "scatter_nd_multiplied": Case(
        "ScatterND", (_real(4, 5), _ints(1, 1, -1)[:, None], _real(3, 5)), attributes={"reduction": "mul"}
    ),
    "scatter_nd_least": Case(
        "ScatterND", (_real(4, 5, 2), _whole(-4, 4, 7, 2), _real(7, 2)), attributes={"reduction": "min"}
    ),
    "scatter_elements_added": Case(
        "ScatterElements", (_real(3, 4), _whole(-4, 4, 2, 3), _real(2, 3)), attributes={"axis": 1, "reduction": "add"}
    ),
    "one_hot_in_front": Case("OneHot", (_whole(-6, 6, 2, 3), _real(2)), (), {"axis": 0}),
    "top_k_smallest": Case("TopK", (_real(3, 9, 4),), (_ints(4),), {"axis": 1, "largest": 0}, outputs=2),
    "top_k_smallest_integers": Case(
        "TopK", (_whole(-9, 9, 20, dtype=np.int32),), (_ints(6),), {"largest": 0}, outputs=2
    ),
    "arg_min_last": Case(
        "ArgMin", (_whole(0, 3, 2, 8, 3, dtype=np.int32),), (), {"axis": 1, "keepdims": 0, "select_last_index": 1}
    ),
    "cumulative_sum_backwards": Case("CumSum", (_real(3, 7),), (np.array(-1),), {"reverse": 1, "exclusive": 1}),
    "space_to_depth": Case("SpaceToDepth", (_real(1, 3, 4, 6),), (), {"blocksize": 2}),
    "depth_to_space_channel_first": Case("DepthToSpace", (_real(1, 12, 2, 3),), (), {"blocksize": 2, "mode": "CRD"}),
    "trilu_of_infinity": Case("Trilu", (np.full((3, 4, 4), np.inf, np.float32),), (_ints(1)[0],), {"upper": 1}),
    "trilu_of_six_axes": Case("Trilu", (_real(1, 2, 1, 2, 4, 3),), (), {"upper": 0}),
    "center_crop_and_pad": Case("CenterCropPad", (_real(5, 8, 3),), (_ints(8, 5),), {"axes": [-3, 1]}),
    "reverse_sequence": Case(
        "ReverseSequence", (_real(4, 3, 2), _ints(4, 1, 2)), (), {"batch_axis": 1, "time_axis": 0}
    ),
    "reduce_l2_of_images": Case("ReduceL2", (_real(2, 3, 4, 5),), (_ints(1, -1),), {"keepdims": 0}),
    "log_sum_exp_of_large_numbers": Case("ReduceLogSumExp", (_real(3, 9) * 100,), (_ints(1),)),
    "log_sum_exp_of_infinity": Case(
        "ReduceLogSumExp", (np.array([[-np.inf, -np.inf], [np.inf, 1]], np.float32),), (_ints(1),)
    ),
    "reduce_sum_square_of_integers": Case("ReduceSumSquare", (_whole(-9, 9, 3, 5, dtype=np.int32),), (_ints(0),)),
    "matrices_of_six_axes": Case("MatMul", (_real(2, 1, 2, 1, 3, 4), _real(1, 3, 2, 2, 4, 2))),
    "matrices_of_integers": Case(
        "MatMul", (_whole(-99, 99, 2, 3, 5, dtype=np.int32), _whole(-99, 99, 5, 4, dtype=np.int32))
    ),
    "vector_by_matrices": Case("MatMul", (_real(5), _real(3, 5, 4))),
    "gemm_computed": Case(
        "Gemm", (_real(4, 3), _real(5, 4), _real(1, 5)), (), {"alpha": 0.5, "beta": 2.0, "transA": 1, "transB": 1}
    ),
    "gemm_factor_alone": Case("Gemm", (_real(3, 4), _real(4, 5)), (), {"alpha": -1.5}),
    "det_of_five_rows": Case("Det", (_real(2, 5, 5),)),
    "long_integer_product": Case(
        "MatMulInteger", (_whole(0, 256, 2, 700, dtype=np.uint8), _whole(-128, 128, 700, 3, dtype=np.int8))
    ),
    "einsum_attention": _einsum("bthc,bshc->bhts", (1, 7, 2, 3), (1, 5, 2, 3)),
    "einsum_positions": _einsum("bhwc,hkc->bhwk", (2, 3, 4, 5), (3, 6, 5)),
    "einsum_outer": _einsum("i,j->ij", (3,), (4,)),
    "einsum_three": _einsum("ijk,kl,lm->ijm", (2, 3, 4), (4, 5), (5, 6)),
    "einsum_broadcast": _einsum("...ij,...jk->...ik", (2, 1, 3, 4), (5, 4, 6)),
    "einsum_trace": _einsum("iij->j", (4, 4, 3)),
    "einsum_many_batches": _einsum("abcdxk,abcdky->abcdxy", (2, 2, 1, 2, 3, 4), (2, 2, 1, 2, 4, 3)),
    "einsum_implied": _einsum("bij,bjk", (2, 3, 4), (2, 4, 5)),
}


def _model(case: Case, opset: int = 18) -> tuple[onnx.ModelProto, dict[str, Array]]:
    feeds = {f"x{place}": value for place, value in enumerate(case.inputs)}
    constants = [numpy_helper.from_array(np.asarray(value), f"c{place}") for place, value in enumerate(case.constants)]
    if case.op == "OneHot":
        constants = [numpy_helper.from_array(np.array(6), "c0")]
        names = ["x0", "c0", "x1"]
    else:
        names = [*feeds, *(constant.name for constant in constants)]
    outputs = [f"y{place}" for place in range(case.outputs)]
    graph = helper.make_graph(
        [helper.make_node(case.op, names, outputs, name="node", **case.attributes)],
        "test",
        [
            helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(value.dtype), value.shape)
            for name, value in feeds.items()
        ],
        [helper.make_tensor_value_info(name, 0, None) for name in outputs],
        constants,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    return onnx.shape_inference.infer_shapes(model), feeds


@pytest.mark.parametrize("name", sorted(CASES))
def test_operator_agrees_with_onnx_runtime(
    name: str,
    convert: Callable[..., Path],
    reference: Callable[..., dict[str, Array]],
    operators: Callable[[Path], Mapping[str, int]],
) -> None:
    case = CASES[name]
    model, feeds = _model(case)
    path = convert(model, io_layout="nchw")
    seen = TFLiteSession(path).run(feeds)
    if case.op == "Einsum":
        expected = {"y0": np.einsum(case.attributes["equation"], *feeds.values())}
    else:
        expected = reference(model, feeds)
    for output, values in expected.items():
        assert seen[output].shape == values.shape
        np.testing.assert_allclose(seen[output], values, rtol=1e-4, atol=1e-5)
    if case.operators:
        assert set(operators(path)) == set(case.operators)


@pytest.mark.parametrize("reduction", ["mul", "max"])
def test_reduction_that_no_kernel_has_is_refused(reduction: str, convert: Callable[..., Path]) -> None:
    values = _whole(-9, 9, 4)
    case = Case("ScatterND", (values, _ints(1)[:, None], values[:1]), attributes={"reduction": reduction})
    with pytest.raises(UnsupportedError, match=f"reduction {reduction} of int64"):
        convert(_model(case)[0])


BOXES, SCORES = (2, 40, 4), (2, 3, 40)


@pytest.mark.parametrize("center", [0, 1])
@pytest.mark.parametrize("least", [0.4, 2.0])
def test_nms_selects_the_boxes_onnx_runtime_selects(
    center: int, least: float, convert: Callable[..., Path], reference: Callable[..., dict[str, Array]]
) -> None:
    rng = np.random.default_rng(3)
    feeds = {
        "boxes": rng.uniform(0, 1, BOXES).astype(np.float32),
        "scores": rng.uniform(0, 1, SCORES).astype(np.float32),
    }
    limits = {"most": np.array([7]), "overlap": np.array([0.3], np.float32), "least": np.array([least], np.float32)}
    graph = helper.make_graph(
        [helper.make_node("NonMaxSuppression", [*feeds, *limits], ["chosen"], center_point_box=center)],
        "test",
        [helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, v.shape) for n, v in feeds.items()],
        [helper.make_tensor_value_info("chosen", onnx.TensorProto.INT64, [42, 3])],
        [numpy_helper.from_array(value, name) for name, value in limits.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    seen = TFLiteSession(convert(model)).run(feeds)["chosen"]
    expected = reference(model, feeds)["chosen"]
    np.testing.assert_array_equal(seen, expected)
    assert (len(expected) > 0) == (least < 1)


@pytest.mark.parametrize(
    ("op", "attributes"), [("ArgMax", {"axis": 1}), ("ArgMin", {"axis": 2}), ("TopK", {"axis": 2})]
)
def test_positions_in_int8_are_those_of_the_integers(
    op: str,
    attributes: dict[str, Any],
    quantize: Callable[..., onnx.ModelProto],
    convert: Callable[..., Path],
    reference: Callable[..., dict[str, Array]],
) -> None:
    outputs = 2 if op == "TopK" else 1
    model, _ = _model(Case(op, (_real(2, 6, 5),), (_ints(3),) if op == "TopK" else (), attributes, outputs))
    ranges = {"x0": (0.05, 3), **({"y0": (0.05, 3)} if op == "TopK" else {})}
    qdq = quantize(model, ranges)
    feeds = {"x0": (RNG.permutation(60) * 0.05).astype(np.float32).reshape(2, 6, 5)}
    path = convert(qdq)
    expected, seen = reference(qdq, feeds), TFLiteSession(path).run(feeds)
    for name, values in expected.items():
        np.testing.assert_allclose(seen[name], values, rtol=1e-6)
    loaded, types = load(path), element_types()
    floats = [t.name for t in loaded.subgraphs[0].tensors if types[t.type] == "FLOAT32"]
    assert len(floats) == outputs, "only the model's own input and real output are float"


def test_qlinear_operators_run_in_tflites_int8_kernels(
    convert: Callable[..., Path],
    reference: Callable[..., dict[str, Array]],
    operators: Callable[[Path], Mapping[str, int]],
) -> None:
    rng = np.random.default_rng(9)
    constants = {
        "scale": np.array(0.02, np.float32),
        "zero": np.array(120, np.uint8),
        "w": rng.integers(-100, 100, (6, 4, 3, 3)).astype(np.int8),
        "w_scale": rng.uniform(0.01, 0.02, 6).astype(np.float32),
        "w_zero": np.zeros(6, np.int8),
        "y_scale": np.array(0.3, np.float32),
        "y_zero": np.array(100, np.uint8),
        "b": rng.integers(-1000, 1000, 6).astype(np.int32),
    }
    graph = helper.make_graph(
        [helper.make_node("QLinearConv", ["x", *constants], ["y"], pads=[1, 1, 1, 1])],
        "test",
        [helper.make_tensor_value_info("x", onnx.TensorProto.UINT8, [1, 4, 8, 8])],
        [helper.make_tensor_value_info("y", onnx.TensorProto.UINT8, [1, 6, 8, 8])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    feeds = {"x": rng.integers(0, 256, (1, 4, 8, 8)).astype(np.uint8)}
    path = convert(model)
    assert dict(operators(path)) == {"QUANTIZE": 2, "CONV_2D": 1}, "uint8 to int8, the convolution, and back"
    expected, seen = reference(model, feeds)["y"], TFLiteSession(path).run(feeds)["y"]
    assert np.abs(seen.astype(int) - expected.astype(int)).max() <= 1


def _sliced(shape: list[int | str], cuts: Mapping[int, slice]) -> onnx.ModelProto:
    far = 2**31 - 1
    bounds = {
        "s": _ints(*(cut.start or 0 for cut in cuts.values())),
        "e": _ints(*(far if cut.stop is None else cut.stop for cut in cuts.values())),
        "a": _ints(*cuts),
        "t": _ints(*(cut.step or 1 for cut in cuts.values())),
    }
    graph = helper.make_graph(
        [helper.make_node("Slice", ["x", *bounds], ["y"])],
        "test",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)],
        [numpy_helper.from_array(value, name) for name, value in bounds.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


@pytest.mark.parametrize(
    ("shape", "cuts", "expected"),
    [
        ((2, 8, 6, 3), {1: slice(0, None, 2), 2: slice(1, None, 2)}, "SLICE"),
        ((2, 9, 6, 4), {1: slice(2, None, 3)}, "SLICE"),
        ((1, 8, 6, 3), {1: slice(3, 7, 2), 2: slice(0, 4, 3), 3: slice(1, None)}, "SLICE"),
        ((4, 6, 5), {0: slice(1, None, 2), 1: slice(4, 5, 2)}, "SLICE"),
        ((2, 7, 6, 3), {1: slice(0, None, 2)}, "STRIDED_SLICE"),  # no whole blocks
        ((2, 6, 8), {2: slice(0, None, 2)}, "STRIDED_SLICE"),  # single elements
        ((4, 4, 4, 4, 2), dict.fromkeys(range(3), slice(2, None, 2)), "STRIDED_SLICE"),  # 7 axes
    ],
)
def test_every_second_place_is_sliced_in_runs(
    shape: tuple[int, ...],
    cuts: dict[int, slice],
    expected: str,
    convert: Callable[..., Path],
    operators: Callable[[Path], Mapping[str, int]],
) -> None:
    x = _real(*shape)
    path = convert(_sliced(list(shape), cuts), io_layout="nchw")
    seen = TFLiteSession(path).run({"x": x})["y"]
    np.testing.assert_array_equal(seen, x[tuple(cuts.get(axis, slice(None)) for axis in range(x.ndim))])
    assert set(operators(path)) - {"RESHAPE"} == {expected}


@pytest.mark.parametrize("cut", [slice(7, -99, -3), slice(1, None, 2)])
def test_strided_slice_of_a_dynamic_batch_is_resizable(cut: slice, convert: Callable[..., Path]) -> None:
    x = _real(5, 8, 3)
    np.testing.assert_array_equal(TFLiteSession(convert(_sliced(["n", 8, 3], {1: cut}))).run({"x": x})["y"], x[:, cut])
