"""Detection data in the layout of COCO: annotations/instances_*.json and folders of images.

Source: Lin et al. 2014, "Microsoft COCO: Common Objects in Context", arXiv 1405.0312; the format is that of
cocodataset.org/#format-data. Crowds (``iscrowd``) are not learned, and are ignored in evaluation as COCO's own code
does.
"""

from __future__ import annotations

import json
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Container
from pathlib import Path
from typing import Any, TypeVar

from glcan.data.annotations import AnnotationBuilder, Annotations
from glcan.data.file_detection import FileDetection
from glcan.data.files import inside, printable
from glcan.data.values import as_flag, as_integer, as_number, as_text
from glcan.errors import DataError

_Entry = TypeVar("_Entry")

_LAYOUT = (
    "ROOT/annotations/instances_train2017.json and instances_val2017.json, with the images in ROOT/train2017 and "
    "ROOT/val2017, or in ROOT/images/train2017 and ROOT/images/val2017"
)
_SUFFIXES = (("train2017", "val2017"), ("train2014", "val2014"), ("train", "val"))  # the first that is there


class CocoDetection(FileDetection):
    """A folder in COCO's layout; the val images are the "test" split, as COCO's own test annotations are secret.

    Args:
        root: the folder.
        common: see `DetectionData` and `FileDetection`.

    Raises:
        DataError: a file or folder is missing, the JSON cannot be read or lacks something, an annotation names an
            image or a category that is not there, two images have one file name, a file name leads out of the folder,
            or an image cannot be used (see `FileDetection`).
    """

    def __init__(self, root: Path, **common: Any) -> None:
        names = find_coco(root)
        if names is None:
            raise DataError(f"The folder {str(root)!r} is not in COCO's layout. Expected: {_LAYOUT}.")
        annotations, files, categories = {}, {}, {}
        for source, name in zip(("train", "test"), names, strict=True):
            path = root / "annotations" / f"instances_{name}.json"
            annotations[source], file_names, categories[source] = read_coco(path)
            folder = next((f for f in (root / name, root / "images" / name) if f.is_dir()), None)
            if folder is None:
                raise DataError(f"The images of {str(path)!r} are not there: no folder {name}. Expected: {_LAYOUT}.")
            files[source] = [str(inside(root, folder, file, repr(str(path)))) for file in file_names]
        if categories["train"] != categories["test"]:
            odd = sorted(set(categories["train"].items()) ^ set(categories["test"].items()))
            raise DataError(
                f"The train and val annotations in {str(root)!r} have different categories, for example {odd[0]}. "
                "Give both files the same list of categories."
            )
        ids = sorted(categories["train"])
        classes = [categories["train"][i] for i in ids]
        if len(set(classes)) < len(classes):
            twice = Counter(classes).most_common(1)[0][0]
            warnings.warn(
                f"Several categories in {str(root)!r} have the name {twice!r}: they are learned as different classes, "
                "which reports cannot tell apart. Rename or remove one.",
                stacklevel=2,
            )
        super().__init__("coco", classes, annotations, files, category_ids=ids, **common)


def find_coco(root: Path) -> tuple[str, str] | None:
    """The names of the train and val parts in a folder, None if it is not in COCO's layout."""
    for names in _SUFFIXES:
        if all((root / "annotations" / f"instances_{name}.json").is_file() for name in names):
            return names
    return None


