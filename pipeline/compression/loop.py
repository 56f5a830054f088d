"""Returns a trained network: the one loop that fine-tuning, pruning, distillation and QAT share, on accelerate.

    train(Run(model, loss, data, settings, folder))

One process or many, CPU or GPU: accelerate decides from how the program was launched. The state is kept in `folder`
after every epoch and when the run is interrupted (SIGTERM, Ctrl-C); the same call goes on from there, and on a CPU ends
with the very weights that an uninterrupted run ends with.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedDataParallelKwargs
from torch import Tensor, nn

from edgeship.calibration.errors import InputError, StageError
from edgeship.pipeline.compression.averaging import Average
from edgeship.pipeline.compression.batches import Batch, Batches, Share
from edgeship.pipeline.compression.captured import Captured, can_capture
from edgeship.pipeline.compression.checkpoint import (
    Position,
    random_state,
    read_checkpoint,
    restore_random_state,
    seed_everything,
    seeded,
    write_checkpoint,
)
from edgeship.pipeline.compression.divergence import diverged, listed, not_finite
from edgeship.pipeline.compression.interruption import Interruption
from edgeship.pipeline.compression.metrics import EpochMetrics, write_metrics
from edgeship.pipeline.compression.mixing import MixedBatches
from edgeship.pipeline.compression.optimizer import learning_rate, make_optimizer
from edgeship.pipeline.compression.synchronized import release_batch_norm, synchronize_batch_norm, told_of_single_values
from edgeship.pipeline.training_section import Training

_DATA_PARALLEL = DistributedDataParallelKwargs(find_unused_parameters=True)
"""Processes wait for the gradient of each parameter, and a step may use fewer: an auxiliary head, a skipped block."""


class Loss(Protocol):
    """What is minimized."""

    def __call__(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """The mean loss of the batch, and the scores (n, classes) that top-1 is counted on, where there are any.

        `model` is called once, so that gradients are shared between processes.
        """


class Hook:
    """Something that takes part in training, with tensors that belong to its state; does nothing by itself."""

    def epoch_begins(self, model: nn.Module, epoch: int) -> None:
        """Before the first step of an epoch (counted from 0)."""

    def step_done(self, model: nn.Module) -> None:
        """After the optimizer changed the weights."""

    def epoch_ends(self, model: nn.Module, epoch: int) -> None:
        """After the last step of an epoch."""

    def state(self) -> dict[str, Tensor]:
        """What a resumed run needs."""
        return {}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Goes on from what `state` returned."""


@dataclass
class Run:
    """One training run. `model` is trained in place; `folder` keeps checkpoint and metrics.jsonl.

    `epochs`: the first of the settings' epochs that this run trains, and the one before which it ends; the learning
    rate is that of the whole. `progress(done, total, what)` hears of every step. `identity` is what, besides settings
    and shapes, makes a checkpoint this run's, such as the data's digest.
    """

    model: nn.Module
    loss: Loss
    data: Batches
    settings: Training
    folder: Path
    epochs: tuple[int, int] | None = None
    validation: Batches | None = None
    hooks: Sequence[Hook] = ()
    progress: Callable[[int, int, str], None] = lambda _done, _total, _what: None
    identity: Mapping[str, str] = field(default_factory=dict)


def train(run: Run) -> list[EpochMetrics]:
    """The metrics of every epoch; the model holds the trained weights (their average where `ema` is set), in eval mode.

    It is trained on the fastest device there is, and comes back to the one it was on.

    Raises StageError naming the step whose loss is not finite, or after which weights are not (the last checkpoint
    is kept), InputError for data that does not fit or a checkpoint of another run, KeyboardInterrupt after a checkpoint
    when interrupted.
    """
    with _deterministic(), Interruption() as interruption:
        training = _Training(run, interruption)
        try:
            return training.run()
        finally:
            training.release()


