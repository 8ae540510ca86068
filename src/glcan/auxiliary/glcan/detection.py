"""GLCAN for detection: a small pyramid from the block's own maps down, and a light head on it.

- *local branch*: each map that leaves the block, as a level of the pyramid at (about) its own scale; with
  ``pyramid_maps`` also those that pass by the next unit on their way to the detector's own pyramid;
- *global branch*: the macro-skeleton of what is still to come, one strided convolution for each coarser level;
- *collaboration*: from the coarsest level up, each is added to the next finer one, as in a feature pyramid (Lin et al.
  2017, arXiv 1612.03144), and all of them go through the same head.

Nothing is computed at a finer scale than the detector's own finest level: maps are reduced to it first.

Shapes: B batch, C channels, H x W a map.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from glcan.auxiliary.base import AuxiliaryRule, Site
from glcan.auxiliary.dense_head import DenseHead, convolution, head_flops, pyramid_grids, scale_of, total_classes
from glcan.auxiliary.glcan.budget import NAME, SUMMARY, check_budget, check_shared, share_of
from glcan.auxiliary.maps import as_map
from glcan.errors import ConfigError
from glcan.inspect.features import Feature
from glcan.inspect.isolation import Boundary
from glcan.tasks.detection import Detection

STEP = 16
"""Widths are multiples of this."""


# Convolutions before the head's predictions; the shares of an auxiliary network that it may cost to read the maps that
# pass by.
_TOWER, _PASSING = 2, 4


class GLCANDetection(AuxiliaryRule):
    """A small pyramid with a light head for each block, within a compute budget."""

    name: ClassVar[str] = NAME
    summary: ClassVar[str] = SUMMARY
    tasks: ClassVar[tuple[str, ...]] = ("detection",)

    @dataclasses.dataclass(frozen=True)
    class Config:
        """Options.

        Attributes:
            budget: forward FLOPs of all auxiliary networks together, as a share of the model's.
            unit_share: each auxiliary network may cost this share of the model's average unit even where the budget
                would give it less; 0, since most of a detector is its heads.
            use_local: the block's own maps are levels of the pyramid themselves.
            use_global: the coarser levels.
            width: channels of the pyramid as a share of the trunk's; none: solved for the budget.
            pyramid_maps: maps of the block that pass by the cut on their way to the detector's own pyramid are read as
                well, if the narrowest network that does costs no more than four shares. The planner does not know of
                their cost when it chooses the cuts.
            long_end: units of the last block, which learns as in end-to-end training, are recomputed so that it can be
                longer within the memory of the other blocks, up to this share of the model's forward FLOPs; 0: not.
        """

        budget: float = 0.09
        unit_share: float = 0.0
        use_local: bool = True
        use_global: bool = True
        width: float | None = None
        pyramid_maps: bool = True
        long_end: float = 0.08

        def __post_init__(self) -> None:
            check_budget(self.budget, self.unit_share)
            check_shared(self.use_local, self.use_global, self.width, self.long_end)

    config: Config

    @property
    def long_end(self) -> float:  # type: ignore[override]
        return self.config.long_end

    def build(self, site: Site) -> nn.Module:
        task = site.task
        assert isinstance(task, Detection)
        transform = getattr(site.model, "transform", None)
        if not isinstance(transform, nn.Module):
            raise ConfigError(
                f"{type(site.model).__name__} has no sub-module 'transform', which torchvision's detectors "
                "resize images and boxes with; the auxiliary networks need the boxes as the model sees them."
            )
        pyramid, classes = pyramid_grids(site.profile), total_classes(site.model)
        each = share_of(site, self.config.budget, self.config.unit_share) / site.profile.batch
        read = list(range(len(site.features)))
        features, levels = site.features, levels_of(site.features, pyramid)
        if self.config.pyramid_maps and self.config.use_global:
            # What passes by is read where the detector will read it.
            passing = [i for i, f in enumerate(site.skipping) if f.grid in pyramid]
            wider = (*features, *(site.skipping[i] for i in passing))
            grids = levels_of(wider, pyramid)
            if pyramid_flops(wider, grids, STEP, _TOWER, classes) <= _PASSING * each:
                features, levels = wider, grids
                read += [len(site.features) + i for i in passing]
        if not self.config.use_global:
            levels = levels[:1]
        if self.config.width is not None:
            width = max(8, 8 * round(self.config.width * site.trunk.channels / 8))
        else:
            width = fit_width(features, levels, _TOWER, classes, each)
        head = DenseHead(width, _TOWER, classes, scale_of(site.model, site.profile))
        return DetectionAuxiliary(features, read, levels, task, transform, head, width, self.config.use_local)


def levels_of(features: Sequence[Feature], pyramid: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """The grids of an auxiliary network's pyramid: the detector's own, from the block's finest map down."""
    finest = max(feature.grid for feature in features)
    if finest >= pyramid[0]:
        return list(pyramid)
    return [finest, *(grid for grid in pyramid if grid < finest)]


