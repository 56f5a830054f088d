"""Returns what speaks against a float model and labelled samples belonging together, before anything is quantized.

A model that is fed otherwise than in training, or whose classes have another order, is wrong in every artifact alike:
no comparison with fp32 shows it. Three questions, asked of few samples:

- Is it right more often when images become inputs in another usual way? The difference of the two on the same samples
  must be certain (its 95 % interval above zero) and of ten points.
- Are the samples of one class mostly taken for another one, and those of another for a third?
- Is it right no more often than by guessing?
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from edgeship.calibration.types import Finding

if TYPE_CHECKING:
    import onnx_ir as ir

    from edgeship.calibration.samples.data import Samples
    from edgeship.calibration.types import Session
    from edgeship.pipeline.recipe_sections import Input

ASKED = (16, 64)
"""The fewest labelled samples that tell a model from a guess, and the most that it is asked about."""
CHANCE = 0.01
"""A score that a guess reaches more often than this is no better than guessing."""
GAIN = 0.1
"""By how much of the samples another preprocessing must be right more often."""
MOVED = (4, 0.75)
"""Of so many samples of a class or more, the share that is taken for one other class."""
WHERE = "model and data"
_PHOTOGRAPHS = ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375))
"""Mean and std of ImageNet's pixels, which most networks for photographs are trained with."""
_CAFFE = ((103.939, 116.779, 123.68), (1.0,))
"""The means alone, blue first: networks that came from Caffe."""


def doubts(
    model: ir.Model, classes: int, samples: Samples, otherwise: Iterable[tuple[str, Samples]] = ()
) -> list[Finding]:
    """The notes on the float `model`, which tells `classes` apart, and the first labelled `samples`.

    `otherwise`: the same samples made inputs in other ways, each with what the recipe would say.
    """
    from edgeship.calibration.graph.onnx_file import to_bytes
    from edgeship.targets.onnxruntime import open_float

    if classes < 2 or not samples.has_labels:
        return []
    notes = folder_notes(samples, classes)
    few = samples.take(min(len(samples), ASKED[1]))
    if len(few) < ASKED[0]:
        return notes
    session = open_float(to_bytes(model))
    guesses = list(_decisions(session, few))
    labels = few.labels or ()
    if -1 in guesses:
        return notes
    right = {name: guess == label for name, guess, label in zip(few.names, guesses, labels, strict=True)}
    causes = [*_better(session, right, otherwise), *_moved(few.names, labels, guesses)]
    if causes:  # the one that explains more of the samples
        return [*notes, max(causes, key=lambda cause: cause[0])[1]]
    return [*notes, *_guessing(sum(right.values()), len(right), classes)]


def other_inputs(given: Input, *, pixels: bool = False) -> Iterator[tuple[str, Input]]:
    """Other usual ways to make an image an input, each with the lines of the recipe that say it.

    `pixels`: the model scales pixels itself, and takes neither mean nor std.
    """
    if given.color != "gray":
        other = "bgr" if given.color == "rgb" else "rgb"
        yield f'color = "{other}"', given.model_copy(update={"color": other})
    if pixels:
        return
    usual: list[tuple[str, tuple[float, ...], tuple[float, ...]]] = [
        (given.color, (0.0,), (1.0,)),
        (given.color, (0.0,), (255.0,)),
        (given.color, (127.5,), (127.5,)),
    ]
    if given.color != "gray":
        usual += [("rgb", *_PHOTOGRAPHS), ("bgr", *_CAFFE)]
    for color, mean, std in usual:
        if (
            color == given.color
            and _near(mean, given.mean, 4.0)
            and _near(std, given.std, 4.0 if max(std) > 1 else 0.5)
        ):
            continue
        said = f'color = "{color}", ' if color != given.color else ""
        text = f"{said}mean = {list(mean)}, std = {list(std)}"
        yield text, given.model_copy(update={"color": color, "mean": mean, "std": std})


def _near(one: Sequence[float], other: Sequence[float], within: float) -> bool:
    """Whether two settings of pixels are the same to `within`, one value standing for all channels."""
    width = max(len(one), len(other))
    return bool(np.allclose(np.resize(one, width), np.resize(other, width), rtol=0, atol=within))


def _decisions(session: Session, samples: Samples) -> Iterator[int]:
    """The class that the model decides on for each sample; -1 where it has no scores."""
    from edgeship.pipeline.scoring import class_scores

    for sample in samples:
        scores = class_scores(session.run(sample.feeds))
        yield -1 if scores is None else int(scores.argmax())


