"""Returns a photograph as the tensor a model expects.

value = (pixel - mean) / std, in pixel units (0..255), after a resize and a centre crop.

The resize is Pillow's, which is antialiased and what torchvision uses; or bilinear without antialiasing, as OpenCV's
INTER_LINEAR and tf.image.resize: of n pixels made from m, number i lies at m (i + 1/2) / n - 1/2 among them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from edgeship.calibration.errors import InputError
from edgeship.calibration.types import Array

if TYPE_CHECKING:
    from PIL import Image

Color = Literal["rgb", "bgr", "gray"]
Interpolation = Literal["bilinear", "bicubic", "lanczos", "nearest"]
Size = int | tuple[int, int] | None
PREFIX = "edgeship.preprocessing."
_FIELDS = ("shape", "mean", "std", "resize", "crop", "color", "interpolation", "antialias")


@dataclass(frozen=True)
class Preprocessing:
    """How an image file becomes an input.

    `shape` is the input's: (N, C, H, W), or (N, H, W, C) where only the last side fits `color`; N plays no part here
    (-1 for a dynamic batch), and a height or width of -1 takes any. `mean` and `std` are in pixel units, one value or
    one per channel in the order of `color`. `resize`: the short side as an int (the long one follows, rounded down, as
    torchvision does) or (height, width). `crop`: a centred square or (height, width). `resize` comes first, by
    `interpolation`; without `antialias` that is bilinear.
    """

    shape: tuple[int, int, int, int]
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    resize: Size = None
    crop: Size = None
    color: Color = "rgb"
    interpolation: Interpolation = "bilinear"
    antialias: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(self.shape))
        object.__setattr__(self, "mean", tuple(float(value) for value in self.mean))
        object.__setattr__(self, "std", tuple(float(value) for value in self.std))
        for name in ("resize", "crop"):
            object.__setattr__(self, name, _size(name, getattr(self, name)))
        self._check()

    def _check(self) -> None:
        if len(self.shape) != 4 or any(side < 1 and side != -1 for side in self.shape[1:]):
            raise InputError(
                f"an image input has the shape (N, C, H, W) or (N, H, W, C) with positive sides; seen: {self.shape}"
            )
        if self.color not in ("rgb", "bgr", "gray"):
            raise InputError(f"color is {self.color!r}; accepted: rgb, bgr, gray")
        if self.interpolation not in get_args(Interpolation):
            raise InputError(f"interpolation is {self.interpolation!r}; accepted: {', '.join(get_args(Interpolation))}")
        if not self.antialias and self.interpolation != "bilinear":
            raise InputError(f'interpolation is "{self.interpolation}" without antialias; accepted without: bilinear')
        channels = channels_of(self.color)
        if channels not in (self.shape[1], self.shape[3]):
            raise InputError(
                f"color {self.color} gives {channels} channels, and the input's shape {self.shape} has them neither at "
                "place 1 (channels first) nor at place 3 (last); accepted: another color, or samples as arrays (.npz)"
            )
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) not in (1, channels) or not all(math.isfinite(value) for value in values):
                raise InputError(f"{name} is {values}; accepted: 1 or {channels} finite numbers in pixel units")
        if any(value <= 0 for value in self.std):
            raise InputError(f"std is {self.std}; accepted: positive numbers in pixel units")

    @property
    def channels_last(self) -> bool:
        """Whether the input is (N, H, W, C)."""
        return self.shape[1] != channels_of(self.color)

    @property
    def axes(self) -> tuple[int, int, int]:
        """The axes of a batch that are not the channels'."""
        return (0, 1, 2) if self.channels_last else (0, 2, 3)

    def takes(self, shape: Sequence[int]) -> bool:
        """Whether arrays of this shape, batch first, fit the input's."""
        return len(shape) == 4 and all(want in (-1, side) for want, side in zip(self.shape[1:], shape[1:], strict=True))

    def apply(self, image: Image.Image) -> Array:
        """float32 of a PIL image of any mode and size, as `shape` has it but for N.

        Raises InputError unless it gets the input's size.
        """
        self.check_size(image.height, image.width)
        pixels = np.asarray(self._fit(_in_color(image, self.color)))
        pixels = pixels[..., np.newaxis] if pixels.ndim == 2 else pixels
        if self.color == "bgr":
            pixels = pixels[..., ::-1]
        pixels = pixels if self.channels_last else pixels.transpose(2, 0, 1)
        place = (1, 1, -1) if self.channels_last else (-1, 1, 1)
        mean, std = (np.asarray(values, np.float32).reshape(place) for values in (self.mean, self.std))
        values = np.ascontiguousarray(pixels).astype(np.float32)  # bytes are moved faster than floats
        values -= mean
        values /= std
        return values

    def check_size(self, height: int, width: int) -> None:
        """Raises InputError where an image of this size does not get the input's, or is smaller than the crop."""
        sides = (height, width) if self.resize is None else _resized(self.resize, height, width)
        if self.crop is not None:
            crop = _pair(self.crop)
            if crop[0] > sides[0] or crop[1] > sides[1]:
                raise InputError(
                    f"the crop {crop[0]} x {crop[1]} is larger than the image, {sides[0]} x {sides[1]}"
                    f"{'' if self.resize is None else f' (file: {height} x {width}, resize: {self.resize})'}"
                )
            sides = crop
        channels = channels_of(self.color)
        made = (*sides, channels) if self.channels_last else (channels, *sides)
        if any(want not in (-1, side) for want, side in zip(self.shape[1:], made, strict=True)):
            raise InputError(
                f"the image has the shape {made} after preprocessing (file: {height} x {width}, "
                f"resize: {self.resize}, crop: {self.crop}), the input needs {self.shape[1:]}"
            )

    def _fit(self, image: Image.Image) -> Image.Image:
        from PIL.Image import Resampling

        if self.resize is not None:
            height, width = _resized(self.resize, image.height, image.width)
            if (height, width) != (image.height, image.width):
                image = (
                    image.resize((width, height), Resampling[self.interpolation.upper()])
                    if self.antialias
                    else _linear(image, (height, width))
                )
        if self.crop is None:
            return image
        height, width = _pair(self.crop)
        top, left = round((image.height - height) / 2), round((image.width - width) / 2)
        return image.crop((left, top, left + width, top + height))

    def to_metadata(self) -> dict[str, str]:
        """The same facts as strings (JSON values), for a model's metadata."""
        return {f"{PREFIX}{name}": json.dumps(getattr(self, name)) for name in _FIELDS}

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str]) -> Preprocessing | None:
        """What `to_metadata` wrote, or None when the metadata tells nothing. Raises InputError when it is damaged."""
        found = {name: metadata[f"{PREFIX}{name}"] for name in _FIELDS if f"{PREFIX}{name}" in metadata}
        if not found:
            return None
        try:
            return cls(**{name: _from_json(text) for name, text in found.items()})
        except (ValueError, TypeError) as error:
            raise InputError(f"the model's metadata {PREFIX}* cannot be read: {error}; seen: {found}") from error


