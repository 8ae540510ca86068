"""What every rule keeps, on every task and family of models: one table of settings drives all of it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from tests import zoo
from tests.zoo import assert_equal
from torch import Tensor, nn
from torch.optim import AdamW

from glcan import LocalLearner, methods
from glcan.errors import ConfigError, UnknownName
from glcan.models import create
from glcan.auxiliary import RULES
from glcan.auxiliary import create as create_rule
from glcan.tasks import TASKS

CLASSIFIERS: dict[str, Callable[[], nn.Module]] = {
    "cifar_resnet": lambda: create("cifar_resnet20", num_classes=10),
    "vit": lambda: zoo.timm("vit_tiny_patch16_224", img_size=32, patch_size=4, num_classes=10, depth=4, embed_dim=48),
    "swin": lambda: zoo.timm(
        "swin_tiny_patch4_window7_224",
        img_size=32,
        patch_size=2,
        window_size=4,
        embed_dim=24,
        depths=(1, 1, 2, 1),
        num_heads=(1, 2, 2, 2),
        num_classes=10,
    ),
    "convnext": lambda: zoo.timm(
        "convnext_atto", num_classes=10, depths=(1, 1, 2, 1), dims=(16, 24, 32, 48), drop_path_rate=0.1
    ),
}

DETECTORS: dict[str, Callable[[], nn.Module]] = {
    name: partial(create, name, num_classes=4, image_size=64, width=8, channels=32)
    for name in ("retinanet_small", "fcos_small")
}

UPSCALERS: dict[str, Callable[[], nn.Module]] = {
    "edsr": lambda: create("edsr_baseline", scale=2, blocks=6, channels=8),
    "swinir": lambda: create(
        "spandrel/SwinIR-light", scale=2, depths=(1,) * 6, num_heads=(2,) * 6, embed_dim=8, drop_path_rate=0.0
    ),
}

# task -> the models that it is tried with
FAMILIES = {"classification": CLASSIFIERS, "super-resolution": UPSCALERS, "detection": DETECTORS}

# rule -> the options that it is tried with
OPTIONS: dict[str, list[dict[str, Any]]] = {
    "e2e": [{}],
    "checkpoint": [{}],
    "checkpoint-sqrt": [{}],
    "predsim": [{}, {"beta": 0.0}],
    "dgl": [{}],
    "infopro": [{}, {"mode": "cross_entropy"}],
    "auglocal": [{}],
    "man": [{}, {"base": "infopro", "bias": "none"}],
    "manpp": [{}, {"bias": "channel", "units": 2}],
    "glcan": [
        {},
        {"use_local": False, "joint": 0.0},
        {"use_global": False, "joint": 0.0},
        {"width": 0.5, "joint": 0.0},
        {"joint": 0.5, "joint_weight": 0.5},
        {"joint": 0.5, "joint_weight": 1.0},
        {"unit": "backbone"},
        {"unit": "backbone", "momentum": 0.9, "use_local": False},
    ],
}


def classification_batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(8, 3, 32, 32, generator=generator), torch.arange(8) % 4


def super_resolution_batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.rand(2, 3, 16, 16, generator=generator), torch.rand(2, 3, 32, 32, generator=generator)


def detection_batch() -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    generator = torch.Generator().manual_seed(3)
    boxes = torch.tensor([[4.0, 4.0, 40.0, 44.0], [20.0, 2.0, 60.0, 30.0]])
    return [torch.rand(3, 64, 64, generator=generator) for _ in range(4)], [
        {"boxes": boxes[: i % 3], "labels": torch.tensor([1, 3])[: i % 3]} for i in range(4)
    ]


SAMPLES: dict[str, Callable[[], tuple[Any, ...]]] = {
    "classification": classification_batch,
    "super-resolution": super_resolution_batch,
    "detection": detection_batch,
}


def on_the_resnet_alone(rule: str, options: dict[str, Any]) -> bool:
    """Variants of what the other families have been tried with already, for time."""
    return rule == "manpp" or (rule == "man" and bool(options))


SETTINGS = [
    pytest.param(
        rule,
        options,
        task,
        family,
        id="-".join([rule, *map(str, options.values()), task, family]),
    )
    for rule in RULES
    for options in OPTIONS.get(rule, [{}])
    for task in SAMPLES
    if task in RULES[rule].tasks and (task == "classification" or "unit" not in options)
    for family in FAMILIES[task]
    if family == "cifar_resnet" or not on_the_resnet_alone(rule, options)
]


def learner(rule: str, options: dict[str, Any], task: str, family: str, **more: Any) -> LocalLearner:
    torch.manual_seed(0)
    model = FAMILIES[task][family]().train()
    blocks = {"blocks": 4} if RULES[rule].local else {}
    settings = {"optimizer": partial(AdamW, lr=1e-3)} | blocks | more
    return LocalLearner(model, task, SAMPLES[task](), rule=rule, rule_options=options, **settings)


def test_the_table_is_complete() -> None:
    assert set(OPTIONS) == set(RULES) == set(methods())
    assert set(SAMPLES) == set(FAMILIES) == set(TASKS)
    for rule in RULES.values():
        assert rule.summary
        assert set(rule.tasks) <= set(TASKS)
    assert methods()[:3] == ["e2e", "checkpoint", "checkpoint-sqrt"]


@pytest.mark.parametrize(("rule", "options", "task", "family"), SETTINGS)
def test_a_rule_keeps_its_contract(rule: str, options: dict[str, Any], task: str, family: str) -> None:
    mine = learner(rule, options, task, family)
    batch = SAMPLES[task]()
    names = [f"block{i}" for i in range(1, mine.plan.blocks + 1)]
    assert mine.plan.blocks == (4 if RULES[rule].local else 1)
    if mine.rule.joint(mine.task, mine.plan.blocks, mine.profile.batch).weight == 1:
        names = names[-1:]  # of the blocks that have a loss of their own
    assert list(mine.auxiliary) == names[:-1]
    assert all(p.requires_grad for p in mine.auxiliary.parameters())

    # every trainable parameter, auxiliary or not, is in exactly one optimizer and gets a gradient
    grouped = [id(p) for o in mine.optimizers for g in o.param_groups for p in g["params"]]
    named = {
        **{f"model.{n}": p for n, p in mine.model.named_parameters()},
        **{f"auxiliary.{n}": p for n, p in mine.auxiliary.named_parameters()},
    }
    assert sorted(grouped) == sorted(id(p) for p in named.values())
    first = mine.backward(*batch)
    assert list(first) == names
    reached = {n for n, p in named.items() if p.grad is not None}
    # of a copied unit, what only its own successor uses may stay unused; of the model nothing may
    assert reached == set(named)
    for p in named.values():
        p.grad = None

    # the loss of a fixed batch falls in every block
    for _ in range(12):
        last = mine.step(*batch)
    assert all(last[name] < first[name] for name in names), (first, last)
    assert all(p.grad is None for p in named.values())

    # resumption
    state = copy.deepcopy(mine.state_dict())
    torch.manual_seed(11)
    wanted = [mine.step(*batch) for _ in range(2)]
    fresh = learner(rule, options, task, family)
    fresh.load_state_dict(state)
    torch.manual_seed(11)
    assert [fresh.step(*batch) for _ in range(2)] == wanted
    assert_equal(dict(fresh.model.state_dict()), dict(mine.model.state_dict()))
    assert_equal(dict(fresh.auxiliary.state_dict()), dict(mine.auxiliary.state_dict()))


@pytest.mark.parametrize(
    ("rule", "task", "family"),
    [(rule, "classification", "cifar_resnet") for rule in RULES if RULES[rule].local]
    + [("glcan", task, family) for task in FAMILIES for family in FAMILIES[task]],
)
def test_end_to_end_steps_are_those_of_back_propagation(rule: str, task: str, family: str) -> None:
    """Bit for bit, while the auxiliary networks learn beside (to rounding, where an upsampler runs in parts)."""
    mine = learner(rule, {"joint": 0.0} if rule == "glcan" else {}, task, family)
    plain, cheap = (learner(name, {}, task, family) for name in ("e2e", "checkpoint"))
    mine.end_to_end = True
    before = {name: p.detach().clone() for name, p in mine.auxiliary.named_parameters()}
    batch = SAMPLES[task]()
    for seed in range(2):
        losses = []
        for one in (mine, plain, cheap):
            torch.manual_seed(seed)
            losses.append(one.step(*batch))
        assert list(losses[0]) == [f"block{i}" for i in range(1, 5)]
        exact = {"rtol": 1e-4, "atol": 1e-5} if mine.profile.parted else {"rtol": 0.0, "atol": 0.0}
        torch.testing.assert_close(losses[0]["block4"], losses[1]["block1"], **exact)
    for other in (plain, cheap):
        torch.testing.assert_close(dict(mine.model.state_dict()), dict(other.model.state_dict()), **exact)
    assert all(not torch.equal(p, before[name]) for name, p in mine.auxiliary.named_parameters())

    # and what the blocks hand over is what they hand over when they learn by themselves
    mine.end_to_end = False
    assert list(mine.step(*batch)) == list(losses[0])


@pytest.mark.parametrize("rule", [name for name, r in RULES.items() if r.local and "classification" in r.tasks])
def test_a_user_frozen_backbone_still_trains_its_auxiliary_networks(rule: str) -> None:
    torch.manual_seed(0)
    model = CLASSIFIERS["cifar_resnet"]().train()
    for module in list(model.children())[:2]:
        module.requires_grad_(False)
    mine = LocalLearner(model, sample=classification_batch(), blocks=3, rule=rule, optimizer=partial(AdamW, lr=1e-3))
    before = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    mine.step(*classification_batch())
    assert_equal({n: p.detach() for n, p in model.named_parameters() if n in before}, before)


def test_options_are_checked() -> None:
    with pytest.raises(UnknownName, match="option of the rule 'glcan' 'budjet'.*'budget'"):
        create_rule("glcan", {"budjet": 1})
    with pytest.raises(UnknownName, match="It has no options"):
        create_rule("e2e", {"budget": 1})
    with pytest.raises(UnknownName, match="rule 'dgll'"):
        create_rule("dgll")
    rule = create_rule("glcan", {"budget": 0.2})
    assert create_rule(rule) is rule
    with pytest.raises(ConfigError):
        create_rule("glcan", {"budget": "much"})
