"""How a method of a comparison is written: a baseline's name, or ``rule:blocks`` with ``+start`` or ``+finish``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from glcan import rules
from glcan.errors import ConfigError, UnknownName

_PHASES = ("start", "finish")


@dataclass(frozen=True)
class Method:
    """A rule and its number of blocks; the baselines train in one block.

    Attributes:
        name: as the user wrote it, ``"e2e"``, ``"glcan:4"`` or ``"glcan:4+start"``.
        rule: the name of the rule.
        blocks: the number of blocks.
        start: whether the first steps train the whole model at once.
        finish: whether the last steps do.
    """

    name: str
    rule: str
    blocks: int
    start: bool = False
    finish: bool = False

    @property
    def baseline(self) -> bool:
        """Whether this is plain or checkpointed back-propagation."""
        return self.rule in rules.BASELINES

    @property
    def folder(self) -> str:
        """The name of the method's folder; no colon, which some file systems do not take."""
        return self.name.replace(":", "-")


def parse_method(text: str) -> Method:
    """Read one method: ``"e2e"``, ``"checkpoint"``, ``"checkpoint-sqrt"``, ``"glcan:4"``, ``"glcan:4+start"`` ...

    Raises:
        UnknownName: no rule has this name.
        ConfigError: the number of blocks is missing, is no positive integer, or was given to a baseline; or what
            follows it is not known.
    """
    local, *phases = "".join(text.split()).split("+")
    rule, colon, blocks = local.partition(":")
    known = rules.names()
    if rule not in known:
        raise UnknownName("method", rule, known, hint="A rule is followed by its number of blocks, as in 'glcan:4'.")
    if rule in rules.BASELINES:
        if phases:
            raise ConfigError(
                f"Method {text!r} gives a {phases[0]} to {rule!r}, which trains end to end all the time. "
                f"Write {rule!r} alone."
            )
        if colon:
            raise ConfigError(
                f"Method {text!r} gives a number of blocks to {rule!r}, which trains end to end in one block. "
                f"Write {rule!r} alone."
            )
        return Method(rule, rule, 1)
    if not blocks.isdecimal() or int(blocks) < 1:
        stated = f"the number of blocks {blocks!r}, which is no positive integer" if colon else "no number of blocks"
        raise ConfigError(f"Method {text!r} has {stated}. Write the rule and its blocks, as in '{rule}:4'.")
    for phase in phases:
        if phase not in _PHASES or phases.count(phase) > 1:
            how = " twice" if phase in _PHASES else ""
            raise ConfigError(
                f"Method {text!r} has '+{phase}'{how}; after the number of blocks there may be '+start' and '+finish', "
                "each once."
            )
    name = "+".join([f"{rule}:{int(blocks)}", *(phase for phase in _PHASES if phase in phases)])
    return Method(name, rule, int(blocks), start="start" in phases, finish="finish" in phases)


def parse_methods(texts: Sequence[str]) -> list[Method]:
    """Read a comparison's methods, in order.

    Raises:
        UnknownName: no rule has this name.
        ConfigError: a method cannot be read or is named twice, or there is none.
    """
    methods = [parse_method(text) for text in texts]
    if not methods:
        raise ConfigError("A comparison needs at least one method, but got none. For example: e2e checkpoint glcan:4.")
    for i, method in enumerate(methods):
        if method in methods[:i]:
            raise ConfigError(f"Method {method.name!r} is named more than once. Name each method once.")
    return methods
