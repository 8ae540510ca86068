"""The boxes of a detection data set, and how they are collected from annotation files.

Shapes: I images of a source, M boxes of all of them. Boxes are x1, y1, x2, y2 in pixels; labels count from 1, as
torchvision's detectors have it (0 is the background).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

_SHOWN = 3  # faulty boxes that a warning describes


@dataclass(frozen=True)
class Annotations:
    """The annotations of I images with M boxes together, those of one image side by side.

    Attributes:
        image_ids: of the images, as the files have them.
        sizes: int64 [I, 2], height and width.
        first: int64 [I + 1]; the boxes of image i are those from first[i] to before first[i + 1].
        boxes: float64 [M, 4], as annotated: they may reach over the image's border.
        labels: int64 [M], from 1.
        areas: float64 [M], of the objects (not always those of the boxes), in square pixels.
        crowd: bool [M]; such boxes are not learned, and predictions inside them count for nothing.
    """

    image_ids: list[int]
    sizes: Tensor
    first: Tensor
    boxes: Tensor
    labels: Tensor
    areas: Tensor
    crowd: Tensor

    def __len__(self) -> int:
        return len(self.image_ids)

    def of(self, index: int) -> slice:
        """Where the boxes of an image lie."""
        return slice(int(self.first[index]), int(self.first[index + 1]))

    def learnable(self) -> Tensor:
        """How many boxes of each image are to be learned, int64 [I]."""
        sums = torch.cat([torch.zeros(1, dtype=torch.int64), (~self.crowd).cumsum(0)])
        return sums[self.first[1:]] - sums[self.first[:-1]]


@dataclass
class AnnotationBuilder:
    """Collects annotations image by image, and what was wrong with boxes.

    Args:
        origin: the annotation file or folder, for messages.
    """

    origin: str
    image_ids: list[int] = field(default_factory=list)
    sizes: list[tuple[int, int]] = field(default_factory=list)
    rows: list[tuple[float, ...]] = field(default_factory=list)  # x1, y1, x2, y2, label, area, crowd
    first: list[int] = field(default_factory=lambda: [0])
    faults: list[str] = field(default_factory=list)

    def add(
        self,
        image_id: int,
        size: tuple[int, int],
        boxes: Iterable[tuple[str, Sequence[float], int, float | None, bool]],
    ) -> None:
        """Adds an image of (height, width) with its boxes: what to call it, corners, label, area or None, crowd."""
        height, width = size
        for what, (x1, y1, x2, y2), label, area, crowd in boxes:
            if not (x2 > x1 and y2 > y1):
                self.faults.append(f"{what} has no area ({x2 - x1:g} x {y2 - y1:g} pixels)")
            elif x1 >= width or y1 >= height or x2 <= 0 or y2 <= 0:
                self.faults.append(f"{what} lies outside its image of {width} x {height} pixels")
            else:
                area = (x2 - x1) * (y2 - y1) if area is None else area
                self.rows.append((x1, y1, x2, y2, label, area, crowd))
        self.image_ids.append(image_id)
        self.sizes.append(size)
        self.first.append(len(self.rows))

    def build(self) -> Annotations:
        """The annotations; one warning for all boxes that were left out."""
        if self.faults:
            shown = "; ".join(self.faults[:_SHOWN]) + ("; ..." if len(self.faults) > _SHOWN else "")
            warnings.warn(
                f"{len(self.faults)} boxes in {self.origin!r} are left out: {shown}. Correct or remove them.",
                stacklevel=2,
            )
        rows = torch.tensor(self.rows, dtype=torch.float64).reshape(-1, 7)
        return Annotations(
            image_ids=self.image_ids,
            sizes=torch.tensor(self.sizes, dtype=torch.int64).reshape(-1, 2),
            first=torch.tensor(self.first, dtype=torch.int64),
            boxes=rows[:, :4].contiguous(),
            labels=rows[:, 4].to(torch.int64),
            areas=rows[:, 5].contiguous(),
            crowd=rows[:, 6].bool(),
        )
