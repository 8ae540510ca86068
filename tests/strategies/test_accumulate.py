"""A batch in parts whose gradients add up: the gradients, the memory, and what is refused."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from tests.strategies.models import CUTS, Chain, assert_close, batch, chain
from tests.zoo import gradients
from torch import Tensor, nn
from torch.optim import SGD

from glcan import Learner, measure_step
from glcan import plan as plan_step
from glcan.models import create

METHODS: dict[str, dict[str, Any]] = {
    "e2e": {},
    "checkpoint": {},
    "glcan": {"cuts": CUTS, "options": {"coupling": 0.0}},
    "dgl": {"cuts": CUTS},
}


def learner(model: nn.Module, method: str, accumulate: int, **options: Any) -> Learner:
    torch.manual_seed(2)
    return Learner(model, sample=batch(), method=f"{method}+accumulate:{accumulate}", **METHODS[method] | options)


def fixed(network: nn.Module) -> nn.Module:
    """Without normalisation over the batch: glcan's and dgl's auxiliary networks have it."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.eval()
    return network


def backward(method: str, accumulate: int, images: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    model = chain()
    built = learner(model, method, accumulate)
    fixed(built.auxiliary)
    losses = built.backward(*batch(images))
    found = gradients(model) | {f"auxiliary.{name}": value for name, value in gradients(built.auxiliary).items()}
    return losses, found


class TestGradients:
    @pytest.mark.parametrize("method", METHODS)
    @pytest.mark.parametrize(("parts", "images"), [(2, 8), (3, 7), (8, 8), (5, 3)])
    def test_equal_those_of_the_whole_batch(self, method: str, parts: int, images: int) -> None:
        losses, found = backward(method, parts, images)
        expected_losses, expected = backward(method, 1, images)
        assert found.keys() == expected.keys()
        assert_close(found, expected, tolerance=1e-12)
        assert_close(losses, expected_losses, tolerance=1e-12)

    @pytest.mark.parametrize(
        ("images", "parts"), [(64, 4), (63, 4), (33, 3), (17, 2), (16, 1), (5, 1), (2, 1), (80, 4)]
    )
    def test_the_images_that_end_an_epoch_are_in_no_smaller_parts(self, images: int, parts: int) -> None:
        net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 4))
        inputs, labels = torch.randn(80, 4), torch.randint(0, 4, (80,))
        built = Learner(net, sample=(inputs[:64], labels[:64]), method="e2e+accumulate:4")
        seen: list[int] = []
        net[0].register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
        assert built.backward(inputs[:images], labels[:images])["block1"].isfinite()
        assert len(seen) == parts
        assert sum(seen) == images
        assert max(seen) - min(seen) <= 1

    def test_end_to_end_steps_are_those_of_back_propagation(self) -> None:
        model = chain()
        built = learner(model, "glcan", 3)
        built.switch(end_to_end=True)
        built.backward(*batch())
        _, expected = backward("e2e", 1, 8)
        assert_close(gradients(model), expected, tolerance=1e-10)

    def test_frozen_blocks_get_none(self) -> None:
        model = chain()
        built = learner(model, "glcan", 2)
        built.switch(frozen=1)
        losses = built.backward(*batch())
        assert list(losses) == ["block2", "block3"]
        assert model.stem.weight.grad is None
        assert model.fc.weight.grad is not None

    def test_come_on_top_of_those_that_are_there(self) -> None:
        model = chain()
        built = learner(model, "e2e", 2)
        built.backward(*batch())
        once = {name: gradient.clone() for name, gradient in gradients(model).items()}
        built.backward(*batch())
        assert_close(gradients(model), {name: 2 * gradient for name, gradient in once.items()}, tolerance=1e-10)

    @pytest.mark.parametrize("method", METHODS)
    def test_a_step_updates_once(self, method: str) -> None:
        model, after = chain(), []
        built = learner(model, method, 4, optimizer=partial(SGD, lr=0.1), clip_norm=1e-3)
        fixed(built.auxiliary)
        before = copy.deepcopy(model.state_dict())
        with built.watched(after.append):
            built.step(*batch())
        assert after == [group.name for group in built.groups]
        change = torch.stack([(model.state_dict()[n] - value).norm() for n, value in before.items()]).norm()
        assert 0 < float(change) <= 1e-4 * 1.001  # all of it moves by lr * clip_norm, once
        assert all(parameter.grad is None for parameter in model.parameters())

    def test_a_scaler_scales_each_part(self) -> None:
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        model = chain()
        learner(model, "e2e", 4).backward(*batch(), scaler=scaler)
        _, expected = backward("e2e", 1, 8)
        assert_close(gradients(model), {name: 1024 * value for name, value in expected.items()}, tolerance=1e-9)


class TestMemory:
    def test_is_that_of_a_part(self) -> None:
        def cost(method: str, images: int) -> int:
            torch.manual_seed(0)
            sample = (torch.zeros(images, 3, 32, 32), torch.zeros(images, dtype=torch.long))
            built = Learner(Chain(), sample=sample, method=method, optimizer=partial(SGD, lr=0.1))
            return measure_step(built, *sample).activation_peak_bytes

        for method in ("e2e", "glcan:3"):
            whole, parts, part = cost(method, 64), cost(f"{method}+accumulate:4", 64), cost(method, 16)
            assert part <= parts < 0.35 * whole, method

    def test_the_planner_predicts_it(self) -> None:
        sample = (torch.zeros(16, 3, 32, 32), torch.zeros(16, dtype=torch.long))
        options: dict[str, Any] = {"method": "glcan:3+accumulate:4", "optimizer": partial(SGD, lr=0.1)}
        network = create("cifar_resnet20", num_classes=10)
        forecast = plan_step(network, sample=sample, **options)
        built = Learner(network, sample=sample, **options)
        assert forecast.plan.cuts == built.plan.cuts
        assert forecast.cost.peak_bytes == pytest.approx(measure_step(built, *sample).peak_bytes, rel=1e-3)

    def test_a_plan_shows_what_accumulating_would_cost(self) -> None:
        sample = (torch.zeros(16, 3, 32, 32), torch.zeros(16, dtype=torch.long))
        network = create("cifar_resnet20", num_classes=10)
        forecast = plan_step(network, sample=sample, method="glcan:4")
        e2e, parts = forecast.baselines["e2e"], forecast.baselines["e2e+accumulate:4"]
        assert parts.activation_peak_bytes < 0.3 * e2e.activation_peak_bytes
        assert parts.flops == pytest.approx(e2e.flops, rel=1e-3)

    def test_a_budget_counts_with_parts(self) -> None:
        sample = (torch.zeros(64, 3, 32, 32), torch.zeros(64, dtype=torch.long))
        network = create("cifar_resnet20", num_classes=10)
        limit = plan_step(network, sample=sample, method="e2e", baselines=()).cost.peak_bytes // 2
        whole = plan_step(network, sample=sample, method="glcan", memory=limit, baselines=())
        parts = plan_step(network, sample=sample, method="glcan+accumulate:4", memory=limit, baselines=())
        assert whole.plan.blocks > 1 == parts.plan.blocks
        assert max(whole.cost.peak_bytes, parts.cost.peak_bytes) <= limit