def make_accelerator(precision: str = "float32") -> Accelerator:
    """The accelerator of this process; precision "auto" is what its device computes fastest with."""
    AcceleratorState._reset_state()  # one process may train twice, with another precision; the process group stays
    kinds = {"float32": "no", "bfloat16": "bf16", "float16": "fp16"}
    if precision == "auto":
        precision = _fastest_precision()
    if precision == "float16" and not torch.cuda.is_available():
        raise InputError('precision = "float16" needs a GPU; accepted here: "auto", "float32", "bfloat16"')
    # without a GPU `cpu` must be said: accelerate joins processes on CPUs only then
    return Accelerator(
        mixed_precision=kinds[precision], cpu=not torch.accelerator.is_available(), kwargs_handlers=[_DATA_PARALLEL]
    )


def _fastest_precision() -> str:
    """What convolutions are trained fastest in: half precision where this GPU or CPU has instructions for it."""
    if torch.cuda.is_available():
        return "bfloat16" if torch.cuda.is_bf16_supported() else "float16"
    has = torch.cpu.get_capabilities()
    return "bfloat16" if has.get("avx512_bf16") or has.get("amx_bf16") else "float32"


def process_state() -> PartialState:
    """Which process of how many this is, and whether it is the first."""
    return PartialState(cpu=not torch.accelerator.is_available())


def share_of(accelerator: Accelerator) -> Share:
    """Which part of each batch is this process's."""
    return Share(accelerator.process_index, accelerator.num_processes)


