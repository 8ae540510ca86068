"""Decoupled greedy learning (DGL, Belilovsky et al. 2020, arXiv 1901.08164), adapted to boxes.

DGL's auxiliary network sees its block's own map alone, reduced in resolution, through a few convolutions and a
classifier. Deviations, for detection: the classifier becomes the dense head that `glcan` uses too, at the block's own
scale only (not finer than the detector's finest level), and the pooling to 2 x 2 goes, because it throws away where
things are. Its width is solved for the same budget as that of `glcan`. What is missing against `glcan` is the global
branch: so it shows what that is worth.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from torch import nn

from glcan.errors import ConfigError
from glcan.rules.base import Rule, Site
from glcan.rules.glcan import GLCAN


class DGL(Rule):
    """Auxiliary heads at each block's own scale."""

    name: ClassVar[str] = "dgl"
    summary: ClassVar[str] = "decoupled greedy learning: heads at the block's own scale only (arXiv 1901.08164)"
    tasks: ClassVar[tuple[str, ...]] = ("detection",)

    @dataclasses.dataclass(frozen=True)
    class Config:
        """Options.

        Attributes:
            budget: forward FLOPs of all auxiliary networks together, as a share of the model's.
        """

        budget: float = 0.09

        def __post_init__(self) -> None:
            if not 0 < self.budget <= 10:
                raise ConfigError(f"dgl.budget is {self.budget}; it must lie in (0, 10], 0.1 for a tenth of the model.")

    config: Config

    def build(self, site: Site) -> nn.Module:
        return GLCAN({"budget": self.config.budget, "use_global": False}).build(site)
