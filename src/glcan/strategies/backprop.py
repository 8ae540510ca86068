"""Back-propagation of the whole model, plain or with activations that are recomputed: exact methods."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from glcan.cost.cuts import Plan
from glcan.strategies.base import Backward, Done, Family, Group, Pass, Setting, Strategy
from glcan.strategies.recompute import Recomputation
from glcan.strategies.segments import segments_of, square_root

__all__ = ["BackpropPass", "Checkpoint", "CheckpointSqrt", "EndToEnd"]


class BackpropPass(Pass):
    """One forward pass, one backward pass."""

    def __init__(self, setting: Setting, plan: Plan) -> None:
        self._setting, self.plan = setting, plan
        self.groups = [whole_model(setting.model)]
        self.added = nn.ModuleDict()
        self._recomputation = Recomputation(setting.model, plan.recomputed_units)

    def run(self, batch: tuple[Any, ...], backward: Backward, done: Done, share: float = 1.0) -> dict[str, Tensor]:
        setting = self._setting
        args, kwargs = setting.arguments(batch)
        with setting.forward_autocast(batch), self._recomputation.applied():
            loss = setting.task.loss(setting.model(*args, **kwargs), batch)
        backward(loss, share)
        done(0)
        return {self.groups[0].name: loss.detach()}


def whole_model(model: nn.Module) -> Group:
    """All trainable parameters."""
    return Group("block1", tuple(p for p in model.parameters() if p.requires_grad))


class EndToEnd(Strategy):
    """Plain back-propagation."""

    name: ClassVar[str] = "e2e"
    family: ClassVar[Family] = "exact"
    summary: ClassVar[str] = "end-to-end back-propagation"

    def bind(self, setting: Setting, plan: Plan) -> Pass:
        return BackpropPass(setting, plan)


class Checkpoint(EndToEnd):
    """Back-propagation that recomputes the activations inside each unit (Chen et al. 2016, arXiv 1604.06174)."""

    name: ClassVar[str] = "checkpoint"
    summary: ClassVar[str] = "end-to-end with activation checkpointing of each unit"

    def recomputed(self, setting: Setting) -> list[list[str]]:
        return segments_of(setting.profile)


class CheckpointSqrt(EndToEnd):
    """Back-propagation that recomputes about sqrt(n) segments of the n units (Chen et al. 2016, section 4.3)."""

    name: ClassVar[str] = "checkpoint-sqrt"
    summary: ClassVar[str] = "end-to-end with activation checkpointing of about sqrt(n) segments"

    def recomputed(self, setting: Setting) -> list[list[str]]:
        return segments_of(setting.profile, square_root(setting.profile))
