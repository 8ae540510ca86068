"""How a method is written, everywhere: ``glcan:4``, ``selective``, ``e2e+accumulate:8``, ``glcan:4+start:0.3``."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Literal

from glcan import auxiliary
from glcan.errors import ConfigError, UnknownName

__all__ = ["FAMILIES", "Family", "Method", "family_of", "parse_method", "parse_methods"]

Family = Literal["exact", "sampled", "local"]

#: The family of each name that a method begins with.
FAMILIES: dict[str, Family] = {
    "e2e": "exact",
    "checkpoint": "exact",
    "checkpoint-sqrt": "exact",
    "selective": "sampled",
    **dict.fromkeys(auxiliary.names(), "local"),
}

#: Shares of the steps where none is given: what brought most in pilots (docs/findings).
_SHARES = {"start": 0.3, "freeze": 0.5, "finish": 0.1}
_OWN_RULE = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


@dataclasses.dataclass(frozen=True)
class Method:
    """How a batch becomes gradients, and in which phases of a run.

    Attributes:
        base: the strategy or rule: "e2e", "checkpoint", "selective", "glcan", or ``package.module:Class`` for a rule of
            one's own.
        number: behind the colon: of blocks, for local learning; none where there is none.
        accumulate: parts in which a batch is run, whose gradients add up.
        start: share of the steps, at the beginning, that train the whole model at once with activation checkpointing,
            and the auxiliary networks beside it.
        freeze: share of the steps in which the first block runs through the whole schedule; the others take more,
            evenly, and the last one all. Then a block only runs forward. 1: all learn to the end.
        finish: share of the steps, at the end, that train the whole model at once with activation checkpointing.
    """

    base: str
    number: int | None = None
    accumulate: int = 1
    start: float = 0.0
    freeze: float = 1.0
    finish: float = 0.0

    @property
    def core(self) -> str:
        """The method without accumulation and phases: "glcan:4"."""
        return self.base if self.number is None else f"{self.base}:{self.number}"

    @property
    def phased(self) -> bool:
        """Whether a run has phases."""
        return bool(self.start or self.finish or self.freeze < 1)

    @property
    def folder(self) -> str:
        """The name of the method's folder; no colon, which some file systems do not take."""
        return str(self).replace(":", "-")

    def __str__(self) -> str:
        text = self.core
        for phase in _SHARES:
            value = getattr(self, phase)
            if value != type(self).__dataclass_fields__[phase].default:
                text += f"+{phase}:{value:g}"
        return text + (f"+accumulate:{self.accumulate}" if self.accumulate > 1 else "")


def family_of(name: str) -> Family:
    """The family of a method of this name; rules of one's own are local."""
    return FAMILIES.get(name, "local")


def parse_method(text: str | Method) -> Method:
    """Reads a method.

    Raises:
        UnknownName: no strategy or rule has this name.
        ConfigError: a number that is missing, that cannot be, or of a method that takes none; something unknown behind.
    """
    if isinstance(text, Method):
        return text
    core, *rest = "".join(text.split()).split("+")
    own = _OWN_RULE.match(core)
    base, number = (core, "") if own is None else (own[0], core[own.end() :].removeprefix(":"))
    if own is None or (":" in core and own[0].partition(":")[0] in FAMILIES):
        base, _, number = core.partition(":")
    colon = core != base
    if base not in FAMILIES and own is None:
        raise UnknownName("method", base, FAMILIES, hint="Local rules are followed by a number of blocks: 'glcan:4'.")
    local = family_of(base) == "local"
    if colon and not local:
        raise ConfigError(f"Method {text!r} gives a number to {base!r}, which takes none. Write {base!r} alone.")
    if colon and (not number.isdecimal() or int(number) < 1):
        raise ConfigError(f"Method {text!r} has {number!r} blocks, which is no positive integer. Write '{base}:4'.")
    found: dict[str, float | int] = {}
    for part in rest:
        name, _, value = part.partition(":")
        if name not in (*_SHARES, "accumulate") or name in found:
            raise ConfigError(
                f"Method {text!r} has '+{part}'{' twice' if name in found else ''}; there may be '+accumulate:PARTS', "
                "and '+start', '+freeze' and '+finish' with or without a share of the steps (':0.3'), each once."
            )
        found[name] = _parts(str(text), value) if name == "accumulate" else _share(str(text), name, value)
        if name != "accumulate" and not local:
            raise ConfigError(
                f"Method {text!r} has a {name}, and {base!r} trains the whole model all the time. Leave it out, or "
                "choose a local method such as 'glcan:4'."
            )
    method = Method(base, int(number) if number else None, **found)  # type: ignore[arg-type]
    most = min(method.freeze, 1 - method.finish)
    if method.start > most:
        raise ConfigError(
            f"Method {text!r} starts with {method.start:g} of the steps, and the first block has only {most:g} of them "
            "before it is frozen or the finish begins. Lower the start."
        )
    return method


def _parts(text: str, value: str) -> int:
    if not value.isdecimal() or int(value) < 1:
        raise ConfigError(
            f"Method {text!r} accumulates over {value!r} parts, which is no positive integer. Write '+accumulate:4'."
        )
    return int(value)


def _share(text: str, name: str, value: str) -> float:
    try:
        share = float(value) if value else _SHARES[name]
    except ValueError:
        share = -1.0
    most = 1.0 if name == "freeze" else 0.9
    if not 0 < share <= most:
        raise ConfigError(f"Method {text!r} has {name}:{value}; a share of the steps lies in (0, {most:g}], as 0.3.")
    return share


def parse_methods(texts: Sequence[str]) -> list[Method]:
    """Reads a comparison's methods, in order.

    Raises:
        UnknownName, ConfigError: one cannot be read, one is named twice, or there is none.
    """
    methods = [parse_method(text) for text in texts]
    if not methods:
        raise ConfigError("A comparison needs at least one method, but got none. For example: e2e checkpoint glcan:4.")
    for i, method in enumerate(methods):
        if method in methods[:i]:
            raise ConfigError(f"Method '{method}' is named more than once. Name each method once.")
    return methods
