"""A second pass sees the world of the first: exact with all images, and row for row with some of them."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tests import zoo
from tests.zoo import gradients
from torch import Tensor, nn

from glcan import Learner
from glcan.models import create

# -- models that normalise over the batch, draw random numbers, or write buffers -----------------------------------


class Twice(nn.Module):
    """One BatchNorm used twice inside one unit."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm(self.second(F.relu(self.norm(self.first(x)))))


class Units(nn.Module):
    """A stem, four units, and a classifier."""

    def __init__(self, unit: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.body = nn.ModuleList(unit() for _ in range(4))
        self.fc = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for unit in self.body:
            x = x + unit(x)
        return self.fc(x.mean((2, 3)))


def shared() -> nn.Module:
    """One BatchNorm in all units."""
    norm = nn.BatchNorm2d(8)
    return Units(lambda: nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), norm, nn.ReLU()))


def spectral(normalise: Callable[[nn.Module], nn.Module]) -> nn.Module:
    return Units(lambda: nn.Sequential(normalise(nn.Conv2d(8, 8, 3, padding=1)), nn.GroupNorm(2, 8), nn.ReLU()))


def dropping(drop: nn.Module) -> nn.Module:
    return Units(lambda: nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), copy.copy(drop)))


class Noise(nn.Module):
    """Draws a tensor for each image, in whatever way."""

    def __init__(self, draw: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.draw = draw

    def forward(self, x: Tensor) -> Tensor:
        return x * (1 + 0.3 * self.draw(x))


def rowwise(x: Tensor) -> Tensor:
    return torch.rand(len(x), 1, 1, 1, dtype=x.dtype)


def pythons(x: Tensor) -> Tensor:
    return torch.as_tensor(random.random() + np.random.rand(), dtype=x.dtype)


EXACT: dict[str, Callable[[], nn.Module]] = {
    "batchnorm": lambda: Units(lambda: nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())),
    "batchnorm twice in a unit": lambda: Units(Twice),
    "batchnorm shared by units": shared,
    "spectral norm": partial(spectral, nn.utils.parametrizations.spectral_norm),
    "spectral norm, the old one": partial(spectral, nn.utils.spectral_norm),
    "dropout": lambda: dropping(nn.Dropout(0.3)),
    "dropout of channels": lambda: dropping(nn.Dropout2d(0.3)),
    "alpha dropout": lambda: dropping(nn.AlphaDropout(0.3)),
    "numbers for each image": lambda: Units(
        lambda: nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), Noise(rowwise), Noise(torch.rand_like))
    ),
    "numbers of Python and NumPy": lambda: Units(lambda: nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), Noise(pythons))),
    "efficientnet_b0": lambda: create("torchvision/efficientnet_b0", num_classes=10),
    "vit": lambda: zoo.timm(
        "vit_tiny_patch16_224",
        img_size=16,
        patch_size=4,
        num_classes=10,
        depth=3,
        embed_dim=24,
        drop_rate=0.2,
        proj_drop_rate=0.2,
        attn_drop_rate=0.2,
        drop_path_rate=0.3,
    ),
}


def batch(images: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(images, 3, 16, 16, generator=generator, dtype=torch.float64), torch.arange(images) % 10


def seeded(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def states() -> tuple[float, ...]:
    return random.random(), np.random.rand(), float(torch.rand(()))


def built(name: str) -> nn.Module:
    torch.manual_seed(0)
    return EXACT[name]().double().train()


def plain(model: nn.Module, seed: int) -> Tensor:
    seeded(seed)
    loss = F.cross_entropy(model(batch()[0]), batch()[1])
    loss.backward()
    return loss.detach()


def assert_as(model: nn.Module, wanted: nn.Module) -> None:
    """The same gradients and buffers, to rounding in double precision."""
    found, others = gradients(model), gradients(wanted)
    assert found.keys() == others.keys()
    scale = max(float(gradient.abs().max()) for gradient in others.values())
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, others[name], rtol=1e-7, atol=1e-9 * scale, msg=name)
    for (name, buffer), (_, other) in zip(model.named_buffers(), wanted.named_buffers(), strict=True):
        torch.testing.assert_close(buffer, other, rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize("name", EXACT)
def test_with_a_share_of_one_it_is_back_propagation(name: str) -> None:
    model = built(name)
    wanted = copy.deepcopy(model)
    learner = Learner(model, sample=batch(), method="selective", options={"share": 1.0})
    for seed in (3, 4):  # the second time with other buffers
        model.zero_grad()
        wanted.zero_grad()
        seeded(seed)
        losses = learner.backward(*batch())
        after = states()
        torch.testing.assert_close(losses["block1"], plain(wanted, seed))
        assert after == states(), "and the generators go on as they would have"
        assert_as(model, wanted)


@pytest.mark.parametrize("name", EXACT)
def test_the_gradient_of_a_second_pass_of_all_images_is_that_of_the_first(name: str) -> None:
    """As if none were left out, but through everything that chosen images go through."""
    model = built(name)
    wanted = copy.deepcopy(model)
    learner = Learner(model, sample=batch(), method="selective")
    for seed in (3, 4):
        model.zero_grad()
        wanted.zero_grad()
        seeded(seed)
        loss = learner._pass._by_gradient(batch(), 8, lambda loss, share: loss.backward(), 1.0)
        after = states()
        torch.testing.assert_close(loss, plain(wanted, seed))
        assert after == states()
        assert_as(model, wanted)


@pytest.mark.parametrize("name", EXACT)
def test_chosen_images_have_the_predictions_that_they_had_in_the_batch(name: str) -> None:
    model = built(name)
    wanted = copy.deepcopy(model)
    learner = Learner(model, sample=batch(), method="selective")
    outputs: list[Tensor] = []
    taken: list[Tensor] = []
    take = learner.task.chosen

    def watch(given: tuple[Any, ...], places: Tensor) -> tuple[Any, ...]:
        taken.append(places)
        return take(given, places)

    learner.task.chosen = watch  # type: ignore[method-assign]
    model.register_forward_hook(lambda module, args, out: outputs.append(out.detach().clone()))
    for seed in (3, 4, 5):
        outputs.clear()
        seeded(seed)
        learner.backward(*batch())
        after = states()
        plain(wanted, seed)
        assert after == states(), "each number is drawn once"
        first, second = outputs
        assert len(second) == len(taken[-1]) == 4
        torch.testing.assert_close(second, first[taken[-1]], rtol=1e-8, atol=1e-10)
    for (key, buffer), (_, other) in zip(model.named_buffers(), wanted.named_buffers(), strict=True):
        torch.testing.assert_close(buffer, other, rtol=1e-9, atol=1e-12, msg=key)


@pytest.mark.parametrize("name", ["batchnorm", "dropout", "vit"])
def test_in_float32_and_channels_last_as_well(name: str) -> None:
    """The comparison with the first pass, which ends a step that went wrong, passes."""
    model = built(name).float().to(memory_format=torch.channels_last)
    images, labels = batch()
    images = images.float().contiguous(memory_format=torch.channels_last)
    learner = Learner(model, sample=(images, labels), method="selective")
    for _ in range(2):
        assert learner.backward(images, labels)["block1"].isfinite()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