class _Training:
    """The state of one `train` call."""

    def __init__(self, run: Run, interruption: Interruption) -> None:
        self._run, self._settings, self._interruption = run, run.settings, interruption
        self._accelerator = make_accelerator(run.settings.precision)
        self._share = share_of(self._accelerator)
        self._kept = {**run.settings.model_dump(mode="json"), "steps": run.data.steps, **run.identity}
        if run.epochs:
            self._kept["part"] = list(run.epochs)
        self._never_finite = not_finite(run.model)
        self._format, self._home = _fastest_format(run.model), next(run.model.parameters()).device
        run.model.to(self._accelerator.device, memory_format=self._format)  # type: ignore[call-overload]  # torch's stub lacks this form
        model = synchronize_batch_norm(run.model, self._accelerator)
        self._optimizer = make_optimizer(run.model, run.settings)
        self._average = Average(run.model, run.settings.ema) if run.settings.ema else None
        self._position = Position(epoch=run.epochs[0] if run.epochs else 0)
        state = read_checkpoint(run.folder, run.model, self._kept)
        self._model, self._prepared = self._accelerator.prepare(model, self._optimizer)
        self._random = self._restore(state) if state else None
        on_gpu, alone = self._accelerator.device.type == "cuda", self._share.count == 1
        self._capture = run.settings.cuda_graphs and on_gpu and alone and can_capture(run.model)
        self._captured: Captured | None = None

    def run(self) -> list[EpochMetrics]:
        """Trains from where the checkpoint left off."""
        position, epochs = self._position, self._run.epochs[1] if self._run.epochs else self._settings.epochs
        while position.epoch < epochs:
            self._epoch()
            position.epoch, position.step, position.sums = position.epoch + 1, 0, {}
            self._save()
        if self._average:
            self._run.model.load_state_dict(self._average.model.state_dict())
        self._run.model.eval()
        return [EpochMetrics(**values) for values in position.history]

    def release(self) -> None:
        """Gives the model its own forward pass back, without what was wrapped around it, on the device it was on."""
        if self._captured is not None:
            self._captured.release()
        self._accelerator.unwrap_model(self._model, keep_fp32_wrapper=False)
        release_batch_norm(self._run.model)
        self._run.model.to(self._home, memory_format=torch.contiguous_format)  # type: ignore[call-overload]  # as above

    def _epoch(self) -> None:
        position, run = self._position, self._run
        seed_everything(self._settings.seed, position.epoch)
        if position.step == 0:
            for hook in run.hooks:
                hook.epoch_begins(run.model, position.epoch)
        self._model.train()
        data = MixedBatches(run.data, self._settings) if self._settings.mixes else run.data
        for batch in data.epoch(position.epoch, position.step):
            if self._random is not None:  # the loader has drawn what it had drawn when the checkpoint was written
                restore_random_state(self._random)
                self._random = None
            self._step(batch)
            if self._stop_asked():
                self._check_weights()
                self._save()
                raise KeyboardInterrupt
        self._random = None
        for hook in run.hooks:
            hook.epoch_ends(run.model, position.epoch)
        self._check_weights()
        self._finish_epoch()

    def _step(self, batch: Batch) -> None:
        position, run = self._position, self._run
        done = position.epoch * run.data.steps + position.step
        rate = learning_rate(self._settings, done, run.data.steps)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        mine = self._mine(batch)
        if self._capture and self._captured is None:
            self._captured = Captured(self._model, mine.inputs)
        with self._accelerator.autocast(), told_of_single_values(self._place(), len(batch.inputs)):
            loss, scores = run.loss(self._model, mine)
        loss = loss * (len(mine.inputs) * self._share.count / len(batch.inputs))  # 1 where all shares are of one size
        value = float(self._accelerator.reduce(loss.detach().float(), "mean"))
        if not math.isfinite(value):
            raise self._diverged(f"the loss is {value} at", ahead=1)
        self._accelerator.backward(loss)
        if self._settings.clip_norm is not None:
            self._accelerator.clip_grad_norm_(run.model.parameters(), self._settings.clip_norm)
        self._prepared.step()
        self._prepared.zero_grad()
        for hook in run.hooks:
            hook.step_done(run.model)
        if self._average:
            self._average.update(run.model)
        self._count(value, scores, mine)
        position.step += 1
        run.progress(done + 1, self._settings.epochs * run.data.steps, self._what())

    def _mine(self, batch: Batch) -> Batch:
        """This process's share of the batch, on its device."""
        if len(batch.inputs) < self._share.count:
            raise InputError(
                f"{self._place()}: a batch of {len(batch.inputs)} has no sample for each of {self._share.count} "
                f"processes; accepted: batches of at least {self._share.count} (a DataLoader with drop_last = True)"
            )
        return batch.share(self._share).to(self._accelerator.device, self._format)

    def _place(self) -> str:
        return f"training, epoch {self._position.epoch + 1}, batch {self._position.step + 1}"

    def _count(self, loss: float, scores: Tensor | None, batch: Batch) -> None:
        sums, size = self._position.sums, len(batch.inputs)
        sums["loss"] = sums.get("loss", 0.0) + loss * size
        sums["samples"] = sums.get("samples", 0.0) + size
        if scores is not None and batch.answers is not None:
            sums["right"] = sums.get("right", 0.0) + float((scores.argmax(1) == batch.answers).sum())

    def _what(self) -> str:
        sums, epoch = self._position.sums, self._position.epoch + 1
        right = f", top-1 {100 * sums['right'] / sums['samples']:.1f} %" if "right" in sums else ""
        return f"steps, epoch {epoch}/{self._settings.epochs}: loss {sums['loss'] / sums['samples']:.4f}{right}"

    def _finish_epoch(self) -> None:
        position = self._position
        names = sorted(position.sums)
        device = self._accelerator.device
        totals = self._accelerator.reduce(torch.tensor([position.sums[n] for n in names], device=device), "sum")
        sums = dict(zip(names, totals.tolist(), strict=True))
        metrics = EpochMetrics(
            epoch=position.epoch + 1,
            step=(position.epoch + 1) * self._run.data.steps,
            lr=self._optimizer.param_groups[0]["lr"],
            loss=sums["loss"] / sums["samples"],
            top1=100 * sums["right"] / sums["samples"] if "right" in sums else None,
        )
        if self._run.validation is not None:
            judged = self._average.model if self._average else self._run.model
            metrics.validation_top1 = top1(judged, self._run.validation, self._accelerator)
        position.history.append(asdict(metrics))

    def _check_weights(self) -> None:
        """After a step whose loss was finite its gradient need not have been."""
        broken = not_finite(self._run.model) - self._never_finite
        if broken:
            raise self._diverged(f"{listed(broken)} held NaN or infinities after")

    def _diverged(self, seen: str, *, ahead: int = 0) -> StageError:
        """The error, `ahead` steps after the last one that was done."""
        at = replace(self._position, step=self._position.step + ahead)
        return diverged(seen, self._run.folder, at, self._run.data.steps, self._optimizer.param_groups[0]["lr"])

    def _stop_asked(self) -> bool:
        if self._share.count == 1:
            return self._interruption.asked
        flag = torch.tensor(float(self._interruption.asked), device=self._accelerator.device)
        return bool(self._accelerator.reduce(flag, "sum") > 0)

    def _save(self) -> None:
        self._accelerator.wait_for_everyone()
        if self._accelerator.is_main_process:
            state: dict[str, Any] = {
                "settings": self._kept,
                "position": asdict(self._position),
                "model": self._run.model.state_dict(),
                "optimizer": self._optimizer.state_dict(),
                "hooks": [hook.state() for hook in self._run.hooks],
                "random": random_state(),
            }
            if self._average:
                state["average"] = {"model": self._average.model.state_dict(), "updates": self._average.updates}
            if self._accelerator.scaler is not None:
                state["scaler"] = self._accelerator.scaler.state_dict()
            write_checkpoint(self._run.folder, state)
            write_metrics(self._run.folder, self._position.history)
        self._accelerator.wait_for_everyone()

    def _restore(self, state: Mapping[str, Any]) -> dict[str, Any] | None:
        """Puts everything back; the random state, where the run stopped inside an epoch."""
        self._position = Position(**state["position"])
        self._run.model.load_state_dict(state["model"])
        self._optimizer.load_state_dict(state["optimizer"])
        for hook, values in zip(self._run.hooks, state["hooks"], strict=True):
            hook.restore(values)
        if self._average:
            self._average.model.load_state_dict(state["average"]["model"])
            self._average.updates = state["average"]["updates"]
        if self._accelerator.scaler is not None:
            self._accelerator.scaler.load_state_dict(state["scaler"])
        return dict(state["random"]) if self._position.step else None


