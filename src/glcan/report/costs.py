"""What one training step costs: bytes and FLOPs of a metered step, and step times with the methods taking turns."""

from __future__ import annotations

import dataclasses
import hashlib
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from glcan.inspect.tensors import tensors_in

if TYPE_CHECKING:
    from glcan.cost.step import StepCost
    from glcan.learner import Learner
    from glcan.training.phases import RunPhase

WARMUP_ROUNDS = 2
MIN_ROUNDS, MAX_ROUNDS = 7, 41
TIMING_SECONDS = 60.0


def time_steps(learners: Mapping[Any, Learner], batch: tuple[Any, ...]) -> dict[Any, list[float]]:
    """Seconds of ``learner.step(*batch)``, every learner once in each round: A B C, A B C, ...

    What else the machine does, and how warm it runs, then meets all methods alike. The number of rounds follows from
    the first ones: about a minute in all, but at least `MIN_ROUNDS` and at most `MAX_ROUNDS`. The steps train the
    learners.

    Returns:
        For each learner its seconds, round by round, warm-up rounds left out.
    """
    for _ in range(WARMUP_ROUNDS):
        warm = [_time(learner, batch) for learner in learners.values()]
    rounds = max(MIN_ROUNDS, min(MAX_ROUNDS, int(TIMING_SECONDS / sum(warm))))
    seconds: dict[Any, list[float]] = {name: [] for name in learners}
    for _ in range(rounds):
        for name, learner in learners.items():
            seconds[name].append(_time(learner, batch))
    return seconds


def enter(learner: Learner, phase: RunPhase) -> Learner:
    """The learner, set up for the steps of a phase."""
    same = phase.method.core == learner.method.core
    learner.switch(None if same else phase.method, frozen=phase.frozen, end_to_end=phase.end_to_end)
    return learner.train()


def averaged(costs: Mapping[int, StepCost], shares: Mapping[int, float]) -> StepCost:
    """The cost of a step on average over a run: the largest peaks, and the mean FLOPs.

    Args:
        costs: of a step of each of the run's phases.
        shares: of the steps.
    """
    used = {phase: costs[phase] for phase in shares}
    return dataclasses.replace(
        max(used.values(), key=lambda cost: cost.peak_bytes),
        activation_peak_bytes=max(cost.activation_peak_bytes for cost in used.values()),
        flops=round(sum(share * costs[phase].flops for phase, share in shares.items())),
    )


def weights_sha256(model: nn.Module) -> str:
    """A digest of names and values of all parameters and buffers; equal if and only if the weights are."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _time(learner: Learner, batch: tuple[Any, ...]) -> float:
    _synchronize(batch)
    start = time.perf_counter()
    learner.step(*batch)
    _synchronize(batch)
    return time.perf_counter() - start


def _synchronize(batch: tuple[Any, ...]) -> None:
    device = next(tensors_in(batch)).device
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()
