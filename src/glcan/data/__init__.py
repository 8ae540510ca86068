"""Data sets by name, with loaders that a run can be resumed on bit for bit. See docs/data.md."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from glcan.data.images import ImageData, Loader
from glcan.data.preprocessing import read_image, read_images
from glcan.errors import ConfigError, DataError, UnknownName

__all__ = ["DatasetInfo", "ImageData", "Loader", "available", "load", "read_image", "read_images"]


@dataclass(frozen=True)
class DatasetInfo:
    """A data set that glcan knows.

    Attributes:
        name: what `load` takes.
        title: what it is.
        found: the folder that holds it, None if it is not there.
        classes: number of classes; None for the user's own folders.
        shape: (C, H, W) of the images as stored; None for the user's own folders.
        train, test: numbers of images; None for the user's own folders.
        remedy: how to get it.
    """

    name: str
    title: str
    found: Path | None
    classes: int | None
    shape: tuple[int, int, int] | None
    train: int | None
    test: int | None
    remedy: str


def load(
    name: str,
    *,
    root: str | Path | None = None,
    seed: int = 0,
    val: int | float = 0,
    limit: int | None = None,
    skip_corrupt: bool = False,
    image_size: int | None = None,
    download: bool = False,
    verify: bool = True,
) -> ImageData:
    """Loads a data set.

    Args:
        name: "digits", "fashion-mnist", "cifar10", "cifar100", "svhn", "stl10" or "imagefolder".
        root: its folder; by default the usual places (docs/data.md). "imagefolder" needs one.
        seed: of the order of the train images, their augmentation, and the choice of the val images.
        val: how many train images, or what fraction of them, become the "val" split (stratified).
        limit: use at most so many train images: the same ones for every seed, stratified, a smaller limit a part of a
            larger one. Applied after `val`.
        skip_corrupt: of an image folder, leave out files that cannot be read, with one warning.
        image_size: H = W that the model gets, in pixels; by default 16 for digits, 224 for folders, else as stored.
        download: let torchvision download what is not there, into `root` or ~/.cache/glcan.
        verify: of an image folder, read every file once now, so that a damaged one does not end the training.

    Raises:
        UnknownName: no such data set.
        DataError: it is not there, damaged, or its labels are out of range.
        ConfigError: an argument out of range.
    """
    from glcan.data.sets import SETS, read_set

    place = None if root is None else Path(root).expanduser()
    if image_size is not None and image_size < 1:
        raise ConfigError(f"image_size={image_size} of the data set {name!r}: it must be at least 1 pixel.")
    if name == "imagefolder":
        from glcan.data.folders import FolderImages

        if place is None:
            raise DataError("The data set 'imagefolder' needs the folder of the images: root=... (--data-root).")
        return FolderImages(
            place, size=image_size or 224, seed=seed, val=val, limit=limit, skip_corrupt=skip_corrupt, verify=verify
        )
    if name not in SETS:
        raise UnknownName(
            "data set", name, [*SETS, "imagefolder"], "For images of your own: imagefolder with --data-root FOLDER."
        )
    from glcan.data.tensors import TensorImages

    known, pixels = SETS[name], read_set(name, place, download)
    return TensorImages(
        name,
        pixels.classes,
        {"train": pixels.train[0], "test": pixels.test[0]},
        {"train": pixels.train[1], "test": pixels.test[1]},
        augmentation=known.augmentation,
        size=image_size or known.size,
        mean=known.mean,
        std=known.std,
        seed=seed,
        val=val,
        limit=limit,
    )


def available(root: str | Path | None = None) -> list[DatasetInfo]:
    """All data sets, with where they were found: in `root`, or in the usual places. Reads no data."""
    from glcan.data.sets import SETS

    place = None if root is None else Path(root).expanduser()
    infos = [
        DatasetInfo(name, s.title, s.find(place), s.classes, s.shape, s.train, s.test, s.remedy)
        for name, s in SETS.items()
    ]
    title = "image files of your own, one folder per class (ImageNet layout)"
    remedy = "Give the folder with --data-root: ROOT/train/CLASS/*.jpg with ROOT/val or ROOT/test, or ROOT/CLASS/*.jpg."
    return [*infos, DatasetInfo("imagefolder", title, None, None, None, None, None, remedy)]
