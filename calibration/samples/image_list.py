"""Returns which image files there are and which class each belongs to: from a folder, class folders, or a CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from edgeship.calibration.errors import InputError
from edgeship.calibration.samples.file_tree import DiskTree, FileTree, open_tree

SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})


@dataclass(frozen=True)
class ImageFile:
    """An image by its path inside a folder, and its class, if known."""

    name: str
    label: int | None = None


def list_folder(tree: FileTree, labels: Path | None) -> list[ImageFile]:
    """The images of a flat folder, or of class folders with the place of the folder's name in sorted order as label.

    A CSV of labels (file,label) replaces the folders' order; it names files by path in the folder, or by name alone.
    """
    names = [name for name in tree.files() if PurePosixPath(name).suffix.lower() in SUFFIXES]
    if not names:
        raise InputError(f"{tree.where} holds no images ({', '.join(sorted(SUFFIXES))})")
    if labels is not None:
        return _labelled(tree, names, labels)
    depths = {name.count("/") for name in names}
    if depths == {0}:
        return [ImageFile(name) for name in names]
    if depths == {1}:
        classes = sorted({name.split("/")[0] for name in names})
        place = {name: index for index, name in enumerate(classes)}
        return [ImageFile(name, place[name.split("/")[0]]) for name in names]
    if 0 in depths:
        nested = next(name for name in names if "/" in name)
        raise InputError(f"{tree.where} holds both images and folders of images ({nested}); accepted: one of the two")
    deep = next(name for name in names if name.count("/") > 1)
    raise InputError(
        f"{tree.where} holds images deeper than <class>/<image>: {deep}; give the folder of the class folders"
    )


def _labelled(tree: FileTree, names: Sequence[str], labels: Path) -> list[ImageFile]:
    rows = _rows(labels)
    if any(row.label is None for row in rows):
        raise InputError(f"{labels} has no column 'label'; accepted: a header file,label")
    label = {row.name: row.label for row in rows}
    files = [ImageFile(name, label.get(name, label.get(PurePosixPath(name).name))) for name in names]
    missing = [file.name for file in files if file.label is None]
    if missing:
        raise InputError(f"{labels} has no label for {_some(missing)} of {tree.where}")
    return files


def read_csv(path: Path, root: Path, labels: Path | None = None) -> tuple[FileTree, list[ImageFile]]:
    """The folder and the images that a CSV with the header file[,label] lists, in its order.

    Another CSV of labels (file,label) takes the place of its own. Raises InputError.
    """
    rows = _rows(path)
    tree = open_tree(root)
    if tree is None:
        raise InputError(f"{root}, where the files of {path} should lie, does not exist")
    outside = [
        row.name for row in rows if PurePosixPath(row.name).is_absolute() or ".." in PurePosixPath(row.name).parts
    ]
    if outside and not isinstance(tree, DiskTree):
        raise InputError(f"{path} names files outside {tree.where}: {_some(outside)}")
    missing = [row.name for row in rows if not tree.has(row.name)]
    if missing:
        raise InputError(f"{path} lists {len(missing)} files that are not in {tree.where}: {_some(missing)}")
    return tree, rows if labels is None else _labelled(tree, [row.name for row in rows], labels)


def _rows(path: Path) -> list[ImageFile]:
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not a text file in UTF-8: {error}") from error
    try:
        table = list(csv.reader(io.StringIO(text, newline=""), strict=True))
    except csv.Error as error:
        raise InputError(f"{path} is not a well-formed CSV: {error}") from error
    if not table:
        raise InputError(f"{path} is empty; accepted: a header with the column file, and label if known")
    header = [column.strip().lower() for column in table[0]]
    if "file" not in header:
        raise InputError(
            f"{path} begins with {','.join(header)[:80]!r}; accepted: a header with the column file, and label if known"
        )
    found = [_row(path, number, header, cells) for number, cells in enumerate(table[1:], 2) if any(cells)]
    repeated = sorted(_repeated(row.name for row in found))
    if repeated:
        raise InputError(f"{path} lists files twice: {_some(repeated)}")
    return found


def _row(path: Path, number: int, header: Sequence[str], cells: Sequence[str]) -> ImageFile:
    if len(cells) != len(header):
        raise InputError(f"{path}, line {number}: {len(cells)} columns, the header has {len(header)}")
    row = dict(zip(header, (cell.strip() for cell in cells), strict=True))
    if not row["file"] or "\0" in row["file"]:
        raise InputError(f"{path}, line {number}: the column file is empty or no path")
    file = ImageFile(row["file"])
    if "label" not in row:
        return file
    try:
        return replace(file, label=int(row["label"]))
    except ValueError as error:
        raise InputError(f"{path}, line {number}: the label is {row['label']!r}; accepted: a whole number") from error


def _repeated(names: Iterable[str]) -> set[str]:
    seen: set[str] = set()
    return {name for name in names if name in seen or seen.add(name)}  # type: ignore[func-returns-value]  # add returns None


def _some(names: Sequence[str], count: int = 5) -> str:
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")
