"""Enlarging images of any size with a super-resolution model, whole or in overlapping tiles.

Shapes: B batch, h and w of the image, s scale, t tile.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from glcan.data.bicubic import mirrored, upsample
from glcan.errors import ConfigError

LEAST = 17
"""Pixels; smaller images are mirrored up to this and the result is cut: models that fill windows of up to 32 pixels by
reflection need more than half a window."""


def upscale(
    model: nn.Module,
    images: Tensor,
    *,
    tile: int | None = None,
    overlap: int | None = None,
    autocast: torch.dtype | None = None,
    scale: int | None = None,
    each_tile: Callable[[], object] | None = None,
) -> Tensor:
    """Images [B, 3, h, w] in 0..1 to float32 [B, 3, s*h, s*w], without a gradient, in evaluation mode.

    Neighbouring tiles overlap. In the middle half of an overlap the weight goes over from the one to the other in a
    straight line, so that no seam can show; the outer quarters, next to a border that the image does not have, do not
    count. Outside of overlaps the result is the tile's own: what the model gives for the whole image, if `overlap` is
    at least the reach of its receptive field (an EDSR of n blocks reaches at most 2n + 5 pixels). It is so to the bit
    where the arithmetic does not depend on the size of the image; oneDNN's and cuDNN's convolutions may differ in the
    last bit of a float. The model's training mode is left as it was.

    Args:
        model: on the device of `images`.
        images: floating point, of any size.
        tile: pixels of a tile's side, before enlargement; None: the whole image at once.
        overlap: least number of pixels that neighbouring tiles share, before enlargement; at most half a tile; by
            default an eighth of one.
        autocast: None, or the type of the autocast arithmetic.
        scale: raise if the model enlarges by another factor.
        each_tile: called after each tile.

    Raises:
        ConfigError: a tile or overlap out of range, or a model that does not enlarge both sides by one whole factor.
    """
    if tile is not None and tile < LEAST:
        raise ConfigError(f"tile={tile} pixels: it must be at least {LEAST}. Leave it out to enlarge whole images.")
    if overlap is None:
        overlap = 0 if tile is None else tile // 8
    if tile is not None and not 0 <= overlap <= tile // 2:
        raise ConfigError(f"overlap={overlap} pixels: it must lie in 0 ... {tile // 2}, half of the tile of {tile}.")
    height, width = images.shape[-2:]
    if min(height, width) < LEAST:
        padded = images
        for dimension, side in ((-2, height), (-1, width)):
            indices = mirrored(side, 0, max(0, LEAST - side), images.device)
            padded = padded.index_select(dimension, indices)
        result = upscale(model, padded, tile=tile, overlap=overlap, autocast=autocast, scale=scale, each_tile=each_tile)
        factor = result.shape[-1] // padded.shape[-1]
        return result[..., : height * factor, : width * factor].contiguous()
    device = images.device.type
    training = model.training
    model.eval()
    try:
        with (
            torch.inference_mode(),
            torch.autocast(device, dtype=autocast) if autocast is not None else contextlib.nullcontext(),
        ):
            if tile is None or (height <= tile and width <= tile):
                return _enlarged(model, images, scale, each_tile).clone()
            return _tiled(model, images, tile, overlap, scale, each_tile)
    finally:
        model.train(training)


def _tiled(
    model: nn.Module,
    images: Tensor,
    tile: int,
    overlap: int,
    scale: int | None,
    each_tile: Callable[[], object] | None,
) -> Tensor:
    height, width = images.shape[-2:]
    sides = (min(tile, height), min(tile, width))
    rows, columns = starts(height, sides[0], overlap), starts(width, sides[1], overlap)
    result: Tensor | None = None
    for i, top in enumerate(rows):
        for j, left in enumerate(columns):
            part = images[..., top : top + sides[0], left : left + sides[1]]
            enlarged = _enlarged(model, part, scale, each_tile)
            if result is None:
                scale = enlarged.shape[-1] // sides[1]
                result = enlarged.new_zeros(*enlarged.shape[:-2], height * scale, width * scale)
                down, across = (
                    weights(first, side, scale).to(enlarged.device)
                    for first, side in ((rows, sides[0]), (columns, sides[1]))
                )
            assert scale is not None
            place = result[..., top * scale : (top + sides[0]) * scale, left * scale : (left + sides[1]) * scale]
            place += enlarged * down[i][:, None] * across[j]
    assert result is not None
    return result


def starts(size: int, tile: int, overlap: int) -> list[int]:
    """First pixels of the fewest tiles that cover `size` pixels and overlap by `overlap` at least, evenly spread."""
    if size <= tile:
        return [0]
    count = math.ceil((size - overlap) / (tile - overlap))
    return [round(i * (size - tile) / (count - 1)) for i in range(count)]


def weights(first: list[int], tile: int, scale: int) -> Tensor:
    """How much each tile counts at its own enlarged pixels, [tiles, s*t]; at every pixel they add up to 1."""
    raw = torch.ones(len(first), tile * scale, dtype=torch.float64)
    for i, (one, other) in enumerate(itertools.pairwise(first)):
        shared = (one + tile - other) * scale
        if shared:
            ramp = ((torch.arange(shared, dtype=torch.float64) + 0.5) * 2 / shared - 0.5).clamp_(0, 1)
            raw[i, -shared:] *= ramp.flip(0)
            raw[i + 1, :shared] *= ramp
    total = torch.zeros((first[-1] + tile) * scale, dtype=torch.float64)
    for start, own in zip(first, raw, strict=True):
        total[start * scale : (start + tile) * scale] += own
    for start, own in zip(first, raw, strict=True):
        own /= total[start * scale : (start + tile) * scale]
    return raw.to(torch.float32)


def _enlarged(model: nn.Module, images: Tensor, scale: int | None, each_tile: Callable[[], object] | None) -> Tensor:
    result = model(images.clone())  # some models write into their input
    if each_tile is not None:
        each_tile()
    found = result.shape[-1] // images.shape[-1] if isinstance(result, Tensor) and result.ndim == 4 else 0
    if not found or result.shape != (*images.shape[:2], found * images.shape[2], found * images.shape[3]):
        shape = list(result.shape) if isinstance(result, Tensor) else type(result).__name__
        raise ConfigError(
            f"The model makes {shape} of an image {list(images.shape)}; super-resolution needs both sides enlarged by "
            "one whole factor. Choose a model for super-resolution."
        )
    if scale is not None and found != scale:
        raise ConfigError(
            f"The model enlarges {found} times, but the images need {scale} times. Give both the same scale."
        )
    return result.float()


def upscale_picture(
    model: nn.Module,
    picture: Image.Image,
    *,
    tile: int | None = None,
    overlap: int | None = None,
    autocast: torch.dtype | None = None,
) -> Image.Image:
    """A picture in mode L, LA, RGB or RGBA, as `open_picture` gives it, enlarged in the same mode.

    Grey goes through the model as RGB with three equal channels; alpha is enlarged bicubically, apart from the colours.

    Raises:
        ConfigError: as `upscale`, or a picture of another mode.
    """
    if picture.mode not in ("L", "LA", "RGB", "RGBA"):
        raise ConfigError(f"The picture has mode {picture.mode!r}; it must be L, LA, RGB or RGBA. Convert it.")
    device = next(model.parameters()).device
    colours = as_tensor(picture.convert("RGB"))[None].to(device)
    result = _picture(upscale(model, colours, tile=tile, overlap=overlap, autocast=autocast)[0])
    if picture.mode in ("L", "LA"):
        result = result.convert("L")
    if "A" in picture.getbands():
        alpha = as_tensor(picture.getchannel("A"))
        result.putalpha(_picture(upsample(alpha, result.width // picture.width)))
    return result


def open_picture(path: str | Path) -> Image.Image:
    """A picture file of any colour mode as 8-bit L, LA, RGB or RGBA, turned as its EXIF orientation says.

    Raises:
        DataError: the file is missing, no image, or truncated.
    """
    from glcan.data.preprocessing import open_image

    return open_image(path, None)


def as_tensor(picture: Image.Image) -> Tensor:
    """A picture of mode L or RGB as float32 [C, h, w] in 0..1."""
    pixels = torch.from_numpy(np.array(picture))
    return (pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1)).to(torch.float32).div_(255)


def _picture(image: Tensor) -> Image.Image:
    """The inverse, rounded and cut off."""
    pixels = image.clamp(0, 1).mul(255).round().to(torch.uint8).cpu().numpy()
    return Image.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0))
