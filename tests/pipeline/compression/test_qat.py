"""Quantization-aware training makes the quantized model more like the float one, and nothing but the numbers change."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch

from edgeship.calibration.diagnosis.saturation import can_clip
from edgeship.calibration.errors import InputError, StageError
from edgeship.calibration.graph.onnx_file import to_bytes
from edgeship.calibration.learned.fake_quant import FakeQuantGraph
from edgeship.calibration.planning.overrides import Override
from edgeship.calibration.samples.data import Samples, open_samples
from edgeship.calibration.types import QuantizedConstant, QuantParams
from edgeship.pipeline.compression.agreement import agreement
from edgeship.pipeline.compression.batches import ArrayBatches
from edgeship.pipeline.compression.held_out import Standing, Verdict, split
from edgeship.pipeline.compression.qat import Trained, fixed_scales, train_quantized
from edgeship.pipeline.quantizing.calibrated import Quantized, quantize_model
from edgeship.pipeline.recipe import load_recipe
from edgeship.pipeline.summary import training_rows
from edgeship.targets.base import load
from edgeship.targets.onnxruntime import open_float, open_reference

SHAPE = (3, 12, 12)
Train = Callable[..., Trained]
TAUGHT = '[quantize.qat.distill]\nteacher.source = "teacher.onnx"\n'


def images(count: int, seed: int) -> Any:
    return np.random.default_rng(seed).normal(size=(count, *SHAPE)).astype(np.float32)


@pytest.fixture
def samples(tmp_path: Path) -> Samples:
    np.savez(tmp_path / "data.npz", image=images(40, 0), label=np.arange(40) % 5)
    return open_samples(tmp_path / "data.npz", shapes={"image": (1, *SHAPE)})


@pytest.fixture
def model(tiny_models: dict[str, bytes]) -> ir.Model:
    import onnx

    return ir.from_proto(onnx.load_from_string(tiny_models["residual"]))


@pytest.fixture
def quantized(model: ir.Model, samples: Samples) -> Callable[..., Quantized]:
    def make(*schemes: Any, **more: Any) -> Quantized:
        rules = [load("onnxruntime").rules]
        return quantize_model(model, samples, rules, schemes=schemes or ("full",), refinements=(), **more)

    return make


@pytest.fixture
def train(tmp_path: Path, samples: Samples) -> Train:
    """Trains what is given under `[quantize.qat]` with the given lines."""

    def run(result: Quantized, table: str, kept: str = "kept", progress: Any = lambda *_: None) -> Trained:
        recipe = tmp_path / "recipe.toml"
        forms = {"full": ("onnxruntime", "full"), "pair_limited": ("tflite", "pair_limited")}
        targets = [f'[targets.{forms[each][0]}]\nweights = "{forms[each][1]}"\n' for each in result.plans]
        recipe.write_text(
            'name = "tiny"\n[model]\nsource = "m.onnx"\n[data]\ncalibration = "data.npz"\n'
            f"[quantize.qat]\n{table}\n{''.join(targets)}"
        )
        loaded = load_recipe(recipe)
        assert loaded.quantize.qat is not None
        return train_quantized(loaded, loaded.quantize.qat, samples, result, tmp_path / kept, progress)

    return run


def noise(model: ir.Model, quantized: ir.Model) -> float:
    """The squared error of the quantized model's outputs on samples that nothing has seen."""
    exact, rounded = open_float(to_bytes(model)), open_reference(to_bytes(quantized))
    errors = [
        exact.run({"image": x[np.newaxis]})["logits"] - rounded.run({"image": x[np.newaxis]})["logits"]
        for x in images(60, 7)
    ]
    return float(np.square(errors).mean())


