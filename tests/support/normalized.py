"""Makes a network with a LayerNormalization between two products of matrices."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir


def normalized(rng: np.random.Generator, rows: int, size: int, name: str = "x") -> ir.Model:
    """`name` (1, rows, size) -> h = MatMul -> n = LayerNormalization -> y = MatMul; nodes: make_h, make_n, make_y."""
    spread = rng.normal(size=(size, size)) / np.sqrt(size)
    weights = {"w": spread, "scale": rng.uniform(0.5, 2, size), "shift": rng.normal(size=size)}
    graph = onnx.parser.parse_graph(f"""g (float[1, {rows}, {size}] {name}) => (float[1, {rows}, {size}] y) {{
        h = MatMul({name}, w)
        n = LayerNormalization(h, scale, shift)
        y = MatMul(n, w)
    }}""")
    graph.initializer.extend(onnx.numpy_helper.from_array(v.astype(np.float32), key) for key, v in weights.items())
    for node in graph.node:
        node.name = f"make_{node.output[0]}"
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)
    return ir.from_proto(onnx.shape_inference.infer_shapes(model))
