"""Every error that a user of glcan can cause.

Each message states the value, the constraint and the remedy. The command line prints ``str(error)`` and exits with
code 2; nothing else about a user's mistake is ever shown.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any


class GlcanError(Exception):
    """A mistake in what the user asked for, or in the data or files they gave."""


class UnknownName(GlcanError):
    """A name that is not registered.

    Args:
        kind: what was looked up ("rule", "model", "data set", "unit").
        name: what the user wrote.
        known: the names there are.
        hint: one more sentence on the remedy.
    """

    def __init__(self, kind: str, name: str, known: Iterable[str], hint: str = "") -> None:
        known = list(known)
        near = difflib.get_close_matches(name, known, n=5, cutoff=0.5)
        if near:
            remedy = f"Did you mean {', '.join(map(repr, near))}?"
        elif len(known) <= 20:
            remedy = f"Choose one of: {', '.join(known)}."
        else:
            remedy = f"Choose one of the {len(known)} known ones, for example {', '.join(known[:8])}."
        super().__init__(" ".join(filter(None, (f"Unknown {kind} {name!r}.", remedy, hint))))
        self.kind, self.name, self.near = kind, name, near
        self._arguments = kind, name, known, hint

    def __reduce__(self) -> tuple[Any, ...]:  # the base class would be made from the message alone
        return UnknownName, self._arguments


class ConfigError(GlcanError):
    """An option or a combination of options that cannot work."""


class CutError(ConfigError):
    """Cuts or a number of blocks that do not fit the model."""


class GradientLeak(GlcanError):
    """A gradient would cross a cut."""


class DataError(GlcanError):
    """Data that is missing, unreadable or does not fit the model."""


class RunError(GlcanError):
    """A run directory that cannot be used as asked."""


class CheckpointError(GlcanError):
    """A checkpoint that is damaged or belongs to another model, rule or plan."""


class NonFiniteLoss(GlcanError):
    """A loss became NaN or infinite."""
