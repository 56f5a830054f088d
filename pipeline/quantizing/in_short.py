"""Returns what quantization did to a model, in a few lines: how much runs in integers, what it costs, what is open."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx_ir as ir

    from edgeship.calibration.samples.data import Samples
    from edgeship.calibration.types import QuantPlan, WeightScheme
    from edgeship.pipeline.quantizing.calibrated import Quantized

COMPARED = 16
"""Samples the quantized model is compared on: enough to see that it is wrong, not to say how good it is."""
NAMED = 3


def in_short(model: ir.Model, samples: Samples, result: Quantized, scheme: WeightScheme) -> list[str]:
    """The lines, for the float `model` and the samples it was calibrated on."""
    from edgeship.calibration.graph.onnx_file import to_bytes
    from edgeship.pipeline.quantizing.yardstick import Yardstick
    from edgeship.targets.onnxruntime import open_float, open_reference

    plan = result.plans[scheme]
    few = samples.take(min(COMPARED, len(samples)))
    yardstick = Yardstick(open_float(to_bytes(model)), few)
    cost = yardstick.cost(open_reference(to_bytes(result.models[scheme])))
    quality = "equal outputs" if cost.noise <= 0 else f"outputs {cost.sqnr_db:.1f} dB above the noise"
    decisions = ""
    if cost.drop is not None:
        changed = "lost" if cost.drop >= 0 else "gained"
        decisions = (
            f", {abs(cost.drop):.3g} points of top-1 {changed} (one sample is {100 / cost.samples:.3g})"
            if cost.top1 is not None
            else f", {cost.drop:.3g} % other decisions"
        )
    return [
        *_coverage(result.calibration.model, plan),
        f"against the float model, on {cost.samples} of the samples it was calibrated on: {quality}{decisions}",
        str(result.calibration.convergence),
        "judge it on other samples, as its runtime executes it: edgeship convert, then edgeship evaluate",
    ]


def _coverage(model: ir.Model, plan: QuantPlan) -> list[str]:
    from edgeship.calibration.graph.macs import count_macs
    from edgeship.calibration.planning.subset import layers_of

    macs = count_macs(model)
    layers = layers_of(model, plan)
    total, integer = sum(macs.values()), sum(macs.get(name, 0) for name in layers)
    share = f"{100 * integer / total:.4g} % of the multiply-accumulates" if total else "no multiply-accumulates"
    wide = f", {len(plan.wide_nodes)} nodes on 16-bit activations" if plan.wide_nodes else ""
    lines = [f"in integers: {len(layers)} of {len(macs)} layers, {share}{wide}"]
    reasons = list(dict.fromkeys(plan.stays_float.values()))
    if reasons:
        more = f"; and {len(reasons) - NAMED} more" if len(reasons) > NAMED else ""
        lines.append(f"stays float: {'; '.join(reasons[:NAMED])}{more}")
    return lines
