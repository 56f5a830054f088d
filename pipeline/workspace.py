"""Returns a run folder in which every stage's folder is either the old one or the new one, whenever the process dies.

A stage writes to `.edgeship/tmp-<stage>`; when it returns, every file is flushed to disk and the folder takes its place
in one rename. A folder that is there already is first moved to `.edgeship/old-<stage>`; whoever opens the run folder
next puts it back if the process died between the two renames. What a folder holds is recorded in
`.edgeship/<stage>.json`, outside the folder, so that a release can be copied as it is.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edgeship.calibration.errors import InputError, StageError
from edgeship.pipeline.stage import ORDER

INTERNAL = ".edgeship"


@dataclass(frozen=True)
class Artifact:
    """A file a stage made: its path relative to the stage's folder, SHA-256 and size."""

    path: str
    sha256: str
    bytes: int


@dataclass(frozen=True)
class StageRecord:
    """What is known of a finished stage: the key its result is kept under, its files and how long it took."""

    name: str
    key: str
    outputs: tuple[Artifact, ...]
    seconds: float

    @property
    def digests(self) -> Mapping[str, str]:
        """SHA-256 of each output by path."""
        return {output.path: output.sha256 for output in self.outputs}


def stage_folder_name(stage: str) -> str:
    """`<place>-<name>`, the stage's folder inside a run folder."""
    return f"{ORDER.index(stage) + 1}-{stage}"


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def artifacts_of(folder: Path) -> tuple[Artifact, ...]:
    """Every file below `folder`, sorted by path."""
    files = sorted(path for path in folder.rglob("*") if not path.is_dir())
    return tuple(Artifact(path.relative_to(folder).as_posix(), sha256_of(path), path.stat().st_size) for path in files)


_OF_THE_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO}
"""What is nobody's mistake in a path."""


def write_atomically(path: Path, content: bytes | str) -> None:
    """Replaces `path` by `content` in one step: a reader and a killed writer see the old file or the new one.

    Raises InputError when the folder cannot be written to, or the path is taken by a folder or device; StageError when
    the disk is full, or fails.
    """
    if path.exists() and not path.is_file():
        raise InputError(f"cannot write {path}: it is no regular file")
    data = content.encode() if isinstance(content, str) else content
    temporary: str | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(0o666 & ~_umask())
        Path(temporary).replace(path)
        temporary = None
        _sync_folder(path.parent)
    except OSError as error:
        kind = StageError if error.errno in _OF_THE_DISK else InputError
        raise kind(f"cannot write {path}: {error.strerror}") from error
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):
                Path(temporary).unlink()


def write_json(path: Path, value: Any) -> None:
    """Writes `value` as indented JSON with sorted keys, atomically."""
    write_atomically(path, json.dumps(value, indent=2, sort_keys=True) + "\n")


class Workspace:
    """A run folder, held by one process at a time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.absolute()
        self.internal = self.folder / INTERNAL

    @contextlib.contextmanager
    def held(self) -> Iterator[Workspace]:
        """The workspace, locked and without leftovers of a killed run.

        Raises InputError when the folder cannot be written to or another process holds it.
        """
        from filelock import FileLock, Timeout

        try:
            self.internal.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.internal / "lock", timeout=0)
            lock.acquire()
        except Timeout:
            raise InputError(f"another run is using {self.folder}; wait for it, or give another --out") from None
        except OSError as error:
            raise InputError(f"the output folder {self.folder} cannot be written to: {error.strerror}") from error
        try:
            self._recover()
            yield self
        finally:
            lock.release()

    @property
    def cache(self) -> Path:
        """A folder for results that outlive a killed stage, by keys that say all they depend on."""
        return self.internal / "cache"

    def path(self, stage: str) -> Path:
        """The folder of a stage."""
        return self.folder / stage_folder_name(stage)

    def record(self, stage: str) -> StageRecord | None:
        """What was recorded when the stage last finished; None when it never did or the record cannot be read."""
        try:
            values = json.loads(self._record_path(stage).read_text())
            outputs = tuple(Artifact(**output) for output in values["outputs"])
            return StageRecord(values["name"], values["key"], outputs, values["seconds"])
        except (OSError, ValueError, TypeError, KeyError):
            return None

    def is_intact(self, record: StageRecord) -> bool:
        """Whether the stage's folder holds exactly the recorded files with the recorded content."""
        folder = self.path(record.name)
        return folder.is_dir() and artifacts_of(folder) == record.outputs

    def begin(self, stage: str) -> Path:
        """A new empty folder for the stage to write to."""
        folder = self._temporary(stage)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        return folder

    def kept(self, stage: str, key: str) -> Path:
        """A folder, not made yet, for what a stage wants to find again after it was killed."""
        return self.internal / f"kept-{stage}" / key[:16]

    def abandon(self, stage: str) -> None:
        """Removes what a failed stage has written so far."""
        shutil.rmtree(self._temporary(stage), ignore_errors=True)

    def remove(self, stage: str) -> None:
        """Removes a stage's finished folder and its record."""
        self._record_path(stage).unlink(missing_ok=True)
        if self.path(stage).exists():
            self.path(stage).rename(self._retired(stage))
            shutil.rmtree(self._retired(stage), ignore_errors=True)

    def commit(self, stage: str, key: str, seconds: float) -> StageRecord:
        """Puts what `begin` handed out in the stage's place, and records it under `key`."""
        folder, final, retired = self._temporary(stage), self.path(stage), self._retired(stage)
        _sync_tree(folder)
        record = StageRecord(stage, key, artifacts_of(folder), seconds)
        if final.exists():
            final.rename(retired)
        folder.rename(final)
        _sync_folder(self.folder)
        shutil.rmtree(retired, ignore_errors=True)
        write_json(self._record_path(stage), asdict(record))
        shutil.rmtree(self.internal / f"kept-{stage}", ignore_errors=True)
        return record

    def _recover(self) -> None:
        for stage in ORDER:
            retired = self._retired(stage)
            if retired.exists() and not self.path(stage).exists() and self._record_path(stage).exists():
                retired.rename(self.path(stage))
            shutil.rmtree(retired, ignore_errors=True)
            self.abandon(stage)
        reports = (self.folder.glob(name) for name in (".report.*", ".junit.*"))
        for leftover in itertools.chain(self.internal.glob(".*.json.*"), *reports):
            leftover.unlink(missing_ok=True)

    def _record_path(self, stage: str) -> Path:
        return self.internal / f"{stage}.json"

    def _temporary(self, stage: str) -> Path:
        return self.internal / f"tmp-{stage}"

    def _retired(self, stage: str) -> Path:
        return self.internal / f"old-{stage}"


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync_tree(folder: Path) -> None:
    for path in folder.rglob("*"):
        _sync_folder(path)
    _sync_folder(folder)


def _sync_folder(path: Path) -> None:
    """Flushes a file or folder to disk, so that a rename cannot overtake the content it makes visible."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
