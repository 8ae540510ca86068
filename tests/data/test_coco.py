"""COCO's layout as people's tools write it: numbers and flags as text, names twice, parts without objects."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.data.detection_files import coco_content, write_coco, write_image

from glcan.data import load_detection
from glcan.data.annotations import AnnotationBuilder, Annotations
from glcan.data.detection import DetectionData
from glcan.data.images import generator
from glcan.data.scenes import Scenes
from glcan.data.values import as_flag, as_integer, as_number, as_text
from glcan.errors import DataError

Entry = dict[str, Any]


def write(root: Path, train: Entry) -> None:
    """The files of `coco_content` with other train annotations; images have the names that it lists."""
    write_coco(root)
    (root / "annotations/instances_train2017.json").write_text(json.dumps(train))


def every(part: str, change: Callable[[Entry], Entry]) -> Entry:
    content = coco_content()
    return content | {part: [entry | change(entry) for entry in content[part]]}


def test_numbers_and_flags_as_text_are_read(tmp_path: Path) -> None:
    write_coco(tmp_path / "plain")
    plain = load_detection("coco", root=tmp_path / "plain")

    def as_strings(entry: Entry) -> Entry:
        return {
            key: [str(number) for number in value] if key == "bbox" else str(value)
            for key, value in entry.items()
            if key not in ("name", "file_name")
        }

    content = coco_content(11)  # as text, image 10 comes before image 9
    content = {part: [entry | as_strings(entry) for entry in entries] for part, entries in content.items()}
    write_coco(tmp_path / "text", train=coco_content(11))
    (tmp_path / "text/annotations/instances_train2017.json").write_text(json.dumps(content))
    (tmp_path / "text/annotations/instances_val2017.json").write_text(
        json.dumps(
            {part: [entry | as_strings(entry) for entry in entries] for part, entries in coco_content(3).items()}
        )
    )
    text = load_detection("coco", root=tmp_path / "text")
    assert text.ground_truth("test") == plain.ground_truth("test")
    assert [image["id"] for image in text.ground_truth("train")["images"]] == list(range(3, 12))


@pytest.mark.parametrize(
    ("flag", "crowd"),
    [("0", 0), ("1", 1), (0.0, 0), ("0.0", 0), (False, 0), (True, 1), ("false", 0), ("True", 1), (None, 0)],
)
def test_iscrowd_is_read_not_guessed(tmp_path: Path, flag: Any, crowd: int) -> None:
    write_coco(tmp_path)
    content = coco_content(3)
    content["annotations"][1]["iscrowd"] = flag
    (tmp_path / "annotations/instances_val2017.json").write_text(json.dumps(content))
    truth = load_detection("coco", root=tmp_path).ground_truth("test")
    assert [entry["iscrowd"] for entry in truth["annotations"]] == [1, crowd, 0]


@pytest.mark.parametrize(
    ("part", "values", "message"),
    [
        ("annotations", {"iscrowd": "no"}, "Annotation 200 .*iscrowd is 'no', which is neither 0 nor 1"),
        ("annotations", {"iscrowd": 2}, "iscrowd is 2, which is neither"),
        ("annotations", {"iscrowd": []}, r"iscrowd is \[\], which is neither"),
        ("annotations", {"bbox": "1234"}, "bbox is '1234', which is no list of four numbers"),
        ("annotations", {"bbox": {"x": 1, "y": 2, "w": 3, "h": 4}}, "no list of four numbers"),
        ("annotations", {"bbox": [1, 2, True, 4]}, "a number of its bbox is True, which is no finite number"),
        ("annotations", {"bbox": [1, 2, "wide", 4]}, "a number of its bbox is 'wide'"),
        ("annotations", {"area": "large"}, "area is 'large'"),
        ("annotations", {"area": math.nan}, "area is nan"),
        ("annotations", {"area": -4}, "area is -4, which is below 0"),
        ("annotations", {"image_id": 1.5}, "image_id is 1.5, which is no whole number"),
        ("annotations", {"image_id": True}, "image_id is True"),
        ("annotations", {"category_id": "cat"}, "category_id is 'cat'"),
        ("images", {"id": "one"}, "'images' .*id is 'one', which is no finite number"),
        ("images", {"id": 2**70}, "no whole number of at most 64 bits"),
        ("images", {"height": 0}, "height is 0, which is below 1"),
        ("images", {"height": 30.5}, "height is 30.5, which is no whole number"),
        ("images", {"width": math.inf}, "width is inf"),
        ("images", {"file_name": None}, "file_name is None, which is no name"),
        ("images", {"file_name": ""}, "file_name is '', which is no name"),
        ("images", {"file_name": ["a.jpg"]}, "which is no name"),
        ("images", {"file_name": "1.jpg"}, "4 images in .* have the file name '1.jpg'"),
        ("images", {"file_name": "/etc/1.jpg"}, None),
        ("categories", {"name": None}, "'categories' .*name is None, which is no name"),
        ("categories", {"name": "\ud800"}, r"name is '\\ud800', which is no Unicode"),
    ],
)
def test_values_of_the_wrong_kind_are_refused(tmp_path: Path, part: str, values: Entry, message: str | None) -> None:
    content = every(part, lambda _: values)
    if message is None:
        content = every(part, lambda entry: {"file_name": f"/etc/{entry['id']}.jpg"})
        message = "names '/etc/1.jpg', which leads out of the data set's folder"
    write(tmp_path, content)
    with pytest.raises(DataError, match=message):
        load_detection("coco", root=tmp_path)


def test_a_file_name_that_leads_out_is_refused(tmp_path: Path) -> None:
    write_image(tmp_path / "1.jpg")
    write(tmp_path / "root", every("images", lambda entry: {"file_name": f"../../{entry['id']}.jpg"}))
    with pytest.raises(DataError, match=r"instances_train2017.json' names '../../1.jpg', which leads out of .*root'"):
        load_detection("coco", root=tmp_path / "root")


@pytest.mark.parametrize("name", ["album/{}.jpg", "[{}].jpg", "a b {}.jpg", "../val2017/x{}.jpg", "caf\udce9{}.jpg"])
def test_file_names_of_any_kind(tmp_path: Path, name: str) -> None:
    write_coco(tmp_path, train=every("images", lambda entry: {"file_name": name.format(entry["id"])}))
    assert load_detection("coco", root=tmp_path).size("train") == 2


def test_two_categories_of_one_name_are_said(tmp_path: Path) -> None:
    categories = [{"id": 3, "name": "dog"}, {"id": 7, "name": "dog"}]
    write(tmp_path, coco_content(categories=categories))
    (tmp_path / "annotations/instances_val2017.json").write_text(json.dumps(coco_content(3, categories=categories)))
    with pytest.warns(UserWarning, match="Several categories in .* have the name 'dog'"):
        assert load_detection("coco", root=tmp_path).classes == ["dog", "dog"]


def test_an_image_in_both_parts_is_said(tmp_path: Path) -> None:
    write_coco(tmp_path)
    path = tmp_path / "val2017/000000000003.jpg"
    path.unlink()
    os.link(tmp_path / "train2017/000000000003.jpg", path)
    with pytest.warns(
        UserWarning, match=r"1 images of 'coco' are in two parts of it.*\(train\).*\(test\)|\(test\).*\(train\)"
    ):
        load_detection("coco", root=tmp_path)


def test_json_in_utf16_is_read_and_nested_json_is_refused(tmp_path: Path) -> None:
    write_coco(tmp_path)
    path = tmp_path / "annotations/instances_train2017.json"
    path.write_bytes(path.read_text().encode("utf-16"))
    assert load_detection("coco", root=tmp_path).size("train") == 2
    path.write_text("[" * 200000)
    with pytest.raises(DataError, match="cannot be read"):
        load_detection("coco", root=tmp_path)


# ---------------------------------------------------------------- parts without objects


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("crowd", [True, False])
def test_a_test_part_without_objects_is_refused(tmp_path: Path, crowd: bool, verify: bool) -> None:
    write_coco(tmp_path)
    content = coco_content(3)
    content["annotations"] = [entry | {"iscrowd": 1} for entry in content["annotations"] if crowd]
    (tmp_path / "annotations/instances_val2017.json").write_text(json.dumps(content))
    with pytest.raises(
        DataError, match=r"None of the 3 test images of 'coco' has a box of a single object.*no mAP.*Give"
    ):
        load_detection("coco", root=tmp_path, verify=verify)


def test_a_test_part_whose_objects_are_outside_is_refused(tmp_path: Path) -> None:
    write_coco(tmp_path)
    content = coco_content(3)
    content["annotations"] = [entry | {"bbox": [90, 90, 5, 5]} for entry in content["annotations"]]
    (tmp_path / "annotations/instances_val2017.json").write_text(json.dumps(content))
    with (
        pytest.warns(UserWarning, match="3 boxes in .* are left out"),
        pytest.raises(DataError, match="None of the 3 test images"),
    ):
        load_detection("coco", root=tmp_path)


def test_a_test_part_whose_images_with_objects_are_damaged_is_refused(tmp_path: Path) -> None:
    write_coco(tmp_path)
    (tmp_path / "val2017/000000000003.jpg").write_bytes(b"")
    with (
        pytest.warns(UserWarning, match="1 of 5 images of 'coco' cannot be used"),
        pytest.raises(DataError, match="None of the 2 test images"),
    ):
        load_detection("coco", root=tmp_path, skip_corrupt=True)


class _OneInTen(DetectionData):
    """Train images of which every tenth has a box."""

    def __init__(self, **common: Any) -> None:
        super().__init__("some", ["thing"], {"train": _notes(20), "test": _notes(1)}, **common)

    def _pixels(self, source: str, index: int) -> torch.Tensor:
        return torch.zeros(3, 30, 40, dtype=torch.uint8)


def _notes(images: int) -> Annotations:
    builder = AnnotationBuilder("some")
    for index in range(images):
        builder.add(index, (30, 40), [("box", [1, 1, 9, 9], 1, None, False)] if index % 10 == 0 else [])
    return builder.build()


def test_a_val_part_without_objects_is_refused() -> None:
    for seed in range(30):
        held_out = int(torch.randperm(20, generator=generator("val", seed))[0])
        if held_out % 10 == 0:
            assert _OneInTen(val=1, seed=seed).ground_truth("val")["annotations"]
        else:
            with pytest.raises(DataError, match=r"None of the 1 val images of 'some'.*another val or another seed"):
                _OneInTen(val=1, seed=seed)
    assert _OneInTen(val=10, seed=0).size("val") == 10
    assert Scenes(size=64, train=8, test=1).size("test") == 1


# ---------------------------------------------------------------- values


@pytest.mark.parametrize(("value", "number"), [(3, 3), ("3", 3), (3.0, 3), ("3.0", 3), (" 3 ", 3), (-2, -2)])
def test_whole_numbers(value: Any, number: int) -> None:
    found = as_integer(value, "it")
    assert (found, type(found)) == (number, int)
    assert as_integer(str(2**60 + 1), "it") == 2**60 + 1  # not by way of a float


@pytest.mark.parametrize("value", [True, None, "", "x", [], {}, math.nan, "nan", math.inf, 10**400, b"3"])
def test_what_is_no_number(value: Any) -> None:
    for read in (as_number, as_integer):
        with pytest.raises(ValueError, match="it is .* no (finite|whole) number"):
            read(value, "it")
    if value is not True:
        with pytest.raises(ValueError, match="neither 0 nor 1"):
            as_flag(value, "it")


def test_text() -> None:
    assert [as_text(value, "it") for value in ("a", 7, " a ")] == ["a", "7", " a "]
    for value in (None, "", " ", 1.5, True, []):
        with pytest.raises(ValueError, match="it is .* no name"):
            as_text(value, "it")
