"""The learner: equal to plain training where it must be, one step as the other, every parameter in one place."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests import zoo
from tests.learner.models import ADAM, MODELS, MOMENTUM, TINY, Tied, assert_same_state, batches, built
from tests.zoo import Small, assert_equal, gradients
from torch import Tensor, nn
from torch.optim import SGD

from glcan import Learner
from glcan.inspect.isolation import Boundary
from glcan.models import create


@pytest.mark.parametrize("optimizer", [MOMENTUM, ADAM], ids=["sgd", "adamw"])
@pytest.mark.parametrize("method", ["glcan:1", "e2e", "checkpoint", "checkpoint-sqrt"])
@pytest.mark.parametrize("name", ["dropout", "tied", "cifar_resnet20", "vit"])
def test_one_block_is_plain_back_propagation(name: str, method: str, optimizer: Any) -> None:
    build, sample = MODELS[name]
    model, plain = built(build), built(build)
    learner = Learner(model, sample=sample, method=method, optimizer=optimizer)
    assert list(learner.auxiliary.parameters()) == []
    reference = optimizer(plain.parameters())
    # the methods share the code: many steps of one, and some of each
    for step, batch in enumerate(batches(20 if method == "glcan:1" else 4, sample[0].shape[-1])):
        torch.manual_seed(step)
        losses = learner.step(*batch)
        torch.manual_seed(step)
        loss = F.cross_entropy(plain(batch[0]), batch[1])
        loss.backward()
        reference.step()
        reference.zero_grad()
        assert losses == {"block1": loss}
    assert_same_state(model, plain)


@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("name", MODELS)
def test_backward_and_step_agree(name: str, clip: float | None) -> None:
    build, sample = MODELS[name]
    optimizer = partial(SGD, lr=0.05, momentum=0.9) if name != "vit" else ADAM
    stepping, collecting = (
        Learner(built(build), sample=sample, method="glcan:4", optimizer=optimizer, clip_norm=clip) for _ in range(2)
    )
    assert_same_state(stepping.auxiliary, collecting.auxiliary)
    own = [(group.parameters, optimizer(group.parameters)) for group in collecting.groups]
    for seed, batch in enumerate(batches(4, sample[0].shape[-1])):
        torch.manual_seed(seed)
        a = stepping.step(*batch)
        torch.manual_seed(seed)
        b = collecting.backward(*batch)
        assert a == b
        assert list(a) == ["block1", "block2", "block3", "block4"]
        assert all(not loss.requires_grad and loss.dim() == 0 for loss in a.values())
        for group, updater in own:
            if clip is not None:
                nn.utils.clip_grad_norm_(group, clip / len(own) ** 0.5)
            updater.step()
            updater.zero_grad()
        assert all(p.grad is None for p in stepping.parameters()), "gradients are freed"
    assert_same_state(stepping.model, collecting.model)
    assert_same_state(stepping.auxiliary, collecting.auxiliary)


@pytest.mark.parametrize("name", ["cifar_resnet20", "vit", "dropout", "tied", "again"])
def test_backward_gives_the_gradients_of_the_local_losses(name: str) -> None:
    """Each block's loss on one full graph, differentiated with respect to that block's parameters alone."""
    build, sample = MODELS[name]
    model = built(build)
    learner = Learner(model, sample=sample, method="glcan:3")
    twin, auxiliary = copy.deepcopy(model), copy.deepcopy(learner.auxiliary)
    torch.manual_seed(5)
    losses = learner.backward(*sample)
    # the reference: cut by hand
    torch.manual_seed(5)
    cuts = list(learner.plan.cuts)
    wanted: list[Tensor] = []

    def at_cut(cut: str) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any) -> Any:
            k = len(wanted)
            if k < len(cuts) and cut == cuts[k]:
                name = f"block{k + 1}"
                wanted.append(F.cross_entropy(auxiliary[name](Boundary(k, cut, args), sample), sample[1]))
                return tuple(a.detach() for a in args)
            return None

        return hook

    for cut in cuts:
        twin.get_submodule(cut).register_forward_pre_hook(at_cut(cut))
    wanted.append(F.cross_entropy(twin(sample[0]), sample[1]))
    sum(wanted).backward()
    assert list(losses.values()) == [w.detach() for w in wanted]
    if name in ("tied", "again"):  # summed in another order
        for (n, p), (_, q) in zip(model.named_parameters(), twin.named_parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-5, atol=1e-6, msg=n)
    else:
        assert_equal(gradients(model), gradients(twin))
    assert_equal(gradients(learner.auxiliary), gradients(auxiliary))
    assert_equal(dict(model.named_buffers()), dict(twin.named_buffers()))


@pytest.mark.parametrize("method", ["e2e", "glcan:3"])
def test_gradients_add_up_over_calls(method: str) -> None:
    learner = Learner(built(Small).eval(), sample=TINY, method=method)
    learner.backward(*TINY)
    once = {n: g.clone() for n, g in gradients(learner.model).items()}
    learner.backward(*TINY)
    assert_equal(gradients(learner.model), {n: 2 * g for n, g in once.items()})


def test_every_parameter_is_in_one_place() -> None:
    for build, sample in MODELS.values():
        learner = Learner(built(build), sample=sample, method="glcan:4", optimizer=MOMENTUM)
        mine = [id(p) for p in learner.parameters()]
        wanted = {id(p) for m in (learner.model, learner.auxiliary) for p in m.parameters()}
        assert len(mine) == len(set(mine))
        assert set(mine) == wanted
        grouped = [id(p) for o in learner.optimizers for g in o.param_groups for p in g["params"]]
        assert sorted(grouped) == sorted(mine)
        for i, group in enumerate(learner.groups):
            optimizer = learner.optimizer_of(i)
            assert optimizer is not None
            assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(p) for p in group.parameters]


def test_tied_parameters_are_updated_once_by_the_sum() -> None:
    options: dict[str, Any] = {"sample": TINY, "method": "glcan", "cuts": ["b", "c", "d"]}
    learner = Learner(built(Tied), **options, optimizer=partial(SGD, lr=1.0))
    other = Learner(built(Tied), **options)
    other.backward(*TINY)
    before = learner.model.a.a.weight.detach().clone()
    learner.step(*TINY)
    assert torch.equal(before - learner.model.a.a.weight, before - (before - other.model.a.a.weight.grad))
    assert [group.name for group in learner.groups] == ["block1", "block2", "block3", "block4", "tied"]
    assert len(learner.optimizers) == 5


@pytest.mark.parametrize("method", ["glcan:1", "glcan:3"])
@pytest.mark.parametrize("recompute", [True, ["block1"]])
def test_recomputation_inside_blocks_changes_no_bit(method: str, recompute: Any) -> None:
    plain = built(MODELS["cifar_resnet20"][0])
    again = copy.deepcopy(plain)
    batch = torch.randn(6, 3, 32, 32), torch.arange(6)
    learners = []
    for model, wanted in ((plain, False), (again, recompute)):
        torch.manual_seed(1)
        optimizer = partial(SGD, lr=0.1, momentum=0.9)
        learners.append(Learner(model, sample=batch, method=method, recompute=wanted, optimizer=optimizer))
    for _ in range(3):
        losses = [learner.step(*batch) for learner in learners]
        assert_equal(losses[0], losses[1])
    assert_equal(plain.state_dict(), again.state_dict())
    assert_equal(learners[0].auxiliary.state_dict(), learners[1].auxiliary.state_dict())


def test_the_isolation_does_not_look_at_the_optimizer(monkeypatch: pytest.MonkeyPatch) -> None:
    """AdamW and clipping have hundreds of operations, and a look at one takes as long as a small one itself."""
    seen = zoo.watched(monkeypatch)
    counts = []
    for options in ({"optimizer": partial(SGD, lr=0.1)}, {"optimizer": ADAM, "clip_norm": 1.0}):
        learner = Learner(built(Small), sample=TINY, method="glcan", cuts=["b", "d"], **options)
        seen.clear()
        learner.step(*TINY)
        counts.append(len(seen))
    assert counts[0] == counts[1] > 0


def test_groups_are_watched_when_they_are_trained() -> None:
    model = create("cifar_resnet20", num_classes=10)
    batch = torch.randn(6, 3, 32, 32), torch.arange(6)
    learner = Learner(model, sample=batch, method="glcan:3", optimizer=partial(SGD, lr=0.1))
    seen: list[str] = []
    with learner.watched(seen.append):
        learner.step(*batch)
    assert seen == ["block1", "block2", "block3"]
    learner.step(*batch)
    assert len(seen) == 3, "no longer"


@pytest.mark.parametrize("method", ["e2e", "selective", "glcan:4"])
def test_clip_norm_bounds_the_whole_update_of_every_method(method: str) -> None:
    """Four blocks, each clipped to the whole bound, would move twice as far."""
    batch = next(batches(1, 8, images=8))
    learner = Learner(built(Small), sample=batch, method=method, optimizer=partial(SGD, lr=1.0), clip_norm=1e-2)
    before = [p.detach().clone() for p in learner.parameters()]
    learner.step(*batch)
    moved = torch.cat([(p.detach() - old).flatten() for p, old in zip(learner.parameters(), before, strict=True)])
    assert 0.9e-2 < moved.norm() <= 1.001e-2
    # the parameters of the model and of tied groups as well
    tied = Learner(built(Tied), sample=batch, method=method, optimizer=partial(SGD, lr=1.0), clip_norm=1e-2)
    before = [p.detach().clone() for p in tied.parameters()]
    tied.step(*batch)
    moved = torch.cat([(p.detach() - old).flatten() for p, old in zip(tied.parameters(), before, strict=True)])
    assert 0.9e-2 < moved.norm() <= 1.001e-2
