"""Returns a smaller network, trained: what `[compress]` of a recipe asks for, step by step.

    for each step of pruning:  rank -> cut (or mask) -> train
    without pruning:           train (fine-tuning, or distillation with a teacher)

Every step keeps its cuts and its checkpoint in a folder of its own, so a run that was killed goes on where it was.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from edgeship.calibration.errors import InputError
from edgeship.pipeline.benchmark.measure import Schedule
from edgeship.pipeline.compress_sections import Compress, Distill, Prune
from edgeship.pipeline.compression.artifact import latency_of
from edgeship.pipeline.compression.batches import ArrayBatches
from edgeship.pipeline.compression.block_pairs import block_pairs
from edgeship.pipeline.compression.channels import Cut
from edgeship.pipeline.compression.checkpoint import seeded
from edgeship.pipeline.compression.classification import Classification
from edgeship.pipeline.compression.distillation import Distillation, Tapped, tap
from edgeship.pipeline.compression.fading import Fading
from edgeship.pipeline.compression.importance import channel_scores, gather, weight_scores
from edgeship.pipeline.compression.loop import Hook, Loss, Run, process_state, scores_of, top1, train
from edgeship.pipeline.compression.masks import GradualMasks, Masks, check_ratio, choose_masks, maskable, spared
from edgeship.pipeline.compression.optimizer import check_trainable
from edgeship.pipeline.compression.removal import Removal, Removed
from edgeship.pipeline.compression.saved import build_dense, read_removed, write_removed
from edgeship.pipeline.compression.soft import SoftPruning, zero_channels
from edgeship.pipeline.compression.structured import Goal, Ranking, bytes_goal, macs_goal, prunable, sizes_in
from edgeship.pipeline.compression.teacher import Teacher, TorchTeacher, first_scores, open_teacher
from edgeship.pipeline.compression.training_data import Tell, TrainingData, input_shape, open_training_data
from edgeship.pipeline.training_section import Training

if TYPE_CHECKING:
    from edgeship.pipeline.recipe import Recipe

LATENCY_RUNS = Schedule(60, 5, 3)
"""How each candidate is timed while something is removed until a latency is met."""
CONFIRMING_RUNS = Schedule(200, 20, 5)
"""How the candidate that was chosen is timed, and the network that came of it."""


@dataclass
class Compressed:
    """The dense network, the one that came of it, what went in each step, and what training measured."""

    dense: nn.Module
    model: nn.Module
    removed: list[Removed] = field(default_factory=list)
    masked: list[str] = field(default_factory=list)
    unmasked: dict[str, str] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    held_out: dict[str, float] = field(default_factory=dict)

    @property
    def cuts(self) -> list[Cut]:
        """The channels that were cut."""
        return [cut for each in self.removed for cut in each.cuts]

    @property
    def blocks(self) -> list[str]:
        """The blocks that were taken out."""
        return [block for each in self.removed for block in each.blocks]

    @property
    def left_dense(self) -> dict[str, str]:
        """The layers whose channels or weights had to stay, with the reason."""
        return {**{layer: why for each in self.removed for layer, why in each.left_dense.items()}, **self.unmasked}


class Compressor:
    """One run of `[compress]`; `folder` outlives a killed run."""

    def __init__(self, recipe: Recipe, section: Compress, folder: Path, tell: Tell) -> None:
        self._recipe, self._section, self._folder, self._tell = recipe, section, folder, tell
        self._example = torch.zeros(input_shape(recipe))
        with seeded(section.training.seed):  # weights that the factory draws
            dense = build_dense(recipe)
        self._classes = first_scores("the model", self._example.shape, lambda image: scores_of(dense(image))).shape[1]
        check_trainable(dense)
        self._result = Compressed(dense, copy.deepcopy(dense))
        self._teacher = self._open_teacher()
        if section.distill is not None and self._teacher is not None:  # what does not fit is told before ranking
            tap(self._result.model, self._teacher, self._with_layers(section.distill), self._example)
        with process_state().main_process_first():  # it decodes, the others read
            self._data = open_training_data(recipe, section.training, folder, tell)
            self._loss = self._make_loss()

    def run(self) -> Compressed:
        """Prunes and trains."""
        result, prune = self._result, self._section.prune
        if self._data.held_out is not None:
            self._judge("before", result.model)
        if prune is None:
            self._train("training", self._section.training, [])
        elif prune.kind == "soft":
            self._prune_softly(prune)
        elif prune.kind == "unstructured":
            self._prune_weights(prune)
        else:
            self._remove(prune)
        result.model.cpu().eval()
        if self._data.held_out is not None:
            self._judge("after", result.model)
        return result

    def _remove(self, prune: Prune) -> None:
        """Channels, blocks or both; what goes in a step is kept: a measured latency is not the same twice."""
        dense = copy.deepcopy(self._result.model)
        for step in range(1, prune.steps + 1):
            path = self._folder / f"step-{step}" / "removed.json"
            with process_state().main_process_first():
                if not path.exists():
                    choose = self._chosen_channels if prune.kind == "structured" else self._chosen_blocks
                    write_removed(path, [choose(dense, prune, step)])
            (removed,) = read_removed(path)
            settings, fade = self._step_training(prune, step), prune.fade_epochs
            if fade:
                fading = Fading(removed.leaving(self._result.model, self._example), fade * self._data.training.steps)
                with fading.on(self._result.model):
                    self._train(f"step-{step}-fade", settings, [fading], (0, fade))
            removed.take_from(self._result.model, self._example)
            self._result.removed.append(removed)
            self._train(f"step-{step}", settings, [], (fade, settings.epochs))

    def _chosen_blocks(self, dense: nn.Module, prune: Prune, step: int) -> Removed:
        """Blocks, with kind = "mixed" also channels."""
        precision = self._section.training.precision
        removal = Removal(self._result.model, self._example, prune, precision, self._tell, dense)
        loss = self._removal_loss(prune)
        if prune.ratio is None:
            last = self._goal(dense, prune, prune.steps) if step == 1 < prune.steps else None
            return removal.reach(self._goal(dense, prune, step), loss, self._data.training, last)
        whole = len(replace(removal, model=dense).blocks())
        if not round(prune.ratio * whole):
            raise InputError(
                f"prune.ratio = {prune.ratio:g} removes none of the network's {whole} residual blocks; "
                f"accepted: at least {0.51 / whole:.3f}"
            )
        gone = round(prune.ratio * whole * step / prune.steps) - len(self._result.blocks)
        return removal.count(gone, loss, self._data.training)

    def _chosen_channels(self, dense: nn.Module, prune: Prune, step: int) -> Removed:
        model = self._result.model
        found = prunable(model, self._example, prune)
        evidence = gather(model, prune.ranked_by, self._ranking_loss(), self._data.training, prune.batches)
        scores = {each.name: channel_scores(model, each, prune.ranked_by, evidence) for each in found.groups}
        ranking = Ranking(found.groups, scores, prune, sizes_in(dense, found.groups, model))
        if prune.ratio is None:
            if step == 1 < prune.steps:  # what the last step could not do is told before the first trains
                ranking.check_reachable(model, self._example, self._goal(dense, prune, prune.steps))
            goal = self._goal(dense, prune, step)
            return Removed(cuts=tuple(ranking.reach(model, self._example, goal)), left_dense=found.kept)
        if step == 1:
            ranking.check_share(prune.ratio)
        cuts = ranking.cuts_to(prune.ratio * step / prune.steps)
        return Removed(cuts=tuple(cuts), left_dense=found.kept)

    def _goal(self, dense: nn.Module, prune: Prune, step: int) -> Goal:
        """The goal of a step: a part of the way from the dense network to the recipe's goal, which the last one is."""
        part = step / prune.steps
        if prune.macs is not None:
            return macs_goal(dense, self._example, 1 - part * (1 - prune.macs))
        if prune.max_bytes is not None:
            whole = 4 * sum(each.numel() for each in dense.parameters())
            return bytes_goal(whole - part * (whole - prune.max_bytes))
        assert prune.max_latency_ms is not None
        limit, confirm = prune.max_latency_ms, None
        if step < prune.steps:
            whole_ms = self._latency_ms(dense, prune, LATENCY_RUNS)
            limit = whole_ms - part * (whole_ms - limit)
        else:
            confirm = partial(self._latency_ms, prune=prune, schedule=CONFIRMING_RUNS)
        meter = partial(self._latency_ms, prune=prune, schedule=LATENCY_RUNS)
        return Goal("max_latency_ms", limit, meter, exact=False, confirm=confirm)

    def _latency_ms(self, model: nn.Module, prune: Prune, schedule: Schedule) -> float:
        return latency_of(self._recipe, model, prune.latency_target, schedule)

    def _prune_weights(self, prune: Prune) -> None:
        model = self._result.model
        names, self._result.unmasked = maskable(model, prune), spared(model, prune)
        assert prune.ratio is not None
        check_ratio(model, names, prune.ratio, prune.scope)
        if prune.fade_epochs:
            gradual = GradualMasks(names, prune, prune.fade_epochs * self._data.training.steps)
            self._train("training", self._section.training, [gradual])
            gradual.apply(model)
        for step in range(1, prune.steps + 1) if not prune.fade_epochs else ():
            evidence = gather(model, prune.ranked_by, self._ranking_loss(), self._data.training, prune.batches)
            scores = weight_scores(model, names, prune.ranked_by, evidence)
            hook = Masks(choose_masks(scores, prune.ratio * step / prune.steps, prune))
            hook.apply(model)
            self._train(f"step-{step}", self._step_training(prune, step), [hook])
            hook.apply(model)
        self._result.masked = names

    def _prune_softly(self, prune: Prune) -> None:
        model = self._result.model
        found = prunable(model, self._example, prune)
        hook = SoftPruning(found.groups, prune)
        hook.check(model)
        self._train("training", self._section.training, [hook])
        cuts = hook.cuts(model)
        zero_channels(model, found.groups, cuts)
        removed = Removed(cuts=tuple(cuts), left_dense=found.kept)
        removed.take_from(model, self._example)
        self._result.removed.append(removed)

    def _step_training(self, prune: Prune, step: int) -> Training:
        whole = self._section.training
        if step == prune.steps:
            return whole
        return whole.model_copy(update={"epochs": prune.step_epochs, "warmup_epochs": 0.0})

    def _train(
        self, name: str, settings: Training, hooks: Sequence[Hook], epochs: tuple[int, int] | None = None
    ) -> None:
        model, loss = self._result.model, self._loss
        distill = self._section.distill
        if distill is not None and self._teacher is not None and distill.features != "none":
            distill = self._with_layers(distill)
            model = tap(model, self._teacher, distill, self._example, settings.seed)
            loss = Distillation(distill, self._teacher, self._section.training.label_smoothing)
        identity = {"data": self._data.digest}
        hooks = [_OnStudent(hook) for hook in hooks]
        run = Run(model, loss, self._data.training, settings, self._folder / name, hooks=hooks, identity=identity)
        run.epochs = epochs
        run.validation, run.progress = (
            self._data.held_out,
            lambda done, all_, what: self._tell(done, all_, f"{name} {what}"),
        )
        self._result.history += [{"part": name, **asdict(each)} for each in train(run)]

    def _with_layers(self, distill: Distill) -> Distill:
        """The same, with the layers that are matched: those that the recipe names, or the ends of the blocks."""
        if distill.features == "none" or distill.layers or not isinstance(self._teacher, TorchTeacher):
            return distill
        pairs = block_pairs(self._result.model, self._teacher.module, self._example)
        return distill.model_copy(update={"layers": pairs})

    def _judge(self, when: str, model: nn.Module) -> None:
        assert self._data.held_out is not None
        found = top1(model, self._data.held_out)
        if found is not None:
            self._result.held_out[when] = found
        model.cpu()

    def _open_teacher(self) -> Teacher | None:
        distill = self._section.distill
        if distill is None:
            return None
        teacher = open_teacher(self._recipe, distill.teacher, tuple(self._example.shape))
        theirs = teacher.scores(self._example).shape[1]
        if theirs != self._classes:
            raise InputError(
                f"{self._recipe.path.name}: the teacher {distill.teacher.source} has {theirs} classes, the model has "
                f"{self._classes}; accepted: the same classes"
            )
        return teacher

    def _make_loss(self) -> Loss:
        distill, settings = self._section.distill, self._section.training
        if distill is None or self._teacher is None:
            return Classification(settings.label_smoothing)
        loss = Distillation(distill, self._teacher, settings.label_smoothing)
        data = self._data.training
        wanted = distill.cache == "always" or (distill.cache == "auto" and not settings.varies)
        if distill.cache == "always" and not isinstance(data, ArrayBatches):
            raise InputError('distill.cache = "always" needs data.training: samples of data.loaders have no numbers')
        if wanted and isinstance(data, ArrayBatches) and distill.features == "none":
            loss.keep_outputs(data, self._tell)
        return loss

    def _removal_loss(self, prune: Prune) -> Loss:
        """The loss that blocks are ranked by, which judges the same batches many times: the labels' where they count.

        A teacher takes longer. It judges where there are no labels, or only such as are no classes of the network and
        not learned from (distill.weight = 1).
        """
        with seeded():
            labels = [each.labels for each in islice(self._data.training.epoch(0), prune.batches)]
        distill = self._section.distill
        taught_alone = distill is not None and distill.weight == 1
        known = all(each is not None for each in labels)
        fit = all(each is not None and each.min() >= 0 and each.max() < self._classes for each in labels)
        if fit or (known and not taught_alone):
            return Classification()
        loss = self._ranking_loss()
        return loss.remembering() if isinstance(loss, Distillation) else loss

    def _ranking_loss(self) -> Loss:
        """The loss that weights, channels and blocks are ranked by: what is trained, but for features in between."""
        distill = self._section.distill
        if distill is None or self._teacher is None or distill.features == "none":
            return self._loss
        outputs = distill.model_copy(update={"features": "none", "layers": ()})
        return Distillation(outputs, self._teacher, self._section.training.label_smoothing)


class _OnStudent(Hook):
    """A hook that sees the student, also where features are tapped."""

    def __init__(self, hook: Hook) -> None:
        self._hook = hook

    def epoch_begins(self, model: nn.Module, epoch: int) -> None:
        """Passed on."""
        self._hook.epoch_begins(_student(model), epoch)

    def step_done(self, model: nn.Module) -> None:
        """Passed on."""
        self._hook.step_done(_student(model))

    def epoch_ends(self, model: nn.Module, epoch: int) -> None:
        """Passed on."""
        self._hook.epoch_ends(_student(model), epoch)

    def state(self) -> dict[str, Tensor]:
        """The hook's own."""
        return self._hook.state()

    def restore(self, state: Any) -> None:
        """Passed on."""
        self._hook.restore(state)


def _student(model: nn.Module) -> nn.Module:
    return model.student if isinstance(model, Tapped) else model


def compress(recipe: Recipe, section: Compress, folder: Path, tell: Tell) -> Compressed:
    """The network that `section` makes of the recipe's; `folder` keeps what a killed run goes on from."""
    return Compressor(recipe, section, folder, tell).run()


__all__ = ["Compressed", "TrainingData", "compress"]
