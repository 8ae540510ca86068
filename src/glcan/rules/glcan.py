"""GLCAN: Global-Local Collaborative Auxiliary Network (arXiv 2406.00446).

The paper's text beyond its abstract was not at hand; this is our construction in its spirit (docs/rules/glcan.md says
what is ours). The auxiliary network of a block has

- a *local branch*: what the task needs of the block's own features, at their own scale;
- a *global branch*: a macro-skeleton of the network that is still to come, one light unit for each remaining stage,
  with the real network's down-sampling, so that the local loss sees the receptive field of the final head;
- *collaboration*: both together go into a head of the task's own kind.

Its input is reduced to the first remaining stage's resolution before anything is computed, and the width of the
skeleton is solved for a compute budget.

Shape letters: B batch, C channels, H x W map, N tokens.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glcan.errors import ConfigError
from glcan.isolation import Boundary
from glcan.profile import Feature
from glcan.rules.base import Rule, Site
from glcan.tasks.classification import Classification


@dataclasses.dataclass(frozen=True)
class _Level:
    """One unit of the macro-skeleton: the map it gives, and the width of the real stage that it stands for."""

    grid: tuple[int, int]
    channels: int
    unit_flops: float = math.inf
    """Forward FLOPs per image of a real unit of that stage, on average."""


class GLCAN(Rule):
    """Light auxiliary networks with a local and a global branch, within a compute budget."""

    name: ClassVar[str] = "glcan"
    summary: ClassVar[str] = "global-local collaborative auxiliary networks (arXiv 2406.00446; our construction)"
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
            use_local: the local branch.
            use_global: the global branch.
            width: channels of the skeleton's units as a share of the real stages'; none: solved for the budget.
            unit: "conv" (a 3x3 convolution), or "backbone" (a full-width copy of the remaining stages' first units,
                as earlier work has it; the budget does not apply).
            momentum: after each step the copies become ``momentum * copy + (1 - momentum) * real unit``; needs
                ``unit="backbone"``; none: no exchange.
        """

        budget: float = 0.07
        unit_share: float = 0.6
        unit_cost: float = 0.5
        memory: float = 2.0
        depth: int = 2
        use_local: bool = True
        use_global: bool = True
        width: float | None = None
        unit: Literal["conv", "backbone"] = "conv"
        momentum: float | None = None

        def __post_init__(self) -> None:
            if not 0 < self.budget <= 10:
                raise ConfigError(
                    f"glcan.budget is {self.budget}; it must lie in (0, 10], 0.1 for a tenth of the model."
                )
            if not 0 <= self.unit_share <= 10:
                raise ConfigError(f"glcan.unit_share is {self.unit_share}; it must lie in [0, 10], 0 for none.")
            if not 0 <= self.unit_cost <= 10:
                raise ConfigError(f"glcan.unit_cost is {self.unit_cost}; it must lie in [0, 10], 0 for no limit.")
            if not 1 <= self.depth <= 16:
                raise ConfigError(f"glcan.depth is {self.depth}; it must lie in 1 ... 16.")
            if not self.memory > 0:
                raise ConfigError(f"glcan.memory is {self.memory}; it must be positive, 2 for twice the largest boundary.")
            if not (self.use_local or self.use_global):
                raise ConfigError("glcan.use_local and glcan.use_global are both off; leave at least one branch on.")
            if self.width is not None and not 0 < self.width <= 4:
                raise ConfigError(f"glcan.width is {self.width}; it must lie in (0, 4], 1 for the real stages' width.")
            if self.momentum is not None and not 0 <= self.momentum < 1:
                raise ConfigError(
                    f"glcan.momentum is {self.momentum}; it must lie in [0, 1): 1 would freeze the copies for good."
                )
            if self.momentum is not None and (self.unit != "backbone" or not self.use_global):
                raise ConfigError(
                    f"glcan.momentum is {self.momentum}, but it exchanges weights with the real units, so it needs "
                    "unit='backbone' and use_global=True. Set these, or leave momentum out."
                )

    config: Config

    def build(self, site: Site) -> nn.Module:
        if not isinstance(site.task, Classification):
            raise ConfigError(f"The rule 'glcan' serves {', '.join(self.tasks)}, not {site.task.name!r}.")
        assert site.task.classes is not None
        feature = site.features[site.main]
        skeleton: Skeleton | _BackboneSkeleton | None = None
        grid: tuple[int, int] | None = None
        if self.config.use_global and self.config.unit == "backbone":
            skeleton = _BackboneSkeleton(site)
        elif self.config.use_global:
            levels = skeleton_levels(site, feature, self.config.depth)
            grid = levels[0].grid
            skeleton = self._skeleton(site, feature, levels)
        return _ClassificationAuxiliary(
            site.main, site.features, grid, self.config.use_local, skeleton, site.task.classes
        )

    def _skeleton(self, site: Site, feature: Feature, levels: list[_Level]) -> Skeleton:
        weighted = sum(unit.weights > 0 for unit in site.profile.units)
        share = site.profile.flops * max(
            self.config.budget / max(1, site.blocks - 1), self.config.unit_share / max(1, weighted)
        )
        if self.config.width is not None:
            widths = _widths(feature.channels, levels, self.config.width, math.inf)
        else:
            largest = max(sum(f.bytes for f in site.profile.unit(name).entering) for name in site.profile.cuttable)
            memory = self.config.memory * largest / site.profile.batch
            widths = fit_widths(
                feature.channels, levels, share / site.profile.batch, memory, self.config.unit_cost or math.inf
            )
        return Skeleton(feature.channels, widths, _strides(levels))

    def segments(self, auxiliary: nn.Module) -> list[list[str]]:
        assert isinstance(auxiliary, _ClassificationAuxiliary)
        skeleton = auxiliary.skeleton
        if skeleton is None:
            return []
        names = [f"skeleton.units.{name}" for name, _ in skeleton.units.named_children()]
        if isinstance(skeleton, _BackboneSkeleton):
            return [[name] for name in names]
        return [names[i : i + 3] for i in range(0, len(names), 3)]  # convolution, normalisation, activation

    def after_step(self, auxiliary: nn.ModuleDict, model: nn.Module) -> None:
        if self.config.momentum is None:
            return
        for network in auxiliary.values():
            skeleton = network.skeleton
            assert isinstance(skeleton, _BackboneSkeleton)
            skeleton.move_towards(model, self.config.momentum)


