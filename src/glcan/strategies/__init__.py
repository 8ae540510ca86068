"""The strategies there are, by the name of their methods: exact, sampled, and local ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from glcan import auxiliary
from glcan.errors import ConfigError
from glcan.strategies.backprop import Checkpoint, CheckpointSqrt, EndToEnd
from glcan.strategies.base import Strategy
from glcan.strategies.local import Local
from glcan.strategies.method import FAMILIES, Family, Method, family_of, parse_method, parse_methods
from glcan.strategies.selective import Selective

EXACT: dict[str, type[Strategy]] = {kind.name: kind for kind in (EndToEnd, Checkpoint, CheckpointSqrt)}
SAMPLED: tuple[str, ...] = (Selective.name,)
__all__ = [
    "EXACT",
    "SAMPLED",
    "Family",
    "Method",
    "Strategy",
    "create",
    "family_of",
    "names",
    "parse_method",
    "parse_methods",
    "summary_of",
]


def names() -> list[str]:
    """The names that methods begin with: exact ones, sampled ones, local ones."""
    return list(FAMILIES)


def summary_of(name: str) -> str:
    """What a method of this name does, in a line."""
    if name in EXACT:
        return EXACT[name].summary
    if name in SAMPLED:
        return Selective.summary
    return next(rule.summary for rule in auxiliary.RULES if rule.name == name)


def create(method: str | Method, task: str, options: Mapping[str, Any] | None = None) -> Strategy:
    """The strategy of a method for a task, with these options.

    Raises:
        UnknownName: no method has this name, or it has no such option.
        ConfigError: a value that the option cannot take; a rule that does not serve the task.
    """
    found = parse_method(method)
    if found.base in EXACT:
        if options:
            raise ConfigError(f"{found.base!r} has no options, but got {', '.join(options)}. Leave them out.")
        return EXACT[found.base]()
    if found.base in SAMPLED:
        return Selective(options)
    return Local(auxiliary.create(found.base, task, options), found.number)
