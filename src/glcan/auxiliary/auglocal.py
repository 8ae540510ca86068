"""AugLocal (Ma et al. 2024, "Scaling Supervised Local Learning with Augmented Auxiliary Networks", arXiv 2402.17318).

The auxiliary network of a block has the structure of some of the model's own layers that are still to come, selected at
equal distances up to the last one (*uniform selection*), with weights of its own; then the mean over the map and a
linear classifier. The later the block, the fewer layers (*pyramidal depth*). Layers here are the model's units that
have weights and give a map (`glcan.auxiliary.backbone.layers`).

With l the number of the layer before the cut and L layers in all, counted from 0, d of them are

    round(l + i * (L - l - 1) / d),  i = 1 ... d,

or all that are left, if there are no more than d. With K blocks, that of block k = 0 ... K - 2 is at most

    d_k = max(1, round(d_max + p * k / (K - 2) * (d_min - d_max))).

Rounding is Python's, a half goes to the even number, as in the authors' code.

A selected layer rarely takes what the one before it gives. In its place stands, in this order: itself, if it does; a
layer of the same class that takes what is there and gives the same (the first one of a stage, as where the authors
build a residual block of stride 2); itself behind the layer that leads there (the down-sampling between two stages of a
transformer); itself behind average pooling and a 1x1 convolution.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

from torch import Tensor, nn

from glcan.auxiliary.backbone import Adapter, copied, copyable, form, layers, redrawn, through
from glcan.auxiliary.base import AuxiliaryRule, Site
from glcan.auxiliary.maps import pooled
from glcan.errors import ConfigError
from glcan.inspect.isolation import Boundary
from glcan.inspect.profile import Unit
from glcan.tasks.classification import Classification


class AugLocal(AuxiliaryRule):
    """Auxiliary networks of layers like those that are still to come."""

    name: ClassVar[str] = "auglocal"
    summary: ClassVar[str] = "augmented auxiliary networks: layers like those to come (arXiv 2402.17318)"
    tasks: ClassVar[tuple[str, ...]] = ("classification",)

    @dataclasses.dataclass(frozen=True)
    class Config:
        """Options.

        Attributes:
            depth: d_max, layers of the first block's auxiliary network, at most.
            least: d_min.
            pyramid: p, how far the depth falls towards `least` from the first block to the last one; 0: not at all.
        """

        depth: int = 2
        least: int = 1
        pyramid: float = 0.5

        def __post_init__(self) -> None:
            if not 1 <= self.depth <= 64:
                raise ConfigError(f"auglocal.depth is {self.depth}; it must lie in 1 ... 64.")
            if not 1 <= self.least <= self.depth:
                raise ConfigError(f"auglocal.least is {self.least}; it must lie in 1 ... depth, which is {self.depth}.")
            if not 0 <= self.pyramid <= 1:
                raise ConfigError(f"auglocal.pyramid is {self.pyramid}; it must lie in [0, 1], 0 for equal depths.")

    config: Config

    def build(self, site: Site) -> nn.Module:
        assert isinstance(site.task, Classification)
        assert site.task.classes is not None
        depth = pyramidal(self.config.depth, self.config.least, self.config.pyramid, site.depth)
        return AugLocalAuxiliary(site, depth, site.task.classes)

    def segments(self, auxiliary: nn.Module) -> list[list[str]]:
        assert isinstance(auxiliary, AugLocalAuxiliary)
        return [[f"units.{name}"] for name, _ in auxiliary.units.named_children()]


def pyramidal(most: int, least: int, pyramid: float, place: float) -> int:
    """The depth of an auxiliary network.

    Args:
        most, least, pyramid: d_max, d_min, p.
        place: 0 for the first block, 1 for the last one with an auxiliary network.
    """
    return max(1, round(most + pyramid * place * (least - most)))


def uniform(layer: int, count: int, depth: int) -> list[int]:
    """The numbers of the selected layers.

    Args:
        layer: number of the layer before the cut, from 0.
        count: layers in all.
        depth: how many to select, at most.
    """
    left = count - 1 - layer
    if depth >= left:
        return list(range(layer + 1, count))
    return [round(layer + left / depth * i) for i in range(1, depth + 1)]


def selected(site: Site, depth: int) -> list[Unit]:
    """The layers after the cut whose structure the auxiliary network has, in order; none if none is left."""
    found = [unit for unit in layers(site.profile) if unit.index < site.cut.index or unit.entering]
    before = sum(unit.index < site.cut.index for unit in found)
    return [found[i] for i in uniform(before - 1, len(found), depth)]


class AugLocalAuxiliary(nn.Module):
    """What a block gives -> logits [B, classes], through layers like the model's own.

    Attributes:
        names: of the units whose structure the auxiliary network's units have, in order; "" for an adapter.
        units: these.
        feature: what they give.
    """

    def __init__(self, site: Site, depth: int, classes: int) -> None:
        super().__init__()
        self.main = site.main
        self.names: list[str] = []
        self.units = nn.ModuleList()
        self.feature = site.trunk
        ahead = [unit for unit in copyable(site.profile, site.cut.index) if unit.entering]
        for unit in selected(site, depth):
            self._append(site, unit, ahead)
        channels, tokens = self.feature.channels, self.feature.layout in ("BNC", "BHWC")
        self.norm: nn.Module = nn.Identity()
        if tokens:  # as such models have before their own classifier
            self.norm = nn.LayerNorm(channels)
        elif depth == 1:
            self.norm = nn.BatchNorm1d(channels)
        self.classifier = nn.Linear(channels, classes)

    def _append(self, site: Site, unit: Unit, ahead: list[Unit]) -> None:
        """A unit of this structure at the end, after what makes it fit."""
        wanted = unit.entering[0]
        steps: list[Unit | None] = [unit]
        if form(wanted) != form(self.feature):
            fitting = [u for u in ahead if form(u.entering[0]) == form(self.feature)]
            same = [u for u in fitting if u.kind == unit.kind and _gives(u) == _gives(unit)]
            leading = [u for u in fitting if _gives(u) == form(wanted)]
            steps = [same[0]] if same else [leading[0] if leading else None, unit]
        for step in steps:
            self.names.append(step.name if step is not None else "")
            self.units.append(
                redrawn(copied(site.model, step.name)) if step is not None else Adapter(self.feature, wanted)
            )
        assert unit.output is not None  # of a layer
        self.feature = unit.output

    def forward(self, boundary: Boundary, batch: Any) -> Tensor:
        """-> logits [B, classes]."""
        value = through(self.units, boundary.entering[self.main])
        logits: Tensor = self.classifier(self.norm(pooled(value, self.feature)))
        return logits


def _gives(unit: Unit) -> Any:
    return form(unit.output) if unit.output is not None else None
