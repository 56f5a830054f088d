"""Returns images of one folder as inputs, decoded a little ahead of their use by a small pool of threads."""

from __future__ import annotations

import hashlib
import io
import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

import numpy as np

from edgeship.calibration.errors import InputError
from edgeship.calibration.samples.file_tree import FileTree
from edgeship.calibration.samples.image_list import ImageFile
from edgeship.calibration.samples.preprocessing import Preprocessing
from edgeship.calibration.types import Array

if TYPE_CHECKING:
    from PIL import Image

_DECODERS = 2
_AHEAD = 4
_KEPT_BLOCKS = 4
"""Blocks of memory, each as large as a decoded image and at most 16 MB, that Pillow keeps for the next image. Getting
new ones from the system for every image took as long as decoding it."""
_END_OF_JPEG = b"\xff\xd9"


class ImageSource:
    """Image files under one folder."""

    def __init__(
        self, tree: FileTree, files: Sequence[ImageFile], preprocessing: Preprocessing, input_name: str
    ) -> None:
        _keep_memory()
        self._tree = tree
        self._preprocessing = preprocessing
        self._input_name = input_name
        self.names = [file.name for file in files]
        labels = [file.label for file in files if file.label is not None]
        self.labels = labels if len(labels) == len(files) else None
        self.input_names = (input_name,)

    def read(self, indices: Sequence[int]) -> Iterator[dict[str, Array]]:
        """The decoded images, each (1, C, H, W)."""
        for values in _ahead(self._decode, indices):
            yield {self._input_name: values}

    def digest(self, indices: Sequence[int]) -> Iterator[bytes]:
        """The files' contents and the preprocessing (the batch of its shape has no part in it).

        Raises InputError for a file that is no image, is cut short or has a size that does not fit: it costs next to
        nothing to see that here.
        """
        facts = asdict(self._preprocessing) | {"shape": self._preprocessing.shape[1:]}
        yield json.dumps(facts, sort_keys=True).encode()
        for index in indices:
            content = self._tree.read(self.names[index])
            with self._opened(index, content) as image:
                self._preprocessing.check_size(image.height, image.width)
                if not is_whole(image, content):
                    image.load()
            yield content

    def contents(self, indices: Sequence[int]) -> Iterator[bytes]:
        """SHA-256 of each file."""
        for index in indices:
            yield hashlib.sha256(self._tree.read(self.names[index])).digest()

    def _decode(self, index: int) -> Array:
        with self._opened(index, self._tree.read(self.names[index])) as image:
            image.load()
            return self._preprocessing.apply(image)[np.newaxis]

    @contextmanager
    def _opened(self, index: int, content: bytes) -> Iterator[Image.Image]:
        """The image, of which the header alone is read; what fails while it is open is told with the file's name."""
        import warnings

        from PIL import Image, UnidentifiedImageError

        where = PurePosixPath(self._tree.where, self.names[index])
        seen = f"{where} cannot be decoded as an image ({len(content)} bytes)"
        try:
            with warnings.catch_warnings(), Image.open(io.BytesIO(content)) as image:
                warnings.simplefilter("ignore")  # Pillow's remarks on odd but readable metadata
                yield image
        except InputError as error:
            raise InputError(f"{where}: {error}") from error
        except UnidentifiedImageError as error:
            raise InputError(f"{seen}: no known format") from error
        except MemoryError as error:
            raise InputError(f"{where} cannot be preprocessed: not enough memory") from error
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise InputError(f"{seen}: {error}") from error


def is_whole(image: Image.Image, content: bytes) -> bool:
    """Whether a file that has been opened as `image` ends as its format says; a PNG's checksums are looked at too.

    Nothing is decoded. False is no verdict: some files that are cut short can be decoded all the same.
    """
    if image.format == "JPEG":
        return content.rstrip(b"\0").endswith(_END_OF_JPEG)
    if image.format == "PNG":
        from PIL import Image

        try:
            with Image.open(io.BytesIO(content)) as again:  # an image that was verified cannot be loaded any more
                again.verify()
        except (OSError, SyntaxError, ValueError):
            return False
        return True
    if image.format == "WEBP":
        return len(content) >= int.from_bytes(content[4:8], "little") + 8
    return False


def _keep_memory() -> None:
    """Nothing; Pillow reuses memory, unless somebody (PILLOW_BLOCKS_MAX) said how much of it already."""
    from PIL.Image import core  # type: ignore[attr-defined]  # Pillow has no types for its block allocator

    if not core.get_blocks_max():
        core.set_blocks_max(_KEPT_BLOCKS)


def _ahead(work: Callable[[int], Array], items: Iterable[int]) -> Iterator[Array]:
    with ThreadPoolExecutor(_DECODERS, thread_name_prefix="decode") as pool:
        waiting: deque[Future[Array]] = deque()
        try:
            for item in items:
                waiting.append(pool.submit(work, item))
                if len(waiting) > _AHEAD:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
