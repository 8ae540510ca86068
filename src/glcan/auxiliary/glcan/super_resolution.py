"""GLCAN for super-resolution: the image, from the block's own features alone.

- *local branch*: the end that super-resolution networks have themselves, a convolution, a sub-pixel shuffle and a
  convolution at full resolution. All of it is linear, so it is learned as two convolutions and computed as one;
- *global branch*: the features at a quarter of their resolution and convolutions there, brought back;
- *collaboration*: both are added, and shuffled to full resolution.

The image is made of the features and not added to a bicubic one. That would be learned faster, but features that only
have to tell what bicubic enlargement lacks soon hold nothing else, and the model's own end cannot make an image of them
(docs/findings).

The features are divided by their root mean square in the first batch, because networks work on pixels in 0..1 or in
0..255, and the mean colour of that batch is added.

Shape letters: B batch, C channels, h x w the low-resolution map, s scale, n width.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glcan.auxiliary.base import AuxiliaryRule, Site
from glcan.auxiliary.glcan.budget import NAME, SUMMARY, check_budget, check_shared, share_of
from glcan.auxiliary.glcan.coupling import draw_together
from glcan.auxiliary.maps import as_map
from glcan.errors import ConfigError
from glcan.inspect.features import Feature
from glcan.inspect.isolation import Boundary
from glcan.tasks.super_resolution import SuperResolution

REDUCTION = 4
"""How much smaller than the features the global branch's map is, along each side."""


# Channels of the map at full resolution in the local branch, at most.
_WIDEST = 64


class GLCANSuperResolution(AuxiliaryRule):
    """The image from each block's own features, within a compute budget."""

    name: ClassVar[str] = NAME
    summary: ClassVar[str] = SUMMARY
    tasks: ClassVar[tuple[str, ...]] = ("super-resolution",)

    @dataclasses.dataclass(frozen=True)
    class Config:
        """Options.

        Attributes:
            budget: forward FLOPs of all auxiliary networks together, as a share of the model's.
            unit_share: each auxiliary network may cost this share of the model's average unit even where the budget
                would give it less, as with many blocks.
            use_local: the local branch.
            use_global: the global branch.
            width: channels of the global branch as a share of the features'; none: solved for the budget.
            coupling: before each pass, three or more auxiliary networks of the same structure move this share of the
                way to their mean; 0: each goes its own way.
            long_end: units of the last block, which learns as in end-to-end training, are recomputed so that it can be
                longer within the memory of the other blocks, up to this share of the model's forward FLOPs; 0: not.
        """

        budget: float = 0.045
        unit_share: float = 0.3
        use_local: bool = True
        use_global: bool = True
        width: float | None = None
        coupling: float = 0.1
        long_end: float = 0.32

        def __post_init__(self) -> None:
            check_budget(self.budget, self.unit_share)
            check_shared(self.use_local, self.use_global, self.width, self.long_end)
            if not 0 <= self.coupling <= 1:
                raise ConfigError(
                    f"glcan.coupling is {self.coupling}; it must lie in [0, 1], 0 for networks that go their own way."
                )

    config: Config

    @property
    def long_end(self) -> float:  # type: ignore[override]
        return self.config.long_end

    def build(self, site: Site) -> nn.Module:
        task = site.task
        assert isinstance(task, SuperResolution)
        assert task.channels is not None
        feature = site.trunk
        image = site.profile.image or feature.grid
        scale = max(1, round(task.scale * image[0] / feature.grid[0]))
        local, wide = self.config.use_local, self.config.use_global
        share = share_of(site, self.config.budget, self.config.unit_share)
        each = share / (site.profile.batch * math.prod(feature.grid))
        kernel, context = fit(feature.channels, task.channels, scale, local, wide, each)
        if wide and self.config.width is not None:
            context = max(8, 8 * round(self.config.width * feature.channels / 8))
        return SuperResolutionAuxiliary(site.main, feature, task.channels, scale, _WIDEST, kernel, context)

    def before_pass(self, auxiliary: nn.ModuleDict, model: nn.Module) -> None:
        if self.config.coupling:
            draw_together(auxiliary.values(), self.config.coupling)


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
