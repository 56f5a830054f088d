"""Returns the nodes of a model that ONNX Runtime has no operator for, all of them at once."""

from __future__ import annotations

import onnx_ir as ir

from edgeship.calibration.graph.macs import node_key
from edgeship.calibration.types import Finding

_ONNX_DOMAINS = ("", "ai.onnx")


def without_kernel(model: ir.Model) -> list[Finding]:
    """The nodes whose operator ONNX Runtime's CPU provider does not have, neither as kernel nor as function."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    known = {(schema.domain or "", schema.name) for schema in state.get_all_operator_schema()}
    local = {(function.domain, function.name) for function in model.functions.values()}
    findings = []
    for node in model.graph.all_nodes():
        domain = "" if node.domain in _ONNX_DOMAINS else node.domain
        if (domain, node.op_type) not in known and (node.domain, node.op_type) not in local:
            operator = f"{domain}.{node.op_type}" if domain else node.op_type
            findings.append(
                Finding(
                    f"{operator} {node_key(node)}", f"ONNX Runtime has no operator {operator}", "", "ONNX operators"
                )
            )
    return findings
