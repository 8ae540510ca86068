"""The data sets that glcan knows by name: where they are looked for, how they are read, how the field augments them."""

from __future__ import annotations

import gzip
import importlib.util
import os
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from glcan.data.images import stratified_order
from glcan.data.tensors import Augmentation
from glcan.errors import DataError


class Pixels(NamedTuple):
    """A data set as read: images uint8 [N, C, H, W], labels int64 [N]."""

    classes: list[str]
    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


@dataclass(frozen=True)
class TensorSet:
    """A data set of small images.

    Attributes:
        title: for people.
        classes, shape, train, test: number of classes, (C, H, W) of the images as stored, numbers of images.
        remedy: how to get it.
        folders: where to look, for `root` or None (the usual places), the first that holds it first.
        present: whether a folder holds it, by the names of its files alone.
        read: reads it from a folder; with True, downloads into it what is missing.
        augmentation: as the field's recipes have it.
        mean, std: per channel of pixels in 0..1, of the train images; None: computed.
        size: H = W that the model gets, None: as stored.
    """

    title: str
    classes: int
    shape: tuple[int, int, int]
    train: int
    test: int
    remedy: str
    folders: Callable[[Path | None], list[Path]]
    present: Callable[[Path], bool]
    read: Callable[[Path, bool], Pixels]
    augmentation: Augmentation
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    size: int | None = None
    downloads: bool = True

    def find(self, root: Path | None) -> Path | None:
        """The folder that holds the data set, None if it is not there."""
        return next((folder for folder in self.folders(root) if self.present(folder)), None)


def cache() -> Path:
    """The folder for downloads: $XDG_CACHE_HOME/glcan, by default ~/.cache/glcan."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "glcan"


def read_set(name: str, root: Path | None, download: bool) -> Pixels:
    """Finds and reads the data set `name` of `SETS`.

    Raises:
        DataError: it is not there (with the places looked at and the remedies), damaged, or cannot be downloaded.
    """
    known = SETS[name]
    folder = known.find(root)
    if folder is None and not (download and known.downloads):
        usual = known.find(None) if root is not None else None
        places = ", ".join(map(str, known.folders(root)))
        raise DataError(
            f"The data set {name!r} is not there; looked in: {places}. {known.remedy}"
            + (f" Or leave out --data-root: {usual} holds it." if usual else "")
        )
    if folder is None:
        folder = root or cache()
        folder.mkdir(parents=True, exist_ok=True)
    try:
        return known.read(folder, download)
    except (OSError, RuntimeError, ValueError, AssertionError, EOFError, KeyError) as error:
        raise DataError(
            f"The data set {name!r} in {str(folder)!r} cannot be read or downloaded: {str(error) or 'damaged file'}. "
            f"If files are damaged, remove them and get them again. {known.remedy}"
        ) from error


# ---------------------------------------------------------------- digits


def _digits_folders(root: Path | None) -> list[Path]:
    found = importlib.util.find_spec("sklearn")
    return [Path(str(found.origin)).parent / "datasets" / "data"] if found else []


def _read_digits(folder: Path, download: bool) -> Pixels:
    """The test split is a fifth of each class, the same for every seed."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.from_numpy(digits.images).mul_(255 / 16).round_().to(torch.uint8)[:, None]
    labels = torch.from_numpy(digits.target).to(torch.int64)
    order = stratified_order(labels, "digits")
    test, train = order[: len(order) // 5].sort().values, order[len(order) // 5 :].sort().values
    return Pixels([str(digit) for digit in range(10)], (images[train], labels[train]), (images[test], labels[test]))


# ---------------------------------------------------------------- Fashion-MNIST

_IDX = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}