def skeleton_levels(site: Site, feature: Feature, depth: int) -> list[_Level]:
    """The maps that the skeleton goes through: one for each remaining stage; in the last stage, that stage's own.

    Where that makes fewer than ``depth``, the last one is repeated: the blocks of the last stages need a network
    between them and their loss as well, or they give up for it what the blocks before them made.
    """
    stages = site.to_come or [site.ahead or feature]
    levels = [_Level(f.grid, f.channels, _unit_flops(site, f.grid)) for f in stages]
    return levels + levels[-1:] * (depth - len(levels))


def _unit_flops(site: Site, grid: tuple[int, int]) -> float:
    """Forward FLOPs per image of a unit after the cut whose map has this grid, on average."""
    units = [u for u in site.profile.units[site.cut.index :] if u.output is not None and u.output.grid == grid]
    weighted = [u.flops for u in units if u.weights]
    return sum(weighted) / len(weighted) / site.profile.batch if weighted else math.inf


def _strides(levels: list[_Level]) -> list[tuple[int, int]]:
    strides = [(1, 1)]
    for before, after in itertools.pairwise(levels):
        strides.append((max(1, round(before.grid[0] / after.grid[0])), max(1, round(before.grid[1] / after.grid[1]))))
    return strides


def _widths(channels: int, levels: list[_Level], share: float, unit_cost: float) -> list[int]:
    """Channels of the skeleton's units: a share of the real stages', in multiples of 8, at least 8.

    No unit is wider than what makes it cost ``unit_cost`` of the real unit that it stands for.
    """
    widths: list[int] = []
    for level in levels:
        wide = 8 * round(level.channels * share / 8)
        # The first unit takes the map at its own width, or squeezed to this unit's width.
        for width in range(wide, 7, -8):
            before = widths[-1] if widths else min(channels, width)
            if 2 * 9 * before * width * math.prod(level.grid) <= unit_cost * level.unit_flops:
                break
        else:
            width = 8
        widths.append(width)
    return widths


