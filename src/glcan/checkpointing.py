"""Activation checkpointing of an unmodified model, on `torch.utils.checkpoint`.

The baseline that local learning is measured against, done well: non-reentrant, with the batch statistics of
normalisation layers updated once (a plain `checkpoint` updates them twice, in the forward pass and in the
recomputation). And what local learning itself has use for: the end of a network that enlarges images, some images at a
time.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils._pytree import tree_map, tree_map_only
from torch.utils.checkpoint import checkpoint

from glcan.graphs import recording
from glcan.isolation import overridden
from glcan.profile import Profile

__all__ = ["checkpointed", "in_parts", "large_end", "segments_of", "with_large_end"]

# The end of a network is run in parts where the block that it is would hold more than this share of all activations.
_LARGE = 1 / 10
_PARTS = 8


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


@contextlib.contextmanager
def checkpointed(model: nn.Module, runs: Sequence[Sequence[str]]) -> Iterator[None]:
    """While this is open, the model's forward keeps only the inputs of each run of units for the backward pass.

    A run of several units is computed at its first unit; the others hand on what they are given. On exit the modules
    are as before.
    """
    with _together(model, runs, _recomputed):
        yield


def large_end(model: nn.Module, profile: Profile) -> tuple[str, ...]:
    """The units at the end of a network that are better run some images at a time, see `in_parts`; empty for none.

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


@contextlib.contextmanager
def in_parts(model: nn.Module, run: Sequence[str], batch: int) -> Iterator[None]:
    """While this is open, a run of units takes an eighth of so many images at a time, forward and backward.

    Kept for the backward pass is what enters the run, and never more than a part's activations beside it. As with
    `checkpointed`, the run is computed twice.
    """
    with _together(model, [run] if run else [], functools.partial(_recomputed, part=math.ceil(batch / _PARTS))):
        yield


@contextlib.contextmanager
def _together(
    model: nn.Module, runs: Sequence[Sequence[str]], chain: Callable[..., Callable[..., Any]]
) -> Iterator[None]:
    """Each run is computed at its first unit, as ``chain(forwards, modules)`` says; its other units hand on."""

    def forwards() -> Iterator[tuple[nn.Module, Callable[..., Any]]]:
        for run in runs:
            modules = [model.get_submodule(name) for name in run]
            yield modules[0], chain([m.forward for m in modules], modules)
            for module in modules[1:]:
                yield module, _hand_on

    with overridden(forwards()):
        yield


def _hand_on(value: Tensor) -> Tensor:
    return value


def _recomputed(
    forwards: list[Callable[..., Any]], modules: list[nn.Module], part: int | None = None
) -> Callable[..., Any]:
    norms = [m for module in modules for m in module.modules() if isinstance(m, _NormBase) and m.track_running_stats]

    writes = getattr(_first_leaf(modules[0]), "inplace", False)

    def chain(*args: Any, **kwargs: Any) -> Any:
        if writes:  # into what the recomputation will begin with
            args, kwargs = tree_map_only(Tensor, Tensor.clone, (args, kwargs))
        out = forwards[0](*args, **kwargs)
        for forward in forwards[1:]:
            out = forward(out)
        return out

    def again(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(
            chain,
            *args,
            use_reentrant=False,
            preserve_rng_state=not recording(),  # `RecordedPass` refuses what would need it
            context_fn=lambda: (contextlib.nullcontext(), _frozen_statistics(norms)),
            **kwargs,
        )

    def run(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = tree_map(lambda leaf: leaf, (args, kwargs))  # lists of one's own: the model may append to its
        if part is None or kwargs or len(args) != 1:
            return again(*args, **kwargs)
        return torch.cat([again(images) for images in args[0].split(part)])

    return run


def _first_leaf(module: nn.Module) -> nn.Module:
    """The first module inside that has no others inside: a dropout in front of a classifier."""
    while (first := next(module.children(), None)) is not None:
        module = first
    return module


@contextlib.contextmanager
def _frozen_statistics(norms: list[_NormBase]) -> Iterator[None]:
    """Running statistics keep their values, while the layers still normalise with the batch's own statistics."""
    before = [(norm, norm.momentum, norm.num_batches_tracked) for norm in norms]
    try:
        for norm in norms:
            norm.momentum = 0.0
            norm.num_batches_tracked = None
        yield
    finally:
        for norm, momentum, batches in before:
            norm.momentum = momentum
            norm.num_batches_tracked = batches
