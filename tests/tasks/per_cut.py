"""The simplest rule for detection: a loss on what enters each cut."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from glcan.auxiliary import AuxiliaryRule, Site
from glcan.inspect.isolation import Boundary

#: To be followed by a number of blocks, or to stand beside cuts.
PER_CUT = f"{__name__}:PerCut"


class Trivial(nn.Module):
    def __init__(self, features: int) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.ones(features))

    def forward(self, boundary: Boundary, batch: Any) -> dict[str, Tensor]:
        assert [len(part) for part in batch] == [2, 2]  # the task's own batch, targets included
        squares = [t.square().mean() for t in boundary.entering]
        return {"first": (self.weights * torch.stack(squares)).sum(), "second": 0.5 * squares[0]}


class PerCut(AuxiliaryRule):
    name: ClassVar[str] = "per-cut"
    summary: ClassVar[str] = "a trivial loss at each cut"
    tasks: ClassVar[tuple[str, ...]] = ("detection",)

    def build(self, site: Site) -> nn.Module:
        return Trivial(len(site.features))
