"""The planner: what a training step will need in bytes and FLOPs, and the cheapest way to stay within a budget.

A candidate is chosen by estimates (`glcan.estimate`) and then checked by running the learner's own step on fake
tensors, under the same meter that meters real training (`glcan.measure_step`), so that what is predicted and what is
trained cannot drift apart. Nothing is computed and nothing of the batch's size is allocated.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import gc
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_map_only

from glcan import rules, tasks
from glcan.checkpointing import with_large_end
from glcan.dryrun import AssumedValues, fake_copy, uninitialized
from glcan.errors import ConfigError, CutError
from glcan.estimate import AuxiliaryCost, Estimate, Piece, auxiliary_costs, measure_pieces
from glcan.isolation import tensors_in
from glcan.learner import LocalLearner, OptimizerFactory, first_part
from glcan.memory import KINDS, StepCost, measure_step
from glcan.plan import Plan, block_ends, cheapest_cuts, choose_cuts, cut_places, make_plan, numbers_of_blocks
from glcan.profile import Profile, profile
from glcan.sizes import format_bytes, format_scaled, parse_bytes

__all__ = ["Forecast", "LargestBatch", "free_bytes", "largest_batches", "plan"]

# How often a candidate that turns out to need more than was estimated is looked for again under a tighter bound.
_ATTEMPTS = 4
# Plans whose FLOPs differ by less than this share of end-to-end training's cost the same.
_SAME_COST = 0.08
# What memory="auto" leaves free: the allocator's fragments, the libraries' workspaces.
_MARGIN = 0.10


@dataclasses.dataclass(frozen=True)
class Forecast:
    """What a training step will cost.

    Attributes:
        rule: name of the rule.
        plan: the cuts, and the blocks that are recomputed.
        cost: of one step in its steady state.
        auxiliary_parameters: of all auxiliary networks.
        baselines: the cost of the same step end-to-end and with activation checkpointing, by name.
        memory: the budget in bytes, None if there was none.
    """

    rule: str
    plan: Plan
    cost: StepCost
    auxiliary_parameters: int
    baselines: Mapping[str, StepCost] = dataclasses.field(default_factory=dict)
    memory: int | None = None

    def ratios(self, baseline: str) -> dict[str, float]:
        """Peak, activation peak and FLOPs, each divided by the baseline's."""
        other = self.baselines[baseline]
        return {
            "peak_ratio": self.cost.peak_bytes / other.peak_bytes,
            "activation_ratio": self.cost.activation_peak_bytes / other.activation_peak_bytes,
            "flops_ratio": self.cost.flops / other.flops,
        }

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON: bytes and FLOPs of one step, and ratios."""
        found: dict[str, Any] = {
            "rule": self.rule,
            "blocks": self.plan.blocks,
            "cuts": list(self.plan.cuts),
            "recompute": list(self.plan.recompute),
            "peak_bytes": self.cost.peak_bytes,
            "activation_peak_bytes": self.cost.activation_peak_bytes,
            "by_kind": self.cost.by_kind,
            "block_peak_bytes": list(self.cost.block_peak_bytes),
            "flops_per_step": self.cost.flops,
            "auxiliary_parameters": self.auxiliary_parameters,
        }
        if self.memory is not None:
            found["memory_bytes"] = self.memory
        if "e2e" in self.baselines:
            found["vs_e2e"] = self.ratios("e2e")
        found["vs_checkpoint"] = {name: self.ratios(name) for name in self.baselines if name.startswith("checkpoint")}
        found["baselines"] = {
            name: {
                "peak_bytes": cost.peak_bytes,
                "activation_peak_bytes": cost.activation_peak_bytes,
                "flops_per_step": cost.flops,
            }
            for name, cost in self.baselines.items()
        }
        return found

    def rows(self) -> list[list[str]]:
        """A table: a header, this forecast and the baselines; relative to end-to-end where that is there."""
        first = self.baselines.get("e2e")

        def cells(name: str, cost: StepCost) -> list[str]:
            row = [name, format_bytes(cost.peak_bytes), format_bytes(cost.activation_peak_bytes)]
            row.append(format_scaled(cost.flops, 1000, ("", "k", "M", "G", "T", "P")))
            if first is not None:
                ratios = (
                    cost.peak_bytes / first.peak_bytes,
                    cost.activation_peak_bytes / first.activation_peak_bytes,
                    cost.flops / first.flops,
                )
                row[1:] = [f"{cell} ({ratio:.2f}×)" for cell, ratio in zip(row[1:], ratios, strict=True)]
            return row

        name = f"{self.rule}:{self.plan.blocks}" if rules.RULES[self.rule].local else self.rule
        if self.plan.recompute:
            units = sum(map(len, self.plan.recomputed_units))
            name += f" ({units} units recomputed)" if units else f" ({len(self.plan.recompute)} recomputed)"
        others = [cells(other, cost) for other, cost in self.baselines.items() if other != self.rule]
        return [["method", "peak", "activations", "FLOPs a step"], cells(name, self.cost), *others]

    def __str__(self) -> str:
        kinds = ", ".join(f"{k.replace('_', ' ')} {format_bytes(v)}" for k, v in self.cost.by_kind.items() if v)
        lines = [str(self.plan), f"peak {format_bytes(self.cost.peak_bytes)}: {kinds}"]
        widths = [max(map(len, column)) for column in zip(*self.rows(), strict=True)]
        lines += [
            "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in self.rows()
        ]
        return "\n".join(lines)


def plan(
    model: nn.Module,
    task: str | tasks.Task = "classification",
    sample: Sequence[Any] | None = None,
    *,
    blocks: int | None = None,
    cuts: Sequence[str] | None = None,
    memory: str | int | None = None,
    units: Sequence[str] | None = None,
    rule: str | rules.Rule = "glcan",
    rule_options: Mapping[str, Any] | None = None,
    optimizer: OptimizerFactory | None = None,
    autocast: torch.dtype | None = None,
    recompute: bool | Sequence[str] = False,
    accumulate: int = 1,
    baselines: Sequence[str] | None = None,
) -> Forecast:
    """What a training step will need, before any training.

    Args:
        model: not changed, not run for real; may be on any device.
        task, units, rule, rule_options, optimizer, autocast: as `LocalLearner` takes them. Without an optimizer, the
            step is ``backward()``, which leaves all gradients alive.
        sample: a batch of the size that is to be trained with, or fake tensors of its shapes.
        blocks, cuts, recompute, accumulate: as `LocalLearner` takes them.
        memory: a budget such as "8GiB", in place of blocks and cuts: the plan with the fewest FLOPs whose peak fits;
            where several cost the same within 8 % of end-to-end training, the one with the fewest blocks. Recomputing
            blocks is part of the search.
        baselines: what to compare with, by the names of rules; "e2e+accumulate:N" is end-to-end training with each
            batch in N parts. They accumulate as the plan does. None: the rules, and beside a plan in blocks whose
            batches are not accumulated, as many parts as there are blocks, four at most.

    Raises:
        ConfigError: nothing fits the budget (says what holds the peak, and what would help), or see `LocalLearner`.
        CutError, UnknownName: what was asked for does not fit.
    """
    if sample is None:
        raise ConfigError("sample is missing; give a batch such as sample=(images, labels) of the size to plan for.")
    if memory is not None and (blocks is not None or cuts is not None or recompute):
        raise ConfigError("Give either memory=... or blocks, cuts and recompute, not both: a budget decides these.")
    bench = _Bench(model, task, tuple(sample), units, rule, rule_options, optimizer, autocast, accumulate)
    limit = None if memory is None else parse_bytes(memory)
    if limit is None:
        if bench.rule.local and blocks is None and cuts is None:
            raise CutError("Give blocks=K, cuts=[...] or memory=..., so that there is something to plan.")
        chosen = bench.run(blocks=blocks, cuts=cuts, recompute=recompute)
    else:
        chosen = bench.fit(limit)
    if baselines is None:
        baselines = rules.BASELINES
        parts = min(chosen.plan.blocks, len(bench.batch[0]) // 2, 4)  # of two images at least, for BatchNorm
        if parts > 1 and accumulate == 1:
            baselines = (*baselines, f"e2e+accumulate:{parts}")
    others = bench.baselines([name for name in baselines if name != chosen.rule])
    others = {name: others.get(name, chosen.cost) for name in baselines}
    return dataclasses.replace(chosen, baselines=others, memory=limit)


@dataclasses.dataclass(frozen=True)
class LargestBatch:
    """The largest batch of a method that fits a budget.

    Attributes:
        method: "e2e", "checkpoint", "checkpoint-sqrt", "glcan:4", and "glcan:4+recompute".
        batch: 0 if not even two images fit.
        peak_bytes: with that batch.
        flops_per_image: of one step.
    """

    method: str
    batch: int
    peak_bytes: int
    flops_per_image: float


def largest_batches(
    model: nn.Module,
    task: str | tasks.Task,
    sample: Callable[[int], Sequence[Any]],
    memory: str | int,
    *,
    blocks: Sequence[int] = (2, 4, 8),
    rule: str | rules.Rule = "glcan",
    rule_options: Mapping[str, Any] | None = None,
    optimizer: OptimizerFactory | None = None,
    autocast: torch.dtype | None = None,
    units: Sequence[str] | None = None,
) -> list[LargestBatch]:
    """The largest batch that fits the budget, for end-to-end training, checkpointing and the rule.

    Args:
        model, task, rule, rule_options, optimizer, autocast, units: as `plan`.
        sample: gives a batch of so many images.
        memory: the budget.
        blocks: the numbers of blocks to look at, each also with all blocks recomputed.
    """
    limit = parse_bytes(memory)

    @functools.cache
    def bench(batch: int) -> _Bench:
        return _Bench(model, task, tuple(sample(batch)), units, rule, rule_options, optimizer, autocast)

    found: list[LargestBatch] = []
    name = rules.create(rule, rule_options).name
    methods: dict[str, dict[str, Any]] = {baseline: {"rule": baseline} for baseline in rules.BASELINES}
    for k in blocks:
        if k > 1 and k in numbers_of_blocks(bench(2).profile):
            # the cuts of a small batch: the best ones hardly depend on its size
            found_plan = bench(2).run(blocks=k).plan
            methods[f"{name}:{k}"] = {**_cut_at(found_plan.cuts), "recompute": found_plan.recompute}
            cuts = bench(2).run(blocks=k, recompute=True).plan.cuts
            methods[f"{name}:{k}+recompute"] = {**_cut_at(cuts), "recompute": True}
    for method, options in methods.items():

        @functools.cache
        def cost(batch: int, options: Any = options) -> StepCost:
            return bench(batch).run(**options).cost

        batch = _largest(lambda b: cost(b).peak_bytes, limit)
        flops = cost(max(2, batch)).flops / max(2, batch)
        found.append(LargestBatch(method, batch, cost(batch).peak_bytes if batch else 0, flops))
    return found


def _largest(peak: Callable[[int], int], limit: int) -> int:
    """The largest batch whose peak is within the limit; 0 if two images do not fit.

    A peak grows with the batch along straight lines, so the next guess lies on the line through the last two.
    """
    low, high = 32, 64  # large enough that parameters and gradients do not set the peak
    if peak(low) > limit:
        low, high = 2, 32
        if peak(low) > limit:
            return 0
    while peak(high) <= limit:
        slope = (peak(high) - peak(low)) / (high - low)
        guess = high + int((limit - peak(high)) / slope) if slope > 0 else 2 * high
        low, high = high, max(high + 1, min(guess, 64 * high))
    while high - low > 1:
        slope = (peak(high) - peak(low)) / (high - low)
        guess = low + int((limit - peak(low)) / slope)
        middle = min(high - 1, max(low + 1, guess))
        if peak(middle) <= limit:
            low = middle
            if peak(low + 1) > limit:
                return low
            low += 1
        else:
            high = middle
    return low


def free_bytes(model: nn.Module) -> int:
    """The memory that training may take on the model's CUDA device: what is free or already held, less a margin.

    Raises:
        ConfigError: the model is not on a CUDA device.
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    if device.type != "cuda":
        raise ConfigError(
            f"memory='auto' asks the CUDA device how much it has free, but the model is on {device}. Move the model to "
            "the device first, or say how much: memory='8GiB'."
        )
    free, total = torch.cuda.mem_get_info(device)
    # What this process's allocator holds is at its disposal, the model itself included.
    return int(free + torch.cuda.memory_reserved(device) - _MARGIN * total)


