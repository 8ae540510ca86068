"""What a step costs: a learner's real step under the meter, and parameters that no loss reaches."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from tests import zoo
from tests.zoo import Small
from torch import Tensor, nn
from torch.optim import SGD, AdamW

import glcan
from glcan.cost.step import StepCost, measure_step
from glcan.models import create

OPTIMIZERS = {"sgd": partial(SGD, lr=0.1, momentum=0.9), "adamw": partial(AdamW, lr=1e-3)}


def test_a_step_of_a_learner_is_metered() -> None:
    batch = zoo.images(4, 32), torch.tensor([1, 2, 3, 4])
    model = create("cifar_resnet20", num_classes=10)
    plain = copy.deepcopy(model)
    sgd = OPTIMIZERS["sgd"]
    learner = glcan.Learner(model, sample=batch, method="glcan:4", optimizer=sgd)
    cost = measure_step(learner, *batch)
    whole = measure_step(glcan.Learner(plain, sample=batch, method="e2e", optimizer=sgd), *batch)
    assert sum(cost.by_kind.values()) == cost.peak_bytes
    assert cost.cuda_peak_bytes is None
    parameters = 4 * sum(p.numel() for p in model.parameters())
    auxiliary = 4 * sum(p.numel() for p in learner.auxiliary.parameters())
    assert whole.by_kind["parameters"] >= parameters
    assert whole.by_kind["optimizer_state"] == parameters
    assert whole.by_kind["auxiliary"] == 0
    assert 2 * auxiliary <= cost.by_kind["auxiliary"] <= 3.5 * auxiliary
    assert cost.by_kind["inputs"] == batch[0].nbytes + batch[1].nbytes
    assert cost.activation_peak_bytes < 0.5 * whole.activation_peak_bytes
    assert whole.flops < cost.flops < 1.4 * whole.flops
    again = measure_step(learner, *batch)
    assert (again.peak_bytes, again.activation_peak_bytes, again.flops) == (
        cost.peak_bytes,
        cost.activation_peak_bytes,
        cost.flops,
    ), "repeatable"


# -- parameters that no loss reaches -------------------------------------------------------------------------------


class TwoHeads(Small):
    """A head for deep supervision, whose output the task's loss does not read."""

    def __init__(self) -> None:
        super().__init__()
        self.early = nn.Sequential(nn.Conv2d(8, 32, 3), nn.Conv2d(32, 10, 3))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.b(self.a(self.stem(x)))
        return self.head(self.d(self.c(x)).mean((2, 3))), self.early(x).mean((2, 3))


def googlenet() -> nn.Module:
    return zoo.torchvision("googlenet", init_weights=False, num_classes=10)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(
    ("build", "method", "named"),
    [
        (TwoHeads, "e2e", "4 parameters.*early.0.weight"),
        (TwoHeads, "checkpoint", "4 parameters.*early.0.weight"),
        (TwoHeads, "selective", "4 parameters.*early.0.weight"),
        (TwoHeads, "glcan:3", "4 parameters.*early.0.weight"),
        (googlenet, "e2e", "14 parameters.*aux1.conv.conv.weight.* and 9 more"),
    ],
)
def test_a_plan_counts_no_state_of_what_is_not_trained(
    build: Callable[[], nn.Module], method: str, named: str, optimizer: str
) -> None:
    sample = zoo.images(4, 64), torch.tensor([1, 2, 3, 4])
    options: dict[str, Any] = {"method": method, "optimizer": OPTIMIZERS[optimizer]}
    with pytest.warns(UserWarning, match=f"No loss reaches {named}"):
        planned = glcan.plan(build(), sample=sample, baselines=(), **options).cost
    learner = glcan.Learner(build(), sample=sample, **options)
    with pytest.warns(UserWarning, match=f"No loss reaches {named}"):
        metered = measure_step(learner, *sample)
    assert planned.by_kind["optimizer_state"] == metered.by_kind["optimizer_state"] == state_bytes(learner, metered)
    assert planned.peak_bytes == pytest.approx(metered.peak_bytes, rel=0.01)


def state_bytes(learner: glcan.Learner, cost: StepCost) -> int:
    """What the optimizers really hold for the model's own parameters, at a peak outside of their step."""
    own = set(learner.model.parameters())
    values = [
        value
        for optimizer in learner.optimizers
        for parameter, state in optimizer.state.items()
        if parameter in own
        for value in state.values()
        if isinstance(value, Tensor)
    ]
    assert {id(p) for o in learner.optimizers for p in o.state} < {id(p) for p in learner.parameters()}
    return sum(value.nbytes for value in values)


def test_the_first_step_says_once_what_is_not_trained() -> None:
    sample = zoo.images(4, 16), torch.tensor([1, 2, 3, 4])
    learner = glcan.Learner(TwoHeads(), sample=sample, method="e2e", optimizer=OPTIMIZERS["sgd"])
    before = copy.deepcopy(learner.model.early.state_dict())
    with pytest.warns(UserWarning, match="early.0.weight, early.0.bias, early.1.weight, early.1.bias. A head"):
        learner.step(*sample)
    learner.step(*sample)  # a second warning would be an error
    zoo.assert_equal(learner.model.early.state_dict(), before)


def test_frozen_parameters_are_not_named() -> None:
    sample = zoo.images(4, 16), torch.tensor([1, 2, 3, 4])
    model = TwoHeads()
    model.early.requires_grad_(False)
    glcan.Learner(model, sample=sample, method="e2e", optimizer=OPTIMIZERS["sgd"]).step(*sample)
