"""Returns a recipe's values from TOML text and `--set` overrides, or one error that names each wrong key."""

from __future__ import annotations

import difflib
import json
import math
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Any, get_args, get_origin

from pydantic import BaseModel, ValidationError

from edgeship.calibration.errors import InputError
from edgeship.pipeline.recipe import Recipe
from edgeship.pipeline.recipe_sections import GATE_RANGES, GATES

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

    from edgeship.pipeline.training_section import Training

_LARGEST = 1 << 20


def read_recipe(path: Path, overrides: Sequence[str]) -> Recipe:
    """The checked recipe of `path`; see `load_recipe`."""
    values = _read_toml(path)
    for override in overrides:
        apply_override(values, override)
    values = _with_flat_gates(values)
    try:
        recipe = Recipe.model_validate_json(json.dumps(values, default=str))
    except ValidationError as error:
        raise InputError(_sentence(path, [_explain(detail) for detail in error.errors()])) from None
    _check_names(path, recipe)
    return recipe


def _read_toml(path: Path) -> dict[str, Any]:
    if path.is_dir():
        raise InputError(f"{path} is a folder; a recipe is a TOML file, such as {path / 'recipe.toml'}")
    try:
        if path.stat().st_size > _LARGEST:
            raise InputError(
                f"{path} has {path.stat().st_size} bytes, too many for a recipe; is it another kind of file?"
            )
        return tomllib.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise InputError(f"there is no recipe {path}") from None
    except OSError as error:
        raise InputError(f"cannot read the recipe {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise InputError(f"{path} is not a text file; a recipe is TOML in UTF-8") from None
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{path} is not valid TOML: {error}") from None


def apply_override(values: dict[str, Any], override: str) -> None:
    """Sets one "dotted.key=value" in `values`; the value is TOML where it parses as TOML, else text."""
    key, equals, text = override.partition("=")
    parts = [part.strip() for part in key.split(".")]
    if not equals or not all(parts):
        raise InputError(f"--set takes KEY=VALUE, such as quantize.samples=50; seen: {override!r}")
    if parts[0] == "gates":
        parts = ["gates", ".".join(parts[1:])] if len(parts) > 1 else parts
        if isinstance(values.get("gates"), dict):
            values["gates"] = _flat(values["gates"])
    table = values
    for depth, part in enumerate(parts[:-1]):
        table = table.setdefault(part, {})
        if not isinstance(table, dict):
            raise InputError(f"--set {key}: {'.'.join(parts[: depth + 1])} is a value, not a table")
    table[parts[-1]] = _parse_value(text)


def _parse_value(text: str) -> Any:
    try:
        parsed = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    return parsed["value"] if list(parsed) == ["value"] else text


def _with_flat_gates(values: dict[str, Any]) -> dict[str, Any]:
    gates = values.get("gates")
    return {**values, "gates": _flat(gates)} if isinstance(gates, dict) else values


def _flat(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"accuracy": {"max_drop": 1}}` and `{"accuracy.max_drop": 1}` mean the same."""
    flat: dict[str, Any] = {}
    for key, value in table.items():
        flat.update(_flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value})
    return flat


def _check_names(path: Path, recipe: Recipe) -> None:
    """Raises InputError for gates, targets or algorithms that do not exist: they are names, not types."""
    from edgeship.pipeline.recipe_loaders import loader_problems
    from edgeship.pipeline.recipe_quantize import quantize_problems
    from edgeship.targets.base import names

    problems = [
        f"gates.{_quoted(gate)}: unknown gate{did_you_mean(gate, GATES)}" for gate in recipe.gates if gate not in GATES
    ]
    problems += _limit_problems(recipe)
    known = names()
    problems += [
        f"targets.{target}: unknown target{did_you_mean(target, known)}"
        for target in recipe.targets
        if target not in known
    ]
    problems += [
        *_target_problems(recipe, known),
        *_source_problems(recipe),
        *quantize_problems(recipe),
        *_channel_problems(recipe),
    ]
    problems += [*_device_problems(recipe), *_compress_problems(recipe, known), *loader_problems(recipe)]
    if not problems:
        problems += _qat_problems(recipe)
    if problems:
        raise InputError(_sentence(path, problems))


def _limit_problems(recipe: Recipe) -> list[str]:
    """Limits of gates that nothing measured could meet, or miss."""
    problems = []
    for gate, limit in recipe.gates.items():
        low, high = GATE_RANGES.get(gate, (-math.inf, math.inf))
        if not low <= limit <= high:
            accepted = f"at least {low:g}" if high == math.inf else f"{low:g} .. {high:g}"
            problems.append(f"gates.{_quoted(gate)}: seen {limit:g} ({GATES[gate]}); accepted: {accepted}")
    return problems


def _target_problems(recipe: Recipe, known: Sequence[str]) -> list[str]:
    """What a target's table asks for and its runtime does not have."""
    from edgeship.targets.base import Restricted, load

    problems = []
    for name, options in recipe.targets.items():
        target: Any = load(name) if name in known else None
        refused = target.refused if isinstance(target, Restricted) else {}
        wrong = [option for option in refused if getattr(options, option)]
        problems += [f"targets.{name}.{option}: {refused[option]}; accepted: false, or left out" for option in wrong]
        if options.c_array and "c_array" not in wrong and options.io_dtype != "int8":
            problems.append(
                f'targets.{name}.c_array: seen io_dtype = "{options.io_dtype}"; accepted: io_dtype = "int8"'
            )
    return problems


def _source_problems(recipe: Recipe) -> list[str]:
    source, factory = recipe.model.source, recipe.source_factory
    holds_model = source.removesuffix(f":{factory}").endswith((".onnx", ".pt2"))
    if holds_model == (factory is None):
        needless = [name for name in ("weights", "weights_key", "args") if holds_model and getattr(recipe.model, name)]
        lost = [] if recipe.model.weights or not recipe.model.weights_key or holds_model else ["weights_key"]
        alone = [f"model.{name}: there is no model.weights that it is about; accepted: beside weights" for name in lost]
        return [*(f"model.{name}: {source} holds its own weights; accepted: none" for name in needless), *alone]
    if source.endswith((".pt", ".pth")):
        how = "the code that builds the model as PATH.py:factory, and this file as model.weights"
        return [f"model.source: {shown(source)} holds weights, or TorchScript, which is not read; accepted: {how}"]
    what = "names no factory" if factory is None else "names a factory in a file that is no Python code"
    accepted = "PATH.py:factory, package.module:factory, model.onnx or model.pt2"
    return [f"model.source: {shown(source)} {what}; accepted: {accepted}"]


def _compress_problems(recipe: Recipe, targets: Sequence[str]) -> list[str]:
    if recipe.compress is None:
        return []
    problems, prune = [], recipe.compress.prune
    if recipe.source_factory is None:
        accepted = "PATH.py:factory or package.module:factory"
        problems.append(f"compress: {recipe.model.source} cannot be trained; accepted for model.source: {accepted}")
    if prune is not None and prune.latency_target not in targets:
        hint = did_you_mean(prune.latency_target, targets)
        problems.append(f"compress.prune.latency_target: unknown target {prune.latency_target!r}{hint}")
    if (recipe.data.training is None) == (recipe.data.loaders is None):
        seen = "neither is set" if recipe.data.training is None else "both are set"
        problems.append(f"data.training, data.loaders: {seen}; accepted with [compress]: one of them")
    asked = {"compress.distill.mirror": recipe.compress.distill is not None and recipe.compress.distill.mirror}
    problems += _image_problems(recipe, {**asked, **_varied(recipe.compress.training, "compress.training")})
    return [*problems, *_several_inputs(recipe, "[compress]")]


def _varied(settings: Training, where: str) -> dict[str, float]:
    """The keys of a training that are about images, and their values."""
    return {f"{where}.{key}": getattr(settings, key) for key in ("flip", "shift", "cutmix")}


def _image_problems(recipe: Recipe, asked: Mapping[str, float]) -> list[str]:
    """That what is mirrored, moved or cut are images, where the recipe says that the input is none."""
    shape = recipe.input.shape
    if shape is None or len(shape) == 4:
        return []
    return [
        f"{key}: seen {json.dumps(value)}; it is for images [1, C, H, W], and input.shape is {list(shape)}; accepted: "
        f"{json.dumps(type(value)())}"
        for key, value in asked.items()
        if value
    ]


def _several_inputs(recipe: Recipe, what: str) -> list[str]:
    """That only networks with one input are trained, where the recipe names others."""
    others = ", ".join(recipe.input.others)
    return [f"input.others: seen {others}; {what} trains networks with one input; accepted: none"] if others else []


def _qat_problems(recipe: Recipe) -> list[str]:
    """What [quantize.qat] asks for and other tables exclude or lack."""
    settings = recipe.quantize.qat
    if settings is None:
        return []
    problems = _several_inputs(recipe, "[quantize.qat]")
    problems += _image_problems(recipe, _varied(settings, "quantize.qat"))
    own = [name for name in sorted(recipe.targets) if recipe.has_own_form(name)]
    if own:
        problems.append(
            f"quantize.qat: trains the plan that targets share; {', '.join(own)} would have a form of its own "
            '(quantize.scheme, targets.NAME.weights = "unsigned", keep_float), which stays untrained; accepted: one of '
            "the two"
        )
    elif settings.learn_scales and len(recipe.shipped_schemes()) > 1:
        problems.append(
            "quantize.qat.learn_scales: seen true; targets with other weights would get other activation scales, which "
            'must be the same everywhere; accepted: false, or quantize.weights = "shared" or "full"'
        )
    if settings.objective == "teacher" and recipe.qat_distill is None:
        problems.append(
            'quantize.qat.objective: seen "teacher", and there is no [quantize.qat.distill] or [compress.distill] that '
            'names one; accepted: "distill" (from the float model), "labels", or such a table'
        )
    mirrored = settings.distill is not None and settings.distill.mirror
    problems += _image_problems(recipe, {"quantize.qat.distill.mirror": mirrored})
    if settings.data == "training" and (recipe.data.training is None) == (recipe.data.loaders is None):
        seen = "neither is set" if recipe.data.training is None else "both are set"
        problems.append(
            f'data.training, data.loaders: {seen}; accepted with quantize.qat.data = "training": one of them'
        )
    return problems


def _device_problems(recipe: Recipe) -> list[str]:
    from edgeship.pipeline.devices.base import ACCEPTED, is_address

    problems = [
        f"devices.{name}.url: seen {shown(options.url)}; accepted: host, ssh://[user@]host[:port] or adb:SERIAL"
        for name, options in recipe.devices.items()
        if not is_address(options.url)
    ]
    if recipe.device not in recipe.devices and not is_address(recipe.device):
        hint = did_you_mean(recipe.device, recipe.devices) if recipe.devices else ""
        problems.append(f"device: seen {shown(recipe.device)}; accepted: {ACCEPTED}{hint}")
    return problems


def _channel_problems(recipe: Recipe) -> list[str]:
    channels = 1 if recipe.input.color == "gray" else 3
    problems = [
        f"input.{field}: seen {list(values)}; accepted: one number, or {channels} for color {recipe.input.color!r}"
        for field, values in (("mean", recipe.input.mean), ("std", recipe.input.std))
        if len(values) not in (1, channels)
    ]
    if not all(std > 0 for std in recipe.input.std):
        problems.append(f"input.std: seen {list(recipe.input.std)}; accepted: positive numbers")
    return problems


def _quoted(gate: str) -> str:
    return f'"{gate}"'


def did_you_mean(name: str, known: Sequence[str] | Mapping[str, Any]) -> str:
    """A hint that ends a sentence about an unknown `name`: the closest known one, or all of them."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; there are: {', '.join(sorted(known))}"


def _sentence(path: Path, problems: Sequence[str]) -> str:
    if len(problems) == 1:
        return f"{path.name}: {problems[0]}"
    return "\n".join(
        [f"{path.name} has {len(problems)} wrong entries, first {problems[0]}", *(f"  - {p}" for p in problems)]
    )


def _explain(detail: ErrorDetails) -> str:
    """One sentence without a full stop for one pydantic error."""
    where = ".".join(str(part) for part in detail["loc"])
    match detail["type"]:
        case "extra_forbidden":
            known = _fields_at(detail["loc"][:-1])
            return f"{where}: unknown key{did_you_mean(str(detail['loc'][-1]), known)}"
        case "missing":
            return f"{where}: required, and not given"
        case "value_error":
            accepted = str(detail["ctx"]["error"])
        case _:
            accepted = _accepted(detail)
    return f"{where}: seen {shown(detail['input'])}; accepted: {accepted}"


def _accepted(detail: ErrorDetails) -> str:
    if detail["type"] == "literal_error":
        return str(detail["ctx"]["expected"])
    message = detail["msg"].removeprefix("Input should be ").removeprefix("a valid ").replace("an object", "a table")
    return message[0].lower() + message[1:]


def shown(value: Any) -> str:
    """The value as JSON writes it, cut short where it is long."""
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _inside(annotation: Any) -> Any:
    """`X` for `X | None`."""
    parts = [each for each in get_args(annotation) if each is not type(None)]
    return parts[0] if get_origin(annotation) is UnionType and len(parts) == 1 else annotation


def _fields_at(location: Sequence[str | int]) -> list[str]:
    """The keys that exist at a place of the recipe."""
    model: Any = Recipe
    for part in location:
        if isinstance(model, type) and issubclass(model, BaseModel):
            model = _inside(model.model_fields[str(part)].annotation)
        elif get_origin(model) is dict:
            model = get_args(model)[1]
        elif get_origin(model) is tuple:
            model = get_args(model)[0]
    return (
        [field.alias or name for name, field in model.model_fields.items()]
        if isinstance(model, type) and issubclass(model, BaseModel)
        else []
    )
