"""The learner: a model, a plan, a rule and a task that train it block by block."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.optimizer import Optimizer
from torch.utils._pytree import tree_map_only

from glcan import rules, tasks
from glcan.checkpointing import checkpointed, in_parts, segments_of, with_large_end
from glcan.choosing import BatchStatistics, Received, choose, sizes_of
from glcan.dryrun import dry_run
from glcan.errors import CheckpointError, ConfigError, CutError, GradientLeak
from glcan.estimate import Estimate, Piece, auxiliary_costs, measure_pieces
from glcan.graphs import PassGraphs, RecordedPass
from glcan.isolation import Boundary, Crossings, Isolation, leaked_parameters, overridden, tensors_in
from glcan.plan import Plan, cut_places, longest_end, make_plan
from glcan.profile import Feature, Profile, read_feature
from glcan.profile import profile as take_profile
from glcan.rules import Site

if TYPE_CHECKING:
    from glcan.planner import Forecast

__all__ = ["LocalLearner"]

OptimizerFactory = Callable[[list[nn.Parameter]], Optimizer]
_Crossing = dict[str, tuple[Feature, ...]]  # by the name of the cut


class _Reached(BaseException):
    """The model's forward pass is where it was wanted; nothing that it would do behind that is. No model catches it."""


@dataclasses.dataclass
class _Choice:
    """What a pass needs that chooses images by their gradients: the last cut alone, and normalisation as of a batch."""

    isolation: Isolation
    statistics: BatchStatistics


