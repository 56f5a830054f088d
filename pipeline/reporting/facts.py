"""Returns values from JSON of any age and shape: what is absent, or not what it should be, is None or empty."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any


class Facts:
    """An object of a JSON document; a path of keys that leads nowhere gives None, or no facts."""

    def __init__(self, value: Any = None) -> None:
        self._values: Mapping[str, Any] = value if isinstance(value, Mapping) else {}

    def __bool__(self) -> bool:
        return bool(self._values)

    def raw(self, *path: str) -> Any:
        """Whatever is there."""
        value: Any = self._values
        for key in path:
            value = value.get(key) if isinstance(value, Mapping) else None
        return value

    def at(self, *path: str) -> Facts:
        """The object there."""
        return Facts(self.raw(*path))

    def number(self, *path: str) -> float | None:
        """The finite number there."""
        value = self.raw(*path)
        is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        return float(value) if is_number else None

    def text(self, *path: str) -> str | None:
        """The text there, unless it is empty."""
        value = self.raw(*path)
        return value if isinstance(value, str) and value else None

    def flag(self, *path: str) -> bool:
        """Whether there is a true there."""
        return self.raw(*path) is True

    def numbers(self, *path: str) -> list[float]:
        """The finite numbers of the list there."""
        value = self.raw(*path)
        return [float(n) for n in value if Facts({"n": n}).number("n") is not None] if isinstance(value, list) else []

    def pair(self, *path: str) -> tuple[float, float] | None:
        """The two numbers there, as of an interval."""
        values = self.numbers(*path)
        return (values[0], values[1]) if len(values) == 2 else None

    def texts(self, *path: str) -> list[str]:
        """The texts of the list there."""
        value = self.raw(*path)
        return [each for each in value if isinstance(each, str)] if isinstance(value, list) else []

    def objects(self, *path: str) -> list[Facts]:
        """The objects of the list there."""
        value = self.raw(*path)
        return [Facts(each) for each in value if isinstance(each, Mapping)] if isinstance(value, list) else []

    def items(self, *path: str) -> Iterator[tuple[str, Facts]]:
        """The objects of the object there, by name, in the document's order."""
        value = self.raw(*path)
        if isinstance(value, Mapping):
            for name, each in value.items():
                if isinstance(each, Mapping):
                    yield str(name), Facts(each)
