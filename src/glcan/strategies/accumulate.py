"""Gradient accumulation: a batch in parts, one after the other, whose gradients add up. It wraps any pass."""

from __future__ import annotations

import itertools
import math
from typing import Any

from torch import Tensor

from glcan.strategies.base import Backward, Done, Pass, WrappedPass
from glcan.tasks.base import Task

__all__ = ["Accumulated", "first_part"]


class Accumulated(WrappedPass):
    """A pass of each part of a batch; memory is that of a part, and the gradient that of the mean loss over the batch.

    Normalisation over the batch sees the parts one by one, as do losses that divide by more than the number of images.

    Args:
        inner: the pass.
        task: says what a part of a batch is.
        parts: of a batch.
        whole: images of a whole batch; a smaller one, as ends an epoch, has fewer parts.
    """

    def __init__(self, inner: Pass, task: Task, parts: int, whole: int) -> None:
        super().__init__(inner)
        self._task, self._parts, self._whole = task, parts, whole

    def run(self, batch: tuple[Any, ...], backward: Backward, done: Done, share: float = 1.0) -> dict[str, Tensor]:
        images = len(batch[0])
        losses: dict[str, Tensor] = {}
        for begin, end in _bounds(images, self._parts, self._whole):
            part = (end - begin) / images
            complete = done if end == images else _not_yet
            found = self.inner.run(self._task.part(batch, begin, end), backward, complete, share * part)
            losses = {name: losses.get(name, 0) + part * loss for name, loss in found.items()}
        return losses


def _not_yet(group: int) -> None:
    """More parts are to come."""


def first_part(task: Task, batch: tuple[Any, ...], parts: int) -> tuple[Any, ...]:
    """The first of so many parts of a batch, which is the largest."""
    return batch if parts == 1 else task.part(batch, *_bounds(len(batch[0]), parts, len(batch[0]))[0])


def _bounds(images: int, parts: int, whole: int) -> list[tuple[int, int]]:
    """Where so many parts of a batch begin and end: as many as there are images at most, the larger ones first.

    A batch smaller than a whole one has fewer parts, no larger than a whole one's: BatchNorm needs images enough in
    each.
    """
    if images < whole:
        parts = min(parts, math.ceil(images / math.ceil(whole / parts)))
    parts = max(1, min(parts, images))
    return list(itertools.pairwise(images - images * (parts - i) // parts for i in range(parts + 1)))
