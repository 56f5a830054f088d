"""A random model that grows by one operator at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

LARGEST = 4096
"""Elements of a value: larger ones are not grown further."""


class Growing:
    """A model that grows by one operator at a time; `values` are what has been computed, by name."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        shapes = ((1, 4, 8, 8), (2, 6, 5, 7), (1, 1, 6, 4), (2, 5, 6), (3, 8), (1, 4, 1, 9), (2, 3, 4, 4, 2))
        count = int(self.rng.integers(1, 3))
        self.inputs = {f"x{i}": shapes[self.rng.integers(len(shapes))] for i in range(count)}
        self.values: dict[str, tuple[int, ...]] = dict(self.inputs)

    def grow(self, maker: Maker, fits: Callable[[Sequence[int]], bool], seed: int) -> None:
        """Adds an operator to a value that fits it; nothing where none does."""
        self.rng = np.random.default_rng(seed)
        takers = [name for name, shape in self.values.items() if fits(shape)]
        if takers:
            latest = takers[-3:]
            maker(self, latest[self.rng.integers(len(latest))])

    def model(self) -> onnx.ModelProto:
        """What nobody reads is an output; a model of its input alone gets a Relu."""
        read = {name for node in self.nodes for name in node.input}
        outputs = [name for name in self.values if name not in read and name not in self.inputs]
        if not outputs:
            self.add("Relu", ["x0"], self.inputs["x0"])
            outputs = list(self.values)[-1:]
        ports = [
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, self.values[name]) for name in names]
            for names in (self.inputs, outputs)
        ]
        graph = helper.make_graph(self.nodes, "random", *ports, self.constants)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
        return onnx.shape_inference.infer_shapes(model, strict_mode=True)

    def hidden(self, op: str, inputs: Sequence[str]) -> str:
        """Adds a node whose result only what names it may take, since it is no real number."""
        name = f"hidden{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, inputs, [name], name=f"{op}_{len(self.nodes)}"))
        return name

    def add(self, op: str, inputs: Sequence[str], *shapes: Sequence[int], unread: int = 0, **attributes: Any) -> None:
        """Adds a node and its results' shapes; behind them come results that nothing reads."""
        names = [f"v{len(self.values) + place}" for place in range(len(shapes))]
        rest = [f"unread{len(self.nodes)}_{place}" for place in range(unread)]
        self.nodes.append(helper.make_node(op, inputs, [*names, *rest], name=f"{op}_{len(self.nodes)}", **attributes))
        self.values.update((name, tuple(int(s) for s in shape)) for name, shape in zip(names, shapes, strict=True))

    def constant(self, values: Any) -> str:
        """The name of a new constant."""
        name = f"c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(values), name))
        return name

    def weights(self, *shape: int) -> str:
        """The name of a new constant of normal numbers, small where many of them are summed."""
        scale = max(1.0, float(np.sqrt(np.prod(shape[1:]))))
        return self.constant((self.rng.normal(size=shape) / scale).astype(np.float32))

    def pick(self, *choices: Any) -> Any:
        """One of the choices."""
        return choices[self.rng.integers(len(choices))]

    def axis(self, shape: Sequence[int]) -> int:
        """An axis, counted from the front or from behind."""
        axis = int(self.rng.integers(len(shape)))
        return self.pick(axis, axis - len(shape))


Maker = Callable[[Growing, str], None]
"""Adds an operator to a value, given by name."""


def image(shape: Sequence[int]) -> bool:
    """Whether a value is an image that may grow."""
    return len(shape) == 4 and int(np.prod(shape)) <= LARGEST


def some(shape: Sequence[int]) -> bool:
    """Whether a value has axes, and may grow."""
    return len(shape) > 0 and int(np.prod(shape)) <= LARGEST


def matrix(shape: Sequence[int]) -> bool:
    """Whether a value is a matrix, or several."""
    return len(shape) >= 2 and int(np.prod(shape)) <= LARGEST
