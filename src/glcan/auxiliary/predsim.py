"""Local error signals (predsim, Nøkland and Eidnes 2019, arXiv 1901.06656).

Each block's loss is ``(1 - beta) * prediction + beta * similarity`` (section 3.1): cross-entropy of a linear classifier
on the averaged map, and the squared distance between the cosine similarities of the batch's features and those of its
labels. As in the authors' code, the features of the similarity are the standard deviations over the positions of a
3x3 convolution of the map, centred for each image; the map is halved along its sides, one after the other, until the
classifier has at most ``inputs`` inputs; the classifier begins at zero.

Deviations: the blocks are the plan's, not single layers; a boundary of several tensors is read as its largest map.
Where a map has one position only, its values stand for the standard deviations, as in the authors' code.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from glcan.auxiliary.base import AuxiliaryRule, Site
from glcan.auxiliary.maps import as_map
from glcan.errors import ConfigError
from glcan.inspect.features import Feature
from glcan.inspect.isolation import Boundary
from glcan.tasks.base import Task
from glcan.tasks.classification import Classification


class PredSim(AuxiliaryRule):
    """Cross-entropy of a linear classifier, and similarity matching."""

    name: ClassVar[str] = "predsim"
    summary: ClassVar[str] = "local error signals: prediction and similarity matching (arXiv 1901.06656)"
    tasks: ClassVar[tuple[str, ...]] = ("classification",)

    @dataclasses.dataclass(frozen=True)
    class Config:
        """Options.

        Attributes:
            beta: share of the similarity loss; 0 trains on predictions alone, 1 on similarities alone.
            inputs: of the linear classifier, at most.
        """

        beta: float = 0.99
        inputs: int = 4096

        def __post_init__(self) -> None:
            if not 0 <= self.beta < 1:
                raise ConfigError(f"predsim.beta is {self.beta}; it must lie in [0, 1).")
            if self.inputs < 1:
                raise ConfigError(f"predsim.inputs is {self.inputs}; it must be positive.")

    config: Config

    def build(self, site: Site) -> nn.Module:
        assert isinstance(site.task, Classification)
        assert site.task.classes is not None
        return PredSimAuxiliary(site.main, site.trunk, self.config.inputs, site.task.classes, self.config.beta > 0)

    def local_loss(self, task: Task, prediction: Any, batch: tuple[Any, ...]) -> Tensor:
        assert isinstance(task, Classification)
        assert task.classes is not None
        logits, features = prediction
        loss = (1 - self.config.beta) * task.local_loss(logits, batch)
        if features is not None:
            labels = batch[1] if batch[1].is_floating_point() else F.one_hot(batch[1], task.classes)
            wanted = similarity(labels.to(features.dtype))
            loss = loss + self.config.beta * F.mse_loss(similarity(features), wanted)
        return loss


def similarity(rows: Tensor) -> Tensor:
    """Cosine similarities of the centred rows: [B, D] -> [B, B]."""
    centred = rows - rows.mean(1, keepdim=True)
    unit = centred / (1e-8 + centred.square().sum(1, keepdim=True).sqrt())
    return (unit @ unit.T).clamp(-1, 1)


def halvings(channels: int, grid: tuple[int, int], inputs: int) -> tuple[int, int]:
    """The window of the average pooling, so that at most so many values are left (if they can be)."""
    kernel = [1, 1]

    def left() -> int:
        return channels * math.ceil(grid[0] / kernel[0]) * math.ceil(grid[1] / kernel[1])

    while left() > inputs and (kernel[0] < grid[0] or kernel[1] < grid[1]):
        for side in (0, 1):
            if left() > inputs:
                kernel[side] *= 2
    return kernel[0], kernel[1]


class PredSimAuxiliary(nn.Module):
    """A block's map [B, C, H, W] -> logits [B, classes], and features [B, C] for the similarities (or None)."""

    def __init__(self, main: int, feature: Feature, inputs: int, classes: int, matching: bool) -> None:
        super().__init__()
        self.main, self.feature = main, feature
        self.window = halvings(feature.channels, feature.grid, inputs)
        self.grid = math.ceil(feature.grid[0] / self.window[0]), math.ceil(feature.grid[1] / self.window[1])
        self.classifier = nn.Linear(feature.channels * math.prod(self.grid), classes)
        nn.init.zeros_(self.classifier.weight)
        self.matched = nn.Conv2d(feature.channels, feature.channels, 3, padding=1, bias=False) if matching else None

    def forward(self, boundary: Boundary, batch: Any) -> tuple[Tensor, Tensor | None]:
        """-> logits, and features or None."""
        own = as_map(boundary.entering[self.main], self.feature)
        logits = self.classifier(F.adaptive_avg_pool2d(own, self.grid).flatten(1))
        if self.matched is None:
            return logits, None
        positions = self.matched(own).flatten(2)
        return logits, positions.std(2) if positions.shape[2] > 1 else positions.flatten(1)
