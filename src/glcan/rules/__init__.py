"""The rules and baselines there are: one file each, one line here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from glcan.errors import ConfigError, UnknownName
from glcan.importing import import_path
from glcan.rules.auglocal import AugLocal
from glcan.rules.base import Joint, Rule, Site
from glcan.rules.baselines import Checkpoint, CheckpointSqrt, EndToEnd
from glcan.rules.dgl import DGL
from glcan.rules.glcan import GLCAN
from glcan.rules.infopro import InfoPro
from glcan.rules.momentum import MAN, MANPlusPlus
from glcan.rules.predsim import PredSim

RULES: dict[str, type[Rule]] = {
    rule.name: rule
    for rule in (EndToEnd, Checkpoint, CheckpointSqrt, PredSim, DGL, InfoPro, AugLocal, MAN, MANPlusPlus, GLCAN)
}

#: Those that train the whole model at once.
BASELINES: tuple[str, ...] = tuple(name for name, rule in RULES.items() if not rule.local)

__all__ = ["BASELINES", "RULES", "Joint", "Rule", "Site", "create", "names"]


def names() -> list[str]:
    """The names that `create` takes, baselines first."""
    return list(RULES)


def create(rule: str | Rule, options: Mapping[str, Any] | None = None) -> Rule:
    """The rule of this name with these options, or the rule itself.

    Args:
        rule: a name of `names()`, or ``package.module:Class`` for a rule of one's own.
        options: of its ``Config``.

    Raises:
        UnknownName: no rule has this name, or the rule has no such option.
        ConfigError: a value that the option cannot take; a module that cannot be imported, or holds no rule there.
    """
    if isinstance(rule, Rule):
        return rule
    if ":" in rule:
        own = import_path(rule, "rule", "my.rules:Nearest")
        if not (isinstance(own, type) and issubclass(own, Rule)):
            raise ConfigError(f"{rule!r} is no rule. Give a class that is derived from glcan.rules.Rule.")
        return own(options)
    if rule not in RULES:
        raise UnknownName("rule", rule, names())
    return RULES[rule](options)
