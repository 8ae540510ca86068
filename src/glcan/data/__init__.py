"""Data sets by name, with loaders that a run can be resumed on bit for bit. See docs/data.md."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from glcan.data.detection import DetectionData
from glcan.data.images import ImageData, Loader
from glcan.data.preprocessing import read_image, read_images
from glcan.data.super_resolution import CROPS, SCALES, Pair, PairData
from glcan.errors import ConfigError, DataError, UnknownName

__all__ = [
    "DETECTION",
    "DatasetInfo",
    "DetectionData",
    "ImageData",
    "Loader",
    "Pair",
    "PairData",
    "available",
    "load",
    "load_detection",
    "load_pairs",
    "read_image",
    "read_images",
]

#: The data sets of `load_detection`.
DETECTION = ("scenes", "coco", "voc")


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
        task: what it is for.
    """

    name: str
    title: str
    found: Path | None
    classes: int | None
    shape: tuple[int, int, int] | None
    train: int | None
    test: int | None
    remedy: str
    task: str = "classification"


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
    if name in DETECTION:
        raise ConfigError(f"The data set {name!r} is one for detection; choose that task, or use load_detection().")
    if name not in SETS:
        from glcan.data.photographs import PHOTOGRAPHS

        if name in PHOTOGRAPHS:
            raise ConfigError(f"The data set {name!r} is for super-resolution and has no classes. Choose another one.")
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


def load_pairs(
    name: str,
    *,
    scale: int = 2,
    patch: int = 48,
    crops: int = CROPS,
    root: str | Path | None = None,
    seed: int = 0,
    val: int | float = 0,
    limit: int | None = None,
    skip_corrupt: bool = False,
) -> PairData:
    """Loads a super-resolution data set: every image is decoded once, and kept as 8-bit pixels.

    Args:
        name: "photographs" (bundled), "div2k", "photofolder", or to evaluate on "set5", "set14", "b100", "urban100",
            "manga109", "benchmark" (docs/tasks/super-resolution.md).
        scale: 2, 3 or 4.
        patch: pixels of the side of a low-resolution training patch; the high-resolution one is `scale` times larger.
        crops: patches taken from each train image in an epoch.
        root: its folder; by default the usual places. "photofolder" and "benchmark" need one.
        seed: of the patches, their order, and the choice of the val images.
        val: how many train images, or what fraction of them, become the "val" split.
        limit: use at most so many train images: the same ones for every seed, a smaller limit a part of a larger one.
        skip_corrupt: leave out files that cannot be read, with one warning.

    Raises:
        UnknownName: no such data set.
        DataError: it is not there or damaged, images do not match, or a train image is smaller than a patch.
        ConfigError: an argument out of range.
    """
    from glcan.data.photographs import PHOTOGRAPHS, read_photographs
    from glcan.data.sets import SETS

    if scale not in SCALES:
        raise ConfigError(f"scale={scale} of the data set {name!r}: it must be one of {', '.join(map(str, SCALES))}.")
    if name not in PHOTOGRAPHS:
        if name in SETS or name in ("imagefolder", *DETECTION):
            task = "detection" if name in DETECTION else "classification"
            raise ConfigError(
                f"The data set {name!r} is for {task}; super-resolution needs photographs: {', '.join(PHOTOGRAPHS)}."
            )
        raise UnknownName(
            "data set", name, PHOTOGRAPHS, "For photographs of your own: photofolder with --data-root FOLDER."
        )
    if root is None and name in ("photofolder", "benchmark"):
        raise DataError(f"The data set {name!r} needs the folder of the photographs: root=... (--data-root).")
    sources = read_photographs(name, None if root is None else Path(root).expanduser(), scale, skip_corrupt)
    if val:
        sources.pop("val", None)
    return PairData(name, sources, scale=scale, patch=patch, crops=crops, seed=seed, val=val, limit=limit)


