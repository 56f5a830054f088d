"""The loop runs what is not up to date, and turns any failure into one sentence that names the stage."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from edgeship.calibration.errors import GateError, InputError, StageError
from edgeship.pipeline.flow import Flow, Silent, Span, StageResult
from edgeship.pipeline.recipe import Recipe, load_recipe
from edgeship.pipeline.stage import Stage, StageContext
from edgeship.pipeline.workspace import Workspace


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    path = tmp_path / "recipe.toml"
    path.write_text('name = "tiny"\nmodel.source = "model.onnx"\n[targets.onnxruntime]\n')
    return load_recipe(path)


@pytest.fixture
def workspace(tmp_path: Path) -> Iterator[Workspace]:
    with Workspace(tmp_path / "run").held() as held:
        yield held


class Chain:
    """Three stages that each append their name to what the one before wrote."""

    def __init__(self, source: Path) -> None:
        self.source = source
        self.ran: list[str] = []
        self.settings: dict[str, Any] = {}
        self.fail: dict[str, Callable[[], None]] = {}
        source.write_text("source")

    def _stage(self, name: str, needs: Sequence[str]) -> Stage:
        def run(context: StageContext) -> None:
            self.ran.append(name)
            before = (context.inputs[needs[0]] / "out").read_text() if needs else self.source.read_text()
            (context.folder / "out").write_text(f"{before}>{name}{self.settings.get(name, '')}")
            context.progress(1, 2, "steps")
            if name in self.fail:
                self.fail[name]()

        return Stage(
            name=name,
            needs=tuple(needs),
            settings=lambda _recipe, _targets: self.settings.get(name),
            run=run,
            files=lambda _: () if needs else (self.source,),
        )

    @property
    def stages(self) -> list[Stage]:
        return [self._stage("export", ()), self._stage("simplify", ("export",)), self._stage("parity", ("simplify",))]


@pytest.fixture
def chain(tmp_path: Path) -> Chain:
    return Chain(tmp_path / "source.txt")


def go(chain: Chain, recipe: Recipe, workspace: Workspace, span: Span | None = None) -> list[StageResult]:
    chain.ran.clear()
    return Flow(recipe, workspace, ["onnxruntime"], span or Span(), Silent(), chain.stages).run()


def test_stages_run_in_order_on_each_others_outputs(chain: Chain, recipe: Recipe, workspace: Workspace) -> None:
    results = go(chain, recipe, workspace)
    assert [result.name for result in results] == ["export", "simplify", "parity"]
    assert (workspace.path("parity") / "out").read_text() == "source>export>simplify>parity"
    assert not any(result.cached for result in results)


def test_a_second_run_does_nothing(chain: Chain, recipe: Recipe, workspace: Workspace) -> None:
    first = go(chain, recipe, workspace)
    second = go(chain, recipe, workspace)
    assert chain.ran == []
    assert all(result.cached for result in second)
    assert [r.outputs for r in first] == [r.outputs for r in second]


def test_a_changed_input_file_runs_everything_again(chain: Chain, recipe: Recipe, workspace: Workspace) -> None:
    go(chain, recipe, workspace)
    chain.source.write_text("other")
    go(chain, recipe, workspace)
    assert chain.ran == ["export", "simplify", "parity"]


def test_a_changed_setting_runs_its_stage_and_what_needs_it(chain: Chain, recipe: Recipe, workspace: Workspace) -> None:
    go(chain, recipe, workspace)
    chain.settings["simplify"] = "!"
    go(chain, recipe, workspace)
    assert chain.ran == ["simplify", "parity"]


def test_a_stage_with_the_same_outcome_stops_the_avalanche(chain: Chain, recipe: Recipe, workspace: Workspace) -> None:
    go(chain, recipe, workspace)
    go(chain, recipe, workspace, Span(start="simplify", stop="simplify"))
    assert chain.ran == ["simplify"]
    go(chain, recipe, workspace)
    assert chain.ran == []


def test_a_tampered_output_is_made_again(chain: Chain, recipe: Recipe, workspace: Workspace) -> None:
    go(chain, recipe, workspace)
    (workspace.path("simplify") / "out").write_text("tampered")
    go(chain, recipe, workspace)
    assert chain.ran == ["simplify"]
    assert (workspace.path("simplify") / "out").read_text() == "source>export>simplify"


def test_changed_code_or_libraries_run_everything_again(
    chain: Chain, recipe: Recipe, workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    go(chain, recipe, workspace)
    monkeypatch.setattr("edgeship.pipeline.flow.code_digest", lambda: "other code")
    go(chain, recipe, workspace)
    assert len(chain.ran) == 3
    monkeypatch.setattr("edgeship.pipeline.flow.library_versions", lambda: {"onnx": "0"})
    go(chain, recipe, workspace)
    assert len(chain.ran) == 3


@pytest.mark.parametrize(
    ("span", "expected"),
    [
        (Span(start="simplify"), ["simplify", "parity"]),
        (Span(start="simplify", stop="simplify"), ["simplify"]),
        (Span(force=True), ["export", "simplify", "parity"]),
        (Span(stop="simplify", force=True), ["export", "simplify"]),
        (Span(stop="release"), []),
    ],
)
def test_from_to_and_force_choose_what_runs_again(
    chain: Chain, recipe: Recipe, workspace: Workspace, span: Span, expected: list[str]
) -> None:
    go(chain, recipe, workspace)
    go(chain, recipe, workspace, span)
    assert chain.ran == expected


def test_from_in_an_empty_folder_runs_what_is_missing(chain: Chain, recipe: Recipe, workspace: Workspace) -> None:
    go(chain, recipe, workspace, Span(start="parity"))
    assert chain.ran == ["export", "simplify", "parity"]


def test_a_span_that_makes_no_sense_is_refused() -> None:
    with pytest.raises(InputError, match="no such stage; there are: compress, export"):
        Span(start="exprot")
    with pytest.raises(InputError, match="--from parity comes after --to export"):
        Span(start="parity", stop="export")


def raises(error: BaseException) -> Callable[[], None]:
    def fail() -> None:
        raise error

    return fail


def test_an_unforeseen_exception_becomes_one_sentence_with_the_stage(
    chain: Chain, recipe: Recipe, workspace: Workspace
) -> None:
    chain.fail["simplify"] = raises(ValueError("bad value\nwith a long story"))
    with pytest.raises(StageError, match=r"^simplify failed: ValueError: bad value$") as caught:
        go(chain, recipe, workspace)
    assert isinstance(caught.value.__cause__, ValueError)


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt(), StageError("told"), MemoryError()])
def test_a_failed_stage_leaves_the_old_result_and_nothing_half_written(
    chain: Chain, recipe: Recipe, workspace: Workspace, error: BaseException
) -> None:
    go(chain, recipe, workspace)
    chain.source.write_text("other")
    chain.fail["simplify"] = raises(error)
    with pytest.raises((StageError, KeyboardInterrupt)):
        go(chain, recipe, workspace)
    assert (workspace.path("export") / "out").read_text() == "other>export"
    assert (workspace.path("simplify") / "out").read_text() == "source>export>simplify"
    assert not list((workspace.folder / ".edgeship").glob("tmp-*"))
    chain.fail.clear()
    go(chain, recipe, workspace)
    assert chain.ran == ["simplify", "parity"]


def test_a_gate_that_is_not_met_removes_the_release_of_an_earlier_run(
    chain: Chain, recipe: Recipe, workspace: Workspace
) -> None:
    go(chain, recipe, workspace)
    chain.source.write_text("other")
    chain.fail["parity"] = raises(GateError("too far"))
    with pytest.raises(GateError):
        go(chain, recipe, workspace)
    assert not workspace.path("parity").exists()
    assert workspace.path("simplify").exists()


def test_a_missing_input_file_is_an_input_error(chain: Chain, recipe: Recipe, workspace: Workspace) -> None:
    chain.source.unlink()
    with pytest.raises(InputError, match="export: there is no file"):
        go(chain, recipe, workspace)


def test_the_stages_there_are_come_in_the_agreed_order() -> None:
    from edgeship.pipeline.flow import STAGES, load_stages

    stages = load_stages()
    assert tuple(stage.name for stage in stages) == STAGES
    for place, stage in enumerate(stages):
        assert set(stage.needs) <= set(STAGES[:place])
