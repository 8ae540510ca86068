"""Detection data in the layout of Pascal VOC: an XML file for each image, and lists of images.

Source: Everingham et al. 2010, "The Pascal Visual Object Classes (VOC) Challenge". Coordinates in the files count from
1 and include the last pixel, so that a box of xmin .. xmax covers x from xmin - 1 to xmax. Objects marked ``difficult``
are not learned, and ignored in evaluation as crowds are (VOC's own code leaves them out of the score too).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from PIL import Image

from glcan.data.annotations import AnnotationBuilder, Annotations
from glcan.data.file_detection import FileDetection
from glcan.errors import DataError

_LAYOUT = "ROOT/VOCdevkit/VOC2007 (or ROOT itself) with Annotations/*.xml, JPEGImages/*.jpg and ImageSets/Main/*.txt"
_PARTS = (("trainval", "test"), ("train", "val"))  # the first pair of lists that is there; VOC2012 has no test.txt


class VocDetection(FileDetection):
    """A folder in Pascal VOC's layout: trainval to train on and test to test on, else train and val.

    Args:
        root: the folder of the year, or one above it.
        common: see `DetectionData` and `FileDetection`.

    Raises:
        DataError: a file or folder is missing, an XML file cannot be read or lacks something, a class of the test
            images is not among the train images, or an image cannot be used (see `FileDetection`).
    """

    def __init__(self, root: Path, **common: Any) -> None:
        folder = find_voc(root)
        if folder is None:
            raise DataError(f"The folder {str(root)!r} is not in Pascal VOC's layout. Expected: {_LAYOUT}.")
        lists = folder / "ImageSets" / "Main"
        names = next(pair for pair in _PARTS if all((lists / f"{part}.txt").is_file() for part in pair))
        parsed = {}
        for source, part in zip(("train", "test"), names, strict=True):
            stems = [line.split()[0] for line in (lists / f"{part}.txt").read_text().splitlines() if line.strip()]
            parsed[source] = [_read_xml(folder / "Annotations" / f"{stem}.xml", folder) for stem in stems]
        classes = sorted({name for image in parsed["train"] for name, *_ in image[2]})
        labels = {name: label for label, name in enumerate(classes, 1)}
        annotations = {source: _build(folder, images, labels) for source, images in parsed.items()}
        files = {source: [path for path, *_ in images] for source, images in parsed.items()}
        super().__init__("voc", classes, annotations, files, **common)


def find_voc(root: Path) -> Path | None:
    """The folder of a year in or at `root`, None if there is none."""
    below = [root, *(root / inner / year for inner in ("", "VOCdevkit") for year in ("VOC2007", "VOC2012"))]
    for folder in below:
        lists = folder / "ImageSets" / "Main"
        if (folder / "Annotations").is_dir() and any(
            all((lists / f"{part}.txt").is_file() for part in pair) for pair in _PARTS
        ):
            return folder
    return None


_Object = tuple[str, list[float], bool]  # class, corners, difficult


def _read_xml(path: Path, folder: Path) -> tuple[str, tuple[int, int], list[_Object]]:
    """The path of the image, its (height, width), its objects."""
    try:
        tree = ElementTree.parse(path).getroot()
    except FileNotFoundError:
        raise DataError(
            f"The annotations {str(path)!r} are not there, though ImageSets/Main lists them. Get them again, or "
            "correct the list."
        ) from None
    except (ElementTree.ParseError, OSError, UnicodeDecodeError) as error:
        raise DataError(f"The annotations {str(path)!r} cannot be read: {error}. Get the file again.") from error
    image = folder / "JPEGImages" / (tree.findtext("filename") or "").strip()
    if not image.is_file():  # converters often leave a wrong file name in the XML
        same = sorted((folder / "JPEGImages").glob(f"{path.stem}.*"))
        image = same[0] if same else image.with_name(f"{path.stem}.jpg")
    objects: list[_Object] = []
    try:
        size = tuple(int(float(_text(tree, f"size/{side}"))) for side in ("height", "width"))
    except ValueError:
        size = (0, 0)
    if min(size) <= 0:  # absent, or zeros as some tools write
        size = _stored_size(image, path)
    for number, entry in enumerate(tree.iter("object"), 1):
        try:
            name = _text(entry, "name")
            corners = [float(_text(entry, f"bndbox/{side}")) for side in ("xmin", "ymin", "xmax", "ymax")]
            difficult = (entry.findtext("difficult") or "0").strip() not in ("0", "")
        except ValueError as error:
            raise DataError(f"Object {number} in {str(path)!r} is not complete: {error}. Correct the file.") from error
        if not all(map(math.isfinite, corners)):
            raise DataError(f"Object {number} in {str(path)!r} has the box {corners}, which is not finite. Correct it.")
        objects.append((name, [corners[0] - 1, corners[1] - 1, corners[2], corners[3]], difficult))
    return str(image), (size[0], size[1]), objects


def _text(element: ElementTree.Element, where: str) -> str:
    text = (element.findtext(where) or "").strip()
    if not text:
        raise ValueError(f"it has no {where}")
    return text


def _stored_size(image: Path, path: Path) -> tuple[int, int]:
    try:
        with Image.open(image) as opened:
            return opened.size[1], opened.size[0]
    except Exception as error:  # Pillow's readers raise nearly anything on damaged files
        raise DataError(
            f"{str(path)!r} does not say how large its image is, and {str(image)!r} cannot be read: {error}. Get it "
            "again."
        ) from error


def _build(
    folder: Path, images: Sequence[tuple[str, tuple[int, int], list[_Object]]], labels: dict[str, int]
) -> Annotations:
    builder = AnnotationBuilder(str(folder / "Annotations"))
    for number, (path, size, objects) in enumerate(images, 1):
        stem = Path(path).stem
        for name, _, _ in objects:
            if name not in labels:
                raise DataError(
                    f"An object in {stem}.xml is of class {name!r}, which no train image has. The classes are: "
                    f"{', '.join(labels)}. Correct the file, or the lists in ImageSets/Main."
                )
        boxes = [
            (f"object {i} in {stem}.xml", corners, labels[name], None, difficult)
            for i, (name, corners, difficult) in enumerate(objects, 1)
        ]
        builder.add(number, size, boxes)
    return builder.build()