def _fashion_folders(root: Path | None) -> list[Path]:
    below = ("", "fashion-mnist", "FashionMNIST/raw", "raw")
    if root is not None:
        return [root / folder for folder in below]
    home = Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local/share")
    shares = (os.environ.get("XDG_DATA_DIRS") or "/usr/local/share:/usr/share").split(":")
    prefixes = dict.fromkeys([home, *(Path(share) for share in shares if share), Path(sys.prefix) / "share"])
    return [*(prefix / "datasets/fashion-mnist" for prefix in prefixes), cache() / "FashionMNIST/raw"]


def _idx_file(folder: Path, name: str) -> Path | None:
    return next((path for path in (folder / name, folder / f"{name}.gz") if path.is_file()), None)


def _has_idx(folder: Path) -> bool:
    return all(_idx_file(folder, name) for names in _IDX.values() for name in names)


def _read_fashion(folder: Path, download: bool) -> Pixels:
    from torchvision.datasets import FashionMNIST

    if not _has_idx(folder):
        FashionMNIST(str(folder), download=True)
        folder = folder / "FashionMNIST/raw"
    parts = {}
    for split, (image_name, label_name) in _IDX.items():
        images, labels = _read_idx(folder, image_name, 3), _read_idx(folder, label_name, 1)
        parts[split] = (images[:, None], labels.to(torch.int64))
    return Pixels(list(FashionMNIST.classes), parts["train"], parts["test"])


def _read_idx(folder: Path, name: str, dimensions: int) -> Tensor:
    """An IDX file of 8-bit values, compressed or not."""
    from torchvision.datasets.mnist import read_sn3_pascalvincent_tensor

    path = _idx_file(folder, name)
    if path is None:
        raise DataError(f"The IDX file {str(folder / name)!r} is not there, nor with .gz.")
    try:
        if path.suffix == ".gz":
            with tempfile.NamedTemporaryFile() as plain:  # torchvision's reader wants a plain file
                plain.write(gzip.decompress(path.read_bytes()))
                plain.flush()
                values: Tensor = read_sn3_pascalvincent_tensor(plain.name)
        else:
            values = read_sn3_pascalvincent_tensor(str(path))
    except Exception as error:  # asserts, index, value and zlib errors, by what is damaged
        detail = str(error) or "its header and its size do not agree"
        raise DataError(f"The IDX file {str(path)!r} is damaged: {detail}. Get it again.") from error
    if values.dtype != torch.uint8 or values.ndim != dimensions:
        raise DataError(
            f"The IDX file {str(path)!r} holds {values.dtype} with {values.ndim} dimensions; it must be torch.uint8 "
            f"with {dimensions}."
        )
    return values


# ---------------------------------------------------------------- torchvision's


def _usual_folders(root: Path | None) -> list[Path]:
    if root is None:
        return [cache(), Path("data")]
    inside = root.name in ("cifar-10-batches-py", "cifar-100-python", "stl10_binary")
    return [root.parent if inside else root]


def _holds(*files: str) -> Callable[[Path], bool]:
    return lambda folder: all((folder / file).is_file() for file in files)


def _tensor(values: Any) -> Tensor:
    return torch.as_tensor(values).contiguous()


def _read_cifar(folder: Path, download: bool, kind: str) -> Pixels:
    from torchvision import datasets

    with warnings.catch_warnings():  # numpy >= 2.4 on the old pickles of the original files
        warnings.filterwarnings("ignore", "dtype.*align should be passed")
        train, test = (getattr(datasets, kind)(str(folder), train=train, download=download) for train in (True, False))
    parts = [(_tensor(part.data).permute(0, 3, 1, 2), _tensor(part.targets).to(torch.int64)) for part in (train, test)]
    return Pixels(list(train.classes), parts[0], parts[1])


def _read_svhn(folder: Path, download: bool) -> Pixels:
    from torchvision.datasets import SVHN

    train, test = (SVHN(str(folder), split=split, download=download) for split in ("train", "test"))
    parts = [(_tensor(part.data), _tensor(part.labels).to(torch.int64)) for part in (train, test)]
    return Pixels([str(digit) for digit in range(10)], parts[0], parts[1])


