"""The largest batch of each method that fits a budget."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from glcan import tasks
from glcan.cost.cuts import numbers_of_blocks
from glcan.cost.step import StepCost
from glcan.learner import OptimizerFactory
from glcan.planning.bench import Bench
from glcan.sizes import parse_bytes
from glcan.strategies.base import Wanted
from glcan.strategies.method import parse_method

__all__ = ["LargestBatch", "largest_batches"]


@dataclasses.dataclass(frozen=True)
class LargestBatch:
    """The largest batch of a method that fits a budget.

    Attributes:
        method: "e2e", "checkpoint", "glcan:4", and "glcan:4 recomputed".
        batch: 0 if not even two images fit.
        peak_bytes: with that batch.
        flops_per_image: of one step.
    """

    method: str
    batch: int
    peak_bytes: int
    flops_per_image: float


def largest_batches(
    model: nn.Module,
    task: str | tasks.Task,
    sample: Callable[[int], Sequence[Any]],
    memory: str | int,
    *,
    methods: Sequence[str] = ("e2e", "checkpoint", "checkpoint-sqrt", "selective", "glcan:2", "glcan:4", "glcan:8"),
    options: Mapping[str, Any] | None = None,
    optimizer: OptimizerFactory | None = None,
    autocast: torch.dtype | None = None,
    units: Sequence[str] | None = None,
) -> list[LargestBatch]:
    """The largest batch of each method that fits the budget; local ones also with all blocks recomputed.

    Args:
        model, task, options, optimizer, autocast, units: as `glcan.plan`; the options go to the methods of the last
            one's name.
        sample: gives a batch of so many images.
        memory: the budget.
        methods: to look at; those of more blocks than the model has are left out.
    """
    limit = parse_bytes(memory)
    benches: dict[int, Bench] = {}

    def bench(batch: int) -> Bench:
        if batch not in benches:
            benches[batch] = Bench(model, task, tuple(sample(batch)), units, optimizer, autocast)
        return benches[batch]

    last = parse_method(methods[-1]).base
    runs: dict[str, tuple[str, Mapping[str, Any], Wanted]] = {}
    for text in methods:
        method, own = parse_method(text), (options or {}) if parse_method(text).base == last else {}
        if method.number is None:
            runs[text] = (text, own, Wanted())
        elif 1 < method.number <= max(numbers_of_blocks(bench(2).profile)):
            # the cuts of a small batch: the best ones hardly depend on its size
            for name, wanted in ((text, Wanted()), (f"{text} recomputed", Wanted(recompute=True))):
                plan = bench(2).run(text, own, wanted).plan
                runs[name] = (text, own, Wanted(plan.cuts, plan.recompute))
    found: list[LargestBatch] = []
    for name, run in runs.items():
        costs: dict[int, StepCost] = {}

        def cost(batch: int, run: Any = run, costs: dict[int, StepCost] = costs) -> StepCost:
            if batch not in costs:
                costs[batch] = bench(batch).run(*run).cost
            return costs[batch]

        def peak(batch: int, cost: Callable[[int], StepCost] = cost) -> int:
            return cost(batch).peak_bytes

        batch = _largest(peak, limit)
        flops = cost(max(2, batch)).flops / max(2, batch)
        found.append(LargestBatch(name, batch, cost(batch).peak_bytes if batch else 0, flops))
    return found


def _largest(peak: Callable[[int], int], limit: int) -> int:
    """The largest batch whose peak is within the limit; 0 if two images do not fit.

    A peak grows with the batch along straight lines, so the next guess lies on the line through the last two.
    """
    low, high = 32, 64  # large enough that parameters and gradients do not set the peak
    if peak(low) > limit:
        low, high = 2, 32
        if peak(low) > limit:
            return 0
    while peak(high) <= limit:
        slope = (peak(high) - peak(low)) / (high - low)
        guess = high + int((limit - peak(high)) / slope) if slope > 0 else 2 * high
        low, high = high, max(high + 1, min(guess, 64 * high))
    while high - low > 1:
        slope = (peak(high) - peak(low)) / (high - low)
        guess = low + int((limit - peak(low)) / slope)
        middle = min(high - 1, max(low + 1, guess))
        if peak(middle) <= limit:
            low = middle
            if peak(low + 1) > limit:
                return low
            low += 1
        else:
            high = middle
    return low