@seeded()
@torch.no_grad()
def top1(model: nn.Module, data: Batches, accelerator: Accelerator | None = None) -> float | None:
    """The share of right answers in percent, every process judging some of the batches; None without labels.

    A loader that draws numbers draws the same ones each time. Raises StageError for scores that are NaN.
    """
    accelerator = accelerator or make_accelerator()
    share = share_of(accelerator)
    was_training = model.training
    model.to(accelerator.device).eval()
    counts = torch.zeros(3, dtype=torch.float64)
    for number, batch in enumerate(data.epoch(0)):
        if number % share.count == share.index and batch.labels is not None:
            scores = scores_of(model(batch.inputs.to(accelerator.device))).cpu()
            right, broken = (scores.argmax(1) == batch.labels).sum(), scores.isnan().any(1).sum()
            counts += torch.tensor([float(right), float(len(batch.labels)), float(broken)])
    model.train(was_training)
    right_all, total, nan = accelerator.reduce(counts.to(torch.float32).to(accelerator.device), "sum").tolist()
    if nan:
        raise StageError(
            f"the network's scores are NaN for {nan:.0f} of the {total:.0f} samples that judge it; accepted: numbers "
            "(where it was trained: try a smaller lr, warmup_epochs, clip_norm)"
        )
    return 100 * right_all / total if total else None


def scores_of(outputs: Any) -> Tensor:
    """The class scores (n, classes) in what a model returns: the tensor, or the first of several.

    Raises InputError where there are none.
    """
    first = outputs
    while not isinstance(first, Tensor) and isinstance(first, Mapping | list | tuple) and len(first):
        first = next(iter(first.values())) if isinstance(first, Mapping) else first[0]
    if not isinstance(first, Tensor) or first.dim() != 2:
        seen = f"the shape {list(first.shape)}" if isinstance(first, Tensor) else f"a {type(first).__name__}"
        raise InputError(f"the model's output has {seen}; accepted for training with labels: [batch, classes]")
    return first


def _fastest_format(model: nn.Module) -> torch.memory_format:
    """Channels last, in which convolutions are trained up to 1.5 times as fast, unless the model has 3D ones."""
    flat = all(each.dim() != 5 for each in model.state_dict().values())
    return torch.channels_last if flat else torch.contiguous_format


@contextlib.contextmanager
def _deterministic() -> Iterator[None]:
    """Algorithms whose sums keep their order, where the device has them; the caller's random state comes back."""
    before, warn = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    state = random_state()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn)
        restore_random_state(state)
