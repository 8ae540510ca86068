"""What a rule has to say to train a model block by block: the auxiliary network of each block, and its loss."""

from __future__ import annotations

import dataclasses
import typing
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from glcan.errors import ConfigError, UnknownName
from glcan.inspect.features import Feature
from glcan.inspect.profile import Profile, Unit
from glcan.tasks.base import Task

__all__ = ["AuxiliaryRule", "Site", "read_config"]


@dataclasses.dataclass(frozen=True)
class Site:
    """Where an auxiliary network is to stand, and what it may look at while it is built.

    Attributes:
        model: the user's model (fake or real); not to be changed.
        profile, task: of the learner.
        cut: the unit that begins the next block.
        blocks: K, of the plan.
        block: the number of the block that ends here, from 0; none while cuts are being looked for.
        skipping: of the block's own tensors that pass by the cut, in the order of ``Boundary.skipping``; none while
            cuts are being looked for, since it depends on the other ones.
    """

    model: nn.Module
    profile: Profile
    task: Task
    cut: Unit
    blocks: int
    block: int | None = None
    skipping: tuple[Feature, ...] = ()

    @property
    def depth(self) -> float:
        """How deep the block stands: 0 the first one, 1 the last one that has an auxiliary network."""
        if self.block is None:  # by the cut's place among all places
            places = self.profile.cuttable
            return places.index(self.cut.name) / max(1, len(places) - 1)
        return self.block / max(1, self.blocks - 2)

    @property
    def features(self) -> tuple[Feature, ...]:
        """Of the tensors that enter the cut, in the order of ``Boundary.entering``."""
        return self.cut.entering

    @property
    def main(self) -> int:
        """Index of the largest of `features`: the trunk."""
        sizes = [f.channels * f.grid[0] * f.grid[1] for f in self.features]
        return sizes.index(max(sizes))

    @property
    def trunk(self) -> Feature:
        """Of the largest tensor that enters the cut."""
        return self.features[self.main]

    @property
    def to_come(self) -> list[Feature]:
        """For each stage after the trunk's own: the map with which that stage ends (after the cut)."""
        grid = self.trunk.grid
        found: list[Feature] = []
        for unit in self.profile.units[self.cut.index :]:
            feature = unit.output
            if feature is None or feature.grid == (1, 1):
                continue
            if feature.grid != grid:
                grid = feature.grid
                found.append(feature)
            elif found:
                found[-1] = feature
        return found

    @property
    def ahead(self) -> Feature | None:
        """The last map of the trunk's own stage after the cut, None if the stage ends here."""
        grid = self.trunk.grid
        last = None
        for unit in self.profile.units[self.cut.index :]:
            if unit.output is not None and unit.output.grid == grid:
                last = unit.output
            elif last is not None:
                break
        return last


class AuxiliaryRule(ABC):
    """A way to construct auxiliary networks and local losses; nothing about steps.

    A rule is a dataclass-configured object: ``Config`` holds its options, whose names and defaults are what a user may
    give as ``options``.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    tasks: ClassVar[tuple[str, ...]]
    """Names of the tasks that it serves."""
    long_end: ClassVar[float] = 0.0
    """What may be recomputed so that the last block can be longer; see `most` of `glcan.cost.cuts.longest_end`."""

    @dataclasses.dataclass(frozen=True)
    class Config:
        """No options."""

    def __init__(self, options: Mapping[str, Any] | None = None) -> None:
        self.config = read_config(self.name, self.Config, options or {})

    @abstractmethod
    def build(self, site: Site) -> nn.Module:
        """The auxiliary network of a block: ``auxiliary(boundary, batch)`` gives what `local_loss` takes."""

    def local_loss(self, task: Task, prediction: Any, batch: tuple[Any, ...]) -> Tensor:
        """The loss of a block from what its auxiliary network returned; by default the task's own."""
        return task.local_loss(prediction, batch)

    def segments(self, auxiliary: nn.Module) -> list[list[str]]:
        """Sub-modules of an auxiliary network, in chains, that may be recomputed (`glcan.strategies.recompute`)."""
        return []

    def before_pass(self, auxiliary: nn.ModuleDict, model: nn.Module) -> None:
        """Called before each training pass, where auxiliary networks may look at the weights of today."""


def read_config(owner: str, config: type[Any], options: Mapping[str, Any]) -> Any:
    """The options as the configuration of a rule or a strategy.

    Raises:
        UnknownName: there is no such option.
        ConfigError: a value of the wrong type; the configuration's own checks.
    """
    hints = typing.get_type_hints(config)
    known = [field.name for field in dataclasses.fields(config)]
    for name, value in options.items():
        if name not in known:
            raise UnknownName(f"option of {owner!r}", name, known, "" if known else "It has no options.")
        allowed = typing.get_args(hints[name]) or (hints[name],)
        literal = next((h for h in (hints[name], *allowed) if typing.get_origin(h) is typing.Literal), None)
        if literal is not None:
            choices = typing.get_args(literal)
            if value not in choices and not (value is None and type(None) in allowed):
                raise ConfigError(f"{owner}.{name} is {value!r}; it must be one of {', '.join(map(repr, choices))}.")
            continue
        numeric = float in allowed and isinstance(value, int) and not isinstance(value, bool)
        wrong_bool = isinstance(value, bool) and bool not in allowed
        if (not isinstance(value, allowed) and not numeric) or wrong_bool:
            kinds = " or ".join("none" if t is type(None) else t.__name__ for t in allowed)
            raise ConfigError(f"{owner}.{name} is {value!r}; it must be a {kinds}.")
    return config(**options)
