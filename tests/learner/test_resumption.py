"""Exact resumption, and states that do not fit: these change nothing."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from tests.learner.models import ADAM, MODELS, MOMENTUM, TINY, assert_same_state, batches, built
from tests.zoo import Small, assert_equal
from torch import nn

from glcan import Learner
from glcan.errors import CheckpointError


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("method", ["glcan:4", "selective"])
@pytest.mark.parametrize("optimizer", [MOMENTUM, ADAM], ids=["sgd", "adamw"])
@pytest.mark.parametrize("name", ["dropout", "tied", "vit"])
def test_resumption_is_exact(name: str, optimizer: Any, method: str) -> None:
    build, sample = MODELS[name]
    every = list(batches(5, sample[0].shape[-1]))
    whole, first = (Learner(built(build), sample=sample, method=method, optimizer=optimizer) for _ in range(2))
    torch.manual_seed(1)
    for batch in every:
        whole.step(*batch)
    torch.manual_seed(1)
    for batch in every[:3]:
        first.step(*batch)
    rng, state = torch.get_rng_state(), through_a_file(first.state_dict())
    torch.manual_seed(99)
    second = Learner(build().train(), sample=sample, method=method, optimizer=optimizer)
    second.load_state_dict(state)
    torch.set_rng_state(rng)
    for batch in every[3:]:
        second.step(*batch)
    assert_same_state(second.model, whole.model)
    assert_same_state(second.auxiliary, whole.auxiliary)


class Wider(Small):
    def __init__(self) -> None:
        super().__init__()
        self.d.b = nn.Conv2d(8, 8, 5, 1, 2)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (dict(cuts=["a", "c"]), "cuts"),
        (dict(cuts=["d"]), "method='glcan:2'"),
        (dict(method="e2e", cuts=None), "method='e2e'"),
        (dict(method="selective", cuts=None), "method='selective'"),
        (dict(options={"use_global": False}), "options"),
        (dict(units=["stem", "a", "b", "c", "d"]), "units"),
        (dict(model=Wider), "'d.b.weight': 8x8x5x5 there, 8x8x3x3 here"),
        (dict(optimizer=None), "0 optimizers, this learner has 3"),
        (dict(optimizer=ADAM), "another kind"),
    ],
)
def test_a_state_of_another_learner_changes_nothing(other: dict[str, Any], message: str) -> None:
    def learner(model: Any = Small, **options: Any) -> Learner:
        return Learner(
            model(), sample=TINY, **({"method": "glcan", "cuts": ["b", "d"], "optimizer": MOMENTUM} | options)
        )

    mine, theirs = learner(), learner(**other)
    mine.step(*TINY)
    before = copy.deepcopy(mine.state_dict())
    with pytest.raises(CheckpointError, match=message):
        mine.load_state_dict(theirs.state_dict())
    after = mine.state_dict()
    assert_equal(dict(after["model"]), dict(before["model"]))
    assert_equal(dict(after["auxiliary"]), dict(before["auxiliary"]))
    for new, old in zip(after["optimizers"], before["optimizers"], strict=True):
        assert new["param_groups"] == old["param_groups"]
        for key in old["state"]:
            assert torch.equal(new["state"][key]["momentum_buffer"], old["state"][key]["momentum_buffer"])


def test_selective_of_another_share_is_another_method() -> None:
    half, quarter = (Learner(Small(), sample=TINY, method="selective", options={"share": s}) for s in (0.5, 0.25))
    with pytest.raises(CheckpointError, match=r"options=\{'share': 0\.25"):
        half.load_state_dict(quarter.state_dict())


def test_what_is_no_state() -> None:
    learner = Learner(Small(), sample=TINY, method="glcan:2")
    with pytest.raises(CheckpointError, match="auxiliary, identity, optimizers, pass missing"):
        learner.load_state_dict({"model": {}})
    with pytest.raises(CheckpointError, match="no learner's state"):
        learner.load_state_dict(learner.model.state_dict())


def test_a_scheduler_does_not_hinder_resumption() -> None:
    learner = Learner(Small(), sample=TINY, method="glcan:2", optimizer=MOMENTUM)
    schedules = [torch.optim.lr_scheduler.StepLR(o, 1) for o in learner.optimizers]
    learner.step(*TINY)
    for schedule in schedules:
        schedule.step()
    fresh = Learner(Small(), sample=TINY, method="glcan:2", optimizer=MOMENTUM)
    fresh.load_state_dict(through_a_file(learner.state_dict()))
    assert fresh.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.005)


def test_accumulation_is_no_part_of_what_must_agree() -> None:
    """A run may go on in more parts: on a smaller device, say."""
    learner = Learner(built(Small), sample=TINY, method="glcan:2", optimizer=MOMENTUM)
    learner.step(*TINY)
    parts = Learner(Small(), sample=TINY, method="glcan:2+accumulate:2", cuts=None, optimizer=MOMENTUM)
    if parts.plan.cuts == learner.plan.cuts:
        parts.load_state_dict(learner.state_dict())
        assert_same_state(parts.model, learner.model)
