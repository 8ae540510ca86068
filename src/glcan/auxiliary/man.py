"""Momentum auxiliary networks: MAN (Su et al. 2024, arXiv 2407.05623) and MAN++ (Su et al. 2025, arXiv 2507.16279).

A block has the auxiliary network of another rule, `dgl` or `infopro`, but behind a copy of the next block's first
unit. The copy begins equal to that unit and follows it: before each pass its weights become
``momentum * copy + (1 - momentum) * unit``. No gradient trains them (they are buffers), but gradients go through them
to the block. So the block learns what the next one can use, and no gradient crosses the cut.

Beside the copy stands what is trained, the *learnable bias*: in the authors' code a whole second unit of the same
structure. With x the block's output, the auxiliary network is given

    MAN:    y = copy(x) + bias(x),
    MAN++:  y = (2 - s) * copy(x) + s * bias(x),  s a learnable number, 1 at first.

docs/rules/man.md says what agrees with the authors' code and what does not.

Shape letters: B batch, C channels, H x W map.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from glcan.auxiliary.backbone import copied, followers, frozen_copy, move_towards, redrawn, through
from glcan.auxiliary.base import AuxiliaryRule, Site
from glcan.auxiliary.dgl import DGL
from glcan.auxiliary.infopro import InfoPro
from glcan.errors import ConfigError
from glcan.inspect.isolation import Boundary
from glcan.inspect.profile import Unit
from glcan.tasks.base import Task


class MAN(AuxiliaryRule):
    """Another rule's auxiliary networks, behind a momentum copy of the next block's first unit."""

    name: ClassVar[str] = "man"
    summary: ClassVar[str] = "momentum copy of the next unit, learnable bias (arXiv 2407.05623)"
    tasks: ClassVar[tuple[str, ...]] = ("classification",)
    scaled: ClassVar[bool] = False

    @dataclasses.dataclass(frozen=True)
    class Config:
        """Options.

        Attributes:
            base: the auxiliary network behind the copy: "dgl" or "infopro" (with cross-entropy).
            momentum: of the copy: from one pass to the next, this share of it is kept.
            units: how many units are copied from the cut on, one after the other.
            bias: "unit": a second, trained unit beside the copy, as in the authors' code; "channel": a number for each
                channel, 0 at first; "none": the copy alone, as in the paper's ablation.
            reconstruct, classify: weights of the two losses of ``base="infopro"``, in every block.
        """

        base: Literal["dgl", "infopro"] = "dgl"
        momentum: float = 0.995
        units: int = 1
        bias: Literal["unit", "channel", "none"] = "unit"
        reconstruct: float = 5.0
        classify: float = 0.5

    config: Config

    def __init__(self, options: Mapping[str, Any] | None = None) -> None:
        super().__init__(options)
        config = self.config
        if not 0 <= config.momentum < 1:
            raise ConfigError(
                f"{self.name}.momentum is {config.momentum}; it must lie in [0, 1): 1 would freeze the copies for good."
            )
        if not 1 <= config.units <= 16:
            raise ConfigError(f"{self.name}.units is {config.units}; it must lie in 1 ... 16.")
        for option in ("reconstruct", "classify"):
            if (value := getattr(config, option)) < 0:
                raise ConfigError(f"{self.name}.{option} is {value}; it must not be negative.")
        self.base: AuxiliaryRule = DGL()
        if config.base == "infopro":
            self.base = InfoPro(
                {
                    "mode": "cross_entropy",
                    "reconstruct_first": config.reconstruct,
                    "reconstruct_last": config.reconstruct,
                    "classify_first": config.classify,
                    "classify_last": config.classify,
                }
            )

    def build(self, site: Site) -> nn.Module:
        units = followers(site, self.config.units)
        if not units:
            if site.block is not None:
                warnings.warn(
                    f"No unit after the cut at {site.cut.name!r} takes what the block before it gives, so the rule "
                    f"{self.name!r} has nothing to copy there and works as {self.base.name!r}. Cut elsewhere.",
                    stacklevel=2,
                )
            return self.base.build(site)
        last = units[-1]
        assert last.output is not None  # of a layer
        # The other rule stands where the copies end.
        beyond = dataclasses.replace(site.cut, entering=(last.output,), index=last.index + 1)
        base = self.base.build(dataclasses.replace(site, cut=beyond))
        return MomentumAuxiliary(site, units, self.config.bias, self.scaled, base)

    def local_loss(self, task: Task, prediction: Any, batch: tuple[Any, ...]) -> Tensor:
        return self.base.local_loss(task, prediction, batch)

    def segments(self, auxiliary: nn.Module) -> list[list[str]]:
        if not isinstance(auxiliary, MomentumAuxiliary):
            return self.base.segments(auxiliary)
        kinds = ("copies", "bias_units") if auxiliary.bias_units is not None else ("copies",)
        own = [[f"{kind}.{i}"] for kind in kinds for i in range(len(auxiliary.copies))]
        return own + [[f"base.{name}" for name in run] for run in self.base.segments(auxiliary.base)]

    def before_pass(self, auxiliary: nn.ModuleDict, model: nn.Module) -> None:
        for network in auxiliary.values():
            if isinstance(network, MomentumAuxiliary):
                move_towards(network.names, network.copies, model, self.config.momentum)


class MANPlusPlus(MAN):
    """MAN with a learnable scale between the copy and the bias."""

    name: ClassVar[str] = "manpp"
    summary: ClassVar[str] = "momentum copy of the next unit, learnable bias and scale (arXiv 2507.16279)"
    scaled: ClassVar[bool] = True


class MomentumAuxiliary(nn.Module):
    """What a block gives -> what another rule's auxiliary network makes of the momentum copies' output.

    Args:
        site: of the auxiliary network.
        units: to be copied.
        bias: "unit", "channel" or "none".
        scaled: with the learnable scale of MAN++.
        base: the other rule's auxiliary network, which reads the only tensor that it is given.

    Attributes:
        names: of the copied units.
        copies: their momentum copies.
        bias_units: trained units of the same structure beside them; None where there are none.
        bias: [C], with ``bias="channel"``; else None.
        scale: s of MAN++; else None.
    """

    def __init__(self, site: Site, units: list[Unit], bias: str, scaled: bool, base: nn.Module) -> None:
        super().__init__()
        self.main = site.main
        self.names = [unit.name for unit in units]
        self.copies = nn.ModuleList(frozen_copy(site.model, name) for name in self.names)
        self.bias_units: nn.ModuleList | None = None
        self.bias: nn.Parameter | None = None
        self.scale = nn.Parameter(torch.ones(())) if scaled else None
        if bias == "unit":
            self.bias_units = nn.ModuleList(redrawn(copied(site.model, name)) for name in self.names)
        output = units[-1].output
        assert output is not None
        if bias == "channel":
            shape = (output.channels, 1, 1) if output.layout == "BCHW" else (output.channels,)
            self.bias = nn.Parameter(torch.zeros(shape))
        self.base = base

    def forward(self, boundary: Boundary, batch: Any) -> Any:
        """-> what the other rule's `local_loss` takes."""
        entering = boundary.entering[self.main]
        value = through(self.copies, entering)
        if self.scale is not None:
            value = (2 - self.scale) * value
        bias = through(self.bias_units, entering) if self.bias_units is not None else self.bias
        if bias is not None:
            value = value + (bias if self.scale is None else self.scale * bias)
        return self.base(dataclasses.replace(boundary, entering=(value,), skipping=()), batch)
