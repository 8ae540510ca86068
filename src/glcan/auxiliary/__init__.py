"""The auxiliary networks there are: one file (or package) a rule, one line here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from glcan.auxiliary.auglocal import AugLocal
from glcan.auxiliary.base import AuxiliaryRule, Site
from glcan.auxiliary.dgl import DGL
from glcan.auxiliary.glcan import GLCANClassification, GLCANDetection, GLCANSuperResolution
from glcan.auxiliary.infopro import InfoPro
from glcan.auxiliary.man import MAN, MANPlusPlus
from glcan.auxiliary.predsim import PredSim
from glcan.errors import ConfigError, UnknownName
from glcan.importing import import_path

#: Some rules have a class for each task.
RULES: tuple[type[AuxiliaryRule], ...] = (
    GLCANClassification,
    GLCANDetection,
    GLCANSuperResolution,
    PredSim,
    DGL,
    InfoPro,
    AugLocal,
    MAN,
    MANPlusPlus,
)

__all__ = ["RULES", "AuxiliaryRule", "Site", "create", "names", "tasks_of"]


def names() -> list[str]:
    """The names that `create` takes."""
    return list(dict.fromkeys(rule.name for rule in RULES))


def tasks_of(name: str) -> list[str]:
    """The names of the tasks that a rule serves."""
    return [task for rule in RULES if rule.name == name for task in rule.tasks]


def create(rule: str, task: str, options: Mapping[str, Any] | None = None) -> AuxiliaryRule:
    """The rule of this name for a task, with these options.

    Args:
        rule: a name of `names()`, or ``package.module:Class`` for a rule of one's own.
        task: name of the task.
        options: of its ``Config``.

    Raises:
        UnknownName: no rule has this name, or the rule has no such option.
        ConfigError: a value that the option cannot take; a rule that does not serve the task; a module that cannot be
            imported, or holds no rule there.
    """
    if ":" in rule:
        own = import_path(rule, "rule", "my.rules:Nearest")
        if not (isinstance(own, type) and issubclass(own, AuxiliaryRule)):
            raise ConfigError(f"{rule!r} is no rule. Give a class that is derived from glcan.auxiliary.AuxiliaryRule.")
        found: tuple[type[AuxiliaryRule], ...] = (own,)
        served = list(own.tasks)
    else:
        if rule not in names():
            raise UnknownName("rule", rule, names())
        found, served = tuple(r for r in RULES if r.name == rule), tasks_of(rule)
    for kind in found:
        if task in kind.tasks:
            return kind(options)
    raise ConfigError(f"The rule {rule!r} serves {', '.join(served)}, not the task {task!r}.")
