"""A run folder holds old or new stages, never half of one."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edgeship.calibration.errors import InputError, StageError
from edgeship.pipeline.workspace import INTERNAL, Workspace, artifacts_of, sha256_of, write_atomically


def finish(workspace: Workspace, content: str, key: str = "k") -> None:
    folder = workspace.begin("export")
    (folder / "model.onnx").write_text(content)
    (folder / "deep").mkdir(exist_ok=True)
    (folder / "deep" / "golden.npz").write_text("g")
    workspace.commit("export", key, 0.5)


def model_text(workspace: Workspace) -> str:
    return (workspace.path("export") / "model.onnx").read_text()


def test_a_committed_stage_is_recorded_with_its_files(tmp_path: Path) -> None:
    with Workspace(tmp_path).held() as workspace:
        finish(workspace, "one")
        record = workspace.record("export")
        assert record is not None
        assert workspace.path("export") == tmp_path / "2-export"
        assert [output.path for output in record.outputs] == ["deep/golden.npz", "model.onnx"]
        assert record.digests["model.onnx"] == sha256_of(tmp_path / "2-export" / "model.onnx")
        assert workspace.is_intact(record)


def test_a_changed_missing_or_added_file_makes_a_stage_not_intact(tmp_path: Path) -> None:
    with Workspace(tmp_path).held() as workspace:
        finish(workspace, "one")
        record = workspace.record("export")
        assert record is not None
        model = workspace.path("export") / "model.onnx"
        model.write_text("two")
        assert not workspace.is_intact(record)
        model.unlink()
        assert not workspace.is_intact(record)
        model.write_text("one")
        assert workspace.is_intact(record)
        (workspace.path("export") / "more").write_text("")
        assert not workspace.is_intact(record)


def test_a_second_commit_replaces_the_first_completely(tmp_path: Path) -> None:
    with Workspace(tmp_path).held() as workspace:
        finish(workspace, "one")
        folder = workspace.begin("export")
        (folder / "model.onnx").write_text("two")
        workspace.commit("export", "k2", 0.1)
        assert [a.path for a in artifacts_of(workspace.path("export"))] == ["model.onnx"]
        assert model_text(workspace) == "two"


def test_what_a_killed_stage_left_is_swept_up(tmp_path: Path) -> None:
    with Workspace(tmp_path).held() as workspace:
        finish(workspace, "one")
        (workspace.begin("export") / "half").write_text("half")
    with Workspace(tmp_path).held() as workspace:
        assert model_text(workspace) == "one"
        assert not (tmp_path / INTERNAL / "tmp-export").exists()


def test_a_kill_between_the_two_renames_gives_the_old_stage_back(tmp_path: Path) -> None:
    with Workspace(tmp_path).held() as workspace:
        finish(workspace, "one")
        (workspace.begin("export") / "model.onnx").write_text("two")
        workspace.path("export").rename(tmp_path / INTERNAL / "old-export")
    with Workspace(tmp_path).held() as workspace:
        assert model_text(workspace) == "one"
        record = workspace.record("export")
        assert record is not None
        assert workspace.is_intact(record)


def test_a_kill_after_the_renames_and_before_the_record_makes_the_stage_run_again(tmp_path: Path) -> None:
    with Workspace(tmp_path).held() as workspace:
        finish(workspace, "one")
        before = (tmp_path / INTERNAL / "export.json").read_text()
        finish(workspace, "two")
        (tmp_path / INTERNAL / "export.json").write_text(before)
    with Workspace(tmp_path).held() as workspace:
        record = workspace.record("export")
        assert record is not None
        assert not workspace.is_intact(record)


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"name": "export"}', '{"outputs": [{"x": 1}]}'])
def test_a_damaged_record_counts_as_none(tmp_path: Path, damage: str) -> None:
    with Workspace(tmp_path).held() as workspace:
        finish(workspace, "one")
        (tmp_path / INTERNAL / "export.json").write_text(damage)
        assert workspace.record("export") is None


class KilledError(BaseException):
    """Stands for a SIGKILL: nothing catches it."""


@pytest.mark.parametrize("survives", range(12))
def test_a_kill_at_any_step_of_a_commit_leaves_the_old_or_the_new_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, survives: int
) -> None:
    with Workspace(tmp_path).held() as workspace:
        finish(workspace, "one")
    steps = iter(range(1000))

    def killed_after(call: Callable[..., Any]) -> Callable[..., Any]:
        def step(*args: Any, **kwargs: Any) -> Any:
            if next(steps) >= survives:
                raise KilledError
            return call(*args, **kwargs)

        return step

    with monkeypatch.context() as patch:
        for owner, name in ((Path, "rename"), (Path, "replace"), (os, "fsync"), (shutil, "rmtree")):
            patch.setattr(owner, name, killed_after(getattr(owner, name)))
        with contextlib.suppress(KilledError), Workspace(tmp_path).held() as workspace:
            finish(workspace, "two", key="k2")
    with Workspace(tmp_path).held() as workspace:
        record = workspace.record("export")
        assert record is not None
        text = model_text(workspace)
        assert text in ("one", "two")
        assert workspace.is_intact(record) == (text == ("one" if record.key == "k" else "two"))
        finish(workspace, "three")
        assert model_text(workspace) == "three"
        assert sorted(path.name for path in (tmp_path / INTERNAL).iterdir()) == ["export.json", "lock"]


def test_removing_a_stage_leaves_neither_folder_nor_record(tmp_path: Path) -> None:
    with Workspace(tmp_path).held() as workspace:
        finish(workspace, "one")
        workspace.remove("export")
        workspace.remove("release")
        assert not workspace.path("export").exists()
        assert workspace.record("export") is None


def _try_to_hold(folder: str, answers: multiprocessing.Queue[str]) -> None:
    try:
        with Workspace(Path(folder)).held():
            answers.put("held")
    except InputError as error:
        answers.put(str(error))


def test_two_runs_cannot_hold_one_folder(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    with Workspace(tmp_path).held():
        other = context.Process(target=_try_to_hold, args=(str(tmp_path), answers))
        other.start()
        assert answers.get(timeout=240).startswith("another run is using")
        other.join(240)
    with Workspace(tmp_path).held():
        pass


def test_a_folder_that_cannot_be_made_is_an_input_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written to"), Workspace(tmp_path / "file" / "run").held():
        pass


def test_an_atomic_write_replaces_or_leaves_alone(tmp_path: Path) -> None:
    path = tmp_path / "sub" / "report.json"
    write_atomically(path, "one")
    write_atomically(path, b"two")
    assert path.read_text() == "two"
    assert [p.name for p in path.parent.iterdir()] == ["report.json"]
    shutil.rmtree(path.parent)
    path.parent.write_text("a file where a folder should be")
    with pytest.raises(InputError, match="cannot write"):
        write_atomically(path, "three")


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "report.json"
    write_atomically(path, "old")

    def no_space(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", no_space)
    with pytest.raises(StageError, match=r"cannot write .*No space left"):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["report.json"]


def test_records_are_json_without_absolute_paths(tmp_path: Path) -> None:
    with Workspace(tmp_path).held() as workspace:
        finish(workspace, "one")
    text = (tmp_path / INTERNAL / "export.json").read_text()
    assert json.loads(text)["name"] == "export"
    assert str(tmp_path) not in text