def load_detection(
    name: str,
    *,
    root: str | Path | None = None,
    seed: int = 0,
    val: int | float = 0,
    limit: int | None = None,
    skip_corrupt: bool = False,
    image_size: int | None = None,
    verify: bool = True,
) -> DetectionData:
    """Loads a data set for detection.

    Args:
        name: "scenes", "coco" or "voc".
        root: its folder; by default the usual places (docs/tasks/detection.md). Of the scenes: that of Fashion-MNIST.
        image_size: pixels of the shorter side that the model is to resize images to; the side of the scenes.
        verify: read every image file once now, so that a damaged one does not end the training.
        For the others see `load`.

    Raises:
        UnknownName: no such data set.
        DataError: it is not there or damaged.
        ConfigError: an argument out of range.
    """
    if image_size is not None and image_size < 1:
        raise ConfigError(f"image_size={image_size} of the data set {name!r}: it must be at least 1 pixel.")
    place = None if root is None else Path(root).expanduser()
    if name == "scenes":
        from glcan.data.scenes import SIDE, Scenes

        return Scenes(size=image_size or SIDE, root=place, seed=seed, val=val, limit=limit)
    if name not in DETECTION:
        raise UnknownName("data set for detection", name, DETECTION, "For data of your own use COCO's or VOC's layout.")
    from glcan.data.coco import CocoDetection
    from glcan.data.voc import VocDetection

    place = place or _detection_folder(name)
    if place is None:
        looked = ", ".join(map(str, _usual_places(name)))
        raise DataError(f"The data set {name!r} is not there; looked in: {looked}. Give its folder with --data-root.")
    kind = CocoDetection if name == "coco" else VocDetection
    return kind(
        place,
        image_size=image_size,
        seed=seed,
        val=val,
        limit=limit,
        skip_corrupt=skip_corrupt,
        verify=verify,
    )


def _usual_places(name: str) -> list[Path]:
    from glcan.data.sets import cache

    return [cache() / name, Path("data") / name]


def _detection_folder(name: str, root: Path | None = None) -> Path | None:
    from glcan.data.coco import find_coco
    from glcan.data.voc import find_voc

    find = find_coco if name == "coco" else find_voc
    return next((place for place in ([root] if root else _usual_places(name)) if find(place)), None)


def available(root: str | Path | None = None) -> list[DatasetInfo]:
    """All data sets, with where they were found: in `root`, or in the usual places. Reads no data."""
    from glcan.data.photographs import PHOTOGRAPHS
    from glcan.data.sets import SETS

    place = None if root is None else Path(root).expanduser()
    infos = [
        DatasetInfo(name, s.title, s.find(place), s.classes, s.shape, s.train, s.test, s.remedy)
        for name, s in SETS.items()
    ]
    title = "image files of your own, one folder per class (ImageNet layout)"
    remedy = "Give the folder with --data-root: ROOT/train/CLASS/*.jpg with ROOT/val or ROOT/test, or ROOT/CLASS/*.jpg."
    infos.append(DatasetInfo("imagefolder", title, None, None, None, None, None, remedy))
    infos += [
        DatasetInfo(name, p.title, p.find(place), None, None, p.train, p.test, p.remedy, "super-resolution")
        for name, p in PHOTOGRAPHS.items()
    ]
    return infos + _detection_infos(place)


def _detection_infos(root: Path | None) -> list[DatasetInfo]:
    from glcan.data.scenes import SIDE, TEST, TRAIN, kinds, photograph_folder

    classes, objects = kinds()
    embedded = DatasetInfo(
        name="scenes",
        title=f"{objects} pasted on photographs",
        found=photograph_folder(),
        classes=len(classes),
        shape=(3, SIDE, SIDE),
        train=TRAIN,
        test=TEST,
        remedy="It is made from what comes with scikit-image and scikit-learn: pip install scikit-image scikit-learn.",
        task="detection",
    )
    remedy = "Give its folder with --data-root (layouts: docs/tasks/detection.md)."
    layouts = {"coco": "COCO's layout", "voc": "Pascal VOC's layout"}
    return [embedded] + [
        DatasetInfo(name, title, _detection_folder(name, root), None, None, None, None, remedy, "detection")
        for name, title in layouts.items()
    ]
