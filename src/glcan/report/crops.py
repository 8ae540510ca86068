"""Side by side: a crop of an enlarged image, bicubic, by a model, and as it really is."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor

from glcan.data.bicubic import upsample
from glcan.errors import DataError
from glcan.training.image_quality import psnr_y, quantized


def side_by_side(
    low: Tensor,
    result: Tensor,
    truth: Tensor | None = None,
    *,
    size: int = 96,
    place: tuple[int, int] | None = None,
) -> Figure:
    """A figure with the same square of the bicubic enlargement, of the result and, where it is known, of the truth.

    With the truth at hand the titles give PSNR of the luma over the whole image, its border of s pixels left out.

    Args:
        low: [3, h, w] in 0..1.
        result: [3, s*h, s*w].
        truth: as `result`.
        size: side of the square in enlarged pixels; at most that of the image.
        place: its first row and column; by default where result and bicubic enlargement differ most.

    Raises:
        DataError: sizes that do not fit each other, or a place outside the image.
    """
    scale = result.shape[-1] // low.shape[-1]
    expected = [3, low.shape[-2] * scale, low.shape[-1] * scale]
    if list(result.shape) != expected or (truth is not None and truth.shape != result.shape):
        raise DataError(
            f"An image {list(low.shape)}, its enlargement {list(result.shape)} and the true image "
            f"{None if truth is None else list(truth.shape)} do not belong together; the last two must be {expected}."
        )
    low, result = low.cpu().float(), quantized(result.cpu().float())
    bicubic = quantized(upsample(low, scale))
    size = min(size, *result.shape[-2:])
    top, left = place if place is not None else busiest(result - bicubic, size)
    if not (0 <= top <= result.shape[-2] - size and 0 <= left <= result.shape[-1] - size):
        raise DataError(
            f"A square of {size} pixels at row {top}, column {left} is not inside the image of {result.shape[-1]} x "
            f"{result.shape[-2]} pixels. Choose another place."
        )
    shown = [("bicubic", bicubic), ("result", result)]
    if truth is not None:
        shown.append(("truth", quantized(truth.cpu().float())))
    figure = Figure(figsize=(3 * len(shown), 3.3), layout="constrained")
    for axes, (title, image) in zip(figure.subplots(1, len(shown)), shown, strict=True):
        if truth is not None and title != "truth":
            title += f", {float(psnr_y(image[None], shown[-1][1][None], scale)):.2f} dB"
        axes.imshow(image[:, top : top + size, left : left + size].permute(1, 2, 0).numpy(), interpolation="nearest")
        axes.set_title(title)
        axes.set_axis_off()
    return figure


def busiest(difference: Tensor, size: int) -> tuple[int, int]:
    """First row and column of the square in which [3, H, W] has the largest mean absolute value, on a coarse grid."""
    step = max(1, size // 4)
    means = F.avg_pool2d(difference.abs().mean(0)[None, None], size, step)[0, 0]
    row, column = divmod(int(torch.argmax(means)), means.shape[1])
    return row * step, column * step
