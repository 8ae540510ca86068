"""Images with boxes: splits, augmentation, ground truth, and loaders that a run can be resumed on bit for bit.

As for classification, nothing here reads or advances a global random generator: the order is a pure function of (seed,
epoch), a sample's augmentation one of (seed, epoch, sample index).

Shapes: B images of a batch, N boxes of one image, I images of a source, M boxes of all of them, H height, W width.
Boxes are x1, y1, x2, y2 in pixels; labels count from 1, as torchvision's detectors have it (0 is the background).
"""

from __future__ import annotations

import os
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from glcan.data.images import check_loading, derive_seed, generator, split_batches
from glcan.data.preprocessing import _converted, _reason
from glcan.errors import ConfigError, DataError, UnknownName

__all__ = ["Annotations", "BoxAugmentation", "DetectionData", "DetectionLoader", "FileDetection"]

Target = dict[str, Tensor]
DetectionBatch = tuple[list[Tensor], list[Target]]
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
        DataError: no images in a source, or no boxes to learn.
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


class FileDetection(DetectionData):
    """A detection data set in image files.

    Args:
        files: paths of the images of the sources "train" and "test", in the order of the annotations.
        skip_corrupt: go on without images that cannot be read, with one warning.
        verify: read every file once beforehand.
        For the others see `DetectionData`.

    Raises:
        DataError: an image file is missing, cannot be read, or is not of the size that the annotations say.
    """

    def __init__(
        self,
        name: str,
        classes: Sequence[str],
        annotations: Mapping[str, Annotations],
        files: Mapping[str, Sequence[str]],
        *,
        skip_corrupt: bool = False,
        verify: bool = True,
        **common: Any,
    ) -> None:
        self._files = {source: list(paths) for source, paths in files.items()}
        super().__init__(name, classes, annotations, **common)
        self._check_files(skip_corrupt, verify)

    def _check_files(self, skip_corrupt: bool, verify: bool) -> None:
        """Looks for every file of the splits, reads them if asked; drops the bad ones, or raises on the first."""
        from glcan.data.folders import _faults

        used = [
            (split, index, self._files[source][index], tuple(self._annotations[source].sizes[index].tolist()))
            for split, (source, indices) in self._splits.items()
            for index in indices.tolist()
        ]
        paths = [path for _, _, path, _ in used]
        reasons: Iterable[str | None] = _faults(paths) if verify else (_missing(path) for path in paths)
        bad: list[tuple[str, int, str]] = []
        for (split, index, path, size), found in zip(used, reasons, strict=True):
            reason = found or (_wrong_size(path, size) if verify else None)
            if reason is None:
                continue
            if not skip_corrupt:
                raise DataError(
                    f"The image {path!r} of {self.name!r} cannot be used: {reason}. Get it again, or go on without "
                    "such images with skip_corrupt=True (--skip-corrupt)."
                )
            bad.append((split, index, path))
        if not bad:
            return
        for split, (source, indices) in self._splits.items():
            dropped = torch.tensor([index for of, index, _ in bad if of == split], dtype=torch.int64)
            self._splits[split] = (source, indices[~torch.isin(indices, dropped)])
            if not self.size(split):
                raise DataError(
                    f"No {split} image of {self.name!r} can be used ({len(dropped)} are missing or corrupt), for "
                    f"example {bad[0][2]!r}. Get the images again, or correct --data-root."
                )
        warnings.warn(
            f"{len(bad)} of {len(used)} images of {self.name!r} cannot be used and are left out: "
            f"{', '.join(path for _, _, path in bad[:5])}{', ...' if len(bad) > 5 else ''}",
            stacklevel=3,
        )

    def _pixels(self, source: str, index: int) -> Tensor:
        height, width = self._annotations[source].sizes[index].tolist()
        return read_pixels(self._files[source][index], (height, width))


def read_pixels(path: str | Path, size: tuple[int, int] | None = None) -> Tensor:
    """An image file as uint8 [3, H, W]: grey, palette, RGBA (alpha dropped), CMYK and 16-bit images become RGB.

    Args:
        path: an image file.
        size: (H, W) of its annotations: boxes may be given for the pixels as stored, or as the EXIF orientation turns
            them. By default turned.

    Raises:
        DataError: the file is missing, no image, truncated, or of another size.
    """
    from PIL import ImageOps
    from torchvision.transforms.v2 import functional as F

    try:
        with Image.open(path) as image:
            if size is None or image.size[::-1] != size:
                ImageOps.exif_transpose(image, in_place=True)
            pixels = F.pil_to_tensor(_converted(image, "RGB"))
    except Exception as error:  # Pillow's readers raise nearly anything on damaged files
        raise DataError(f"The image {str(path)!r} cannot be read: {_reason(error)}.") from error
    if size is not None and tuple(pixels.shape[1:]) != size:
        raise DataError(f"The image {str(path)!r} cannot be used: {_sizes_differ(tuple(pixels.shape[1:]), size)}.")
    return pixels


def _sizes_differ(found: tuple[int, ...], noted: tuple[int, ...]) -> str:
    return (
        f"it has {found[1]} x {found[0]} pixels, but its annotations say {noted[1]} x {noted[0]}: its boxes would be "
        "misplaced"
    )


def _wrong_size(path: str, noted: tuple[int, ...]) -> str | None:
    with Image.open(path) as image:
        stored = image.size[::-1]
        turned = image.getexif().get(0x0112, 1) in (5, 6, 7, 8)  # the orientations that swap the sides
    if noted == stored or (turned and noted == stored[::-1]):
        return None
    return _sizes_differ(stored, noted)


def _missing(path: str) -> str | None:
    return None if os.path.isfile(path) else "there is no such file"


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