def channels_of(color: str) -> int:
    """How many channels an image of that color has."""
    return 1 if color == "gray" else 3


def _from_json(text: str) -> Any:
    value = json.loads(text)
    return tuple(value) if isinstance(value, list) else value


def _size(name: str, size: Any) -> Size:
    sides = (size,) if isinstance(size, int) else tuple(size) if size is not None else ()
    if any(not isinstance(side, int) or isinstance(side, bool) or side < 1 for side in sides) or len(sides) > 2:
        raise InputError(f"{name} is {size}; accepted: a positive number of pixels, or (height, width)")
    if size is None or isinstance(size, int):
        return size
    if len(sides) != 2:
        raise InputError(f"{name} is {size}; accepted: a positive number of pixels, or (height, width)")
    return (sides[0], sides[1])


def _resized(resize: int | tuple[int, int], height: int, width: int) -> tuple[int, int]:
    if not isinstance(resize, int):
        return resize
    if height <= width:
        return resize, max(1, resize * width // height)
    return max(1, resize * height // width), resize


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else size


def _linear(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The image in another size (height, width), each pixel from its two neighbours along each axis."""
    from PIL import Image

    values = np.asarray(image, np.float32)
    for axis, (count, there) in enumerate(zip(size, values.shape, strict=False)):
        place = np.clip((np.arange(count) + 0.5) * there / count - 0.5, 0, there - 1)
        first = np.floor(place).astype(int)
        share = (place - first).reshape([-1 if each == axis else 1 for each in range(values.ndim)])
        second = np.minimum(first + 1, there - 1)
        values = values.take(first, axis) * (1 - share) + values.take(second, axis) * share
    return Image.fromarray(np.rint(values).astype(np.uint8))


def _in_color(image: Image.Image, color: Color) -> Image.Image:
    mode = "L" if color == "gray" else "RGB"
    if image.mode == mode:
        return image
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # Pillow warns about any other way
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        raise InputError(f"the image has the pixel format {image.mode}; accepted: 8 bits per channel")
    return image.convert(mode)
