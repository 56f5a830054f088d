"""Returns which layers of a student are matched with which of its teacher, where it was cut out of a network like it.

Both then have the same names, and what a block gave out is known for every block:

    teacher   a -> b -> c -> d      what is left   a -> ( ) -> ( ) -> d      pairs   (c, c), (d, d)

A block that is gone passes on what it is given, so `c` is what `a` gives out there: it has to do the work of all three.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from edgeship.calibration.errors import InputError
from edgeship.pipeline.compression.blocks import find_blocks

MAPS = 4
"""The axes of feature maps [n, channels, height, width]."""


def block_pairs(student: nn.Module, teacher: nn.Module, example: Tensor) -> tuple[tuple[str, str], ...]:
    """Pairs [student's module, teacher's module]: the ends of residual blocks, and of what stands in line with them.

    Raises InputError where the teacher has no residual blocks that give feature maps, or others than the student.
    """
    teacher.to(example.device)
    blocks = find_blocks(teacher, example)
    names = _in_line(teacher, blocks)
    theirs, ours = _maps(teacher, names, example), _maps(student, names, example)
    if not theirs:
        raise InputError(
            "distill.features without distill.layers matches residual blocks, and the teacher has none that give "
            "feature maps [n, channels, h, w]; accepted: layers = [[student's module, teacher's module]]"
        )
    others = [name for name in find_blocks(student, example) if name not in theirs]
    others += [name for name, shape in theirs.items() if name not in ours or ours[name][2:] != shape[2:]]
    if others:
        raise InputError(
            "distill.features without distill.layers matches each residual block with the teacher's of the same name, "
            f"and {others[0]!r} is not in both networks, with maps of the same size; accepted: a teacher of the "
            "student's own architecture, or layers = [[student's module, teacher's module]]"
        )
    gone = {name for name in theirs if isinstance(student.get_submodule(name), nn.Identity)}
    order = [*theirs, ""]
    return tuple((name, name) for name, following in pairwise(order) if following not in gone)


def _in_line(model: nn.Module, blocks: Sequence[str]) -> list[str]:
    """The blocks, and what else is in an nn.Sequential or nn.ModuleList that holds one: it takes part in the row."""
    owners = {name.rpartition(".")[0] for name in blocks}
    lines = {owner for owner in owners if isinstance(model.get_submodule(owner), nn.Sequential | nn.ModuleList)}
    beside = [name for name, _ in model.named_modules() if name and name.rpartition(".")[0] in lines]
    return list(dict.fromkeys([*beside, *blocks]))


@torch.no_grad()
def _maps(model: nn.Module, names: Sequence[str], example: Tensor) -> dict[str, torch.Size]:
    """The shapes of the named modules' outputs that are feature maps, in the order in which they come."""
    found: dict[str, torch.Size] = {}
    modules = dict(model.named_modules())
    handles = []
    for name in names:
        if name in modules:

            def keep(_module: nn.Module, _inputs: object, output: object, name: str = name) -> None:
                if isinstance(output, Tensor) and output.dim() == MAPS:
                    found[name] = output.shape

            handles.append(modules[name].register_forward_hook(keep))
    training = model.training
    try:
        model.eval()(example)
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    return found


__all__ = ["block_pairs"]
