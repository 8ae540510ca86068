"""Writes small data sets in the layouts of COCO and Pascal VOC."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

CATEGORIES = [{"id": 7, "name": "cat"}, {"id": 3, "name": "dog"}]  # ids with gaps, not in order


def write_image(path: Path, size: tuple[int, int] = (40, 30), mode: str = "RGB", **options: Any) -> None:
    """Random pixels; `size` is (width, height)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(len(str(path))).integers(0, 256, (size[1], size[0], 4), dtype=np.uint8)
    image = Image.fromarray(pixels, "RGBA") if mode == "RGBA" else Image.fromarray(pixels[..., :3]).convert(mode)
    image.save(path, **options)


def coco_content(images: int = 4, **changes: Any) -> dict[str, Any]:
    """Image i (from 1) has i - 1 boxes; image 2's one is a crowd."""
    annotations = [
        {
            "id": 100 * image + box,
            "image_id": image,
            "category_id": (7, 3)[box % 2],
            "bbox": [1.5 + box, 2.25, 10.0, 8.5],
            "area": 60.0,
            "iscrowd": int(image == 2),
        }
        for image in range(1, images + 1)
        for box in range(image - 1)
    ]
    listed = [
        {"id": image, "file_name": f"{image:012d}.jpg", "width": 40, "height": 30} for image in range(1, images + 1)
    ]
    return {"images": listed, "annotations": annotations, "categories": CATEGORIES} | changes


def write_coco(root: Path, *, images: str = "", train: dict[str, Any] | None = None) -> None:
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    for name, content in (("train2017", train or coco_content()), ("val2017", coco_content(3))):
        (root / "annotations" / f"instances_{name}.json").write_text(json.dumps(content))
        for image in content["images"] if isinstance(content.get("images"), list) else ():
            write_image(root / images / name / image["file_name"], (image["width"], image["height"]))


def voc_xml(
    name: str, objects: list[tuple[str, tuple[float, ...], int]], size: tuple[int, int] | None = (40, 30)
) -> str:
    entries = "".join(
        f"<object><name>{kind}</name><difficult>{difficult}</difficult><bndbox><xmin>{box[0]}</xmin>"
        f"<ymin>{box[1]}</ymin><xmax>{box[2]}</xmax><ymax>{box[3]}</ymax></bndbox></object>"
        for kind, box, difficult in objects
    )
    sized = f"<size><width>{size[0]}</width><height>{size[1]}</height><depth>3</depth></size>" if size else ""
    return f"<annotation><filename>{name}.jpg</filename>{sized}{entries}</annotation>"


def write_voc(folder: Path, parts: tuple[str, str] = ("trainval", "test")) -> None:
    for sub in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (folder / sub).mkdir(parents=True, exist_ok=True)
    objects = {
        "000001": [("dog", (1.0, 1.0, 10.0, 20.0), 0), ("cat", (5.0, 5.0, 40.0, 30.0), 0)],
        "000002": [("cat", (3.0, 4.0, 12.0, 14.0), 1)],
        "000003": [("cat", (3.0, 4.0, 12.0, 14.0), 0)],
        "000004": [("dog", (3.0, 4.0, 12.0, 14.0), 0), ("dog", (8.0, 8.0, 30.0, 30.0), 1)],
    }
    for name, found in objects.items():
        (folder / "Annotations" / f"{name}.xml").write_text(voc_xml(name, found))
        write_image(folder / "JPEGImages" / f"{name}.jpg")
    (folder / "ImageSets/Main" / f"{parts[0]}.txt").write_text("000001\n000002\n000003\n")
    (folder / "ImageSets/Main" / f"{parts[1]}.txt").write_text("000004\n")
