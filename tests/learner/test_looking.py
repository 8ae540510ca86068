"""How a learner looks at a model: on few images where it must be run, in train mode, and at its own copy of a task."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests import zoo
from tests.zoo import Residual, Small, assert_equal, gradients
from torch import Tensor, nn
from torch.optim import SGD

import glcan
from glcan.inspect.record import profile
from glcan.tasks import Classification

METHODS = ["e2e", "checkpoint", "checkpoint-sqrt", "selective", "glcan:3", "glcan:3+accumulate:2"]
OPTIMIZER = partial(SGD, lr=0.05, momentum=0.9)


def batch(images: int = 16) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(3)
    return torch.randn(images, 3, 16, 16, generator=draw), torch.arange(images) % 10


# -- a model that fake tensors cannot run ----------------------------------------------------------------------------


class Decides(Small):
    """Looks at a value, which fake tensors do not have."""

    def body(self, x: Tensor) -> Tensor:
        x = self.b(self.a(x))
        return self.d(self.c(x if float(x.detach().abs().max()) < 1e6 else x / 2))


def watched(model: nn.Module) -> list[int]:
    """How many images each real run of the model had, as a list that grows."""
    seen: list[int] = []

    def note(module: nn.Module, args: Any, output: Any) -> None:
        if type(args[0]) is Tensor:
            seen.append(len(args[0]))

    model.stem.register_forward_hook(note)
    return seen


@pytest.mark.parametrize("method", METHODS)
def test_a_model_that_must_be_run_is_run_on_two_images(method: str) -> None:
    model = Decides()
    before = copy.deepcopy(model.state_dict())
    seen = watched(model)
    said = r"Decides cannot be looked at without computing \(DataDependentOutputException: .*_local_scalar_dense.*few"
    with pytest.warns(UserWarning, match=said) as warned:
        learner = glcan.Learner(model, sample=batch(), method=method, optimizer=OPTIMIZER)
    assert len(warned) == 1
    assert seen
    assert max(seen) <= 2
    assert_equal(dict(model.state_dict()), dict(before))
    assert not gradients(model)
    learner.step(*batch())
    assert max(seen) == (8 if "accumulate" in method else 16)


@pytest.mark.parametrize("method", METHODS)
def test_its_profile_is_scaled_to_the_batch(method: str) -> None:
    parts = 2 if "accumulate" in method else 1
    with pytest.warns(UserWarning, match="a few images"):
        learner = glcan.Learner(Decides(), sample=batch(), method=method)
    wanted = profile(Decides(), (batch()[0][: 16 // parts],))
    assert learner.profile.batch == 16 // parts
    assert learner.profile.output == ((16 // parts, 10),)
    assert learner.profile.flops == wanted.flops
    for mine, theirs in zip(learner.profile.units, wanted.units, strict=True):
        assert (mine.name, mine.output, mine.entering) == (theirs.name, theirs.output, theirs.entering)
        assert mine.saved_bytes == pytest.approx(theirs.saved_bytes, rel=0.01)
    planned = [unit for block in learner.plan.units for unit in block]
    assert sum(unit.saved_bytes for unit in planned) == sum(unit.saved_bytes for unit in learner.profile.units)
    assert sum(unit.flops for unit in planned) == wanted.flops


@pytest.mark.parametrize("method", ["e2e", "checkpoint", "selective"])
def test_a_profile_that_is_at_hand_is_taken(method: str) -> None:
    model = Decides()
    found = profile(model, (batch()[0],))
    seen = watched(model)
    learner = glcan.Learner(model, sample=batch(), method=method, profile=found)  # a warning would be an error
    assert learner.profile.units == found.units
    if method != "selective":  # which weighs what its pieces need
        assert not seen


def test_a_profile_that_is_at_hand_is_taken_by_blocks() -> None:
    model = Decides()
    found = profile(model, (batch()[0],))
    glcan.Learner(model, sample=batch(), method="glcan:3", profile=found)  # a warning would be an error


def test_labels_beyond_the_few_images_are_checked_too() -> None:
    images, labels = batch()
    labels[15] = 10
    with pytest.warns(UserWarning, match="a few images"), pytest.raises(glcan.errors.DataError, match="A label is 10"):
        glcan.Learner(Decides(), sample=(images, labels), method="e2e")


# -- a model that is in eval mode when the learner is built --------------------------------------------------------


class Drops(Small):
    """Units that differ between the modes: dropout inside, and a whole branch that is there in training alone."""

    class unit(Residual):
        def forward(self, x: Tensor) -> Tensor:
            return F.dropout(super().forward(x), 0.2, self.training)


@pytest.mark.parametrize("method", METHODS)
def test_built_in_eval_mode_it_learns_as_if_built_in_train_mode(method: str) -> None:
    model = Drops()
    other = copy.deepcopy(model).eval()
    torch.manual_seed(1)
    here = glcan.Learner(model, sample=batch(), method=method)
    torch.manual_seed(1)
    there = glcan.Learner(other, sample=batch(), method=method)
    assert not any(module.training for module in other.modules())
    assert there.plan == here.plan
    assert there.profile == here.profile
    assert repr(there) == repr(here)
    other.train()  # the model alone, as its owner has it
    assert all(module.training for module in there.auxiliary.modules())
    found = []
    for learner in (here, there):
        torch.manual_seed(2)
        found.append(learner.backward(*batch()))
    assert_equal(found[1], found[0])
    assert_equal(gradients(other), gradients(model))
    assert_equal(gradients(there.auxiliary), gradients(here.auxiliary))
    assert_equal(dict(other.named_buffers()), dict(model.named_buffers()))


def test_a_plan_in_eval_mode_is_that_in_train_mode() -> None:
    model = Drops()
    for method in ("selective", "glcan:3"):
        options: dict[str, Any] = {"sample": batch(), "method": method, "optimizer": OPTIMIZER}
        assert glcan.plan(model.eval(), **options) == glcan.plan(model.train(), **options)


@pytest.mark.filterwarnings("ignore")  # of transformers
@pytest.mark.parametrize("method", ["selective", "glcan:3"])
def test_a_pretrained_model_comes_in_eval_mode(method: str) -> None:
    images, labels = torch.randn(16, 3, 32, 32), torch.arange(16) % 10
    model = zoo.hf_vit(hidden_dropout_prob=0.3)
    other = copy.deepcopy(model)
    learners = []
    for net in (model.train(), other.eval()):
        torch.manual_seed(1)
        learners.append(glcan.Learner(net, sample=(images, labels), method=method))
    assert learners[0].plan == learners[1].plan
    other.train()
    for learner in learners:
        torch.manual_seed(2)
        learner.backward(images, labels)
    assert_equal(gradients(other), gradients(model))


# -- a task of two learners ------------------------------------------------------------------------------------------


class Classes(Small):
    def __init__(self, classes: int) -> None:
        super().__init__()
        self.head = nn.Linear(8, classes)


@pytest.mark.parametrize("method", ["e2e", "selective", "glcan:3"])
def test_a_task_may_be_shared(method: str) -> None:
    """Each learner has a copy, which knows the classes of its own model."""
    task = Classification(label_smoothing=0.1)
    images = torch.randn(8, 3, 16, 16)
    samples = [(images, torch.arange(8) % classes) for classes in (10, 3)]
    models = [Classes(10), Classes(3)]
    alone = []
    for model, sample in zip(models, samples, strict=True):
        torch.manual_seed(1)
        fresh = glcan.Learner(copy.deepcopy(model), Classification(label_smoothing=0.1), sample, method=method)
        alone.append(fresh.backward(*sample))
    learners = []
    for model, sample in zip(models, samples, strict=True):
        torch.manual_seed(1)
        learners.append(glcan.Learner(model, task, sample, method=method))
    glcan.plan(Classes(5), task, (images, torch.arange(8) % 5), method=method, baselines=())
    assert task.classes is None
    assert [learner.task.classes for learner in learners] == [10, 3]
    for learner, sample, wanted in zip(learners, samples, alone, strict=True):
        assert_equal(learner.backward(*sample), wanted)
    learners[0].switch("glcan:2")
    assert list(learners[0].backward(*samples[0])) == ["block1", "block2"]
