"""The rules and baselines there are: one file each, one line here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from glcan.errors import UnknownName
from glcan.rules.base import Rule, Site
from glcan.rules.baselines import Checkpoint, CheckpointSqrt, EndToEnd
from glcan.rules.dgl import DGL
from glcan.rules.glcan import GLCAN
from glcan.rules.infopro import InfoPro
from glcan.rules.predsim import PredSim

RULES: dict[str, type[Rule]] = {
    rule.name: rule for rule in (EndToEnd, Checkpoint, CheckpointSqrt, PredSim, DGL, InfoPro, GLCAN)
}

#: Those that train the whole model at once.
BASELINES: tuple[str, ...] = tuple(name for name, rule in RULES.items() if not rule.local)

__all__ = ["BASELINES", "RULES", "Rule", "Site", "create", "names"]


def names() -> list[str]:
    """The names that `create` takes, baselines first."""
    return list(RULES)


def create(rule: str | Rule, options: Mapping[str, Any] | None = None) -> Rule:
    """The rule of this name with these options, or the rule itself.

    Raises:
        UnknownName: no rule has this name, or the rule has no such option.
        ConfigError: a value that the option cannot take.
    """
    if isinstance(rule, Rule):
        return rule
    if rule not in RULES:
        raise UnknownName("rule", rule, names())
    return RULES[rule](options)
