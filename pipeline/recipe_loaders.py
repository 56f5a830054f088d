"""Returns what is wrong with a recipe whose training data come from a user's own loader: keys that it would ignore."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from edgeship.pipeline.recipe import Recipe


def loader_problems(recipe: Recipe) -> list[str]:
    """One sentence for each key that has no effect beside `data.loaders`, or without it."""
    data = recipe.data
    if data.loaders is None:
        lost = "data.loader_files: there are no data.loaders that read them; accepted: beside loaders"
        return [lost] if data.loader_files else []
    problems = []
    if data.training_samples is not None:
        problems.append(
            f"data.training_samples: seen {data.training_samples}; {data.loaders} says itself how many samples there "
            "are; accepted beside data.loaders: nothing here"
        )
    compress, qat = recipe.compress, recipe.quantize.qat
    trained = {} if compress is None else {"compress.training": compress.training}
    if qat is not None and qat.data == "training":
        trained["quantize.qat"] = qat
    problems += [
        f"{where}.{key}: seen {json.dumps(value)}; {data.loaders} varies its images itself; accepted beside "
        f"data.loaders: {json.dumps(type(value)())}"
        for where, settings in trained.items()
        for key in ("flip", "shift")
        if (value := getattr(settings, key))
    ]
    if compress is not None and "batch_size" in compress.training.model_fields_set:
        problems.append(
            f"compress.training.batch_size: seen {compress.training.batch_size}; {data.loaders} makes batches of its "
            "own size; accepted beside data.loaders: nothing here"
        )
    return problems
