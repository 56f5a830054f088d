"""Returns the files under a folder, on disk or inside a .zip, alike; nothing is extracted."""

from __future__ import annotations

import os
import threading
import zipfile
import zlib
from collections.abc import Iterator
from functools import cached_property, lru_cache
from pathlib import Path, PurePosixPath
from typing import Protocol

from edgeship.calibration.errors import InputError


class FileTree(Protocol):
    """A read-only folder; files are named by their path inside, with forward slashes."""

    @property
    def where(self) -> str:
        """How a person would address the folder."""

    def files(self) -> list[str]:
        """All files below, sorted, without hidden ones."""

    def has(self, name: str) -> bool:
        """Whether the file is there."""

    def read(self, name: str) -> bytes:
        """The file's content; safe to call from several threads. Raises InputError."""


class DiskTree:
    """A folder on disk."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def where(self) -> str:
        """The folder's path."""
        return str(self.folder)

    def files(self) -> list[str]:
        """All files below, sorted, without hidden ones; links to folders are followed, but not in circles."""
        try:
            return sorted(_below(self.folder, PurePosixPath(), frozenset()))
        except OSError as error:
            raise InputError(f"{error.filename or self.folder} cannot be read: {error.strerror}") from error

    def has(self, name: str) -> bool:
        """Whether the file is there."""
        return (self.folder / name).is_file()

    def read(self, name: str) -> bytes:
        """The file's content."""
        path = self.folder / name
        try:
            if path.exists() and not path.is_file():
                raise InputError(f"{path} is no regular file")  # reading a pipe would wait for its writer
            return path.read_bytes()
        except OSError as error:
            raise InputError(f"{path} cannot be read: {error.strerror}") from error


def _below(folder: Path, inside: PurePosixPath, above: frozenset[str]) -> Iterator[str]:
    """The files below `inside` of a folder, named by their path in it.

    None where that is one of the folders `above`, which a link leads back to.
    """
    real = os.path.realpath(folder / inside)
    if real in above:
        return
    prefix = "" if not inside.parts else f"{inside}/"
    with os.scandir(folder / inside) as entries:
        for entry in entries:
            if _hidden(entry.name):
                continue
            if entry.is_dir():
                yield from _below(folder, inside / entry.name, above | {real})
            else:
                yield prefix + entry.name


class _Archive:
    """An open .zip and its directory, read once."""

    def __init__(self, path: Path) -> None:
        self._zip = zipfile.ZipFile(path)
        self._lock = threading.Lock()
        self.names = tuple(self._zip.namelist())

    def read(self, name: str) -> bytes:
        """A member's content; one thread at a time."""
        with self._lock:
            return self._zip.read(name)


@lru_cache(maxsize=4)
def _opened(path: Path, _modified: int, _size: int) -> _Archive:
    """The archive as it is now: reading the directory of a large data set takes seconds, and a run needs it often."""
    return _Archive(path)


class ZipTree:
    """A folder inside a .zip, addressed as `archive.zip/inner/folder`."""

    def __init__(self, archive: Path, inner: PurePosixPath) -> None:
        self.archive = archive
        self.prefix = "" if str(inner) == "." else f"{inner}/"

    @property
    def where(self) -> str:
        """The address inside the archive."""
        return f"{self.archive}/{self.prefix}".rstrip("/")

    @cached_property
    def _archive(self) -> _Archive:
        try:
            state = self.archive.stat()
            return _opened(self.archive, state.st_mtime_ns, state.st_size)
        except (zipfile.BadZipFile, OSError, ValueError) as error:
            raise InputError(f"{self.archive} cannot be read as a .zip: {error}") from error

    @cached_property
    def _names(self) -> frozenset[str]:
        names = (
            name.removeprefix(self.prefix)
            for name in self._archive.names
            if name.startswith(self.prefix) and not name.endswith("/")
        )
        return frozenset(name for name in names if not any(_hidden(part) for part in name.split("/")))

    def files(self) -> list[str]:
        """All files below, sorted, without hidden ones."""
        return sorted(self._names)

    def has(self, name: str) -> bool:
        """Whether the file is there."""
        return str(PurePosixPath(name)) in self._names

    def read(self, name: str) -> bytes:
        """The file's content, decompressed in memory."""
        try:
            return self._archive.read(f"{self.prefix}{PurePosixPath(name)}")
        except (
            KeyError,
            zipfile.BadZipFile,
            zlib.error,
            EOFError,
            RuntimeError,
            NotImplementedError,
            OSError,
        ) as error:
            raise InputError(f"{self.where}/{name} cannot be read: {error}") from error


def open_tree(path: Path) -> FileTree | None:
    """The folder at `path`, on disk or in an archive that is a part of the path; None when there is no such folder."""
    if path.is_dir():
        return DiskTree(path)
    for archive in (path, *path.parents):
        if archive.suffix.lower() == ".zip" and archive.is_file():
            tree = ZipTree(archive, PurePosixPath(path.relative_to(archive).as_posix()))
            return tree if tree.files() else None
    return None


def _hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"
