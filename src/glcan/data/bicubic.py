"""Bicubic resampling by a whole factor, as MATLAB's ``imresize`` does it.

The field makes low-resolution images with ``imresize(image, 1/s, 'bicubic')``: R. Keys' cubic convolution with a = -0.5
(IEEE Transactions on Acoustics, Speech, and Signal Processing 29(6), 1981), widened by s when shrinking (antialiasing),
on an image that is mirrored beyond its border with the border pixel repeated. PyTorch's antialiased interpolation has
that kernel but cuts it off at the border instead; so the image is mirrored first, and the margin cut off again.

Shapes: C channels, H height, W width, s scale; leading dimensions are free.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from glcan.errors import DataError

__all__ = ["downsample", "mirrored", "shrink_pixels", "upsample"]

_REACH = 2  # of the kernel to either side, in pixels of the coarser grid


def downsample(images: Tensor, scale: int) -> Tensor:
    """Floating-point images [..., C, s*H, s*W] to [..., C, H, W]; values may overshoot their range a little.

    Raises:
        DataError: a size that is no multiple of the scale.
    """
    height, width = images.shape[-2:]
    if height % scale or width % scale:
        raise DataError(
            f"An image of {width} x {height} pixels cannot be shrunk by {scale}: its sizes must be multiples of "
            f"{scale}. Crop it to {width // scale * scale} x {height // scale * scale}."
        )
    return _resize(images, (height // scale, width // scale), _REACH * scale, _REACH)


def upsample(images: Tensor, scale: int) -> Tensor:
    """Floating-point images [..., C, H, W] to [..., C, s*H, s*W]; values may overshoot their range a little."""
    height, width = images.shape[-2:]
    return _resize(images, (height * scale, width * scale), _REACH, _REACH * scale)


def shrink_pixels(pixels: Tensor, scale: int) -> Tensor:
    """8-bit images [..., C, s*H, s*W] to 8-bit [..., C, H, W]: computed in double precision, rounded once at the end.

    That is ``im2uint8(imresize(im2double(image), 1/s))``. On 8-bit input MATLAB also rounds between the two directions,
    which moves some pixels by one level.

    Raises:
        DataError: a size that is no multiple of the scale.
    """
    return (downsample(pixels.to(torch.float64), scale) + 0.5).floor_().clamp_(0, 255).to(torch.uint8)


def _resize(images: Tensor, size: tuple[int, int], before: int, after: int) -> Tensor:
    """Mirrors by `before` pixels, resamples, and cuts `after` pixels off to get `size`."""
    leading = images.shape[:-3]
    flat = images.reshape(-1, *images.shape[-3:])
    for dimension in (-2, -1):
        flat = flat.index_select(dimension, mirrored(flat.shape[dimension], before, before, flat.device))
    target = [side + 2 * after for side in size]
    flat = F.interpolate(flat, target, mode="bicubic", antialias=True, align_corners=False)
    flat = flat[..., after : after + size[0], after : after + size[1]]
    return flat.reshape(*leading, *flat.shape[-3:])


def mirrored(size: int, before: int, after: int, device: torch.device) -> Tensor:
    """Indices of a row of `size` pixels, mirrored beyond its ends by so many pixels, the end pixels repeated."""
    around = torch.arange(-before, size + after, device=device) % (2 * size)
    return torch.minimum(around, 2 * size - 1 - around)
