"""Detection data in the layout of Pascal VOC: an XML file for each image, and lists of images.

Source: Everingham et al. 2010, "The Pascal Visual Object Classes (VOC) Challenge". Coordinates in the files count from
1 and include the last pixel, so that a box of xmin .. xmax covers x from xmin - 1 to xmax. Objects marked ``difficult``
are not learned, and ignored in evaluation as crowds are (VOC's own code leaves them out of the score too).

The name in a list is that of the annotations and of the image. What an XML file says its image is called
(``<filename>``) often is that of another one, after files were copied or renamed: it only decides between images that
differ in their endings.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

from PIL import Image

from glcan.data.annotations import AnnotationBuilder, Annotations
from glcan.data.file_detection import FileDetection
from glcan.data.files import images_below, inside, printable, read_lines
from glcan.data.values import as_flag, as_integer, as_number
from glcan.errors import DataError

_LAYOUT = "ROOT/VOCdevkit/VOC2007 (or ROOT itself) with Annotations/*.xml, JPEGImages/*.jpg and ImageSets/Main/*.txt"
_PARTS = (("trainval", "test"), ("train", "val"))  # the first pair of lists that is there; VOC2012 has no test.txt
_SIDES = ("xmin", "ymin", "xmax", "ymax")


class _Object(NamedTuple):
    """An object of an XML file: its class, its corners from 0, whether it is difficult."""

    name: str
    corners: list[float]
    difficult: bool


class _Listed(NamedTuple):
    """A name of a list: the XML file, the image, its (height, width), its objects, what the XML calls the image."""

    xml: Path
    image: Path
    size: tuple[int, int]
    objects: list[_Object]
    called: str


class VocDetection(FileDetection):
    """A folder in Pascal VOC's layout: trainval to train on and test to test on, else train and val.

    Args:
        root: the folder of the year, or one above it.
        common: see `DetectionData` and `FileDetection`.

    Raises:
        DataError: a file or folder is missing, a list or an XML file cannot be read or lacks something, a list has a
            name twice or one that leads out of the folder, a class of the test images is not among the train images,
            or an image cannot be used (see `FileDetection`).
    """

    def __init__(self, root: Path, **common: Any) -> None:
        folder = find_voc(root)
        if folder is None:
            raise DataError(f"The folder {str(root)!r} is not in Pascal VOC's layout. Expected: {_LAYOUT}.")
        lists = folder / "ImageSets" / "Main"
        names = next(pair for pair in _PARTS if all((lists / f"{part}.txt").is_file() for part in pair))
        images = _images_by_name(folder)
        parsed = {}
        for source, part in zip(("train", "test"), names, strict=True):
            xml_files = _read_list(lists / f"{part}.txt", folder)
            parsed[source] = [_read_xml(xml, name, folder, images) for name, xml in xml_files.items()]
        _warn_of_other_names([image for part in parsed.values() for image in part], folder)
        classes = sorted({found.name for image in parsed["train"] for found in image.objects})
        labels = {name: label for label, name in enumerate(classes, 1)}
        annotations = {source: _build(folder, part, labels) for source, part in parsed.items()}
        files = {source: [str(image.image) for image in part] for source, part in parsed.items()}
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


def _read_list(path: Path, folder: Path) -> dict[str, Path]:
    """The names of a list with their XML files, in its order.

    A name may hold spaces. A line may end in a flag, -1, 0 or 1, as in the lists of a class: it says nothing here.
    """
    found: dict[str, Path] = {}
    for line in read_lines(path):
        name, xml = line, _xml_file(line, path, folder)
        flagged = re.fullmatch(r"(.+?)\s+(-1|0|1)", line)
        if flagged and not os.path.isfile(xml):
            name, xml = flagged[1], _xml_file(flagged[1], path, folder)
        name = Path(name).as_posix()  # ./a is a
        if name in found:
            raise DataError(f"The list {str(path)!r} has the name {name!r} twice. Remove one of the lines.")
        found[name] = xml
    if not found:
        raise DataError(f"The list {str(path)!r} is empty. Write a name of an image to each line.")
    return found


def _xml_file(name: str, path: Path, folder: Path) -> Path:
    return inside(folder, folder / "Annotations", f"{name}.xml", f"The list {str(path)!r}")


def _images_by_name(folder: Path) -> dict[str, list[Path]]:
    """The images below JPEGImages by their names relative to it, without the ending."""
    place = folder / "JPEGImages"
    found: dict[str, list[Path]] = {}
    for path in images_below(place) if place.is_dir() else ():
        found.setdefault(path.relative_to(place).with_suffix("").as_posix(), []).append(path)
    return found


def _read_xml(path: Path, name: str, folder: Path, images: Mapping[str, Sequence[Path]]) -> _Listed:
    """What an XML file says of the image of a name."""
    try:
        tree = ElementTree.parse(path).getroot()
    except FileNotFoundError:
        raise DataError(
            f"The annotations {str(path)!r} are not there, though ImageSets/Main lists them. Get them again, or "
            "correct the list." + ("" if printable(name) else " The list is not in UTF-8: save it so.")
        ) from None
    except (ElementTree.ParseError, OSError, ValueError, LookupError) as error:  # the last two: of unknown encodings
        raise DataError(
            f"The annotations {str(path)!r} cannot be read: {error}. Get the file again, or save it in UTF-8."
        ) from error
    if tree.tag != "annotation":
        raise DataError(
            f"The annotations {str(path)!r} begin with <{tree.tag}>; a file of Pascal VOC begins with <annotation>. "
            "Get the file again."
        )
    called = (tree.findtext("filename") or "").strip().replace("\\", "/").rpartition("/")[2]
    image = _image(name, called, folder, images.get(name, ()), path)
    return _Listed(path, image, _size(tree, image, path), _objects(tree, path), called)


def _image(name: str, called: str, folder: Path, found: Sequence[Path], path: Path) -> Path:
    """The image of a name; one that is not there is refused, or left out, with the other files."""
    if len(found) == 1:
        return found[0]
    place = folder / "JPEGImages"
    if called and _agree(name, called):  # decides between two, or names an unusual ending
        named = inside(folder, place, name, f"The list that has {str(path)!r}").with_name(called)
        if os.path.isfile(named):
            return named
    if found:
        raise DataError(
            f"The images {', '.join(repr(str(image)) for image in found)} all have the name of {str(path)!r}, whose "
            f"<filename> ({called!r}) is none of theirs. Remove the others, or correct it."
        )
    return place / f"{name}.jpg"


def _agree(name: str, called: str) -> bool:
    """Whether the <filename> of an XML file is the name in the list, with an ending or without."""
    last = name.rpartition("/")[2]
    return called in ("", last) or Path(called).stem == last


def _warn_of_other_names(images: Sequence[_Listed], folder: Path) -> None:
    other = [image for image in images if not _agree(image.xml.stem, image.called)]
    if other:
        warnings.warn(
            f"{len(other)} annotations in {str(folder / 'Annotations')!r} say that they are of an image of another "
            f"name, for example {other[0].xml.name!r} of {other[0].called!r}. They are taken for the images of the "
            "names in ImageSets/Main; correct their <filename>.",
            stacklevel=3,
        )


def _size(tree: ElementTree.Element, image: Path, path: Path) -> tuple[int, int]:
    """(Height, width) as the XML file says, or of the image where it says nothing, or zeros as some tools write."""
    try:
        height, width = (as_integer(tree.findtext(f"size/{side}"), side, least=1) for side in ("height", "width"))
    except ValueError:
        return _stored_size(image, path)
    return height, width


def _objects(tree: ElementTree.Element, path: Path) -> list[_Object]:
    objects = []
    for number, entry in enumerate(tree.iter("object"), 1):
        try:
            name = _text(entry, "name")
            x1, y1, x2, y2 = (as_number(_text(entry, f"bndbox/{side}"), side) for side in _SIDES)
            difficult = as_flag((entry.findtext("difficult") or "").strip() or "0", "difficult")
        except ValueError as error:
            raise DataError(f"Object {number} in {str(path)!r} cannot be used: {error}. Correct the file.") from error
        objects.append(_Object(name, [x1 - 1, y1 - 1, x2, y2], difficult))
    return objects


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


def _build(folder: Path, images: Sequence[_Listed], labels: dict[str, int]) -> Annotations:
    builder = AnnotationBuilder(str(folder / "Annotations"))
    for number, image in enumerate(images, 1):
        for found in image.objects:
            if found.name not in labels:
                raise DataError(
                    f"An object in {str(image.xml)!r} is of class {found.name!r}, which no train image has. The "
                    f"classes are: {', '.join(labels)}. Correct the file, or the lists in ImageSets/Main."
                )
        boxes = [
            (f"object {i} in {image.xml.name!r}", found.corners, labels[found.name], None, found.difficult)
            for i, found in enumerate(image.objects, 1)
        ]
        builder.add(number, image.size, boxes)
    return builder.build()
