"""The auxiliary network of super-resolution: the residual over the bicubic image, from the block's own features.

- *local branch*: the features as a narrow map at full resolution (sub-pixel convolution), and a convolution there: fine
  detail is made at full resolution, not before it;
- *global branch*: the features at a quarter of their resolution and convolutions there, brought back;
- *collaboration*: both are added before they are shuffled to full resolution.

The features are divided by each image's root mean square, because networks work on pixels in 0..1 or in 0..255. There
is no batch normalisation, so the network may see a batch in parts, one after the other, with the same gradient.

Shape letters: B batch, C channels, h x w the low-resolution map, s scale, n width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glcan.isolation import Boundary
from glcan.profile import Feature
from glcan.rules.maps import as_map
from glcan.tasks.super_resolution import SuperResolution

REDUCTION = 4
"""How much smaller than the features the global branch's map is, along each side."""


def auxiliary_flops(channels: int, width: int, colours: int, scale: int, local: bool, context: int) -> float:
    """Forward FLOPs of `SuperResolutionAuxiliary` for each low-resolution pixel."""
    full = scale * scale
    flops = 2.0 * channels * width * full if local else 0.0
    flops += 2 * 9 * width * (width + colours) * full
    if context:
        flops += 2 * 9 * (channels * context + context * context + context * width * full) / REDUCTION**2
    return flops


def fit_width(channels: int, colours: int, scale: int, local: bool, context: int, flops: float, most: int) -> int:
    """The widest map at full resolution, a multiple of 4 from 4 to ``most``, within so many FLOPs per pixel."""
    best = 4
    for width in range(4, most + 1, 4):
        if auxiliary_flops(channels, width, colours, scale, local, context) <= flops:
            best = width
    return best


class SuperResolutionAuxiliary(nn.Module):
    """Features [B, C, h, w] of a block -> images [B, colours, s*h, s*w].

    Args:
        main: which of the tensors that enter the cut holds the features.
        feature: of that tensor.
        task: prepared.
        scale: from the features to the high-resolution image; 1 behind the model's own upsampler.
        width: n.
        local: the local branch.
        context: channels of the global branch, 0 for none.
        parts: the batch goes through in so many parts, one after the other.
    """

    def __init__(
        self,
        main: int,
        feature: Feature,
        task: SuperResolution,
        scale: int,
        width: int,
        local: bool,
        context: int,
        parts: int,
    ) -> None:
        super().__init__()
        assert task.channels is not None
        self.main, self.feature, self.task, self.parts = main, feature, task, parts
        self.scale, self.width = scale, width
        full = scale**2
        self.expand = nn.Conv2d(feature.channels, width * full, 1) if local else None
        self.context = (
            nn.Sequential(
                nn.Conv2d(feature.channels, context, 3, padding=1),
                nn.ReLU(inplace=True),
                nn.Conv2d(context, context, 3, padding=1),
                nn.ReLU(inplace=True),
                nn.Conv2d(context, width * full, 3, padding=1),
            )
            if context
            else None
        )
        self.detail = nn.Conv2d(width, width, 3, padding=1)
        self.image = nn.Conv2d(width, task.channels, 3, padding=1)
        nn.init.zeros_(self.image.weight)  # begins as the bicubic image
        assert self.image.bias is not None
        nn.init.zeros_(self.image.bias)

    def forward(self, boundary: Boundary, batch: Any) -> Tensor:
        """-> images [B, colours, s*h, s*w]."""
        features = as_map(boundary.entering[self.main], self.feature)
        norm = torch.linalg.vector_norm(features.detach().float(), dim=(1, 2, 3), keepdim=True)
        unit = (features[0].numel() ** 0.5 / norm.clamp_min(1e-6)).to(features.dtype)
        # the factor is the same for a whole image, so it may come after the convolutions that have no bias before it
        maps: Tensor | None = None
        if self.expand is not None:
            maps = F.conv2d(features, self.expand.weight) * unit
            assert self.expand.bias is not None
            maps = maps + self.expand.bias[:, None, None]
        if self.context is not None:
            small = F.avg_pool2d(features, REDUCTION, ceil_mode=True) * unit
            wide = F.interpolate(self.context(small), size=features.shape[-2:], mode="bilinear", align_corners=False)
            maps = wide if maps is None else maps + wide
        assert maps is not None
        full = F.relu(F.pixel_shuffle(maps, self.scale), inplace=True)
        full = full + F.relu(self.detail(full), inplace=True)
        residual = self.image(full)
        base = self.task.bicubic(batch)
        if residual.shape[-2:] != base.shape[-2:]:  # features whose grid is no whole part of the image's
            residual = F.interpolate(residual, size=base.shape[-2:], mode="bilinear", align_corners=False)
        return base + residual
