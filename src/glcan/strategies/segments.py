"""Which units are recomputed together, and which end of a network is better run some images at a time."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from glcan.inspect.profile import Profile

__all__ = ["large_end", "segments_of", "square_root", "with_large_end"]

# The end of a network is run in parts where the block that it is would hold more than this share of all activations.
_LARGE = 1 / 10


def segments_of(profile: Profile, count: int | None = None) -> list[list[str]]:
    """Runs of units that are recomputed together.

    A run begins at a unit with weights; what follows without any (normalisation, activation, pooling: they may work in
    place) belongs to it. A unit that something else happens before (not `chained`) cannot join a run.

    Args:
        profile: of the model.
        count: about so many runs, with even saved bytes; None for one run a unit with weights.
    """
    wanted = 0.0 if count is None else sum(unit.saved_bytes for unit in profile.units) / max(1, count)
    runs: list[list[str]] = []
    filled, opened = 0.0, False
    for unit in profile.units:
        joins = opened and unit.chained and (not unit.weights or filled + unit.saved_bytes / 2 < wanted)
        if joins:
            runs[-1].append(unit.name)
            filled += unit.saved_bytes
        elif unit.weights:
            runs.append([unit.name])
            filled, opened = float(unit.saved_bytes), True
        else:
            opened = False
    return runs


def square_root(profile: Profile) -> int:
    """About sqrt(n) segments for n units with weights (Chen et al. 2016, section 4.3)."""
    return max(1, round(math.sqrt(sum(unit.weights > 0 for unit in profile.units))))


def large_end(model: nn.Module, profile: Profile) -> tuple[str, ...]:
    """The units at the end of a network that are better run some images at a time; empty for none.

    They are the last step of an upsampler and what follows, where maps are so large that a block of these units alone
    would set the peak. Only for models that treat each image by itself, so not with batch normalisation in these units.
    """
    upsampler = profile.upsampler
    final = max((unit.output.grid for unit in upsampler if unit.output), default=(0, 0))
    steps = [i for i, u in enumerate(upsampler) if u.weights and u.entering and u.entering[0].grid < final]
    units = upsampler[steps[-1] :] if steps else ()
    held = sum(u.saved_bytes for u in units) + max((u.output.bytes for u in units if u.output), default=0)  # a gradient
    if held <= _LARGE * sum(u.saved_bytes for u in profile.units):
        return ()
    modules = [m for unit in units for m in model.get_submodule(unit.name).modules()]
    return () if any(isinstance(m, _NormBase) for m in modules) else tuple(unit.name for unit in units)


def with_large_end(model: nn.Module, profile: Profile, cuts: Collection[str] = ()) -> Profile:
    """The profile, with its `large_end` as what runs in parts; as it is where one of these cuts lies inside."""
    end = large_end(model, profile)
    return dataclasses.replace(profile, parted=() if set(end[1:]) & set(cuts) else end)
