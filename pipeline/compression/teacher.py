"""Returns a teacher: any model a recipe can name, with its scores for a batch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
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
        if self._batch is None or len(inputs) == self._batch:
            return scores_of(self.module(inputs))
        if len(inputs) % self._batch:
            raise InputError(f"the teacher takes batches of {self._batch}; a batch of {len(inputs)} is no multiple")
        return torch.cat([scores_of(self.module(part)) for part in torch.split(inputs, self._batch)])


class OnnxTeacher:
    """An ONNX file, run by ONNX Runtime."""

    def __init__(self, session: Session, path: Path) -> None:
        self._session, self._path = session, path
        if len(session.inputs) != 1:
            raise InputError(f"the teacher {path} has {len(session.inputs)} inputs; accepted: one")

    def scores(self, inputs: Tensor) -> Tensor:
        """The class scores; a file of a fixed batch gets its inputs in parts of that size."""
        info = self._session.inputs[0]
        size = info.shape[0] if info.shape[0] > 0 else len(inputs)
        if len(inputs) % size:
            raise InputError(f"the teacher {self._path} takes batches of {size}; seen: {len(inputs)} samples")
        parts = [self._first(part.numpy()) for part in torch.split(inputs.cpu(), size)]
        return scores_of(torch.from_numpy(np.concatenate(parts))).to(inputs.device)

    def _first(
        self, values: np.ndarray[tuple[int, ...], np.dtype[np.float32]]
    ) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
        outputs = self._session.run({self._session.inputs[0].name: values})
        return outputs[self._session.outputs[0].name]


def open_teacher(recipe: Recipe, section: TeacherSection, shape: Sequence[int]) -> Teacher:
    """The teacher of a recipe, tried on one sample of `shape`. Raises InputError where it does not take it."""
    teacher = _open(recipe, section)
    try:
        teacher.scores(torch.zeros(list(shape)))
    except InputError:
        raise
    except Exception as error:  # a user's code raises what it likes
        raise InputError(
            f"the teacher {section.source} does not take an input of shape {list(shape)}: "
            f"{(str(error).splitlines() or [type(error).__name__])[0]}"
        ) from error
    return teacher


def _open(recipe: Recipe, section: TeacherSection) -> Teacher:
    from edgeship.pipeline.models import build_module
    from edgeship.pipeline.pt2 import load_exported
    from edgeship.targets.base import load

    place, _, factory = section.source.rpartition(":")
    if not place:
        path = recipe.resolve(section.source, "compress.distill.teacher.source")
        if path.suffix not in (".onnx", ".pt2"):
            raise InputError(
                f"compress.distill.teacher.source = {section.source!r} names no factory; accepted: PATH.py:factory, "
                "package.module:factory, model.onnx or model.pt2"
            )
        if section.weights is not None:
            raise InputError(f"compress.distill.teacher.weights is set, but {path.name} holds its own weights")
        if path.suffix == ".onnx":
            return OnnxTeacher(load("onnxruntime").open(path, torch.get_num_threads()), path)
        program = load_exported(path)
        given = program.graph_signature.user_inputs
        size = next(node.meta["val"] for node in program.graph.nodes if node.name in given).shape[0]
        return TorchTeacher(program.module(check_guards=False), size if isinstance(size, int) else None)
    source = recipe.resolve(place, "compress.distill.teacher.source") if place.endswith(".py") else place
    weights = None if section.weights is None else recipe.resolve(section.weights, "compress.distill.teacher.weights")
    module = build_module(source, factory, section.args, weights, section.weights_key)
    return TorchTeacher(module.requires_grad_(False))
