"""Labelled images with splits and loaders whose randomness is a pure function of (seed, epoch, sample index).

Nothing here reads or advances a global random generator: training checkpoints those, and a resumed run must be
bit-identical.

Shapes: B batch, C channels, H height, W width, N images of a split.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from glcan.data.preprocessing import Preprocessing
from glcan.errors import ConfigError, DataError, UnknownName

Batch = tuple[Tensor, Tensor]  # images float32 [B, C, H, W], labels int64 [B]


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed that depends on all `parts` and on nothing else."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little") >> 1


def generator(*parts: int | str) -> torch.Generator:
    """A CPU generator of its own for `parts`."""
    return torch.Generator().manual_seed(derive_seed(*parts))


def stratified_order(labels: Tensor, *parts: int | str) -> Tensor:
    """A random order of the images of `labels` [N], int64 [N], of which every prefix has the classes in proportion.

    So the first n are a stratified sample of size n, and samples of different sizes are nested.
    """
    shuffled = torch.randperm(len(labels), generator=generator("stratified", *parts))
    by_class = torch.argsort(labels[shuffled], stable=True)  # shuffled within each class
    counts = torch.bincount(labels)
    first = counts.cumsum(0) - counts
    sizes = counts[labels[shuffled[by_class]]]
    rank = torch.arange(len(labels)) - first[labels[shuffled[by_class]]]
    ties = torch.rand(len(counts), generator=generator("ties", *parts), dtype=torch.float64)
    key = (rank + ties[labels[shuffled[by_class]]]) / sizes
    return shuffled[by_class[torch.argsort(key, stable=True)]]


class Loader:
    """Batches of one epoch of one split; can be iterated several times, each time the same.

    `len()` is the number of batches in the epoch, counted from its beginning whatever `start` is.
    """

    def __init__(self, batches: Sequence[Tensor], start: int, produce: Callable[[Sequence[Tensor]], Iterator[Batch]]):
        self._batches, self._start, self._produce = batches, start, produce

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Batch]:
        return self._produce(self._batches[self._start :])


def check_loading(*, batch: int, epoch: int, start: int, workers: int) -> None:
    """Refuses numbers out of range that a loader was given.

    Raises:
        ConfigError: batch below 1, or one of the others below 0.
    """
    values = {"batch": batch, "epoch": epoch, "start": start, "workers": workers}
    for label, value in values.items():
        least = int(label == "batch")
        if value < least:
            raise ConfigError(f"{label}={value} of a loader: it must be at least {least}.")


def split_batches(
    split: str, indices: Tensor, batch: int, *, seed: int, epoch: int, start: int, drop_last: bool | None
) -> list[Tensor]:
    """The batches of one epoch, as indices: "train" shuffled by (seed, epoch), the others in order.

    Raises:
        ConfigError: no batch is left, or ``start`` is behind the last one.
    """
    if split == "train":
        indices = indices[torch.randperm(len(indices), generator=generator("order", seed, epoch))]
    batches = list(indices.split(batch))
    last = len(batches[-1])
    if drop_last is None:
        drop_last = split == "train" and last == 1 and len(batches) > 1
    if drop_last and last < batch:
        batches.pop()
    if not batches:
        raise ConfigError(f"batch={batch} with drop_last=True leaves none of the {len(indices)} {split} images.")
    if start > len(batches):
        raise ConfigError(f"start={start} of a loader: the epoch has {len(batches)} batches.")
    return batches


class ImageData(ABC):
    """A classification data set: what `glcan.data.load` returns.

    Attributes:
        name: the data set's name.
        classes: names of the classes; label i means `classes[i]`.
        shape: (C, H, W) as the model gets the images.
    """

    name: str
    classes: list[str]
    shape: tuple[int, int, int]

    def __init__(
        self,
        name: str,
        classes: Sequence[str],
        preprocessing: Preprocessing,
        labels: Mapping[str, Tensor],
        *,
        seed: int = 0,
        val: int | float = 0,
        limit: int | None = None,
    ) -> None:
        """See `glcan.data.load`; `labels` are int64 [N] of the sources "train", "test" and maybe "val"."""
        self.name, self.classes = name, list(classes)
        self.shape = (preprocessing.channels, preprocessing.size, preprocessing.size)
        self._preprocessing, self._seed = preprocessing, seed
        self._labels = dict(labels)
        for source, values in labels.items():
            if not len(values):
                raise DataError(f"The data set {name!r} has no {source} images.")
        self._splits = {source: (source, torch.arange(len(values))) for source, values in labels.items()}
        self.check(len(self.classes))
        self._splits |= self._divided(val, limit)

    def _divided(self, val: int | float, limit: int | None) -> dict[str, tuple[str, Tensor]]:
        labels = self._labels["train"]
        count = round(val * len(labels)) if isinstance(val, float) else val
        if isinstance(val, bool) or val < 0 or (isinstance(val, float) and val >= 1) or count >= len(labels):
            raise ConfigError(
                f"val={val} of {self.name!r}: it must be a number of images below {len(labels)}, the size of the "
                "train set, or a fraction of it below 1.0."
            )
        if val and not count:
            raise ConfigError(f"val={val} of the {len(labels)} train images of {self.name!r} is less than one image.")
        if limit is not None and limit < 1:
            raise ConfigError(f"limit={limit} of {self.name!r}: at least 1 train image is needed.")
        parts: dict[str, tuple[str, Tensor]] = {}
        chosen = torch.ones(len(labels), dtype=torch.bool)
        if count:
            held_out = stratified_order(labels, "val", self._seed)[:count].sort().values
            chosen[held_out] = False
            parts["val"] = ("train", held_out)
        if limit is not None:
            order = stratified_order(labels, "limit")
            chosen[order[chosen[order]][limit:]] = False
        parts["train"] = ("train", chosen.nonzero()[:, 0])
        return parts

    def size(self, split: str) -> int:
        """Images in the split "train", "val" (0 if there is none) or "test"."""
        if split not in ("train", "val", "test"):
            raise UnknownName("split", split, ["train", "val", "test"])
        return len(self._splits[split][1]) if split in self._splits else 0

    def labels(self, split: str) -> Tensor:
        """Labels of the split in the order of the data set, int64 [N]."""
        if not self.size(split):
            raise DataError(f"The data set {self.name!r} has no {split!r} split. Load it with val=0.1, for example.")
        source, indices = self._splits[split]
        return self._labels[source][indices]

    def check(self, num_classes: int) -> None:
        """Checks that all labels fit a model with `num_classes` outputs.

        Raises:
            DataError: a label outside 0 ... num_classes - 1; it names the label, the image and the range.
        """
        for split, (source, indices) in self._splits.items():
            labels = self._labels[source][indices]
            wrong = ((labels < 0) | (labels >= num_classes)).nonzero()
            if len(wrong):
                index = int(wrong[0])
                raise DataError(
                    f"Label {int(labels[index])} of {split} image {int(indices[index])} of the data set {self.name!r} "
                    f"is outside 0..{num_classes - 1} ({len(wrong)} of {len(labels)} labels are). Correct the labels, "
                    f"or use a model with at least {int(labels.max()) + 1} classes."
                )

    def preprocessing(self) -> dict[str, Any]:
        """How an image becomes what the model gets, as plain JSON values for `glcan.data.read_image`."""
        return self._preprocessing.as_dict()

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

        "train" is shuffled; its order is a pure function of (seed, epoch), and the augmentation of a sample one of
        (seed, epoch, sample index), whatever `batch`, `start`, `workers` and `device` are. "val" and "test" come in the
        order of the data set.

        Args:
            split: "train", "val" or "test".
            batch: images per batch.
            epoch: from 0.
            start: the first batch to yield; the ones before it cost nothing (mid-epoch resume).
            augment: by default only "train" is augmented.
            workers: processes that read image files; data sets in memory need none and ignore it.
            drop_last: True drops a last batch that is not full, False keeps it. By default a last batch is kept, except
                that "train" drops one of a single image, which BatchNorm cannot learn from.
            device: where the batches lie, by default the CPU. Data sets in memory are moved there as a whole (8 bits
                per value) and augmented there.

        Returns:
            An iterable of (images float32 [B, C, H, W], labels int64 [B]) with a length.

        Raises:
            UnknownName: another split. DataError: the data set has no such split.
            ConfigError: batch, epoch, start or workers out of range.
        """
        self.labels(split)  # refuses a split that is not there
        check_loading(batch=batch, epoch=epoch, start=start, workers=workers)
        source, indices = self._splits[split]
        batches = split_batches(split, indices, batch, seed=self._seed, epoch=epoch, start=start, drop_last=drop_last)
        if augment is None:
            augment = split == "train"
        where = torch.device("cpu" if device is None else device)
        return Loader(
            batches,
            start,
            lambda chosen: self._produce(
                source, chosen, epoch=epoch, augment=bool(augment), workers=workers, device=where
            ),
        )

    @abstractmethod
    def _produce(
        self, source: str, batches: Sequence[Tensor], *, epoch: int, augment: bool, workers: int, device: torch.device
    ) -> Iterator[Batch]:
        """Yields the images of `source` ("train", "val" or "test") with the indices of each of `batches`, int64 [B]."""
