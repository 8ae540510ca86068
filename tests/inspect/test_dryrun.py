"""Dry runs: fake where possible, the real model put back where not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests import zoo
from tests.zoo import Small, assert_equal, gradients
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from glcan.errors import GradientLeak
from glcan.inspect.dryrun import UntouchedParameters, dry_run, fake_copy, uninitialized


def test_a_fake_copy_keeps_ties_and_modes() -> None:
    model = Small()
    model.c.a.weight = model.a.a.weight
    model.b.eval()
    model.d.requires_grad_(False)
    twin, batch = fake_copy(model, {"x": [zoo.images(2, 8)], "n": 3}, FakeTensorMode(allow_non_fake_inputs=True))
    assert all(isinstance(t, FakeTensor) for t in (*twin.parameters(), *twin.buffers(), batch["x"][0]))
    assert batch["n"] == 3
    assert twin.c.a.weight is twin.a.a.weight
    assert not twin.b.training
    assert [p.requires_grad for p in twin.parameters()] == [p.requires_grad for p in model.parameters()]
    assert [n for n, _ in twin.named_parameters()] == [n for n, _ in model.named_parameters()]
    assert not any(isinstance(p, FakeTensor) for p in model.parameters())


def test_what_a_fake_run_gives() -> None:
    model = Small()
    batch = (zoo.images(2, 8),)
    rng = torch.get_rng_state()

    def use(twin: nn.Module, batch: Any) -> tuple[int, ...]:
        twin(batch[0]).sum().backward()
        torch.rand(3)
        return tuple(twin(batch[0]).shape)

    assert dry_run(model, batch, use) == (2, 10)
    assert torch.equal(torch.get_rng_state(), rng)
    assert not gradients(model)
    assert model.a.norm.num_batches_tracked == 0


def test_the_real_run_is_undone() -> None:
    model, batch = Small(), zoo.images(2, 8)
    model.head.weight.grad = mine = torch.ones_like(model.head.weight)
    before = {name: b.clone() for name, b in model.named_buffers()}
    kept, rng = batch.clone(), torch.get_rng_state()

    def use(twin: nn.Module, given: Tensor) -> float:
        given.add_(1)
        loss = twin(given).sum()
        loss.item()
        assert not gradients(twin)
        loss.backward()
        twin.eval()
        torch.rand(3)
        return 1.5

    assert dry_run(model, batch, use) == 1.5
    assert torch.equal(batch, kept)
    assert torch.equal(torch.get_rng_state(), rng)
    assert_equal(dict(model.named_buffers()), before)
    assert model.head.weight.grad is mine
    assert len(gradients(model)) == 1
    assert all(m.training for m in model.modules())


def test_errors_of_the_real_run_come_through_and_are_undone() -> None:
    model = Small()

    def use(twin: nn.Module, batch: Tensor) -> None:
        twin(batch)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        dry_run(model, zoo.images(2, 8), use)
    assert model.a.norm.num_batches_tracked == 0


def test_a_leak_is_not_looked_for_twice() -> None:
    seen = []

    def use(twin: nn.Module, batch: Tensor) -> None:
        seen.append(type(batch))
        raise GradientLeak("found")

    with pytest.raises(GradientLeak):
        dry_run(Small(), zoo.images(2, 8), use)
    assert seen == [FakeTensor]


def test_a_model_that_cannot_be_copied_is_run_for_real() -> None:
    model = Small()
    model.state = model.stem.weight * 2  # no leaf: deepcopy refuses it
    assert dry_run(model, zoo.images(2, 8), lambda m, b: m is model and type(b) is Tensor)


def test_a_real_run_on_a_few_images_is_said() -> None:
    model, batch = Small(), zoo.images(8, 8)
    seen: list[tuple[type, int]] = []

    def use(twin: nn.Module, given: Tensor) -> float:
        seen.append((type(given), len(given)))
        return twin(given).sum().item()

    with pytest.warns(UserWarning, match=r"Small cannot be looked at without computing \(DataDependentOutputEx.*a few"):
        dry_run(model, batch, use, few=batch[:2])
    assert seen == [(FakeTensor, 8), (Tensor, 2)]
    dry_run(model, batch, use)  # no warning where the whole batch is asked for
    assert seen[2:] == [(FakeTensor, 8), (Tensor, 8)]
    assert dry_run(model, batch, lambda twin, given: len(given), few=batch[:2]) == 8, "nor where nothing is computed"


def test_errors_of_a_few_images_come_through_without_a_warning() -> None:
    def use(twin: nn.Module, given: Tensor) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        dry_run(Small(), batch := zoo.images(4, 8), use, few=batch[:2])


def test_a_model_in_eval_mode_is_looked_at_in_train_mode() -> None:
    seen: list[list[bool]] = []

    def use(twin: nn.Module, given: Tensor) -> None:
        seen.append([twin.training, twin.b.training, twin.c.training])
        twin(given).sum().item()  # once more, for real

    model = Small().eval()
    dry_run(model, zoo.images(2, 8), use)
    assert not any(m.training for m in model.modules())
    model.train()
    model.b.eval()  # frozen statistics: what its owner set stays
    dry_run(model, zoo.images(2, 8), use)
    assert seen == [[True, True, True]] * 2 + [[True, False, True]] * 2
    assert not model.b.training


def test_a_fake_copy_of_a_model_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = Small()
    model.c.a.weight = model.a.a.weight
    model.d.requires_grad_(False)
    found = dry_run(model, zoo.images(2, 8), lambda twin, batch: (twin, twin(batch)))
    assert {p.device.type for p in (*found[0].parameters(), *found[0].buffers(), found[1])} == {"cpu"}
    assert found[0].c.a.weight is found[0].a.a.weight
    assert [p.requires_grad for p in found[0].parameters()] == [p.requires_grad for p in model.parameters()]
    assert all(p.is_meta for p in model.parameters())


def test_uninitialized_models_draw_nothing() -> None:
    generator = torch.get_rng_state()
    with uninitialized():
        made = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 4))
    assert torch.equal(torch.get_rng_state(), generator)
    assert [tuple(p.shape) for p in made.parameters()] == [(8, 3, 3, 3), (8,), (8,), (8,), (4, 8), (4,)]
    again = nn.Linear(8, 4)
    assert not torch.equal(torch.get_rng_state(), generator)
    assert again.weight.abs().max() < 1


def test_parameters_that_nobody_writes_into() -> None:
    draw = torch.random.get_rng_state()
    with UntouchedParameters():
        layer = nn.Linear(3, 2)
        nn.init.constant_(layer.weight, 7.0)
        layer.bias.requires_grad_(False)
        plain = torch.zeros(2).add_(1)
    assert torch.equal(torch.random.get_rng_state(), draw)
    assert not (layer.weight == 7).any()
    assert not layer.bias.requires_grad
    assert torch.equal(plain, torch.ones(2))
    nn.init.constant_(layer.weight, 7.0)
    assert (layer.weight == 7).all()
