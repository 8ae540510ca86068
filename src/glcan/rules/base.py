"""What a rule has to say to train a model block by block."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import typing
from abc import ABC
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from glcan.errors import ConfigError, UnknownName
from glcan.profile import Feature, Profile, Unit
from glcan.tasks.base import Task

__all__ = ["Joint", "Rule", "Site"]


@dataclasses.dataclass(frozen=True)
class Joint:
    """A part of every batch on which all blocks learn jointly, end to end, while the others learn block by block.

    The joint images come first, in a pass of their own, so that their activations are freed before those of the others
    are made; memory is that of the larger part. Normalisation over the batch sees the two parts one by one.

    Or they are those whose gradient is large (`glcan.choosing`), where there is no local learning: all images run
    forward to the last block, which learns from them and knows the gradients at its cut; then the chosen ones run
    through the other blocks once more, normalised as before, and take their gradients back.

    Attributes:
        share: of the images of a batch, rounded down; 0 for none.
        weight: of the joint gradient in all blocks but the last one, in 0 ... 1; the local gradient has the rest. With
            1 there are no auxiliary networks, and the other images train the last block alone. In the last block every
            image counts as much.
        least: fewer images than this are none, since normalisation over the batch needs some; but with a weight of 1
            there is always one at least.
        by_gradient: with a weight of 1, whether they are chosen by the size of their gradient; else they are the first
            of the batch.
    """

    share: float = 0.0
    weight: float = 0.5
    least: int = 2
    by_gradient: bool = False

    def images(self, batch: int, whole: int | None = None) -> int:
        """How many images of a batch of this size are joint ones.

        With a weight of 1 all of them, where they are no more than the joint ones of a whole batch (of so many images):
        the few that end an epoch hold no more memory together, and would be too few for normalisation in two parts.
        """
        found = math.floor(self.share * batch)
        if self.weight == 1:
            if whole is not None and batch <= self.images(whole):
                return batch
            return max(1, found) if self.share else 0
        return found if found >= self.least else 0

    def share_of(self, batch: int) -> float:
        """The share that they are of a batch of this size."""
        return self.images(batch) / batch


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


class Rule(ABC):
    """A way to construct auxiliary networks and local losses, or a baseline that has none.

    A rule is a dataclass-configured object: ``Config`` holds its options, whose names and defaults are what a user may
    give as ``rule_options``.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    tasks: ClassVar[tuple[str, ...]]
    local: ClassVar[bool] = True
    """Whether the model is cut into blocks (False for the baselines)."""
    exact: ClassVar[bool] = False
    """Whether it computes what end-to-end back-propagation does, bit for bit on the CPU (checkpointing)."""

    @dataclasses.dataclass(frozen=True)
    class Config:
        """No options."""

    def __init__(self, options: Mapping[str, Any] | None = None) -> None:
        self.config = read_config(self.name, self.Config, options or {})

    def build(self, site: Site) -> nn.Module:
        """The auxiliary network of a block: ``auxiliary(boundary, batch)`` gives what `local_loss` takes."""
        raise ConfigError(f"The rule {self.name!r} trains the whole model at once and has no auxiliary networks.")

    def local_loss(self, task: Task, prediction: Any, batch: tuple[Any, ...]) -> Tensor:
        """The loss of a block from what its auxiliary network returned; by default the task's own."""
        return task.local_loss(prediction, batch)

    def segments(self, auxiliary: nn.Module) -> list[list[str]]:
        """Sub-modules of an auxiliary network, in chains, that may be recomputed; see `glcan.checkpointing`."""
        return []

    def running(self, model: nn.Module, profile: Profile) -> contextlib.AbstractContextManager[Any]:
        """Entered around each forward pass of the model."""
        return contextlib.nullcontext()

    def long_end(self, task: Task) -> float:
        """What may be recomputed so that the last block can be longer; see `most` of `glcan.plan.longest_end`."""
        return 0.0

    def joint(self, task: Task, blocks: int, batch: int, by_image: bool = False) -> Joint:
        """What part of each batch of so many images is trained end to end, of a model in so many blocks.

        ``by_image``: whether images can be chosen by their gradient, see `Profile.by_image`.
        """
        return Joint()

    def before_pass(self, auxiliary: nn.ModuleDict, model: nn.Module) -> None:
        """Called before each training pass, where auxiliary networks may look at the weights of today."""


def read_config(rule: str, config: type[Any], options: Mapping[str, Any]) -> Any:
    """The options as the rule's configuration.

    Raises:
        UnknownName: the rule has no such option.
        ConfigError: a value of the wrong type; the configuration's own checks.
    """
    hints = typing.get_type_hints(config)
    known = [field.name for field in dataclasses.fields(config)]
    for name, value in options.items():
        if name not in known:
            raise UnknownName(f"option of the rule {rule!r}", name, known, "" if known else "It has no options.")
        allowed = typing.get_args(hints[name]) or (hints[name],)
        literal = next((h for h in (hints[name], *allowed) if typing.get_origin(h) is typing.Literal), None)
        if literal is not None:
            choices = typing.get_args(literal)
            if value not in choices and not (value is None and type(None) in allowed):
                raise ConfigError(f"{rule}.{name} is {value!r}; it must be one of {', '.join(map(repr, choices))}.")
            continue
        numeric = float in allowed and isinstance(value, int) and not isinstance(value, bool)
        wrong_bool = isinstance(value, bool) and bool not in allowed
        if (not isinstance(value, allowed) and not numeric) or wrong_bool:
            kinds = " or ".join("none" if t is type(None) else t.__name__ for t in allowed)
            raise ConfigError(f"{rule}.{name} is {value!r}; it must be a {kinds}.")
    return config(**options)