def skeleton_flops(channels: int, levels: list[_Level], widths: list[int]) -> int:
    """Forward FLOPs per image of `Skeleton`: the 1x1 squeeze where it is, and a 3x3 convolution per level."""
    h, w = levels[0].grid
    flops, before = 0, channels
    if widths[0] < channels:
        flops += 2 * channels * widths[0] * h * w
        before = widths[0]
    for level, width in zip(levels, widths, strict=True):
        flops += 2 * 9 * before * width * math.prod(level.grid)
        before = width
    return flops


def skeleton_bytes(channels: int, levels: list[_Level], widths: list[int]) -> int:
    """Activations per image that `Skeleton` needs: its input, two maps for each convolution, and its largest gradients."""
    elements = channels * math.prod(levels[0].grid)
    elements += 2 * widths[0] * math.prod(levels[0].grid) if widths[0] < channels else 0
    maps = [width * math.prod(level.grid) for level, width in zip(levels, widths, strict=True)]
    return 4 * (elements + 2 * sum(maps) + max(maps))


def fit_widths(
    channels: int, levels: list[_Level], flops: float, memory: float = math.inf, unit_cost: float = math.inf
) -> list[int]:
    """The widest skeleton (at most the real network's width) that keeps its budgets.

    Args:
        channels: C of the map that enters.
        levels: of the skeleton.
        flops: forward FLOPs per image.
        memory: bytes of activations per image.
        unit_cost: FLOPs of each unit as a share of the real unit's.
    """
    best = _widths(channels, levels, 0.0, unit_cost)
    for step in range(1, 65):
        widths = _widths(channels, levels, step / 64, unit_cost)
        if skeleton_flops(channels, levels, widths) > flops or skeleton_bytes(channels, levels, widths) > memory:
            break
        best = widths
    return best


class Skeleton(nn.Module):
    """Light units, one for each remaining stage.

    Args:
        channels: C of the input map [B, C, H, W].
        widths, strides: of the 3x3 convolutions.
    """

    def __init__(self, channels: int, widths: list[int], strides: list[tuple[int, int]]) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        if widths[0] < channels:
            layers += [nn.Conv2d(channels, widths[0], 1, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU(inplace=True)]
            channels = widths[0]
        for width, stride in zip(widths, strides, strict=True):
            layers += [
                nn.Conv2d(channels, width, 3, stride, 1, bias=False),
                nn.BatchNorm2d(width),
                nn.ReLU(inplace=True),
            ]
            channels = width
        self.units = nn.Sequential(*layers)
        self.channels = channels
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, reduced: Tensor) -> Tensor:
        """The map, reduced to (about) the first level's grid: [B, C, H, W] -> [B, channels]."""
        return self.units(reduced).mean((2, 3))


