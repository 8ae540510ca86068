"""The rule glcan for super-resolution: the image from features alone, exact in parts, within its budget."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Adam

import glcan
from glcan import Boundary, LocalLearner
from glcan.errors import ConfigError
from glcan.models import create
from glcan.rules.glcan.super_resolution import auxiliary_flops, fit_width_and_kernel

OPTIMIZER = partial(Adam, lr=1e-3)


def batch(count: int = 6, scale: int = 2, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    low = torch.rand(count, 3, 12, 12, generator=generator, dtype=dtype)
    return low, torch.rand(count, 3, 12 * scale, 12 * scale, generator=generator, dtype=dtype)


def network(scale: int = 2) -> nn.Module:
    torch.manual_seed(0)
    return create("edsr_baseline", scale=scale, blocks=6, channels=16)


def learner(model: nn.Module, sample: Any, **options: Any) -> LocalLearner:
    torch.manual_seed(1)
    return LocalLearner(model, "super-resolution", sample, blocks=3, rule_options=options, optimizer=OPTIMIZER)


def test_the_image_is_made_of_the_features_alone() -> None:
    """Not of the low-resolution image beside them: the model's own end has nothing else either."""
    mine = learner(network(), batch())
    auxiliary = next(iter(mine.auxiliary.values()))
    features = torch.randn(6, 16, 12, 12)
    low, high = batch()
    images = [auxiliary(Boundary(0, "", (features,)), given) for given in ((low, high), (1 - low, high))]
    assert torch.equal(*images)


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_nothing_is_cut_inside_the_upsampler(scale: int) -> None:
    mine = learner(network(scale), batch(scale=scale))
    assert all(cut.startswith("body") for cut in mine.plan.cuts)
    assert {unit.name for unit in mine.profile.upsampler} == {
        name for name in mine.profile.names if name.startswith(("tail", "add_mean"))
    }


def test_parts_change_no_gradient() -> None:
    sample = batch(7, dtype=torch.float64)
    whole = learner(network().double(), sample)
    whole.backward(*sample)  # takes the scale of the features
    for parameter in whole.parameters():
        parameter.grad = None
    parted = copy.deepcopy(whole)
    for auxiliary in parted.auxiliary.values():
        assert auxiliary.parts == 1  # so small a batch is not worth dividing
        auxiliary.parts = 3
    losses = [mine.backward(*sample) for mine in (whole, parted)]
    assert losses[0].keys() == losses[1].keys()
    for name in losses[0]:
        assert torch.allclose(losses[0][name].double(), losses[1][name].double(), rtol=1e-6)
    for mine, other in zip(whole.parameters(), parted.parameters(), strict=True):
        assert mine.grad is not None
        assert other.grad is not None
        assert torch.allclose(mine.grad, other.grad, rtol=1e-9, atol=1e-12)


def test_parts_need_less_memory() -> None:
    low = torch.rand(16, 3, 64, 64)
    model, sample = network(), (low, torch.rand(16, 3, 128, 128))
    options = {"task": "super-resolution", "sample": sample, "blocks": 3, "optimizer": OPTIMIZER, "baselines": ()}
    parted = glcan.plan(model, rule_options={"width": 2.0}, **options)
    cuts = parted.plan.cuts
    mine = LocalLearner(model, "super-resolution", sample, cuts=cuts, rule_options={"width": 2.0}, optimizer=OPTIMIZER)
    for auxiliary in mine.auxiliary.values():
        assert auxiliary.parts > 1
        auxiliary.parts = 1
    whole = glcan.measure_step(mine, *sample)
    assert parted.cost.activation_peak_bytes < 0.9 * whole.activation_peak_bytes
    assert parted.cost.flops == whole.flops


def test_the_scale_of_the_features_does_not_matter() -> None:
    features = torch.randn(6, 16, 12, 12)
    outputs = []
    for factor in (1.0, 100.0):
        auxiliary = next(iter(learner(network(), batch()).auxiliary.values()))
        outputs.append(auxiliary(Boundary(0, "", (factor * features,)), batch()))
        brighter = auxiliary(Boundary(0, "", (2 * factor * features,)), batch())
        assert not torch.allclose(outputs[-1], brighter, atol=1e-2)  # from the first batch on, what is bright is bright
    assert torch.allclose(*outputs, atol=1e-5)
    assert outputs[0].shape == (6, 3, 24, 24)


def test_the_width_fits_its_budget() -> None:
    for flops in (2e4, 3e4, 1e5, 2e5):
        width, kernel = fit_width_and_kernel(64, 3, 2, True, 32, flops, 64)
        assert auxiliary_flops(64, width, kernel, 3, 2, True, 32) <= flops or (width, kernel) == (4, 1)
        assert width == 64 or auxiliary_flops(64, width + 4, kernel, 3, 2, True, 32) > flops
    assert fit_width_and_kernel(64, 3, 2, True, 32, 1e9, 32) == (32, 3)


@pytest.mark.parametrize("options", [{"use_local": False}, {"use_global": False}], ids=str)
def test_either_branch_alone(options: dict[str, bool]) -> None:
    sample = batch()
    mine = learner(network(), sample, **options)
    first = mine.step(*sample)
    for _ in range(15):
        last = mine.step(*sample)
    assert all(last[name] < first[name] for name in first)


def test_backbone_units_are_for_classification() -> None:
    with pytest.raises(ConfigError, match="is for classification"):
        learner(network(), batch(), unit="backbone")