class LocalLearner:
    """Trains a model in gradient-isolated blocks, each through a small auxiliary network.

    ::

        learner = LocalLearner(model, sample=(images, labels), blocks=4, optimizer=partial(SGD, lr=0.1, momentum=0.9))
        for images, labels in loader:
            losses = learner.step(images, labels)          # {"block1": ..., "block4": ...}
        torch.save(learner.model.state_dict(), "model.pt")  # the user's own model, the user's own names

    Args:
        model: shared, never copied or renamed. In train mode, on the device where it is to be trained.
        task: "classification", or a `glcan.tasks.Task`.
        sample: a batch as `backward` and `step` take it, for the profile; classification: (images [B, C, H, W],
            labels [B]). The batch size may differ later.
        blocks: K, the number of blocks; the cuts are chosen so that the largest block needs the fewest bytes, or, where
            the rule asks for it, that the last block is as long as that memory allows (`glcan.plan.longest_end`). K=1
            is plain back-propagation, bit for bit.
        cuts: names of the units at which blocks 2 ... K begin, in place of ``blocks``.
        units: names of the sub-modules that are never cut inside, in place of the profile's.
        rule: a name of `glcan.methods()` or a `glcan.rules.Rule`. Baselines take no blocks or cuts.
        rule_options: of the rule, e.g. ``{"budget": 0.2}``.
        optimizer: ``optimizer(parameters) -> torch.optim.Optimizer``, called once for each block; `step` needs it.
        autocast: torch.bfloat16 or torch.float16 for the forward passes; None: as the model is (or as the caller's own
            ``torch.autocast`` says). The backward passes run outside of it.
        clip_norm: in `step`, clips the norm of each block's gradient to this.
        leak_check: look for gradients that cross a cut (walks the autograd graph once).
        recompute: activation checkpointing inside blocks: True for all of them, or the names of blocks ("block1") and
            units (or "unit1+unit2" for units that are recomputed together). Only what enters each unit is kept; a named
            block's auxiliary network is recomputed too.
        memory: a budget for the peak of a step, such as "8GiB", in place of blocks, cuts and recompute: the cheapest
            plan that fits (see `glcan.plan`). "auto": what the model's CUDA device has free, less a tenth.
        accumulate: a batch is run in so many parts, one after the other, whose gradients add up (weighted by images) to
            those of the mean loss over the batch; the model is updated once. Memory is that of a part. Normalisation
            over the batch sees the parts one by one, as do losses that divide by more than the number of images.
        cuda_graph: record `step` as a CUDA graph and replay it, so that the GPU does not wait for Python: for steps of
            many small kernels. The first two steps run as ever; updates always do. A batch of other shapes, as ends an
            epoch, has a graph of its own. The gradients of all blocks stay in memory, and what a step needs is not free
            for anything else between two steps. What Python decides in a pass stays as recorded. Not for detection.
            See docs/training.md, "CUDA graphs".
        profile: what `glcan.profile` gave for this model and sample (the first part of it, with ``accumulate``), if it
            is at hand: saves the dry runs of it.

    Attributes:
        model: the user's own object.
        auxiliary: ``nn.ModuleDict`` by block name; all that was added.
        plan, profile, rule, task: see their classes.
        forecast: what the step was predicted to cost, with ``memory``; else None.
        optimizers: one for each block that has trainable parameters (and one for tied parameters, see below).
        optimizer_of: the same by the index of the block, from 0; those of tied parameters at K.
        frozen: so many blocks, from the first one on, are trained no more: they only run forward, and their parameters
            get no gradient. 0 at first; may be set between two steps, up to K - 1. Their learning rate should be near
            zero by then.
        accumulate: parts of a batch; may be set between two steps.
        cuda_graph: may be set between two steps; what was recorded is forgotten while it is false.
        end_to_end: while it is true, a step trains the whole model at once, with activation checkpointing of each unit,
            and the auxiliary networks beside it, which send the model no gradient. False at first; may be set between
            two steps. See docs/training.md, "Start, freeze, finish".
        after_block: if set, called with a block's name when its backward pass is over, before the next one begins;
            `step` has updated it by then, unless it learns from joint images alone. With ``accumulate``, in the last
            part of the batch. With ``cuda_graph``, such a step runs as ever.

    Parameters that are used in several blocks (tied weights) get the sum of the blocks' gradients, and `step` updates
    them once, after the last block.

    Raises:
        GradientLeak: a gradient would cross a cut (names the parameters and the cut).
        CutError, ConfigError, DataError, UnknownName: what was asked for does not fit.
    """

    def __init__(
        self,
        model: nn.Module,
        task: str | tasks.Task = "classification",
        sample: Sequence[Any] | None = None,
        *,
        blocks: int | None = None,
        cuts: Sequence[str] | None = None,
        units: Sequence[str] | None = None,
        rule: str | rules.Rule = "glcan",
        rule_options: Mapping[str, Any] | None = None,
        optimizer: OptimizerFactory | None = None,
        autocast: torch.dtype | None = None,
        clip_norm: float | None = None,
        leak_check: bool = True,
        recompute: bool | Sequence[str] = False,
        memory: str | int | None = None,
        accumulate: int = 1,
        cuda_graph: bool = False,
        profile: Profile | None = None,
    ) -> None:
        if sample is None:
            raise ConfigError("sample is missing; give a batch such as sample=(images, labels), which is run once.")
        if autocast not in (None, torch.bfloat16, torch.float16):
            raise ConfigError(f"autocast is {autocast}; it must be torch.bfloat16, torch.float16 or None.")
        if clip_norm is not None and not clip_norm > 0:
            raise ConfigError(f"clip_norm is {clip_norm}; it must be a positive number or None.")
        if isinstance(accumulate, bool) or not isinstance(accumulate, int) or accumulate < 1:
            raise ConfigError(f"accumulate is {accumulate!r}; it must be a whole number, 1 for a batch in one part.")
        self.model = model
        self.task = tasks.create(task)
        self.rule = rules.create(rule, rule_options)
        if self.task.name not in self.rule.tasks:
            raise ConfigError(
                f"The rule {self.rule.name!r} serves {', '.join(self.rule.tasks)}, not the task {self.task.name!r}."
            )
        if cuda_graph:
            self._check_recordable()
        self.autocast = autocast
        self.clip_norm = clip_norm
        self.accumulate = accumulate
        self.cuda_graph = cuda_graph
        self.forecast: Forecast | None = None
        if memory is not None:
            from glcan import planner  # stands on the learner, whose steps it predicts

            self.forecast = planner.plan(
                model,
                self.task,
                sample,
                blocks=blocks,
                cuts=cuts,
                memory=planner.free_bytes(model) if memory == "auto" else memory,
                units=units,
                rule=self.rule,
                optimizer=optimizer,
                autocast=autocast,
                recompute=recompute,
                accumulate=accumulate,
                baselines=(),
            )
            if self.rule.local:
                cuts, recompute = self.forecast.plan.cuts or None, self.forecast.plan.recompute
                blocks = None if cuts else 1
        batch = first_part(self.task, tuple(sample), accumulate)
        self._whole = len(sample[0])  # images of a whole batch
        args, kwargs = self.task.arguments(batch)
        if profile is None:
            with self.task.running(model) if self.rule.local else contextlib.nullcontext():
                profile = take_profile(model, args, kwargs, units=units, assume=self.task.assumes)
        if self.rule.local and self.task.images_apart:
            profile = with_large_end(model, profile, cuts or ())
        self.profile: Profile = profile
        self.task.prepare(self.profile.output, batch)
        self._pieces: dict[str, Piece] | None = None
        self.plan = self._make_plan(batch, blocks, cuts, recompute)
        by_image = bool(self.plan.cuts) and self.plan.cuts[-1] in self.profile.by_image
        self._joint = self.rule.joint(self.task, self.plan.blocks, self.profile.batch, by_image)
        if self._joint.by_gradient and self.plan.blocks > 1 and not by_image:
            raise ConfigError(
                "Joint images are to be chosen by their gradients, but those chosen could not be run again as they ran "
                f"in the batch: before the cut at {self.plan.cuts[-1]!r} random numbers are drawn (dropout, stochastic "
                "depth) or a BatchNorm layer runs twice, or what crosses it does not have the "
                "images as its first dimension. Leave joint_by out, or cut before that (cuts=[...])."
            )
        self.names = names = self.plan.names
        self._users = self._find_users()
        skipping: _Crossing = {}
        crossings: Crossings = {}
        if self.plan.blocks > 1:
            entering, skipping, crossings = self._survey(batch, leak_check)
            self.plan = self.plan.entered_by(entering)
            self._check_trained()
        self.auxiliary = nn.ModuleDict(
            {
                name: self.rule.build(
                    Site(model, self.profile, self.task, cut, self.plan.blocks, i, skipping.get(cut.name, ()))
                )
                for i, (name, (cut, *_)) in enumerate(zip(names, self.plan.units[1:], strict=False))
                if self._entering(i) and self._joint.weight < 1
            }
        )
        like = next((p for p in model.parameters() if p.is_floating_point()), None)
        if like is not None:
            _move(self.auxiliary, like)
        self.auxiliary.train(model.training)
        self._own, self._shared = self._ownership()
        self._isolation = Isolation(
            model,
            self.profile.names if self.plan.blocks > 1 else [],
            self.plan.cuts,
            held={cut: self.profile.crossing[cut] for cut in self.plan.cuts},
        )
        self._isolation.crossings = crossings
        self._segments = [run for run in segments_of(self.profile) if run[0] not in self.profile.parted]
        self._recomputed = self._find_recomputed()
        self._choice = self._make_choice(batch) if self._joint.by_gradient and self.plan.blocks > 1 else None
        self._joint_recomputed = self._find_joint_recomputed(batch)
        self._graphs = PassGraphs(model)
        self.after_block: Callable[[str], None] | None = None
        self.frozen = 0
        self.end_to_end = False
        self.optimizers: list[Optimizer] = []
        self.optimizer_of: dict[int, Optimizer] = {}
        if optimizer is not None:
            self._make_optimizers(optimizer)

    def _check_recordable(self) -> None:
        device = next((p.device for p in self.model.parameters()), torch.device("cpu"))
        if device.type != "cuda":
            raise ConfigError(
                f"cuda_graph is for a model on a CUDA device, and this one is on {device.type!r}. Move it there first "
                "(model.cuda()), or leave cuda_graph (--cuda-graph) out."
            )
        if not self.task.recordable:
            raise ConfigError(
                f"cuda_graph is not for {self.task.name}, whose losses read values from the GPU to choose boxes. Leave "
                "cuda_graph out."
            )

    # -- building ------------------------------------------------------------------------------------------------

    def _make_plan(
        self,
        batch: tuple[Any, ...],
        blocks: int | None,
        cuts: Sequence[str] | None,
        recompute: bool | Sequence[str],
    ) -> Plan:
        if self.rule.local:
            cost = None
            if cuts is None and blocks is not None and 1 < blocks < len(cut_places(self.profile)):
                auxiliary = auxiliary_costs(self.rule, self.model, self.profile, self.task, batch, blocks)
                estimate = Estimate(self.profile, self._measured_pieces(batch), auxiliary)
                cost = estimate.block_bytes
                most = self.rule.long_end(self.task)
                if most and not recompute:
                    joint = self.rule.joint(self.task, blocks, self.profile.batch, self.profile.mostly_by_image)
                    others = 1.0 if joint.by_gradient else 1 - joint.share_of(self.profile.batch)
                    cuts, recompute = longest_end(self.profile, blocks, cost, estimate.end, most, others)
                    blocks = None
            return make_plan(self.profile, blocks=blocks, cuts=cuts, cost=cost, recompute=recompute)
        if recompute:
            raise ConfigError(
                f"recompute={recompute!r} is for blocks, and the baseline {self.rule.name!r} has none; leave it out, "
                "or choose the baseline 'checkpoint'."
            )
        if blocks not in (None, 1) or cuts:
            raise CutError(
                f"The baseline {self.rule.name!r} trains the whole model at once; leave out blocks and cuts, "
                "or choose a local rule such as 'glcan'."
            )
        return make_plan(self.profile, blocks=1)

    def _measured_pieces(self, batch: tuple[Any, ...]) -> dict[str, Piece]:
        if self._pieces is None:
            args, kwargs = self.task.arguments(batch)
            with self.task.running(self.model):
                self._pieces = measure_pieces(self.model, args, kwargs, self.profile, assume=self.task.assumes)
        return self._pieces

    def _entering(self, block: int) -> tuple[Feature, ...]:
        """What the block hands to the next one and needs a gradient (nothing where all of it is frozen)."""
        return self.plan.units[block + 1][0].entering

    def _find_users(self) -> dict[int, set[int]]:
        """The blocks that use each parameter (by id)."""
        users: dict[int, set[int]] = defaultdict(set)
        block, block_after = 0, {-1: 0}
        for position, index in enumerate(self.profile.calls):
            unit = self.profile.units[index].name
            block += block < len(self.plan.cuts) and unit == self.plan.cuts[block]
            block_after[position] = block
            for parameter in self.model.get_submodule(unit).parameters():
                users[id(parameter)].add(block)
        named = dict(self.model.named_parameters())
        for name, positions in self.profile.glue.items():
            users[id(named[name])].update(block_after[i] for i in positions)
        return users

    def _find_recomputed(self) -> list[list[str]]:
        """The chains of units that are recomputed, as the plan says."""
        wanted = {u.name for k, b in enumerate(self.plan.units) if self.names[k] in self.plan.recompute for u in b}
        together = self.plan.recomputed_units
        wanted.update(names[0] for names in together if len(names) == 1)
        return [run for run in self._segments if run[0] in wanted] + [names for names in together if len(names) > 1]

    def _find_joint_recomputed(self, batch: tuple[Any, ...]) -> list[list[str]]:
        """The chains of units that are recomputed for joint images, so that these do not set the peak."""
        share = self._joint.share_of(self.profile.batch)
        if not share or self.plan.blocks == 1:
            return []
        estimate = Estimate(self.profile, self._measured_pieces(batch))
        by_gradient = self._choice is not None
        return estimate.recomputed_at_once(self.plan, share, alone=self._joint.weight == 1, by_gradient=by_gradient)

    def _make_choice(self, batch: tuple[Any, ...]) -> _Choice:
        """How joint images are chosen by their gradients."""
        cut = self.plan.cuts[-1]
        held = {cut: self.profile.crossing[cut]}

        def reached(boundary: Boundary) -> None:
            raise _Reached

        def look(model: nn.Module, batch: tuple[Any, ...]) -> Crossings:
            isolation = Isolation(model, self.profile.names, (cut,), reached, held)
            args, kwargs = self.task.arguments(batch)
            with contextlib.suppress(_Reached), torch.enable_grad(), isolation, self._forward_autocast(batch):
                model(*args, **kwargs)
            return isolation.crossings

        isolation = Isolation(self.model, self.profile.names, (cut,), held=held)
        isolation.crossings = dry_run(self.model, batch, look, assume=self.task.assumes)
        late = {m for unit in self.plan.units[-1] for m in self.model.get_submodule(unit.name).modules()}
        norms = [m for m in self.model.modules() if isinstance(m, _BatchNorm) and m not in late]
        return _Choice(isolation, BatchStatistics(norms))

    def _check_trained(self) -> None:
        for k, cut in enumerate(self.plan.cuts):
            trainable = [p for p in self.model.parameters() if p.requires_grad and k in self._users[id(p)]]
            if trainable and not self._entering(k):
                raise CutError(
                    f"Nothing that block{k + 1} computes enters the cut at {cut!r} (they stand side by side), so no "
                    "local loss could train it. Cut elsewhere (cuts=[...])."
                )

    def _ownership(self) -> tuple[list[list[nn.Parameter]], list[nn.Parameter]]:
        """The trainable parameters of each block, and those that several blocks use."""
        last = self.plan.blocks - 1
        own: list[list[nn.Parameter]] = [[] for _ in self.plan.units]
        shared: list[nn.Parameter] = []
        for parameter in self.model.parameters():
            if parameter.requires_grad:
                blocks = self._users[id(parameter)] or {last}
                (own[next(iter(blocks))] if len(blocks) == 1 else shared).append(parameter)
        for k, name in enumerate(self.names):
            if name in self.auxiliary:
                own[k] += list(self.auxiliary[name].parameters())
        return own, shared

    def _make_optimizers(self, factory: OptimizerFactory) -> None:
        for k, parameters in enumerate((*self._own, self._shared)):
            if parameters:
                optimizer = factory(parameters)
                if not isinstance(optimizer, Optimizer):
                    raise ConfigError(
                        f"optimizer(parameters) gave {type(optimizer).__name__}; it must return a "
                        "torch.optim.Optimizer, as functools.partial(torch.optim.SGD, lr=0.1) does."
                    )
                self.optimizer_of[k] = optimizer
                self.optimizers.append(optimizer)

    def _survey(self, batch: tuple[Any, ...], leak_check: bool) -> tuple[_Crossing, _Crossing, Crossings]:
        """A dry run with the cuts: what of a block's own enters the unit at each of them, and what passes it by.

        And how these tensors are found again, see `Isolation.crossings`.

        Raises:
            GradientLeak: a gradient crosses a cut.
        """
        names = {id(p): name for name, p in self.model.named_parameters()}

        def check(model: nn.Module, batch: tuple[Any, ...]) -> tuple[_Crossing, _Crossing, Crossings]:
            entering: _Crossing = {}
            skipping: _Crossing = {}
            twins = {name: p for name, p in model.named_parameters()}
            allowed: list[list[nn.Parameter]] = [[] for _ in self.plan.units]
            for key, blocks in self._users.items():
                for k in blocks if key in names else ():
                    allowed[k].append(twins[names[key]])

            def look(block: int, loss: Tensor) -> None:
                leaked = leaked_parameters(loss, allowed[block])
                known = {id(p): name for name, p in twins.items()}
                found = sorted(known[id(p)] for p in leaked if id(p) in known)
                if found:
                    cut = self.plan.cuts[block - 1] if block else self.plan.cuts[0]
                    shown = ", ".join(found[:5]) + (f" and {len(found) - 5} more" if len(found) > 5 else "")
                    raise GradientLeak(
                        f"The loss of block{block + 1} would reach {shown}, which belong to an earlier block: "
                        f"a gradient crosses the cut at {cut!r}. A custom autograd.Function between units, or a unit "
                        "that reads a tensor from elsewhere than its arguments, hides it from the isolation. Put that "
                        "operation into a unit (units=[...]), or cut elsewhere (cuts=[...])."
                    )

            def at_cut(boundary: Boundary) -> None:
                tensors = (*boundary.entering, *boundary.skipping)
                for found, own in ((entering, boundary.entering), (skipping, boundary.skipping)):
                    found[boundary.cut] = tuple(
                        read_feature(tuple(t.shape), self.profile.batch, self.profile.image) for t in own
                    )
                if leak_check and tensors:
                    look(boundary.block, sum((t.float().sum() for t in tensors), torch.zeros(())))

            isolation = Isolation(
                model, self.profile.names, self.plan.cuts, at_cut, {c: self.profile.crossing[c] for c in self.plan.cuts}
            )
            args, kwargs = self.task.arguments(batch)
            with torch.enable_grad(), isolation, self._forward_autocast(batch):
                output = model(*args, **kwargs)
                losses = [isolation.twin(t) for t in tensors_in(output) if t.is_floating_point()]
                total = sum((t.float().sum() for t in losses if t.requires_grad), torch.zeros(()))
                if leak_check and total.requires_grad:
                    look(self.plan.blocks - 1, total)
            return entering, skipping, isolation.crossings

        return dry_run(self.model, batch, check, assume=self.task.assumes)

    # -- training ------------------------------------------------------------------------------------------------

    def backward(self, *batch: Any, scaler: Any = None) -> dict[str, Tensor]:
        """One forward pass, each block's backward pass at its end; ``.grad`` of every trainable parameter is set.

        Gradients add up as with ``loss.backward()``, so zero them between updates.

        Args:
            batch: as the task has it; classification: images [B, C, H, W], labels [B].
            scaler: a ``torch.amp.GradScaler`` for float16.

        Returns:
            The losses by name of the blocks that are not frozen, detached scalars; the last one is the model's own.
        """
        return self._run(batch, scaler, None)

    def step(self, *batch: Any) -> dict[str, Tensor]:
        """As `backward`, but each block is updated as soon as its backward pass is done, and its gradients are freed.

        Raises:
            ConfigError: the learner was built without an optimizer.
        """
        if not self.optimizers:
            raise ConfigError(
                "step() needs an optimizer: LocalLearner(..., optimizer=partial(torch.optim.SGD, lr=0.1))."
            )
        if not self.cuda_graph:
            self._graphs.clear()
        recorded = self._recorded(batch) if self.cuda_graph and self.after_block is None else None
        if recorded is None:
            losses = self._run(batch, None, self._update)
        else:
            losses = recorded.replay(batch)
            for block in range(len(self._own)):
                self._update(block)
        self._update(len(self._own))
        return losses

    def _recorded(self, batch: tuple[Any, ...]) -> RecordedPass | None:
        """The pass of a batch as a CUDA graph, if there is one."""
        parts = self._recomputed or self._joint_recomputed or self.plan.recompute or self.profile.parted
        return self._graphs.find(
            (self.frozen, self.end_to_end, self.accumulate),
            batch,
            lambda twin: self._run(twin, None, None),
            self.parameters(),
            recomputes=bool(parts) or self.end_to_end or self.rule.exact,
        )

    def _update(self, block: int) -> None:
        optimizer = self.optimizer_of.get(block)
        if optimizer is None:
            return
        parameters = (*self._own, self._shared)[block]
        if self.clip_norm is not None:
            nn.utils.clip_grad_norm_(parameters, self.clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def _run(self, batch: tuple[Any, ...], scaler: Any, finish: Callable[[int], None] | None) -> dict[str, Tensor]:
        """One training pass; ``finish`` is called with a block's index when its gradients are complete."""
        if not 0 <= self.frozen < self.plan.blocks:
            raise ConfigError(
                f"frozen is {self.frozen}, but of {self.plan.blocks} blocks 0 to {self.plan.blocks - 1} can be frozen: "
                "the last one always learns."
            )
        if self.frozen and self.end_to_end:
            raise ConfigError(
                f"frozen is {self.frozen}, but end_to_end trains every block. Set frozen to 0, or end_to_end to False."
            )
        learning = {name: self.auxiliary[name] for name in self.names[self.frozen :] if name in self.auxiliary}
        self.rule.before_pass(nn.ModuleDict(learning), self.model)
        if self.accumulate == 1:
            return self._run_part(batch, scaler, finish)
        images = len(batch[0])
        losses: dict[str, Tensor] = {}
        after_block = self.after_block
        for begin, end in _parts(images, self.accumulate, self._whole):
            complete, share = end == images, (end - begin) / images
            self.after_block = after_block if complete else None
            try:
                found = self._run_part(self.task.part(batch, begin, end), scaler, finish if complete else None, share)
            finally:
                self.after_block = after_block
            losses = {name: losses.get(name, 0) + share * loss for name, loss in found.items()}
        return losses

    def _run_part(
        self,
        batch: tuple[Any, ...],
        scaler: Any,
        finish: Callable[[int], None] | None,
        weight: float = 1.0,
    ) -> dict[str, Tensor]:
        """A pass of a batch, or of a part of it that has the weight in the batch's losses."""
        if (
            self.plan.blocks > 1
            and not self.end_to_end
            and (count := self._joint.images(len(batch[0]), self.profile.batch))
        ):
            if self._choice is not None:
                return self._run_chosen(batch, count, scaler, finish, weight)
            return self._run_joint(batch, count, scaler, finish, weight)
        return self._run_blocks(batch, scaler, finish, (weight, weight))

    def _run_joint(
        self,
        batch: tuple[Any, ...],
        count: int,
        scaler: Any,
        finish: Callable[[int], None] | None,
        whole: float,
    ) -> dict[str, Tensor]:
        """A pass in which the first ``count`` images train the whole model, the others one block after the other.

        ``whole``: the weight of the batch's losses.
        """
        images, last, weight = len(batch[0]), self.plan.blocks - 1, self._joint.weight
        share, frozen = count / images, self.frozen
        before = {p: p.grad for p in self.parameters() if p.grad is not None}  # `backward` adds to them
        for parameter in before:
            parameter.grad = None

        def scale(parameters: Iterable[nn.Parameter], factor: float) -> None:
            if grads := [p.grad for p in parameters if p.grad is not None]:
                torch._foreach_mul_(grads, factor)

        def restore(parameters: Iterable[nn.Parameter]) -> None:
            for parameter in parameters:
                if parameter in before:
                    earlier = before.pop(parameter)
                    parameter.grad = earlier if parameter.grad is None else parameter.grad + earlier

        def complete(block: int) -> None:
            if block < last and self.names[block] in self.auxiliary:
                scale(self.auxiliary[self.names[block]].parameters(), 1 / (1 - weight))
            restore(self._own[block])
            if finish is not None:
                finish(block)

        loss = self._joint_backward(self.task.part(batch, 0, count), whole * share, scaler)
        for block in range(frozen, last):
            scale(self._own[block], weight / share)  # the auxiliary networks have no gradient yet
        alone = range(frozen, last + (count == images)) if weight == 1 else ()  # learn from the joint images alone
        if self.after_block is not None:
            for block in alone:
                self.after_block(self.names[block])
        losses: dict[str, Tensor] = {}
        if count < images:
            self.frozen = last if weight == 1 else frozen
            try:
                others = self.task.part(batch, count, images)
                losses = self._run_blocks(others, scaler, complete, (whole * (1 - weight), whole * (1 - share)))
            finally:
                self.frozen = frozen
            loss = share * loss + (1 - share) * losses[self.names[last]]
        for block in alone:
            complete(block)  # not before: the others run through the blocks as they were
        restore(list(before))
        return losses | {self.names[last]: loss}

    def _joint_backward(self, batch: tuple[Any, ...], share: float, scaler: Any) -> Tensor:
        """The model's loss, detached, after a backward pass of a share of it through all blocks that are not frozen."""
        args, kwargs = self._arguments(batch)
        with (
            self.task.running(self.model),
            in_parts(self.model, self.profile.parted, self.profile.batch),
            self._forward_autocast(batch),
        ):
            with self._forward(self._joint_recomputed, self.frozen):
                loss = self.task.loss(self.model(*args, **kwargs), batch)
            self._backward(loss, share, scaler)
        return loss.detach()

    def _run_chosen(
        self,
        batch: tuple[Any, ...],
        count: int,
        scaler: Any,
        finish: Callable[[int], None] | None,
        weight: float,
    ) -> dict[str, Tensor]:
        """A pass in which the last block learns from every image, the others from ``count`` with large gradients.

        ``weight``: of the batch's losses.
        """
        last = self.plan.blocks - 1

        def done(block: int) -> None:
            with _no_autocast(loss):
                if finish is not None:
                    finish(block)
                if self.after_block is not None:
                    self.after_block(self.names[block])

        with self.task.repeatable(self.model) as again:
            loss, received = self._last_alone(batch, scaler, weight)
            done(last)
            sent = [gradient for gradient in received if gradient is not None]
            if self.frozen < last and sent:
                images = len(batch[0])
                if count == images:
                    places = torch.arange(images, device=sent[0].device)
                else:
                    places, weights = choose(sizes_of(sent), count)
                    for i, gradient in enumerate(received):
                        if gradient is not None:
                            scale = weights.to(gradient.dtype).view(-1, *[1] * (gradient.dim() - 1))
                            received[i] = gradient[places].mul_(scale)
                    batch = self.task.chosen(batch, places)
                sent.clear()
                with again(places):
                    self._send_back(batch, received)
        for block in range(self.frozen, last):
            done(block)
        return {self.names[last]: loss}

    def _last_alone(self, batch: tuple[Any, ...], scaler: Any, weight: float) -> tuple[Tensor, list[Tensor | None]]:
        """The last block's loss, detached, after its backward pass, and the gradients of what crosses the last cut."""
        assert self._choice is not None
        isolation, received, last = self._choice.isolation, Received(), self.plan.blocks - 1
        args, kwargs = self._arguments(batch)
        isolation.isolating, isolation.noting, isolation.on_boundary = True, True, None
        with (
            self.task.running(self.model),
            in_parts(self.model, self.profile.parted, self.profile.batch),
            self._choice.statistics.noted(),
            isolation,
            self._forward_autocast(batch),
        ):
            with self._forward(self._recomputed, last, partial(isolation.hand_over, received.hand_on)):
                loss = self.task.loss(self.model(*args, **kwargs), batch)
            self._check_reached(isolation)
            with isolation.replay():
                self._backward(loss, weight, scaler)
            if torch.is_autocast_enabled(loss.device.type):
                torch.clear_autocast_cache()  # the early blocks' weights are in it as what needs no gradient
        return loss.detach(), received.gradients

    def _send_back(self, batch: tuple[Any, ...], gradients: list[Tensor | None]) -> None:
        """Runs the chosen images up to the last cut, and their gradients back from there."""
        assert self._choice is not None
        isolation = self._choice.isolation

        def at_cut(boundary: Boundary) -> None:
            tensors = (*boundary.entering, *boundary.skipping)
            pairs = [(t, g) for t, g in zip(tensors, gradients, strict=True) if g is not None]
            gradients.clear()
            with isolation.suspended(), _no_autocast(tensors[0]):
                torch.autograd.backward([t for t, _ in pairs], [g for _, g in pairs])
            raise _Reached

        args, kwargs = self._arguments(batch)
        isolation.isolating, isolation.noting, isolation.on_boundary = False, False, at_cut
        with (
            contextlib.suppress(_Reached),
            self.task.running(self.model),
            self._choice.statistics.applied(),
            isolation,
            self._forward_autocast(batch),
            self._forward(self._joint_recomputed, self.frozen),
        ):
            self.model(*args, **kwargs)
            self._check_reached(isolation)

    def _arguments(self, batch: tuple[Any, ...]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The model's arguments; copies, where it writes into them."""
        arguments = self.task.arguments(batch)
        return tree_map_only(Tensor, Tensor.clone, arguments) if self.profile.writes_input else arguments

    def _backward(self, loss: Tensor, weight: float, scaler: Any) -> None:
        with _no_autocast(loss):
            loss = loss if weight == 1 else weight * loss
            (loss if scaler is None else scaler.scale(loss)).backward()

    def _run_blocks(
        self,
        batch: tuple[Any, ...],
        scaler: Any,
        finish: Callable[[int], None] | None,
        weights: tuple[float, float],
    ) -> dict[str, Tensor]:
        """A pass in blocks, or end to end; local losses count by the first of the weights, the model's by the other."""
        losses: dict[str, Tensor] = {}
        forward = self._forward_autocast(batch)
        isolation = self._isolation

        def backward(loss: Tensor, weight: float = weights[0]) -> None:
            self._backward(loss, weight, scaler)

        def done(block: int, loss: Tensor) -> None:
            losses[self.names[block]] = loss.detach()
            if self.end_to_end and block < last:
                return  # the backward pass is still to come
            with _no_autocast(loss):
                for trained in range(last + 1) if self.end_to_end else [block]:
                    if finish is not None:
                        finish(trained)
                    if self.after_block is not None:
                        self.after_block(self.names[trained])
            if torch.is_autocast_enabled(loss.device.type):
                torch.clear_autocast_cache()  # it holds copies of weights that have just been updated

        def at_cut(boundary: Boundary) -> None:
            name = self.names[boundary.block]
            if boundary.block < self.frozen:
                return
            if len(boundary.entering) != len(self._entering(boundary.block)):
                raise ConfigError(
                    f"{len(boundary.entering)} tensors that need a gradient enter the cut at {boundary.cut!r}, but "
                    f"{len(self._entering(boundary.block))} did when the learner was built. Parameters may have been "
                    "frozen or thawed since: build a new learner after that."
                )
            if name not in self.auxiliary:
                return
            with isolation.suspended():  # thousands of small operations: a detector's losses, the optimizer's step
                loss = self._local_backward(boundary.detached() if self.end_to_end else boundary, batch, backward)
                done(boundary.block, loss)

        args, kwargs = self._arguments(batch)
        isolation.on_boundary, isolation.isolating = at_cut, not self.end_to_end
        last = self.plan.blocks - 1
        recomputed = self._segments if self.end_to_end else self._recomputed
        with (
            self.task.running(self.model) if last else contextlib.nullcontext(),
            in_parts(self.model, self.profile.parted if last else (), self.profile.batch),
            isolation if last else contextlib.nullcontext(),
            forward,
        ):
            with self._forward(recomputed, self.frozen):
                loss = self.task.loss(self.model(*args, **kwargs), batch)
            if last:
                self._check_reached(isolation)
            with isolation.replay() if last else contextlib.nullcontext():
                backward(loss, weights[1])
        done(last, loss.detach())
        return losses

    @staticmethod
    def _check_reached(isolation: Isolation) -> None:
        if isolation.block < len(isolation.cuts):
            raise CutError(
                f"The model ran without reaching the cut {isolation.cuts[isolation.block]!r} (its layers are "
                "skipped or ran in another order); cut at a unit that always runs."
            )

    @contextlib.contextmanager
    def _forward(
        self,
        recomputed: Sequence[Sequence[str]],
        frozen: int,
        hand_over: Callable[[Any, Any], tuple[Any, Any]] | None = None,
    ) -> Iterator[None]:
        """While this is open, the model's forward pass recomputes these chains, and begins to learn as asked for."""
        with (
            self.rule.running(self.model, self.profile),
            checkpointed(self.model, recomputed),
            self._frozen_forward(frozen, hand_over),
        ):
            yield

    @contextlib.contextmanager
    def _frozen_forward(
        self, frozen: int, hand_over: Callable[[Any, Any], tuple[Any, Any]] | None = None
    ) -> Iterator[None]:
        """While this is open, nothing is kept for a backward pass before the first block that is not frozen begins.

        Outside of checkpointing, which looks at the mode before the unit runs. ``hand_over`` gives the arguments with
        which that block begins, in place of its own.
        """
        if not frozen:
            yield
            return
        crossings = dict(self._isolation.crossings)  # what crosses the cuts does not show without a graph
        module = self.model.get_submodule(self.plan.cuts[frozen - 1])
        forward = module.forward

        def begin(*args: Any, **kwargs: Any) -> Any:
            torch.set_grad_enabled(True)
            if hand_over is not None:
                args, kwargs = hand_over(args, kwargs)
            return forward(*args, **kwargs)

        try:
            with torch.no_grad(), overridden([(module, begin)]):
                yield
        finally:
            self._isolation.crossings = crossings

    def _local_backward(self, boundary: Boundary, batch: tuple[Any, ...], backward: Callable[[Tensor], None]) -> Tensor:
        """A block's local loss, detached, after its backward pass."""
        name = self.names[boundary.block]
        network = self.auxiliary[name]
        runs = self.rule.segments(network) if name in self.plan.recompute else []
        with checkpointed(network, runs):
            prediction = network(boundary, batch)
        loss = self.rule.local_loss(self.task, prediction, batch)
        del prediction
        if loss.requires_grad:  # not where everything in it is a copy, and `end_to_end`
            backward(loss)
        return loss.detach()  # frees the graph before the optimizer makes its temporaries

    def _forward_autocast(self, batch: Any) -> contextlib.AbstractContextManager[Any]:
        if self.autocast is None:
            return contextlib.nullcontext()
        device = next((t.device.type for t in tensors_in(batch)), "cpu")
        return torch.autocast(device, self.autocast)

    # -- everything else -----------------------------------------------------------------------------------------

    def parameters(self) -> list[nn.Parameter]:
        """All trainable parameters, the auxiliary networks' included, for an optimizer of one's own."""
        return [p for block in (*self._own, self._shared) for p in block]

    def train(self, mode: bool = True) -> LocalLearner:
        """Sets train mode (or eval mode) on the model and the auxiliary networks."""
        self.model.train(mode)
        self.auxiliary.train(mode)
        return self

    def eval(self) -> LocalLearner:
        """Sets eval mode."""
        return self.train(False)

    def _identity(self) -> dict[str, Any]:
        return {
            "rule": self.rule.name,
            "rule_options": {k: v for k, v in vars(self.rule.config).items()},
            "task": self.task.name,
            "cuts": list(self.plan.cuts),
            "units": self.profile.names,
        }

    def state_dict(self) -> dict[str, Any]:
        """Everything that exact resumption needs, except the random generators: tensors and plain values only."""
        return {
            "identity": self._identity(),
            "model": self.model.state_dict(),
            "auxiliary": self.auxiliary.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Puts a `state_dict` back. Nothing is changed unless all of it fits.

        Raises:
            CheckpointError: it is of another model, rule or plan, or is incomplete.
        """
        missing = {"identity", "model", "auxiliary", "optimizers"} - set(state)
        if missing:
            raise CheckpointError(f"This is no learner's state: {', '.join(sorted(missing))} missing.")
        mine = self._identity()
        for key, value in mine.items():
            if state["identity"].get(key) != value:
                raise CheckpointError(
                    f"The checkpoint was made with {key}={_short(state['identity'].get(key))}, but this learner has "
                    f"{key}={_short(value)}. Build the learner as the checkpoint's was, or start a new run."
                )
        for part, module in (("model", self.model), ("auxiliary", self.auxiliary)):
            _check_state(part, module, state[part])
        if len(state["optimizers"]) != len(self.optimizers):
            raise CheckpointError(
                f"The checkpoint has {len(state['optimizers'])} optimizers, this learner has {len(self.optimizers)}. "
                "Build the learner with the same optimizer=..."
            )
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            if _groups(saved) != _groups(optimizer.state_dict()):
                raise CheckpointError(
                    "The checkpoint's optimizers are of another kind, or over other parameters, than "
                    f"{type(optimizer).__name__} here. Build the learner with the same optimizer=..."
                )
        self.model.load_state_dict(state["model"])
        self.auxiliary.load_state_dict(state["auxiliary"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)

    def __repr__(self) -> str:
        return f"LocalLearner({type(self.model).__name__}, rule={self.rule.name!r}, {self.plan})"


def first_part(task: tasks.Task, batch: tuple[Any, ...], accumulate: int) -> tuple[Any, ...]:
    """The first of so many parts of a batch, which is the largest."""
    return batch if accumulate == 1 else task.part(batch, *_parts(len(batch[0]), accumulate, len(batch[0]))[0])


def _parts(images: int, accumulate: int, whole: int) -> list[tuple[int, int]]:
    """Where so many parts of a batch begin and end: as many as there are images at most, the larger ones first.

    A batch smaller than a whole one, as ends an epoch, has fewer parts, no larger than a whole one's: BatchNorm needs
    images enough in each.
    """
    if images < whole:
        accumulate = min(accumulate, math.ceil(images / math.ceil(whole / accumulate)))
    parts = max(1, min(accumulate, images))
    return list(itertools.pairwise(images - images * (parts - i) // parts for i in range(parts + 1)))


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


def _no_autocast(like: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Backward passes run outside of autocast, as PyTorch advises."""
    device = like.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else contextlib.nullcontext()


def _check_state(part: str, module: nn.Module, state: Mapping[str, Any]) -> None:
    mine = {name: value.shape for name, value in module.state_dict().items() if isinstance(value, Tensor)}
    theirs = {name: value.shape for name, value in state.items() if isinstance(value, Tensor)}
    if mine != theirs:
        odd = sorted(n for n in mine.keys() | theirs.keys() if mine.get(n) != theirs.get(n))
        raise CheckpointError(
            f"The checkpoint's {part} differs from this one in {len(odd)} tensors, for example {odd[0]!r}: "
            f"{_shape(theirs.get(odd[0]))} there, {_shape(mine.get(odd[0]))} here. Use the model that it was made with."
        )


def _groups(state: Mapping[str, Any]) -> list[tuple[set[str], list[int]]]:
    # A scheduler adds keys such as initial_lr to the groups.
    return [({k for k in g if not k.startswith("initial_")}, g["params"]) for g in state["param_groups"]]


def _shape(shape: Iterable[int] | None) -> str:
    return "absent" if shape is None else "x".join(map(str, shape)) or "scalar"


def _short(value: Any, width: int = 200) -> str:
    text = repr(value)
    return text if len(text) <= width else text[: width - 3] + "..."
