"""Returns the forms in which a target can have one plan: how weights are written, and which layers stay float.

full            int8 weights of the full range: exact with VNNI or a dot product, clips on other x86 CPUs
pair_limited    int8 weights that no x86 CPU clips
unsigned        uint8 weights of the full range: exact everywhere, by slower kernels on x86 without VNNI
"""

from __future__ import annotations

import glob
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from edgeship.calibration.types import WeightForm

if TYPE_CHECKING:
    import onnx_ir as ir

    from edgeship.calibration.quantize import Calibration
    from edgeship.calibration.types import QuantPlan, WeightScheme

KINDS = ("depthwise", "pointwise", "conv", "conv_transpose", "matmul")


@dataclass(frozen=True)
class Form:
    """How weights are written, and the kinds of layers that run in float."""

    weights: WeightForm
    keep_float: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.weights} weights" + (f", {' and '.join(self.keep_float)} in float" if self.keep_float else "")

    @property
    def scheme(self) -> WeightScheme:
        """The integers that are written."""
        return "pair_limited" if self.weights == "pair_limited" else "full"

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self) | {"keep_float": list(self.keep_float)}


def kind_of(node: ir.Node) -> str:
    """What a layer is called in `keep_float`."""
    from edgeship.calibration.graph.operators import constant_array, is_depthwise

    if node.op_type in ("Gemm", "MatMul"):
        return "matmul"
    if node.op_type == "ConvTranspose":
        return "conv_transpose"
    weights = constant_array(node.inputs[1])
    if weights is not None and is_depthwise(node, weights):
        return "depthwise"
    return "pointwise" if weights is not None and all(side == 1 for side in weights.shape[2:]) else "conv"


def kinds_in(model: ir.Model, plan: QuantPlan) -> dict[str, list[str]]:
    """The integer layers' names by kind."""
    from edgeship.calibration.planning.subset import layers_of

    found: dict[str, list[str]] = {}
    for name, node in layers_of(model, plan).items():
        found.setdefault(kind_of(node), []).append(name)
    return found


def make(calibration: Calibration, form: Form, target: str) -> tuple[QuantPlan, ir.Model]:
    """The plan and the QDQ model of one form. Raises InputError for a form that leaves no layer in integers."""
    from edgeship.calibration.planning.overrides import Override
    from edgeship.calibration.writing.qdq import WEIGHTS_KEY

    plan = calibration.plan(form.scheme)
    kinds = kinds_in(calibration.model, plan)
    wishes = [
        Override(glob.escape(name), stays_float=True, reason=f"{target} keeps {kind} layers float")
        for kind in form.keep_float
        for name in kinds.get(kind, ())
    ]
    if wishes:
        calibration = calibration.with_overrides(wishes)
        plan = calibration.plan(form.scheme)
    model = calibration.quantized(plan, form.scheme)
    if form.weights == "unsigned":
        model.metadata_props[WEIGHTS_KEY] = "unsigned"
    return plan, model


def islands(form: Form, kinds: Sequence[str]) -> list[Form]:
    """The form with one more kind of layers in float, for each that leaves another in integers."""
    return [Form(form.weights, (kind,)) for kind in kinds] if len(kinds) > 1 else []


def weights_of(model: ir.Model) -> str | None:
    """The form of the weights that a quantized model's metadata tells of."""
    from edgeship.calibration.writing.qdq import FACTS_KEY, WEIGHTS_KEY

    if WEIGHTS_KEY in model.metadata_props:
        return model.metadata_props[WEIGHTS_KEY]
    found = json.loads(model.metadata_props.get(FACTS_KEY, "{}")).get("weights")
    return None if found is None else str(found)
