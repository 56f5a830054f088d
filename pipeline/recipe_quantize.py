"""Returns what is wrong with what a recipe wants of quantization: unknown names, and wishes that change nothing."""

from __future__ import annotations

from collections.abc import Sequence

from edgeship.calibration.errors import InputError
from edgeship.pipeline.recipe import CALIBRATED_MODES, INTEGER_MODES, INTEGER_WEIGHT_MODES, Recipe
from edgeship.pipeline.recipe_reader import did_you_mean, shown

_OF_RANGES = (
    "algorithm",
    "weight_algorithm",
    "refine",
    "fixes",
    "sensitivity",
    "max_drop",
    "min_agreement",
    "min_sqnr",
    "revert",
    "reconstruct",
    "qat",
)
"""Keys of [quantize] about activations' ranges, or about what is made by them."""
_OF_INTEGERS = ("weights", "per_tensor")
"""Keys of [quantize] about 8-bit weights."""


def quantize_problems(recipe: Recipe) -> list[str]:
    """One sentence for each wish that cannot be met, or that nothing would come of."""
    return [
        *_form_problems(recipe),
        *_mode_problems(recipe),
        *_idle_problems(recipe),
        *_algorithm_problems(recipe),
    ]


def _form_problems(recipe: Recipe) -> list[str]:
    from edgeship.targets.base import load, names

    mode = recipe.quantize.mode
    problems = []
    if recipe.quantize.scheme == "auto" and mode != "static":
        problems.append(f'quantize.scheme: "auto" chooses among forms of mode "static"; seen: mode = "{mode}"')
    for name, options in recipe.targets.items():
        if options.keep_float and mode not in CALIBRATED_MODES:
            problems.append(f'targets.{name}.keep_float: mode "{mode}" has no integer activations; accepted: none')
        if (
            options.weights
            and name in names()
            and options.weights not in load(name).forms
            and options.weights == "unsigned"
        ):
            problems.append(f"targets.{name}.weights: this target has no kernels for unsigned weights; accepted: full")
    return problems


def _mode_problems(recipe: Recipe) -> list[str]:
    """Wishes that the mode would ignore; what asks for nothing ([], false, "auto") is none."""
    from edgeship.pipeline.quantizing.weight_only import check_overrides

    section = recipe.quantize
    modes = {**dict.fromkeys(_OF_RANGES, CALIBRATED_MODES), **dict.fromkeys(_OF_INTEGERS, INTEGER_WEIGHT_MODES)}
    asked = [(f"quantize.{key}", getattr(section, key), modes[key]) for key in modes if key in section.model_fields_set]
    of_form = {"unsigned": CALIBRATED_MODES, "pair_limited": INTEGER_MODES}
    asked += [
        (f"targets.{name}.weights", options.weights, of_form[options.weights])
        for name, options in recipe.targets.items()
        if options.weights in of_form
    ]
    problems = [
        f'{where}: mode "{section.mode}" would ignore it; accepted: nothing here, or mode = {_either(accepted)}'
        for where, value, accepted in asked
        if section.mode not in accepted and not (value in ((), "auto") or value is False)
    ]
    if section.mode not in CALIBRATED_MODES:
        try:
            check_overrides([wish.as_override() for wish in section.override], section.mode)
        except InputError as error:
            problems.append(str(error))
    return problems


def _idle_problems(recipe: Recipe) -> list[str]:
    """Wishes that change nothing without another one."""

    section = recipe.quantize
    if section.mode not in CALIBRATED_MODES:
        return []  # said already: the mode itself ignores them
    problems = []
    if "reconstruct" in section.model_fields_set and "reconstruct" not in section.refine:
        problems.append(
            f"quantize.reconstruct: nothing is reconstructed with refine = {shown(list(section.refine))}; accepted: "
            'beside refine = ["reconstruct"] alone'
        )
    if "revert" in section.model_fields_set and not section.limits:
        problems.append(
            "quantize.revert: nothing is reverted without a limit; accepted: beside max_drop, min_agreement or min_sqnr"
        )
    return problems


def _algorithm_problems(recipe: Recipe) -> list[str]:
    from edgeship.calibration import algorithms, refine
    from edgeship.calibration.planning.overrides import SPARED, weight_algorithms

    known, section = algorithms.names(), recipe.quantize
    asked = [("quantize.algorithm", section.algorithm)]
    asked += [
        (f"quantize.override.{i}.algorithm", each.algorithm or known[0]) for i, each in enumerate(section.override)
    ]
    problems = [
        f"{where}: unknown algorithm {name!r}{did_you_mean(name, known)}" for where, name in asked if name not in known
    ]
    of_weights = weight_algorithms()
    asked = [("quantize.weight_algorithm", section.weight_algorithm)]
    asked += [
        (f"quantize.override.{i}.weight_algorithm", each.weight_algorithm or SPARED)
        for i, each in enumerate(section.override)
    ]
    problems += [
        f"{where}: {name!r} is no range algorithm for weights; accepted: {', '.join(of_weights)}"
        for where, name in asked
        if name not in of_weights
    ]
    choices = refine.choices()
    problems += [
        f"quantize.refine: unknown refinement {name!r}{did_you_mean(name, choices)}"
        for name in section.refine
        if name not in refine.names()
    ]
    if not problems:
        try:
            refine.load_all(section.refine)
        except InputError as error:
            problems.append(f"quantize.refine: {error}")
    return problems


def _either(names: Sequence[str]) -> str:
    return " or ".join(f'"{name}"' for name in names)
