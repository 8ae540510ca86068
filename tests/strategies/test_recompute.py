"""Activation checkpointing: bit-equal to plain back-propagation, with less memory, and nothing left behind."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests import zoo
from tests.zoo import Small, assert_equal, gradients
from torch import Tensor, nn

from glcan import LocalLearner
from glcan.strategies.recompute import checkpointed, in_parts, large_end, segments_of, square_root
from glcan.cost.step import LiveMemory
from glcan.models import create
from glcan.inspect.record import profile


class WithDropout(Small):
    def body(self, x: Tensor) -> Tensor:
        return self.d(F.dropout(self.c(self.b(F.dropout(self.a(x), 0.2)))))


class _UnitWithDropout(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(8, 8, 3, 1, 1), nn.BatchNorm2d(8)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop(F.relu(self.norm(self.conv(x)), inplace=True))


class DropoutInside(Small):
    unit = _UnitWithDropout


class CumulativeAverage(Small):
    def __init__(self) -> None:
        super().__init__()
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = None


MODELS: dict[str, Callable[[], nn.Module]] = {
    "small": Small,
    "dropout": WithDropout,
    "dropout inside": DropoutInside,
    "cumulative": CumulativeAverage,
    "cifar_resnet20": lambda: create("cifar_resnet20", num_classes=10),
    "vit": lambda: zoo.timm("vit_tiny_patch16_224", img_size=32, patch_size=8, num_classes=10, depth=3, drop_rate=0.1),
    "densenet": lambda: create("torchvision/densenet121", num_classes=10),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("segments", [None, "sqrt", 2])
def test_bit_equal_to_plain_back_propagation(name: str, segments: Any) -> None:
    model, batch = MODELS[name]().train(), zoo.images(2, 32)
    plain = copy.deepcopy(model)
    found = profile(model, (batch,))
    runs = segments_of(found, square_root(found) if segments == "sqrt" else segments)
    before = {m: dict(m.__dict__) for m in model.modules()}
    for _ in range(2):  # the second pass has statistics from the first one
        torch.manual_seed(3)
        with checkpointed(model, runs):
            output = model(batch)
        F.cross_entropy(output, torch.tensor([1, 2])).backward()
        torch.manual_seed(3)
        F.cross_entropy(plain(batch), torch.tensor([1, 2])).backward()
    assert_equal(gradients(model), gradients(plain))
    assert_equal(dict(model.named_buffers()), dict(plain.named_buffers()))
    for module, attributes in before.items():
        assert attributes.keys() == module.__dict__.keys()


def test_a_unit_that_writes_into_its_input() -> None:
    torch.manual_seed(0)
    classifier = nn.Sequential(nn.Dropout(0.5, inplace=True), nn.Linear(8, 3))
    model = nn.Sequential(nn.Linear(4, 8), classifier).train()
    images = torch.randn(6, 4)

    def gradients() -> list[torch.Tensor]:
        torch.manual_seed(1)
        return list(torch.autograd.grad(model(images).square().sum(), list(model.parameters())))

    wanted = gradients()
    with checkpointed(model, [["0"], ["1"]]):
        assert all(torch.equal(found, other) for found, other in zip(gradients(), wanted, strict=True))


def test_it_recomputes_and_saves_memory() -> None:
    model, batch = create("cifar_resnet32", num_classes=10), zoo.images(4, 32)
    found = profile(model, (batch,))

    def cost(runs: list[list[str]]) -> tuple[int, int]:
        model.zero_grad()
        with LiveMemory(model, inputs=batch) as memory:
            with checkpointed(model, runs):
                output = model(batch)
            output.sum().backward()
        return memory.activation_peak_bytes, memory.flops

    plain, each, root = cost([]), cost(segments_of(found)), cost(segments_of(found, square_root(found)))
    assert each[0] < 0.45 * plain[0]
    assert root[0] < 0.45 * plain[0]
    assert 1.2 * plain[1] < each[1] < 1.4 * plain[1]
    assert 1.2 * plain[1] < root[1] < 1.4 * plain[1]


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


def test_an_exception_and_a_forward_that_was_there_leave_nothing() -> None:
    model, batch = Small(), zoo.images(2, 8)
    mine = model.b.forward
    model.b.forward = lambda x: mine(x) * 2  # type: ignore[method-assign]
    override = model.b.__dict__["forward"]
    wanted = model.eval()(batch)
    runs = segments_of(profile(model, (batch,)), 1)
    with pytest.raises(RuntimeError), checkpointed(model, runs):
        assert torch.equal(model(batch), wanted)
        model(batch[:, :2])
    assert model.b.__dict__["forward"] is override
    assert [n for n, m in model.named_modules() if "forward" in m.__dict__] == ["b"]
    with pytest.raises(AttributeError), checkpointed(model, [["a"], ["nowhere"]]):
        pass
    assert [n for n, m in model.named_modules() if "forward" in m.__dict__] == ["b"]


def test_a_failing_recomputation_puts_the_statistics_back() -> None:
    model, batch = Small(), zoo.images(2, 8)
    with checkpointed(model, [["a"]]):
        output = model(batch)
    calls = model.a.norm.register_forward_hook(lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        output.sum().backward()
    calls.remove()
    assert model.a.norm.momentum == 0.1
    assert model.a.norm.num_batches_tracked == 1


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
        with meter, in_parts(twin, run, count):
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
    mine = LocalLearner(enlarging(4), "super-resolution", sample, cuts=["body.1", "tail.0.2"])
    assert mine.profile.parted[0] == "tail.0.2"
    assert "tail.1" not in mine.profile.cuttable
    torch.manual_seed(1)
    whole = LocalLearner(enlarging(4), "super-resolution", sample, cuts=["body.1", "tail.0.2"])
    whole.profile = dataclasses.replace(whole.profile, parted=())
    assert mine.backward(*sample)["block3"] == pytest.approx(float(whole.backward(*sample)["block3"]), rel=1e-12)
    for one, other in zip(mine.parameters(), whole.parameters(), strict=True):
        assert one.grad is not None
        assert other.grad is not None
        assert torch.allclose(one.grad, other.grad, rtol=1e-9, atol=1e-13)
    inside = LocalLearner(enlarging(4), "super-resolution", sample, cuts=["body.1", "tail.1"])
    assert inside.profile.parted == ()
    assert LocalLearner(enlarging(4), "super-resolution", sample, rule="e2e").profile.parted == ()
