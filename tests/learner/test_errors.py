"""What a learner refuses, before anything is changed."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tests.learner.models import SAMPLE, TINY
from tests.zoo import Small, assert_equal

from glcan import Learner, plan
from glcan.errors import ConfigError, CutError, DataError, GlcanError, UnknownName
from glcan.models import create


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (dict(sample=None), ConfigError, "sample is missing"),
        (dict(method="glcan"), CutError, "'glcan' has no number of blocks. Write 'glcan:4', give cuts, or a budget"),
        (dict(method="glcan:3", cuts=["b"]), CutError, "glcan:3 has 3 blocks, but 1 cuts make 2. Write glcan:2"),
        (dict(method="glcan:7"), CutError, "blocks=7.*1 to 5 blocks"),
        (dict(method="glcan:0"), ConfigError, "'0' blocks, which is no positive integer"),
        (dict(method="glcan", cuts=["e"]), UnknownName, "cut 'e'"),
        (dict(method="glcan", cuts=["stem"]), CutError, "No block can begin at 'stem'"),
        (dict(method="glcan", cuts=["c", "b"]), CutError, r"use \['b', 'c'\]"),
        (dict(method="e2e:2"), ConfigError, "gives a number to 'e2e', which takes none. Write 'e2e' alone"),
        (dict(method="checkpoint", cuts=["b"]), CutError, "'checkpoint' trains the whole model at once"),
        (dict(method="selective", cuts=["b"]), CutError, "'selective' trains the whole model at once"),
        (dict(method="e2e", recompute=True), ConfigError, "is for the blocks of local learning.*choose 'checkpoint'"),
        (dict(method="glcn:2"), UnknownName, "method 'glcn'.*'glcan'"),
        (dict(task="clasification"), UnknownName, "task 'clasification'"),
        (dict(method="predsim:2", task="detection"), ConfigError, "'predsim' serves classification, not the task 'det"),
        (dict(autocast=torch.float64), ConfigError, "autocast is torch.float64"),
        (dict(clip_norm=0), ConfigError, "clip_norm is 0"),
        (dict(optimizer=lambda p: "sgd"), ConfigError, "gave str; it must return a torch.optim.Optimizer"),
        (dict(sample=(TINY[0], TINY[1] + 10)), DataError, "but the model gives 10 classes"),
        (dict(sample=(TINY[0], TINY[1] - 10)), DataError, "A label is -"),
        (dict(sample=(TINY[0],)), ConfigError, "this one has 1 items"),
        (dict(sample=(TINY[0][:, :1], TINY[1])), ConfigError, "cannot be run on a batch of shapes"),
        (dict(units=["a", "b.norm", "zz"]), UnknownName, "unit 'zz'"),
        (dict(options={"budjet": 1}), UnknownName, "option of 'glcan' 'budjet'.*'budget'"),
        (dict(method="e2e", options={"budget": 1}), ConfigError, "'e2e' has no options, but got budget"),
        (dict(method="selective", options={"share": 0}), ConfigError, "selective.share is 0"),
        (dict(method="selective", options={"by": "order"}), ConfigError, "one of 'gradient', 'random'"),
        (dict(method="selective", options={"shares": 0.5}), UnknownName, "option of 'selective' 'shares'.*'share'"),
    ],
)
def test_errors(options: dict[str, Any], error: type[Exception], message: str) -> None:
    model = Small()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=message) as caught:
        Learner(model, **({"sample": TINY, "method": "glcan:2"} | options))
    assert isinstance(caught.value, GlcanError)
    assert_equal(dict(model.state_dict()), dict(before))
    assert not any("forward" in m.__dict__ for m in model.modules())


def test_step_needs_an_optimizer() -> None:
    learner = Learner(Small(), sample=TINY, method="glcan:2")
    with pytest.raises(ConfigError, match="step.. needs an optimizer"):
        learner.step(*TINY)


def test_recomputation_is_for_blocks_that_exist() -> None:
    model = create("cifar_resnet20", num_classes=10)
    with pytest.raises(UnknownName, match="block or unit to recompute 'block9'"):
        Learner(model, sample=SAMPLE, method="glcan:3", recompute=["block9"])


def test_a_plan_or_its_parts() -> None:
    found = plan(Small(), sample=TINY, method="glcan:3", options={"budget": 0.2}, baselines=())
    learner = Learner(Small(), sample=TINY, plan=found)
    assert str(learner.method) == "glcan:3"
    assert learner.plan.cuts == found.plan.cuts
    assert learner.strategy.rule.config.budget == 0.2
    for own in ({"options": {"budget": 0.1}}, {"cuts": ["b"]}, {"recompute": True}):
        with pytest.raises(ConfigError, match="a plan has these"):
            Learner(Small(), sample=TINY, plan=found, **own)
