"""The baselines: end-to-end back-propagation, and the same with activation checkpointing."""

from __future__ import annotations

import contextlib
from typing import Any, ClassVar

from torch import nn

from glcan.checkpointing import checkpointed, segments_of, square_root
from glcan.profile import Profile
from glcan.rules.base import Rule
from glcan.tasks import names as task_names


class EndToEnd(Rule):
    """Plain back-propagation."""

    name: ClassVar[str] = "e2e"
    summary: ClassVar[str] = "end-to-end back-propagation (baseline)"
    tasks: ClassVar[tuple[str, ...]] = tuple(task_names())
    local: ClassVar[bool] = False


class Checkpoint(EndToEnd):
    """Back-propagation that recomputes the activations inside each unit (Chen et al. 2016, arXiv 1604.06174)."""

    name: ClassVar[str] = "checkpoint"
    summary: ClassVar[str] = "end-to-end with activation checkpointing of each unit (baseline)"
    exact: ClassVar[bool] = True

    def running(self, model: nn.Module, profile: Profile) -> contextlib.AbstractContextManager[Any]:
        return checkpointed(model, segments_of(profile))


class CheckpointSqrt(EndToEnd):
    """Back-propagation that recomputes about sqrt(n) segments of the n units (Chen et al. 2016, section 4.3)."""

    name: ClassVar[str] = "checkpoint-sqrt"
    summary: ClassVar[str] = "end-to-end with activation checkpointing of about sqrt(n) segments (baseline)"
    exact: ClassVar[bool] = True

    def running(self, model: nn.Module, profile: Profile) -> contextlib.AbstractContextManager[Any]:
        return checkpointed(model, segments_of(profile, square_root(profile)))
