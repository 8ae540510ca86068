"""Chosen images of super-resolution and of detection, where predictions are lists and images are resized at random."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.zoo import gradients
from torch import Tensor, nn
from torch.optim import SGD

from glcan import Learner
from glcan.models import create
from glcan.tasks import Detection


def flat(model: nn.Module) -> Tensor:
    return torch.cat([gradient.flatten() for gradient in gradients(model).values()])


def test_patches_of_super_resolution_are_chosen() -> None:
    torch.manual_seed(5)
    model = create("edsr_baseline", scale=2, blocks=6, channels=8)
    whole = copy.deepcopy(model)
    sample = torch.rand(8, 3, 12, 12), torch.rand(8, 3, 24, 24)
    learner = Learner(model, "super-resolution", sample, method="selective", options={"share": 0.75})
    assert "chosen by gradient" in learner.describe()
    losses = learner.backward(*sample)
    loss = F.l1_loss(whole(sample[0]), sample[1])
    loss.backward()
    torch.testing.assert_close(losses["block1"], loss.detach())
    assert F.cosine_similarity(flat(model), flat(whole), dim=0) > 0.9


# -- detection -----------------------------------------------------------------------------------------------------


def scenes() -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    generator = torch.Generator().manual_seed(6)
    sizes = [(64, 80), (80, 64), (64, 64), (72, 80)]
    images = [torch.rand(3, *size, generator=generator) for size in sizes]
    boxes = [torch.tensor([[8.0 + 4 * i, 8.0, 40.0, 50.0], [2.0, 3.0, 30.0, 20.0 + i]]) for i in range(len(sizes))]
    return images, [{"boxes": box, "labels": torch.tensor([1, 2])} for box in boxes]


def detector(name: str = "fcos_small", **sizes: Any) -> nn.Module:
    torch.manual_seed(7)
    small = {} if "rcnn" in name else {"width": 8, "channels": 32}
    return create(name, num_classes=3, **small, **sizes).train()


@pytest.mark.parametrize("name", ["fcos_small", "retinanet_small"])
@pytest.mark.parametrize("everything", [True, False])
def test_detectors_see_images_as_they_were_resized_and_padded_the_first_time(name: str, everything: bool) -> None:
    model = detector(name, min_size=(48, 64, 80), max_size=96)
    whole = copy.deepcopy(model)
    learner = Learner(model, "detection", scenes(), method="selective")
    assert learner.describe() == "50% of each batch back-propagated, chosen by gradient"
    torch.manual_seed(8)
    if everything:
        loss = learner._pass._by_gradient(scenes(), 4, lambda loss, share: loss.backward(), 1.0)
    else:
        loss = learner.backward(*scenes())["block1"]
    torch.manual_seed(8)
    expected = Learner(whole, "detection", scenes(), method="e2e").backward(*scenes())
    torch.testing.assert_close(loss, expected["block1"])
    mine, theirs = gradients(model), gradients(whole)
    assert mine.keys() == theirs.keys()
    if everything:
        for key, gradient in mine.items():
            torch.testing.assert_close(gradient, theirs[key], rtol=1e-3, atol=1e-5, msg=key)
    else:
        assert F.cosine_similarity(flat(model), flat(whole), dim=0) > 0.5
    assert "compute_loss" not in vars(model)
    assert not model.transform._forward_hooks  # type: ignore[union-attr]


@pytest.mark.parametrize("name", ["fcos_small", "retinanet_small"])
def test_detectors_with_dropout_draw_the_same_for_those_chosen(name: str) -> None:
    """The comparison with the first pass would end the step."""
    model = detector(name, image_size=64)
    body = model.backbone.body  # type: ignore[union-attr]
    body.bn1 = nn.Sequential(nn.Dropout(0.1), body.bn1)
    learner = Learner(model, "detection", scenes(), method="selective", optimizer=partial(SGD, lr=1e-3))
    for _ in range(2):
        assert learner.step(*scenes())["block1"].isfinite()


@pytest.mark.parametrize("images", [1, 3])
def test_few_scenes(images: int) -> None:
    model = detector(image_size=64)
    learner = Learner(model, "detection", scenes(), method="selective")
    losses = learner.backward(*(item[:images] for item in scenes()))
    assert losses["block1"].isfinite()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.filterwarnings("ignore:.*cannot be looked at without computing")
def test_two_stage_detectors_take_images_at_random_and_say_so() -> None:
    few = {"rpn_pre_nms_top_n_train": 50, "rpn_post_nms_top_n_train": 20, "box_batch_size_per_image": 16}
    model = detector("fasterrcnn_resnet18_fpn", image_size=64, **few)
    assert not Detection().choosable(model)
    learner = Learner(model, "detection", scenes(), method="selective", optimizer=partial(SGD, lr=1e-3))
    assert learner.describe() == "50% of each batch back-propagated, drawn at random"
    assert "drawn at random" in repr(learner)
    for _ in range(2):
        assert learner.step(*scenes())["block1"].isfinite()
    losses = learner.backward(*scenes())
    assert list(losses) == ["block1"]
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_losses_of_a_users_own_are_not_taken_for_those_of_torchvision() -> None:
    model = detector(image_size=64)

    class Own(type(model)):  # type: ignore[misc]
        def compute_loss(self, *arguments: Any) -> dict[str, Tensor]:
            return super().compute_loss(*arguments)

    model.__class__ = Own
    assert "drawn at random" in Learner(model, "detection", scenes(), method="selective").describe()
