"""Data sets of small images, held in memory as 8-bit pixels and augmented a batch at a time.

Shapes: B batch, N images, C channels, H height, W width (here H = W = crop), P padding.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from glcan.data.images import Batch, ImageData, generator
from glcan.data.preprocessing import Preprocessing
from glcan.errors import DataError


@dataclass(frozen=True)
class Augmentation:
    """The usual augmentation of small images: a crop at a random place of the zero-padded image, and a mirror.

    Attributes:
        padding: black pixels put around the image before a window of its own size is cut out; 0: no crop.
        flip: mirror left-right with probability 1/2.
    """

    padding: int = 0
    flip: bool = False

    def __call__(self, pixels: Tensor, offsets: Tensor, mirrored: Tensor) -> Tensor:
        """Maps pixels [B, C, H, W], offsets int64 [B, 2] in 0..2P and mirrored bool [B] to [B, C, H, W]."""
        height, width = pixels.shape[-2:]
        if self.padding:
            padded = F.pad(pixels, (self.padding,) * 4)
            windows = padded.unfold(2, height, 1).unfold(3, width, 1)  # a view [B, C, 2P+1, 2P+1, H, W]
            rows = torch.arange(len(pixels), device=pixels.device)
            pixels = windows[rows, :, offsets[:, 0], offsets[:, 1]]
        if self.flip:
            pixels = torch.where(mirrored[:, None, None, None], pixels.flip(-1), pixels)
        return pixels


class TensorImages(ImageData):
    """Images in memory.

    Args:
        images: uint8 [N, C, H, W] of the sources "train", "test" and maybe "val", with H = W.
        labels: int64 [N] of the same sources.
        size: H = W that the model gets, by default that of the images; else the augmented and normalised batch is
            interpolated.
        mean, std: per channel of pixels in 0..1; by default computed from the train images.
        For the others see `ImageData` and `glcan.data.load`.

    Raises:
        DataError: images that are not uint8 squares, numbers of images and labels that differ, labels out of range.
    """

    def __init__(
        self,
        name: str,
        classes: Sequence[str],
        images: Mapping[str, Tensor],
        labels: Mapping[str, Tensor],
        *,
        augmentation: Augmentation | None = None,
        size: int | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        seed: int = 0,
        val: int | float = 0,
        limit: int | None = None,
    ) -> None:
        for source, pixels in images.items():
            if pixels.dtype != torch.uint8 or pixels.ndim != 4 or pixels.shape[-1] != pixels.shape[-2]:
                raise DataError(
                    f"The {source} images of {name!r} are {pixels.dtype!s} {list(pixels.shape)}; "
                    "they must be torch.uint8 [N, C, H, W] with H = W."
                )
            if len(pixels) != len(labels[source]):
                raise DataError(f"{name!r} has {len(pixels)} {source} images but {len(labels[source])} labels.")
        channels, crop = images["train"].shape[1], images["train"].shape[-1]
        if mean is None or std is None:
            mean, std = _moments(images["train"])
        preprocessing = Preprocessing(channels, crop, crop, tuple(mean), tuple(std), size or crop)
        super().__init__(name, classes, preprocessing, labels, seed=seed, val=val, limit=limit)
        self._augmentation = augmentation or Augmentation()
        self._held = {
            (source, torch.device("cpu")): (pixels.contiguous(), labels[source]) for source, pixels in images.items()
        }

    def _produce(
        self, source: str, batches: Sequence[Tensor], *, epoch: int, augment: bool, workers: int, device: torch.device
    ) -> Iterator[Batch]:
        if (source, device) not in self._held:
            pixels, labels = self._held[source, torch.device("cpu")]
            self._held[source, device] = (pixels.to(device), labels.to(device))
        pixels, labels = self._held[source, device]
        if augment:  # drawn for the whole source, so that a sample's share does not depend on who else is in use
            draw = generator("augment", self._seed, epoch)
            offsets = torch.randint(2 * self._augmentation.padding + 1, (len(pixels), 2), generator=draw).to(device)
            mirrored = (torch.rand(len(pixels), generator=draw) < 0.5).to(device)
        for indices in batches:
            indices = indices.to(device)
            chosen = pixels[indices]
            if augment:
                chosen = self._augmentation(chosen, offsets[indices], mirrored[indices])
            yield self._preprocessing.normalise(chosen), labels[indices]


def _moments(pixels: Tensor) -> tuple[list[float], list[float]]:
    """Mean and standard deviation per channel, of pixels in 0..1, exact: from a histogram of uint8 [N, C, H, W]."""
    values = torch.arange(256, dtype=torch.float64) / 255
    mean, std = [], []
    for channel in pixels.unbind(1):
        share = torch.bincount(channel.reshape(-1), minlength=256).to(torch.float64) / channel.numel()
        mean.append(float((share * values).sum()))
        std.append(max(float((share * (values - mean[-1]) ** 2).sum()) ** 0.5, 1 / 255))
    return mean, std
