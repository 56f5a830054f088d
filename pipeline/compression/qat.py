"""Returns quantized models that were trained as such: quantization-aware training on the graph that ships.

The quantized graph runs in torch with fake quantization at exactly the plan's points (`calibration/learned`), its
weights and biases are trained, and what was learnt goes back into the same plan: conversion, parity and gates do not
know of it.

Without labels the quantized graph learns from the float one, whose outputs t it shall have (s are its own):

    loss = sum over outputs of  |s - t|^2 / |t - mean(t)|^2

one over the signal-to-noise ratio (Kim et al., 2021, "Comparing Kullback-Leibler Divergence and Mean Squared Error Loss
in Knowledge Distillation": logits are better matched than softened). On classes it learns from labels, or from the
teacher of `[compress.distill]` as the float model did before.

A fifth of the samples takes no part. It judges the plan before and after (`held_out.py`), which says which one is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from edgeship.calibration.errors import InputError
from edgeship.calibration.graph.operators import value_name
from edgeship.calibration.learned.fake_quant import FakeQuantGraph
from edgeship.calibration.learned.graph import TorchGraph
from edgeship.pipeline.compression.agreement import Agreement, agreement
from edgeship.pipeline.compression.batches import ArrayBatches, Augmentation, Batch, Batches
from edgeship.pipeline.compression.classification import Classification
from edgeship.pipeline.compression.held_out import PARTS, Verdict, real_outputs, split, standing
from edgeship.pipeline.compression.loop import Loss, Run, process_state, scores_of, train
from edgeship.pipeline.compression.metrics import EpochMetrics

if TYPE_CHECKING:
    from pathlib import Path

    import onnx_ir as ir

    from edgeship.calibration.quantize import Calibration
    from edgeship.calibration.samples.data import Samples
    from edgeship.calibration.types import Array, QuantPlan, WeightScheme
    from edgeship.pipeline.quantize_section import Qat
    from edgeship.pipeline.quantizing.calibrated import Quantized
    from edgeship.pipeline.recipe import Recipe
    from edgeship.pipeline.stage import Progress


@dataclass(frozen=True)
class Trained:
    """The quantized models after training, how it went by weight scheme, and whether its result was kept."""

    result: Quantized
    history: Mapping[WeightScheme, list[EpochMetrics]]
    verdicts: Mapping[WeightScheme, Verdict]
    agreements: Mapping[WeightScheme, Agreement | None]

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {scheme: self._facts(scheme) for scheme in self.history}

    def _facts(self, scheme: WeightScheme) -> dict[str, Any]:
        found = self.agreements[scheme]
        return {
            **self.verdicts[scheme].to_json(),
            "agreement": None if found is None else found.to_json(),
            "epochs": [
                {"epoch": each.epoch, "step": each.step, "loss": each.loss, "top1": each.top1}
                for each in self.history[scheme]
            ],
        }


@dataclass(frozen=True)
class Data:
    """What is trained on, what judges the result and has no part in it, and what identifies the samples."""

    training: Batches
    held_out: Batches
    digest: str


class Student(nn.Module):
    """The fake-quantized graph as the training loop wants it: one tensor in, outputs by name out."""

    def __init__(self, graph: FakeQuantGraph) -> None:
        super().__init__()
        self.graph = graph

    def forward(self, inputs: Tensor) -> dict[str, Tensor]:
        """The outputs by name."""
        outputs: dict[str, Tensor] = self.graph({self.graph.inputs[0]: inputs})
        return outputs


class Likeness:
    """How far the student's outputs are from the float model's. Raises InputError where all are integers."""

    def __init__(self, teacher: TorchGraph) -> None:
        self._teacher = teacher

    def __call__(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """The noise-to-signal ratio, and the class scores where there are labels to compare them with."""
        outputs: dict[str, Tensor] = model(batch.inputs)
        with torch.no_grad():
            wanted = self._teacher.to(batch.inputs.device)({self._teacher.inputs[0]: batch.inputs})
        loss = torch.stack([_noise(outputs[name], wanted[name]) for name in real_outputs(wanted)]).sum()
        return loss, None if batch.labels is None else scores_of(outputs)


def _noise(values: Tensor, wanted: Tensor) -> Tensor:
    signal = (wanted - wanted.mean(0, keepdim=True)).square().sum() if len(wanted) > 1 else wanted.square().sum()
    return (values - wanted).square().sum() / signal.clamp(min=1e-12)


def train_quantized(  # noqa: PLR0913, PLR0917 - what, how, on what, from where, and who watches
    recipe: Recipe, settings: Qat, samples: Samples, result: Quantized, kept: Path, progress: Progress
) -> Trained:
    """The models of `result` trained under the recipe's `[quantize.qat]`, each weight scheme by itself.

    A run that was killed goes on from what it left in `kept`. Raises InputError for a model that cannot be trained or
    data that does not fit, StageError naming the step whose loss is not finite, with the last checkpoint kept.
    """
    model = result.calibration.model
    inputs = [value_name(value) for value in model.graph.inputs if not value.is_initializer()]
    if len(inputs) != 1:
        raise InputError(f"quantize.qat trains models with one input; this one has {', '.join(inputs)}")
    data = _data(recipe, settings, samples, kept, progress)
    loss = _loss(recipe, settings, model)
    schemes = [scheme for scheme in result.plans if scheme in recipe.shipped_schemes()]
    trained = {
        scheme: _train_plan(settings, loss, result, scheme, data, kept / f"qat-{scheme}", progress)
        for scheme in schemes
    }
    # A scheme that no target ships is there to look at: it shows what was trained.
    shown = {scheme: scheme if scheme in trained else schemes[0] for scheme in result.plans}
    return Trained(
        replace(
            result,
            plans={scheme: trained[other].plan for scheme, other in shown.items()},
            models={scheme: result.calibration.quantized(trained[o].plan, o) for scheme, o in shown.items()},
        ),
        {scheme: each.history for scheme, each in trained.items()},
        {scheme: each.verdict for scheme, each in trained.items()},
        {scheme: each.agreement for scheme, each in trained.items()},
    )


@dataclass(frozen=True)
class _TrainedPlan:
    """The plan that is kept, how training went, how both plans stand, and that what was trained is what ships."""

    plan: QuantPlan
    history: list[EpochMetrics]
    verdict: Verdict
    agreement: Agreement | None


@dataclass(frozen=True)
class _Said:
    """Progress that names the weights that are trained: there may be two kinds, one after the other."""

    progress: Progress
    scheme: WeightScheme

    def training(self, done: int, total: int, what: str) -> None:
        """Passes a step on."""
        self.progress(done, total, f"{what} ({self.scheme} weights)")

    def judging(self, when: str) -> Callable[[int, int], None]:
        """What hears how the samples held out are gone through."""
        return lambda done, total: self.progress(done, total, f"batches held out, {when} training")


def _train_plan(  # noqa: PLR0913, PLR0917 - how, what, on what, from where, and who watches
    settings: Qat, loss: Loss, result: Quantized, scheme: WeightScheme, data: Data, folder: Path, progress: Progress
) -> _TrainedPlan:
    model, start = result.calibration.model, result.plans[scheme]
    graph = FakeQuantGraph(
        model, start, scheme, learn_scales=settings.learn_scales, fixed=fixed_scales(result.calibration), start="plan"
    )
    student, teacher = Student(graph), TorchGraph(model)
    judged_loss = None if settings.objective == "distill" else loss
    device = process_state().device
    said = _Said(progress, scheme)
    before, count = standing(student, teacher, data.held_out, device, judged_loss, said.judging("before"))
    identity = {"plan": start.digest(), "data": data.digest, "held out": str(count)}
    history = train(Run(student, loss, data.training, settings, folder, progress=said.training, identity=identity))
    plan = graph.plan()
    after, _ = standing(student, teacher, data.held_out, device, judged_loss, said.judging("after"))
    verdict = Verdict(count, "sqnr_db" if judged_loss is None else "loss", before, after)
    found = agreement(graph, result.calibration.quantized(plan, scheme), data.held_out)
    return _TrainedPlan(plan if verdict.improved else start, history, verdict, found)


def _loss(recipe: Recipe, settings: Qat, model: ir.Model) -> Loss:
    if settings.objective == "labels":
        return Classification(settings.label_smoothing, 'quantize.qat.objective = "distill"')
    if settings.objective == "distill":
        return Likeness(TorchGraph(model))
    if recipe.qat_distill is None:
        raise InputError('quantize.qat.objective = "teacher" is for recipes with [quantize.qat.distill]')
    where, distill = recipe.qat_distill
    from edgeship.pipeline.compression.distillation import Distillation
    from edgeship.pipeline.compression.teacher import open_teacher

    scores = distill.model_copy(update={"features": "none", "layers": ()})  # a graph has no modules to be tapped
    teacher = open_teacher(recipe, distill.teacher, _shape_of(model), where)
    return Distillation(scores, teacher, settings.label_smoothing)


def _shape_of(model: ir.Model) -> tuple[int, ...]:
    """The shape of one sample; a teacher is tried on it."""
    (value,) = (value for value in model.graph.inputs if not value.is_initializer())
    sides = () if value.shape is None else tuple(value.shape)[1:]
    if not sides or not all(isinstance(side, int) for side in sides):
        raise InputError(
            f"quantize.qat: the model's input {value.name} has the shape {value.shape}; accepted for a teacher: fixed "
            "sizes behind the batch (input.shape)"
        )
    return (1, *(int(str(side)) for side in sides))


def fixed_scales(calibration: Calibration) -> set[str]:
    """The activations whose scale is not the data's: inputs, kernels' own outputs, and those that the recipe gives."""
    from edgeship.calibration.planning.overrides import given_ranges

    graph, rules = calibration.model.graph, calibration.rules
    fixed = {value_name(value) for value in graph.inputs} | given_ranges(
        calibration.model, rules, calibration.overrides
    )
    for node in graph:
        rule = rules.operators.get(node.op_type)
        if rule is not None and rule.fixed_output:
            fixed.update(value_name(value) for value in node.outputs)
    return fixed


def _data(recipe: Recipe, settings: Qat, samples: Samples, kept: Path, progress: Progress) -> Data:
    """What is trained on and what judges: parts of the same samples; with loaders, `held_out` or calibration's."""
    if settings.data == "training":
        from edgeship.pipeline.compression.training_data import open_training_data

        data = open_training_data(recipe, settings, kept, progress, evaluation=False)
        if isinstance(data.training, ArrayBatches):
            return _parts(data.training, data.digest, "the training data")
        return Data(data.training, data.held_out or _judges(recipe, settings, samples, progress), data.digest)
    every = _calibration(recipe, settings, samples, progress)
    return _parts(every, recipe.data_digest("calibration") or "", "the calibration data")


