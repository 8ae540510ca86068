"""The auxiliary networks of classification."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from glcan.isolation import Boundary
from glcan.profile import Feature, Unit
from glcan.rules.backbone import frozen_copy, move_towards, through
from glcan.rules.glcan.skeleton import BackboneSkeleton, Skeleton
from glcan.rules.maps import as_map, pooled, reduce_to


class ClassificationAuxiliary(nn.Module):
    """Pooled local features and the skeleton's, joined and classified.

    Every tensor that enters is read once, by the pooling that reduces it: so one gradient of its size is made on the
    way back, and not one for each branch.

    Args:
        main: index of the trunk among the tensors that enter.
        features: of these tensors.
        grid: that the trunk is reduced to before the skeleton; none: as it is.
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
        skeleton: Skeleton | BackboneSkeleton | None,
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
