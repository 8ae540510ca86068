"""Folders of image files in the ImageNet layout, read by worker processes.

Shapes: B batch, H = W = size.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from glcan.data.files import EXTENSIONS, folders_in, images_below, printable, warn_of_files_in_two_places
from glcan.data.images import Batch, ImageData, derive_seed, generator
from glcan.data.preprocessing import Preprocessing, fault, open_image
from glcan.errors import DataError

IMAGENET_MEAN = (0.485, 0.456, 0.406)  # of the ImageNet train set, as in torchvision's references/classification
IMAGENET_STD = (0.229, 0.224, 0.225)
TEST_FRACTION = 0.2  # of a folder that comes without a test folder
_PROGRESS_FROM = 2000  # files: below, checking them takes no time worth a progress bar
_LAYOUTS = "ROOT/train/CLASS/*.jpg with ROOT/val or ROOT/test beside it, or ROOT/CLASS/*.jpg"


class FolderImages(ImageData):
    """Image files in one folder per class.

    Layouts: `root/train/CLASS/*` with `root/test/CLASS/*` or (if there is none) `root/val/CLASS/*` to test on; where
    both are there, `root/val` is the "val" split unless `val` asks for a part of the train images. Or `root/CLASS/*`
    (or only `root/train/CLASS/*`): a fifth of each class, chosen by a hash of the file names, is the test split,
    whatever the seed is.

    Args:
        root: the folder.
        size: H = W that the model gets; train: a random part of the image resized to it and mirrored at random, else:
            shorter side resized to size * 256 / 224, centre cropped.
        skip_corrupt: go on without files that cannot be read, with one warning.
        verify: read every file once beforehand.
        For the others see `glcan.data.load`.

    Raises:
        DataError: no such folder, no images, a single class, a class without images, a class of the test folder that
            the train folder lacks, a name of a class that is not in UTF-8, a file or folder that cannot be read.
    """

    def __init__(
        self,
        root: Path,
        *,
        size: int = 224,
        seed: int = 0,
        val: int | float = 0,
        limit: int | None = None,
        skip_corrupt: bool = False,
        verify: bool = True,
    ) -> None:
        classes, self._files = _find(root, with_val=not val)
        labels = {
            source: torch.tensor([label for _, label in files], dtype=torch.int64)
            for source, files in self._files.items()
        }
        preprocessing = Preprocessing(3, round(size * 256 / 224), size, IMAGENET_MEAN, IMAGENET_STD, size)
        super().__init__("imagefolder", classes, preprocessing, labels, seed=seed, val=val, limit=limit)
        if verify:
            self._verify(root, skip_corrupt)
            self._warn_of_links()

    def _verify(self, root: Path, skip_corrupt: bool) -> None:
        """Reads every file of the splits; drops the corrupt ones from their splits, or raises on the first."""
        used = [
            (split, index, self._files[source][index][0])
            for split, (source, indices) in self._splits.items()
            for index in indices.tolist()
        ]
        corrupt: list[tuple[str, int, str]] = []
        for (split, index, path), reason in zip(used, _faults([path for _, _, path in used]), strict=True):
            if reason is None:
                continue
            if not skip_corrupt:
                raise DataError(
                    f"The image {path!r} cannot be read: {reason}. Replace or remove it, or go on without such files "
                    "with skip_corrupt=True (--skip-corrupt)."
                )
            corrupt.append((split, index, path))
        if not corrupt:
            return
        for split, (source, indices) in self._splits.items():
            bad = torch.tensor([index for of, index, _ in corrupt if of == split], dtype=torch.int64)
            self._splits[split] = (source, indices[~torch.isin(indices, bad)])
            left = torch.bincount(self.labels(split), minlength=len(self.classes)) if self.size(split) else None
            if left is None or (split == "train" and int((left > 0).sum()) < 2):
                raise DataError(
                    f"The {split} split of {str(root)!r} needs images of two classes at least, and after leaving out "
                    f"{len(bad)} corrupt files they are not there. Replace the files, for example {corrupt[0][2]!r}."
                )
        first = ", ".join(repr(path) for _, _, path in corrupt[:5])
        warnings.warn(
            f"{len(corrupt)} of {len(used)} image files cannot be read and are left out: {first}"
            f"{', ...' if len(corrupt) > 5 else ''}",
            stacklevel=2,
        )

    def _warn_of_links(self) -> None:
        """Says once that links put a file into two splits or two classes."""
        parts = [
            (path, f"{split} as {self.classes[label]!r}")
            for split, (source, indices) in self._splits.items()
            for path, label in (self._files[source][index] for index in indices.tolist())
        ]
        warn_of_files_in_two_places(parts, repr(self.name))

    def _produce(
        self, source: str, batches: Sequence[Tensor], *, epoch: int, augment: bool, workers: int, device: torch.device
    ) -> Iterator[Batch]:
        seed = derive_seed("augment", self._seed, epoch) if augment else None
        loader: DataLoader[tuple[Tensor, int] | DataError] = DataLoader(
            _Files(self._files[source], self._preprocessing, seed),
            batch_sampler=[indices.tolist() for indices in batches],
            num_workers=workers,
            collate_fn=_collate,
            pin_memory=device.type == "cuda",
            generator=generator("workers", self._seed, epoch),  # else the loader draws from torch's global generator
        )
        for batch in loader:
            if isinstance(batch, DataError):
                raise batch
            images, labels = batch
            yield images.to(device, non_blocking=True), labels.to(device, non_blocking=True)


class _Files(Dataset[tuple[Tensor, int] | DataError]):
    """Files as (float32 [3, H, W], label). With a `seed`, augmented; sample i depends on the seed and i alone."""

    def __init__(self, files: Sequence[tuple[str, int]], preprocessing: Preprocessing, seed: int | None) -> None:
        from torchvision.transforms import v2

        self._files, self._preprocessing, self._seed = files, preprocessing, seed
        self._augmentation = v2.Compose(
            [v2.RandomResizedCrop(preprocessing.crop, antialias=True), v2.RandomHorizontalFlip()]
        )

    def __getitem__(self, index: int) -> tuple[Tensor, int] | DataError:
        path, label = self._files[index]
        try:
            image = open_image(path, self._preprocessing.channels)
        except DataError as error:  # handed over as a value: workers would wrap what they raise
            return error
        if self._seed is not None:  # the transforms draw from torch's global generator: lend it to them
            state = torch.get_rng_state()
            torch.default_generator.manual_seed(derive_seed(self._seed, index))
            try:
                image = self._augmentation(image)
            finally:
                torch.set_rng_state(state)
        return self._preprocessing(image), label


def _collate(samples: list[tuple[Tensor, int] | DataError]) -> Batch | DataError:
    for sample in samples:
        if isinstance(sample, DataError):
            return sample
    images, labels = default_collate(samples)
    return images, labels


def _faults(paths: Sequence[str]) -> Iterator[str | None]:
    """What is wrong with each file, in order; threads, as decoding releases the interpreter."""
    from rich.console import Console
    from rich.progress import track

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        portions = (paths[first : first + 1000] for first in range(0, len(paths), 1000))
        yield from track(
            (reason for portion in portions for reason in pool.map(fault, portion)),
            "Checking images",
            total=len(paths),
            console=Console(stderr=True),
            disable=len(paths) < _PROGRESS_FROM,
        )


def _find(root: Path, *, with_val: bool) -> tuple[list[str], dict[str, list[tuple[str, int]]]]:
    """The classes, and the files with their labels of "train", "test" and maybe "val"."""
    if not root.is_dir():
        raise DataError(f"The image folder {str(root)!r} does not exist. Give the folder that holds {_LAYOUTS}.")
    train = root / "train" if (root / "train").is_dir() else root
    classes = folders_in(train)
    if train == root and {"val", "test"} & set(classes):
        raise DataError(f"The image folder {str(root)!r} has a folder 'val' or 'test' but none 'train' beside it.")
    if not classes:
        raise DataError(
            f"The image folder {str(train)!r} is empty: it has no folders of classes. Expected: {_LAYOUTS}."
        )
    for name in classes:
        if not printable(name):
            raise DataError(
                f"The name of the class folder {name!r} in {str(train)!r} is not in UTF-8 (what it cannot show begins "
                "with \\udc). It is written to reports and models: rename the folder."
            )
    if len(classes) < 2:
        raise DataError(
            f"The image folder {str(train)!r} has one class only, {classes[0]!r}; classification needs two at least. "
            f"Expected: {_LAYOUTS}."
        )
    files = _files(train, classes)
    for label, name in enumerate(classes):
        if not any(of == label for _, of in files):
            raise DataError(
                f"The folder {str(train / name)!r} of the class {name!r} has no images. Add some or remove it."
            )
    held_out = [name for name in ("test", "val") if train != root and (root / name).is_dir()]
    if not held_out:
        return classes, _divided(train, classes, files)
    sources = {"train": files, "test": _files(root / held_out[0], classes)}
    if len(held_out) == 2 and with_val:
        sources["val"] = _files(root / "val", classes)
    return classes, sources


def _files(root: Path, classes: Sequence[str]) -> list[tuple[str, int]]:
    """The image files below the folders of the classes, sorted, with their labels."""
    present = folders_in(root)
    unknown = [name for name in present if name not in classes]
    if unknown:
        raise DataError(
            f"The folder {str(root / unknown[0])!r} is of a class that the train folder lacks ({len(unknown)} such). "
            f"The classes are: {', '.join(classes[:20])}{', ...' if len(classes) > 20 else ''}."
        )
    files: list[tuple[str, int]] = []
    for label, name in enumerate(classes):
        if name in present:
            found = ((os.path.dirname(path), os.path.basename(path)) for path in images_below(root / name))
            files += [(os.path.join(*path), label) for path in sorted(found)]  # folder by folder, as torchvision's
    if not files:
        raise DataError(
            f"The image folder {str(root)!r} is empty: its classes hold no files that end in "
            f"{', '.join(EXTENSIONS)}. Expected: {_LAYOUTS}."
        )
    return files


def _divided(root: Path, classes: Sequence[str], files: Sequence[tuple[str, int]]) -> dict[str, list[tuple[str, int]]]:
    """Splits off the test images: of each class the first fifth (one at least) by a hash of the names."""
    by_class: dict[int, list[str]] = {}
    for path, label in files:
        by_class.setdefault(label, []).append(path)
    test: set[str] = set()
    for label, paths in by_class.items():
        if len(paths) < 2:
            raise DataError(
                f"The class {classes[label]!r} in {str(root)!r} has one image only; one to train and one to test on "
                f"are needed. Add images, or give a test folder of its own: {_LAYOUTS}."
            )
        paths.sort(key=lambda path: hashlib.blake2b(os.fsencode(os.path.relpath(path, root))).digest())
        test.update(paths[: max(1, round(TEST_FRACTION * len(paths)))])
    return {
        "train": [file for file in files if file[0] not in test],
        "test": [file for file in files if file[0] in test],
    }
