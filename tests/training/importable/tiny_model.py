"""A model of a user's own, with everything that makes exact resumption hard: BatchNorm and dropout."""

import random

import numpy as np
import torch
from torch import Tensor, nn


def layer(before: int, after: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(before, after, 3, stride, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU(), nn.Dropout(0.1)
    )


def tiny(num_classes: int = 10, in_channels: int = 1) -> nn.Module:
    return nn.Sequential(
        layer(in_channels, 8),
        layer(8, 16, stride=2),
        layer(16, 16),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, num_classes),
    )


def wrong_classes() -> nn.Module:
    return tiny(num_classes=7)


def colour_only() -> nn.Module:
    return tiny(in_channels=3)


def twice() -> nn.Module:
    """Enlarges images twice, whatever the scale is."""
    return nn.Sequential(nn.Conv2d(3, 12, 3, padding=1), nn.PixelShuffle(2))


class Noisy(nn.Module):
    """Draws with Python's and NumPy's generators."""

    def __init__(self, num_classes: int, in_channels: int) -> None:
        super().__init__()
        self.body = tiny(num_classes, in_channels)

    def forward(self, images: Tensor) -> Tensor:
        return self.body(images * (1 + 0.1 * random.random() + 0.1 * np.random.rand()) if self.training else images)


def noisy(num_classes: int = 10, in_channels: int = 1) -> nn.Module:
    return Noisy(num_classes, in_channels)


class Views(nn.Module):
    """Its buffers are parts of one tensor, and two of its weights are one."""

    def __init__(self, num_classes: int, in_channels: int) -> None:
        super().__init__()
        self.body = tiny(num_classes, in_channels)
        table = torch.linspace(0.9, 1.1, 12)
        self.register_buffer("sine", table[:4])
        self.register_buffer("cosine", table[4:])
        self.scale = self.shift = nn.Parameter(torch.ones(()))

    def forward(self, images: Tensor) -> Tensor:
        return self.body(images * self.sine.mean() * self.cosine.mean()) * self.scale * self.shift


def views(num_classes: int = 10, in_channels: int = 1) -> nn.Module:
    return Views(num_classes, in_channels)


class Unsaveable(nn.Module):
    """Has something in its state_dict that is no tensor."""

    def __init__(self, num_classes: int, in_channels: int) -> None:
        super().__init__()
        self.body = tiny(num_classes, in_channels)

    def forward(self, images: Tensor) -> Tensor:
        return self.body(images)

    def get_extra_state(self) -> object:
        return {"calls": 3}

    def set_extra_state(self, state: object) -> None:
        pass


def unsaveable(num_classes: int = 10, in_channels: int = 1) -> nn.Module:
    return Unsaveable(num_classes, in_channels)
