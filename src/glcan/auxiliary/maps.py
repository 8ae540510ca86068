"""Tensors that cross a cut, as maps: what auxiliary networks of all rules begin with.

Shape letters: B batch, C channels, H x W map, N tokens.
"""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor

from glcan.errors import ConfigError
from glcan.inspect.features import Feature

__all__ = ["as_map", "pooled", "reduce_to"]


def as_map(tensor: Tensor, feature: Feature) -> Tensor:
    """The tensor as a map [B, C, H, W] (a view). Batch and resolution may differ from the profile's.

    Raises:
        ConfigError: a token sequence whose length is no grid of the profile's shape.
    """
    if feature.layout == "BCHW":
        return tensor
    if feature.layout == "BHWC":
        return tensor.permute(0, 3, 1, 2)
    if feature.layout == "BNC":
        tokens = tensor.shape[1] - feature.prefix
        h, w = feature.grid
        if tokens != h * w:
            scale = math.sqrt(tokens / (h * w))
            h, w = round(h * scale), round(w * scale)
            if h * w != tokens:
                raise ConfigError(
                    f"{tokens} tokens are no grid with the sides of {feature.grid}, which the learner was built for; "
                    "train with images of the sample's aspect ratio."
                )
        return tensor[:, feature.prefix :].transpose(1, 2).unflatten(2, (h, w))
    if feature.layout == "BC":
        return tensor[:, :, None, None]
    return tensor.flatten(1, -2).mean(1)[:, :, None, None]


def reduce_to(feature_map: Tensor, grid: tuple[int, int]) -> Tensor:
    """Average pooling to (about) this grid; whole windows where the sizes divide, which is cheaper."""
    h, w = feature_map.shape[-2:]
    if h <= grid[0] and w <= grid[1]:
        return feature_map
    if h % grid[0] == 0 and w % grid[1] == 0:
        return F.avg_pool2d(feature_map, (h // grid[0], w // grid[1]))
    return F.adaptive_avg_pool2d(feature_map, grid)


def pooled(tensor: Tensor, feature: Feature) -> Tensor:
    """The mean over the map, and for token models the mean of the special tokens added to it: [B, C]."""
    mean = as_map(tensor, feature).mean((2, 3))
    return mean + tensor[:, : feature.prefix].mean(1) if feature.prefix else mean
