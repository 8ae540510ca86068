"""The auxiliary networks of classification."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from glcan.isolation import Boundary
from glcan.profile import Feature, Unit
from glcan.rules.backbone import frozen_copy, through
from glcan.rules.glcan.skeleton import BackboneSkeleton, Skeleton
from glcan.rules.maps import as_map, pooled, reduce_to


class ClassificationAuxiliary(nn.Module):
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
        skeleton: Skeleton | BackboneSkeleton | None,
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


class LookAhead(nn.Module):
    """A copy of the next real unit, and a linear classifier: the end of the model, as it would be if it ended there.

    The copy has the unit's present weights. Gradients go through it to the block, none trains it.

    Args:
        main: index of the tensor that the unit takes.
        model: the model.
        unit: to be copied.
        classes: of the task.
    """

    def __init__(self, main: int, model: nn.Module, unit: Unit, classes: int) -> None:
        super().__init__()
        assert unit.output is not None
        self.main, self.name, self.feature = main, unit.name, unit.output
        self.unit = frozen_copy(model, unit.name)
        self.norm = nn.LayerNorm(unit.output.channels)
        self.head = nn.Linear(unit.output.channels, classes)

    def forward(self, boundary: Boundary, batch: Any) -> Tensor:
        """-> logits [B, classes]."""
        return self.head(self.norm(pooled(through([self.unit], boundary.entering[self.main]), self.feature)))
