"""The rule glcan for super-resolution: the image from features alone, an end folded exactly, a long last block."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Adam

import glcan
from glcan import Boundary, Learner
from glcan.auxiliary.glcan.super_resolution import FoldedEnd, auxiliary_flops, fit
from glcan.models import create

OPTIMIZER = partial(Adam, lr=1e-3)


def batch(count: int = 6, scale: int = 2, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    low = torch.rand(count, 3, 12, 12, generator=generator, dtype=dtype)
    return low, torch.rand(count, 3, 12 * scale, 12 * scale, generator=generator, dtype=dtype)


def network(scale: int = 2) -> nn.Module:
    torch.manual_seed(0)
    return create("edsr_baseline", scale=scale, blocks=6, channels=16)


def learner(model: nn.Module, sample: Any, **options: Any) -> Learner:
    torch.manual_seed(1)
    return Learner(model, "super-resolution", sample, method="glcan:3", options=options, optimizer=OPTIMIZER)


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


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("scale", [1, 2, 3, 4])
def test_the_folded_end_is_two_convolutions(scale: int, kernel: int) -> None:
    """In value and gradient, but for the border, where each convolution would pad with zeros of its own."""
    end = FoldedEnd(8, 12, 3, scale, kernel).double()
    assert end.kernel().shape[-2:] == (kernel + 2, kernel + 2)
    folded, plain = (torch.randn(2, 8, 9, 9, dtype=torch.float64).requires_grad_() for _ in range(2))
    plain.data.copy_(folded.data)
    size = torch.tensor(3.0, dtype=torch.float64)
    wide = F.pixel_shuffle(F.conv2d(plain / size, end.expand.weight, padding=kernel // 2), scale)
    images = [
        F.pixel_shuffle(end(folded, size), scale),
        F.conv2d(wide, end.image.weight, end.image.bias, padding=1),
    ]
    inner = [image[:, :, scale:-scale, scale:-scale] for image in images]
    assert torch.allclose(*inner, rtol=1e-12)
    weights = (end.expand.weight, end.image.weight, end.image.bias)
    one, other = (
        torch.autograd.grad(part.square().sum(), (leaf, *weights))
        for part, leaf in zip(inner, (folded, plain), strict=True)
    )
    for mine, theirs in zip(one, other, strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-9, atol=1e-12)


def test_the_last_block_is_long_for_little_more_memory() -> None:
    low = torch.rand(16, 3, 24, 24)
    sample = (low, torch.rand(16, 3, 48, 48))
    torch.manual_seed(0)
    model = create("edsr_baseline", scale=2, blocks=12, channels=16)
    options = {"task": "super-resolution", "sample": sample, "method": "glcan:4", "optimizer": OPTIMIZER}
    short = glcan.plan(model, **options, options={"long_end": 0.0}, baselines=())
    long = glcan.plan(model, **options, baselines=("e2e",))
    e2e = long.baselines["e2e"]
    assert not short.plan.recompute
    last = {unit.name for unit in long.plan.units[-1]}
    assert all(last.issuperset(names) for names in long.plan.recomputed_units)
    assert len(long.plan.units[-1]) > len(short.plan.units[-1])
    assert long.cost.activation_peak_bytes < 1.2 * short.cost.activation_peak_bytes
    assert short.cost.flops < long.cost.flops < short.cost.flops + (0.32 / 3 + 0.02) * e2e.flops


def test_recomputed_units_change_no_gradient() -> None:
    sample = batch(dtype=torch.float64)
    options = {"long_end": 1.0}
    long = learner(network().double(), sample, **options)
    assert any(len(names) > 1 for names in long.plan.recomputed_units)
    plain = Learner(
        network().double(),
        "super-resolution",
        sample,
        method="glcan:3",
        cuts=long.plan.cuts,
        options=options,
        optimizer=OPTIMIZER,
    )
    plain.load_state_dict(long.state_dict())
    assert not plain.plan.recompute
    losses = [mine.backward(*sample) for mine in (long, plain)]
    assert losses[0] == losses[1]
    for mine, other in zip(long.parameters(), plain.parameters(), strict=True):
        assert mine.grad is not None
        assert other.grad is not None
        assert torch.allclose(mine.grad, other.grad, rtol=1e-10, atol=1e-14)


def test_units_are_recomputed_behind_frozen_blocks_too() -> None:
    sample = batch(12)
    mine = learner(network(), sample, long_end=1.0)
    assert mine.plan.recompute
    costs = []
    for frozen in range(3):
        mine.switch(frozen=frozen)
        costs.append(glcan.measure_step(mine, *sample))
    assert costs[0].activation_peak_bytes >= costs[1].activation_peak_bytes >= costs[2].activation_peak_bytes
    assert "forward" not in mine.model.get_submodule(mine.plan.cuts[0]).__dict__


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


def test_both_branches_fit_their_budget() -> None:
    for flops in (1e4, 2.2e4, 3.95e4, 5e4, 1e5):
        kernel, context = fit(64, 3, 2, True, True, flops)
        assert auxiliary_flops(64, 3, 2, kernel, context) <= flops or (kernel, context) == (1, 8)
        assert kernel == 3 or auxiliary_flops(64, 3, 2, 3, 8) > flops
        assert context == 64 or auxiliary_flops(64, 3, 2, kernel, context + 8) > flops
    assert fit(32, 3, 2, True, True, 1e9) == (3, 32)
    assert fit(32, 3, 2, True, False, 1e9) == (3, 0)
    assert fit(32, 3, 2, False, True, 1e9) == (0, 32)


@pytest.mark.parametrize("options", [{"use_local": False}, {"use_global": False}], ids=str)
def test_either_branch_alone(options: dict[str, bool]) -> None:
    sample = batch()
    mine = learner(network(), sample, **options)
    first = mine.step(*sample)
    for _ in range(15):
        last = mine.step(*sample)
    assert all(last[name] < first[name] for name in first)
