"""Returns the loss of a student that learns from a teacher.

    soft targets   T^2 * KL(softmax(t / T) || softmax(s / T))                      (Hinton, Vinyals & Dean 2015)
    attention      mean over pairs of || a(s)/|a(s)| - a(t)/|a(t)| ||^2, a = mean over channels of f^2
                                                                                    (Zagoruyko & Komodakis 2017)
    hint           mean over pairs of mean((W f_s - f_t)^2), W: a trained 1x1 convolution (Romero et al. 2015)

    loss = (1 - weight) * labels + weight * soft targets + feature_weight * features

s, t: scores; f: features (n, channels, height, width), those of the larger map averaged down to the smaller.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - the field's name for it
from torch import Tensor, nn

from edgeship.calibration.errors import InputError
from edgeship.pipeline.compress_sections import Distill
from edgeship.pipeline.compression.batches import ArrayBatches, Batch, generator_for
from edgeship.pipeline.compression.classification import cross_entropy
from edgeship.pipeline.compression.loop import scores_of
from edgeship.pipeline.compression.teacher import Teacher, TorchTeacher

Tell = Callable[[int, int, str], None]


class Tapped(nn.Module):
    """A student whose forward pass returns (scores, features of `layers`), through a 1x1 convolution each for hints."""

    def __init__(self, student: nn.Module, layers: Sequence[str], adapters: Sequence[nn.Module] = ()) -> None:
        super().__init__()
        self.student = student
        self.adapters = nn.ModuleList(adapters)
        self._layers = tuple(layers)

    def forward(self, inputs: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The student's scores and features."""
        outputs, features = tapped(self.student, self._layers, inputs)
        if len(self.adapters):
            features = [adapt(each) for adapt, each in zip(self.adapters, features, strict=True)]
        return scores_of(outputs), features


def tapped(model: nn.Module, layers: Sequence[str], inputs: Tensor) -> tuple[Any, list[Tensor]]:
    """What the model returns, and the outputs of the named modules on the way. Raises InputError for one not called."""
    found: dict[str, Tensor] = {}
    modules = dict(model.named_modules())
    handles = []
    for name in layers:

        def keep(_module: nn.Module, _inputs: Any, output: Tensor, name: str = name) -> None:
            found[name] = output

        handles.append(modules[name].register_forward_hook(keep))
    try:
        outputs = model(inputs)
    finally:
        for handle in handles:
            handle.remove()
    for name in layers:
        if name not in found:
            raise InputError(
                f"distill.layers: the network never calls its module {name!r}; accepted: modules that are called on "
                "the way to the output (a program from a .pt2 file calls none: give the teacher's factory)"
            )
    return outputs, [found[name] for name in layers]


