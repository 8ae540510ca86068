"""Going on with another method or phase: what is trained, with which gradients, and whose optimizer state stays."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from tests.learner.models import ADAM, MODELS, MOMENTUM, TINY, Tied, built
from tests.zoo import Small, assert_equal, gradients
from torch import nn
from torch.optim import SGD

from glcan import Learner, measure_step
from glcan.errors import ConfigError, UnknownName

# -- frozen blocks -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["small", "dropout", "tied", "cifar_resnet20", "vit"])
def test_frozen_blocks_only_run_forward(name: str) -> None:
    """The others get the very same gradients, and parameters that are used in both kinds those of the others."""
    build, sample = MODELS[name]
    learners = [Learner(built(build), sample=sample, method="glcan:3", optimizer=MOMENTUM) for _ in range(2)]
    plain, mine = learners
    mine.auxiliary.load_state_dict(plain.auxiliary.state_dict())
    mine.switch(frozen=1)
    losses = []
    for learner in learners:
        torch.manual_seed(3)
        losses.append(learner.backward(*sample))
    assert list(losses[1]) == ["block2", "block3"]
    assert all(torch.equal(loss, losses[0][key]) for key, loss in losses[1].items())
    assert torch.is_grad_enabled()
    assert [g.name for g in mine.groups] == [g.name for g in plain.groups]
    assert mine.groups[0].parameters
    assert all(p.grad is None for p in mine.groups[0].parameters)
    for one, other in zip(plain.groups[1:3], mine.groups[1:3], strict=True):
        for p, q in zip(one.parameters, other.parameters, strict=True):
            assert torch.equal(p.grad, q.grad)
    assert all(p.grad is not None for group in mine.groups[3:] for p in group.parameters), "tied ones"

    costs = []
    for frozen in range(3):
        mine.switch(frozen=frozen)
        costs.append(measure_step(mine, *sample))
    assert costs[0].flops > costs[1].flops > costs[2].flops
    assert costs[0].activation_peak_bytes >= costs[1].activation_peak_bytes >= costs[2].activation_peak_bytes


def test_frozen_blocks_stay_as_they_are() -> None:
    learner = Learner(built(Small), sample=TINY, method="glcan:3", optimizer=MOMENTUM, clip_norm=1.0)
    learner.switch(frozen=1)
    before = [p.detach().clone() for p in learner.groups[0].parameters]
    trained: list[str] = []
    with learner.watched(trained.append):
        learner.step(*TINY)
    assert trained == ["block2", "block3"]
    assert all(torch.equal(p, old) for p, old in zip(learner.groups[0].parameters, before, strict=True))


@pytest.mark.parametrize("frozen", [-1, 2])
def test_the_last_block_is_never_frozen(frozen: int) -> None:
    learner = Learner(Small(), sample=TINY, method="glcan:2")
    with pytest.raises(ConfigError, match=f"frozen is {frozen}, but of 2 blocks 0 to 1 can be frozen"):
        learner.switch(frozen=frozen)
    learner.backward(*TINY)


@pytest.mark.parametrize("end_to_end", [False, True])
def test_thawed_blocks_have_the_gradients_of_blocks_never_frozen(end_to_end: bool) -> None:
    build, sample = MODELS["cifar_resnet20"]
    thawed, never = (Learner(built(build), sample=sample, method="glcan:3") for _ in range(2))
    thawed.switch(frozen=2)
    thawed.backward(*sample)
    for mine in (thawed, never):
        mine.switch(end_to_end=end_to_end)
        mine.model.load_state_dict(built(build).state_dict())
        for parameter in (*mine.model.parameters(), *mine.auxiliary.parameters()):
            parameter.grad = None
        mine.backward(*sample)
    for ours, theirs in zip(thawed.model.parameters(), never.model.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)


# -- end-to-end steps of local learning ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(MODELS))
def test_end_to_end_gradients_are_those_of_back_propagation(name: str) -> None:
    """Those of the model; the auxiliary networks get the ones that they get when blocks learn by themselves."""
    build, sample = MODELS[name]
    local, mine = (Learner(built(build), sample=sample, method="glcan:3") for _ in range(2))
    plain = built(build)
    mine.auxiliary.load_state_dict(local.auxiliary.state_dict())
    mine.switch(end_to_end=True)
    called: list[str] = []
    losses = []
    with mine.watched(called.append):
        for learner in (local, mine):
            torch.manual_seed(3)
            losses.append(learner.backward(*sample))
    torch.manual_seed(3)
    loss = nn.functional.cross_entropy(plain(sample[0]), sample[1])
    loss.backward()
    assert losses[1]["block3"] == loss
    assert losses[0] == losses[1]
    assert called == [group.name for group in mine.groups]
    assert_equal(gradients(mine.model), gradients(plain))
    assert_equal(gradients(mine.auxiliary), gradients(local.auxiliary))


def test_end_to_end_steps_need_the_memory_of_checkpointing_and_no_block_frozen() -> None:
    build, sample = MODELS["cifar_resnet20"]
    mine = Learner(built(build), sample=sample, method="glcan:3", optimizer=MOMENTUM)
    checkpoint, plain = (Learner(built(build), sample=sample, method=m) for m in ("checkpoint", "e2e"))
    mine.switch(end_to_end=True)
    activations = measure_step(mine, *sample).activation_peak_bytes
    assert activations <= 1.1 * measure_step(checkpoint, *sample).activation_peak_bytes
    assert activations < 0.6 * measure_step(plain, *sample).activation_peak_bytes
    with pytest.raises(ConfigError, match="frozen is 1, but end_to_end trains every block"):
        mine.switch(frozen=1, end_to_end=True)


def test_end_to_end_clips_each_block_and_scales_for_float16() -> None:
    plain_sgd = partial(SGD, lr=1.0)
    clipped = Learner(built(Small), sample=TINY, method="glcan:3", optimizer=plain_sgd, clip_norm=0.1)
    clipped.switch(end_to_end=True)
    before = [[p.detach().clone() for p in group.parameters] for group in clipped.groups]
    clipped.step(*TINY)
    for group, old in zip(clipped.groups, before, strict=True):
        moved = torch.cat([(p.detach() - o).flatten() for p, o in zip(group.parameters, old, strict=True)])
        assert moved.norm() == pytest.approx(0.1 / 3**0.5, rel=1e-3)
    scaled = Learner(built(Small), sample=TINY, method="glcan:3")
    scaled.switch(end_to_end=True)
    scaled.backward(*TINY, scaler=torch.amp.GradScaler("cpu", init_scale=8.0))
    plain = Learner(built(Small), sample=TINY, method="e2e")
    plain.backward(*TINY)
    for one, other in zip(scaled.model.parameters(), plain.model.parameters(), strict=True):
        assert torch.allclose(one.grad, 8 * other.grad, rtol=1e-4, atol=1e-6)


# -- another method ------------------------------------------------------------------------------------------------


def _states(learner: Learner) -> dict[int, dict[str, Any]]:
    return {id(p): dict(s) for optimizer in learner.optimizers for p, s in optimizer.state.items()}


@pytest.mark.parametrize("optimizer", [MOMENTUM, ADAM], ids=["sgd", "adamw"])
def test_optimizer_state_stays_with_its_parameters(optimizer: Any) -> None:
    model = built(Small)
    learner = Learner(model, sample=TINY, method="e2e", optimizer=optimizer)
    own = {id(p) for p in model.parameters()}
    blocks = {"glcan:4": 4, "checkpoint": 1, "selective": 1, "dgl:3": 3, "e2e": 1}
    for method, count in blocks.items():
        learner.step(*TINY)
        before = _states(learner)
        assert own <= before.keys()
        learner.switch(method)
        assert str(learner.method) == method
        assert learner.plan.blocks == len(learner.groups) == len(learner.optimizers) == count
        after = _states(learner)
        assert after.keys() == own, "auxiliary networks that are gone leave nothing"
        for key, state in after.items():
            assert state.keys() == before[key].keys()
            assert all(state[name] is before[key][name] for name in state)
        grouped = [id(p) for o in learner.optimizers for g in o.param_groups for p in g["params"]]
        assert sorted(grouped) == sorted(id(p) for p in learner.parameters())
    learner.step(*TINY)


def test_a_switch_goes_on_as_the_other_method_does() -> None:
    """One step of e2e and then glcan:4 and checkpoint: what plain torch, and a learner of its own, do from there."""
    model, plain = built(Small), built(Small)
    learner = Learner(model, sample=TINY, method="e2e", optimizer=MOMENTUM)
    reference = MOMENTUM(plain.parameters())

    def plain_step() -> None:
        nn.functional.cross_entropy(plain(TINY[0]), TINY[1]).backward()
        reference.step()
        reference.zero_grad()

    learner.step(*TINY)
    plain_step()
    assert_equal(dict(model.state_dict()), dict(plain.state_dict()))
    learner.switch("checkpoint")
    learner.step(*TINY)
    plain_step()
    assert_equal(dict(model.state_dict()), dict(plain.state_dict()))
    learner.switch("glcan:4")
    learner.switch(end_to_end=True)
    learner.step(*TINY)
    plain_step()
    assert_equal(dict(model.state_dict()), dict(plain.state_dict()))
    learner.switch()
    assert list(learner.step(*TINY)) == ["block1", "block2", "block3", "block4"]
    assert not torch.equal(model.stem.weight, plain.stem.weight)


def test_the_same_method_keeps_its_networks_and_another_one_has_its_own() -> None:
    learner = Learner(built(Tied), sample=TINY, method="glcan", cuts=["b", "c", "d"], options={"budget": 0.2})
    networks = dict(learner.auxiliary)
    learner.switch("glcan", frozen=1)
    assert dict(learner.auxiliary) == networks
    assert learner.strategy.rule.config.budget == 0.2
    learner.switch("glcan:3")
    assert learner.strategy.rule.config.budget == 0.07, "options are of the method that they were given for"
    assert learner.plan.blocks == 3
    learner.switch("glcan:3+accumulate:2")
    assert learner.plan.blocks == 3
    assert learner.profile.batch == 2
    assert list(learner.backward(*TINY)) == ["block1", "block2", "block3"]


@pytest.mark.parametrize("method", ["e2e", "checkpoint", "selective"])
@pytest.mark.parametrize("phase", [{"frozen": 1}, {"end_to_end": True}], ids=str)
def test_phases_are_for_local_learning(method: str, phase: dict[str, Any]) -> None:
    learner = Learner(built(Small), sample=TINY, method=method)
    with pytest.raises(ConfigError, match="is for local learning alone"):
        learner.switch(**phase)
    learner.backward(*TINY)


def test_a_method_that_cannot_be_is_refused() -> None:
    learner = Learner(built(Small), sample=TINY, method="glcan:2")
    with pytest.raises(UnknownName, match="method 'glcn'"):
        learner.switch("glcn:2")
    with pytest.raises(ConfigError, match="has phases, which belong to a whole run"):
        Learner(built(Small), sample=TINY, method="glcan:2+start:0.3")
    for method in ("glcan:2+freeze", "glcan:2+finish:0.1"):
        with pytest.raises(ConfigError, match=r"build a learner with 'glcan:2' and call switch\(\)"):
            Learner(built(Small), sample=TINY, method=method)
