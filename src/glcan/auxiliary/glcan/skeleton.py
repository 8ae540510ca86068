"""The macro-skeleton: one light unit for each stage that is still to come, within a budget of FLOPs and bytes.

Shape letters: B batch, C channels, H x W map, N tokens.
"""

from __future__ import annotations

import dataclasses
import itertools
import math

from torch import Tensor, nn

from glcan.auxiliary.base import Site
from glcan.inspect.features import Feature


@dataclasses.dataclass(frozen=True)
class Level:
    """One unit of the macro-skeleton: the map it gives, and the width of the real stage that it stands for."""

    grid: tuple[int, int]
    channels: int
    unit_flops: float = math.inf
    """Forward FLOPs per image of a real unit of that stage, on average."""


def skeleton_levels(site: Site, feature: Feature, depth: int) -> list[Level]:
    """The maps that the skeleton goes through: one for each remaining stage; in the last stage, that stage's own.

    Where that makes fewer than ``depth``, the last one is repeated: the blocks of the last stages need a network
    between them and their loss as well, or they give up for it what the blocks before them made.
    """
    stages = site.to_come or [site.ahead or feature]
    levels = [Level(f.grid, f.channels, _unit_flops(site, f.grid)) for f in stages]
    return levels + levels[-1:] * (depth - len(levels))


def _unit_flops(site: Site, grid: tuple[int, int]) -> float:
    """Forward FLOPs per image of a unit after the cut whose map has this grid, on average."""
    units = [u for u in site.profile.units[site.cut.index :] if u.output is not None and u.output.grid == grid]
    weighted = [u.flops for u in units if u.weights]
    return sum(weighted) / len(weighted) / site.profile.batch if weighted else math.inf


def strides_of(levels: list[Level]) -> list[tuple[int, int]]:
    """Of the units: what brings one level's map to the next one's grid."""
    strides = [(1, 1)]
    for before, after in itertools.pairwise(levels):
        strides.append((max(1, round(before.grid[0] / after.grid[0])), max(1, round(before.grid[1] / after.grid[1]))))
    return strides


def widths_of(channels: int, levels: list[Level], share: float, unit_cost: float) -> list[int]:
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


def skeleton_flops(channels: int, levels: list[Level], widths: list[int]) -> int:
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


def skeleton_bytes(channels: int, levels: list[Level], widths: list[int]) -> int:
    """Activations per image that `Skeleton` needs: its input, two maps for each convolution, its largest gradient."""
    elements = channels * math.prod(levels[0].grid)
    elements += 2 * widths[0] * math.prod(levels[0].grid) if widths[0] < channels else 0
    maps = [width * math.prod(level.grid) for level, width in zip(levels, widths, strict=True)]
    return 4 * (elements + 2 * sum(maps) + max(maps))


def fit_widths(
    channels: int, levels: list[Level], flops: float, memory: float = math.inf, unit_cost: float = math.inf
) -> list[int]:
    """The widest skeleton (at most the real network's width) that keeps its budgets.

    Args:
        channels: C of the map that enters.
        levels: of the skeleton.
        flops: forward FLOPs per image.
        memory: bytes of activations per image.
        unit_cost: FLOPs of each unit as a share of the real unit's.
    """
    best = widths_of(channels, levels, 0.0, unit_cost)
    for step in range(1, 65):
        widths = widths_of(channels, levels, step / 64, unit_cost)
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
        self.narrowest = min(widths)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, reduced: Tensor) -> Tensor:
        """The map, reduced to (about) the first level's grid: [B, C, H, W] -> [B, channels]."""
        return self.units(reduced).mean((2, 3))
