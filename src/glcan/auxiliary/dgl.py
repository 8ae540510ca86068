"""Decoupled greedy learning (DGL, Belilovsky et al. 2020, arXiv 1901.08164).

Each block has an auxiliary network on its own map alone.

*Classification*, as the authors' code has "mlp-sr" (the staged spatial resolution of section 4): the map is averaged to
a quarter of each side, goes through three 1x1 convolutions of its own width with BatchNorm and ReLU, is averaged to
2 x 2, and classified by a perceptron of three hidden layers, as wide as its input, with BatchNorm. Deviation: several
maps that cross a cut are read as one, the largest.

*Detection* is our adaptation: the classifier becomes the dense head that `glcan` uses too, at the block's own scale
(not finer than the detector's finest level), and the pooling to 2 x 2 goes, because it throws away where things are.
Its width is solved for a budget. What is missing against `glcan` is the global branch, so it shows what that is worth.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from glcan.auxiliary.base import AuxiliaryRule, Site
from glcan.auxiliary.glcan.detection import GLCANDetection
from glcan.auxiliary.maps import as_map
from glcan.errors import ConfigError
from glcan.inspect.features import Feature
from glcan.inspect.isolation import Boundary
from glcan.tasks.classification import Classification

_SMALLER = 4  # along each side
_GRID = 2  # side of the map that is classified


class DGL(AuxiliaryRule):
    """Auxiliary networks on each block's own map."""

    name: ClassVar[str] = "dgl"
    summary: ClassVar[str] = "decoupled greedy learning (arXiv 1901.08164)"
    tasks: ClassVar[tuple[str, ...]] = ("classification", "detection")

    @dataclasses.dataclass(frozen=True)
    class Config:
        """Options.

        Attributes:
            convolutions: 1x1 convolutions (classification).
            layers: hidden layers of the perceptron (classification).
            budget: forward FLOPs of all auxiliary networks together, as a share of the model's (detection).
        """

        convolutions: int = 3
        layers: int = 3
        budget: float = 0.09

        def __post_init__(self) -> None:
            for option in ("convolutions", "layers"):
                if not 0 <= (value := getattr(self, option)) <= 16:
                    raise ConfigError(f"dgl.{option} is {value}; it must lie in 0 ... 16.")
            if not 0 < self.budget <= 10:
                raise ConfigError(f"dgl.budget is {self.budget}; it must lie in (0, 10], 0.1 for a tenth of the model.")

    config: Config

    def build(self, site: Site) -> nn.Module:
        if isinstance(site.task, Classification):
            assert site.task.classes is not None
            return PooledClassifier(
                site.main, site.trunk, self.config.convolutions, self.config.layers, site.task.classes
            )
        return GLCANDetection({"budget": self.config.budget, "use_global": False, "long_end": 0.0}).build(site)


class PooledClassifier(nn.Module):
    """A block's map [B, C, H, W] -> logits [B, classes]."""

    def __init__(self, main: int, feature: Feature, convolutions: int, layers: int, classes: int) -> None:
        super().__init__()
        self.main, self.feature = main, feature
        channels = feature.channels
        self.grid = math.ceil(feature.grid[0] / _SMALLER), math.ceil(feature.grid[1] / _SMALLER)
        self.convolutions = nn.Sequential()
        for _ in range(convolutions):
            self.convolutions += nn.Sequential(
                nn.Conv2d(channels, channels, 1, bias=False), nn.BatchNorm2d(channels), nn.ReLU(inplace=True)
            )
        width = channels * _GRID**2
        self.classifier = nn.Sequential()
        for _ in range(layers):
            self.classifier += nn.Sequential(nn.Linear(width, width), nn.BatchNorm1d(width), nn.ReLU(inplace=True))
        self.classifier.append(nn.Linear(width, classes))

    def forward(self, boundary: Boundary, batch: Any) -> Tensor:
        """-> logits [B, classes]."""
        own = as_map(boundary.entering[self.main], self.feature)
        reduced = self.convolutions(F.adaptive_avg_pool2d(own, self.grid))
        logits: Tensor = self.classifier(F.adaptive_avg_pool2d(reduced, _GRID).flatten(1))
        return logits
