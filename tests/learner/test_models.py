"""What models and people do: frozen parts, odd outputs, other sizes, errors in the middle of a step."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tests import zoo
from tests.learner.models import MODELS, MOMENTUM, SAMPLE, TINY, batches, built
from tests.zoo import Residual, Small
from torch import Tensor, nn

from glcan import Learner, LiveMemory
from glcan.errors import ConfigError, CutError
from glcan.models import create
from glcan.tasks import Classification


def test_frozen_parts() -> None:
    model = built(Small)
    model.stem.requires_grad_(False)
    model.c.requires_grad_(False)  # all of a block in the middle
    model.a.b.weight.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    learner = Learner(model, sample=TINY, method="glcan", cuts=["b", "c", "d"], optimizer=MOMENTUM)
    losses = learner.step(*TINY)
    assert list(losses) == ["block1", "block2", "block4"]
    assert list(learner.auxiliary) == ["block1", "block2"]
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trainable - changed <= {"a.a.bias", "b.a.bias", "d.a.bias"}
    assert changed <= trainable


def test_freezing_afterwards_is_told() -> None:
    learner = Learner(built(Small), sample=TINY, method="glcan", cuts=["b", "c"])
    learner.model.b.requires_grad_(False)
    with pytest.raises(ConfigError, match="frozen or thawed"):
        learner.backward(*TINY)


def test_older_tensors_that_enter_a_later_cut() -> None:
    """A dense layer takes all earlier features: those of older blocks are no part of the local loss."""
    torchvision = pytest.importorskip("torchvision.models")
    model = built(lambda: torchvision.DenseNet(8, (4, 4), 16, num_classes=10))
    learner = Learner(model, sample=SAMPLE, method="glcan:7", optimizer=MOMENTUM)
    layer = next(u for u in learner.plan.units[3:] if "denselayer" in u[0].name)[0]
    assert len(layer.entering) < len(learner.profile.unit(layer.name).entering)
    assert len(learner.step(*SAMPLE)) == 7
    learner.switch(end_to_end=True)  # all of them have a graph now
    assert len(learner.step(*SAMPLE)) == 7


def test_the_same_tensor_as_two_arguments() -> None:
    class Two(Residual):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return super().forward(x) + y

    class Twice(Small):
        unit = Two

        def body(self, x: Tensor) -> Tensor:
            for unit in (self.a, self.b, self.c, self.d):
                x = unit(x, x)
            return x

    assert len(Learner(built(Twice), sample=TINY, method="glcan:4").backward(*TINY)) == 4


def test_blocks_that_stand_side_by_side_are_refused() -> None:
    class Parallel(Small):
        def body(self, x: Tensor) -> Tensor:
            return self.d(self.a(x) + self.b(x) + self.c(x))

    with pytest.raises(CutError, match="Nothing that block2 computes enters the cut at 'b'"):
        Learner(built(Parallel), sample=TINY, method="glcan", cuts=["a", "b"])
    Learner(built(Parallel), sample=TINY, method="glcan", cuts=["a", "d"])


def test_a_cut_that_is_not_reached() -> None:
    class Skips(Small):
        skip = False

        def body(self, x: Tensor) -> Tensor:
            x = self.b(self.a(x))
            return self.d(x if self.skip else self.c(x))

    learner = Learner(built(Skips), sample=TINY, method="glcan", cuts=["b", "c"])
    learner.model.skip = True
    with pytest.raises(CutError, match="without reaching the cut 'c'"):
        learner.backward(*TINY)
    learner.model.skip = False
    learner.backward(*TINY)


def test_other_batch_and_image_sizes() -> None:
    learner = Learner(built(MODELS["cifar_resnet20"][0]), sample=SAMPLE, method="glcan:4", optimizer=MOMENTUM)
    learner.step(torch.randn(2, 3, 32, 32), torch.tensor([1, 2]))
    learner.step(torch.randn(7, 3, 48, 48), torch.arange(7))
    learner.step(torch.randn(2, 3, 20, 36), torch.tensor([1, 2]))


def test_a_model_that_writes_into_its_input() -> None:
    class Writes(Small):
        def forward(self, x: Tensor) -> Tensor:
            x.mul_(2)
            return super().forward(x)

    images = TINY[0].clone()
    Learner(built(Writes), sample=(images, TINY[1]), method="glcan:3", optimizer=MOMENTUM).step(images, TINY[1])
    assert torch.equal(images, TINY[0])


def test_outputs_of_other_kinds() -> None:
    class Dict(Small):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"features": x, "logits": super().forward(x)}

    plain = Learner(built(Small), sample=TINY, method="glcan:3").backward(*TINY)
    task = Classification(classes=10)
    assert Learner(built(Dict), task, sample=TINY, method="glcan:3").backward(*TINY) == plain
    learner = Learner(zoo.hf_vit(), sample=SAMPLE, method="glcan:3", optimizer=MOMENTUM)
    assert len(learner.step(*SAMPLE)) == 3


def test_the_model_is_the_users_own() -> None:
    model = built(Small)
    names = list(model.state_dict())
    learner = Learner(model, sample=TINY, method="glcan:4", optimizer=MOMENTUM)
    learner.step(*TINY)
    assert learner.model is model
    assert list(model.state_dict()) == names
    assert not any("forward" in m.__dict__ or "_forward_hooks" not in m.__dict__ for m in model.modules())
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())
    learner.eval()
    assert not model.training
    assert not learner.auxiliary.training
    assert learner.train() is learner
    assert model.training
    assert learner.auxiliary.training
    assert "4 blocks" in repr(learner)


def test_activations_peak_at_one_block() -> None:
    peaks = {}
    for blocks in (1, 4, 8):
        model = built(lambda: create("cifar_resnet32", num_classes=10))
        learner = Learner(model, sample=SAMPLE, method=f"glcan:{blocks}", optimizer=MOMENTUM)
        learner.step(*SAMPLE)
        memory = LiveMemory(model, auxiliary=learner.auxiliary, optimizers=learner.optimizers, inputs=SAMPLE)
        with memory:
            learner.step(*SAMPLE)
        peaks[blocks] = memory.activation_peak_bytes
        assert memory.current["activations"] < 100
        assert memory.current["gradients"] == 0
    assert peaks[4] < 0.4 * peaks[1]
    assert peaks[8] < 0.26 * peaks[1]


def test_an_error_in_a_step_leaves_a_learner_that_goes_on() -> None:
    learner = Learner(built(Small).eval(), sample=TINY, method="glcan:3")
    wanted = learner.backward(*TINY)
    with pytest.raises(RuntimeError):
        learner.backward(TINY[0][:, :2], TINY[1])
    with pytest.raises(ValueError, match="batch_size"):
        learner.backward(TINY[0], TINY[1][:2])
    assert not any("forward" in m.__dict__ for m in learner.model.modules())
    assert learner.backward(*TINY) == wanted


# -- parameters that no loss reaches -------------------------------------------------------------------------------


class Supervised(Small):
    """With a second head, as deep supervision has it, whose loss the task does not compute."""

    def __init__(self) -> None:
        super().__init__()
        self.second = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        early = self.b(self.a(self.stem(x)))
        return self.head(self.d(self.c(early)).mean((2, 3))), self.second(early.mean((2, 3)))


@pytest.mark.parametrize("method", ["e2e", "checkpoint", "selective", "glcan:3", "e2e+accumulate:2"])
def test_parameters_that_no_loss_reaches_are_named_once(method: str) -> None:
    sample = next(batches(1, 8, images=8))
    learner = Learner(built(Supervised), sample=sample, method=method, optimizer=MOMENTUM)
    with pytest.warns(
        UserWarning, match=r"No loss reaches 2 parameters, which are not trained: second\.weight, second\.b"
    ):
        learner.step(*sample)
    learner.step(*sample)  # warnings are errors here


@pytest.mark.parametrize("method", ["e2e", "glcan:3"])
def test_heads_of_deep_supervision_are_trained_by_a_task_that_reads_them(method: str) -> None:
    class Both(Classification):
        def loss(self, output: Any, batch: tuple[Any, ...]) -> Tensor:
            first, second = output
            return super().loss(first, batch) + super().loss(second, batch)

    learner = Learner(built(Supervised), Both(), TINY, method=method, optimizer=MOMENTUM)
    if method == "e2e":
        learner.step(*TINY)
        return
    # in blocks, the second head hangs on a block that has been trained already
    before = learner.model.second.weight.detach().clone()
    learner.step(*TINY)
    assert not torch.equal(before, learner.model.second.weight)


def test_frozen_parameters_are_not_missed() -> None:
    model = built(Supervised)
    model.second.requires_grad_(False)
    Learner(model, sample=TINY, method="e2e").backward(*TINY)


def test_a_task_may_be_given_to_two_learners() -> None:
    """Each has one of its own: what it finds of one model is not said of the other."""
    task = Classification()
    ten = Learner(built(Small), task, TINY, method="glcan:3")
    three = built(Small)
    three.head = nn.Linear(8, 3)
    labels = TINY[1] % 3
    other = Learner(three, task, (TINY[0], labels), method="glcan:3")
    assert task.classes is None
    assert [ten.task.classes, other.task.classes] == [10, 3]
    ten.backward(*TINY)
    other.backward(TINY[0], labels)
