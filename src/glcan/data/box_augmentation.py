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
        visible: a box of which the window holds less than this share of the area is left out.
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
        if window != (height, width):
            top, left = round((height - window[0]) * down), round((width - window[1]) * right)
            image = F.resized_crop(image, top, left, *window, [height, width], antialias=True)
            where = F.resized_crop(where, top, left, *window, [height, width])
        whole = where.as_subclass(Tensor)
        inside = F.clamp_bounding_boxes(where).as_subclass(Tensor)
        sides = inside[:, 2:] - inside[:, :2]
        share = sides.prod(1) / (whole[:, 2:] - whole[:, :2]).prod(1)
        kept = ((share >= self.visible) & (sides >= 1).all(1)).nonzero()[:, 0]
        return image, inside[kept], kept
