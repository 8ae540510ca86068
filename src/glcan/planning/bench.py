"""A model on fake tensors, on which learners are built and stepped: nothing is computed, nothing allocated."""

from __future__ import annotations

import contextlib
import copy
import gc
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_map_only

from glcan import strategies, tasks
from glcan.cost.step import StepCost, measure_step
from glcan.inspect.dryrun import AssumedValues, fake_copy, uninitialized
from glcan.inspect.profile import Profile
from glcan.inspect.record import profile
from glcan.inspect.tensors import tensors_in
from glcan.learner import Learner, OptimizerFactory
from glcan.planning.forecast import Forecast
from glcan.strategies.accumulate import first_part
from glcan.strategies.base import Setting, Strategy, Wanted
from glcan.strategies.method import Method, parse_method

__all__ = ["Bench"]


class Bench:
    """A model and a batch that steps are metered on.

    A candidate is metered by the learner's own step, under the same meter that meters real training, so that what is
    predicted and what is trained cannot drift apart.
    """

    def __init__(
        self,
        model: nn.Module,
        task: str | tasks.Task,
        sample: tuple[Any, ...],
        units: Sequence[str] | None = None,
        optimizer: OptimizerFactory | None = None,
        autocast: torch.dtype | None = None,
    ) -> None:
        self.task = copy.copy(tasks.create(task))
        self.units, self.optimizer, self.autocast = units, optimizer, autocast
        self.mode: FakeTensorMode | None = FakeTensorMode(allow_non_fake_inputs=True)
        self._state: dict[Tensor, Any] = {}
        self._profiles: dict[int, Profile] = {}
        try:
            self.model, self.batch = fake_copy(model, sample, self.mode)
            self.profile = self.profile_of(1)
        except Exception:
            if any(isinstance(t, FakeTensor) for t in (*model.parameters(), *tensors_in(sample))):
                raise
            # The model does not run on fake tensors, or not at all: the real one tells, or says why not.
            self.mode = None
            self.model = copy.deepcopy(model)
            self.batch = tree_map_only(Tensor, lambda t: t.detach().clone(), sample)
            self.profile = self.profile_of(1)

    def profile_of(self, accumulate: int) -> Profile:
        """The profile of what is run at once, with so many parts."""
        if accumulate not in self._profiles:
            if not self.model.training:
                self.model.train()
            if accumulate > 1:  # the same of fewer images
                part = first_part(self.task, self.batch, accumulate)
                self._profiles[accumulate] = self.profile_of(1).scaled(len(part[0]))
                return self._profiles[accumulate]
            with self.context(), self.task.running(self.model):
                self._profiles[1] = profile(
                    self.model, *self.task.arguments(self.batch), units=self.units, assume=self.task.assumes
                )
        return self._profiles[accumulate]

    @contextlib.contextmanager
    def context(self) -> Iterator[None]:
        """Entered around everything that runs or builds the model."""
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

    def setting(self, strategy: Strategy, accumulate: int) -> Setting:
        """What a strategy's candidates are looked for in."""
        part = first_part(self.task, self.batch, accumulate)
        found = strategy.prepared(self.model, self.task, self.profile_of(accumulate), Wanted())
        with self.context():
            self.task.prepare(found.output, part)
        return Setting(self.model, self.task, part, found, self.autocast)

    def run(
        self, method: str | Method, options: Mapping[str, Any] | None = None, wanted: Wanted | None = None
    ) -> Forecast:
        """The cost of one step of a learner."""
        parsed = parse_method(method)
        with self.context():
            learner = self._build(parsed, options, wanted or Wanted())
            cost = measure_step(learner, *self.batch)
            for optimizer in learner.optimizers if self.mode is not None else ():
                self._state.update(optimizer.state)
            step = learner.describe()
        self._forget_gradients()
        extra = sum(p.numel() for p in learner.auxiliary.parameters())
        name, family = str(learner.method), learner.strategy.family
        return Forecast(name, family, dict(options or {}), learner.plan, cost, extra, step)

    def costs(self, methods: Sequence[str]) -> dict[str, StepCost]:
        """The costs of methods in their default form: one learner for all, where they are exact."""
        found: dict[str, StepCost] = {}
        learner: Learner | None = None
        with self.context():
            for name in methods:
                parsed = parse_method(name)
                local = strategies.family_of(parsed.base) == "local"
                if learner is None or local or learner.method.accumulate != parsed.accumulate:
                    learner = self._build(parsed, None, Wanted())
                    self._reuse_state(learner)
                elif learner.method != parsed:
                    learner.switch(parsed)
                found[name] = measure_step(learner, *self.batch)
                self._forget_gradients()
        return found

    def _build(self, method: Method, options: Mapping[str, Any] | None, wanted: Wanted) -> Learner:
        return Learner(
            self.model,
            self.task,
            self.batch,
            method=method,
            options=options,
            cuts=wanted.cuts,
            recompute=wanted.recompute,
            units=self.units,
            optimizer=self.optimizer,
            autocast=self.autocast,
            profile=self.profile_of(method.accumulate),
        )

    def _reuse_state(self, learner: Learner) -> None:
        """The same factory's, for the same parameters, so it need not be made."""
        for optimizer in learner.optimizers:
            own = [p for group in optimizer.param_groups for p in group["params"]]
            if own and all(p in self._state for p in own):
                optimizer.state.update({p: self._state[p] for p in own})

    def _forget_gradients(self) -> None:
        for parameter in self.model.parameters():
            parameter.grad = None
