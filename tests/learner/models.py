"""The models, samples and optimizers that the learner's tests share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from tests import zoo
from tests.zoo import Small, assert_equal
from torch import Tensor, nn
from torch.optim import SGD, AdamW

from glcan.models import create

MOMENTUM = partial(SGD, lr=0.05, momentum=0.9, weight_decay=1e-4, nesterov=True)
ADAM = partial(AdamW, lr=1e-3)


def batches(count: int, size: int = 32, images: int = 4) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(7)
    for _ in range(count):
        drawn = torch.randn(images, 3, size, size, generator=generator)
        yield drawn, torch.randint(0, 10, (images,), generator=generator)


SAMPLE = next(batches(1))
TINY = next(batches(1, 8))


def vit(**options: Any) -> nn.Module:
    return zoo.timm("vit_tiny_patch16_224", img_size=32, patch_size=8, num_classes=10, depth=4, embed_dim=48, **options)


class Dropout(Small):
    def body(self, x: Tensor) -> Tensor:
        return self.d(F.dropout(self.c(F.dropout(self.b(self.a(x)), 0.2)), 0.2))


class Tied(Small):
    def __init__(self) -> None:
        super().__init__()
        self.c.a.weight = self.a.a.weight
        self.d.norm = self.b.norm


class Again(Small):
    def body(self, x: Tensor) -> Tensor:
        return self.d(self.a(self.c(self.a(self.b(self.a(x))))))


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[Tensor, Tensor]]] = {
    "small": (Small, TINY),
    "dropout": (Dropout, TINY),
    "tied": (Tied, TINY),
    "again": (Again, TINY),
    "cifar_resnet20": (lambda: create("cifar_resnet20", num_classes=10), SAMPLE),
    "vit": (partial(vit, drop_rate=0.1, pos_drop_rate=0.1), SAMPLE),
}


def built(build: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return build().train()


def assert_same_state(a: nn.Module, b: nn.Module) -> None:
    assert_equal(dict(a.state_dict()), dict(b.state_dict()))
