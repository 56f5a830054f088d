"""Returns a compressed network from its files, and writes them: an architecture, and weights that hold no code.

- `architecture.json`: the factory that builds the dense network, and what was removed from it, step by step: blocks
  that were taken out, then channels that were cut;
- `weights.safetensors`: the state dict of the pruned network;
- `model.pt2`: both in one file, as an exported program, which any recipe can name as its model.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from edgeship.calibration.errors import InputError
from edgeship.pipeline.compression.channels import Cut
from edgeship.pipeline.compression.removal import Removed
from edgeship.pipeline.compression.training_data import input_shape
from edgeship.pipeline.torch_export import quiet
from edgeship.pipeline.workspace import write_json

if TYPE_CHECKING:
    from edgeship.pipeline.recipe import Recipe

ARCHITECTURE, WEIGHTS, PROGRAM = "architecture.json", "weights.safetensors", "model.pt2"


def build_dense(recipe: Recipe, *, weights: bool = True) -> nn.Module:
    """The network that the recipe's factory builds, with its weights.

    Raises InputError for models that come as a file: only a factory's network can be trained.
    """
    from edgeship.pipeline.models import build_module

    path, factory = recipe.source_path, recipe.source_factory
    if factory is None:
        raise InputError(
            f"{recipe.path.name}: [compress] trains a network, and {recipe.model.source} is a finished one; "
            "accepted: a model.source of the form PATH.py:factory or package.module:factory"
        )
    place = path if path is not None else recipe.model.source.rpartition(":")[0]
    return build_module(
        place, factory, recipe.model.args, recipe.weights_path if weights else None, recipe.model.weights_key
    )


def save(recipe: Recipe, model: nn.Module, removed: Sequence[Removed], folder: Path) -> list[str]:
    """Writes the three files, and returns what a user must know of them.

    The program takes batches of any size where the recipe's shape says so, if the network can be exported like that.
    """
    model.eval().cpu()
    (folder / WEIGHTS).write_bytes(weights_file(model))
    facts = {
        "source": Path(recipe.model.source).name,
        "args": recipe.model.args,
        "input": list(input_shape(recipe)),
        "removed": [asdict(each) for each in removed],
    }
    (folder / ARCHITECTURE).write_text(json.dumps(facts, indent=1, sort_keys=True) + "\n", "utf-8")
    notes = []
    batch, *sides = recipe.input.shape or (1,)
    with quiet(), torch.no_grad():
        try:
            program = _program(model, batch, sides)
        except Exception as error:  # torch raises what it likes; hours of training are not lost for it
            if batch != "dynamic":
                raise
            program = _program(model, 1, sides)
            reason = (str(error).splitlines() or ["no reason given"])[0][:200]
            notes = [f"{PROGRAM} takes one sample at a time, with a dynamic batch it cannot be exported: {reason}"]
        torch.export.save(program, folder / PROGRAM)
    return notes


def _program(model: nn.Module, batch: int | str, sides: Sequence[int | str]) -> torch.export.ExportedProgram:
    if batch != "dynamic":
        return torch.export.export(model, (torch.zeros([int(each) for each in (batch, *sides)]),))
    example = torch.zeros([2, *(int(side) for side in sides)])  # a size of 1 is taken for a constant
    return torch.export.export(model, (example,), dynamic_shapes=({0: torch.export.Dim("batch")},))


def weights_file(model: nn.Module) -> bytes:
    """The model's state dict as a safetensors file; weights that several layers share are in it once for each."""
    from safetensors.torch import save as to_bytes

    return to_bytes({name: value.detach().clone().contiguous() for name, value in model.state_dict().items()})


def restore(recipe: Recipe, folder: Path) -> nn.Module:
    """The compressed network in eval mode: built by the recipe's factory, cut, and given its weights."""
    from edgeship.pipeline.state_dict import load_weights

    model = build_dense(recipe, weights=False)
    for each in read_removed(folder / ARCHITECTURE):
        each.take_from(model, torch.zeros(input_shape(recipe)))
    load_weights(model, folder / WEIGHTS)
    return model.eval()


def write_removed(path: Path, removed: Sequence[Removed]) -> None:
    """A JSON file that `read_removed` reads."""
    write_json(path, {"removed": [asdict(each) for each in removed]})


def read_removed(path: Path) -> list[Removed]:
    """What was removed in each step, of a JSON file with the key "removed". Raises InputError where it is damaged."""
    try:
        found: dict[str, Any] = json.loads(path.read_text("utf-8"))
        return [
            Removed(
                tuple(str(block) for block in each["blocks"]),
                tuple(Cut(one["layer"], tuple(int(channel) for channel in one["channels"])) for one in each["cuts"]),
                {str(layer): str(reason) for layer, reason in each["left_dense"].items()},
            )
            for each in found["removed"]
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{path} cannot be read: {type(error).__name__}: {error}; accepted: the file as compression wrote it"
        ) from error
