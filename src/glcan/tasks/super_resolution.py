"""Super-resolution of single images: low-resolution [B, C, h, w] and high-resolution [B, C, s*h, s*w], both in 0..1."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from glcan.errors import ConfigError, DataError, UnknownName
from glcan.tasks.base import Task

CHARBONNIER_EPSILON = 1e-3  # as Lai et al. 2017 (LapSRN), arXiv 1704.03915, section 3.3, on pixels in 0..1


def charbonnier(output: Tensor, target: Tensor) -> Tensor:
    """Mean of sqrt(difference^2 + epsilon^2), epsilon 1e-3."""
    return ((output - target).square() + CHARBONNIER_EPSILON**2).sqrt().mean()


CRITERIA: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"l1": F.l1_loss, "charbonnier": charbonnier}


class SuperResolution(Task):
    """The same distance to the true image for the model's output and for every auxiliary network's.

    A batch is ``(low, high)``: floating-point images [B, C, h, w] and [B, C, s*h, s*w] with pixels in 0..1. The model
    maps the one to the other; an auxiliary network's prediction is an image [B, C, s*h, s*w] too.

    Args:
        criterion: "l1" (mean absolute difference), "charbonnier", or ``criterion(output, high) -> scalar``.
        scale: s of `example`, for planning.

    Attributes:
        scale: s, found from the model's output when the task is prepared.
        channels: C of the images, found likewise; before, None.
    """

    name: ClassVar[str] = "super-resolution"
    images_apart: ClassVar[bool] = True

    def __init__(self, criterion: str | Callable[[Tensor, Tensor], Tensor] = "l1", scale: int = 2) -> None:
        if isinstance(criterion, str) and criterion not in CRITERIA:
            raise UnknownName("criterion", criterion, CRITERIA)
        self.criterion = CRITERIA[criterion] if isinstance(criterion, str) else criterion
        if scale < 1:
            raise ConfigError(f"scale={scale} of super-resolution: it must be at least 1, for example 2.")
        self.scale = scale
        self.channels: int | None = None

    def example(self, batch: int, channels: int, image: tuple[int, int]) -> tuple[Any, ...]:
        low = torch.zeros(batch, channels, *image)
        return low, torch.zeros(batch, channels, self.scale * image[0], self.scale * image[1])

    def prepare(self, shapes: tuple[tuple[int, ...], ...], batch: tuple[Any, ...]) -> None:
        if len(batch) != 2 or not all(isinstance(images, Tensor) and images.ndim == 4 for images in batch):
            raise ConfigError(
                "A super-resolution batch is (low, high), two tensors of images [B, C, h, w] and [B, C, s*h, s*w]; "
                f"this one is {_described(batch)}."
            )
        low, high = batch
        maps = [shape for shape in shapes if len(shape) == 4]
        if len(maps) != 1:
            raise ConfigError(
                f"The model returns tensors of shapes {list(shapes)}; super-resolution needs one image "
                "[B, C, s*h, s*w]. Wrap the model so that it returns that alone."
            )
        scale = _factor(low.shape, maps[0])
        if scale is None:
            raise ConfigError(
                f"The model makes {list(maps[0])} of images {list(low.shape)}; super-resolution needs the same batch "
                "and channels, and height and width by one whole factor. Choose a model for images of this kind."
            )
        if tuple(high.shape) != tuple(maps[0]):
            raise DataError(
                f"The model enlarges {scale} times, to {list(maps[0])}, but the high-resolution images are "
                f"{list(high.shape)} ({_described_factor(low.shape, high.shape)}). "
                "Give model and data the same scale."
            )
        for name, images in (("low", low), ("high", high)):
            if not images.is_floating_point():
                raise DataError(f"The {name}-resolution images are {images.dtype}; they must be floats in 0..1.")
            if images.numel() and not isinstance(images, FakeTensor):
                least, most = (float(value) for value in torch.aminmax(images.detach().float()))
                if least < -1 or most > 2:  # bicubic resampling may overshoot a little
                    raise DataError(
                        f"The {name}-resolution images have pixels in {least:g} ... {most:g}; they must lie in 0..1. "
                        "Divide 8-bit pixels by 255."
                    )
        self.scale, self.channels = scale, int(high.shape[1])

    def loss(self, output: Tensor, batch: tuple[Any, ...]) -> Tensor:
        if not isinstance(output, Tensor):
            raise ConfigError(
                f"The model returned {type(output).__name__}; super-resolution needs one tensor of images "
                "[B, C, s*h, s*w]. Wrap the model so that it returns that alone."
            )
        return self.local_loss(output, batch)

    def local_loss(self, prediction: Tensor, batch: tuple[Any, ...]) -> Tensor:
        high = batch[1]
        if prediction.shape != high.shape:  # broadcasting would hide it
            raise DataError(
                f"A prediction is {list(prediction.shape)} but the high-resolution images are {list(high.shape)}. "
                "Give model and data the same scale."
            )
        return self.criterion(prediction.to(high.dtype), high)


def _factor(low: tuple[int, ...], high: tuple[int, ...]) -> int | None:
    """The whole factor between two shapes [B, C, h, w], None if there is none."""
    scale = high[2] // low[2]
    return scale if scale >= 1 and tuple(high) == (low[0], low[1], low[2] * scale, low[3] * scale) else None


def _described_factor(low: tuple[int, ...], high: tuple[int, ...]) -> str:
    scale = _factor(low, high)
    return f"{scale} times the low-resolution ones" if scale else f"no whole factor of {list(low)}"


def _described(batch: tuple[Any, ...]) -> str:
    return (
        ", ".join(str(list(item.shape)) if isinstance(item, Tensor) else type(item).__name__ for item in batch)
        or "empty"
    )
