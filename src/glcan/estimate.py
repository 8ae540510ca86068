"""What each possible block of a model would need, estimated from a few dry runs: what cuts are chosen by.

A block from unit i to unit j holds, at its peak, the tensors that enter it, what its units save, and either its
auxiliary network or what the backward pass of its last unit needs on top; further back in the block, less is saved and
the gradients of the weights behind have come. The planner checks the outcome with the learner's real step.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from glcan.dryrun import dry_run
from glcan.errors import GlcanError
from glcan.isolation import Boundary, Isolation, tensors_in
from glcan.memory import LiveMemory
from glcan.plan import BlockCost, cut_places
from glcan.profile import Profile, Unit
from glcan.rules.base import Rule, Site
from glcan.tasks.base import Task

__all__ = ["AuxiliaryCost", "Estimate", "auxiliary_costs", "backward_bytes"]


@dataclasses.dataclass(frozen=True)
class AuxiliaryCost:
    """What an auxiliary network needs for its own forward and backward pass.

    Attributes:
        activation_bytes: its peak, the gradient of the boundary included.
        flops: forward and backward.
        parameters: number of elements.
    """

    activation_bytes: int
    flops: int
    parameters: int


def backward_bytes(model: nn.Module, args: Any, kwargs: Any, profile: Profile) -> dict[str, int]:
    """What the backward pass of each unit with weights needs at its peak, beyond what the unit saves.

    The model is cut at every place, and each piece trained by itself. Empty where the model does not allow that.
    """

    def run(model: nn.Module, batch: tuple[Any, Any]) -> dict[str, int]:
        meter = LiveMemory(model, inputs=batch)
        peaks: dict[str, int] = {}

        def train(unit: str, tensors: tuple[Tensor, ...]) -> None:
            norms = [torch.linalg.vector_norm(t.float()) for t in tensors if t.requires_grad]
            if norms:
                torch.stack(norms).sum().backward()
            for parameter in model.parameters():
                parameter.grad = None
            peaks[unit] = meter.lap()[1]

        starts = ["", *profile.cuttable]
        isolation = Isolation(
            model,
            profile.names,
            profile.cuttable,
            lambda boundary: train(starts[boundary.block], (*boundary.entering, *boundary.skipping)),
            {cut: profile.crossing[cut] for cut in profile.cuttable},
        )
        with torch.enable_grad(), meter, isolation:
            output = model(*batch[0], **batch[1])
            with isolation.replay():
                train(starts[isolation.block], tuple(isolation.twin(t) for t in tensors_in(output)))
        return peaks

    if not profile.cuttable:
        return {}
    try:
        peaks = dry_run(model, (args, kwargs), run)
    except (GlcanError, RuntimeError):
        return {}
    places = cut_places(profile)
    found: dict[str, int] = {}
    for start, end, unit in zip(places[:-1], places[1:], ["", *profile.cuttable], strict=True):
        saved = sum(u.saved_bytes for u in profile.units[start:end])
        entering = sum(f.bytes for f in profile.units[start].entering) if start else 0
        found[profile.units[start].name] = max(0, peaks.get(unit, 0) - saved - entering)
    return found


def auxiliary_costs(
    rule: Rule, model: nn.Module, profile: Profile, task: Task, batch: tuple[Any, ...], blocks: int
) -> dict[str, AuxiliaryCost]:
    """What the rule's auxiliary network needs at every place where a model may be cut into so many blocks."""

    def run(model: nn.Module, batch: tuple[Any, ...]) -> dict[str, AuxiliaryCost]:
        first = next(t for t in tensors_in(batch))
        costs: dict[str, AuxiliaryCost] = {}
        seen: dict[Any, AuxiliaryCost] = {}
        for name in profile.cuttable:
            cut = profile.unit(name)
            with first.device:
                network = rule.build(Site(model, profile, task, cut, blocks)).train(model.training)
            key = (str(network), tuple(p.shape for p in network.parameters()), cut.entering)
            if key not in seen:
                seen[key] = _meter(network, task, cut, batch, first)
            costs[name] = seen[key]
        return costs

    return dry_run(model, batch, run)


def _meter(network: nn.Module, task: Task, cut: Unit, batch: tuple[Any, ...], like: Tensor) -> AuxiliaryCost:
    entering = tuple(torch.empty(f.shape, device=like.device, requires_grad=True) for f in cut.entering)
    meter = LiveMemory(auxiliary=network, inputs=(batch, entering))
    with torch.enable_grad(), meter:
        task.local_loss(network(Boundary(0, cut.name, entering), batch), batch).backward()
    return AuxiliaryCost(meter.activation_peak_bytes, meter.flops, sum(p.numel() for p in network.parameters()))


class Estimate:
    """Bytes and FLOPs of every block that a model could be cut into.

    Args:
        profile: of the model.
        backward: what `backward_bytes` gave; units that are missing there need twice their output.
        auxiliary: what `auxiliary_costs` gave; empty for none.
    """

    def __init__(
        self,
        profile: Profile,
        backward: Mapping[str, int] | None = None,
        auxiliary: Mapping[str, AuxiliaryCost] | None = None,
    ) -> None:
        self.profile = profile
        self.auxiliary = auxiliary or {}
        self._places = cut_places(profile)
        pieces = [profile.units[a:b] for a, b in itertools.pairwise(self._places)]
        self._saved = [sum(u.saved_bytes for u in piece) for piece in pieces]
        self._kept = [
            sum(f.bytes for u in piece[1:] for f in u.entering if u.weights) for piece in pieces
        ]  # by recomputation
        self._gradients = [4 * sum(u.parameters for u in piece) for piece in pieces]
        self._flops = [sum(u.flops for u in piece) for piece in pieces]
        self._entering = [sum(f.bytes for f in piece[0].entering) if i else 0 for i, piece in enumerate(pieces)]
        self._backward = [
            (backward or {}).get(piece[0].name, 2 * (piece[-1].output.bytes if piece[-1].output else 0))
            for piece in pieces
        ]
        self.block_bytes: BlockCost = functools.cache(self._block_bytes)
        self.recomputed_bytes: BlockCost = functools.cache(self._recomputed_bytes)

    def _after(self, j: int) -> int:
        """Bytes of the auxiliary network of a block that ends at place j."""
        cost = self.auxiliary.get(self.profile.units[self._places[j]].name) if j < len(self._saved) else None
        return cost.activation_bytes if cost else 0

    def _block_bytes(self, i: int, j: int) -> int:
        """Peak of the activations and gradients of the block from place i to place j."""
        saved, inside = 0, 0
        for k in range(i, j):
            saved += self._saved[k]
            inside = max(inside + self._gradients[k], saved + self._backward[k])
        return self._entering[i] + max(inside, saved + self._after(j))

    def _recomputed_bytes(self, i: int, j: int) -> int:
        """The same where each unit's activations are recomputed, so that only what enters the units is kept."""
        kept, inside = 0, 0
        for k in range(i, j):
            kept += (self._entering[k] if k > i else 0) + self._kept[k]
            inside = max(inside + self._gradients[k], kept + self._saved[k] + self._backward[k])
        return self._entering[i] + max(inside, kept + self._after(j))

    def block_flops(self, i: int, j: int) -> int:
        """Forward and backward FLOPs of the auxiliary network of the block from place i to place j."""
        cost = self.auxiliary.get(self.profile.units[self._places[j]].name) if j < len(self._saved) else None
        return cost.flops if cost else 0

    def forward_flops(self, i: int, j: int) -> int:
        """Forward FLOPs of the block's units: what recomputing them costs."""
        return sum(self._flops[i:j])
