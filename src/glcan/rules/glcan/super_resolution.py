"""The auxiliary network of super-resolution: the image, from the block's own features alone.

- *local branch*: the end that super-resolution networks have themselves, a convolution, a sub-pixel shuffle and a
  convolution at full resolution. All of it is linear, so it is learned as two convolutions and computed as one;
- *global branch*: the features at a quarter of their resolution and convolutions there, brought back;
- *collaboration*: both are added, and shuffled to full resolution.

The image is made of the features and not added to a bicubic one. That would be learned faster, but features that only
have to tell what bicubic enlargement lacks soon hold nothing else, and the model's own end cannot make an image of them
(docs/findings.md).

The features are divided by their root mean square in the first batch, because networks work on pixels in 0..1 or in
0..255, and the mean colour of that batch is added.

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


def auxiliary_flops(channels: int, colours: int, scale: int, kernel: int, context: int) -> float:
    """Forward FLOPs of `SuperResolutionAuxiliary` for each pixel of the features."""
    outputs = colours * scale**2
    flops = 2.0 * (kernel + 2) ** 2 * channels * outputs if kernel else 0.0
    if context:
        flops += 2 * 9 * (channels * context + context * context + context * outputs) / REDUCTION**2
    return flops


def fit(channels: int, colours: int, scale: int, local: bool, context: bool, flops: float) -> tuple[int, int]:
    """(kernel, context) within so many FLOPs per pixel of the features; 0 for a branch that is not there.

    The side of the local branch's first convolution, 3 or else 1; and then the channels of the global branch, a
    multiple of 8 from 8 to as many as the features have.
    """
    least = 8 if context else 0
    kernel = 0
    if local:
        kernel = 3 if auxiliary_flops(channels, colours, scale, 3, least) <= flops else 1
    widths = range(least, channels + 1, 8) if context else ()
    fitting = (n for n in widths if auxiliary_flops(channels, colours, scale, kernel, n) <= flops)
    return kernel, max(fitting, default=least)


class FoldedEnd(nn.Module):
    """Features [B, C, h, w] -> [B, colours * s * s, h, w]: convolution, sub-pixel shuffle and convolution, as one.

    The weights of both convolutions are learned, but multiplied into one kernel, two pixels wider than the first one's,
    before the features see them, as SESR does (Bhardwaj et al. 2022, arXiv 2103.09404, section 3.2; there without a
    shuffle in between): the same function and gradient, but at the border of the image, for a fraction of the FLOPs.

    Args:
        channels: C.
        width: n, of the map at full resolution, which is never made.
        colours, scale: of the images.
        kernel: side of the first convolution, 3 or 1; the second one's is 3.
    """

    def __init__(self, channels: int, width: int, colours: int, scale: int, kernel: int) -> None:
        super().__init__()
        self.scale = scale
        self.expand = nn.Conv2d(channels, width * scale**2, kernel, bias=False)
        self.image = nn.Conv2d(width, colours, 3)

    def kernel(self) -> Tensor:
        """[colours * s * s, C, k + 2, k + 2]."""
        s = self.scale
        with torch.autocast(self.expand.weight.device.type, enabled=False):
            # The two convolutions' answer to an impulse in each channel: of k x k pixels, then two more.
            impulses = F.pixel_shuffle(self.expand.weight.flip(2, 3).transpose(0, 1), s)
            answers = F.conv2d(impulses, self.image.weight, padding=s + 1)
            return F.pixel_unshuffle(answers, s).transpose(0, 1).flip(2, 3)

    def forward(self, features: Tensor, size: Tensor) -> Tensor:
        """``size``: the features are divided by it first."""
        assert self.image.bias is not None
        bias = self.image.bias.repeat_interleave(self.scale**2)
        kernel = self.kernel() / size
        return F.conv2d(features, kernel, bias, padding=kernel.shape[-1] // 2)


class SuperResolutionAuxiliary(nn.Module):
    """Features [B, C, h, w] of a block -> images [B, colours, s*h, s*w].

    Args:
        main: which of the tensors that enter the cut holds the features.
        feature: of that tensor.
        colours: of the images.
        scale: from the features to the high-resolution image; 1 behind the model's own upsampler.
        width: n of the local branch, at most.
        kernel: side of its first convolution, 3 or 1; 0 for no local branch.
        context: channels of the global branch, 0 for none.
    """

    def __init__(
        self, main: int, feature: Feature, colours: int, scale: int, width: int, kernel: int, context: int
    ) -> None:
        super().__init__()
        self.main, self.feature, self.scale = main, feature, scale
        self.size: Tensor
        self.mean: Tensor
        self.register_buffer("size", torch.zeros(()))  # root mean square of the features; 0 before the first batch
        self.register_buffer("mean", torch.zeros(colours, 1, 1))
        channels = feature.channels
        self.end = FoldedEnd(channels, min(width, channels), colours, scale, kernel) if kernel else None
        self.context = (
            nn.Sequential(
                nn.Conv2d(channels, context, 3, padding=1),
                nn.ReLU(inplace=True),
                nn.Conv2d(context, context, 3, padding=1),
                nn.ReLU(inplace=True),
                nn.Conv2d(context, colours * scale**2, 3, padding=1),
            )
            if context
            else None
        )

    def forward(self, boundary: Boundary, batch: Any) -> Tensor:
        """-> images [B, colours, s*h, s*w]."""
        features, high = as_map(boundary.entering[self.main], self.feature), batch[1]
        with torch.no_grad():
            size = features.float().square().mean().sqrt().clamp_min(1e-6)
            self.mean.copy_(torch.where(self.size > 0, self.mean, high.float().mean((0, 2, 3))[:, None, None]))
            self.size.copy_(torch.where(self.size > 0, self.size, size))
        maps = self.end(features, self.size) if self.end is not None else None
        if self.context is not None:
            small = F.avg_pool2d(features, REDUCTION, ceil_mode=True) / self.size.to(features.dtype)
            wide = F.interpolate(self.context(small), size=features.shape[-2:], mode="bilinear", align_corners=False)
            maps = wide if maps is None else maps + wide
        assert maps is not None
        image = F.pixel_shuffle(maps, self.scale) + self.mean.to(maps.dtype)
        if image.shape[-2:] != high.shape[-2:]:  # features whose grid is no whole part of the image's
            image = F.interpolate(image, size=high.shape[-2:], mode="bilinear", align_corners=False)
        return image
