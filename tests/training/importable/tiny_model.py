"""A model of a user's own, with everything that makes exact resumption hard: BatchNorm and dropout."""

from torch import nn


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
