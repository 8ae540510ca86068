"""Copies of the model's own units, which auxiliary networks of several rules are made of.

Shape letters: B batch, C channels, H x W map, N tokens.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from glcan.auxiliary.base import Site
from glcan.auxiliary.maps import as_map, reduce_to
from glcan.inspect.features import Feature
from glcan.inspect.profile import Profile, Unit
from glcan.inspect.tensors import tensors_in

__all__ = [
    "Adapter",
    "copied",
    "copyable",
    "followers",
    "form",
    "frozen_copy",
    "layers",
    "move_towards",
    "redrawn",
    "through",
]


def form(feature: Feature) -> tuple[str, int, tuple[int, int], int]:
    """What a unit that takes one such tensor must agree with another one in: layout, channels, grid, special tokens."""
    return feature.layout, feature.channels, feature.grid, feature.prefix


def copyable(profile: Profile, after: int = 0) -> list[Unit]:
    """The units from this index on that have weights, give a map, and take (at most) one tensor that needs a gradient.

    Classifiers, pooling, lone activations and norms are left out, and so is what joins several tensors, since a copy of
    it would have to be given all of them.
    """
    return [
        unit
        for unit in profile.units[after:]
        if unit.weights and unit.output is not None and unit.output.layout not in ("BC", "?") and len(unit.entering) < 2
    ]


def layers(profile: Profile) -> list[Unit]:
    """The units (see `copyable`) of which the depth of the model consists.

    What does nothing but lead from one stage to the next is none: a unit with one weight matrix whose class always
    changes the resolution, in a model with other units that keep it (the down-sampling of Swin and ConvNeXt).
    """
    units = copyable(profile)
    keeping = {unit.kind for unit in units if unit.entering and _keeps(unit)}
    return [unit for unit in units if unit.weights > 1 or not unit.entering or not keeping or unit.kind in keeping]


def _keeps(unit: Unit) -> bool:
    return unit.output is not None and unit.output.grid == unit.entering[0].grid


def followers(site: Site, count: int) -> list[Unit]:
    """The units to copy: the first one after the cut that takes the trunk, and those that take what it gives.

    What only leads from one stage to the next comes with them, but does not count.
    """
    counted = {unit.name for unit in layers(site.profile)}
    found: list[Unit] = []
    feature = site.trunk
    for unit in copyable(site.profile, site.cut.index):
        if sum(u.name in counted for u in found) == count:
            break
        if unit.entering and form(unit.entering[0]) == form(feature):
            assert unit.output is not None
            found.append(unit)
            feature = unit.output
        elif found:
            break
    return found


def copied(model: nn.Module, name: str) -> nn.Module:
    """A trainable copy of a unit with its present weights and buffers; of a frozen unit as well."""
    unit = model.get_submodule(name)
    # Not left to deepcopy, which copies the mode of fake tensors with them (the models that plans are made of): under
    # torch 2.15 the process crashed later on.
    copies: dict[int, Any] = {id(b): b.detach().clone() for b in unit.buffers()}
    copies |= {id(p): nn.Parameter(p.detach().clone(), requires_grad=True) for p in unit.parameters()}
    return copy.deepcopy(unit, copies)


def redrawn(unit: nn.Module) -> nn.Module:
    """The unit with its weights drawn anew, by each sub-module's own ``reset_parameters``.

    Convolutions (not grouped ones) get He's initialisation, by the number of outputs. Tensors of a sub-module that has
    no such method, and holds them itself (a layer scale, a table of relative positions), stay as they are.
    """
    for module in unit.modules():
        reset = getattr(module, "reset_parameters", None) or getattr(module, "_reset_parameters", None)
        if callable(reset):
            reset()
        if isinstance(module, nn.Conv2d) and module.groups == 1:
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return unit


def frozen_copy(model: nn.Module, name: str) -> nn.Module:
    """A copy of a unit whose weights are buffers under their own names.

    No optimizer sees them, and ``state_dict`` keeps them.
    """
    unit = copied(model, name)
    for module in unit.modules():
        for key, parameter in list(module.named_parameters(recurse=False)):
            delattr(module, key)
            module.register_buffer(key, parameter.detach())
    return unit


@torch.no_grad()
def move_towards(names: Sequence[str], units: Iterable[nn.Module], model: nn.Module, momentum: float) -> None:
    """Each copy's weights become ``momentum * copy + (1 - momentum) * real unit``.

    The model's parameters alone: statistics of normalisation stay the copy's own, which sees other tensors than the
    real unit.
    """
    for name, unit in zip(names, units, strict=True):
        own = dict(itertools.chain(unit.named_parameters(), unit.named_buffers()))
        for key, real in model.get_submodule(name).named_parameters():
            own[key].lerp_(real.to(own[key].dtype), 1 - momentum)


def through(units: Iterable[nn.Module], value: Tensor) -> Tensor:
    """The units one after the other; of a unit that gives several tensors, the largest is handed on."""
    for unit in units:
        output = unit(value)
        value = output if isinstance(output, Tensor) else max(tensors_in(output), key=Tensor.numel)
    return value


class Adapter(nn.Module):
    """Brings a tensor to the form that a unit takes: average pooling, and a 1x1 convolution with BatchNorm.

    Special tokens of the new form, if it has any, begin as the mean over the map.

    Args:
        before, after: the two forms. A grid finer than the tensor's own is not made: the map stays as it is.
    """

    def __init__(self, before: Feature, after: Feature) -> None:
        super().__init__()
        self.before, self.after = before, after
        self.project = nn.Conv2d(before.channels, after.channels, 1, bias=False)
        self.norm = nn.BatchNorm2d(after.channels)
        nn.init.kaiming_normal_(self.project.weight, mode="fan_out", nonlinearity="linear")

    def forward(self, value: Tensor) -> Tensor:
        """A tensor of the first form -> one of the second."""
        own = self.norm(self.project(reduce_to(as_map(value, self.before), self.after.grid)))
        if self.after.layout == "BHWC":
            return own.permute(0, 2, 3, 1)
        if self.after.layout == "BNC":
            tokens = own.flatten(2).transpose(1, 2)
            return torch.cat([tokens.mean(1, keepdim=True).expand(-1, self.after.prefix, -1), tokens], 1)
        return own