class Distillation:
    """The loss against labels and a teacher; `model` is the student, or a `Tapped` one where features are matched."""

    def __init__(self, settings: Distill, teacher: Teacher, label_smoothing: float = 0.0) -> None:
        self._settings, self._teacher, self._label_smoothing = settings, teacher, label_smoothing
        self._kept: np.ndarray[Any, Any] | None = None
        self._remembered: dict[int, tuple[Tensor, Tensor]] | None = None

    def remembering(self) -> Distillation:
        """The same, for a few batches that come again and again: the teacher is asked about each once."""
        other = copy.copy(self)
        other._remembered = {}
        return other

    def keep_outputs(self, data: ArrayBatches, tell: Tell) -> None:
        """Asks the teacher once for every sample as it is, without variations, and answers from memory from then on."""
        plain = ArrayBatches(data.values, data.labels, data.batch_size, data.mean, data.std, shuffle=False)
        rows = []
        for place, batch in enumerate(plain.epoch(0)):
            rows.append(self._asked(batch.inputs).cpu().numpy())
            tell(place + 1, plain.steps, "batches seen by the teacher")
        self._kept = np.concatenate(rows)

    def __call__(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """The mean loss of the batch, and the student's scores."""
        settings = self._settings
        student_features: list[Tensor] = []
        teacher_features: list[Tensor] = []
        if settings.features == "none":
            scores = scores_of(model(batch.inputs))
            teacher_scores = self._answers(batch)
        else:
            scores, student_features = model(batch.inputs)
            teacher_scores, teacher_features = self._features(batch)
        if teacher_scores.shape != scores.shape:
            raise InputError(
                f"the teacher has {teacher_scores.shape[1]} classes, the student {scores.shape[1]}; accepted: the same"
            )
        loss = settings.weight * soft_targets(scores.float(), teacher_scores.float(), settings.temperature)
        if settings.weight < 1:
            loss = loss + (1 - settings.weight) * cross_entropy(scores, batch, self._label_smoothing)
        if student_features:
            match = attention if settings.features == "attention" else hint
            pairs = zip(student_features, teacher_features, strict=True)
            total = torch.stack([match(*same_size(one.float(), other.float())) for one, other in pairs]).mean()
            loss = loss + settings.feature_weight * total
        return loss, scores

    def _answers(self, batch: Batch) -> Tensor:
        if self._remembered is None:
            return self._looked_up(batch)
        inputs = batch.inputs
        if id(inputs) not in self._remembered:
            self._remembered[id(inputs)] = inputs, self._looked_up(batch)  # held, so that no other gets its number
        return self._remembered[id(inputs)][1]

    def _looked_up(self, batch: Batch) -> Tensor:
        if self._kept is None or batch.indices is None:
            return self._asked(batch.inputs)
        return torch.from_numpy(self._kept[batch.indices.cpu().numpy()]).to(batch.inputs.device)

    def _asked(self, inputs: Tensor) -> Tensor:
        return self._with_mirrored(self._teacher.scores(inputs), inputs)

    def _with_mirrored(self, scores: Tensor, inputs: Tensor) -> Tensor:
        """The mean of the teacher's scores and those of the mirror images, where that is wanted."""
        if not self._settings.mirror:
            return scores
        return (scores.float() + self._teacher.scores(inputs.flip(3)).float()) / 2

    @torch.no_grad()
    def _features(self, batch: Batch) -> tuple[Tensor, list[Tensor]]:
        assert isinstance(self._teacher, TorchTeacher)
        self._teacher.module.to(batch.inputs.device)
        outputs, features = tapped(self._teacher.module, [pair[1] for pair in self._settings.layers], batch.inputs)
        return self._with_mirrored(scores_of(outputs), batch.inputs), features


def soft_targets(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T^2 * KL(teacher || student) at temperature T, mean over the batch."""
    log_student = F.log_softmax(student / temperature, 1)
    log_teacher = F.log_softmax(teacher / temperature, 1)
    return temperature**2 * F.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True)


def attention(student: Tensor, teacher: Tensor) -> Tensor:
    """How far apart the normalized maps of the channels' energy are."""
    maps = [F.normalize(each.square().mean(1).flatten(1)) for each in (student, teacher)]
    return (maps[0] - maps[1]).square().sum(1).mean()


def hint(student: Tensor, teacher: Tensor) -> Tensor:
    """The mean square of the difference."""
    return F.mse_loss(student, teacher)


def same_size(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Both feature maps at the smaller height and width."""
    if one.shape[2:] == other.shape[2:]:
        return one, other
    size = (min(one.shape[2], other.shape[2]), min(one.shape[3], other.shape[3]))
    return F.adaptive_avg_pool2d(one, size), F.adaptive_avg_pool2d(other, size)


def tap(student: nn.Module, teacher: Teacher, settings: Distill, example: Tensor, seed: int = 0) -> nn.Module:
    """The student itself, or one with taps where features are matched.

    Raises InputError for a layer that a model does not have or call, features that are no maps, or a teacher without
    layers.
    """
    if settings.features == "none":
        return student
    if not isinstance(teacher, TorchTeacher):
        raise InputError(
            f'distill.features = "{settings.features}" looks inside the teacher; accepted: a PyTorch teacher, '
            'or features = "none"'
        )
    teacher.module.to(example.device)
    adapters: list[nn.Conv2d] = []
    models = {"student": student.eval(), "teacher": teacher.module}
    for pair in settings.layers:
        shapes = []
        for (who, model), name in zip(models.items(), pair, strict=True):
            if name not in dict(model.named_modules()):
                raise InputError(f"distill.layers: the {who} has no module {name!r}")
            with torch.no_grad():
                feature = tapped(model, [name], example)[1][0]
            if not isinstance(feature, Tensor) or feature.dim() != 4:
                raise InputError(f"distill.layers: {name!r} of the {who} gives no feature maps [n, channels, h, w]")
            shapes.append(feature.shape)
        adapters.append(_adapter(shapes[0][1], shapes[1][1], generator_for(seed, len(adapters))))
    return Tapped(student, [pair[0] for pair in settings.layers], adapters if settings.features == "hint" else ())


def _adapter(source: int, goal: int, generator: torch.Generator) -> nn.Conv2d:
    convolution = nn.Conv2d(source, goal, 1, bias=False)
    if source == goal:  # a student that was cut out of its teacher has the teacher's maps already, or nearly
        nn.init.dirac_(convolution.weight)
        return convolution
    nn.init.kaiming_uniform_(convolution.weight, a=math.sqrt(5), generator=generator)  # Conv2d's own, but seeded
    return convolution