def _cut_at(cuts: Sequence[str]) -> dict[str, Any]:
    return {"cuts": cuts} if cuts else {"blocks": 1}


class _Bench:
    """A model on fake tensors, on which learners are built and stepped."""

    def __init__(
        self,
        model: nn.Module,
        task: str | tasks.Task,
        sample: tuple[Any, ...],
        units: Sequence[str] | None,
        rule: str | rules.Rule,
        rule_options: Mapping[str, Any] | None,
        optimizer: OptimizerFactory | None,
        autocast: torch.dtype | None,
        accumulate: int = 1,
    ) -> None:
        self.task = tasks.create(task)
        self.rule = rules.create(rule, rule_options)
        self.units, self.optimizer, self.autocast, self.accumulate = units, optimizer, autocast, accumulate
        self._auxiliary_costs: dict[Any, AuxiliaryCost] = {}
        self._state: dict[Tensor, Any] = {}
        self.mode: FakeTensorMode | None = FakeTensorMode(allow_non_fake_inputs=True)
        self.profile: Profile
        try:
            self.model, self.batch = fake_copy(model, sample, self.mode)
            with self._context(), self._running():
                self.profile = profile(self.model, *self._arguments(), units=units)
        except Exception:
            if any(isinstance(t, FakeTensor) for t in (*model.parameters(), *tensors_in(sample))):
                raise
            # The model does not run on fake tensors, or not at all: the real one tells, or says why not.
            self.mode = None
            self.model = copy.deepcopy(model)
            self.batch = tree_map_only(Tensor, lambda t: t.detach().clone(), sample)
            with self._running():
                self.profile = profile(self.model, *self._arguments(), units=units)
        if self.rule.local and self.task.images_apart:
            self.profile = with_large_end(self.model, self.profile)

    def _arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The model's, for what is run at once."""
        return self.task.arguments(first_part(self.task, self.batch, self.accumulate))

    def _running(self) -> contextlib.AbstractContextManager[Any]:
        return self.task.running(self.model) if self.rule.local else contextlib.nullcontext()

    @contextlib.contextmanager
    def _context(self) -> Iterator[None]:
        if self.mode is None:
            yield
            return
        collecting = gc.isenabled()
        gc.disable()  # walks all of torch's modules again and again, and finds nothing: a twentieth of the time
        try:
            with self.mode, uninitialized(), AssumedValues() if self.task.assumes else contextlib.nullcontext():
                yield
        finally:
            if collecting:
                gc.enable()

    def _build(self, rule: str | rules.Rule, **options: Any) -> LocalLearner:
        return LocalLearner(
            self.model,
            self.task,
            self.batch,
            rule=rule,
            units=self.units,
            optimizer=self.optimizer,
            autocast=self.autocast,
            accumulate=self.accumulate,
            profile=self.profile,
            **options,
        )

    def run(self, rule: str | rules.Rule | None = None, **options: Any) -> Forecast:
        """The cost of one step of a learner."""
        with self._context():
            learner = self._build(self.rule if rule is None else rule, **options)
            cost = measure_step(learner, *self.batch)
            for optimizer in learner.optimizers if self.mode is not None else ():
                self._state.update(optimizer.state)
        for parameter in self.model.parameters():
            parameter.grad = None
        extra = sum(p.numel() for p in learner.auxiliary.parameters())
        return Forecast(learner.rule.name, learner.plan, cost, extra)

    def baselines(self, names: Sequence[str]) -> dict[str, StepCost]:
        """The costs of the baselines, which differ in what is recomputed or accumulated: one learner for all."""
        found: dict[str, StepCost] = {}
        if not names:
            return found
        with self._context():
            learner = self._build("e2e")
            for optimizer in learner.optimizers:  # the same factory's, for the same parameters, so it need not be made
                own = [p for group in optimizer.param_groups for p in group["params"]]
                if all(p in self._state for p in own):
                    optimizer.state.update({p: self._state[p] for p in own})
            for name in names:
                rule, _, parts = name.partition("+accumulate:")
                learner.rule, learner.accumulate = rules.create(rule), int(parts or self.accumulate)
                found[name] = measure_step(learner, *self.batch)
        for parameter in self.model.parameters():
            parameter.grad = None
        return found

    # -- a budget ------------------------------------------------------------------------------------------------

    @functools.cached_property
    def pieces(self) -> dict[str, Piece]:
        with self._context(), self._running():
            args, kwargs = self._arguments()
            return measure_pieces(self.model, args, kwargs, self.profile, assume=self.task.assumes)

    @functools.cache  # noqa: B019 - a bench lives as long as a plan is made
    def estimate(self, blocks: int) -> Estimate:
        with self._context():
            costs = auxiliary_costs(
                self.rule,
                self.model,
                self.profile,
                self.task,
                first_part(self.task, self.batch, self.accumulate),
                blocks,
                self._auxiliary_costs,
            )
        return Estimate(self.profile, self.pieces, costs)

    def _numbers_of_blocks(self) -> list[int]:
        possible = numbers_of_blocks(self.profile)
        wanted = {1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 48, 64, 96, 128, max(possible)}
        return [k for k in possible if k in wanted]

    def fit(self, limit: int) -> Forecast:
        """The cheapest plan whose peak is within the limit."""
        if not self.rule.local:
            only = self.run()
            if only.cost.peak_bytes <= limit:
                return only
            raise self._does_not_fit(limit, [only])
        whole = self.run(blocks=1)
        if whole.cost.peak_bytes <= limit:
            return whole
        fixed = self._fixed(whole.cost)
        tried = [whole]
        # What the estimates miss, in bytes: learned from every candidate that is checked.
        missed = 0
        for _ in range(2 * _ATTEMPTS):
            candidates = self._candidates(limit - fixed - missed)
            checked = {(c.plan.cuts, c.plan.recompute) for c in tried}
            fresh = [c for c in candidates if (c[2], c[3]) not in checked]
            if not fresh:
                if not missed:
                    break
                missed = missed // 2 if missed > 2**20 else 0
                continue
            _, _, cuts, recompute = fresh[0]
            found = self.run(**_cut_at(cuts), recompute=recompute)
            tried.append(found)
            if found.cost.peak_bytes <= limit:
                return found
            missed += found.cost.peak_bytes - limit
        smallest = self._smallest()
        tried.append(smallest)
        fitting = [c for c in tried if c.cost.peak_bytes <= limit]
        if fitting:
            return min(fitting, key=lambda c: (c.cost.flops, c.plan.blocks))
        raise self._does_not_fit(limit, tried)

    def _fixed(self, cost: StepCost) -> int:
        """Bytes that are there in any plan: parameters, optimizer state, inputs."""
        kinds = cost.by_kind
        return kinds["parameters"] + kinds["optimizer_state"] + kinds["inputs"]

    def _candidates(self, bound: float) -> list[tuple[float, int, tuple[str, ...], tuple[str, ...]]]:
        """(extra FLOPs as a share, K, cuts, recomputed blocks) of what should keep the bound, the best one first."""
        if bound <= 0:
            return []
        found = [c for blocks in self._numbers_of_blocks() if (c := self._candidate(blocks, bound)) is not None]
        cheapest = max(0.0, min((share for share, *_ in found), default=0.0))
        # Fewer blocks lose less accuracy, so they go first among those that cost about the same, or nothing.
        return sorted(found, key=lambda c: (max(0, math.floor((c[0] - cheapest) / _SAME_COST)), c[1]))

    def _candidate(self, blocks: int, bound: float) -> tuple[float, int, tuple[str, ...], tuple[str, ...]] | None:
        """That of so many blocks, if there is one."""
        estimate, joint = self.estimate(blocks), self._joint(blocks)
        share = joint.share_of(self.profile.batch)
        alone = share > 0 and joint.weight == 1
        within = bound - self._auxiliary_bytes(estimate, blocks)
        if self._joint_bytes(estimate, blocks) > within:
            return None
        if (
            share < 1
            and not joint.by_gradient
            and share * estimate.block_bytes(0, len(cut_places(self.profile)) - 1) <= within
        ):
            within /= 1 - share  # the joint images fit as they are, and only the others go through the blocks

        def cost(i: int, j: int) -> int:
            return min(estimate.block_bytes(i, j), estimate.recomputed_bytes(i, j))

        def price(i: int, j: int) -> int:
            again = estimate.forward_flops(i, j) if estimate.block_bytes(i, j) > within else 0
            return again if alone else again + estimate.extra_flops(i, j)

        best = cheapest_cuts(self.profile, blocks, cost, price, within)
        if best is None:
            return None
        total: float = best[0]
        cuts = best[1]
        recompute = tuple(
            f"block{k}"
            for k, (i, j) in enumerate(itertools.pairwise(block_ends(self.profile, cuts)), 1)
            if estimate.block_bytes(i, j) > within
        )
        if alone:
            if not recompute:  # as the same number of blocks has them where there is no budget
                cuts = choose_cuts(self.profile, blocks, estimate.block_bytes)
            plan = make_plan(self.profile, cuts=cuts, recompute=recompute)
            total = estimate.extra_flops_alone(plan, share, joint.by_gradient)
        return total / (3 * (self.profile.flops or 1)), blocks, cuts, recompute

    def _smallest(self) -> Forecast:
        """The smallest peak that is found, by estimates: over all numbers of blocks, everything recomputed or not."""
        options: list[tuple[float, tuple[str, ...], bool]] = []
        for blocks in self._numbers_of_blocks():
            estimate = self.estimate(blocks)
            for again in (False, True):
                cost = estimate.recomputed_bytes if again else estimate.block_bytes
                cuts = choose_cuts(self.profile, blocks, cost)
                largest = max(cost(i, j) for i, j in itertools.pairwise(block_ends(self.profile, cuts)))
                held = max(largest, self._joint_bytes(estimate, blocks))
                options.append((held + self._auxiliary_bytes(estimate, blocks), cuts, again))
        found = [self.run(**_cut_at(cuts), recompute=again) for _, cuts, again in sorted(options)[:3]]
        return min(found, key=lambda forecast: forecast.cost.peak_bytes)

    def _joint(self, blocks: int) -> rules.Joint:
        """The joint images of so many blocks."""
        return self.rule.joint(self.task, blocks, self.profile.batch, self.profile.mostly_by_image)

    def _joint_bytes(self, estimate: Estimate, blocks: int) -> float:
        """What the joint images hold at least, with all units recomputed."""
        units = len(cut_places(self.profile)) - 1
        share = self._joint(blocks).share_of(self.profile.batch)
        return share * min(estimate.block_bytes(0, units), estimate.recomputed_bytes(0, units))

    def _auxiliary_bytes(self, estimate: Estimate, blocks: int) -> float:
        """What all auxiliary networks hold, about: weights, gradients and, with an optimizer, a moment."""
        costs = estimate.auxiliary.values()
        parameters = sum(cost.parameters for cost in costs) / max(1, len(costs)) * (blocks - 1)
        return 4 * parameters * (2 if self.optimizer is None else 3)

    def _does_not_fit(self, limit: int, tried: list[Forecast]) -> ConfigError:
        best = min(tried, key=lambda c: c.cost.peak_bytes)
        kinds = best.cost.by_kind
        fixed = sum(kinds[kind] for kind in KINDS if kind not in ("activations", "gradients"))
        holder = max(range(len(best.cost.block_peak_bytes)), key=best.cost.block_peak_bytes.__getitem__)
        units = best.plan.units[holder]
        heaviest = max(units, key=lambda u: u.saved_bytes)
        batch = self.profile.batch
        if fixed > limit:
            held = (
                f"{format_bytes(fixed)} of parameters, optimizer state, inputs and auxiliary networks, which are there "
                "with any number of blocks"
            )
            helps = ["a smaller model", "an optimizer with less state (SGD without momentum)"]
        else:
            held = (
                f"{format_bytes(kinds['activations'])} of activations in {best.plan.names[holder]} (its largest unit, "
                f"{heaviest.name!r}, saves {format_bytes(heaviest.saved_bytes)}) on top of {format_bytes(fixed)} of "
                "parameters, optimizer state, inputs and auxiliary networks"
            )
            fits = max(1, int(batch * max(0.0, limit - fixed) / max(1, best.cost.peak_bytes - fixed)))
            helps = [f"a batch of about {fits}" if fits < batch else "a smaller batch"]
            if fits < batch and self.accumulate == 1:
                helps.append(f"the same batch in about {-(-batch // fits)} parts (accumulate)")
            if self.autocast is None:
                helps.append("bf16 precision, which about halves the activations")
            helps.append("smaller images")
            joint = self._joint(best.plan.blocks).images(batch)
            if best.plan.blocks > 1 and joint > 1:
                helps.append(f"fewer joint images than {joint} of the batch (the rule's option joint), or none")
        how = f"{best.plan.blocks} blocks" if best.plan.blocks > 1 else "one block"
        if self.rule.local:
            how += ", recomputed" if best.plan.recompute else "; checkpointing inside blocks does not lower it"
        return ConfigError(
            f"No plan fits {format_bytes(limit)}: the smallest peak found is {format_bytes(best.cost.peak_bytes)} "
            f"(batch {batch}, {how}), held by {held}. What would help: {'; '.join(helps)}."
        )
