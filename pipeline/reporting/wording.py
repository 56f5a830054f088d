"""Returns numbers as a person says them; a dash for what is not known."""

from __future__ import annotations

from edgeship.pipeline import summary

UNKNOWN = "\N{EN DASH}"
MINUS = "\N{MINUS SIGN}"


def size(value: float | None) -> str:
    """Bytes with a unit."""
    return UNKNOWN if value is None else summary.size(round(value))


def milliseconds(value: float | None) -> str:
    """Milliseconds, or microseconds below a tenth."""
    return UNKNOWN if value is None else summary.milliseconds(value).replace(" us", " \N{MICRO SIGN}s")


def number(value: float | None, digits: int = 4) -> str:
    """A number with the digits that matter."""
    return UNKNOWN if value is None else f"{value:.{digits}g}".replace("-", MINUS)


def count(value: float | None) -> str:
    """A count with thousands apart."""
    return UNKNOWN if value is None else f"{round(value):,}"


def percent(value: float | None) -> str:
    """A figure that is a percentage already."""
    return UNKNOWN if value is None else f"{value:.2f} %"


def decibels(value: float | None) -> str:
    """A ratio in dB."""
    return UNKNOWN if value is None else f"{value:.1f} dB".replace("-", MINUS)


def share(value: float | None) -> str:
    """A share of 1 as a percentage, which says 100 only where it is all."""
    return UNKNOWN if value is None else summary.percent(value)


def signed(value: float | None) -> str:
    """A difference with its sign."""
    return UNKNOWN if value is None else f"{value:+.2f}".replace("-", MINUS)


def seconds(value: float | None) -> str:
    """Seconds, or minutes."""
    if value is None:
        return UNKNOWN
    return f"{value:.1f} s" if value < 60 else f"{value // 60:.0f} min {value % 60:.0f} s"


def plural(value: int, noun: str) -> str:
    """A count with its noun."""
    return f"{value:,} {noun}" + ("" if value == 1 else "s")
