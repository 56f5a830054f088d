"""Returns the types of a recipe's fields that TOML has none for: each with what it accepts, and its JSON Schema."""

from __future__ import annotations

import math
import re
from typing import Annotated, Any

from pydantic import Field, PlainSerializer, PlainValidator, WithJsonSchema

NAME = "[A-Za-z0-9][A-Za-z0-9._-]{0,99}"


def _shape(value: object) -> tuple[int | str, ...]:
    accepted = 'a list of positive integers, batch first; the batch may be "dynamic", such as [1, 3, 224, 224]'
    if not isinstance(value, list | tuple) or not value:
        raise ValueError(accepted)
    batch, *rest = value
    if not (batch == "dynamic" or _is_positive(batch)) or not all(_is_positive(size) for size in rest):
        raise ValueError(accepted)
    return tuple(value)


def _size(value: object) -> int | tuple[int, int]:
    if _is_positive(value):
        return value  # type: ignore[return-value]  # checked by _is_positive
    if isinstance(value, list | tuple) and len(value) == 2 and all(_is_positive(side) for side in value):
        return (value[0], value[1])
    raise ValueError("a positive integer, or [height, width]")


def _name(value: object) -> str:
    if not isinstance(value, str) or not re.fullmatch(NAME, value):
        raise ValueError("at most 100 letters (a-z), digits, '.', '_' and '-', the first a letter or digit")
    return value


def _per_channel(value: object) -> tuple[float, ...]:
    items: list[Any] = list(value) if isinstance(value, list | tuple) else [value]
    if not items or not all(_is_finite(item) for item in items):
        raise ValueError("a finite number, or one number per channel, in pixel units (0..255)")
    return tuple(float(item) for item in items)


def _range(value: object) -> tuple[float, float]:
    accepted = "[low, high], finite, with low <= 0 <= high and low < high: zero must be representable"
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise ValueError(accepted)
    if not all(_is_finite(end) for end in value):
        raise ValueError(accepted)
    if not value[0] <= 0 <= value[1] or value[0] == value[1]:
        raise ValueError(accepted)
    return float(value[0]), float(value[1])


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_positive(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


_POSITIVE = {"type": "integer", "exclusiveMinimum": 0}
Shape = Annotated[
    tuple[int | str, ...],
    PlainValidator(_shape),
    PlainSerializer(_plain),
    WithJsonSchema({"type": "array", "items": {"anyOf": [_POSITIVE, {"const": "dynamic"}]}}),
]
Size = Annotated[
    int | tuple[int, int],
    PlainValidator(_size),
    PlainSerializer(_plain),
    WithJsonSchema({"anyOf": [_POSITIVE, {"type": "array", "items": _POSITIVE, "minItems": 2, "maxItems": 2}]}),
]
Name = Annotated[str, PlainValidator(_name), WithJsonSchema({"type": "string", "pattern": f"^{NAME}$"})]
Place = Annotated[str, Field(min_length=1)]
PerChannel = Annotated[
    tuple[float, ...],
    PlainValidator(_per_channel),
    PlainSerializer(_plain),
    WithJsonSchema({"anyOf": [{"type": "number"}, {"type": "array", "items": {"type": "number"}}]}),
]

Range = Annotated[
    tuple[float, float],
    PlainValidator(_range),
    PlainSerializer(_plain),
    WithJsonSchema({"type": "array", "items": {"type": "number"}, "minItems": 2, "maxItems": 2}),
]


NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