def test_without_labels_the_model_gets_closer_to_the_float_one(
    model: ir.Model, quantized: Callable[..., Quantized], train: Train
) -> None:
    before = coarser(quantized(), weights=12)
    after = train(before, "epochs = 8\nlr = 0.1").result
    assert noise(model, after.models["full"]) < 0.6 * noise(model, before.models["full"])
    assert before.plan.int8_nodes == after.plan.int8_nodes
    activations = after.plan.activations
    assert all(activations[name].same_as(params) for name, params in before.plan.activations.items())


@pytest.mark.parametrize("alone", [False, True])
def test_outputs_that_are_integers_teach_nothing(alone: bool, model: ir.Model, samples: Samples, train: Train) -> None:
    scores = model.graph.outputs[0]
    decision = ir.node("ArgMax", [scores], attributes={"axis": 1, "keepdims": 0}, name="decide")
    decision.outputs[0].name, decision.outputs[0].dtype = "decision", ir.DataType.INT64
    decision.outputs[0].shape = ir.Shape([1])
    model.graph.append(decision)
    model.graph.outputs[:] = [decision.outputs[0]] if alone else [scores, decision.outputs[0]]
    plain = quantize_model(model, samples, [load("onnxruntime").rules], schemes=("full",), refinements=())
    if alone:
        with pytest.raises(InputError, match=r"all outputs of the model are integers \(decision\)"):
            train(plain, "epochs = 1")
    else:
        assert train(coarser(plain, weights=12), "epochs = 8\nlr = 0.3").verdicts["full"].improved


def test_scales_that_fit_badly_are_learnt_but_for_those_of_inputs(
    model: ir.Model, quantized: Callable[..., Quantized], train: Train
) -> None:
    before = coarser(quantized(), activations=3)
    after = train(before, "epochs = 20\nlr = 0.2\nlearn_scales = true").result
    assert noise(model, after.models["full"]) < 0.7 * noise(model, before.models["full"])
    activations = after.plan.activations
    assert activations["image"].same_as(before.plan.activations["image"])
    assert float(activations["logits"].scale) < 0.9 * float(before.plan.activations["logits"].scale)


@pytest.mark.parametrize(
    "override",
    [
        Override("inner_1", range=(0.0, 9.0)),  # the ReLU behind it lives in this range, and has it
        Override("inner_1_relu", scale=0.05, zero_point=-128),
        Override("inner_?_relu", range=(0.0, 9.0)),
    ],
)
def test_scales_that_the_recipe_gives_are_not_learnt(
    quantized: Callable[..., Quantized], train: Train, override: Override
) -> None:
    before = quantized(overrides=[override])
    after = train(before, "epochs = 2\nlr = 0.5\nlearn_scales = true").history["full"]
    assert after
    graph = FakeQuantGraph(
        before.calibration.model, before.plan, learn_scales=True, fixed=fixed_scales(before.calibration)
    )
    learnt = {name for name in before.plan.activations if name in graph._factors}
    assert "inner_1_relu" not in learnt
    assert {"logits", "sum_relu"} <= learnt


def test_a_later_override_takes_a_given_range_back(quantized: Callable[..., Quantized]) -> None:
    wishes = [Override("inner_1_relu", range=(0.0, 9.0)), Override("inner_*", algorithm="mse")]
    assert "inner_1_relu" not in fixed_scales(quantized(overrides=wishes).calibration)


def coarser(result: Quantized, weights: float = 1, activations: float = 1) -> Quantized:
    """The same with scales that are so many times too large; those of inputs stay."""

    def larger(params: QuantParams, factor: float) -> QuantParams:
        return QuantParams(params.scale * np.float32(factor), params.zero_point, params.spec)

    plan = result.plan
    made: dict[int, QuantParams] = {}
    scaled = {
        name: params if name == "image" else made.setdefault(id(params), larger(params, activations))
        for name, params in plan.activations.items()
    }
    constants = {}
    for name, constant in plan.weights.items():
        params = larger(constant.params, weights)
        constants[name] = QuantizedConstant(params, params.quantize(constant.params.dequantize(constant.integers)))
    worse = replace(plan, activations=scaled, weights=constants)
    return replace(result, plans={"full": worse}, models={"full": result.calibration.quantized(worse)})


