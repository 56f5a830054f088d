"""Returns a teacher: any model a recipe can name, with its scores for a batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

from edgeship.calibration.errors import InputError
from edgeship.pipeline.compress_sections import Teacher as TeacherSection
from edgeship.pipeline.compression.loop import scores_of

if TYPE_CHECKING:
    from edgeship.calibration.types import Session
    from edgeship.pipeline.recipe import Recipe


class Teacher(Protocol):
    """A model that is learned from."""

    def scores(self, inputs: Tensor) -> Tensor:
        """The class scores (n, classes) for a batch, without gradients."""


class TorchTeacher:
    """A PyTorch module, or exported program, in eval mode."""

    def __init__(self, module: nn.Module, batch: int | None = None) -> None:
        self.module, self._batch = module, batch

    @torch.no_grad()
    def scores(self, inputs: Tensor) -> Tensor:
        """The class scores; a program exported for one batch size gets its inputs in parts of that size."""
        self.module.to(inputs.device)
        return _in_parts(lambda part: scores_of(self.module(part)), inputs, self._batch or len(inputs))


class OnnxTeacher:
    """An ONNX file, run by ONNX Runtime."""

    def __init__(self, session: Session, path: Path) -> None:
        self._session = session
        if len(session.inputs) != 1:
            raise InputError(f"the teacher {path} has {len(session.inputs)} inputs; accepted: one")

    def scores(self, inputs: Tensor) -> Tensor:
        """The class scores; a file of a fixed batch gets its inputs in parts of that size."""
        size = self._session.inputs[0].shape[0]
        return _in_parts(self._first, inputs.cpu(), size if size > 0 else len(inputs)).to(inputs.device)

    def _first(self, inputs: Tensor) -> Tensor:
        outputs = self._session.run({self._session.inputs[0].name: inputs.numpy()})
        return scores_of(torch.from_numpy(outputs[self._session.outputs[0].name]))


def _in_parts(scores: Callable[[Tensor], Tensor], inputs: Tensor, size: int) -> Tensor:
    """The scores of all inputs from a model that takes `size` at a time; zeros fill the last part up."""
    found = []
    for part in torch.split(inputs, size):
        filling = part.new_zeros(size - len(part), *part.shape[1:])
        found.append(scores(torch.cat([part, filling]))[: len(part)])
    return torch.cat(found)


def first_scores(who: str, shape: Sequence[int], scores: Callable[[Tensor], Tensor]) -> Tensor:
    """What `scores` makes of one sample of `shape`. Raises InputError that names `who` where it does not take it."""
    try:
        with torch.no_grad():
            return scores(torch.zeros(list(shape)))
    except InputError:
        raise
    except Exception as error:  # a user's code raises what it likes
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"{who} does not take an input of shape {list(shape)}: {reason}") from error


def open_teacher(
    recipe: Recipe, section: TeacherSection, shape: Sequence[int], where: str = "compress.distill"
) -> Teacher:
    """The teacher of the recipe's table `where`, tried on one sample of `shape`.

    Raises InputError where it does not take it.
    """
    teacher = _open(recipe, section, f"{where}.teacher")
    first_scores(f"the teacher {section.source}", shape, teacher.scores)
    return teacher


def _open(recipe: Recipe, section: TeacherSection, where: str) -> Teacher:
    from edgeship.pipeline.models import build_module
    from edgeship.pipeline.pt2 import load_exported
    from edgeship.targets.base import load

    place, _, factory = section.source.rpartition(":")
    if not place:
        path = recipe.resolve(section.source, f"{where}.source")
        if path.suffix not in (".onnx", ".pt2"):
            raise InputError(
                f"{where}.source = {section.source!r} names no factory; accepted: PATH.py:factory, "
                "package.module:factory, model.onnx or model.pt2"
            )
        if section.weights is not None:
            raise InputError(f"{where}.weights is set, but {path.name} holds its own weights")
        if path.suffix == ".onnx":
            return OnnxTeacher(load("onnxruntime").open(path, torch.get_num_threads()), path)
        program = load_exported(path)
        given = program.graph_signature.user_inputs
        size = next(node.meta["val"] for node in program.graph.nodes if node.name in given).shape[0]
        return TorchTeacher(program.module(check_guards=False), size if isinstance(size, int) else None)
    source = recipe.resolve(place, f"{where}.source") if place.endswith(".py") else place
    weights = None if section.weights is None else recipe.resolve(section.weights, f"{where}.weights")
    module = build_module(source, factory, section.args, weights, section.weights_key)
    return TorchTeacher(module.requires_grad_(False))
