"""What every strategy keeps, on every task: one table of settings (`tests.strategies.settings`) drives all of it."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from tests.strategies.settings import (
    BATCHES,
    FAMILIES,
    OPTIONS,
    SETTINGS,
    every_setting,
    every_strategy,
    learner,
    model_of,
    served,
)
from tests.zoo import assert_equal, gradients
from torch import Tensor, nn

import glcan
from glcan import Learner
from glcan.auxiliary import names as rules
from glcan.strategies import create, family_of, names, parse_method, summary_of
from glcan.tasks import TASKS


def test_the_table_is_complete() -> None:
    assert names()[:4] == ["e2e", "checkpoint", "checkpoint-sqrt", "selective"]
    assert names()[4] == "glcan"
    assert glcan.methods() == names()
    assert set(BATCHES) == set(FAMILIES) == set(TASKS)
    assert set(OPTIONS) <= set(names())
    tried = {(parse_method(s.values[0]).base, s.values[2]) for s in SETTINGS}
    assert tried == {(name, task) for name in names() for task in served(name)}
    for name in ("e2e", "checkpoint", "checkpoint-sqrt", "selective", "glcan"):
        assert set(served(name)) == set(TASKS)
    for name in names():
        assert summary_of(name)
        assert family_of(name) == create(f"{name}:4" if name in rules() else name, served(name)[0]).family


def named(mine: Learner) -> dict[str, nn.Parameter]:
    own = {f"model.{name}": p for name, p in mine.model.named_parameters()}
    return own | {f"auxiliary.{name}": p for name, p in mine.auxiliary.named_parameters()}


def all_gradients(mine: Learner) -> dict[str, Tensor]:
    return {name: p.grad for name, p in named(mine).items() if p.grad is not None}


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@every_setting
def test_the_contract(method: str, options: dict[str, Any], task: str, family: str) -> None:
    mine = learner(method, task, family, options=options)
    batch = BATCHES[task]()
    local = family_of(mine.method.base) == "local"
    blocks = [f"block{i}" for i in range(1, (4 if local else 1) + 1)]
    assert mine.plan.blocks == len(blocks)
    assert list(mine.auxiliary) == blocks[:-1]
    assert all(p.requires_grad for p in mine.auxiliary.parameters())
    assert repr(mine).startswith(f"{method} ({mine.strategy.family}) of {type(mine.model).__name__}: ")

    # every trainable parameter, auxiliary or not, is in exactly one optimizer and gets a gradient
    grouped = [id(p) for o in mine.optimizers for g in o.param_groups for p in g["params"]]
    parameters = named(mine)
    assert sorted(grouped) == sorted(id(p) for p in parameters.values())
    first = mine.backward(*batch)
    assert list(first) == blocks
    assert all(loss.dim() == 0 and not loss.requires_grad for loss in first.values())
    assert set(all_gradients(mine)) == set(parameters)
    for parameter in parameters.values():
        parameter.grad = None

    # the loss of a fixed batch falls in every block
    for _ in range(12):
        last = mine.step(*batch)
    assert all(last[name] < first[name] for name in blocks), (first, last)
    assert all(p.grad is None for p in parameters.values())


@every_setting
def test_resumption_is_bit_for_bit(method: str, options: dict[str, Any], task: str, family: str) -> None:
    mine, batch = learner(method, task, family, options=options), BATCHES[task]()
    for _ in range(2):
        mine.step(*batch)
    state = through_a_file(copy.deepcopy(mine.state_dict()))
    torch.manual_seed(11)
    wanted = [mine.step(*batch) for _ in range(2)]
    fresh = learner(method, task, family, options=options)
    with torch.no_grad():
        for tensor in (*fresh.model.state_dict().values(), *fresh.auxiliary.state_dict().values()):
            tensor.zero_()
    fresh.load_state_dict(state)
    torch.manual_seed(11)
    assert [fresh.step(*batch) for _ in range(2)] == wanted
    assert_equal(dict(fresh.model.state_dict()), dict(mine.model.state_dict()))
    assert_equal(dict(fresh.auxiliary.state_dict()), dict(mine.auxiliary.state_dict()))


@every_strategy
def test_a_gradient_scaler(method: str, task: str) -> None:
    plain, scaled = learner(method, task), learner(method, task)
    batch, scaler = BATCHES[task](), torch.amp.GradScaler("cpu", init_scale=2.0**10)
    assert plain.backward(*batch) == scaled.backward(*batch, scaler=scaler)
    before = {name: p.detach().clone() for name, p in named(scaled).items()}
    wanted = all_gradients(plain)
    for name, gradient in all_gradients(scaled).items():
        tolerance = 1e-5 * float(wanted[name].abs().max()) + 1e-9
        torch.testing.assert_close(gradient, wanted[name] * 2**10, rtol=1e-4, atol=2**10 * tolerance)
    optimizer = torch.optim.SGD(scaled.parameters(), lr=0.1)
    scaler.step(optimizer)
    scaler.update()
    for name, parameter in named(scaled).items():
        torch.testing.assert_close(parameter.detach(), before[name] - 0.1 * wanted[name], rtol=1e-4, atol=1e-5)
    assert any(not torch.equal(p, before[name]) for name, p in named(scaled).items())


class _Reached:
    """In place of a gradient scaler: notes which parameters each loss would reach."""

    def __init__(self) -> None:
        self.parameters: list[set[int]] = []

    def scale(self, loss: Tensor) -> Tensor:
        found: set[int] = set()
        seen, nodes = set(), [loss.grad_fn]
        while nodes:
            node = nodes.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            if hasattr(node, "variable"):
                found.add(id(node.variable))
            nodes += [following for following, _ in node.next_functions]
        self.parameters.append(found)
        return loss


@every_strategy
def test_no_gradient_crosses_a_cut(method: str, task: str) -> None:
    mine, reached = learner(method, task, leak_check=False), _Reached()
    mine.backward(*BATCHES[task](), scaler=reached)
    assert len(reached.parameters) == mine.plan.blocks
    if mine.plan.blocks == 1:
        return
    model = {id(p) for p in mine.model.parameters()}
    for group, found in zip(mine.groups, reached.parameters, strict=True):
        own = {id(p) for p in group.parameters}
        assert found & own & model, "it trains its block"
        assert found <= own, "and nothing else"


def _tied(task: str) -> tuple[nn.Module, nn.Module, str, str]:
    """A model, the same one with weights used at both ends, and the names of these."""
    apart = model_of(task)
    first, last = {
        "classification": ("a.a.weight", "d.a.weight"),
        "super-resolution": ("body.0.body.0.weight", "body.4.body.0.weight"),
        "detection": ("backbone.body.layer2.0.conv2.weight", "backbone.body.layer2.1.conv2.weight"),
    }[task]
    weights = dict(apart.named_parameters())
    weights[last].data.copy_(weights[first].data)
    tied = copy.deepcopy(apart)
    tied.get_submodule(last.rpartition(".")[0]).weight = tied.get_parameter(first)
    return apart, tied, first, last


@every_strategy
def test_tied_weights_get_the_sum_of_their_uses(method: str, task: str) -> None:
    apart, tied, first, last = _tied(task)
    free = learner(method, task, model=apart)
    cuts = list(free.plan.cuts) or None
    both = learner(method, task, model=tied, cuts=cuts, recompute=free.plan.recompute if cuts else False)
    if both.auxiliary:
        both.auxiliary.load_state_dict(free.auxiliary.state_dict())
    for mine in (free, both):
        torch.manual_seed(2)
        mine.backward(*BATCHES[task]())
    found, wanted = gradients(tied), gradients(apart)
    wanted[first] = wanted[first] + wanted.pop(last)
    assert found.keys() == wanted.keys()
    for name, gradient in found.items():
        tolerance = 1e-5 * float(wanted[name].abs().max()) + 1e-9
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-4, atol=tolerance, msg=name)
    owners = [group.name for group in both.groups if any(p is tied.get_parameter(first) for p in group.parameters)]
    assert len(owners) == 1, "updated once"


@every_strategy
def test_parts_of_a_batch_add_up(method: str, task: str) -> None:
    """Accumulation is the mean over the parts, whatever runs them."""
    batch = BATCHES[task]()
    options = {"coupling": 0.0} if method == "glcan:4" and task != "detection" else {}
    parts = [tuple(item[i : i + len(batch[0]) // 2] for item in batch) for i in (0, len(batch[0]) // 2)]
    whole = learner(f"{method}+accumulate:2", task, options=options)
    alone = learner(method, task, options=options, sample=parts[0])
    assert whole.plan.cuts == alone.plan.cuts
    assert whole.profile.batch == len(parts[0][0])
    done: list[str] = []
    torch.manual_seed(2)
    with whole.watched(done.append):
        losses = whole.backward(*batch)
    torch.manual_seed(2)
    each = [alone.backward(*part) for part in parts]
    assert done == [group.name for group in whole.groups], "each is complete once"
    for name, loss in losses.items():
        torch.testing.assert_close(loss, (each[0][name] + each[1][name]) / 2)
    found, wanted = all_gradients(whole), all_gradients(alone)
    assert found.keys() == wanted.keys()
    for name, gradient in found.items():
        tolerance = 1e-5 * float(wanted[name].abs().max()) + 1e-9
        torch.testing.assert_close(gradient, wanted[name] / 2, rtol=1e-4, atol=tolerance, msg=name)


@pytest.mark.parametrize("method", [f"{rule}:3" for rule in rules() if "classification" in served(rule)])
def test_a_backbone_frozen_by_the_user_still_trains_its_auxiliary_networks(method: str) -> None:
    model = model_of("classification", "cifar_resnet")
    for module in list(model.children())[:2]:
        module.requires_grad_(False)
    mine = learner(method, "classification", model=model)
    before = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    mine.step(*BATCHES["classification"]())
    assert_equal({n: p.detach() for n, p in model.named_parameters() if n in before}, before)