def test_each_weight_scheme_is_trained_and_limited_pairs_stay_limited(
    quantized: Callable[..., Quantized], train: Train
) -> None:
    before = quantized("full", "pair_limited")
    trained = train(before, "epochs = 2\nlr = 0.1")
    assert list(trained.history) == ["full", "pair_limited"]
    assert not can_clip(trained.result.models["pair_limited"])
    assert can_clip(trained.result.models["full"])
    plans = trained.result.plans
    assert all(plans["full"].activations[n].same_as(p) for n, p in plans["pair_limited"].activations.items())


def test_labels_are_learnt_where_they_are_asked_for(quantized: Callable[..., Quantized], train: Train) -> None:
    history = train(quantized(), 'epochs = 10\nlr = 1.0\nobjective = "labels"').history["full"]
    assert history[-1].loss < history[0].loss
    first, last = history[0].top1, history[-1].top1
    assert first is not None
    assert last is not None
    assert last > first


def test_without_labels_another_objective_is_proposed(
    quantized: Callable[..., Quantized], samples: Samples, tmp_path: Path
) -> None:
    (tmp_path / "recipe.toml").write_text(
        'name = "tiny"\n[model]\nsource = "m.onnx"\n[data]\ncalibration = "data.npz"\n'
        '[quantize.qat]\nobjective = "labels"\n[targets.onnxruntime]\nweights = "full"\n'
    )
    recipe, bare = load_recipe(tmp_path / "recipe.toml"), samples.without_labels()
    assert recipe.quantize.qat is not None
    wanted = r'has no labels, .*; accepted: data with labels, or quantize\.qat\.objective = "distill"$'
    with pytest.raises(InputError, match=wanted):
        train_quantized(recipe, recipe.quantize.qat, bare, quantized(), tmp_path / "kept", lambda *_: None)


@pytest.mark.parametrize("table", ["compress.distill", "quantize.qat.distill"])
def test_a_teacher_teaches_the_integers_too(
    tiny_models: dict[str, bytes], quantized: Callable[..., Quantized], samples: Samples, tmp_path: Path, table: str
) -> None:
    import onnx
    from onnx import numpy_helper

    teacher = onnx.load_from_string(tiny_models["residual"])
    (bias,) = [each for each in teacher.graph.initializer if each.name == "fc_bias"]
    prefers_first = np.array([2, 0, 0, 0, 0], np.float32)
    bias.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(bias) + prefers_first, "fc_bias"))
    onnx.save(teacher, tmp_path / "teacher.onnx")
    recipe = tmp_path / "recipe.toml"
    source = "net.py:make" if table.startswith("compress") else "net.onnx"  # which [compress] does not train
    recipe.write_text(
        f'name = "tiny"\n[model]\nsource = "{source}"\n[input]\nshape = [1, 3, 12, 12]\n'
        '[data]\ncalibration = "data.npz"\ntraining = "data.npz"\nevaluation = "nowhere.npz"\n'
        f'[{table}]\nteacher.source = "teacher.onnx"\nweight = 1.0\ntemperature = 1.0\n'
        '[quantize.qat]\nobjective = "teacher"\nlr = 1.0\n[targets.onnxruntime]\nweights = "full"\n'
    )
    loaded = load_recipe(recipe)
    assert loaded.quantize.qat is not None
    trained = train_quantized(loaded, loaded.quantize.qat, samples, quantized(), tmp_path / "kept", lambda *_: None)
    verdict = trained.verdicts["full"]
    assert verdict.improved
    assert verdict.judged_by == "loss"
    assert (verdict.after.loss or 9) < 0.5 * (verdict.before.loss or 0)
    learnt = open_reference(to_bytes(trained.result.models["full"]))
    scores = [learnt.run({"image": x[np.newaxis]})["logits"][0] for x in images(20, 7)]
    assert np.mean(np.argmax(scores, 1) == 0) > 0.9


