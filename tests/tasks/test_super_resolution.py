"""The task of super-resolution: losses, the scale it finds, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import glcan
from glcan import tasks
from glcan.errors import ConfigError, DataError, UnknownName
from glcan.models import create
from glcan.tasks import SuperResolution

LOW, HIGH = torch.rand(2, 3, 6, 8), torch.rand(2, 3, 12, 16)
SHAPE = (2, 3, 12, 16)


def prepared(**options: Any) -> SuperResolution:
    task = SuperResolution(**options)
    task.prepare((SHAPE,), (LOW, HIGH))
    return task


def test_by_name() -> None:
    assert isinstance(tasks.create("super-resolution"), SuperResolution)


def test_scale_and_channels_come_from_the_models_output() -> None:
    task = prepared()
    assert (task.scale, task.channels) == (2, 3)
    with FakeTensorMode():
        task.prepare(((2, 1, 15, 9),), (torch.rand(2, 1, 5, 3), torch.rand(2, 1, 15, 9)))
    assert (task.scale, task.channels) == (3, 1)


def test_example_has_the_shapes_of_its_scale() -> None:
    low, high = SuperResolution(scale=3).example(4, 3, (5, 6))
    assert (low.shape, high.shape) == ((4, 3, 5, 6), (4, 3, 15, 18))
    with pytest.raises(ConfigError, match="scale=0"):
        SuperResolution(scale=0)


def test_losses() -> None:
    output = torch.rand(SHAPE)
    task, batch = prepared(), (LOW, HIGH)
    assert task.arguments(batch) == ((LOW,), {})
    assert task.loss(output, batch) == task.local_loss(output, batch) == (output - HIGH).abs().mean()
    smooth = prepared(criterion="charbonnier")
    by_hand = (((output - HIGH) ** 2 + 1e-6) ** 0.5).mean()
    assert smooth.loss(output, batch).item() == pytest.approx(by_hand.item())
    assert smooth.loss(HIGH, batch).item() == pytest.approx(1e-3)
    own = prepared(criterion=F.mse_loss)
    assert own.loss(output, batch) == F.mse_loss(output, HIGH)


def test_half_precision_output_is_compared_in_the_images_type() -> None:
    assert prepared().loss(torch.rand(SHAPE).to(torch.bfloat16), (LOW, HIGH)).dtype == torch.float32


def test_the_task_runs_under_a_learner_and_its_dry_runs() -> None:
    model = create("edsr_baseline", scale=3, blocks=1, channels=4)
    learner = glcan.Learner(model, "super-resolution", (LOW, torch.rand(2, 3, 18, 24)), method="e2e")
    assert isinstance(learner.task, SuperResolution)
    assert learner.task.scale == 3
    losses = learner.backward(LOW, torch.rand(2, 3, 18, 24))
    assert losses["block1"] > 0


@pytest.mark.parametrize(
    ("shapes", "batch", "message"),
    [
        ((SHAPE,), (LOW,), r"\(low, high\).*\[2, 3, 6, 8\]"),
        ((SHAPE,), (LOW, 3), r"\[2, 3, 6, 8\], int"),
        ((SHAPE,), (), "empty"),
        ((SHAPE, SHAPE), (LOW, HIGH), "one image"),
        (((2, 10),), (LOW, HIGH), "one image"),
        (((2, 3, 12, 17),), (LOW, HIGH), "one whole factor"),
        (((2, 3, 3, 4),), (LOW, HIGH), "one whole factor"),
        (((2, 1, 12, 16),), (LOW, HIGH), "one whole factor"),
    ],
)
def test_models_and_batches_of_another_kind_are_refused(shapes: Any, batch: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SuperResolution().prepare(shapes, batch)


@pytest.mark.parametrize(
    ("low", "high", "message"),
    [
        (LOW, torch.rand(2, 3, 18, 24), "enlarges 2 times.*3 times the low-resolution"),
        (LOW, torch.rand(2, 3, 13, 16), "no whole factor"),
        (LOW * 255, HIGH, "Divide 8-bit pixels by 255"),
        (LOW, HIGH * 255, "Divide 8-bit pixels by 255"),
        ((LOW * 255).to(torch.uint8), HIGH, "floats in 0..1"),
    ],
)
def test_images_that_do_not_fit_are_refused(low: Any, high: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        SuperResolution().prepare((SHAPE,), (low, high))


def test_unknown_criterion_lists_near_ones() -> None:
    with pytest.raises(UnknownName, match="charbonnier"):
        SuperResolution("charbonier")


def test_other_outputs_are_refused_at_the_loss() -> None:
    with pytest.raises(ConfigError, match="returned tuple"):
        prepared().loss((HIGH,), (LOW, HIGH))  # type: ignore[arg-type]
    with pytest.raises(DataError, match="same scale"):
        prepared().local_loss(torch.rand(2, 3, 1, 1), (LOW, HIGH))


def test_leak_check_and_profile_leave_the_model_alone() -> None:
    model = nn.Sequential(nn.Conv2d(3, 12, 3, padding=1), nn.PixelShuffle(2))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    glcan.Learner(model, SuperResolution("charbonnier"), (LOW, HIGH), method="checkpoint")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
