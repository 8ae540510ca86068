"""Learning-rate schedules as pure functions of the step: what a resumed run needs, and nothing to save."""

from __future__ import annotations

import math

from glcan.training.config import RunConfig

# One-cycle (Smith and Topin, arXiv 1708.07120), with the numbers of torch.optim.lr_scheduler.OneCycleLR.
_ONECYCLE_RISE = 0.3
_ONECYCLE_START = 1 / 25
_ONECYCLE_END = 1 / 25 / 1e4

_HALVED_AT = (2 / 3,)  # EDSR's training: at 200,000 of 300,000 updates
_TENTHS_AT = (2 / 3, 8 / 9)  # detectors on COCO: after 60,000 and 80,000 of 90,000 steps


def local_steps(config: RunConfig, steps_per_epoch: int) -> int:
    """Optimizer steps before the finish; all steps of the run without one."""
    total = config.epochs * steps_per_epoch
    return max(1, min(total - 1, round(total * (1 - config.finish)))) if config.finish else total


def _scheduled_steps(config: RunConfig, steps_per_epoch: int) -> int:
    """Optimizer steps over which the schedule runs."""
    return config.epochs * steps_per_epoch if config.scheduled == 1 else local_steps(config, steps_per_epoch)


def start_steps(config: RunConfig, steps_per_epoch: int) -> int:
    """Optimizer steps, at the beginning of the run, that train the whole model at once."""
    return round(config.epochs * steps_per_epoch * config.start)


def schedule_share(config: RunConfig, block: int, blocks: int) -> float:
    """The share of the scheduled steps in which a block, counted from 0, runs through the whole schedule.

    From `RunConfig.freeze` of the first block to 1 of the last one, evenly, as the layers of FreezeOut (Brock et al.
    2017, arXiv 1706.04983) come to rest one after the other.
    """
    return config.freeze + (1 - config.freeze) * block / (blocks - 1) if block < blocks - 1 else 1.0


def frozen_blocks(config: RunConfig, step: int, steps_per_epoch: int, blocks: int) -> int:
    """How many blocks, from the first one on, have come to the end of their schedule."""
    total = _scheduled_steps(config, steps_per_epoch)
    return sum(step / schedule_share(config, block, blocks) >= total for block in range(blocks - 1))


def learning_rate(config: RunConfig, step: float, steps_per_epoch: int) -> float:
    """Learning rate of one optimizer step: the schedule, and where the finish has a cycle of its own, that after it.

    Args:
        config: its ``lr`` (the peak), ``schedule``, ``milestones``, ``warmup``, ``epochs``, ``finish`` and
            ``finish_lr``.
        step: 0 for the first step of the run.
        steps_per_epoch: optimizer steps in an epoch.

    Returns:
        Above 0 at every step from 0 to ``epochs * steps_per_epoch - 1``.
    """
    total = _scheduled_steps(config, steps_per_epoch)
    if config.finish_lr is not None and step >= total:
        length = config.epochs * steps_per_epoch - total
        return config.finish_lr * _one_cycle(step - total, length, _ONECYCLE_RISE * length)
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