def _better(
    session: Session, right: Mapping[str, bool], otherwise: Iterable[tuple[str, Samples]]
) -> list[tuple[int, Finding]]:
    """The preprocessing with which the model is surely right more often, if there is one, after how often it is."""
    best: tuple[int, str] | None = None
    for text, samples in otherwise if not all(right.values()) else ():
        hits = _surely_better(session, right, samples)
        if hits is not None and (best is None or hits > best[0]):
            best = (hits, text)
    if best is None:
        return []
    rule = f"[input] is not as in training: the float model is right more often with {best[1]}"
    seen = f"{best[0]} of {len(right)} right instead of {sum(right.values())}"
    return [(best[0], Finding(WHERE, rule, seen, best[1], "note"))]


def _surely_better(session: Session, right: Mapping[str, bool], samples: Samples) -> int | None:
    """How often the model is right on these inputs; None where that is not surely more often than `right` says.

    Where it is not ahead on the fewest samples, it is not asked about the others.
    """
    from edgeship.pipeline.scoring import paired_interval

    won = lost = hits = 0
    for count in ASKED:
        few = samples.take(min(count, len(samples)))
        then = [guess == label for guess, label in zip(_decisions(session, few), few.labels or (), strict=True)]
        pairs = list(zip((right[name] for name in few.names), then, strict=True))
        won = sum(now and not was for was, now in pairs)
        lost = sum(was and not now for was, now in pairs)
        hits = sum(then)
        if won <= lost:
            return None
    certain = paired_interval(won, lost, len(right))[0] > 0
    return hits if certain and won - lost >= GAIN * len(right) else None


def _moved(names: Sequence[str], labels: Sequence[int], guesses: Sequence[int]) -> list[tuple[int, Finding]]:
    """Classes whose samples are mostly taken for one other class each, after how many samples that explains."""
    fewest, share = MOVED
    taken: dict[int, Counter[int]] = {}
    folder: dict[int, str] = {}
    for name, label, guess in zip(names, labels, guesses, strict=True):
        taken.setdefault(label, Counter())[guess] += 1
        folder[label] = f"{name.split('/')[0]} (class {label})" if "/" in name else f"class {label}"
    moved: dict[int, tuple[int, str]] = {}
    for label, counts in sorted(taken.items()):
        guess, count = counts.most_common(1)[0]
        if guess != label and counts.total() >= fewest and count >= share * counts.total():
            moved[label] = (guess, f"{folder[label]} for class {guess}: {count} of {counts.total()}")
    if len(moved) < 2 or len({guess for guess, _ in moved.values()}) < len(moved):
        return []
    rule = (
        "the classes' order is not the model's (data.classes says it): samples of some are taken for another one each"
    )
    seen = ", ".join([text for _, text in moved.values()][:3])
    explained = sum(
        guess == (moved[label][0] if label in moved else label) for label, guess in zip(labels, guesses, strict=True)
    )
    return [(explained, Finding(WHERE, rule, seen, "data.classes, or labels in the model's order", "note"))]


def folder_notes(samples: Samples, classes: int) -> list[Finding]:
    """Class folders, numbered by their sorted names, of another number than the model's classes."""
    folders = sorted({name.split("/")[0] for name in samples.names if name.count("/") == 1})
    if not folders or len(folders) == classes:
        return []
    place = {folder: index for index, folder in enumerate(folders)}
    labels = samples.labels or ()
    if any(place.get(name.split("/")[0]) != label for name, label in zip(samples.names, labels, strict=True)):
        return []  # a list says the classes
    rule = (
        "class folders are numbered by their sorted names (or data.classes), and are not as many as the model's classes"
    )
    return [Finding(WHERE, rule, f"{len(folders)} folders, {classes} classes", "data.classes", "note")]


def _guessing(right: int, count: int, classes: int) -> list[Finding]:
    """A note where a guess is right so often more than one time in a hundred."""
    if _chance(right, count, 1 / classes) <= CHANCE:
        return []
    rule = "the float model is no better than guessing: wrong preprocessing, labels in another order, or no weights"
    seen = f"{right} of {count} right, {classes} classes"
    return [Finding(WHERE, rule, seen, "a model that knows these classes", "note")]


def _chance(right: int, count: int, p: float) -> float:
    """The probability of at least so many hits in `count` guesses that are right with probability `p`."""
    return math.fsum(math.comb(count, k) * p**k * (1 - p) ** (count - k) for k in range(right, count + 1))
