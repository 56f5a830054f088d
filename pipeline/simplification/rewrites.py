"""Returns what all rewrites together did to a graph: the rules in order, again and again until none applies."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import cache

import onnx_ir as ir
import onnx_ir.passes.common as passes
from onnxscript.optimizer import fold_constants
from onnxscript.rewriter import RewriteRule, RewriteRuleSet

from edgeship.calibration.errors import StageError
from edgeship.pipeline.onnx_form import run_passes
from edgeship.pipeline.simplification.affine import alone_rules, fold_rules
from edgeship.pipeline.simplification.arithmetic import arithmetic_rules
from edgeship.pipeline.simplification.clip import clip_rules
from edgeship.pipeline.simplification.einsum import einsum_rules
from edgeship.pipeline.simplification.gelu import gelu_rules, may_have_gelu, raise_opset
from edgeship.pipeline.simplification.gemm import gemm_rules
from edgeship.pipeline.simplification.hardswish import hardswish_rules
from edgeship.pipeline.simplification.layer_norm import layer_norm_rules
from edgeship.pipeline.simplification.padding import padding_rules
from edgeship.pipeline.simplification.pooling import pooling_rules
from edgeship.pipeline.simplification.reshaping import reshaping_rules
from edgeship.pipeline.simplification.softmax import softmax_rules
from edgeship.pipeline.simplification.unit_length import unit_length_rules

_ROUNDS = 50
_FOLDED_ELEMENTS = 1 << 24
"""Constants up to this many elements are computed ahead; a larger result would bloat the file."""
_RANDOM = frozenset(
    ("Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike")
)
"""Two of these with the same inputs are not the same value."""


@cache
def _phases() -> tuple[Sequence[RewriteRule], ...]:
    """Folding first; only a BatchNormalization that no layer takes is then made something else."""
    general = [
        *clip_rules(),
        *arithmetic_rules(),
        *hardswish_rules(),
        *layer_norm_rules(),
        *einsum_rules(),
        *gemm_rules(),
        *fold_rules(),
        *padding_rules(),
        *pooling_rules(),
        *reshaping_rules(),
        *softmax_rules(),
        *unit_length_rules(),
    ]
    return general, alone_rules()


@cache
def _gelu_rules() -> Sequence[RewriteRule]:
    return gelu_rules()


def apply_rewrites(model: ir.Model) -> Counter[str]:
    """How often each rule was applied to `model`, which is changed in place.

    Raises StageError when the rules do not come to an end.
    """
    applied: Counter[str] = Counter()
    names = [str(value.name) for value in model.graph.outputs]
    tidy(model)
    phases = ((_gelu_rules(),) if may_have_gelu(model) else ()) + _phases()
    for _ in range(_ROUNDS):
        count = 0
        for phase in phases:
            count = _apply(phase, model, applied)
            raise_opset(model)
            if count:
                break
        if not count:
            keep_output_names(model, names)
            return applied
        tidy(model)
    last = ", ".join(sorted(applied))
    raise StageError(f"simplification did not come to an end in {_ROUNDS} rounds; rules applied: {last}")


def _apply(rules: Sequence[RewriteRule], model: ir.Model, applied: Counter[str]) -> int:
    """How many rewrites one pass of all rules made; what a rule makes is looked at again in the next pass."""
    before = applied.total()
    for name, alike in _by_name(rules).items():
        count = RewriteRuleSet(alike).apply_to_model(model)
        if count:
            applied[name] += count
    return applied.total() - before


def _by_name(rules: Sequence[RewriteRule]) -> dict[str, list[RewriteRule]]:
    groups: dict[str, list[RewriteRule]] = {}
    for rule in rules:
        groups.setdefault(rule.name or "", []).append(rule)
    return groups


def tidy(model: ir.Model) -> None:
    """Folds constants, removes what nothing uses, and infers shapes, in place."""
    lift = passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)
    run_passes(model, lift)
    fold_constants(model, input_size_limit=_FOLDED_ELEMENTS, output_size_limit=_FOLDED_ELEMENTS)
    run_passes(model, lift, passes.DeduplicateInitializersPass())
    if not any(node.op_type in _RANDOM for node in model.graph.all_nodes()):
        run_passes(model, passes.CommonSubexpressionEliminationPass())
    run_passes(
        model,
        passes.IdentityEliminationPass(),
        passes.RemoveUnusedNodesPass(),
        passes.RemoveUnusedFunctionsPass(),  # type: ignore[no-untyped-call]  # onnx_ir's own
        passes.RemoveUnusedOpsetsPass(),
        passes.ShapeInferencePass(strict_mode=False, data_prop=True),
    )


def keep_output_names(model: ir.Model, names: Sequence[str]) -> None:
    """Gives the graph's outputs their `names` again: where two became one value, one is an Identity of the other."""
    outputs = model.graph.outputs
    for place, name in enumerate(names):
        value = outputs[place]
        if value.name == name:
            continue
        copy = ir.Node("", "Identity", [value])
        copy.outputs[0].name, copy.outputs[0].shape, copy.outputs[0].type = name, value.shape, value.type
        model.graph.append(copy)
        outputs[place] = copy.outputs[0]