def _parts(every: ArrayBatches, digest: str, what: str) -> Data:
    teach, judge = split(len(every.values), what)
    size = max(1, min(every.batch_size, len(judge) // PARTS))
    return Data(replace(every, members=teach), replace(every, members=judge, shuffle=False, batch_size=size), digest)


def _judges(recipe: Recipe, settings: Qat, samples: Samples, progress: Progress) -> Batches:
    if settings.objective != "distill" and samples.labels is None:
        raise InputError(
            f"quantize.qat trains on classes, and nothing with labels is held out: {recipe.data.loaders} returns no "
            "held_out and the calibration samples have none; accepted: one of the two"
        )
    return replace(_calibration(recipe, settings, samples, progress), shuffle=False)


def _calibration(recipe: Recipe, settings: Qat, samples: Samples, progress: Progress) -> ArrayBatches:
    values: list[Array] = []
    for done, sample in enumerate(samples, 1):
        values.extend(sample.feeds.values())
        progress(done, len(samples), "samples read")
    channels = values[0].shape[1] if values[0].ndim == 4 else 1
    mean, std = (np.broadcast_to(each, channels) for each in (recipe.input.mean, recipe.input.std))
    varied = Augmentation(settings.flip, settings.shift, tuple(float(value) for value in -mean / std))
    return ArrayBatches(
        np.concatenate(values), samples.labels, settings.batch_size, augmentation=varied, seed=settings.seed
    )
