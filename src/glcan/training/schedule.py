"""Learning-rate schedules as pure functions of the step: what a resumed run needs, and nothing to save."""

from __future__ import annotations

import math

from glcan.training.config import RunConfig

# One-cycle (Smith and Topin, arXiv 1708.07120), with the numbers of torch.optim.lr_scheduler.OneCycleLR.
_ONECYCLE_START = 1 / 25
_ONECYCLE_END = 1 / 25 / 1e4

_HALVED_AT = (2 / 3,)  # EDSR's training: at 200,000 of 300,000 updates
_TENTHS_AT = (2 / 3, 8 / 9)  # detectors on COCO: after 60,000 and 80,000 of 90,000 steps


def learning_rate(config: RunConfig, step: float, steps_per_epoch: int) -> float:
    """Learning rate of one optimizer step.

    Args:
        config: its ``lr`` (the peak), ``schedule``, ``milestones``, ``warmup`` and ``epochs``.
        step: 0 for the first step of the run.
        steps_per_epoch: optimizer steps in an epoch.

    Returns:
        Above 0 at every step from 0 to ``epochs * steps_per_epoch - 1``.
    """
    total = config.epochs * steps_per_epoch
    warmup = config.warmup * steps_per_epoch
    if config.schedule == "onecycle":
        return config.lr * _one_cycle(step, total, warmup)
    if step < warmup:
        return config.lr * (step + 1) / (math.floor(warmup) + 1)
    if config.schedule == "halving":
        return config.lr * 0.5 ** sum(step >= share * total for share in config.milestones or _HALVED_AT)
    if config.schedule == "tenths":
        return config.lr * 0.1 ** sum(step >= share * total for share in config.milestones or _TENTHS_AT)
    return config.lr * _between(1.0, 0.0, (step - warmup) / (total - warmup))


def _one_cycle(step: float, total: int, warmup: float) -> float:
    """A step's share of the peak learning rate."""
    if step < warmup:
        return _between(_ONECYCLE_START, 1.0, step / warmup)
    return _between(1.0, _ONECYCLE_END, (step - warmup) / (total - warmup))


def _between(start: float, end: float, share: float) -> float:
    """From start to end along half a cosine."""
    return end + (start - end) * (1 + math.cos(math.pi * share)) / 2
