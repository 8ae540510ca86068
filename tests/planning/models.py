"""Small models and batches that plans are made of."""

from __future__ import annotations

from functools import partial

import torch
from tests import zoo
from torch import Tensor, nn
from torch.optim import SGD

from glcan.models import create

OPTIMIZER = partial(SGD, lr=0.05, momentum=0.9)
MODELS = {
    "resnet": lambda: create("cifar_resnet20"),
    "vit": lambda: zoo.timm("vit_tiny_patch16_224", img_size=32, patch_size=4, num_classes=10, depth=6, embed_dim=48),
    "convnext": lambda: zoo.timm(
        "convnext_atto", num_classes=10, depths=(1, 1, 2, 1), dims=(16, 24, 32, 48), drop_path_rate=0.1
    ),
}


def batch(count: int = 8) -> tuple[Tensor, Tensor]:
    return torch.randn(count, 3, 32, 32), torch.arange(count) % 10


class DataDependent(nn.Module):
    """Looks at values, which fake tensors do not have."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.body = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 10)

    def forward(self, images: Tensor) -> Tensor:
        features = self.stem(images)
        if float(features.detach().abs().max()) > 1e6:
            features = features / 2
        return self.head(self.body(features).relu().mean((2, 3)))
