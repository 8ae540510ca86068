"""How images with boxes are augmented.

Shapes: N boxes of one image, n of them kept, H height, W width. Boxes are x1, y1, x2, y2 in pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class BoxAugmentation:
    """A mirror, and a change of scale: a window of the image (or around it, black outside) becomes the new image.

    The image keeps its size, because detectors resize every image to one size themselves.

    Attributes:
        flip: mirror left-right with probability 1/2.
        scale: limits of the factor, drawn uniformly in its logarithm; (1, 1): none.
        visible: a box of which the window holds less than this share of the area is left out, and one that is
            left with a side of less than a pixel.
    """

    flip: bool = True
    scale: tuple[float, float] = (0.8, 1.25)
    visible: float = 0.3

    def __call__(self, image: Tensor, boxes: Tensor, draw: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Maps an image [3, H, W] and boxes [N, 4] to the same, with the rows of the boxes kept, int64 [n]."""
        from torchvision import tv_tensors
        from torchvision.transforms.v2 import functional as F

        height, width = image.shape[-2:]
        mirrored, zoom, down, right = torch.rand(4, generator=draw, dtype=torch.float64).tolist()
        where: Any = tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=(height, width))  # type: ignore[call-arg]
        if self.flip and mirrored < 0.5:
            image, where = F.horizontal_flip(image), F.horizontal_flip(where)
        low, high = self.scale
        factor = low * (high / low) ** zoom
        window = max(1, round(height / factor)), max(1, round(width / factor))
        top, left = round((height - window[0]) * down), round((width - window[1]) * right)
        share = _share_inside(where.as_subclass(Tensor), top, left, *window)  # torchvision's crop clamps: not after it
        if window != (height, width):
            image = F.resized_crop(image, top, left, *window, [height, width], antialias=True)
            where = F.resized_crop(where, top, left, *window, [height, width])
        inside = F.clamp_bounding_boxes(where).as_subclass(Tensor)
        large = (inside[:, 2:] - inside[:, :2] >= 1).all(1)
        kept = ((share >= self.visible) & large).nonzero()[:, 0]
        return image, inside[kept], kept


def _share_inside(boxes: Tensor, top: int, left: int, height: int, width: int) -> Tensor:
    """The share of the area of each of the boxes [N, 4] that lies in a window, [N]; NaN for a box without area."""
    window = boxes.new_tensor([left, top, left + width, top + height])
    corner, opposite = boxes[:, :2].maximum(window[:2]), boxes[:, 2:].minimum(window[2:])
    return (opposite - corner).clamp(min=0).prod(1) / (boxes[:, 2:] - boxes[:, :2]).prod(1)
