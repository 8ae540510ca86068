"""Supervised local learning: gradient-isolated blocks, each trained by the loss of an auxiliary network of its own.

`LocalPass.run` is where a step of local learning is written; the rule (`glcan.auxiliary`) says which networks.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from glcan.auxiliary.base import AuxiliaryRule, Site
from glcan.cost.cuts import (
    Plan,
    block_ends,
    cheapest_cuts,
    choose_cuts,
    cut_places,
    longest_end,
    make_plan,
    numbers_of_blocks,
)
from glcan.cost.estimate import AuxiliaryCost, Estimate
from glcan.errors import ConfigError, CutError
from glcan.inspect.isolation import Boundary, Isolation
from glcan.inspect.profile import Profile
from glcan.inspect.tensors import overridden
from glcan.strategies.base import (
    Backward,
    Candidate,
    Done,
    Family,
    Group,
    Pass,
    Phase,
    Setting,
    Strategy,
    Wanted,
    forget_casts,
    no_autocast,
)
from glcan.strategies.pieces import auxiliary_costs, flops_of
from glcan.strategies.recompute import Recomputation
from glcan.strategies.segments import segments_of, with_large_end
from glcan.strategies.survey import check_trained, survey, users_of
from glcan.tasks.base import Task

__all__ = ["Local", "LocalPass"]

# Numbers of blocks that a budget is looked for with.
_NUMBERS = frozenset({2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 48, 64, 96, 128})
# Plans whose FLOPs differ by less than this share of end-to-end training's cost the same.
_SAME_COST = 0.08


class Local(Strategy):
    """Blocks that learn by the losses of auxiliary networks.

    Args:
        rule: says which auxiliary networks.
        number: of blocks; none for any, where a budget decides.
    """

    family: ClassVar[Family] = "local"

    def __init__(self, rule: AuxiliaryRule, number: int | None) -> None:
        self.rule, self.number = rule, number
        self._known: dict[Any, AuxiliaryCost] = {}

    @property
    def name(self) -> str:  # type: ignore[override]
        return self.rule.name

    @property
    def summary(self) -> str:  # type: ignore[override]
        return self.rule.summary

    def around(self, task: Task, model: nn.Module) -> contextlib.AbstractContextManager[Any]:
        return task.running(model)

    def prepared(self, model: nn.Module, task: Task, profile: Profile, wanted: Wanted) -> Profile:
        return with_large_end(model, profile, wanted.cuts or ()) if task.images_apart else profile

    def estimate(self, setting: Setting, blocks: int | None = None) -> Estimate:
        count = blocks or self.number or 1
        costs = (
            {}
            if count == 1
            else auxiliary_costs(
                self.rule, setting.model, setting.profile, setting.task, setting.batch, count, self._known
            )
        )
        return Estimate(setting.profile, setting.pieces, costs)

    def plan(self, setting: Setting, wanted: Wanted) -> Plan:
        profile, cuts, recompute = setting.profile, wanted.cuts, wanted.recompute
        if cuts is not None:
            if self.number not in (None, len(cuts) + 1):
                raise CutError(
                    f"{self.name}:{self.number} has {self.number} blocks, but {len(cuts)} cuts make {len(cuts) + 1}. "
                    f"Write {self.name}:{len(cuts) + 1}, or leave the cuts out."
                )
            return make_plan(profile, cuts=cuts, recompute=recompute)
        if self.number is None:
            raise CutError(f"{self.name!r} has no number of blocks. Write '{self.name}:4', give cuts, or a budget.")
        if self.number == 1 or self.number >= len(cut_places(profile)):
            return make_plan(profile, blocks=self.number, recompute=recompute)  # says what is possible
        estimate = self.estimate(setting)
        if self.rule.long_end and not recompute:
            cuts, recompute = longest_end(profile, self.number, estimate.block_bytes, estimate.end, self.rule.long_end)
            return make_plan(profile, cuts=cuts, recompute=recompute)
        return make_plan(profile, blocks=self.number, cost=estimate.block_bytes, recompute=recompute)

    def bind(self, setting: Setting, plan: Plan) -> Pass:
        return LocalPass(setting, plan, self.rule, self._known)

    # -- a budget ------------------------------------------------------------------------------------------------

    def candidates(self, setting: Setting, bound: float, state: int) -> Iterable[Candidate]:
        possible = [k for k in numbers_of_blocks(setting.profile) if k in _NUMBERS or k == 1]
        numbers = possible if self.number is None else [self.number]
        found = [c for k in numbers if bound > 0 and (c := self._candidate(setting, k, bound, state)) is not None]
        cheapest = max(0.0, min((c.extra for c in found), default=0.0))
        # Fewer blocks lose less accuracy, so they go first among those that cost about the same, or nothing.
        yield from sorted(found, key=lambda c: (max(0, math.floor((c.extra - cheapest) / _SAME_COST)), c.blocks))

    def _candidate(self, setting: Setting, blocks: int, bound: float, state: int) -> Candidate | None:
        """The cheapest of so many blocks, if there is one."""
        estimate, profile = self.estimate(setting, blocks), setting.profile
        within = bound - _auxiliary_bytes(estimate, blocks, state)

        def cost(i: int, j: int) -> int:
            return min(estimate.block_bytes(i, j), estimate.recomputed_bytes(i, j))

        def price(i: int, j: int) -> int:
            again = estimate.forward_flops(i, j) if estimate.block_bytes(i, j) > within else 0
            return again + estimate.extra_flops(i, j)

        best = cheapest_cuts(profile, blocks, cost, price, within)
        if best is None:
            return None
        total, cuts = best
        recompute = tuple(
            f"block{k}"
            for k, (i, j) in enumerate(itertools.pairwise(block_ends(profile, cuts)), 1)
            if estimate.block_bytes(i, j) > within
        )
        return self._as_candidate(cuts, recompute, total / (3 * (profile.flops or 1)))

    def _as_candidate(self, cuts: Sequence[str], recompute: bool | Sequence[str], extra: float) -> Candidate:
        again = recompute if isinstance(recompute, bool) else tuple(recompute)
        return Candidate(Wanted(tuple(cuts), again), extra, len(cuts) + 1)

    def smallest(self, setting: Setting, state: int) -> list[Candidate]:
        """Those with the smallest peaks, by estimates: over all numbers of blocks, everything recomputed or not."""
        options: list[tuple[float, int, Candidate]] = []
        possible = [k for k in numbers_of_blocks(setting.profile) if k in _NUMBERS or k == 1]
        for blocks in possible if self.number is None else [self.number]:
            estimate = self.estimate(setting, blocks)
            for again in (False, True):
                cost = estimate.recomputed_bytes if again else estimate.block_bytes
                cuts = choose_cuts(setting.profile, blocks, cost)
                largest = max(cost(i, j) for i, j in itertools.pairwise(block_ends(setting.profile, cuts)))
                held = largest + _auxiliary_bytes(estimate, blocks, state)
                options.append((held, len(options), self._as_candidate(cuts, again, 0.0)))
        return [candidate for _, _, candidate in sorted(options)[:3]]


def _auxiliary_bytes(estimate: Estimate, blocks: int, state: int) -> float:
    """What all auxiliary networks hold, about: weights, gradients and optimizer state."""
    costs = estimate.auxiliary.values()
    parameters = sum(cost.parameters for cost in costs) / max(1, len(costs)) * (blocks - 1)
    return parameters * (4 * 2 + state)


class LocalPass(Pass):
    """One forward pass; at each cut, the block that ends there runs its auxiliary network, and its backward pass."""

    def __init__(
        self, setting: Setting, plan: Plan, rule: AuxiliaryRule, known: dict[Any, AuxiliaryCost] | None = None
    ) -> None:
        self._setting, self._rule, self._phase = setting, rule, Phase()
        self._known = {} if known is None else known  # what networks need that planning has metered
        model, profile = setting.model, setting.profile
        users = users_of(model, profile, plan.cuts)
        self.plan = plan
        self.added = nn.ModuleDict()
        self._isolation: Isolation | None = None
        if plan.blocks > 1:
            found = survey(setting, plan, users)
            self.plan = plan = plan.entered_by(found.entering)
            check_trained(plan, model, users)
            self.added.update(self._build(found.skipping))
            held = {cut: profile.crossing[cut] for cut in plan.cuts}
            self._isolation = Isolation(model, profile.names, plan.cuts, held=held)
            self._crossings = found.crossings
        self.groups = self._group(users)
        segments = [run for run in segments_of(profile) if run[0] not in profile.parted]
        self._recomputed = Recomputation(model, self._runs(segments))
        self._end_to_end = Recomputation(model, segments)
        self._in_parts = Recomputation(model, [profile.parted] if plan.blocks > 1 else [], profile.batch)
        self._again = {
            name: Recomputation(network, rule.segments(network) if name in plan.recompute else [])
            for name, network in self.added.items()
        }

    def _build(self, skipping: Any) -> dict[str, nn.Module]:
        """The auxiliary networks, on the model's device and in its type, in train mode: nothing else needs them."""
        setting, plan = self._setting, self.plan
        like = next((p for p in setting.model.parameters() if p.is_floating_point()), None)
        built = nn.ModuleDict()
        for i, (name, (cut, *_)) in enumerate(zip(plan.names, plan.units[1:], strict=False)):
            if cut.entering:
                built[name] = self._rule.build(
                    Site(
                        setting.model,
                        setting.profile,
                        setting.task,
                        cut,
                        plan.blocks,
                        i,
                        skipping.get(cut.name, ()),
                    )
                )
        if like is not None:
            _move(built, like)
        return dict(built.train().items())

    def _group(self, users: dict[int, set[int]]) -> list[Group]:
        """The trainable parameters of each block, its auxiliary network's included, and those that several use."""
        plan = self.plan
        own: list[list[nn.Parameter]] = [[] for _ in plan.units]
        tied: list[nn.Parameter] = []
        for parameter in self._setting.model.parameters():
            if parameter.requires_grad:
                blocks = users[id(parameter)] or {plan.blocks - 1}
                (own[next(iter(blocks))] if len(blocks) == 1 else tied).append(parameter)
        for name, network in self.added.items():
            own[plan.names.index(name)] += list(network.parameters())
        groups = [Group(name, tuple(parameters)) for name, parameters in zip(plan.names, own, strict=True)]
        return groups + ([Group("tied", tuple(tied))] if tied else [])

    def _runs(self, segments: Sequence[list[str]]) -> list[list[str]]:
        """The chains of units that are recomputed, as the plan says."""
        plan = self.plan
        together = plan.recomputed_units
        wanted = {u.name for k, b in enumerate(plan.units) if plan.names[k] in plan.recompute for u in b}
        wanted.update(names[0] for names in together if len(names) == 1)
        return [run for run in segments if run[0] in wanted] + [names for names in together if len(names) > 1]

    # -- phases ----------------------------------------------------------------------------------------------------

    @property
    def phase(self) -> Phase:
        return self._phase

    def enter(self, phase: Phase) -> None:
        if not 0 <= phase.frozen < self.plan.blocks:
            raise ConfigError(
                f"frozen is {phase.frozen}, but of {self.plan.blocks} blocks 0 to {self.plan.blocks - 1} can be "
                "frozen: the last one always learns."
            )
        if phase.frozen and phase.end_to_end:
            raise ConfigError(f"frozen is {phase.frozen}, but end_to_end trains every block. Leave one of them out.")
        self._phase = phase

    def describe(self) -> str:
        if not self.added:
            return ""
        setting, own = self._setting, sum(p.numel() for p in self.added.parameters())
        cuts = [
            block[0] for name, block in zip(self.plan.names, self.plan.units[1:], strict=False) if name in self.added
        ]
        flops = flops_of(self._rule, setting.model, setting.profile, setting.task, setting.batch, cuts, self._known)
        share = flops / (3 * max(1, setting.profile.flops))
        return f"auxiliary networks with {own:,} parameters and {share:.1%} of the model's FLOPs"

    @property
    def draws_twice(self) -> bool:
        return bool(self.plan.recompute) or bool(self._in_parts) or self._phase.end_to_end

    # -- a step ----------------------------------------------------------------------------------------------------

    def prepare(self) -> None:
        names = self.plan.names[self._phase.frozen :]
        learning = {name: self.added[name] for name in names if name in self.added}
        self._rule.before_pass(nn.ModuleDict(learning), self._setting.model)

    def run(self, batch: tuple[Any, ...], backward: Backward, done: Done, share: float = 1.0) -> dict[str, Tensor]:
        if self._isolation is None:
            return self._run_whole(batch, backward, done, share)
        setting, isolation, phase = self._setting, self._isolation, self._phase
        losses: dict[str, Tensor] = {}

        def finish(block: int, loss: Tensor) -> None:
            losses[self.plan.names[block]] = loss
            if not phase.end_to_end:  # where the backward pass is still to come
                with no_autocast(loss):
                    done(block)
                forget_casts(loss)

        def at_cut(boundary: Boundary) -> None:
            if boundary.block < phase.frozen:
                return
            self._check_entering(boundary)
            if self.plan.names[boundary.block] in self.added:
                with isolation.suspended():  # thousands of small operations: a detector's losses, an optimizer's step
                    own = boundary.detached() if phase.end_to_end else boundary
                    finish(boundary.block, self._learn(own, batch, backward, share))

        args, kwargs = setting.arguments(batch)
        isolation.on_boundary, isolation.isolating = at_cut, not phase.end_to_end
        isolation.crossings = dict(self._crossings)  # frozen blocks leave none
        with (
            setting.task.running(setting.model),
            self._in_parts.applied(),
            isolation,
            setting.forward_autocast(batch),
        ):
            with (self._end_to_end if phase.end_to_end else self._recomputed).applied(), self._frozen_forward():
                loss = setting.task.loss(setting.model(*args, **kwargs), batch)
            self._check_reached()
            with isolation.replay():
                backward(loss, share)
            loss = loss.detach()
        finish(self.plan.blocks - 1, loss)  # an optimizer's step, at which the isolation does not look
        if phase.end_to_end:
            for block in range(self.plan.blocks):
                done(block)
        if len(self.groups) > self.plan.blocks:
            done(self.plan.blocks)  # tied parameters
        return losses

    def _run_whole(self, batch: tuple[Any, ...], backward: Backward, done: Done, share: float) -> dict[str, Tensor]:
        """A single block: plain back-propagation."""
        args, kwargs = self._setting.arguments(batch)
        with self._setting.forward_autocast(batch), self._recomputed.applied():
            loss = self._setting.task.loss(self._setting.model(*args, **kwargs), batch)
        backward(loss, share)
        done(0)
        return {self.plan.names[0]: loss.detach()}

    def _learn(self, boundary: Boundary, batch: tuple[Any, ...], backward: Backward, share: float) -> Tensor:
        """A block's local loss, detached, after its backward pass."""
        name = self.plan.names[boundary.block]
        with self._again[name].applied():
            prediction = self.added[name](boundary, batch)
        loss = self._rule.local_loss(self._setting.task, prediction, batch)
        del prediction
        if loss.requires_grad:  # not where everything in it is a copy, and the boundary detached
            backward(loss, share)
        return loss.detach()  # frees the graph before the optimizer makes its temporaries

    def _check_entering(self, boundary: Boundary) -> None:
        planned = len(self.plan.units[boundary.block + 1][0].entering)
        if len(boundary.entering) != planned:
            raise ConfigError(
                f"{len(boundary.entering)} tensors that need a gradient enter the cut at {boundary.cut!r}, but "
                f"{planned} did when the learner was built. Parameters may have been frozen or thawed since: build a "
                "new learner after that."
            )

    def _check_reached(self) -> None:
        isolation = self._isolation
        if isolation is not None and isolation.block < len(isolation.cuts):
            raise CutError(
                f"The model ran without reaching the cut {isolation.cuts[isolation.block]!r} (its layers are "
                "skipped or ran in another order); cut at a unit that always runs."
            )

    @contextlib.contextmanager
    def _frozen_forward(self) -> Iterator[None]:
        """While this is open, nothing is kept for a backward pass before the first block that is not frozen begins.

        Outside of checkpointing, which looks at the mode before the unit runs.
        """
        if not self._phase.frozen:
            yield
            return
        module = self._setting.model.get_submodule(self.plan.cuts[self._phase.frozen - 1])
        forward: Callable[..., Any] = module.forward

        def begin(*args: Any, **kwargs: Any) -> Any:
            torch.set_grad_enabled(True)
            return forward(*args, **kwargs)

        with torch.no_grad(), overridden([(module, begin)]):
            yield


def _move(module: nn.Module, like: Tensor) -> None:
    """Parameters and buffers of a module that has just been made, to another tensor's device and type. Ties stay.

    Not `nn.Module.to`: it swaps fake tensors with those that it makes, and fails where something has a weak reference.
    """
    moved: dict[Tensor, Tensor] = {}
    for owner in module.modules():
        own = (owner.named_parameters(recurse=False, remove_duplicate=False), owner.named_buffers(recurse=False))
        for name, tensor in [*own[0], *own[1]]:
            there = tensor.detach().to(like.device, like.dtype if tensor.is_floating_point() else None)
            if (there.device, there.dtype) == (tensor.device, tensor.dtype):
                continue  # it may be the model's own
            if tensor not in moved:
                moved[tensor] = nn.Parameter(there, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else there
            setattr(owner, name, moved[tensor])
