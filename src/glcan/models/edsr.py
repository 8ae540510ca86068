"""EDSR, the residual network for super-resolution without normalisation layers.

Source: B. Lim, S. Son, H. Kim, S. Nah, K. M. Lee, "Enhanced Deep Residual Networks for Single Image Super-Resolution",
CVPR Workshops 2017, arXiv 1707.02921, section 3 and table 1: a convolution, residual blocks (convolution, ReLU,
convolution, times `res_scale`) with one more convolution, all skipped by the global shortcut, a sub-pixel upsampler
(one step for x2 and x3, two for x4), a convolution. The mean colour of DIV2K is taken off before and put back after.
The names of parameters and buffers are those of the authors' code (sanghyun-son/EDSR-PyTorch), so its weights fit.

| model | blocks x channels | x2 | x3 | x4 | paper |
|---|---|---|---|---|---|
| `edsr_baseline` | 16 x 64 | 1,369,859 | 1,554,499 | 1,517,571 | 1.5M (x4) |
| `edsr` | 32 x 256, res_scale 0.1 | 40,729,603 | 43,680,003 | 43,089,923 | 43M (x4) |

Shapes: B batch, C channels, H height and W width of the low-resolution image, s scale.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glcan.errors import ConfigError

SCALES = (2, 3, 4)
DIV2K_MEAN = (0.4488, 0.4371, 0.4040)
"""Mean red, green and blue of DIV2K's training images in 0..1, as in the authors' code."""


def _conv(in_channels: int, out_channels: int) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 3, padding=1)


class MeanShift(nn.Module):
    """Adds ``sign * pixel_range * mean`` to the colours; as the authors' frozen 1x1 convolution does."""

    def __init__(self, mean: tuple[float, ...], pixel_range: float, sign: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.eye(len(mean))[:, :, None, None])
        self.register_buffer("bias", sign * pixel_range * torch.tensor(mean))

    def forward(self, x: Tensor) -> Tensor:
        """Maps [B, C, H, W] to the same shape; the input is not written to."""
        return F.conv2d(x, self.weight, self.bias)  # type: ignore[arg-type]


class ResBlock(nn.Module):
    """Convolution, ReLU, convolution, times `res_scale`, plus the input.

    Kept for backward are the input and the output of the ReLU; everything else is overwritten, but never the input.
    """

    def __init__(self, channels: int, res_scale: float) -> None:
        super().__init__()
        self.body = nn.Sequential(_conv(channels, channels), nn.ReLU(inplace=True), _conv(channels, channels))
        self.res_scale = res_scale

    def forward(self, x: Tensor) -> Tensor:
        """Maps [B, channels, H, W] to the same shape."""
        out = self.body(x)
        if self.res_scale != 1:
            out *= self.res_scale
        out += x
        return out


def upsampler(scale: int, channels: int) -> nn.Sequential:
    """Sub-pixel upsampling, [B, channels, H, W] to [B, channels, s*H, s*W]: a convolution and a shuffle per step."""
    steps = (2, 2) if scale == 4 else (scale,)
    layers: list[nn.Module] = []
    for step in steps:
        layers += [_conv(channels, step**2 * channels), nn.PixelShuffle(step)]
    return nn.Sequential(*layers)


class EDSR(nn.Module):
    """EDSR with any number of blocks and channels: images [B, 3, H, W] in 0..1 to [B, 3, s*H, s*W].

    Args:
        blocks: residual blocks (16 in the baseline, 32 in the full model).
        channels: of every feature map (64; 256).
        scale: s, one of 2, 3, 4.
        res_scale: factor on every residual branch (1; 0.1).
        mean: colour that is taken off, in 0..1; its length is the number of colours.
        pixel_range: the network works on pixels in 0..pixel_range, 255 as in the authors' code.

    Raises:
        ConfigError: another scale, or numbers below 1.
    """

    def __init__(
        self,
        blocks: int = 16,
        channels: int = 64,
        scale: int = 2,
        res_scale: float = 1.0,
        mean: tuple[float, ...] = DIV2K_MEAN,
        pixel_range: float = 255.0,
    ) -> None:
        super().__init__()
        if scale not in SCALES:
            raise ConfigError(f"scale={scale} of EDSR: it must be one of {', '.join(map(str, SCALES))}.")
        for label, value in (("blocks", blocks), ("channels", channels), ("pixel_range", pixel_range)):
            if value < 1:
                raise ConfigError(f"{label}={value} of EDSR: it must be at least 1.")
        self.scale, self.pixel_range = scale, pixel_range
        colours = len(mean)
        self.sub_mean = MeanShift(tuple(mean), pixel_range, -1)
        self.head = nn.Sequential(_conv(colours, channels))
        self.body = nn.Sequential(*(ResBlock(channels, res_scale) for _ in range(blocks)), _conv(channels, channels))
        self.tail = nn.Sequential(upsampler(scale, channels), _conv(channels, colours))
        self.add_mean = MeanShift(tuple(mean), pixel_range, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Maps images [B, 3, H, W] to [B, 3, s*H, s*W], both in 0..1."""
        features = self.head(self.sub_mean(x * self.pixel_range))
        features = self.body(features) + features
        return self.add_mean(self.tail(features)) / self.pixel_range
