"""Values of annotation files, which are often written as other types: numbers as text, flags as words."""

from __future__ import annotations

import math
from typing import Any

_LARGEST = 2**63 - 1  # what a tensor holds


def as_number(value: Any, what: str) -> float:
    """A finite number, also one written as text.

    Raises:
        ValueError: it is none; the message says what and which value it has.
    """
    if isinstance(value, int | float | str) and not isinstance(value, bool):
        try:
            number = float(value)
        except (ValueError, OverflowError):
            number = math.nan
        if math.isfinite(number):
            return number
    raise ValueError(f"{what} is {value!r}, which is no finite number")


def as_integer(value: Any, what: str, least: int | None = None) -> int:
    """A whole number, also one written as 3.0 or as text.

    Raises:
        ValueError: it is none, or below ``least``.
    """
    try:
        number = int(value) if isinstance(value, str) else value  # text first: floats lose digits above 2**53
    except ValueError:
        number = as_number(value, what)
    if isinstance(number, bool) or not isinstance(number, int):
        number = as_number(number, what)
    if number != int(number) or abs(number) > _LARGEST:
        raise ValueError(f"{what} is {value!r}, which is no whole number of at most 64 bits")
    if least is not None and number < least:
        raise ValueError(f"{what} is {value!r}, which is below {least}")
    return int(number)


def as_flag(value: Any, what: str) -> bool:
    """A flag: true or false, 1 or 0, also as text. It is never taken by whether the value is empty.

    Raises:
        ValueError: it is none of these.
    """
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value.strip().lower() in ("true", "false"):
        return value.strip().lower() == "true"
    try:
        number = as_number(value, what)
    except ValueError:
        number = math.nan
    if number not in (0, 1):
        raise ValueError(f"{what} is {value!r}, which is neither 0 nor 1")
    return number == 1


def as_text(value: Any, what: str) -> str:
    """Text that is not empty; a whole number is written as one.

    Raises:
        ValueError: it is neither.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{what} is {value!r}, which is no name")
    return value
