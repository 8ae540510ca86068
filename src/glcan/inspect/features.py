"""How a tensor is read as a map: its layout, its channels and its grid."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

__all__ = ["Feature", "read_feature", "scaled_shape"]


@dataclasses.dataclass(frozen=True)
class Feature:
    """Shape of a tensor and how to read it as a map.

    Attributes:
        shape: as it is, the batch included.
        layout: "BCHW", "BHWC", "BNC" (tokens: `prefix` special ones, then the grid row by row), "BC" (no grid), or
            "?" (anything else: only the mean over all but the batch and the last dimension makes sense).
        channels: size of the channel dimension.
        grid: (height, width) of the map, (1, 1) where there is none.
        prefix: number of special tokens (class token, registers) before the grid.
    """

    shape: tuple[int, ...]
    layout: str
    channels: int
    grid: tuple[int, int]
    prefix: int = 0

    @property
    def bytes(self) -> int:
        """Size in bytes, as float32."""
        return 4 * math.prod(self.shape)

    def scaled(self, batch: int, other: int) -> Feature:
        """The same of a batch of another size; as it is where the first dimension does not tell images apart."""
        return dataclasses.replace(self, shape=scaled_shape(self.shape, batch, other))


def scaled_shape(shape: tuple[int, ...], batch: int, other: int) -> tuple[int, ...]:
    """The shape of a tensor of a batch, for a batch of another size; several rows an image may stand in it."""
    return (shape[0] * other // batch, *shape[1:]) if shape and shape[0] % batch == 0 else shape


def read_feature(shape: tuple[int, ...], batch: int, image: tuple[int, int] | None) -> Feature:
    """How to read a tensor of this shape as a map, given the size of the images that it comes from."""
    if len(shape) == 4 and image is not None:
        first, last = _fits(shape[2:4], image), _fits(shape[1:3], image)
        if last and not first:
            return Feature(shape, "BHWC", shape[3], (shape[1], shape[2]))
        return Feature(shape, "BCHW", shape[1], (shape[2], shape[3]))
    if len(shape) == 3 and shape[0] == batch and image is not None:
        for prefix in range(9):
            grid = _grid_of(shape[1] - prefix, image)
            if grid is not None:
                return Feature(shape, "BNC", shape[2], grid, prefix)
    if len(shape) == 2:
        return Feature(shape, "BC", shape[1], (1, 1))
    return Feature(shape, "?", shape[-1] if shape else 1, (1, 1))


def _fits(grid: Sequence[int], image: tuple[int, int]) -> bool:
    """Whether a map of this size can come from the image by down- or up-sampling both sides alike."""
    (h, w), (image_h, image_w) = grid, image
    down = max(1, round(image_h / h)), max(1, round(image_w / w))
    up = max(1, round(h / image_h)), max(1, round(w / image_w))
    even = max(down) <= 2 * min(down) and max(up) <= 2 * min(up)
    # rounding at each halving may lose up to one row a stage
    return even and abs(h / w - image_h / image_w) <= 0.35 * image_h / image_w


def _grid_of(tokens: int, image: tuple[int, int]) -> tuple[int, int] | None:
    """The grid with this number of cells whose sides stand as the image's do, if there is one."""
    if tokens < 1:
        return None
    best: tuple[int, int] | None = None
    wanted = image[0] / image[1]
    for h in range(1, tokens + 1):
        if tokens % h == 0:
            w = tokens // h
            if best is None or abs(h / w - wanted) < abs(best[0] / best[1] - wanted):
                best = (h, w)
    if best is None or abs(best[0] / best[1] - wanted) > 0.1 * wanted:
        return None
    patch = max(1, round(image[0] / best[0]))  # else as many tokens by chance, as the anchors of a detector
    whole = all(side in (pixels // patch, -(-pixels // patch)) for side, pixels in zip(best, image, strict=True))
    return best if whole else None
