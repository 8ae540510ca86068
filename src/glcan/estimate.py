"""What each possible block of a model would need, estimated from a few dry runs: what cuts are chosen by.

A block from unit i to unit j holds, at its peak, the tensors that enter it, what its units save, and either its
auxiliary network or what the backward pass of its last unit needs on top; further back in the block, less is saved and
the gradients of the weights behind have come. The planner checks the outcome with the learner's real step.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from glcan.checkpointing import in_parts
from glcan.dryrun import dry_run, uninitialized
from glcan.errors import GlcanError
from glcan.isolation import Boundary, Isolation, tensors_in
from glcan.memory import LiveMemory
from glcan.plan import SLACK, BlockCost, Plan, block_ends, chains, choose_cuts, cut_places, numbers_of_blocks
from glcan.profile import Profile, Unit
from glcan.rules.base import Rule, Site
from glcan.tasks.base import Task

#: FLOPs of a step, in those of end-to-end training, up to which recomputation is taken for less memory than asked for.
_COMPUTE = 1.05
#: What is asked for then, in turn, as shares of the memory.
_PARTS_OF_ROOM = tuple(0.95 - 0.05 * k for k in range(17))
#: From one bound that is tried to the next.
_STEP = 1.05
#: Places that are tried one by one where more recomputation does not mean less memory.
_TRIED = 32

__all__ = ["AuxiliaryCost", "Estimate", "Piece", "auxiliary_costs", "measure_pieces"]


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


@dataclasses.dataclass(frozen=True)
class Piece:
    """What a piece of the model between two places to cut needs when it is trained by itself.

    Attributes:
        backward_bytes: peak beyond what enters the piece and what it saves.
        cut_flops: FLOPs that are saved when a block begins here, because nobody wants the gradient of what enters.
    """

    backward_bytes: int
    cut_flops: int


def measure_pieces(
    model: nn.Module, args: Any, kwargs: Any, profile: Profile, *, assume: bool = False
) -> dict[str, Piece]:
    """Every piece, by the name of its first unit, from a dry run in which the model is cut at every place.

    Empty where the model does not allow that. ``assume``: see `glcan.dryrun.dry_run`.
    """
    places = cut_places(profile)
    cuts = [profile.units[index].name for index in places[1:-1]]
    starts = ["", *cuts]

    def run(model: nn.Module, batch: tuple[Any, Any]) -> dict[str, tuple[int, int]]:
        meter = LiveMemory(model, inputs=batch)
        found: dict[str, tuple[int, int]] = {}
        before = 0

        def train(unit: str, tensors: tuple[Tensor, ...]) -> None:
            nonlocal before
            norms = [torch.linalg.vector_norm(t.float()) for t in tensors if t.requires_grad]
            if norms:
                torch.stack(norms).sum().backward()
            for parameter in model.parameters():
                parameter.grad = None
            found[unit], before = (meter.lap()[1], meter.flops - before), meter.flops

        isolation = Isolation(
            model,
            profile.names,
            cuts,
            lambda boundary: train(starts[boundary.block], (*boundary.entering, *boundary.skipping)),
            {cut: profile.crossing[cut] for cut in cuts},
        )
        with torch.enable_grad(), meter, in_parts(model, profile.parted, profile.batch), isolation:
            output = model(*batch[0], **batch[1])
            with isolation.replay():
                train(starts[isolation.block], tuple(isolation.twin(t) for t in tensors_in(output)))
        return found

    if not cuts:
        return {}
    try:
        measured = dry_run(model, (args, kwargs), run, assume=assume)
    except (GlcanError, RuntimeError):
        return {}
    pieces: dict[str, Piece] = {}
    for start, end, unit in zip(places[:-1], places[1:], starts, strict=True):
        peak, flops = measured.get(unit, (0, 0))
        saved = profile.saved_bytes(start, end)
        entering = sum(f.bytes for f in profile.units[start].entering) if start else 0
        whole = 3 * sum(u.flops for u in profile.units[start:end])
        pieces[profile.units[start].name] = Piece(
            max(0, peak - saved - entering), max(0, whole - flops) if start and flops else 0
        )
    return pieces


def auxiliary_costs(
    rule: Rule,
    model: nn.Module,
    profile: Profile,
    task: Task,
    batch: tuple[Any, ...],
    blocks: int,
    known: dict[Any, AuxiliaryCost] | None = None,
) -> dict[str, AuxiliaryCost]:
    """What the rule's auxiliary network needs at every place where a model may be cut into so many blocks.

    Networks of the same structure are metered once; ``known`` remembers them from one number of blocks to the next.
    """
    known = {} if known is None else known
    if rule.joint(task, blocks, profile.batch, profile.mostly_by_image).weight == 1:
        return {}

    def run(model: nn.Module, batch: tuple[Any, ...]) -> dict[str, AuxiliaryCost]:
        first = next(t for t in tensors_in(batch))
        costs: dict[str, AuxiliaryCost] = {}
        for index in cut_places(profile)[1:-1]:
            cut = profile.units[index]
            with first.device, uninitialized():
                network = rule.build(Site(model, profile, task, cut, blocks)).train(model.training)
            key = (str(network), tuple(p.shape for p in network.parameters()), cut.entering)
            if key not in known:
                known[key] = _meter(network, rule, task, cut, batch, first)
            costs[cut.name] = known[key]
        return costs

    return dry_run(model, batch, run, assume=task.assumes)


def _meter(
    network: nn.Module, rule: Rule, task: Task, cut: Unit, batch: tuple[Any, ...], like: Tensor
) -> AuxiliaryCost:
    entering = tuple(torch.empty(f.shape, device=like.device, requires_grad=True) for f in cut.entering)
    meter = LiveMemory(auxiliary=network, inputs=(batch, entering))
    with torch.enable_grad(), meter:
        rule.local_loss(task, network(Boundary(0, cut.name, entering), batch), batch).backward()
    elements = sum(p.numel() for p in network.parameters())
    return AuxiliaryCost(meter.activation_peak_bytes, meter.flops, elements)


class Estimate:
    """Bytes and FLOPs of every block that a model could be cut into.

    Args:
        profile: of the model.
        pieces: what `measure_pieces` gave; a piece that is missing there needs twice its output.
        auxiliary: what `auxiliary_costs` gave; empty for none.
        gradients: whether those of the weights count, too.
    """

    def __init__(
        self,
        profile: Profile,
        pieces: Mapping[str, Piece] | None = None,
        auxiliary: Mapping[str, AuxiliaryCost] | None = None,
        gradients: bool = True,
    ) -> None:
        self.profile = profile
        self.auxiliary = auxiliary or {}
        self._known, self._counted = pieces, gradients
        self._places = cut_places(profile)
        runs = [profile.units[a:b] for a, b in itertools.pairwise(self._places)]
        self._saved = [profile.saved_bytes(a, b) for a, b in itertools.pairwise(self._places)]
        self._output = [run[-1].output.bytes if run[-1].output else 0 for run in runs]
        self._gradients = [4 * sum(u.parameters for u in run) if gradients else 0 for run in runs]
        self._flops = [sum(u.flops for u in run) for run in runs]
        self._entering = [sum(f.bytes for f in run[0].entering) if i else 0 for i, run in enumerate(runs)]
        known = [(pieces or {}).get(run[0].name) for run in runs]
        self._backward = [p.backward_bytes if p else 2 * out for p, out in zip(known, self._output, strict=True)]
        self._cut_flops = [p.cut_flops if p else 0 for p in known]
        self._joins = [all(unit.chained for unit in run) for run in runs]  # can be recomputed with what is before it
        self.block_bytes: BlockCost = functools.cache(self._block_bytes)
        self.recomputed_bytes: BlockCost = functools.cache(self._recomputed_bytes)

    def _after(self, j: int) -> int:
        """Bytes of the auxiliary network of a block that ends at place j."""
        cost = self.auxiliary.get(self.profile.units[self._places[j]].name) if j < len(self._saved) else None
        return cost.activation_bytes if cost else 0

    def _block_bytes(self, i: int, j: int) -> int:
        """Peak of the activations and gradients of the block from place i to place j."""
        return self._peak(i, j, [])

    def _recomputed_bytes(self, i: int, j: int) -> int:
        """The same where all units' activations are recomputed."""
        return self._peak(i, j, [(k, k + 1) for k in range(i, j)])

    def end(self, i: int, stop: int, bound: float, to: int | None = None) -> tuple[int, list[tuple[int, int]]]:
        """The same of the last block, from place i, where what comes before place ``stop`` is recomputed, and how.

        Or of a block that ends at place ``to``.

        It is recomputed in segments, each as long as the bound on the block's bytes allows: the longer, the fewer
        tensors are kept. That costs nothing where the block begins, since all behind is freed by the time when a
        segment is computed again.

        Returns:
            The bytes, and the places where each segment begins and ends.
        """
        segments: list[tuple[int, int]] = []
        for k in range(i, stop):
            longer = [*segments[:-1], (segments[-1][0], k + 1)] if segments and self._joins[k] else []
            fits = longer and self._entering[i] + self._inside(i, k + 1, longer)[1] <= bound
            segments = longer if fits else [*segments, (k, k + 1)]
        return self._peak(i, len(self._saved) if to is None else to, segments), segments

    def _peak(self, i: int, j: int, segments: Sequence[tuple[int, int]]) -> int:
        """Peak of the block from place i to place j. Of segments that are recomputed, only what enters them is kept."""
        kept, inside = self._inside(i, j, segments)
        return self._entering[i] + max(inside, kept + self._after(j))

    def _inside(self, i: int, j: int, segments: Sequence[tuple[int, int]]) -> tuple[int, int]:
        """What is kept where the block's forward pass ends, and the most that the backward pass needs before that.

        What the block hands on is alive all the time; a unit that saves it otherwise makes it a second time here.
        """
        last = bool(segments) and segments[-1][1] == j < len(self._saved)
        kept, inside, k = self._output[j - 1] if last else 0, 0, i
        ends = dict(segments)
        while k < j:
            end = ends.get(k, k + 1)
            now, most = 0, 0
            for n in range(k, end):
                now += self._saved[n]
                most = max(most + self._gradients[n], now + self._backward[n])
            if k in ends:
                kept += self._entering[k] if k > i else 0
                inside = max(inside + sum(self._gradients[k:end]), kept + most)
            else:
                inside = max(inside + self._gradients[k], kept + most)
                kept += now
            k = end
        return kept, inside

    def recomputed_at_once(
        self, plan: Plan, share: float, alone: bool = False, by_gradient: bool = False
    ) -> list[list[str]]:
        """Chains of units to recompute where a share of each batch trains all blocks at once (`glcan.rules.Joint`).

        They are as few as keep these images within the memory of the plan's largest block, or of the largest of even
        blocks, whichever is less; about so, where that cannot be. Where the early blocks learn from them ``alone``
        there are no auxiliary networks to pay for, and more is recomputed, for less memory, as long as a step takes
        about the FLOPs of end-to-end training (`_COMPUTE`). They begin with the model's first units. Where they are
        chosen ``by_gradient``, they run no further than to the last block.
        """
        ends = list(itertools.pairwise(block_ends(self.profile, plan.cuts)))
        room: float = max(
            self.recomputed_bytes(i, j) if name in plan.recompute else self.block_bytes(i, j)
            for name, (i, j) in zip(plan.names, ends, strict=True)
            if i < j
        )
        if plan.blocks in numbers_of_blocks(self.profile):
            even = block_ends(self.profile, choose_cuts(self.profile, plan.blocks, self.block_bytes))
            room = min(room, max(self.block_bytes(i, j) for i, j in itertools.pairwise(even)))
        runs = [self.profile.units[a:b] for a, b in itertools.pairwise(self._places)]
        parted = (k for k, run in enumerate(runs) if any(unit.name in self.profile.parted for unit in run))
        most = next(parted, len(runs))
        to = ends[-1][0] if by_gradient else len(runs)
        most = min(most, to)
        stop, bound = None, room / share
        for slack in (1,) if self._counted else (1, SLACK):
            if stop is None:
                bound = slack * room / share
                stop = self._first_within(most, bound, to)
        if stop is None and self._counted:
            # The gradients of all weights are there in any case; against many weights nothing else counts.
            plain = Estimate(self.profile, self._known, gradients=False)
            return plain.recomputed_at_once(plan, share, alone, by_gradient)
        if stop is None:
            stop, bound = self._least(most, bound, to)
        if alone:
            stop, bound = self._for_the_flops_saved(share, ends[-1], room, most, (stop, bound), by_gradient)
        return [chain for a, b in self.end(0, stop, bound, to)[1] for chain in chains(runs[a:b])]

    def _for_the_flops_saved(
        self,
        share: float,
        last: tuple[int, int],
        room: float,
        most: int,
        found: tuple[int, float],
        by_gradient: bool,
    ) -> tuple[int, float]:
        """Up to where to recompute, and the bound, for the least memory that `_COMPUTE` allows; what was found if none.

        The other images only run forward, but for the last block; or all of them, where some are chosen for what is
        before it.
        """
        forward = self.forward_flops(0, len(self._saved))
        others = 1.0 if by_gradient else 1 - share
        learning = self.forward_flops(0, last[0]) if by_gradient else forward
        spent = others * (forward + 2 * self.forward_flops(*last))
        allowed = (_COMPUTE * 3 * forward - spent) / share - 3 * learning  # for recomputation, of the whole batch
        needed = others * self.block_bytes(*last)  # in any case
        to = last[0] if by_gradient else last[1]
        for part in _PARTS_OF_ROOM:
            bound = max(needed, part * room) / share
            stop = self._first_within(most, bound, to) if bound < found[1] else None
            if stop is None or self.forward_flops(0, stop) > allowed:
                break
            found = stop, bound
        return found

    def _first_within(self, most: int, bound: float, to: int) -> int | None:
        """The first place up to which units have to be recomputed to keep the whole model within the bound, if any."""
        # More recomputation is less memory up to where a segment itself is what needs most.
        fits = functools.cache(lambda stop: self.end(0, stop, bound, to)[0] <= bound)
        stop = bisect.bisect_left(range(most), x=True, key=fits)
        if fits(stop):
            return stop
        return next((k for k in range(0, most, max(1, most // _TRIED)) if fits(k)), None)

    def _least(self, most: int, bound: float, to: int) -> tuple[int, float]:
        """Up to where to recompute, and the bound, where the one that is asked for cannot be kept: the least that can.

        A bound that is too small would make all segments as short as they can be, and keep what enters each.
        """
        highest = max(0, math.ceil(math.log(self.end(0, 0, bound, to)[0] / bound, _STEP)))  # nothing is recomputed

        def kept(k: int) -> bool:
            return self._first_within(most, bound * _STEP**k, to) is not None

        bound *= _STEP ** bisect.bisect_left(range(highest), x=True, key=kept)
        stop = self._first_within(most, bound, to)
        return (0 if stop is None else stop), bound

    def extra_flops(self, i: int, j: int) -> int:
        """FLOPs of the block from place i to place j beyond its share of end-to-end training; may be negative."""
        cost = self.auxiliary.get(self.profile.units[self._places[j]].name) if j < len(self._saved) else None
        return (cost.flops if cost else 0) - self._cut_flops[i]

    def extra_flops_alone(self, plan: Plan, share: float, by_gradient: bool = False) -> float:
        """FLOPs of a step beyond end-to-end training where the early blocks learn from this share of the batch alone.

        Negative where the other images, which only run forward but for the last block, save more than is recomputed.
        """
        recomputed = self.recomputed_at_once(plan, share, alone=True, by_gradient=by_gradient)
        names = {name for chain in recomputed for name in chain}
        again = sum(unit.flops for unit in self.profile.units if unit.name in names)
        early = self.forward_flops(0, block_ends(self.profile, plan.cuts)[-2])
        return share * (again + early * by_gradient) - 2 * (1 - share) * early

    def forward_flops(self, i: int, j: int) -> int:
        """Forward FLOPs of the block's units: what recomputing them costs."""
        return sum(self._flops[i:j])
