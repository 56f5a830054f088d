"""A release folder is verified file by file: missing, changed and foreign files are all found."""

from __future__ import annotations

import hashlib
import json
import subprocess
from pathlib import Path

import pytest

from edgeship.calibration.errors import InputError
from edgeship.pipeline.releasing.verify import verify_release, write_sums


@pytest.fixture
def release(tmp_path: Path) -> Path:
    folder = tmp_path / "9-release"
    folder.mkdir()
    (folder / "model.onnx").write_bytes(b"model")
    artifacts = {"model.onnx": {"sha256": hashlib.sha256(b"model").hexdigest(), "bytes": 5}}
    (folder / "manifest.json").write_text(json.dumps({"artifacts": artifacts}))
    write_sums(folder)
    return folder


def rules(folder: Path) -> list[tuple[str, str]]:
    return [(finding.where, finding.rule) for finding in verify_release(folder)]


def test_an_untouched_release_is_whole(release: Path) -> None:
    assert verify_release(release) == []


def test_the_sums_are_those_of_coreutils(release: Path) -> None:
    subprocess.run(["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=release, capture_output=True, check=True)


@pytest.mark.parametrize("name", ["model.onnx", "manifest.json"])
def test_a_changed_file_is_found(release: Path, name: str) -> None:
    content = (release / name).read_bytes()
    (release / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert (name, "the file was changed") in rules(release)


@pytest.mark.parametrize("name", ["model.onnx", "manifest.json"])
def test_a_missing_file_is_found(release: Path, name: str) -> None:
    (release / name).unlink()
    assert (name, "the file is missing") in rules(release)


def test_a_foreign_file_is_found_even_in_a_subfolder(release: Path) -> None:
    (release / "sub").mkdir()
    (release / "sub" / "more.bin").write_text("x")
    assert rules(release) == [("sub/more.bin", "the file is not part of the release")]


@pytest.mark.parametrize("name", ["model.onnx", "manifest.json", "SHA256SUMS"])
@pytest.mark.parametrize("inside", [False, True])
def test_a_file_that_became_a_link_to_the_same_bytes_is_found(release: Path, name: str, inside: bool) -> None:
    place = (release if inside else release.parent) / "elsewhere"
    (release / name).rename(place)
    (release / name).symlink_to(place)
    found = [(name, "the file is a link")]
    assert rules(release) == found + [("elsewhere", "the file is not part of the release")] * inside


def test_a_link_to_nothing_is_a_link(release: Path) -> None:
    (release / "model.onnx").unlink()
    (release / "model.onnx").symlink_to("nowhere")
    (finding,) = verify_release(release)
    assert str(finding) == "model.onnx: the file is a link; seen: to nowhere; accepted: the file itself"


def test_a_release_may_be_reached_through_a_link(release: Path) -> None:
    (release.parent / "latest").symlink_to(release, target_is_directory=True)
    assert verify_release(release.parent / "latest") == []


def test_a_file_and_its_checksum_changed_together_contradict_the_manifest(release: Path) -> None:
    (release / "model.onnx").write_bytes(b"other")
    write_sums(release)
    assert rules(release) == [("model.onnx", "the manifest and SHA256SUMS do not agree")]


def test_a_file_added_to_the_checksums_is_unknown_to_the_manifest(release: Path) -> None:
    (release / "more.onnx").write_bytes(b"more")
    write_sums(release)
    assert rules(release) == [("more.onnx", "manifest.json does not know the file")]


@pytest.mark.parametrize("text", ["", "nonsense\n", f"{'0' * 64}  ../outside\n", f"{'0' * 64}  /etc/passwd\n"])
def test_damaged_checksums_are_an_input_error(release: Path, text: str) -> None:
    (release / "SHA256SUMS").write_text(text)
    with pytest.raises(InputError, match="SHA256SUMS"):
        verify_release(release)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"artifacts": 3}', '{"artifacts": {"model.onnx": 1}}'])
def test_a_manifest_that_says_nothing_is_a_finding(release: Path, text: str) -> None:
    (release / "manifest.json").write_text(text)
    write_sums(release)
    assert ("manifest.json", "cannot be read as a manifest") in rules(release)


def test_a_folder_that_is_no_release_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no release"):
        verify_release(tmp_path / "none")
    with pytest.raises(InputError, match=r"is no release: it has no SHA256SUMS$"):
        verify_release(tmp_path)
    (tmp_path / "9-release").mkdir()
    with pytest.raises(InputError, match=r"no SHA256SUMS; accepted: .*9-release, the release of this run"):
        verify_release(tmp_path)
