"""Detection data in the layout of COCO: annotations/instances_*.json and folders of images.

Source: Lin et al. 2014, "Microsoft COCO: Common Objects in Context", arXiv 1405.0312; the format is that of
cocodataset.org/#format-data. Crowds (``iscrowd``) are not learned, and are ignored in evaluation as COCO's own code
does.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from pathlib import Path
from typing import Any

from glcan.data.annotations import AnnotationBuilder, Annotations
from glcan.data.file_detection import FileDetection
from glcan.errors import DataError

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
            image or a category that is not there, or an image cannot be used (see `FileDetection`).
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
            files[source] = [str(folder / file) for file in file_names]
        if categories["train"] != categories["test"]:
            odd = sorted(set(categories["train"].items()) ^ set(categories["test"].items()))
            raise DataError(
                f"The train and val annotations in {str(root)!r} have different categories, for example {odd[0]}. "
                "Give both files the same list of categories."
            )
        ids = sorted(categories["train"])
        classes = [categories["train"][i] for i in ids]
        super().__init__("coco", classes, annotations, files, category_ids=ids, **common)


def find_coco(root: Path) -> tuple[str, str] | None:
    """The names of the train and val parts in a folder, None if it is not in COCO's layout."""
    for names in _SUFFIXES:
        if all((root / "annotations" / f"instances_{name}.json").is_file() for name in names):
            return names
    return None


def read_coco(path: Path) -> tuple[Annotations, list[str], dict[int, str]]:
    """A COCO annotation file: annotations with labels 1, 2, ... in the order of the ids, file names, names by id.

    Raises:
        DataError: the file cannot be read, or something in it is missing or of the wrong kind.
    """
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(
            f"The annotations {str(path)!r} cannot be read: {error}. The file is damaged or cut off: get it again."
        ) from error
    parts = ("images", "annotations", "categories")
    if not isinstance(content, dict) or not all(isinstance(content.get(part), list) for part in parts):
        lacking = [p for p in parts if not isinstance(content, dict) or not isinstance(content.get(p), list)]
        raise DataError(
            f"The annotations {str(path)!r} lack the lists {', '.join(lacking)}. Give a file of instances in COCO's "
            "format."
        )
    where = "images"
    try:
        images = sorted(content["images"], key=lambda image: image["id"])
        sizes = {int(image["id"]): (int(image["height"]), int(image["width"])) for image in images}
        file_names = [str(image["file_name"]) for image in images]
        where = "categories"
        categories = {int(category["id"]): str(category["name"]) for category in content["categories"]}
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"An entry of {where!r} in {str(path)!r} lacks {error} or has it of the wrong kind. Correct the file."
        ) from error
    if len(sizes) != len(images) or len(categories) != len(content["categories"]):
        raise DataError(f"Two images or two categories in {str(path)!r} have the same id. Correct the file.")
    labels = {category: label for label, category in enumerate(sorted(categories), 1)}
    boxes: dict[int, list[tuple[str, list[float], int, float | None, bool]]] = defaultdict(list)
    for position, entry in enumerate(content["annotations"]):
        image_id, box = _read_box(path, position, entry, sizes, labels)
        boxes[image_id].append(box)
    builder = AnnotationBuilder(str(path))
    for image_id, size in sizes.items():
        builder.add(image_id, size, boxes.get(image_id, ()))
    return builder.build(), file_names, categories


def _read_box(
    path: Path, position: int, entry: Any, sizes: dict[int, tuple[int, int]], labels: dict[int, int]
) -> tuple[int, tuple[str, list[float], int, float | None, bool]]:
    what = f"annotation {entry.get('id', position) if isinstance(entry, dict) else position}"
    try:
        image_id, category = entry["image_id"], entry["category_id"]
        x, y, width, height = (float(value) for value in entry["bbox"])
        area = None if entry.get("area") is None else float(entry["area"])
        crowd = bool(entry.get("iscrowd", 0))
        known_image, known_category = image_id in sizes, category in labels
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(
            f"{what.capitalize()} in {str(path)!r} lacks {error} or has it of the wrong kind; it needs image_id, "
            "category_id and bbox [x, y, width, height]. Correct the file."
        ) from error
    if not known_image:
        raise DataError(
            f"{what.capitalize()} in {str(path)!r} is of image {image_id}, which the file does not list. Correct the "
            "file, or take the images and the annotations from the same release."
        )
    if not known_category:
        raise DataError(
            f"{what.capitalize()} in {str(path)!r} has category {category}, which the file's categories lack (they are "
            f"{', '.join(map(str, sorted(labels)[:20]))}). Add it to 'categories', or correct the annotation."
        )
    if not all(map(math.isfinite, (x, y, width, height))):
        raise DataError(
            f"{what.capitalize()} in {str(path)!r} has the box {[x, y, width, height]}, which is not finite."
        )
    return image_id, (what, [x, y, x + width, y + height], labels[category], area, crowd)
