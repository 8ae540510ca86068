"""The learner: a pass over a model, and the optimizers of its groups of parameters."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import itertools
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from glcan import strategies, tasks
from glcan.cost.cuts import Plan
from glcan.errors import ConfigError
from glcan.inspect.profile import Profile
from glcan.inspect.record import profile as take_profile
from glcan.inspect.refusals import Seen, refuse_wrapped
from glcan.state import check_identity, check_module_state, check_optimizer_state
from glcan.strategies.accumulate import Accumulated, first_part
from glcan.strategies.base import Group, Pass, Phase, Setting, Wanted, no_autocast
from glcan.strategies.cuda_graph import Recorded
from glcan.strategies.method import Method, parse_method
from glcan.updates import OptimizerFactory, Updates

__all__ = ["Learner", "OptimizerFactory", "Planned"]


class Planned(Protocol):
    """What `glcan.plan` gives."""

    method: str
    options: Mapping[str, Any]
    plan: Plan


class Learner:
    """Trains a model by one of glcan's methods.

    ::

        learner = glcan.Learner(model, sample=(images, labels), method="glcan:4", optimizer=partial(SGD, lr=0.1))
        for images, labels in loader:
            losses = learner.step(images, labels)          # {"block1": ..., "block4": ...}
        torch.save(learner.model.state_dict(), "model.pt")  # the user's own model, the user's own names

    Args:
        model: shared, never copied or renamed; on the device where it is to be trained.
        task: "classification", or a `glcan.tasks.Task`, which is copied.
        sample: a batch as `backward` and `step` take it, for the profile; classification: (images [B, C, H, W],
            labels [B]). The method does not depend on how many images it has, and later batches may have others.
        method: "glcan:4" (local learning in 4 blocks), "selective", "checkpoint", "e2e", ...; any of them with
            "+accumulate:N". See `glcan.methods()`. "glcan:1" and "e2e" are plain back-propagation, bit for bit.
        options: of the method, e.g. ``{"budget": 0.2}``.
        plan: what `glcan.plan` gave, in place of method, options, cuts and recompute.
        cuts: names of the units at which blocks 2 ... K begin. By default so that the largest block needs the fewest
            bytes, or, where the rule asks for it, that the last block is as long as that memory allows.
        recompute: activation checkpointing inside blocks: True for all of them, or the names of blocks ("block1") and
            units (or "unit1+unit2" for units that are recomputed together). Only what enters each unit is kept; a named
            block's auxiliary network is recomputed too.
        units: names of the sub-modules that are never cut inside, in place of the profile's.
        optimizer: ``optimizer(parameters) -> torch.optim.Optimizer``, called once for each block; `step` needs it.
        autocast: torch.bfloat16 or torch.float16 for the forward passes; None: as the model is (or as the caller's own
            ``torch.autocast`` says). The backward passes run outside of it.
        clip_norm: in `step`, bounds the norm of the whole gradient, whatever the method: where K groups of parameters
            are updated one by one, each is clipped to ``clip_norm / sqrt(K)``.
        leak_check: look for gradients that cross a cut (walks the autograd graph once).
        cuda_graph: record `step` as a CUDA graph and replay it, for steps of many small kernels (docs/training.md).
        profile: what `glcan.profile` gave for this model and sample (the first part of it, with accumulation), if it is
            at hand: saves the dry runs of it.

    Attributes:
        model: the user's own object.
        auxiliary: ``nn.ModuleDict`` by block name; all that was added; empty for all but local learning.
        method: a `glcan.strategies.Method`.
        groups: of parameters, in the order in which they are updated: the blocks, and parameters that several of them
            use ("tied"), which get the sum of the blocks' gradients and are updated once, at the end.

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
        method: str | Method = "glcan:4",
        options: Mapping[str, Any] | None = None,
        plan: Planned | None = None,
        cuts: Sequence[str] | None = None,
        recompute: bool | Sequence[str] = False,
        units: Sequence[str] | None = None,
        optimizer: OptimizerFactory | None = None,
        autocast: torch.dtype | None = None,
        clip_norm: float | None = None,
        leak_check: bool = True,
        cuda_graph: bool = False,
        profile: Profile | None = None,
    ) -> None:
        if sample is None:
            raise ConfigError("sample is missing; give a batch such as sample=(images, labels), which is run once.")
        if autocast not in (None, torch.bfloat16, torch.float16):
            raise ConfigError(f"autocast is {autocast}; it must be torch.bfloat16, torch.float16 or None.")
        if clip_norm is not None and not clip_norm > 0:
            raise ConfigError(f"clip_norm is {clip_norm}; it must be a positive number or None.")
        if plan is not None:
            if options or cuts is not None or recompute:
                raise ConfigError("Give either plan=... or options, cuts and recompute, not both: a plan has these.")
            method, options = plan.method, plan.options
            if strategies.family_of(parse_method(method).base) == "local":  # others have one plan only
                cuts, recompute = plan.plan.cuts, plan.plan.recompute
        self.method = parse_method(method)
        if self.method.phased:
            raise ConfigError(
                f"Method '{self.method}' has phases, which belong to a whole run: `glcan train` knows them. Here, "
                f"build a learner with '{self.method.core}' and call switch()."
            )
        self.model = model
        self.task = copy.copy(tasks.create(task))
        self.autocast, self.clip_norm = autocast, clip_norm
        self._options, self._cuda_graph = dict(options or {}), cuda_graph
        self._factory, self._sample, self._units, self._leak_check = optimizer, tuple(sample), units, leak_check
        again = recompute if isinstance(recompute, bool) else tuple(recompute)
        self._wanted = Wanted(None if cuts is None else tuple(cuts), again)
        self._watchers: list[Callable[[str], None]] = []
        self._updates = Updates([], None, None, {})
        self._profile = profile
        self._bind()

    def _bind(self) -> None:
        """Looks at the model as the method needs it, and binds the method to it."""
        refuse_wrapped(self.model)
        strategy = strategies.create(self.method, self.task.name, self._options)
        part = first_part(self.task, self._sample, self.method.accumulate)
        profile = self._profile
        if profile is None:
            few = self.task.arguments(self.task.part(part, 0, min(2, len(part[0]))))
            with strategy.around(self.task, self.model):
                profile = self._profile = take_profile(
                    self.model,
                    *self.task.arguments(part),
                    units=self._units,
                    assume=self.task.assumes,
                    few=few,
                )
        profile = strategy.prepared(self.model, self.task, profile, self._wanted)
        images = len(part[0])
        looked_at = min(profile.batch, images)
        whole = profile if looked_at == images else profile.scaled(images)
        self.task.prepare(whole.output, part)
        seen = self.task.part(part, 0, looked_at)
        setting = Setting(self.model, self.task, seen, profile, self.autocast, self._leak_check)
        bound: Pass = strategy.bind(setting, strategy.plan(setting, self._wanted))
        bound.plan = bound.plan.scaled(looked_at, images)
        self.strategy, self.profile = strategy, whole
        if strategy.family == "local":  # whose number of blocks the cuts may have decided
            self.method = dataclasses.replace(self.method, number=bound.plan.blocks)
        if self.method.accumulate > 1:
            bound = Accumulated(bound, self.task, self.method.accumulate, len(self._sample[0]))
        if self._cuda_graph:
            bound = Recorded(bound, self.model, self.task)
        self._pass, self._reached, self._seen = bound, False, Seen(self.model)
        self._updates = Updates(bound.groups, self._factory, self.clip_norm, self._updates.state())

    @property
    def auxiliary(self) -> nn.ModuleDict:
        """All that was added to the model."""
        return self._pass.added

    @property
    def plan(self) -> Plan:
        """The cuts, and what is recomputed."""
        return self._pass.plan

    @property
    def groups(self) -> Sequence[Group]:
        """The groups of parameters, in the order in which they are updated."""
        return self._pass.groups

    @property
    def optimizers(self) -> Sequence[Optimizer]:
        """One for each group that has parameters."""
        return self._updates.optimizers

    def optimizer_of(self, group: int) -> Optimizer | None:
        """The optimizer of a group, by its index; None if it has no parameters."""
        return self._updates.of(group)

    # -- training ------------------------------------------------------------------------------------------------

    def backward(self, *batch: Any, scaler: Any = None) -> dict[str, Tensor]:
        """One pass; ``.grad`` of every trainable parameter is set.

        Gradients add up as with ``loss.backward()``, so zero them between updates.

        Args:
            batch: as the task has it; classification: images [B, C, H, W], labels [B].
            scaler: a ``torch.amp.GradScaler`` for float16.

        Returns:
            The losses by name of the blocks that learn, detached scalars; the last one is the model's own.
        """
        return self._run(batch, scaler, update=False)

    def step(self, *batch: Any) -> dict[str, Tensor]:
        """As `backward`, but each group is updated as soon as its gradients are complete, and these are freed.

        Raises:
            ConfigError: the learner was built without an optimizer.
        """
        if not self.optimizers:
            raise ConfigError("step() needs an optimizer: Learner(..., optimizer=partial(torch.optim.SGD, lr=0.1)).")
        return self._run(batch, None, update=True)

    def _run(self, batch: tuple[Any, ...], scaler: Any, update: bool) -> dict[str, Tensor]:
        def backward(loss: Tensor, share: float) -> None:
            with no_autocast(loss):
                loss = loss if share == 1 else share * loss
                (loss if scaler is None else scaler.scale(loss)).backward()

        def done(index: int) -> None:
            if not self._reached:
                unreached.extend(p for p in self.groups[index].parameters if p.grad is None)
            if update:
                self._updates.make(index, self._pass.phase.frozen)
            for watch in self._watchers:
                watch(self.groups[index].name)

        self._seen.check()
        unreached: list[nn.Parameter] = []
        # A recorded pass hands out all groups at its end, so what is watched runs as ever.
        bound = self._pass.inner if isinstance(self._pass, Recorded) and self._watchers else self._pass
        bound.prepare()
        losses = bound.run(batch, backward, done)
        if not self._reached:
            self._reached = True
            _say_unreached(self.model, self.auxiliary, unreached)
        return losses

    @contextlib.contextmanager
    def watched(self, watch: Callable[[str], None]) -> Iterator[None]:
        """While this is open, ``watch`` is called with the name of each group when it has been trained."""
        self._watchers.append(watch)
        try:
            yield
        finally:
            self._watchers.remove(watch)

    def switch(self, method: str | Method | None = None, *, frozen: int = 0, end_to_end: bool = False) -> None:
        """Goes on with another method, or another phase of local learning; optimizer state stays with its parameters.

        Args:
            method: none: as it is. Another one has the profile's default cuts, and its options' defaults.
            frozen: so many blocks of local learning, from the first one on, only run forward: their parameters get no
                gradient. Their learning rate should be near zero by then.
            end_to_end: local learning trains the whole model at once, with activation checkpointing of each unit, and
                the auxiliary networks beside it, which send the model no gradient.

        Raises:
            ConfigError, CutError: the method or phase cannot be.
        """
        wanted = self.method if method is None else parse_method(method)
        if wanted.number is None and wanted.base == self.method.base:
            wanted = dataclasses.replace(wanted, number=self.method.number)
        if wanted != self.method:
            if wanted.core != self.method.core:
                self._options, self._wanted = {}, Wanted()
            if wanted.accumulate != self.method.accumulate:
                self._profile = None
            self.method = wanted
            self._bind()
        self._pass.enter(Phase(frozen, end_to_end))

    # -- everything else -----------------------------------------------------------------------------------------

    def parameters(self) -> list[nn.Parameter]:
        """All trainable parameters, the auxiliary networks' included, for an optimizer of one's own."""
        return [p for group in self.groups for p in group.parameters]

    def train(self, mode: bool = True) -> Learner:
        """Sets train mode (or eval mode) on the model and the auxiliary networks."""
        self.model.train(mode)
        self.auxiliary.train(mode)
        return self

    def eval(self) -> Learner:
        """Sets eval mode."""
        return self.train(False)

    @property
    def identity(self) -> dict[str, Any]:
        """What another learner must agree in to take this one's state."""
        config = getattr(getattr(self.strategy, "rule", self.strategy), "config", None)
        return {
            "method": self.method.core,
            "options": {} if config is None else dict(vars(config)),
            "task": self.task.name,
            "cuts": list(self.plan.cuts),
            "units": self.profile.names,
        }

    def state_dict(self) -> dict[str, Any]:
        """Everything that exact resumption needs, except the random generators: tensors and plain values only."""
        return {
            "identity": self.identity,
            "model": self.model.state_dict(),
            "auxiliary": self.auxiliary.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "pass": self._pass.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Puts a `state_dict` back. Nothing is changed unless all of it fits.

        Raises:
            CheckpointError: it is of another model, method or plan, or is incomplete.
        """
        check_identity(self.identity, state)
        check_module_state("model", self.model, state["model"])
        check_module_state("auxiliary", self.auxiliary, state["auxiliary"])
        check_optimizer_state(self.optimizers, state["optimizers"])
        self.model.load_state_dict(state["model"])
        self.auxiliary.load_state_dict(state["auxiliary"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self._pass.load_state_dict(state["pass"])

    def describe(self) -> str:
        """What a step does, in a few words."""
        return self._pass.describe() or "back-propagation, no auxiliary networks"

    def __repr__(self) -> str:
        return f"{self.method} ({self.strategy.family}) of {type(self.model).__name__}: {self.describe()}\n{self.plan}"


def _say_unreached(model: nn.Module, auxiliary: nn.Module, parameters: Sequence[nn.Parameter]) -> None:
    """A warning that names the parameters that no loss trains."""
    missing = {id(p) for p in parameters}
    known = itertools.chain(model.named_parameters(), auxiliary.named_parameters("auxiliary"))
    names = [name for name, p in known if id(p) in missing]
    if names:
        shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        warnings.warn(
            f"No loss reaches {len(names)} parameters, which are not trained: {shown}. A head whose output the task's "
            "loss does not read, or that local learning leaves out, is such a case; freeze them "
            "(requires_grad_(False)) if that is meant, or give a task whose loss reads them.",
            stacklevel=4,
        )
