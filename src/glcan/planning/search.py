"""The cheapest plan of a method that stays within a budget of memory.

A candidate is chosen by estimates (`glcan.cost.estimate`) and then checked by a step on fake tensors (`bench`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from glcan import strategies
from glcan.cost.step import StepCost
from glcan.errors import ConfigError
from glcan.inspect.meter import KINDS
from glcan.planning.bench import Bench
from glcan.planning.forecast import Forecast
from glcan.sizes import format_bytes
from glcan.strategies.base import Candidate, Setting, Wanted
from glcan.strategies.local import Local
from glcan.strategies.method import Method

__all__ = ["fit", "free_bytes"]

# How often a candidate that turns out to need more than was estimated is looked for again under a tighter bound.
_ATTEMPTS = 8
# What memory="auto" leaves free: the allocator's fragments, the libraries' workspaces.
_MARGIN = 0.10


def fit(bench: Bench, method: Method, options: Mapping[str, Any] | None, limit: int) -> Forecast:
    """The plan of a method with the fewest FLOPs whose peak is within the limit.

    Raises:
        ConfigError: there is none; it says what holds the peak, and what would help.
    """
    strategy = strategies.create(method, bench.task.name, options)
    if not isinstance(strategy, Local):
        only = bench.run(method, options)
        if only.cost.peak_bytes <= limit:
            return only
        raise _does_not_fit(bench, limit, [only])

    def run(candidate: Candidate) -> Forecast:
        return bench.run(dataclasses.replace(method, number=candidate.blocks), options, candidate.wanted)

    setting = bench.setting(strategy, method.accumulate)
    state = 0 if bench.optimizer is None else 4
    whole = run(Candidate(Wanted(), 0.0, method.number or 1))
    if whole.cost.peak_bytes <= limit:
        return whole
    tried = [whole]
    missed = 0  # what the estimates miss, in bytes: learned from every candidate that is checked
    for _ in range(_ATTEMPTS):
        with bench.context():
            candidates = list(strategy.candidates(setting, limit - _fixed(whole.cost) - missed, state))
        checked = {(c.plan.cuts, c.plan.recompute) for c in tried}
        fresh = [c for c in candidates if (c.wanted.cuts, c.wanted.recompute) not in checked]
        if not fresh:
            if not missed:
                break
            missed = missed // 2 if missed > 2**20 else 0
            continue
        found = run(fresh[0])
        tried.append(found)
        if found.cost.peak_bytes <= limit:
            return found
        missed += found.cost.peak_bytes - limit
    tried += [run(candidate) for candidate in _smallest(bench, strategy, setting, state)]
    fitting = [c for c in tried if c.cost.peak_bytes <= limit]
    if fitting:
        return min(fitting, key=lambda c: (c.cost.flops, c.plan.blocks))
    raise _does_not_fit(bench, limit, tried)


def _smallest(bench: Bench, strategy: Local, setting: Setting, state: int) -> list[Candidate]:
    with bench.context():
        return strategy.smallest(setting, state)


def _fixed(cost: StepCost) -> int:
    """Bytes that are there in any plan: parameters, optimizer state, inputs."""
    return sum(cost.by_kind[kind] for kind in ("parameters", "optimizer_state", "inputs"))


def _does_not_fit(bench: Bench, limit: int, tried: list[Forecast]) -> ConfigError:
    best = min(tried, key=lambda c: c.cost.peak_bytes)
    kinds = best.cost.by_kind
    fixed = sum(kinds[kind] for kind in KINDS if kind not in ("activations", "gradients"))
    holder = max(range(len(best.cost.block_peak_bytes)), key=best.cost.block_peak_bytes.__getitem__)
    units = best.plan.units[holder]
    heaviest = max(units, key=lambda u: u.saved_bytes)
    batch = bench.profile.batch
    if fixed > limit:
        held = (
            f"{format_bytes(fixed)} of parameters, optimizer state, inputs and auxiliary networks, which are there "
            "with any number of blocks"
        )
        helps = ["a smaller model", "an optimizer with less state (SGD without momentum)"]
    else:
        held = (
            f"{format_bytes(kinds['activations'])} of activations in {best.plan.names[holder]} (its largest unit, "
            f"{heaviest.name!r}, saves {format_bytes(heaviest.saved_bytes)}) on top of {format_bytes(fixed)} of "
            "parameters, optimizer state, inputs and auxiliary networks"
        )
        fits = max(1, int(batch * max(0.0, limit - fixed) / max(1, best.cost.peak_bytes - fixed)))
        helps = [f"a batch of about {fits}" if fits < batch else "a smaller batch"]
        if fits < batch and "accumulate" not in best.method:
            helps.append(f"the same batch in about {-(-batch // fits)} parts (accumulate)")
        if bench.autocast is None:
            helps.append("bf16 precision, which about halves the activations")
        helps.append("smaller images")
    how = f"{best.plan.blocks} blocks" if best.plan.blocks > 1 else "one block"
    if best.family == "local":
        how += ", recomputed" if best.plan.recompute else "; checkpointing inside blocks does not lower it"
    return ConfigError(
        f"No plan fits {format_bytes(limit)}: the smallest peak found is {format_bytes(best.cost.peak_bytes)} "
        f"(batch {batch}, {how}), held by {held}. What would help: {'; '.join(helps)}."
    )


def free_bytes(model: nn.Module) -> int:
    """The memory that training may take on the model's CUDA device: what is free or already held, less a margin.

    Raises:
        ConfigError: the model is not on a CUDA device.
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    if device.type != "cuda":
        raise ConfigError(
            f"memory='auto' asks the CUDA device how much it has free, but the model is on {device}. Move the model to "
            "the device first, or say how much: memory='8GiB'."
        )
    free, total = torch.cuda.mem_get_info(device)
    # What this process's allocator holds is at its disposal, the model itself included.
    return int(free + torch.cuda.memory_reserved(device) - _MARGIN * total)
