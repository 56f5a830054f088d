"""Returns training data as batches that depend on (seed, epoch, step) alone, so that a run can go on at any step.

Every process makes the same global batch and takes its share of it: two processes see what one would.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

import numpy as np
import torch
from torch import Tensor

from edgeship.calibration.errors import InputError


@dataclass(frozen=True)
class Batch:
    """`inputs` (n, ...) float32, `labels` (n,) int64 where known, and which samples they are where that is known.

    A sample that another was mixed into has a second label in `others`, and `share_of_own` (n,), 0..1, of the first.
    """

    inputs: Tensor
    labels: Tensor | None = None
    indices: Tensor | None = None
    others: Tensor | None = None
    share_of_own: Tensor | None = None

    @property
    def answers(self) -> Tensor | None:
        """The class (n,) that each sample shows most of."""
        if self.labels is None or self.others is None or self.share_of_own is None:
            return self.labels
        return torch.where(self.share_of_own < 0.5, self.others, self.labels)

    def to(self, device: torch.device, memory_format: torch.memory_format = torch.contiguous_format) -> Batch:
        """The same on another device, images in the memory format."""
        inputs = self.inputs.to(device)
        if inputs.dim() == 4:
            inputs = inputs.contiguous(memory_format=memory_format)
        _, *rest = self._parts()
        return Batch(inputs, *(None if part is None else part.to(device) for part in rest))

    def share(self, share: Share) -> Batch:
        """The part of the batch that one of several processes works on; parts differ by one sample at most."""
        if share.count == 1:
            return self
        first, end = (len(self.inputs) * place // share.count for place in (share.index, share.index + 1))
        part = slice(first, end)
        return Batch(*(None if each is None else each[part] for each in self._parts()))  # type: ignore[arg-type]  # inputs are never None

    def _parts(self) -> tuple[Tensor | None, ...]:
        return self.inputs, self.labels, self.indices, self.others, self.share_of_own


@dataclass(frozen=True)
class Share:
    """Which of `count` processes this one is."""

    index: int = 0
    count: int = 1


class Batches(Protocol):
    """Training or validation data."""

    @property
    def steps(self) -> int:
        """The number of batches in an epoch."""

    def epoch(self, number: int, skip: int = 0) -> Iterator[Batch]:
        """The global batches of epoch `number` (from 0) without the first `skip`."""


@dataclass(frozen=True)
class Augmentation:
    """Random variations of images; `border` is the value of black, one per channel."""

    flip: bool = False
    shift: int = 0
    border: tuple[float, ...] = (0.0,)

    def __bool__(self) -> bool:
        return self.flip or self.shift > 0

    def apply(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """The images (n, C, H, W), each mirrored and moved in its own way."""
        count, channels, height, width = images.shape
        if self.flip:
            mirrored = torch.rand(count, generator=generator) < 0.5
            images = torch.where(mirrored.view(-1, 1, 1, 1), images.flip(3), images)
        if self.shift:
            border = torch.tensor(self.border, dtype=images.dtype).expand(channels).view(1, -1, 1, 1)
            room = torch.nn.functional.pad(images - border, [self.shift] * 4) + border
            down, right = torch.randint(0, 2 * self.shift + 1, (2, count), generator=generator)
            rows = down.view(-1, 1) + torch.arange(height)
            columns = right.view(-1, 1) + torch.arange(width)
            place = torch.arange(count).view(-1, 1, 1)
            images = room.permute(0, 2, 3, 1)[place, rows.unsqueeze(2), columns.unsqueeze(1)].permute(0, 3, 1, 2)
        return images.contiguous()


@dataclass(frozen=True)
class ArrayBatches:
    """Samples in one array (n, ...), which may be mapped from a file: uint8 pixels or float32 values.

    value = (pixel - mean) / std. With `shuffle` an epoch leaves out the samples that fill no whole batch; without, the
    last batch is smaller. Fewer samples than a batch make one batch of all. `members` says which samples take part.
    """

    values: np.ndarray[Any, np.dtype[Any]]
    labels: Sequence[int] | None
    batch_size: int
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    augmentation: Augmentation = field(default_factory=Augmentation)
    seed: int = 0
    shuffle: bool = True
    members: np.ndarray[Any, np.dtype[np.int64]] | None = None

    def __post_init__(self) -> None:
        if not len(self.values):
            raise InputError("the training data holds no samples; accepted: at least 1")
        if self.augmentation and self.values.ndim != 4:
            shape = [1, *self.values.shape[1:]]
            raise InputError(f"training: flip and shift are for images [1, C, H, W]; the input's shape is {shape}")

    @property
    def steps(self) -> int:
        """The number of batches in an epoch."""
        count = len(self._members())
        return max(1, count // self.batch_size) if self.shuffle else -(-count // self.batch_size)

    def epoch(self, number: int, skip: int = 0) -> Iterator[Batch]:
        """The batches of one epoch, in an order of its own."""
        order = torch.from_numpy(self._members())
        if self.shuffle:
            order = order[torch.randperm(len(order), generator=generator_for(self.seed, number))]
        for step in range(skip, self.steps):
            chosen = order[step * self.batch_size : (step + 1) * self.batch_size]
            inputs = self._inputs(chosen)
            if self.augmentation and self.shuffle:
                inputs = self.augmentation.apply(inputs, generator_for(self.seed, number, step + 1))
            yield Batch(inputs, self._labels(chosen), chosen)

    def _members(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        return np.arange(len(self.values)) if self.members is None else self.members

    def _inputs(self, chosen: Tensor) -> Tensor:
        picked = torch.from_numpy(np.asarray(self.values[chosen.numpy()]).astype(np.float32))
        if self.mean == (0.0,) and self.std == (1.0,):
            return picked
        shape = (1, -1, *(1,) * (picked.dim() - 2))
        mean, std = (torch.tensor(each, dtype=torch.float32).view(shape) for each in (self.mean, self.std))
        return (picked - mean) / std

    def _labels(self, chosen: Tensor) -> Tensor | None:
        return None if self.labels is None else torch.as_tensor(self.labels)[chosen].long()


class LoaderBatches:
    """What a user's own loader yields: pairs (inputs, labels) or inputs alone, tensors or arrays, batch first.

    A loader may draw random numbers from torch, NumPy and `random`, which are seeded at the start of each epoch. What
    comes before `skip` is read and dropped, so that it has drawn the same numbers.
    """

    def __init__(self, loader: Iterable[Any], name: str, shape: Sequence[int]) -> None:
        self._loader, self._name, self._shape = loader, name, tuple(shape)
        try:
            self._steps = len(cast(Sized, loader))
        except TypeError as error:
            raise InputError(
                f"{name} is a {type(loader).__name__} without a length; accepted: a DataLoader, or a sequence of "
                "batches, that can be gone through again in each epoch"
            ) from error
        if not self._steps:
            raise InputError(f"{name} yields nothing: its length is 0; accepted: at least one batch")

    @property
    def steps(self) -> int:
        """The number of batches in an epoch."""
        return self._steps

    def epoch(self, number: int, skip: int = 0) -> Iterator[Batch]:
        """The batches of one pass over the loader."""
        del number  # the loader draws an order of its own from the seeded generators
        step = 0
        for item in self._items():
            if step == self._steps:
                raise InputError(f"{self._name} yields more than the {self._steps} batches that its length promises")
            if step >= skip:
                yield self._batch(item, step)
            step += 1
        if step < self._steps:
            raise InputError(f"{self._name} yields {step} batches; its length promises {self._steps}")

    def _items(self) -> Iterator[Any]:
        """What the loader yields. Raises InputError that names the loader and the batch for what it raises."""
        step = 0
        try:
            for item in self._loader:
                yield item
                step += 1
        except Exception as error:
            lines = str(error).strip().splitlines() or ["no message"]
            # a worker's message has its traceback in the middle
            said = lines[0] if len(lines) == 1 else f"{lines[0]} ... {lines[-1]}"
            raise InputError(
                f"{self._where(step)}: the loader failed with {type(error).__name__}: {said}; accepted: a loader that "
                f"yields its {self._steps} batches in every epoch"
            ) from error

    def _where(self, step: int) -> str:
        return f"{self._name}, batch {step + 1} of {self._steps}"

    def _batch(self, item: Any, step: int) -> Batch:
        where = self._where(step)
        parts = list(item) if isinstance(item, list | tuple) else [item]
        if len(parts) not in (1, 2):
            raise InputError(f"{where}: {len(parts)} parts; accepted: (inputs, labels), or inputs alone")
        inputs, *rest = (_tensor(part, where) for part in parts)
        if inputs.dim() != len(self._shape) or tuple(inputs.shape[1:]) != self._shape[1:] or not len(inputs):
            raise InputError(
                f"{where}: inputs of the shape {list(inputs.shape)}; accepted: {['batch', *self._shape[1:]]}"
            )
        labels = rest[0] if rest else None
        if labels is not None and (labels.shape != inputs.shape[:1] or labels.is_floating_point()):
            raise InputError(
                f"{where}: labels are {str(labels.dtype).removeprefix('torch.')}{list(labels.shape)}; "
                f"accepted: {len(inputs)} whole numbers, the classes"
            )
        return Batch(inputs.float(), None if labels is None else labels.long())


def _tensor(value: Any, where: str) -> Tensor:
    if isinstance(value, Tensor):
        return value
    if isinstance(value, np.ndarray) and value.dtype.kind in "fiub":
        return torch.from_numpy(np.ascontiguousarray(value))
    raise InputError(f"{where}: a {type(value).__name__}; accepted: tensors or arrays of numbers")


def generator_for(seed: int, *place: int) -> torch.Generator:
    """A generator whose numbers depend on the seed and the place (epoch, step) alone."""
    mixed = np.random.SeedSequence([seed, *place]).generate_state(2, np.uint32)
    return torch.Generator().manual_seed(int(mixed[0]) << 31 ^ int(mixed[1]))
