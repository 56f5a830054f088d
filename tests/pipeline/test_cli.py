"""The command line: exit codes, one sentence at the end of stderr, results on stdout, and nothing heavy for --help."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import click
import numpy as np
import onnx
import pytest
from click.testing import Result
from onnx import numpy_helper

from edgeship.calibration.errors import GateError, InputError, StageError
from edgeship.calibration.types import Array
from projects import run, write_project

HEAVY = ("numpy", "onnx", "onnx_ir", "onnxruntime", "onnxsim", "pydantic", "rich", "tensorflow", "torch", "PIL")


def last_line(result: Result) -> str:
    return result.stderr.strip().splitlines()[-1]


def python(code: str, *args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize("args", [["--help"], ["deploy", "--help"], ["--version"], ["verify"]])
def test_help_imports_nothing_heavy(args: Sequence[str]) -> None:
    code = (
        "import sys, edgeship.pipeline.cli as c\n"
        "try: c.main()\n"
        "except SystemExit: pass\n"
        f"print('HEAVY', [m for m in {HEAVY!r} if m in sys.modules])"
    )
    assert python(code, *args).stdout.splitlines()[-1] == "HEAVY []"


def test_help_names_every_command_of_the_contract() -> None:
    result = run("--help")
    assert result.exit_code == 0
    for name in (
        *("deploy", "init", "targets", "doctor", "inspect", "export", "simplify", "quantize", "convert"),
        *("compare", "evaluate", "bench", "verify"),
    ):
        assert f"\n  {name} " in result.stdout
        assert run(name, "--help").exit_code == 0


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (["deploy"], "Error: Missing argument 'RECIPE'."),
        (["depoly"], "Error: No such command 'depoly'. Did you mean 'deploy'?"),
        (["deploy", "nowhere.toml"], "edgeship: there is no recipe nowhere.toml"),
        (
            ["deploy", "nowhere.toml", "--from", "nowhere"],
            "edgeship: --from nowhere: no such stage; there are: compress",
        ),
        (["inspect", "nowhere.onnx"], "nowhere.onnx"),
        (["verify", "nowhere"], "edgeship: there is no release folder nowhere"),
        (["bench", "nowhere.onnx"], "edgeship: there is no file nowhere.onnx"),
        (["convert", "nowhere.onnx", "-o", "out.onnx", "--target", "nothing"], "edgeship: unknown target 'nothing'"),
        (["evaluate", "nowhere.xyz", "--data", "x"], "edgeship: there is no file nowhere.xyz"),
    ],
)
def test_wrong_usage_and_input_exit_with_2_and_one_sentence(args: Sequence[str], sentence: str) -> None:
    result = run(*args)
    assert result.exit_code == 2
    assert sentence in last_line(result)
    assert result.stdout == ""


@pytest.mark.parametrize(
    ("error", "code", "sentence"),
    [
        (InputError("bad recipe"), 2, "edgeship: bad recipe"),
        (StageError("export failed"), 1, "edgeship: export failed"),
        (GateError("two gates\n  - a\n  - b"), 3, "edgeship: two gates"),
        (KeyboardInterrupt(), 130, "edgeship: interrupted"),
        (ZeroDivisionError("oh"), 1, "edgeship: unexpected ZeroDivisionError: oh (EDGESHIP_DEBUG=1 shows where)"),
        (click.UsageError("no such thing"), 2, "Error: no such thing"),
    ],
)
def test_each_kind_of_error_has_its_exit_code_and_its_last_line(
    monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, sentence: str
) -> None:
    def fail(*_args: object, **_more: object) -> None:
        raise error

    monkeypatch.delenv("EDGESHIP_DEBUG", raising=False)
    monkeypatch.setattr("edgeship.pipeline.releasing.verify.verify_release", fail)
    result = run("verify", ".")
    assert result.exit_code == code
    assert last_line(result).startswith(sentence)
    assert "Traceback" not in result.stderr


def test_debug_shows_where_an_error_came_from(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGESHIP_DEBUG", "1")
    result = run("verify", "nowhere")
    assert "Traceback" in result.stderr
    assert last_line(result) == "edgeship: there is no release folder nowhere"


def test_targets_and_doctor_speak_json_and_text() -> None:
    listed = json.loads(run("targets", "--json").stdout)["targets"]
    assert listed["onnxruntime"]["installed"] is True
    assert "onnxruntime" in run("targets").stdout
    facts = json.loads(run("doctor", "--json").stdout)
    assert facts["cpu"]["cores"] >= 1
    assert "onnxruntime" in run("doctor").stdout


@pytest.fixture
def model(tmp_path: Path, tiny_models: dict[str, bytes]) -> Path:
    path = tmp_path / "model.onnx"
    path.write_bytes(tiny_models["plain"])
    return path


def test_init_writes_a_recipe_that_loads_and_knows_the_model(tmp_path: Path, model: Path) -> None:
    from edgeship.pipeline.recipe import load_recipe

    result = run("init", tmp_path, "--model", model)
    assert result.exit_code == 0, result.stderr
    recipe = load_recipe(tmp_path / "recipe.toml")
    assert recipe.name == "model"
    assert recipe.source_path == model
    assert (recipe.input.name, recipe.input.shape) == ("image", (1, 3, 12, 12))
    again = run("init", tmp_path, "--model", model)
    assert again.exit_code == 2
    assert "exists already" in last_line(again)


@pytest.mark.parametrize("name", ["net.py", "net.pt2", None])
def test_init_writes_a_recipe_that_loads_for_any_kind_of_model(tmp_path: Path, name: str | None) -> None:
    from edgeship.pipeline.recipe import load_recipe

    more: list[str | Path] = []
    if name:
        (tmp_path / name).write_text("")
        more = ["--model", tmp_path / name]
    assert run("init", tmp_path / "new folder", *more).exit_code == 0
    recipe = load_recipe(tmp_path / "new folder" / "recipe.toml")
    assert recipe.source_path is not None
    assert recipe.name == ("net" if name else "new-folder")
    assert recipe.input.shape == (None if name == "net.pt2" else (1, 3, 224, 224))  # a program knows its own


def test_init_takes_the_factory_as_a_recipe_says_it(tmp_path: Path) -> None:
    from edgeship.pipeline.recipe import load_recipe

    (tmp_path / "net.py").write_text("def resnet(): ...")
    assert run("init", tmp_path, "--model", f"{tmp_path / 'net.py'}:resnet").exit_code == 0
    assert load_recipe(tmp_path / "recipe.toml").source_factory == "resnet"


@pytest.mark.parametrize(
    ("shape", "gray"), [([1, 1, 8, 8], True), ([1, 8, 8, 1], True), ([1, 8, 8, 3], False), ([1, 3, 8, 1], False)]
)
def test_init_knows_a_gray_image_in_either_order(tmp_path: Path, model: Path, shape: list[int], gray: bool) -> None:
    from edgeship.pipeline.recipe import load_recipe

    proto = onnx.load(model)
    for dim, size in zip(proto.graph.input[0].type.tensor_type.shape.dim, shape, strict=True):
        dim.dim_value = size
    del proto.graph.value_info[:]
    onnx.save(proto, model)
    assert run("init", tmp_path, "--model", model).exit_code == 0
    assert (load_recipe(tmp_path / "recipe.toml").input.color == "gray") is gray


def test_init_asks_for_sides_that_a_model_leaves_open(tmp_path: Path, model: Path) -> None:
    proto = onnx.load(model)
    for place in (0, 2, 3):
        proto.graph.input[0].type.tensor_type.shape.dim[place].dim_param = f"side_{place}"
    del proto.graph.value_info[:]
    onnx.save(proto, model)
    assert run("init", tmp_path, "--model", model).exit_code == 0
    assert "shape = [1, 3, 224, 224]   # TODO the model leaves sides open" in (tmp_path / "recipe.toml").read_text()


def test_init_refuses_a_model_that_no_recipe_can_start_from(tmp_path: Path) -> None:
    (tmp_path / "net.h5").write_text("")
    result = run("init", tmp_path, "--model", tmp_path / "net.h5")
    assert result.exit_code == 2
    assert last_line(result).endswith("accepted: .onnx, .pt2, .py")
    assert not (tmp_path / "recipe.toml").exists()


def test_inspect_shows_inputs_and_operators(model: Path) -> None:
    assert "image" in run("inspect", model).stdout
    assert json.loads(run("inspect", model, "--json").stdout)


def test_a_model_goes_from_command_to_command(tmp_path: Path, model: Path, tiny_data: Path) -> None:
    simple, full, out = tmp_path / "simple.onnx", tmp_path / "int8.onnx", tmp_path / "model.tflite"
    for args in (
        ("simplify", model, "-o", simple),
        ("quantize", simple, "-o", full, "--data", tiny_data, "--samples", "8"),
        ("convert", full, "-o", out, "--target", "tflite"),
    ):
        result = run(*args)
        assert result.exit_code == 0, result.output
    facts = json.loads(run("compare", full, out, "--data", tiny_data, "--samples", "8", "--json").stdout)
    assert facts["samples"] == 8
    assert facts["outputs"]["logits"]["step_kind"] == "quantized"
    assert facts["outputs"]["logits"]["max_steps"] <= 2
    layers = json.loads(
        run("compare", simple, full, "--data", tiny_data, "--samples", "2", "--layers", "--json").stdout
    )
    assert len(layers["layers"]) > 1
    assert "same decision" in run("compare", simple, out, "--data", tiny_data).stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "int8.onnx",
        "model.onnx",
        "model.tflite",
        "simple.onnx",
    ]


@pytest.mark.parametrize("name", ["out.onnx", "out.tflite", "out"])
@pytest.mark.parametrize(
    "command",
    [
        ("export", "recipe.toml"),
        ("simplify", "model.onnx"),
        ("quantize", "model.onnx", "--mode", "float16"),
        ("quantize", "model.onnx", "--mode", "dynamic"),
        ("quantize", "model.onnx", "--data", "tiny.npz"),
        ("convert", "model.onnx", "--target", "onnxruntime"),
    ],
    ids=lambda command: "-".join(command[::2]),
)
def test_a_name_that_is_another_formats_is_noted(  # noqa: PLR0917 - fixtures
    tmp_path: Path,
    tiny_models: dict[str, bytes],
    tiny_data: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: Sequence[str],
    name: str,
) -> None:
    write_project(tmp_path, tiny_models["plain"], tiny_data, "[targets.onnxruntime]")
    monkeypatch.chdir(tmp_path)
    result = run(*command, "-o", name)
    assert result.exit_code == 0, result.output
    assert (tmp_path / name).is_file()
    assert (f"files are known by the suffix .onnx; seen: {name}" in result.stderr) == (name != "out.onnx")


def test_evaluate_scores_a_model_on_labelled_arrays(model: Path, tiny_data: Path) -> None:
    result = run("evaluate", model, "--data", tiny_data, "--json")
    facts = json.loads(result.stdout)
    assert facts["n"] == 32
    assert facts["interval"][0] <= facts["top1"] <= facts["interval"][1]
    assert "top-1" in run("evaluate", model, "--data", tiny_data).stdout


def test_inspect_lists_what_stands_in_the_way_of_a_target(tmp_path: Path, model: Path) -> None:
    assert "tflite: can be converted" in run("inspect", model, "--target", "tflite").stdout
    strange = tmp_path / "strange.onnx"
    strange.write_bytes(_model_of("RandomNormalLike", [1, 3]))
    result = run("inspect", strange, "--target", "tflite")
    assert result.exit_code == 0
    assert "RandomNormalLike 'only'" in result.stdout
    assert len(json.loads(run("inspect", strange, "--target", "tflite", "--json").stdout)["refusals"]) == 1


def test_convert_fixes_a_dynamic_batch(tmp_path: Path, model: Path) -> None:
    dynamic, out = tmp_path / "dynamic.onnx", tmp_path / "out.tflite"
    dynamic.write_bytes(_model_of("Relu", ["N", 3]))
    assert run("convert", dynamic, "-o", out, "--target", "tflite", "--batch", "4").exit_code == 0
    facts = json.loads(run("inspect", out, "--json").stdout)
    assert [4, 3] in [entry["shape"] for entry in facts["inputs"]]
    result = run("convert", model, "-o", out, "--target", "tflite", "--batch", "4")
    assert result.exit_code == 2
    assert "no input has a dynamic batch" in last_line(result)


def _model_of(op: str, shape: Sequence[int | str]) -> bytes:
    """A model of one operator without attributes."""
    import onnx

    ports = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape) for name in "xy"]
    graph = onnx.helper.make_graph([onnx.helper.make_node(op, ["x"], ["y"], "only")], "one", ports[:1], ports[1:])
    opset = onnx.helper.make_opsetid("", 20)
    content: bytes = onnx.helper.make_model(graph, opset_imports=[opset], ir_version=10).SerializeToString()
    return content


def test_evaluate_without_labels_says_what_is_missing(tmp_path: Path, model: Path, tiny_images: Array) -> None:
    np.savez(tmp_path / "plain.npz", image=tiny_images)
    result = run("evaluate", model, "--data", tmp_path / "plain.npz")
    assert result.exit_code == 2
    assert "has no labels; accepted: the classes under the key label" in last_line(result)


def test_compare_prints_json_where_the_reference_never_moves(tmp_path: Path, tiny_models: dict[str, bytes]) -> None:
    paths = []
    for name, scale in (("a.onnx", 1.0), ("b.onnx", 2.0)):
        model = onnx.load_from_string(tiny_models["plain"])
        for tensor in model.graph.initializer:
            values = np.zeros if tensor.name == "fc_weight" else np.ones
            if tensor.name.startswith("fc_"):
                shape = tuple(tensor.dims)
                tensor.CopyFrom(numpy_helper.from_array(np.asarray(values(shape) * scale, np.float32), tensor.name))
        paths.append(tmp_path / name)
        onnx.save(model, paths[-1])
    np.savez(tmp_path / "one.npz", image=np.zeros((1, 3, 12, 12), np.float32))
    result = run("compare", *paths, "--data", tmp_path / "one.npz", "--json")
    assert result.exit_code == 0, result.stderr
    figures = json.loads(result.stdout, parse_constant=pytest.fail)["outputs"]["logits"]
    assert (figures["max_abs"], figures["max_steps"], figures["sqnr_db"]) == (1.0, None, None)
    shown = run("compare", *paths, "--data", tmp_path / "one.npz").stdout
    assert "SQNR none: the reference never moves" in shown
    assert "no step to count in" in shown


@pytest.mark.parametrize(
    ("data", "sentence"), [("tiny.npz", "accepted: the classes under the key 'label'"), ("r.toml", "set data.labels")]
)
def test_labels_that_would_be_ignored_are_refused(
    tmp_path: Path, model: Path, tiny_data: Path, data: str, sentence: str
) -> None:
    (tmp_path / "tiny.npz").write_bytes(tiny_data.read_bytes())
    (tmp_path / "r.toml").write_text('name = "r"\nmodel.source = "model.onnx"\n[targets.onnxruntime]\n')
    result = run("evaluate", model, "--data", tmp_path / data, "--labels", tmp_path / "labels.csv")
    assert result.exit_code == 2
    assert sentence in last_line(result)


@pytest.mark.parametrize(
    ("words", "accepted"),
    [
        (("bench", "--max-regression", "nan"), "nan is no limit; accepted: a finite number"),
        (("bench", "--max-regression", "-1"), "-1.0 is not in the range x>=0"),
        (("compare", "--min-agreement", "nan"), "nan is no limit; accepted: a finite number"),
        (("compare", "--min-agreement", "98"), "98.0 is not in the range 0<=x<=1"),
        (("compare", "--max-drop", "inf"), "inf is no limit; accepted: a finite number"),
        (("compare", "--min-sqnr", "nan"), "nan is no limit; accepted: a finite number"),
        (("compare", "--max-steps", "nan"), "nan is no limit; accepted: a finite number"),
        (("compare", "--max-growth", "nan"), "nan is no limit; accepted: a finite number"),
    ],
)
def test_a_limit_that_no_measurement_meets_or_misses_is_refused(
    model: Path, words: tuple[str, str, str], accepted: str
) -> None:
    command, option, value = words
    result = run(command, model, model, option, value)
    assert result.exit_code == 2
    assert accepted in last_line(result)


def test_what_stopped_a_run_is_told_although_its_page_cannot_be_written(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edgeship.pipeline import report
    from edgeship.pipeline.flow import Flow

    def full(*_: object) -> None:
        raise StageError("cannot write it: No space left on device")

    monkeypatch.setattr(report, "write_failure", full)
    monkeypatch.setattr(Flow, "run", lambda _: (_ for _ in ()).throw(StageError("the model is too large")))
    recipe = tmp_path / "r.toml"
    recipe.write_text(f'name = "r"\nmodel.source = "{model}"\nquantize.mode = "none"\n[targets.onnxruntime]\n')
    result = run("deploy", recipe, "--out", tmp_path / "run", "--to", "simplify")
    assert "the page of the run that stopped was not written: cannot write it: No space left" in result.stderr
    assert last_line(result) == "edgeship: the model is too large"
    assert result.exit_code == 1


def test_bench_compares_with_a_baseline(tmp_path: Path, model: Path) -> None:
    """The baseline's times are made a thousand times longer or shorter: no state of this machine explains that."""
    words = ("bench", model, "--runs", "12", "--warmup", "1")
    measured = json.loads(run(*words, "--json").stdout)
    own = measured["models"][model.as_posix()]
    assert own["runs"] == 12
    baseline = tmp_path / "baseline.json"
    times = own["nanoseconds"]
    own["nanoseconds"] = [1000 * value for value in times]
    baseline.write_text(json.dumps(measured))
    faster = run(*words, "--baseline", baseline, "--json")
    assert faster.exit_code == 0
    assert json.loads(faster.stdout)["regression"][model.as_posix()]["decision"] == "within"
    own["nanoseconds"] = [value // 1000 for value in times]
    baseline.write_text(json.dumps(measured))
    slower = run(*words, "--baseline", baseline)
    assert slower.exit_code == 3
    assert last_line(slower).startswith("edgeship: slower than the baseline: ")
    few = run("bench", model, "--runs", "3", "--baseline", baseline)
    assert few.exit_code == 0
    assert "too few runs" in few.stderr
    baseline.write_text("[]")
    assert run(*words, "--baseline", baseline).exit_code == 2


def test_bench_compares_the_only_model_with_a_baseline_of_another_path(tmp_path: Path, model: Path) -> None:
    words = ("--runs", "12", "--warmup", "1")
    (tmp_path / "baseline.json").write_text(run("bench", model, *words, "--json").stdout)
    upgraded = tmp_path / "upgraded.onnx"
    upgraded.write_bytes(model.read_bytes())
    result = run("bench", upgraded, *words, "--baseline", tmp_path / "baseline.json", "--max-regression", "1e6")
    assert result.exit_code == 0, result.stderr
    assert f"{upgraded}: " in result.stdout.splitlines()[-1]
    both = run("bench", upgraded, model.with_name("other.onnx"), *words, "--baseline", tmp_path / "baseline.json")
    assert both.exit_code == 2


def test_bench_measures_an_earlier_model_beside_the_new_one(tmp_path: Path, model: Path) -> None:
    """One of them does a thousand times as much: no state of this machine explains the difference."""
    import onnx

    heavy = onnx.load(model)
    size = onnx.helper.make_tensor("big", onnx.TensorProto.FLOAT, [64, 3, 13, 13], [0.01] * (64 * 3 * 169))
    heavy.graph.initializer.append(size)
    last, name = "image", ""
    for place in range(3):
        name = f"wide{place}"
        heavy.graph.node.append(onnx.helper.make_node("Conv", [last, "big"], [name], name=name, pads=[60] * 4))
        heavy.graph.node.append(onnx.helper.make_node("Slice", [name, "from", "to", "axis"], [f"{name}_3"]))
        last = f"{name}_3"
    for key, value in (("from", 0), ("to", 3), ("axis", 1)):
        heavy.graph.initializer.append(onnx.helper.make_tensor(key, onnx.TensorProto.INT64, [1], [value]))
    heavy.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
    onnx.save(heavy, tmp_path / "heavy.onnx")
    words = ("--runs", "12", "--warmup", "1")
    slower = run("bench", tmp_path / "heavy.onnx", *words, "--baseline", model)
    assert slower.exit_code == 3, slower.output
    assert last_line(slower).startswith(f"edgeship: slower than the baseline: {tmp_path / 'heavy.onnx'}: +")
    faster = run("bench", model, *words, "--baseline", tmp_path / "heavy.onnx", "--json")
    assert faster.exit_code == 0
    facts = json.loads(faster.stdout)
    assert list(facts["models"]) == [(tmp_path / "heavy.onnx").as_posix(), model.as_posix()]
    assert facts["regression"][model.as_posix()]["decision"] == "within"


def test_bench_sweeps_threads_and_profiles_operators(model: Path) -> None:
    result = run("bench", model, "--runs", "6", "--warmup", "0", "--threads", "1,2", "--profile", "--json")
    facts = json.loads(result.stdout)["models"][model.as_posix()]
    assert facts["threads"] == 1
    assert list(facts["sweep"]) == ["2"]
    assert facts["sweep"]["2"]["threads"] == 2
    assert {"name", "operator", "us"} == set(facts["profile"][0])
    assert run("bench", model, "--threads", "0").exit_code == 2
    assert run("bench", model, "--device", "nonsense").exit_code == 2
    assert run("bench", model, "--device", "ssh://nobody@localhost:1", "--profile").exit_code == 2


@pytest.mark.parametrize("command", ["simplify", "convert", "quantize", "inspect", "bench", "evaluate"])
@pytest.mark.parametrize("content", [b"", b"\x00" * 64, b"not a model at all, but some text"])
def test_a_file_that_is_no_model_is_one_sentence_and_nothing_is_written(
    tmp_path: Path, tiny_data: Path, command: str, content: bytes
) -> None:
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(content)
    more: dict[str, list[str | Path]] = {
        "simplify": ["-o", tmp_path / "out.onnx"],
        "convert": ["-o", tmp_path / "out.onnx", "--target", "onnxruntime"],
        "quantize": ["-o", tmp_path / "out.onnx", "--data", tiny_data],
        "evaluate": ["--data", tiny_data],
        "bench": ["--runs", "1"],
    }
    result = run(command, broken, *more.get(command, []))
    assert result.exit_code in (1, 2)
    assert last_line(result).startswith("edgeship: ")
    assert "unexpected" not in last_line(result)
    assert [path.name for path in tmp_path.iterdir()] == ["broken.onnx"]


def test_an_output_that_is_the_input_or_a_folder_is_refused(tmp_path: Path, model: Path) -> None:
    before = model.read_bytes()
    for out in (model, tmp_path, tmp_path / "none" / "out.onnx", Path("/dev/null")):
        assert run("simplify", model, "-o", out).exit_code == 2
    assert model.read_bytes() == before


def test_a_reader_that_goes_away_is_no_crash() -> None:
    command = f"{sys.executable} -m edgeship.pipeline.cli doctor | head -c 1"
    result = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=120, check=False)
    assert "Traceback" not in result.stderr
    assert "Exception ignored" not in result.stderr


HALF_MADE = """
import click
from edgeship.pipeline.cli import cli

class Half:
    def __init__(self):
        raise KeyboardInterrupt

    def __del__(self):
        self.missing.close()

cli.add_command(click.Command("half", callback=lambda: Half()))
cli(["half"])
"""


def test_an_interrupt_inside_a_constructor_says_no_more_than_any_other() -> None:
    done = subprocess.run([sys.executable, "-c", HALF_MADE], capture_output=True, text=True, check=False)
    assert done.returncode == 130, done.stderr
    assert done.stderr.strip() == "edgeship: interrupted; what was finished before is kept, nothing is half-written"