def reduce_to(feature_map: Tensor, grid: tuple[int, int]) -> Tensor:
    """Average pooling to (about) this grid; whole windows where the sizes divide, which is cheaper."""
    h, w = feature_map.shape[-2:]
    if h <= grid[0] and w <= grid[1]:
        return feature_map
    if h % grid[0] == 0 and w % grid[1] == 0:
        return F.avg_pool2d(feature_map, (h // grid[0], w // grid[1]))
    return F.adaptive_avg_pool2d(feature_map, grid)


class _BackboneSkeleton(nn.Module):
    """Full-width copies of the first unit of each remaining stage (of the next unit, in the last stage)."""

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.names = _stage_entries(site)
        self.units = nn.ModuleList()
        for name in self.names:
            unit = copy.deepcopy(site.model.get_submodule(name))
            self.units.append(unit)
        last = site.profile.unit(self.names[-1]).output
        assert last is not None
        self.feature = last
        self.channels = last.channels

    def forward(self, tensor: Tensor) -> Tensor:
        """The entering tensor in the model's own layout -> [B, channels]."""
        value = tensor
        for unit in self.units:
            value = unit(value)
        return as_map(value, self.feature).mean((2, 3))

    @torch.no_grad()
    def move_towards(self, model: nn.Module, momentum: float) -> None:
        """Each copy becomes momentum * copy + (1 - momentum) * real unit."""
        for name, unit in zip(self.names, self.units, strict=True):
            real = dict(model.get_submodule(name).named_parameters())
            for key, parameter in unit.named_parameters():
                parameter.lerp_(real[key].to(parameter.dtype), 1 - momentum)


def _stage_entries(site: Site) -> list[str]:
    """The next unit, then the units (after the cut) at which the resolution or the width of the trunk changes."""
    names: list[str] = []
    entering = site.features[site.main]
    at = (entering.grid, entering.channels)
    for unit in site.profile.units[site.cut.index :]:
        if unit.output is None or unit.output.grid == (1, 1) or len(unit.entering) != 1:
            continue
        takes = (unit.entering[0].grid, unit.entering[0].channels)
        gives = (unit.output.grid, unit.output.channels)
        if takes == at and gives != at:
            names.append(unit.name)
            at = gives
    return names or [site.cut.name]


class _ClassificationAuxiliary(nn.Module):
    """Pooled local features and the skeleton's, joined and classified.

    Every tensor that enters is read once, by the pooling that reduces it: so one gradient of its size is made on the
    way back, and not one for each branch.
    """

    def __init__(
        self,
        main: int,
        features: tuple[Feature, ...],
        grid: tuple[int, int] | None,
        local: bool,
        skeleton: Skeleton | _BackboneSkeleton | None,
        classes: int,
    ) -> None:
        super().__init__()
        self.main = main
        self.features = features
        self.grid = grid
        self.skeleton = skeleton
        channels = sum(f.channels for f in features) if local else 0
        self.norm = nn.LayerNorm(channels) if local else None
        self.head = nn.Linear(channels + (skeleton.channels if skeleton is not None else 0), classes)

    def forward(self, boundary: Boundary, batch: Any) -> Tensor:
        """-> logits [B, classes]."""
        joined: list[Tensor] = []
        local: list[Tensor] = []
        for i, (tensor, feature) in enumerate(zip(boundary.entering, self.features, strict=True)):
            feature_map = as_map(tensor, feature)
            if i == self.main and self.skeleton is not None:
                if self.grid is None:
                    joined.append(self.skeleton(tensor))
                else:
                    feature_map = reduce_to(feature_map, self.grid)
                    joined.append(self.skeleton(feature_map))
            if self.norm is not None:
                mean = feature_map.mean((2, 3))
                local.append(mean + tensor[:, : feature.prefix].mean(1) if feature.prefix else mean)
        if self.norm is not None:
            joined.append(self.norm(torch.cat(local, 1)))
        return self.head(torch.cat(joined, 1))


def as_map(tensor: Tensor, feature: Feature) -> Tensor:
    """The tensor as a map [B, C, H, W] (a view). Batch and resolution may differ from the profile's.

    Raises:
        ConfigError: a token sequence whose length is no grid of the profile's shape.
    """
    if feature.layout == "BCHW":
        return tensor
    if feature.layout == "BHWC":
        return tensor.permute(0, 3, 1, 2)
    if feature.layout == "BNC":
        tokens = tensor.shape[1] - feature.prefix
        h, w = feature.grid
        if tokens != h * w:
            scale = math.sqrt(tokens / (h * w))
            h, w = round(h * scale), round(w * scale)
            if h * w != tokens:
                raise ConfigError(
                    f"{tokens} tokens are no grid with the sides of {feature.grid}, which the learner was built for; "
                    "train with images of the sample's aspect ratio."
                )
        return tensor[:, feature.prefix :].transpose(1, 2).unflatten(2, (h, w))
    if feature.layout == "BC":
        return tensor[:, :, None, None]
    return tensor.flatten(1, -2).mean(1)[:, :, None, None]
