"""Which units are recomputed together, and the end of a network that is run some images at a time."""

from __future__ import annotations

import copy

import pytest
import torch
from tests import zoo
from tests.zoo import Small
from torch import Tensor, nn

from glcan import Learner, LiveMemory, profile
from glcan.models import create
from glcan.strategies.recompute import Recomputation
from glcan.strategies.segments import large_end, segments_of, square_root


def test_segments_begin_at_weights_and_cover_the_chain() -> None:
    found = profile(create("cifar_resnet20", num_classes=10), (zoo.images(2, 32),))
    for count in (None, 1, 2, 3, 100):
        runs = segments_of(found, count)
        flat = [name for run in runs for name in run]
        assert flat == [name for name in found.names if name in flat], "in order, each once"
        assert {u.name for u in found.units if u.weights} <= set(flat)
        assert all(found.unit(run[0]).weights for run in runs)
    assert len(segments_of(found, 3)) in (3, 4, 5)
    assert len(segments_of(found, 1)) < len(segments_of(found, 3)) < len(segments_of(found))


def test_a_unit_behind_a_skip_joins_no_run() -> None:
    class Skips(Small):
        def body(self, x: Tensor) -> Tensor:
            y = self.b(self.a(x))
            return self.d(self.c(y) + y)

    runs = segments_of(profile(Skips(), (zoo.images(2, 8),)), 1)
    assert not any({"b", "c"} <= set(run) or {"c", "d"} <= set(run) for run in runs)


def test_about_the_square_root_of_the_units_are_segments() -> None:
    found = profile(create("cifar_resnet32", num_classes=10), (zoo.images(2, 32),))
    assert square_root(found) == 4  # of 17 with weights
    assert 3 <= len(segments_of(found, square_root(found))) <= 6


# -- the end of a network in parts -------------------------------------------------------------------------------------


def enlarging(scale: int) -> nn.Module:
    torch.manual_seed(0)
    return create("edsr_baseline", scale=scale, blocks=6, channels=8).double()


def test_the_tail_begins_at_the_last_step_of_an_upsampler() -> None:
    low = torch.rand(2, 3, 12, 12, dtype=torch.float64)
    found = {scale: profile(enlarging(scale), (low,)) for scale in (2, 4)}
    assert large_end(enlarging(4), found[4]) == ("tail.0.2", "tail.0.3", "tail.1", "add_mean")
    many = create("edsr_baseline", scale=2, blocks=96, channels=8)
    assert large_end(many, profile(many, (low.float(),))) == ()  # too little of the whole


def test_a_tail_with_batch_normalisation_stays_whole() -> None:
    model = enlarging(4)
    model.tail = nn.Sequential(*model.tail[0], nn.BatchNorm2d(8), model.tail[1]).double()
    assert large_end(model, profile(model, (torch.rand(2, 3, 12, 12, dtype=torch.float64),))) == ()


@pytest.mark.parametrize("count", [1, 5, 16])
def test_parts_change_no_gradient_and_hold_less(count: int) -> None:
    low = torch.rand(count, 3, 12, 12, dtype=torch.float64)
    model = enlarging(4)
    tail = large_end(model, profile(model, (low,)))
    found = []
    for run in ((), tail):
        twin = copy.deepcopy(model)
        before = {name: vars(module).get("forward") for name, module in twin.named_modules()}
        meter = LiveMemory(twin, inputs=low)
        with meter, Recomputation(twin, [run], count).applied():
            output = twin(low)
            output.square().mean().backward()
        assert {name: vars(module).get("forward") for name, module in twin.named_modules()} == before
        found.append((output, [p.grad for p in twin.parameters()], meter.activation_peak_bytes))
    (output, gradients, peak), (parted, others, less) = found
    assert torch.equal(output, parted)
    for mine, other in zip(gradients, others, strict=True):
        assert mine is not None
        assert other is not None
        assert torch.allclose(mine, other, rtol=1e-10, atol=1e-13)
    if count == 16:
        assert less < 0.7 * peak


def test_blocks_run_the_large_end_unless_a_cut_is_inside() -> None:
    sample = torch.rand(8, 3, 12, 12, dtype=torch.float64), torch.rand(8, 3, 48, 48, dtype=torch.float64)
    torch.manual_seed(1)
    mine = Learner(enlarging(4), "super-resolution", sample, method="glcan", cuts=["body.1", "tail.0.2"])
    assert mine.profile.parted[0] == "tail.0.2"
    assert "tail.1" not in mine.profile.cuttable
    torch.manual_seed(1)
    whole = Learner(enlarging(4), "super-resolution", sample, method="glcan", cuts=["body.1", "tail.0.2"])
    whole._pass._in_parts = Recomputation(whole.model, [])
    assert mine.backward(*sample)["block3"] == pytest.approx(float(whole.backward(*sample)["block3"]), rel=1e-12)
    for one, other in zip(mine.parameters(), whole.parameters(), strict=True):
        assert one.grad is not None
        assert other.grad is not None
        assert torch.allclose(one.grad, other.grad, rtol=1e-9, atol=1e-13)
    inside = Learner(enlarging(4), "super-resolution", sample, method="glcan", cuts=["body.1", "tail.1"])
    assert inside.profile.parted == ()
    assert Learner(enlarging(4), "super-resolution", sample, method="e2e").profile.parted == ()
