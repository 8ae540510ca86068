"""The phases of a run: start, freeze and finish are one table of what `glcan.Learner.switch` is given when."""

from __future__ import annotations

import dataclasses
import itertools

from glcan.strategies.method import Method

__all__ = ["RunPhase", "phases_of", "schedule_share"]


@dataclasses.dataclass(frozen=True)
class RunPhase:
    """A part of a run in which every step is of one kind.

    Attributes:
        begin, end: the optimizer steps, from 0; the end is not in it.
        method: of these steps.
        frozen, end_to_end: see `glcan.Learner.switch`.
        finish: whether it is the finish, whose loss has a name of its own.
    """

    begin: int
    end: int
    method: Method
    frozen: int = 0
    end_to_end: bool = False
    finish: bool = False


def schedule_share(method: Method, block: int, blocks: int) -> float:
    """The share of the steps in which a block, counted from 0, runs through the whole schedule.

    From `Method.freeze` of the first block to 1 of the last one, evenly, as the layers of FreezeOut (Brock et al. 2017,
    arXiv 1706.04983) come to rest one after the other.
    """
    return method.freeze + (1 - method.freeze) * block / (blocks - 1) if block < blocks - 1 else 1.0


def phases_of(method: Method, steps: int, blocks: int) -> list[RunPhase]:
    """The phases of a run of so many steps and blocks, in order; one for most methods."""
    plain = dataclasses.replace(method, start=0.0, freeze=1.0, finish=0.0)
    start, finish = round(steps * method.start), steps
    if method.finish:
        finish = max(1, min(steps - 1, round(steps * (1 - method.finish))))
    rests = [min(finish, round(steps * schedule_share(method, block, blocks))) for block in range(blocks)]
    bounds = [max(start, rest) for rest in (start, *rests[:-1], finish)]
    table = [RunPhase(0, start, plain, end_to_end=True)]
    table += [RunPhase(a, b, plain, frozen=k) for k, (a, b) in enumerate(itertools.pairwise(bounds))]
    table.append(RunPhase(finish, steps, Method("checkpoint", accumulate=method.accumulate), finish=True))
    return [phase for phase in table if phase.end > phase.begin]
