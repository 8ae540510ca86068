"""How a method of a comparison is written: a baseline's name, or ``rule:blocks`` with ``+start`` or ``+finish``.

Behind either, ``+accumulate:parts``.
"""

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
        name: as the user wrote it, ``"e2e"``, ``"glcan:4"``, ``"glcan:4+start"`` or ``"e2e+accumulate:4"``.
        rule: the name of the rule.
        blocks: the number of blocks.
        start: whether the first steps train the whole model at once.
        finish: whether the last steps do.
        accumulate: the parts in which a batch is run; None: as the settings say.
    """

    name: str
    rule: str
    blocks: int
    start: bool = False
    finish: bool = False
    accumulate: int | None = None

    @property
    def baseline(self) -> bool:
        """Whether this is plain or checkpointed back-propagation."""
        return self.rule in rules.BASELINES

    @property
    def folder(self) -> str:
        """The name of the method's folder; no colon, which some file systems do not take."""
        return self.name.replace(":", "-")


def parse_method(text: str) -> Method:
    """Read one method: ``"e2e"``, ``"checkpoint"``, ``"e2e+accumulate:4"``, ``"glcan:4"``, ``"glcan:4+start"`` ...

    Raises:
        UnknownName: no rule has this name.
        ConfigError: the number of blocks is missing, is no positive integer, or was given to a baseline; or what
            follows it is not known.
    """
    local, *rest = "".join(text.split()).split("+")
    rule, colon, blocks = local.partition(":")
    known = rules.names()
    if rule not in known:
        raise UnknownName("method", rule, known, hint="A rule is followed by its number of blocks, as in 'glcan:4'.")
    baseline = rule in rules.BASELINES
    additions = [part.partition(":") for part in rest]
    phases = [name for name, _, _ in additions if name != "accumulate"]
    if baseline and phases:
        raise ConfigError(
            f"Method {text!r} gives a {phases[0]} to {rule!r}, which trains end to end all the time. "
            f"Write {rule!r} alone."
        )
    if baseline and colon:
        raise ConfigError(
            f"Method {text!r} gives a number of blocks to {rule!r}, which trains end to end in one block. "
            f"Write {rule!r} alone."
        )
    if not baseline and (not blocks.isdecimal() or int(blocks) < 1):
        stated = f"the number of blocks {blocks!r}, which is no positive integer" if colon else "no number of blocks"
        raise ConfigError(f"Method {text!r} has {stated}. Write the rule and its blocks, as in '{rule}:4'.")
    parts = None
    for i, (name, _, number) in enumerate(additions):
        twice = name in [earlier for earlier, _, _ in additions[:i]]
        if twice or name not in (*_PHASES, "accumulate") or (name in _PHASES and number):
            raise ConfigError(
                f"Method {text!r} has '+{rest[i]}'{' twice' if twice else ''}; behind its blocks there may be "
                "'+start', '+finish' and '+accumulate:PARTS', each once."
            )
        if name == "accumulate":
            if not number.isdecimal() or int(number) < 1:
                raise ConfigError(
                    f"Method {text!r} accumulates over {number!r} parts, which is no positive integer. Write "
                    f"'{local}+accumulate:4'."
                )
            parts = int(number)
    written = [rule if baseline else f"{rule}:{int(blocks)}", *(phase for phase in _PHASES if phase in phases)]
    if parts is not None:
        written.append(f"accumulate:{parts}")
    return Method(
        "+".join(written),
        rule,
        1 if baseline else int(blocks),
        start="start" in phases,
        finish="finish" in phases,
        accumulate=parts,
    )


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
