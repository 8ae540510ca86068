"""What a training step will need in bytes and FLOPs, and the cheapest way to stay within a budget."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from glcan import strategies, tasks
from glcan.errors import ConfigError, CutError
from glcan.learner import OptimizerFactory
from glcan.planning.batches import LargestBatch, largest_batches
from glcan.planning.bench import Bench
from glcan.planning.forecast import Forecast
from glcan.planning.search import fit, free_bytes
from glcan.sizes import parse_bytes
from glcan.strategies.base import Wanted
from glcan.strategies.method import parse_method

__all__ = ["Forecast", "LargestBatch", "free_bytes", "largest_batches", "plan"]


def plan(
    model: nn.Module,
    task: str | tasks.Task = "classification",
    sample: Sequence[Any] | None = None,
    *,
    method: str = "glcan:4",
    options: Mapping[str, Any] | None = None,
    cuts: Sequence[str] | None = None,
    recompute: bool | Sequence[str] = False,
    memory: str | int | None = None,
    units: Sequence[str] | None = None,
    optimizer: OptimizerFactory | None = None,
    autocast: torch.dtype | None = None,
    baselines: Sequence[str] | None = None,
) -> Forecast:
    """What a training step will need, before any training.

    Args:
        model: not changed, not run for real; may be on any device, the meta device included.
        task, method, options, cuts, recompute, units, optimizer, autocast: as `glcan.Learner` takes them. Without an
            optimizer, the step is ``backward()``, which leaves all gradients alive.
        sample: a batch of the size that is to be trained with, or fake tensors of its shapes.
        memory: a budget such as "8GiB", or "auto" for what the model's CUDA device has free, less a tenth. A local
            method without a number of blocks ("glcan") gets the plan with the fewest FLOPs whose peak fits; where
            several cost the same within 8 % of end-to-end training, the one with the fewest blocks. Recomputing blocks
            is part of the search.
        baselines: methods to compare with. None: end-to-end training, activation checkpointing, accumulation, and
            `selective`.

    Raises:
        ConfigError: nothing fits the budget (says what holds the peak, and what would help), or see `glcan.Learner`.
        CutError, UnknownName: what was asked for does not fit.
    """
    if sample is None:
        raise ConfigError("sample is missing; give a batch such as sample=(images, labels) of the size to plan for.")
    if memory is not None and (cuts is not None or recompute):
        raise ConfigError("Give either memory=... or cuts and recompute, not both: a budget decides these.")
    parsed = parse_method(method)
    local = strategies.family_of(parsed.base) == "local"
    if local and parsed.number is None and cuts is None and memory is None:
        raise CutError(f"{method!r} has no number of blocks: write '{parsed.base}:4', or give cuts or memory.")
    bench = Bench(model, task, tuple(sample), units, optimizer, autocast)
    limit = None
    if memory is None:
        again = recompute if isinstance(recompute, bool) else tuple(recompute)
        chosen = bench.run(parsed, options, Wanted(None if cuts is None else tuple(cuts), again))
    else:
        limit = free_bytes(model) if memory == "auto" else parse_bytes(memory)
        chosen = fit(bench, parsed, options, limit)
    if baselines is None:
        baselines = _baselines(chosen, len(bench.batch[0]), parsed.accumulate)
    others = bench.costs([name for name in baselines if name != chosen.method or options])
    return dataclasses.replace(
        chosen, baselines={name: others.get(name, chosen.cost) for name in baselines}, memory=limit
    )


def _baselines(chosen: Forecast, images: int, accumulate: int) -> list[str]:
    """What a plan is compared with by default: end-to-end training, and the other families, accumulating as it does."""
    suffix = "" if accumulate == 1 else f"+accumulate:{accumulate}"
    names = [f"{name}{suffix}" for name in (*strategies.EXACT, *strategies.SAMPLED)]
    parts = min(4, images // 2)  # of two images at least, for BatchNorm
    if accumulate > 1:
        names.insert(0, "e2e")
    elif parts > 1:
        names.insert(len(strategies.EXACT), f"e2e+accumulate:{parts}")
    return names
