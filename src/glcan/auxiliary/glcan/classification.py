"""GLCAN for classification: pooled local features and the skeleton's, joined and classified.

Shape letters: B batch, C channels, H x W map, N tokens.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from glcan.auxiliary.backbone import followers, frozen_copy, layers, move_towards, through
from glcan.auxiliary.base import AuxiliaryRule, Site
from glcan.auxiliary.glcan.budget import NAME, SUMMARY, check_budget, check_shared, share_of
from glcan.auxiliary.glcan.coupling import draw_together
from glcan.auxiliary.glcan.skeleton import Level, Skeleton, fit_widths, skeleton_levels, strides_of, widths_of
from glcan.auxiliary.maps import as_map, pooled, reduce_to
from glcan.errors import ConfigError
from glcan.inspect.features import Feature
from glcan.inspect.isolation import Boundary
from glcan.inspect.profile import Unit
from glcan.tasks.classification import Classification


class GLCANClassification(AuxiliaryRule):
    """Light auxiliary networks with a local and a global branch, within a compute budget."""

    name: ClassVar[str] = NAME
    summary: ClassVar[str] = SUMMARY
    tasks: ClassVar[tuple[str, ...]] = ("classification",)

    @dataclasses.dataclass(frozen=True)
    class Config:
        """Options.

        Attributes:
            budget: forward FLOPs of all auxiliary networks together, as a share of the model's.
            unit_share: each auxiliary network may cost this share of the model's average unit even where the budget
                would give it less, as with many blocks.
            unit_cost: each unit of the skeleton may cost this share of the real unit that it stands for; 0: no limit.
            memory: bytes that an auxiliary network may hold, in multiples of the model's largest boundary. With 2, it
                hardly ever sets the peak: the backward pass of a block that ends at that boundary needs as much anyway.
            depth: of the skeleton, at least: with fewer stages to come, the last one's unit is repeated.
            local: the local branch: "needed" where the skeleton cannot do without it (it is narrower than there are
                classes, or special tokens or other tensors enter, which it does not read), "always" or "never".
            use_global: the global branch.
            width: channels of the skeleton's units as a share of the real stages'; none: solved for the budget.
            coupling: before each pass, three or more auxiliary networks of the same structure, behind units of the same
                class, move this share of the way to their mean; 0: each goes its own way.
            look_ahead: where no more than this many units are to come, copies of them and of the classifier stand in
                place of both branches, if they cost no more than a third of all auxiliary networks; 0: nowhere.
        """

        budget: float = 0.07
        unit_share: float = 0.6
        unit_cost: float = 0.5
        memory: float = 2.0
        depth: int = 4
        local: Literal["needed", "always", "never"] = "needed"
        use_global: bool = True
        width: float | None = None
        coupling: float = 0.1
        look_ahead: int = 2

        def __post_init__(self) -> None:
            check_budget(self.budget, self.unit_share)
            if self.local == "never" and not self.use_global:
                raise ConfigError("glcan.local is 'never' and glcan.use_global off; leave at least one branch on.")
            check_shared(True, self.use_global, self.width, 0.0)
            if not 0 <= self.unit_cost <= 10:
                raise ConfigError(f"glcan.unit_cost is {self.unit_cost}; it must lie in [0, 10], 0 for no limit.")
            if not 1 <= self.depth <= 16:
                raise ConfigError(f"glcan.depth is {self.depth}; it must lie in 1 ... 16.")
            if not self.memory > 0:
                raise ConfigError(
                    f"glcan.memory is {self.memory}; it must be positive, 2 for twice the largest boundary."
                )
            if not 0 <= self.coupling <= 1:
                raise ConfigError(
                    f"glcan.coupling is {self.coupling}; it must lie in [0, 1], 0 for networks that go their own way."
                )
            if not 0 <= self.look_ahead <= 16:
                raise ConfigError(f"glcan.look_ahead is {self.look_ahead}; it must lie in 0 ... 16, 0 for nowhere.")

    config: Config

    def build(self, site: Site) -> nn.Module:
        task = site.task
        assert isinstance(task, Classification)
        assert task.classes is not None
        units = self._units_ahead(site)
        if units:
            return LookAhead(site.main, site.model, units, classifier_after(site, units[-1]), task.classes)
        feature = site.trunk
        skeleton: Skeleton | None = None
        grid: tuple[int, int] | None = None
        if self.config.use_global:
            levels = skeleton_levels(site, feature, self.config.depth)
            grid = levels[0].grid
            skeleton = self._skeleton(site, feature, levels)
        behind = site.profile.units[site.cut.index - 1].kind
        unread = len(site.features) > 1 or site.trunk.prefix > 0  # by the skeleton
        needed = skeleton is None or unread or skeleton.narrowest < task.classes
        local = self.config.local == "always" or (self.config.local == "needed" and needed)
        return ClassificationAuxiliary(site.main, site.features, grid, local, skeleton, task.classes, behind)

    def _share(self, site: Site) -> float:
        return share_of(site, self.config.budget, self.config.unit_share)

    def _units_ahead(self, site: Site) -> list[Unit]:
        """The units for `LookAhead`; none if there is to be none."""
        config = self.config
        if not config.use_global or config.width is not None:
            return []
        ahead = {unit.name for unit in layers(site.profile) if unit.index >= site.cut.index}
        if not 0 < len(ahead) <= config.look_ahead:
            return []
        found = followers(site, len(ahead))
        affordable = sum(unit.flops for unit in found) <= self._share(site) * (site.blocks - 1) / 3
        return found if affordable and ahead <= {unit.name for unit in found} else []

    def _skeleton(self, site: Site, feature: Feature, levels: list[Level]) -> Skeleton:
        share = self._share(site)
        if self.config.width is not None:
            widths = widths_of(feature.channels, levels, self.config.width, math.inf)
        else:
            largest = max(sum(f.bytes for f in site.profile.unit(name).entering) for name in site.profile.cuttable)
            memory = self.config.memory * largest / site.profile.batch
            widths = fit_widths(
                feature.channels, levels, share / site.profile.batch, memory, self.config.unit_cost or math.inf
            )
        return Skeleton(feature.channels, widths, strides_of(levels))

    def segments(self, auxiliary: nn.Module) -> list[list[str]]:
        if isinstance(auxiliary, LookAhead):
            return [[f"units.{i}"] for i in range(len(auxiliary.units))]
        assert isinstance(auxiliary, ClassificationAuxiliary)
        if auxiliary.skeleton is None:
            return []
        names = [f"skeleton.units.{name}" for name, _ in auxiliary.skeleton.units.named_children()]
        return [names[i : i + 3] for i in range(0, len(names), 3)]  # convolution, normalisation, activation

    def before_pass(self, auxiliary: nn.ModuleDict, model: nn.Module) -> None:
        if self.config.coupling:
            draw_together((n for n in auxiliary.values() if not isinstance(n, LookAhead)), self.config.coupling)
        for network in auxiliary.values():
            if isinstance(network, LookAhead):
                network.follow(model)


class ClassificationAuxiliary(nn.Module):
    """Pooled local features and the skeleton's, joined and classified.

    Every tensor that enters is read once, by the pooling that reduces it: so one gradient of its size is made on the
    way back, and not one for each branch.

    Args:
        main: index of the trunk among the tensors that enter.
        features: of these tensors.
        grid: that the trunk is reduced to before the skeleton; none: there is none.
        local: the local branch.
        skeleton: the global branch.
        classes: of the task.
        behind: class name of the unit that the block ends with.
    """

    def __init__(
        self,
        main: int,
        features: tuple[Feature, ...],
        grid: tuple[int, int] | None,
        local: bool,
        skeleton: Skeleton | None,
        classes: int,
        behind: str,
    ) -> None:
        super().__init__()
        self.behind = behind
        self.main = main
        self.features = features
        self.grid = grid
        self.skeleton = skeleton
        channels = sum(f.channels for f in features) if local else 0
        self.norm = nn.LayerNorm(channels) if local else None
        self.head = nn.Linear(channels + (skeleton.channels if skeleton is not None else 0), classes)

    def extra_repr(self) -> str:
        return f"behind={self.behind}"

    def forward(self, boundary: Boundary, batch: Any) -> Tensor:
        """-> logits [B, classes]."""
        joined: list[Tensor] = []
        local: list[Tensor] = []
        for i, (tensor, feature) in enumerate(zip(boundary.entering, self.features, strict=True)):
            feature_map = as_map(tensor, feature)
            if i == self.main and self.skeleton is not None:
                assert self.grid is not None
                feature_map = reduce_to(feature_map, self.grid)
                joined.append(self.skeleton(feature_map))
            if self.norm is not None:
                mean = feature_map.mean((2, 3))
                local.append(mean + tensor[:, : feature.prefix].mean(1) if feature.prefix else mean)
        if self.norm is not None:
            joined.append(self.norm(torch.cat(local, 1)))
        return self.head(torch.cat(joined, 1))


class LookAhead(nn.Module):
    """Copies of all units that are still to come, and of the classifier: the end of the model, as it is now.

    The copies have the units' present weights. Gradients go through them to the block, none trains them: so the block
    learns what it would learn in end-to-end training.

    Args:
        main: index of the tensor that the first unit takes.
        model: the model.
        units: to be copied, one after the other.
        classifier: name of the linear layer that classifies the averaged map; none: a LayerNorm and a linear layer of
            one's own, which are trained.
        classes: of the task.
    """

    def __init__(
        self, main: int, model: nn.Module, units: Sequence[Unit], classifier: str | None, classes: int
    ) -> None:
        super().__init__()
        output = units[-1].output
        assert output is not None
        self.main, self.feature = main, output
        self.names = [unit.name for unit in units]
        self.units = nn.ModuleList(frozen_copy(model, name) for name in self.names)
        self.norm: nn.Module = nn.Identity() if classifier else nn.LayerNorm(output.channels)
        self.head: nn.Module = nn.Linear(output.channels, classes)
        self.classifier = classifier
        if classifier:
            self.head = frozen_copy(model, classifier)

    def follow(self, model: nn.Module) -> None:
        """The copies take over the weights of today."""
        move_towards(self.names, self.units, model, 0.0)
        if self.classifier:
            move_towards([self.classifier], [self.head], model, 0.0)

    def forward(self, boundary: Boundary, batch: Any) -> Tensor:
        """-> logits [B, classes]."""
        logits: Tensor = self.head(self.norm(pooled(through(self.units, boundary.entering[self.main]), self.feature)))
        return logits


def classifier_after(site: Site, last: Unit) -> str | None:
    """The linear layer that classifies the last unit's averaged map, if nothing else with weights is behind it."""
    assert isinstance(site.task, Classification)
    assert last.output is not None
    behind = [unit for unit in site.profile.units[last.index + 1 :] if unit.parameters]
    if len(behind) != 1:
        return None
    module = site.model.get_submodule(behind[0].name)
    fits = isinstance(module, nn.Linear) and module.weight.shape == (site.task.classes, last.output.channels)
    return behind[0].name if fits else None