def test_a_scheme_that_no_target_ships_is_not_trained_and_shows_what_was(
    quantized: Callable[..., Quantized], samples: Samples, tmp_path: Path
) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        'name = "tiny"\n[model]\nsource = "m.onnx"\n[data]\ncalibration = "data.npz"\n[quantize]\nweights = "shared"\n'
        "[quantize.qat]\nepochs = 2\nlearn_scales = true\n[targets.onnxruntime]\n[targets.tflite]\n"
    )
    loaded = load_recipe(recipe)
    assert loaded.quantize.qat is not None
    before = quantized(*loaded.weight_schemes())
    trained = train_quantized(loaded, loaded.quantize.qat, samples, before, tmp_path / "kept", lambda *_: None)
    assert list(trained.history) == ["pair_limited"]
    assert sorted(trained.result.plans) == ["full", "pair_limited"]
    assert trained.result.plans["full"].digest() == trained.result.plans["pair_limited"].digest()


def test_training_on_classes_is_kept_unless_chance_does_not_explain_what_became_worse() -> None:
    rng = np.random.default_rng(0)
    before = tuple(rng.uniform(0.1, 2.0, 20))
    for shift, kept in ((-0.05, True), (0.0, True), (0.05, False), (float("nan"), False)):
        after = tuple(np.add(before, shift + rng.normal(0, 0.03, 20)))
        verdict = Verdict(1000, "loss", Standing(30.0, before), Standing(20.0, after))
        assert verdict.improved is kept, shift
        held_out = verdict.to_json()["held_out"]
        assert (held_out["loss_difference"] is None) == (shift != shift)  # noqa: PLR0124 - not a number
    assert not Verdict(1, "loss", Standing(30.0, (1.0,)), Standing(40.0, (1.001,))).improved
    assert Verdict(9, "sqnr_db", Standing(30.0), Standing(30.1)).improved
    assert not Verdict(9, "sqnr_db", Standing(30.0), Standing(30.0)).improved


def test_a_killed_run_goes_on_and_ends_with_the_same_integers(
    quantized: Callable[..., Quantized], train: Train
) -> None:
    class KilledError(Exception):
        pass

    def kill(done: int, _total: int, what: str) -> None:
        if done == 7 and "steps" in what:
            raise KilledError

    table = "epochs = 3\nlr = 0.05\nflip = true\nshift = 2"
    whole = train(quantized(), table, "whole").result.plan.digest()
    with pytest.raises(KilledError):
        train(quantized(), table, "killed", kill)
    steps: list[int] = []
    resumed = train(quantized(), table, "killed", lambda done, _, what: steps.append(done) if "steps" in what else None)
    assert steps[0] > 1
    assert resumed.result.plan.digest() == whole


