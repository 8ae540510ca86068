"""Pictures of detections, and the same as plain JSON values.

Shapes: N detections of one image, H height, W width. Boxes are x1, y1, x2, y2 in pixels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL.Image import Image

#: Colours of the classes, in turn (matplotlib's tab10).
COLOURS = (
    "#1f77b4",
    "#ff7f0e",
    "#2ca02c",
    "#d62728",
    "#9467bd",
    "#8c564b",
    "#e377c2",
    "#7f7f7f",
    "#bcbd22",
    "#17becf",
)
MIN_SCORE = 0.5


def draw_boxes(
    pixels: Tensor, prediction: Mapping[str, Tensor], classes: Sequence[str], *, min_score: float = MIN_SCORE
) -> Image:
    """An image with labelled boxes.

    Args:
        pixels: uint8 [3, H, W].
        prediction: boxes [N, 4] and labels [N] from 1; with scores [N] (of a detector), those below `min_score` are
            left out, and the rest are shown with their score. Without scores (ground truth) all are drawn.
        classes: names of the labels 1, 2, ...
    """
    from torchvision.transforms.v2 import functional as F
    from torchvision.utils import draw_bounding_boxes

    boxes, labels, scores = _shown(prediction, min_score)
    if len(boxes):
        height, width = pixels.shape[-2:]
        boxes = boxes.clamp(min=0).minimum(torch.tensor([width - 1, height - 1] * 2))
        texts = [
            _name(label, classes) + ("" if scores is None else f" {score:.2f}")
            for label, score in zip(
                labels.tolist(), [0.0] * len(labels) if scores is None else scores.tolist(), strict=True
            )
        ]
        colours = [COLOURS[(label - 1) % len(COLOURS)] for label in labels.tolist()]
        thickness = max(1, round(min(height, width) / 250))
        pixels = draw_bounding_boxes(pixels, boxes, labels=texts, colors=colours, width=thickness)
    return F.to_pil_image(pixels)


def describe_boxes(
    prediction: Mapping[str, Tensor], classes: Sequence[str], *, min_score: float = MIN_SCORE
) -> list[dict[str, Any]]:
    """What `draw_boxes` draws as plain values, best first: {"class", "box": [x1, y1, x2, y2] in pixels, "score"}."""
    boxes, labels, scores = _shown(prediction, min_score)
    found: list[dict[str, Any]] = [
        {"class": _name(label, classes), "box": [round(value, 2) for value in box]}
        for box, label in zip(boxes.tolist(), labels.tolist(), strict=True)
    ]
    if scores is None:
        return found
    for entry, score in zip(found, scores.tolist(), strict=True):
        entry["score"] = score
    return sorted(found, key=lambda entry: -entry["score"])


def _shown(prediction: Mapping[str, Tensor], min_score: float) -> tuple[Tensor, Tensor, Tensor | None]:
    """Boxes, labels and scores, without those of low score and without empty boxes."""
    boxes, labels, scores = prediction["boxes"].float(), prediction["labels"], prediction.get("scores")
    kept = (boxes[:, 2:] > boxes[:, :2]).all(1)
    if scores is not None:
        kept &= scores >= min_score
    return boxes[kept], labels[kept], None if scores is None else scores[kept]


def _name(label: int, classes: Sequence[str]) -> str:
    return classes[label - 1] if 1 <= label <= len(classes) else f"class {label}"
