"""Gradients that cross a cut all the same are found when the learner is built."""

from __future__ import annotations

import contextlib
import copy
from functools import partial
from typing import Any

import pytest
import torch
from tests import zoo
from tests.inspect.isolation_cases import MODELS, GlueOnASkip
from tests.zoo import Residual, Small, assert_equal, gradients
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import glcan
from glcan.errors import CutError, GradientLeak
from glcan.inspect.leaks import leaked_parameters
from glcan.inspect.profile import Profile
from glcan.inspect.record import profile


class _Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * 2


class LeaksInTheGlue(Small):
    def body(self, x: Tensor) -> Tensor:
        return self.d(self.c(self.b(_Double.apply(self.a(x)))))


class LeaksOverASkip(Small):
    def body(self, x: Tensor) -> Tensor:
        x = self.a(x)
        y = self.b(x)
        return self.d(self.c(y)) + _Double.apply(x)


class ReadsFromElsewhere(Small):
    class unit(Residual):
        aside: Any = None

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + (self.aside.pop() if self.aside else 0)

    def body(self, x: Tensor) -> Tensor:
        x = self.a(x)
        self.c.aside = [x]
        return self.d(self.c(self.b(x)))


class ReentrantCheckpoint(Small):
    def body(self, x: Tensor) -> Tensor:
        return self.d(checkpoint(lambda y: self.c(self.b(y)), self.a(x), use_reentrant=True))


def _learner(model: nn.Module, cuts: list[str], **options: Any) -> glcan.Learner:
    sample = (zoo.images(2, 8), torch.tensor([0, 1]))
    return glcan.Learner(model, sample=sample, method="glcan", cuts=cuts, units=Small.units, **options)


@pytest.mark.parametrize(
    ("model", "cuts", "parameter", "cut"),
    [
        (LeaksInTheGlue, ["b"], "a.a.weight", "b"),
        (LeaksInTheGlue, ["b", "d"], "a.a.weight", "b"),
        (LeaksOverASkip, ["c"], "a.a.weight", "c"),
        (ReadsFromElsewhere, ["b", "d"], "a.a.weight", "b"),
        (ReadsFromElsewhere, ["c"], "a.a.weight", "c"),
    ],
)
def test_a_leak_is_found_when_the_learner_is_built(model: Any, cuts: list[str], parameter: str, cut: str) -> None:
    with pytest.raises(GradientLeak, match=f"{parameter}.*{cut!r}"):
        _learner(model(), cuts)


def test_a_reentrant_checkpoint_over_a_cut_is_refused() -> None:
    with pytest.raises(CutError, match="no gradient enters it"):
        _learner(ReentrantCheckpoint(), ["c"])
    with pytest.raises(GradientLeak, match="a.a.weight.*'d'"):
        _learner(ReentrantCheckpoint(), ["d"])
    _learner(ReentrantCheckpoint(), ["head"])


def test_a_leak_inside_one_block_is_none() -> None:
    _learner(LeaksInTheGlue(), ["c"])
    _learner(ReadsFromElsewhere(), ["d"])


def test_the_leak_check_can_be_left_out() -> None:
    _learner(LeaksInTheGlue(), ["b"], leak_check=False)


def test_the_leak_check_leaves_the_model_as_it_was() -> None:
    model = LeaksInTheGlue()
    before = copy.deepcopy(model.state_dict())
    with contextlib.suppress(GradientLeak):
        _learner(model, ["b"])
    assert_equal(dict(model.state_dict()), dict(before))
    assert not any("forward" in m.__dict__ for m in model.modules())
    assert not gradients(model)


@pytest.mark.parametrize("model", MODELS, ids=lambda m: m.__name__)
def test_no_false_alarm(model: type[Small]) -> None:
    learner = _learner(model(), ["b", "c", "head"], optimizer=partial(torch.optim.SGD, lr=0.01))
    before = {name: p.detach().clone() for name, p in learner.model.named_parameters() if p.requires_grad}
    learner.step(zoo.images(2, 8), torch.tensor([0, 1]))
    same = [n for n, p in learner.model.named_parameters() if n in before and torch.equal(p, before[n])]
    # a bias before a batch normalisation has no gradient but rounding
    assert not [name for name in same if not name.endswith("a.bias")]


def test_leaked_parameters_walks_the_graph_only() -> None:
    a, b = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    loss = (a * b).sum()
    assert leaked_parameters(loss, [a]) == [b] or leaked_parameters(loss, [a])[0] is b
    assert leaked_parameters(loss, [a, b]) == []
    loss.backward()
    assert leaked_parameters(torch.zeros(()), []) == []


def test_profile_is_used() -> None:
    """`crossing` numbers count the same tensors with and without cuts, whatever needs a gradient."""
    found: Profile = profile(GlueOnASkip(), (zoo.images(2, 8),))
    assert len(found.crossing["d"]) == 1
    assert found.crossing["b"] == frozenset()