def test_a_loss_that_is_no_number_stops_with_the_step_and_keeps_the_last_good_state(
    quantized: Callable[..., Quantized], train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edgeship.pipeline.compression import qat

    calls = []

    def sometimes(values: Any, wanted: Any) -> Any:
        calls.append(1)
        return (values - wanted).square().sum() * (float("nan") if len(calls) == 6 else 1.0)

    monkeypatch.setattr(qat, "_noise", sometimes)
    with pytest.raises(StageError, match=r"the loss is nan at step 6 .*epoch 1 is kept"):
        train(quantized(), "epochs = 4")
    assert (tmp_path / "kept" / "qat-full" / "checkpoint.pt").exists()


def test_weights_that_left_all_bounds_are_refused(quantized: Callable[..., Quantized], train: Train) -> None:
    with pytest.raises(StageError, match="smaller lr"):
        train(quantized(), "epochs = 4\nlr = 1e30")


@pytest.mark.parametrize("more", ["", '\nobjective = "labels"'])
def test_training_that_makes_held_out_samples_worse_is_not_kept_and_said(
    quantized: Callable[..., Quantized], train: Train, more: str
) -> None:
    before = quantized()
    trained = train(before, f"epochs = 2\nlr = 300.0{more}")
    assert trained.result.plan.digest() == before.plan.digest()
    assert to_bytes(trained.result.models["full"]) == to_bytes(before.models["full"])
    facts = trained.to_json()["full"]
    assert facts["kept"] == "start"
    assert facts["judged_by"] == ("loss" if more else "sqnr_db")
    held_out = facts["held_out"]
    assert held_out["after"]["sqnr_db"] < held_out["before"]["sqnr_db"] - 10
    (line,) = training_rows({"quantization": {"qat": trained.to_json()}})
    assert f"{'; worse' if more else 'no better'}: the plan before it is kept" in line
    assert f"SQNR {held_out['before']['sqnr_db']:.2f} -> {held_out['after']['sqnr_db']:.2f} dB" in line


def test_small_steps_do_not_undo_integers_that_a_refinement_chose(model: ir.Model, samples: Samples) -> None:
    rules = [load("onnxruntime").rules]
    plan = quantize_model(model, samples, rules, schemes=("full",), refinements=("gptq",)).plan
    graph = FakeQuantGraph(model, plan, start="plan")
    finest = min(float(constant.params.scale.min()) for constant in plan.weights.values())
    with torch.no_grad():
        for parameter in graph.parameters():
            if parameter.dim() > 1:
                parameter.add_(0.2 * finest * torch.sign(torch.randn(parameter.shape)))
    moved = graph.plan().weights
    assert all(np.array_equal(moved[key].integers, constant.integers) for key, constant in plan.weights.items())


def test_what_is_recorded_is_what_the_runtime_computes_on_the_samples_held_out(
    model: ir.Model, samples: Samples, quantized: Callable[..., Quantized], train: Train
) -> None:
    before = coarser(quantized(), weights=12)
    trained = train(before, "epochs = 8\nlr = 0.3")
    verdict = trained.verdicts["full"]
    judges = [sample.feeds for place, sample in enumerate(samples) if place % 5 == 4]
    assert verdict.improved
    assert verdict.samples == len(judges) == 8
    for result, standing in ((before, verdict.before), (trained.result, verdict.after)):
        exact, rounded = open_float(to_bytes(model)), open_reference(to_bytes(result.models["full"]))
        wanted = np.array([exact.run(feeds)["logits"] for feeds in judges])
        errors = wanted - np.array([rounded.run(feeds)["logits"] for feeds in judges])
        assert standing.sqnr_db == pytest.approx(
            10 * np.log10(np.square(wanted).sum() / np.square(errors).sum()), abs=0.2
        )


def test_a_layer_that_computes_something_else_is_seen_where_it_is(
    model: ir.Model, quantized: Callable[..., Quantized]
) -> None:
    result = quantized()
    data = ArrayBatches(images(4, 1), None, 2)
    right = FakeQuantGraph(model, result.plan, start="plan")
    found = agreement(right, result.models["full"], data)
    assert found is not None
    assert found.samples == 4
    assert found.layer_max_steps <= 1
    first = next(iter(result.plan.weights))
    constant = result.plan.weights[first]
    other = np.where(constant.integers > 60, constant.integers - 30, constant.integers).astype(np.int8)
    plan = replace(result.plan, weights={**result.plan.weights, first: replace(constant, integers=other)})
    found = agreement(FakeQuantGraph(model, plan, start="plan"), result.models["full"], data)
    assert found is not None
    assert found.layer_max_steps > 1


def test_no_sample_both_teaches_and_judges_and_few_judge_where_there_are_many() -> None:
    for count, judges in ((2, 1), (4, 1), (100, 20), (50_000, 1000)):
        teach, judge = split(count, "the samples")
        assert sorted([*teach, *judge]) == list(range(count))
        assert len(judge) == judges
    with pytest.raises(InputError, match="at least 2"):
        split(1, "the samples")


@pytest.mark.parametrize(
    ("line", "said"),
    [("epochs = 0", "greater than 0"), ('objective = "guess"', "distill"), ("rate = 1", "rate"), ("lr = -1.0", "lr")],
)
def test_wrong_keys_and_values_are_named(tmp_path: Path, line: str, said: str) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(f'name = "t"\n[model]\nsource = "m.onnx"\n[quantize.qat]\n{line}\n[targets.onnxruntime]\n')
    with pytest.raises(InputError, match=said):
        load_recipe(recipe)


def test_the_stage_writes_the_trained_model_and_how_it_went(
    tmp_path: Path, tiny_models: dict[str, bytes], samples: Samples
) -> None:
    from edgeship.pipeline.stage import StageContext
    from edgeship.pipeline.stages.quantize import STAGE

    assert len(samples) == 40  # data.npz is there
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        'name = "tiny"\n[model]\nsource = "m.onnx"\n[data]\ncalibration = "data.npz"\n'
        "[quantize.qat]\nepochs = 2\n[targets.onnxruntime]\n"
    )
    simplified, folder = tmp_path / "3-simplify", tmp_path / "4-quantize"
    simplified.mkdir()
    folder.mkdir()
    (simplified / "model.onnx").write_bytes(tiny_models["residual"])
    loaded = load_recipe(recipe)
    context = StageContext(
        loaded, tuple(loaded.targets), {"simplify": simplified}, folder, lambda *_: None, kept=tmp_path / "kept"
    )
    STAGE.run(context)
    plan = json.loads((folder / "plan.json").read_text())
    trained = plan["qat"]["pair_limited"]
    assert trained["agreement"]["samples"] == 8
    assert trained["agreement"]["layer_max_steps"] <= 1
    assert [epoch["epoch"] for epoch in trained["epochs"]] == [1, 2]
    assert trained["held_out"]["samples"] == 8
    assert (trained["kept"] == "trained") == (
        trained["held_out"]["after"]["sqnr_db"] > trained["held_out"]["before"]["sqnr_db"]
    )
    assert ir.load(folder / "pair_limited.onnx").metadata_props["edgeship.plan"] == plan["digests"]["pair_limited"]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ('[quantize]\nscheme = "auto"\n[quantize.qat]', "form of its own"),
        ('[targets.tflite]\nkeep_float = ["conv"]\n[quantize.qat]', "tflite would have a form of its own"),
        ("[quantize.qat]\nlearn_scales = true", 'quantize.weights = "shared"'),
        (
            '[quantize.qat]\nobjective = "teacher"',
            r"no \[quantize.qat.distill\] or \[compress.distill\] that names one",
        ),
        (TAUGHT, 'no distill beside objective = "distill"'),
        (f'{TAUGHT}features = "hint"\n[quantize.qat]\nobjective = "teacher"', 'distill.features = "none"'),
        (f'{TAUGHT}cache = "always"\n[quantize.qat]\nobjective = "teacher"', 'distill.cache = "auto"'),
        ('[quantize.qat]\ndata = "training"', "data.training, data.loaders: neither is set"),
    ],
)
def test_what_other_tables_exclude_or_lack_is_said_before_anything_runs(tmp_path: Path, more: str, said: str) -> None:
    recipe = tmp_path / "recipe.toml"
    other = "" if "tflite" in more else "[targets.tflite]\n"
    recipe.write_text(
        'name = "t"\n[model]\nsource = "m.onnx"\n[data]\ncalibration = "data.npz"\n'
        f"{more}\n{other}[targets.onnxruntime]\n"
    )
    with pytest.raises(InputError, match=said):
        load_recipe(recipe)
