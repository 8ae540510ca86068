"""GLCAN always builds its auxiliary networks: in every task, whatever the number of images that a sample has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import glcan
from glcan import Learner
from glcan.auxiliary import create as create_rule
from glcan.auxiliary import names, tasks_of
from glcan.errors import ConfigError, UnknownName
from glcan.models import create
from glcan.tasks import TASKS
from glcan.tasks import create as create_task

# task -> model, side of the images, numbers of them
CASES: dict[str, tuple[Callable[[], nn.Module], int, tuple[int, ...]]] = {
    "classification": (lambda: create("cifar_resnet20", num_classes=10), 32, (2, 8, 16)),
    "detection": (lambda: create("fcos_small", num_classes=4, image_size=64, width=8, channels=32), 64, (2, 16)),
    "super-resolution": (lambda: create("edsr_baseline", scale=2, blocks=6, channels=8), 16, (2, 8, 16)),
}


def sample_of(task: str, images: int, side: int) -> tuple[Any, ...]:
    return create_task(task).example(images, 3, (side, side))


@pytest.mark.parametrize("task", CASES)
def test_the_method_is_the_same_for_every_sample(task: str) -> None:
    build, side, numbers = CASES[task]
    assert set(CASES) == set(TASKS)
    found = []
    for images in numbers:
        torch.manual_seed(0)
        learner = Learner(build().train(), task, sample_of(task, images, side), method="glcan:4")
        assert str(learner.method) == "glcan:4"
        assert learner.strategy.family == "local"
        assert list(learner.auxiliary) == ["block1", "block2", "block3"]
        assert f"{sum(p.numel() for p in learner.auxiliary.parameters()):,} " in repr(learner)
        found.append([sum(p.numel() for p in network.parameters()) for network in learner.auxiliary.values()])
        assert all(count > 0 for count in found[-1])
        losses = learner.backward(*sample_of(task, 2, side))
        assert list(losses) == ["block1", "block2", "block3", "block4"]
    assert all(counts == found[0] for counts in found)


@pytest.mark.parametrize("images", [2, 64, 256])
def test_plans_of_any_batch_are_of_auxiliary_networks(images: int) -> None:
    """Fake images: nothing is computed."""
    build, side, _ = CASES["classification"]
    found = glcan.plan(build(), sample=sample_of("classification", images, side), method="glcan:4", baselines=())
    assert (found.method, found.family, found.plan.blocks) == ("glcan:4", "local", 4)
    assert found.auxiliary_parameters > 0
    assert found.as_dict()["auxiliary_parameters"] == found.auxiliary_parameters


@pytest.mark.parametrize("task", TASKS)
def test_options_have_one_default_each(task: str) -> None:
    """And so every default is shown by a rule that has been given none."""
    config = create_rule("glcan", task).config
    assert all(isinstance(value, bool | int | float | str | None) for value in vars(config).values())
    assert config.budget > 0


def test_rules_are_made_by_name_for_the_tasks_that_they_serve() -> None:
    assert names()[0] == "glcan"
    assert set(tasks_of("glcan")) == set(TASKS)
    assert tasks_of("predsim") == ["classification"]
    with pytest.raises(UnknownName, match="rule 'dgll'"):
        create_rule("dgll", "classification")
    with pytest.raises(UnknownName, match="option of 'glcan' 'joint'"):
        create_rule("glcan", "classification", {"joint": 0.5})
    with pytest.raises(UnknownName, match="option of 'glcan' 'unit'.*"):
        create_rule("glcan", "detection", {"unit": "backbone"})
    with pytest.raises(ConfigError, match="'man' serves classification, not the task 'detection'"):
        create_rule("man", "detection")