def nearest_level(grid: tuple[int, int], levels: Sequence[tuple[int, int]]) -> int:
    """The level whose grid is the nearest one to a map's (in octaves)."""
    return min(range(len(levels)), key=lambda i: abs(math.log2(levels[i][0] / grid[0])))


def pyramid_flops(
    features: Sequence[Feature],
    levels: Sequence[tuple[int, int]],
    width: int,
    depth: int,
    classes: int,
) -> float:
    """Forward FLOPs of `DetectionAuxiliary` for each image."""
    flops = 0.0
    for i, grid in enumerate(levels):
        flops += math.prod(grid) * (head_flops(width, depth, classes) + (18.0 * width * width if i else 0))
    for feature in features:
        flops += 2.0 * feature.channels * width * math.prod(levels[nearest_level(feature.grid, levels)])
    return flops


class DetectionAuxiliary(nn.Module):
    """Maps of a block -> a dict of losses.

    Args:
        features: of the maps that are read.
        read: which tensors these are, of those that enter the cut and then those that pass by it.
        levels: grids of the pyramid, the finest one first, see `levels_of`; the first one alone: no global branch.
        task: whose transformed targets are learned.
        transform: the detector's own, for batches that the detector has not seen.
        head: shared by the levels.
        width: channels of all levels.
        local: the block's own maps are levels themselves; without, they only feed the coarser ones.
    """

    def __init__(
        self,
        features: tuple[Feature, ...],
        read: Sequence[int],
        levels: Sequence[tuple[int, int]],
        task: Detection,
        transform: nn.Module,
        head: DenseHead,
        width: int,
        local: bool = True,
    ) -> None:
        super().__init__()
        self.features, self.read, self.task, self.local = features, tuple(read), task, local
        self.levels = list(levels)
        self._transform = (transform,)  # a tuple, so that the model's module does not become ours
        self.at = [nearest_level(f.grid, self.levels) for f in features]
        self.reduction = [max(1, round(f.grid[0] / self.levels[i][0])) for f, i in zip(features, self.at, strict=True)]
        self.lateral = nn.ModuleList(nn.Conv2d(f.channels, width, 1) for f in features)
        coarser = zip(self.levels, self.levels[1:], strict=False)
        self.units = nn.ModuleList(convolution(width, width, max(1, round(a[0] / b[0]))) for a, b in coarser)
        self.head = head
        for layer in self.lateral:
            assert isinstance(layer, nn.Conv2d)
            assert layer.bias is not None
            nn.init.kaiming_normal_(layer.weight, mode="fan_in", nonlinearity="linear")
            nn.init.zeros_(layer.bias)

    def forward(self, boundary: Boundary, batch: Any) -> dict[str, Tensor]:
        """-> the losses of classes, boxes and centerness."""
        images, targets = self.task.transformed(batch, self._transform[0])
        maps: list[Tensor | None] = [None] * len(self.levels)
        tensors = (*boundary.entering, *boundary.skipping)
        for i, feature, lateral, level, reduction in zip(
            self.read, self.features, self.lateral, self.at, self.reduction, strict=True
        ):
            own = as_map(tensors[i], feature)
            maps[level] = _sum(maps[level], lateral(F.avg_pool2d(own, reduction, ceil_mode=True)))
        for i, unit in enumerate(self.units):
            finer = maps[i]
            assert finer is not None  # the block's finest map is the first level
            maps[i + 1] = _sum(unit(finer), maps[i + 1])
        fused = [maps.pop()]
        while maps:
            own_level = None if len(maps) == 1 and not self.local else maps[-1]
            size = maps.pop()
            assert size is not None
            assert fused[0] is not None
            fused.insert(0, _sum(own_level, F.interpolate(fused[0], size=size.shape[-2:])))
        losses: dict[str, Tensor] = self.head(fused, images, targets)
        return losses


def _sum(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    """The sum of the maps that are there, in the first one's resolution."""
    if first is None or second is None:
        return second if first is None else first
    if first.shape != second.shape:
        second = F.interpolate(second, size=first.shape[-2:])
    return first + second


def fit_width(
    features: Sequence[Feature],
    levels: Sequence[tuple[int, int]],
    depth: int,
    classes: int,
    flops: float,
) -> int:
    """The widest pyramid, a multiple of 16 from 16 to 256, within so many forward FLOPs per image."""
    widths = range(STEP, 256 + 1, STEP)
    fits = [w for w in widths if pyramid_flops(features, levels, w, depth, classes) <= flops]
    return max(fits, default=STEP)
