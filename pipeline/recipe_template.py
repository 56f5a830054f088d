"""Returns the text of a new recipe: every key a beginner needs, with a comment, filled in as far as a model tells."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

SUFFIXES = (".onnx", ".pt2", ".py")
"""The files that a recipe's model can come from."""
_OPEN = 224
"""Written for a side that a model leaves open, to be looked at by whoever knows."""
TEMPLATE = """\
# What edgeship makes of this model, and what is good enough. Every key: docs/recipe.md
name = {name}

[model]
source = {source}{source_note}
{weights}
[input]
{input}
# TODO how an image becomes the input, as in training: resize, centre crop, (pixel - mean) / std with pixels 0..255.
# resize = 256                      # the shorter side, or [height, width]
# crop = 224
# mean = [123.675, 116.28, 103.53]  # per channel; this is what torchvision's models were trained with
# std = [58.395, 57.12, 57.375]
# color = "bgr"                     # rgb (without this line) | bgr | gray

[data]
# Real samples. A CSV with the columns file,label; a folder of images or of class folders; or an .npz whose keys are
# input names, already preprocessed. File names are relative to `root`.
root = "data"                       # TODO
calibration = "calibration.csv"     # TODO about a hundred samples, to choose the integer ranges with
evaluation = "evaluation.csv"       # TODO other samples, to judge the artifacts with

[quantize]
mode = "static"
samples = 100

{targets}
[gates]                             # a gate nobody sets is not a gate
"accuracy.max_drop" = 1.0           # percentage points of top-1 against fp32; needs samples with classes
# "accuracy.min_sqnr" = 30.0         # instead, for models without classes: dB of the outputs against fp32
"parity.max_steps" = 2              # quantization steps between an artifact and its reference

[benchmark]
threads = 1
runs = 200
"""


def split_factory(model: Path | None) -> tuple[Path | None, str | None]:
    """The file and the factory of PATH.py:factory, which a recipe says too; no factory for any other path."""
    place, colon, factory = str(model).rpartition(":")
    return (Path(place), factory) if colon and place.endswith(".py") and factory.isidentifier() else (model, None)


def recipe_text(folder: Path, model: Path | None, factory: str | None = None) -> str:
    """TOML for a model that lies at `model`, built by `factory` where it is code, and a recipe in `folder`."""
    from edgeship.targets.base import names

    stem = model.stem if model else folder.absolute().name
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", stem).strip("-._")[:100] or "model"
    from_code = model is None or model.suffix == ".py"
    return TEMPLATE.format(
        name=_quoted(name),
        source=_quoted(_source(folder, model, factory or "build")),
        source_note="   # TODO PATH.py:factory, model.onnx or model.pt2" if from_code and not factory else "",
        weights='weights = "weights.pt"   # TODO a state dict, a checkpoint with one in it, or .safetensors\n'
        if not model or model.suffix == ".py"
        else "",
        input=_input(model),
        targets="".join(f"[targets.{target}]\n" for target in names()),
    )


def _source(folder: Path, model: Path | None, factory: str) -> str:
    if model is None:
        return f"model.py:{factory}"
    relative = Path(os.path.relpath(model.absolute(), folder.absolute())).as_posix()
    return f"{relative}:{factory}" if model.suffix == ".py" else relative


def _input(model: Path | None) -> str:
    """The input's name and shape from an ONNX file, or a placeholder."""
    if model is not None and model.suffix == ".pt2":
        return "# shape = [1, 3, 224, 224]          # batch first, NCHW; without this line the program's own"
    if model is None or model.suffix != ".onnx":
        return "shape = [1, 3, 224, 224]            # TODO batch first, NCHW"
    from edgeship.calibration.graph.onnx_file import load_onnx

    graph = load_onnx(model).graph
    free = [value for value in graph.inputs if value.name not in graph.initializers]
    lines = []
    for value in free[:1]:
        dims = value.shape.dims if value.shape else (1, 3, None, None)
        sides = [side if isinstance(side, int) else _OPEN if place else 1 for place, side in enumerate(dims)]
        is_open = any(not isinstance(side, int) for side in dims[1:])
        note = "   # TODO the model leaves sides open: those it was trained with" if is_open else ""
        lines = [f"name = {_quoted(value.name or 'input')}", f"shape = {json.dumps(sides)}{note}"]
        is_gray = len(sides) == 4 and (sides[1] == 1 or (sides[1] != 3 and sides[3] == 1))
        lines += ['color = "gray"'] if is_gray else []
    if len(free) > 1:
        names = ", ".join(str(value.name) for value in free)
        lines += [f"# {len(free)} inputs: samples are an .npz, already preprocessed, with a key for each: {names}"]
    return "\n".join(lines)


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
