"""The auxiliary network of super-resolution: the image, from the block's own features alone.

- *local branch*: the features at full resolution (a convolution and a sub-pixel shuffle), and a convolution *there*:
  the linear end that super-resolution networks have themselves, cheaply. Behind the model's own upsampler, the
  convolution alone.
- *global branch*: the features at a quarter of their resolution and convolutions there, brought back;
- *collaboration*: both are added before they are shuffled to full resolution.

The image is made of the features and not added to a bicubic one. That would be learned faster, but features that only
have to tell what bicubic enlargement lacks soon hold nothing else, and the model's own end cannot make an image of them
(docs/findings.md).

The features are divided by their root mean square in the first batch, because networks work on pixels in 0..1 or in
0..255. There is no batch normalisation, so the network may see a batch in parts, one after the other, with the same
gradient.

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

REDUCTION = 4
"""How much smaller than the features the global branch's map is, along each side."""


def auxiliary_flops(
    channels: int, width: int, kernel: int, colours: int, scale: int, local: bool, context: int
) -> float:
    """Forward FLOPs of `SuperResolutionAuxiliary` for each pixel of the features."""
    full = scale * scale
    shuffled = _shuffled(scale, local, context)
    flops = 2.0 * 9 * (width if shuffled else channels) * colours * full
    if local and shuffled:
        flops += 2.0 * kernel * kernel * channels * width * full
    if context:
        flops += 2 * 9 * (channels * context + context * context + context * width * full) / REDUCTION**2
    return flops


def _shuffled(scale: int, local: bool, context: int) -> bool:
    """Whether a map of the auxiliary network's own width goes before the convolution that makes the image."""
    return scale > 1 or not local or bool(context)


def fit_width_and_kernel(
    channels: int, colours: int, scale: int, local: bool, context: int, flops: float, most: int
) -> tuple[int, int]:
    """(width, kernel) within so many FLOPs per pixel of the features: the widest with a 3x3 kernel, else with 1x1."""
    for kernel in (3, 1):
        for width in range(most, 3, -4):
            if auxiliary_flops(channels, width, kernel, colours, scale, local, context) <= flops:
                return width, kernel
    return 4, 1


class SuperResolutionAuxiliary(nn.Module):
    """Features [B, C, h, w] of a block -> images [B, colours, s*h, s*w].

    Args:
        main: which of the tensors that enter the cut holds the features.
        feature: of that tensor.
        colours: of the images.
        scale: from the features to the high-resolution image; 1 behind the model's own upsampler.
        width, kernel: n, and the side of the convolution before the shuffle.
        local: the local branch.
        context: channels of the global branch, 0 for none.
        parts: the batch goes through in so many parts, one after the other.
    """

    def __init__(
        self,
        main: int,
        feature: Feature,
        colours: int,
        scale: int,
        width: int,
        kernel: int,
        local: bool,
        context: int,
        parts: int,
    ) -> None:
        super().__init__()
        self.main, self.feature, self.scale, self.parts = main, feature, scale, parts
        self.size: Tensor
        self.register_buffer("size", torch.zeros(()))  # root mean square of the features; 0 before the first batch
        channels, full = feature.channels, scale**2
        shuffled = _shuffled(scale, local, context)
        self.expand = nn.Conv2d(channels, width * full, kernel, padding=kernel // 2) if local and shuffled else None
        self.context = (
            nn.Sequential(
                nn.Conv2d(channels, context, 3, padding=1),
                nn.ReLU(inplace=True),
                nn.Conv2d(context, context, 3, padding=1),
                nn.ReLU(inplace=True),
                nn.Conv2d(context, width * full, 3, padding=1),
            )
            if context
            else None
        )
        self.image = nn.Conv2d(width if shuffled else channels, colours, 3, padding=1)

    def forward(self, boundary: Boundary, batch: Any) -> Tensor:
        """-> images [B, colours, s*h, s*w]."""
        features = as_map(boundary.entering[self.main], self.feature)
        with torch.no_grad():
            now = features.float().square().mean().sqrt().clamp_min(1e-6)
            self.size.copy_(torch.where(self.size > 0, self.size, now))
        features = features / self.size.to(features.dtype)
        maps = features if self.expand is None and self.context is None else None
        if self.expand is not None:
            maps = self.expand(features)
        if self.context is not None:
            small = F.avg_pool2d(features, REDUCTION, ceil_mode=True)
            wide = F.interpolate(self.context(small), size=features.shape[-2:], mode="bilinear", align_corners=False)
            maps = wide if maps is None else maps + wide
        assert maps is not None
        image: Tensor = self.image(F.pixel_shuffle(maps, self.scale))
        high = batch[1].shape[-2:]
        if image.shape[-2:] != high:  # features whose grid is no whole part of the image's
            image = F.interpolate(image, size=high, mode="bilinear", align_corners=False)
        return image
