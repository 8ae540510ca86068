"""Pairs of low- and high-resolution photographs, with loaders whose randomness is a pure function of (seed, epoch).

Nothing here reads or advances a global random generator, so a resumed run sees the very same tensors.

Shapes: B batch, h and w of a low-resolution image, s scale, p side of a low-resolution patch. Colours are RGB.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from glcan.data.bicubic import shrink_pixels
from glcan.data.images import Batch, Loader, check_loading, generator
from glcan.errors import ConfigError, DataError, UnknownName

SCALES = (2, 3, 4)
CROPS = 16  # of each train image per epoch


@dataclass(frozen=True)
class Pair:
    """One photograph: low uint8 [3, h, w], high uint8 [3, s*h, s*w]; name says which in messages."""

    name: str
    low: Tensor
    high: Tensor

    @classmethod
    def of(cls, name: str, high: Tensor, scale: int, low: Tensor | None = None) -> Pair:
        """A pair from the high-resolution image [3, H, W], cropped at the right and the bottom to what fits.

        Args:
            name: for messages.
            high: uint8.
            scale: s.
            low: uint8 [3, h, w]; by default made from `high` (bicubic, antialiased, as MATLAB's imresize).

        Raises:
            DataError: an image smaller than s, or a low-resolution image that is not of size H // s, W // s.
        """
        height, width = high.shape[-2:]
        size = (height // scale, width // scale)
        if not all(size):
            raise DataError(
                f"The image {name!r} is {width} x {height} pixels, less than one pixel when shrunk {scale} times. "
                "Remove it, or lower the scale."
            )
        if low is not None and tuple(low.shape[-2:]) != size:
            raise DataError(
                f"The high-resolution image {name!r} is {width} x {height} pixels, so for scale {scale} its "
                f"low-resolution partner must be {size[1]} x {size[0]}, but it is {low.shape[-1]} x {low.shape[-2]}. "
                "Give the folder for this scale, or remove the low-resolution images: they are then made."
            )
        high = high[:, : size[0] * scale, : size[1] * scale].contiguous()
        return cls(name, shrink_pixels(high, scale) if low is None else low.contiguous(), high)


class PairData:
    """A super-resolution data set: what `glcan.data.load_pairs` returns.

    Args:
        name: of the data set.
        sources: pairs of "train", "test" and maybe "val"; one of the first two may be missing.
        scale: s.
        patch: p, pixels of the side of a low-resolution training patch.
        crops: patches taken from each train image in an epoch.
        For the others see `glcan.data.load_pairs`.

    Attributes:
        name, scale, patch, crops: as given.
        shape: (3, p, p), of what the model gets in training.

    Raises:
        DataError: no images, or a train image smaller than a patch. ConfigError: an argument out of range.
    """

    def __init__(
        self,
        name: str,
        sources: Mapping[str, Sequence[Pair]],
        *,
        scale: int,
        patch: int = 48,
        crops: int = CROPS,
        seed: int = 0,
        val: int | float = 0,
        limit: int | None = None,
    ) -> None:
        for label, value, least in (("patch", patch, 1), ("crops", crops, 1), ("limit", limit, 1)):
            if value is not None and value < least:
                raise ConfigError(f"{label}={value} of {name!r}: it must be at least {least}.")
        self.name, self.scale, self.patch, self.crops = name, scale, patch, crops
        self.shape = (3, patch, patch)
        self._seed = seed
        self._sources = {source: list(pairs) for source, pairs in sources.items()}
        if not any(self._sources.values()):
            raise DataError(f"The data set {name!r} has no images.")
        self._splits = {source: (source, torch.arange(len(pairs))) for source, pairs in self._sources.items()}
        if self.size("train"):
            self._splits |= self._divided(val, limit)
            self._check_patch()
        elif val:
            raise ConfigError(f"val={val} of {name!r}: it has no train images to split any off.")

    def _divided(self, val: int | float, limit: int | None) -> dict[str, tuple[str, Tensor]]:
        total = len(self._sources["train"])
        count = round(val * total) if isinstance(val, float) else val
        if isinstance(val, bool) or val < 0 or (isinstance(val, float) and val >= 1) or count >= total:
            raise ConfigError(
                f"val={val} of {self.name!r}: it must be a number of images below {total}, the size of the train set, "
                "or a fraction of it below 1.0."
            )
        if val and not count:
            raise ConfigError(f"val={val} of the {total} train images of {self.name!r} is less than one image.")
        parts: dict[str, tuple[str, Tensor]] = {}
        chosen = torch.ones(total, dtype=torch.bool)
        if count:
            held_out = torch.randperm(total, generator=generator("val", self._seed))[:count].sort().values
            chosen[held_out] = False
            parts["val"] = ("train", held_out)
        if limit is not None:
            order = torch.randperm(total, generator=generator("limit"))
            chosen[order[chosen[order]][limit:]] = False
        parts["train"] = ("train", chosen.nonzero()[:, 0])
        return parts

    def _check_patch(self) -> None:
        for pair in self.pairs("train"):
            height, width = pair.low.shape[-2:]
            if min(height, width) < self.patch:
                raise DataError(
                    f"The train image {pair.name!r} is {width * self.scale} x {height * self.scale} pixels, smaller "
                    f"than a patch of {self.patch * self.scale} ({self.patch} times the scale {self.scale}). "
                    f"Set a patch of at most {min(height, width)}, or remove the image."
                )

    def size(self, split: str) -> int:
        """Images in the split "train", "val" or "test"; 0 if there is none."""
        if split not in ("train", "val", "test"):
            raise UnknownName("split", split, ["train", "val", "test"])
        return len(self._splits[split][1]) if split in self._splits else 0

    def pairs(self, split: str) -> list[Pair]:
        """The whole images of a split, in the order of the data set.

        Raises:
            DataError: there is no such split.
        """
        if not self.size(split):
            remedy = {
                "train": "It is for evaluation; train on another one.",
                "val": "Load it with val=0.1, for example.",
                "test": "Give test images.",
            }[split]
            raise DataError(f"The data set {self.name!r} has no {split!r} split. {remedy}")
        source, indices = self._splits[split]
        return [self._sources[source][index] for index in indices.tolist()]

    def preprocessing(self) -> dict[str, Any]:
        """What the model gets, as plain JSON values."""
        return {"channels": 3, "scale": self.scale, "pixel_range": 1.0}

    def loader(
        self,
        split: str,
        batch: int,
        *,
        epoch: int = 0,
        start: int = 0,
        augment: bool | None = None,
        workers: int = 0,
        drop_last: bool | None = None,
        device: torch.device | str | None = None,
    ) -> Loader:
        """The batches of one epoch.

        "train" gives patches: `crops` of each image at random places, mirrored and turned by right angles at random,
        shuffled. The order is a pure function of (seed, epoch), place and turn of a patch one of (seed, epoch, patch
        index), whatever `batch`, `start` and `device` are. "val" and "test" give whole images in the order of the data
        set, one at a time whatever `batch` is, for their sizes differ.

        Args:
            split: "train", "val" or "test".
            batch: patches per batch.
            epoch: from 0.
            start: the first batch to yield; the ones before it cost nothing (mid-epoch resume).
            augment: False leaves out mirroring and turning.
            workers: ignored; the images are in memory.
            drop_last: drop a last batch that is not full; by default it is kept.
            device: where the batches lie, by default the CPU.

        Returns:
            An iterable of (low float32 [B, 3, p, p], high float32 [B, 3, s*p, s*p]), pixels in 0..1, with a length.

        Raises:
            UnknownName: another split. DataError: the data set has no such split.
            ConfigError: batch, epoch, start or workers out of range.
        """
        pairs = self.pairs(split)
        check_loading(batch=batch, epoch=epoch, start=start, workers=workers)
        where = torch.device("cpu" if device is None else device)
        if split == "train":
            images = self._splits["train"][1]
            samples = (images[:, None] * self.crops + torch.arange(self.crops)).flatten()
            order = torch.randperm(len(samples), generator=generator("order", self._seed, epoch))
            batches = list(samples[order].split(batch))
            if drop_last and len(batches[-1]) < batch:
                batches.pop()
            if not batches:
                raise ConfigError(f"batch={batch} with drop_last=True leaves none of the {len(samples)} patches.")
        else:
            batches = list(torch.arange(len(pairs)).split(1))
        if start > len(batches):
            raise ConfigError(f"start={start} of a loader: the epoch has {len(batches)} batches.")
        if split == "train":
            return Loader(batches, start, lambda chosen: self._patches(chosen, epoch, augment is not False, where))
        return Loader(batches, start, lambda chosen: self._whole(pairs, chosen, where))

    def _whole(self, pairs: Sequence[Pair], batches: Sequence[Tensor], device: torch.device) -> Iterator[Batch]:
        for indices in batches:
            pair = pairs[int(indices)]
            yield _floats(pair.low[None], device), _floats(pair.high[None], device)

    def _patches(self, batches: Sequence[Tensor], epoch: int, augment: bool, device: torch.device) -> Iterator[Batch]:
        source = self._sources["train"]
        total = len(source) * self.crops  # drawn for all images, so that a patch does not depend on who else is in use
        draw = generator("augment", self._seed, epoch)
        places = torch.rand(total, 2, generator=draw, dtype=torch.float64)
        turns = torch.randint(8, (total,), generator=draw)
        p, s = self.patch, self.scale
        for indices in batches:
            low, high = [], []
            for index in indices.tolist():
                pair = source[index // self.crops]
                room = torch.tensor(pair.low.shape[-2:]) - p + 1
                top, left = (places[index] * room).floor().to(torch.int64).tolist()
                patches = (
                    pair.low[:, top : top + p, left : left + p],
                    pair.high[:, top * s : (top + p) * s, left * s : (left + p) * s],
                )
                if augment:
                    patches = (turned(patches[0], int(turns[index])), turned(patches[1], int(turns[index])))
                low.append(patches[0])
                high.append(patches[1])
            yield _floats(torch.stack(low), device), _floats(torch.stack(high), device)


def turned(image: Tensor, turn: int) -> Tensor:
    """One of the eight ways to lay a square image [C, p, p] onto itself: bits 1 mirror, 2 flip, 4 transpose."""
    if turn & 1:
        image = image.flip(-1)
    if turn & 2:
        image = image.flip(-2)
    return image.transpose(-1, -2) if turn & 4 else image


def _floats(pixels: Tensor, device: torch.device) -> Tensor:
    return pixels.to(device).to(torch.float32).div_(255)


def warn_of_cropping(pairs: Sequence[tuple[str, tuple[int, int]]], scale: int) -> None:
    """Says once which images (name, (width, height)) are cropped because their sizes are no multiples of the scale."""
    odd = [(name, size) for name, size in pairs if size[0] % scale or size[1] % scale]
    if odd:
        name, (width, height) = odd[0]
        warnings.warn(
            f"{len(odd)} of {len(pairs)} images have sizes that are no multiples of {scale}; they are cropped at the "
            f"right and the bottom, for example {name!r} from {width} x {height} to "
            f"{width // scale * scale} x {height // scale * scale}.",
            stacklevel=3,
        )
