"""Detection data in image files: what COCO's and VOC's layouts have in common."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from glcan.data.annotations import Annotations
from glcan.data.detection import DetectionData
from glcan.data.files import warn_of_files_in_two_places
from glcan.data.preprocessing import read_pixels, sizes_differ
from glcan.errors import DataError


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
        if verify:
            parts = [
                (self._files[source][index], split)
                for split, (source, indices) in self._splits.items()
                for index in indices.tolist()
            ]
            warn_of_files_in_two_places(parts, repr(name))

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
            f"{', '.join(repr(path) for _, _, path in bad[:5])}{', ...' if len(bad) > 5 else ''}",
            stacklevel=3,
        )
        self._check_objects()

    def _pixels(self, source: str, index: int) -> Tensor:
        height, width = self._annotations[source].sizes[index].tolist()
        return read_pixels(self._files[source][index], (height, width))


def _wrong_size(path: str, noted: tuple[int, ...]) -> str | None:
    with Image.open(path) as image:
        stored = image.size[::-1]
        turned = image.getexif().get(0x0112, 1) in (5, 6, 7, 8)  # the orientations that swap the sides
    if noted == stored or (turned and noted == stored[::-1]):
        return None
    return sizes_differ(stored, noted)


def _missing(path: str) -> str | None:
    return None if os.path.isfile(path) else "there is no such file"
