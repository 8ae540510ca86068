"""Images with boxes: splits, augmentation, ground truth, and loaders that a run can be resumed on bit for bit.

As for classification, nothing here reads or advances a global random generator: the order is a pure function of (seed,
epoch), a sample's augmentation one of (seed, epoch, sample index).

Shapes: B images of a batch, N boxes of one image, I images of a source, H height, W width.
Boxes are x1, y1, x2, y2 in pixels; labels count from 1, as torchvision's detectors have it (0 is the background).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from glcan.data.annotations import Annotations
from glcan.data.box_augmentation import BoxAugmentation
from glcan.data.images import check_loading, derive_seed, generator, split_batches
from glcan.data.preprocessing import read_pixels
from glcan.errors import ConfigError, DataError, UnknownName

__all__ = ["BoxAugmentation", "DetectionData", "DetectionLoader", "read_pixels"]

Target = dict[str, Tensor]
DetectionBatch = tuple[list[Tensor], list[Target]]


class DetectionLoader:
    """Batches of one epoch of one split; see `glcan.data.images.Loader`."""

    def __init__(self, data: DetectionData, source: str, batches: Sequence[Tensor], start: int, **how: Any) -> None:
        self._data, self._source, self._batches, self._start, self._how = data, source, batches, start, how

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[DetectionBatch]:
        return self._data._produce(self._source, self._batches[self._start :], **self._how)


class DetectionData(ABC):
    """A detection data set: what `glcan.data.load_detection` returns.

    The "train" split has the images with at least one box to learn, as the field's recipes for COCO; "val" (a part of
    the train images) and "test" have all images.

    Args:
        name: the data set's name.
        classes: names of the kinds of objects; label i means ``classes[i - 1]``.
        annotations: of the sources "train" and "test".
        image_size: pixels of the shorter side that the model is to resize images to; None: the model's default.
        category_ids: the classes' numbers in COCO files; by default 1, 2, ...
        augmentation: of the train images.
        seed, val, limit: see `glcan.data.load`; val and limited images are drawn at random.

    Attributes:
        shape: (3, image_size, image_size); images may differ in size, the model resizes them.

    Raises:
        DataError: no images in a source, or a split without boxes of single objects.
        ConfigError: `val` or `limit` out of range.
    """

    def __init__(
        self,
        name: str,
        classes: Sequence[str],
        annotations: Mapping[str, Annotations],
        *,
        image_size: int | None = None,
        category_ids: Sequence[int] | None = None,
        augmentation: BoxAugmentation | None = None,
        seed: int = 0,
        val: int | float = 0,
        limit: int | None = None,
    ) -> None:
        self.name, self.classes, self.image_size = name, list(classes), image_size
        self.shape = (3, image_size, image_size)
        self.category_ids = list(category_ids or range(1, len(classes) + 1))
        self._annotations, self._seed = dict(annotations), seed
        self._augmentation = augmentation or BoxAugmentation()
        for source, values in annotations.items():
            if not len(values):
                raise DataError(f"The data set {name!r} has no {source} images.")
        train = self._annotations["train"]
        self._splits = {source: (source, torch.arange(len(values))) for source, values in annotations.items()}
        self._splits |= self._divided(train.learnable() > 0, val, limit)
        self._check_objects()

    def _check_objects(self) -> None:
        """Refuses splits without an object now: measuring them would end the training after its last epoch."""
        for split, (source, indices) in self._splits.items():
            if not bool((self._annotations[source].learnable()[indices] > 0).any()):
                remedy = (
                    "Choose another val or another seed" if split == "val" else "Give annotations of single objects"
                )
                raise DataError(
                    f"None of the {len(indices)} {split} images of {self.name!r} has a box of a single object (crowds "
                    f"do not count), so that no mAP can be computed. {remedy}."
                )

    def _divided(self, useful: Tensor, val: int | float, limit: int | None) -> dict[str, tuple[str, Tensor]]:
        number = len(useful)
        count = round(val * number) if isinstance(val, float) else val
        if isinstance(val, bool) or val < 0 or (isinstance(val, float) and val >= 1) or count >= number:
            raise ConfigError(
                f"val={val} of {self.name!r}: it must be a number of images below {number}, the size of the train "
                "set, or a fraction of it below 1.0."
            )
        if val and not count:
            raise ConfigError(f"val={val} of the {number} train images of {self.name!r} is less than one image.")
        if limit is not None and limit < 1:
            raise ConfigError(f"limit={limit} of {self.name!r}: at least 1 train image is needed.")
        parts: dict[str, tuple[str, Tensor]] = {}
        chosen = useful.clone()
        if count:
            held_out = torch.randperm(number, generator=generator("val", self._seed))[:count].sort().values
            chosen[held_out] = False
            parts["val"] = ("train", held_out)
        if limit is not None:
            order = torch.randperm(number, generator=generator("limit"))
            chosen[order[chosen[order]][limit:]] = False
        if not chosen.any():
            raise DataError(
                f"None of the {number} train images of {self.name!r} has a box to learn (crowds are not learned). "
                "Give annotations of single objects, or lower val."
            )
        parts["train"] = ("train", chosen.nonzero()[:, 0])
        return parts

    def size(self, split: str) -> int:
        """Images in the split "train", "val" (0 if there is none) or "test"."""
        if split not in ("train", "val", "test"):
            raise UnknownName("split", split, ["train", "val", "test"])
        return len(self._splits[split][1]) if split in self._splits else 0

    def _indices(self, split: str) -> tuple[str, Tensor]:
        if not self.size(split):
            raise DataError(f"The data set {self.name!r} has no {split!r} split. Load it with val=0.1, for example.")
        return self._splits[split]

    def check(self, num_classes: int) -> None:
        """Checks that all labels fit a model with `num_classes` outputs, the background included.

        Raises:
            DataError: a label that is too large.
        """
        largest = max(int(v.labels.max()) for v in self._annotations.values() if len(v.labels))
        if largest >= num_classes:
            raise DataError(
                f"The data set {self.name!r} has labels up to {largest}, but the model has {num_classes} outputs, "
                f"background included. Use a model with num_classes={len(self.classes) + 1}."
            )

    def preprocessing(self) -> dict[str, Any]:
        """How an image becomes what the model gets, as plain JSON values; the model itself resizes and normalises."""
        return {"channels": 3, "size": self.image_size}

    def ground_truth(self, split: str) -> dict[str, Any]:
        """All annotations of a split, crowds included, as a COCO file has them (for `glcan.training.coco_metrics`)."""
        source, indices = self._indices(split)
        annotations = self._annotations[source]
        images: list[dict[str, Any]] = []
        objects: list[dict[str, Any]] = []
        for index in indices.tolist():
            height, width = annotations.sizes[index].tolist()
            image_id = annotations.image_ids[index]
            images.append({"id": image_id, "width": width, "height": height})
            where = annotations.of(index)
            for box, label, area, crowd in zip(
                annotations.boxes[where].tolist(),
                annotations.labels[where].tolist(),
                annotations.areas[where].tolist(),
                annotations.crowd[where].tolist(),
                strict=True,
            ):
                x1, y1, x2, y2 = box
                objects.append(
                    {
                        "id": len(objects) + 1,
                        "image_id": image_id,
                        "category_id": self.category_ids[label - 1],
                        "bbox": [x1, y1, x2 - x1, y2 - y1],
                        "area": area,
                        "iscrowd": int(crowd),
                    }
                )
        categories = [{"id": i, "name": name} for i, name in zip(self.category_ids, self.classes, strict=True)]
        return {"images": images, "annotations": objects, "categories": categories}

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
    ) -> DetectionLoader:
        """The batches of one epoch, as `glcan.data.ImageData.loader` gives them for classification.

        Returns:
            An iterable of (images, targets) with a length: a list of B images, float32 [3, H, W] in 0..1, and a list of
            B dicts with boxes float32 [N, 4], labels int64 [N] from 1, and image_id int64 []. N may be 0; crowds are
            not among the boxes.

        Raises:
            UnknownName: another split. DataError: the data set has no such split.
            ConfigError: batch, epoch, start or workers out of range.
        """
        source, indices = self._indices(split)
        check_loading(batch=batch, epoch=epoch, start=start, workers=workers)
        batches = split_batches(split, indices, batch, seed=self._seed, epoch=epoch, start=start, drop_last=drop_last)
        augmented = split == "train" if augment is None else augment
        seed = derive_seed("augment", self._seed, epoch) if augmented else None
        where = torch.device("cpu" if device is None else device)
        return DetectionLoader(self, source, batches, start, seed=seed, workers=workers, device=where)

    def _produce(
        self, source: str, batches: Sequence[Tensor], *, seed: int | None, workers: int, device: torch.device
    ) -> Iterator[DetectionBatch]:
        loader: DataLoader[tuple[Tensor, Target] | DataError] = DataLoader(
            _Samples(self, source, seed),
            batch_sampler=[indices.tolist() for indices in batches],
            num_workers=workers,
            collate_fn=_collate,
            pin_memory=device.type == "cuda",
            generator=generator("workers", seed or 0),  # else the loader draws from torch's global generator
        )
        for batch in loader:
            if isinstance(batch, DataError):
                raise batch
            images, targets = batch
            if device.type != "cpu":
                images = [image.to(device, non_blocking=True) for image in images]
                targets = [{k: v.to(device, non_blocking=True) for k, v in target.items()} for target in targets]
            yield images, targets

    def sample(self, source: str, index: int, seed: int | None) -> tuple[Tensor, Target]:
        """An image and its target, as `loader` gives them; augmented with a `seed`."""
        from torchvision.transforms.v2 import functional as F

        annotations = self._annotations[source]
        where = annotations.of(index)
        single = ~annotations.crowd[where]
        boxes, labels = annotations.boxes[where][single].float(), annotations.labels[where][single]
        height, width = annotations.sizes[index].tolist()
        boxes = boxes.clamp(min=0).minimum(torch.tensor([width, height] * 2, dtype=torch.float32))
        image = self._pixels(source, index)
        if seed is not None:
            image, boxes, kept = self._augmentation(image, boxes, generator(seed, index))
            labels = labels[kept]
        target = {"boxes": boxes, "labels": labels, "image_id": torch.tensor(annotations.image_ids[index])}
        return F.to_dtype(image, torch.float32, scale=True), target

    @abstractmethod
    def _pixels(self, source: str, index: int) -> Tensor:
        """The image uint8 [3, H, W] at `index` of "train" or "test", of the size in its annotations."""


class _Samples(Dataset[tuple[Tensor, Target] | DataError]):
    """The samples of a source; sample i depends on the seed and i alone."""

    def __init__(self, data: DetectionData, source: str, seed: int | None) -> None:
        self._data, self._source, self._seed = data, source, seed

    def __getitem__(self, index: int) -> tuple[Tensor, Target] | DataError:
        try:
            return self._data.sample(self._source, index, self._seed)
        except DataError as error:  # handed over as a value: workers would wrap what they raise
            return error


def _collate(samples: list[tuple[Tensor, Target] | DataError]) -> DetectionBatch | DataError:
    images, targets = [], []
    for sample in samples:
        if isinstance(sample, DataError):
            return sample
        images.append(sample[0])
        targets.append(sample[1])
    return images, targets