def _read_stl10(folder: Path, download: bool) -> Pixels:
    from torchvision.datasets import STL10

    train, test = (STL10(str(folder), split=split, download=download) for split in ("train", "test"))
    classes = ["airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck"]
    parts = [(_tensor(part.data), _tensor(part.labels).to(torch.int64)) for part in (train, test)]
    return Pixels(classes, parts[0], parts[1])


_DOWNLOAD = (
    "Give its folder with --data-root, or let torchvision download it: glcan.data.load({name!r}, download=True)."
)

# Mean and standard deviation are those of all train pixels, as public code has them (not the smaller mean of each
# image's own deviation, 0.2023 0.1994 0.2010 for CIFAR-10). Fashion-MNIST's were recomputed from the files.
SETS: dict[str, TensorSet] = {
    "digits": TensorSet(
        title="handwritten digits, bundled with scikit-learn",
        classes=10,
        shape=(1, 8, 8),
        train=1438,
        test=359,
        remedy="It comes with scikit-learn: pip install scikit-learn.",
        folders=_digits_folders,
        present=_holds("digits.csv.gz"),
        read=_read_digits,
        augmentation=Augmentation(padding=1),
        size=16,
        downloads=False,
    ),
    "fashion-mnist": TensorSet(
        title="Zalando's articles of clothing",
        classes=10,
        shape=(1, 28, 28),
        train=60000,
        test=10000,
        remedy="Install Debian's package (apt-get install dataset-fashion-mnist), give a folder of its IDX files with "
        "--data-root, or let torchvision download it: glcan.data.load('fashion-mnist', download=True).",
        folders=_fashion_folders,
        present=_has_idx,
        read=_read_fashion,
        augmentation=Augmentation(padding=4, flip=True),
        mean=(0.2860,),
        std=(0.3530,),
    ),
    "cifar10": TensorSet(
        title="CIFAR-10",
        classes=10,
        shape=(3, 32, 32),
        train=50000,
        test=10000,
        remedy=_DOWNLOAD.format(name="cifar10"),
        folders=_usual_folders,
        present=_holds("cifar-10-batches-py/data_batch_1"),
        read=lambda folder, download: _read_cifar(folder, download, "CIFAR10"),
        augmentation=Augmentation(padding=4, flip=True),
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2470, 0.2435, 0.2616),
    ),
    "cifar100": TensorSet(
        title="CIFAR-100",
        classes=100,
        shape=(3, 32, 32),
        train=50000,
        test=10000,
        remedy=_DOWNLOAD.format(name="cifar100"),
        folders=_usual_folders,
        present=_holds("cifar-100-python/train"),
        read=lambda folder, download: _read_cifar(folder, download, "CIFAR100"),
        augmentation=Augmentation(padding=4, flip=True),
        mean=(0.5071, 0.4865, 0.4409),
        std=(0.2673, 0.2564, 0.2762),
    ),
    "svhn": TensorSet(
        title="Street View House Numbers (train and test, without extra)",
        classes=10,
        shape=(3, 32, 32),
        train=73257,
        test=26032,
        remedy=_DOWNLOAD.format(name="svhn"),
        folders=_usual_folders,
        present=_holds("train_32x32.mat", "test_32x32.mat"),
        read=_read_svhn,
        augmentation=Augmentation(padding=4),
        mean=(0.4377, 0.4438, 0.4728),
        std=(0.1980, 0.2010, 0.1970),
    ),
    "stl10": TensorSet(
        title="STL-10 (labelled images only)",
        classes=10,
        shape=(3, 96, 96),
        train=5000,
        test=8000,
        remedy=_DOWNLOAD.format(name="stl10"),
        folders=_usual_folders,
        present=_holds("stl10_binary/train_X.bin"),
        read=_read_stl10,
        augmentation=Augmentation(padding=12, flip=True),
        mean=(0.4467, 0.4398, 0.4066),
        std=(0.2603, 0.2566, 0.2713),
    ),
}