def read_coco(path: Path) -> tuple[Annotations, list[str], dict[int, str]]:
    """A COCO annotation file: annotations with labels 1, 2, ... in the order of the ids, file names, names by id.

    Numbers and flags that are written as text are read as what they mean.

    Raises:
        DataError: the file cannot be read, or something in it is missing or of the wrong kind, or there twice.
    """
    content = _read_json(path)
    listed = _entries(path, content, "images", _read_image)
    named = _entries(path, content, "categories", _read_category)
    images, categories = dict(listed), dict(named)
    file_names = Counter(file for file, _ in images.values())
    if len(images) != len(listed) or len(categories) != len(named):
        raise DataError(f"Two images or two categories in {str(path)!r} have the same id. Correct the file.")
    if len(file_names) != len(images):
        file, count = file_names.most_common(1)[0]
        raise DataError(
            f"{count} images in {str(path)!r} have the file name {file!r}, so that each has a part of its objects. "
            "Give every file one entry in 'images'."
        )
    labels = {category: label for label, category in enumerate(sorted(categories), 1)}
    boxes: dict[int, list[tuple[str, list[float], int, float | None, bool]]] = defaultdict(list)
    for position, entry in enumerate(content["annotations"]):
        image_id, box = _read_box(path, position, entry, images, labels)
        boxes[image_id].append(box)
    builder = AnnotationBuilder(str(path))
    for image_id in sorted(images):
        builder.add(image_id, images[image_id][1], boxes.get(image_id, ()))
    return builder.build(), [images[image_id][0] for image_id in sorted(images)], categories


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(
            f"The annotations {str(path)!r} cannot be read: {error}. The file is damaged or cut off: get it again."
        ) from error
    parts = ("images", "annotations", "categories")
    lacking = [p for p in parts if not isinstance(content, dict) or not isinstance(content.get(p), list)]
    if lacking:
        raise DataError(
            f"The annotations {str(path)!r} lack the lists {', '.join(lacking)}. Give a file of instances in COCO's "
            "format."
        )
    return dict(content)


def _entries(path: Path, content: dict[str, Any], where: str, read: Callable[[Any], _Entry]) -> list[_Entry]:
    """The entries of a list, read one by one."""
    try:
        return [read(entry) for entry in content[where]]
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"An entry of {where!r} in {str(path)!r} cannot be used: {_what_is_wrong(error)}. Correct the file."
        ) from error


def _read_image(entry: Any) -> tuple[int, tuple[str, tuple[int, int]]]:
    """The id, the file name and (height, width)."""
    size = as_integer(entry["height"], "height", least=1), as_integer(entry["width"], "width", least=1)
    return as_integer(entry["id"], "id"), (as_text(entry["file_name"], "file_name"), size)


def _read_category(entry: Any) -> tuple[int, str]:
    name = as_text(entry["name"], "name")
    if not printable(name):
        raise ValueError(f"name is {name!r}, which is no Unicode")
    return as_integer(entry["id"], "id"), name


def _read_box(
    path: Path, position: int, entry: Any, images: Container[int], labels: dict[int, int]
) -> tuple[int, tuple[str, list[float], int, float | None, bool]]:
    what = f"annotation {entry.get('id', position) if isinstance(entry, dict) else position}"
    try:
        image_id = as_integer(entry["image_id"], "image_id")
        category = as_integer(entry["category_id"], "category_id")
        if not isinstance(entry["bbox"], list) or len(entry["bbox"]) != 4:
            raise ValueError(f"bbox is {entry['bbox']!r}, which is no list of four numbers")
        x, y, width, height = (as_number(value, "a number of its bbox") for value in entry["bbox"])
        area = None if entry.get("area") is None else as_number(entry["area"], "area")
        if area is not None and area < 0:
            raise ValueError(f"area is {area:g}, which is below 0")
        crowd = entry.get("iscrowd") is not None and as_flag(entry["iscrowd"], "iscrowd")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(
            f"{what.capitalize()} in {str(path)!r} cannot be used: {_what_is_wrong(error)}. It needs image_id, "
            "category_id and bbox [x, y, width, height]. Correct the file."
        ) from error
    if image_id not in images:
        raise DataError(
            f"{what.capitalize()} in {str(path)!r} is of image {image_id}, which the file does not list. Correct the "
            "file, or take the images and the annotations from the same release."
        )
    if category not in labels:
        raise DataError(
            f"{what.capitalize()} in {str(path)!r} has category {category}, which the file's categories lack (they are "
            f"{', '.join(map(str, sorted(labels)[:20]))}). Add it to 'categories', or correct the annotation."
        )
    return image_id, (what, [x, y, x + width, y + height], labels[category], area, crowd)


def _what_is_wrong(error: Exception) -> str:
    if isinstance(error, KeyError):
        return f"it lacks {error}"
    return str(error) if isinstance(error, ValueError) else "it is no object with names and values"
