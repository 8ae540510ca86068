"""Sizes in bytes, as people write and read them."""

from __future__ import annotations

import re

from glcan.errors import ConfigError

__all__ = ["format_bytes", "format_scaled", "parse_bytes"]

_UNITS = {
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "tib": 2**40,
}


def parse_bytes(size: str | int) -> int:
    """Bytes of a size such as "8GiB" (8 x 2^30), "8GB" (8 x 10^9), "512 MiB"; a whole number is bytes already.

    Raises:
        ConfigError: no number, no unit, an unknown unit, or not positive.
    """
    if isinstance(size, int) and not isinstance(size, bool):
        count = size
    else:
        match = re.fullmatch(r"\s*([+-]?\d+(?:\.\d*)?|[+-]?\.\d+)\s*([a-zA-Z]*)\s*", str(size))
        if match is None:
            raise ConfigError(f"The size {size!r} is no number with a unit; write for example 8GiB, 7.5GB or 512MiB.")
        number, unit = match.groups()
        if unit.lower() not in _UNITS:
            what = f"the unit {unit!r}, which is unknown" if unit else "no unit"
            raise ConfigError(
                f"The size {size!r} has {what}; write {number}GiB (2^30 bytes), {number}GB (10^9 bytes), MiB, MB, KiB, "
                "KB or B."
            )
        count = int(float(number) * _UNITS[unit.lower()])
    if count < 1:
        raise ConfigError(f"The size {size!r} is not positive; give at least one byte, for example 8GiB.")
    return count


def format_bytes(count: float) -> str:
    """Bytes with three significant digits and a binary unit."""
    return format_scaled(count, 1024, ("B", "KiB", "MiB", "GiB", "TiB"))


def format_scaled(value: float, base: int, units: tuple[str, ...]) -> str:
    """A number with three significant digits, in the largest unit that it fills."""
    power = 0
    while value >= 999.5 and power < len(units) - 1:  # four digits are more than a cell has room for
        value, power = value / base, power + 1
    return f"{value:.3g} {units[power]}"
