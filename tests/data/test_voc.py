"""Pascal VOC's layout as people's tools write it: stale names, lists in other encodings, flags as words."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from PIL import Image
from tests.data.detection_files import voc_xml, write_voc

from glcan.data import DetectionData, load_detection
from glcan.errors import DataError

BOX = [("thing", (3.0, 4.0, 20.0, 22.0), 0)]


def write(root: Path, train: dict[str, str], called: dict[str, str] | None = None, ending: str = "png") -> None:
    """Images of one colour by their names, with annotations that say `called`; "b" is the test image."""
    for folder in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    for name, colour in (train | {"b": "blue"}).items():
        text = voc_xml("", BOX).replace("<filename>.jpg", f"<filename>{(called or {}).get(name, '')}")
        for path in (root / "JPEGImages" / f"{name}.{ending}", root / "Annotations" / f"{name}.xml"):
            path.parent.mkdir(parents=True, exist_ok=True)
        (root / "Annotations" / f"{name}.xml").write_text(text)
        Image.new("RGB", (40, 30), colour).save(root / "JPEGImages" / f"{name}.{ending}")
    (root / "ImageSets/Main/val.txt").write_text("b\n")
    (root / "ImageSets/Main/train.txt").write_bytes(os.fsencode("\n".join(train)))


def colours(data: DetectionData) -> dict[int, list[float]]:
    """The first pixel of each train image by the number of its line in the list."""
    batches = data.loader("train", 1, augment=False)
    return {int(targets[0]["image_id"]): images[0][:, 0, 0].tolist() for images, targets in batches}


def load(root: Path, **options: bool) -> DetectionData:
    return load_detection("voc", root=root, **options)


# ---------------------------------------------------------------- which image annotations belong to


def test_the_list_decides_which_image_annotations_belong_to(tmp_path: Path) -> None:
    train = {"a": "red", "a_mirrored": "lime", "c": "white"}
    write(tmp_path, train, {"a": "a.png", "a_mirrored": "a.png", "c": "c.png"})
    with pytest.warns(UserWarning, match=r"1 annotations in .*'a_mirrored.xml' of 'a.png'. .*correct") as caught:
        data = load(tmp_path)
    assert len(caught) == 1
    assert colours(data) == {1: [1, 0, 0], 2: [0, 1, 0], 3: [1, 1, 1]}


@pytest.mark.parametrize("called", ["a.png", "a.jpg", "a", "C:\\\\photos\\\\a.JPG", "photos/a.png", "", "  "])
def test_other_ways_to_write_the_same_name_do_not_contradict(tmp_path: Path, called: str) -> None:
    write(tmp_path, {"a": "red"}, {"a": called})
    assert colours(load(tmp_path)) == {1: [1, 0, 0]}


def test_an_image_that_only_the_annotations_name_is_not_taken(tmp_path: Path) -> None:
    write(tmp_path, {"a": "red", "c": "lime"}, {"a": "c.png"})
    (tmp_path / "JPEGImages/a.png").unlink()
    with (
        pytest.warns(UserWarning, match="'a.xml' of 'c.png'"),
        pytest.raises(DataError, match=r"JPEGImages/a.jpg' of 'voc' cannot be used: there is no such file"),
    ):
        load(tmp_path)
    with pytest.warns(UserWarning, match="'a.xml' of 'c.png'|1 of 3 images of 'voc' cannot be used"):
        data = load(tmp_path, skip_corrupt=True)
    assert colours(data) == {2: [0, 1, 0]}


def test_two_images_of_one_name(tmp_path: Path) -> None:
    write(tmp_path, {"a": "red"}, {"a": "a.png"})
    Image.new("RGB", (40, 30), "lime").save(tmp_path / "JPEGImages/a.bmp")
    assert colours(load(tmp_path)) == {1: [1, 0, 0]}
    (tmp_path / "Annotations/a.xml").write_text(voc_xml("", BOX).replace(".jpg", ""))
    with pytest.raises(DataError, match=r"a.bmp', '.*a.png' all have the name of '.*a.xml'"):
        load(tmp_path)


@pytest.mark.parametrize("name", ["photo one", "a[1]", "a*", "v1.2", "album/a", "a 1", "é", "中", "-1", "./c"])
def test_names_of_any_kind(tmp_path: Path, name: str) -> None:
    write(tmp_path, {name: "red", "a": "white"})
    assert colours(load(tmp_path)) == {1: [1, 0, 0], 2: [1, 1, 1]}


def test_a_name_that_is_not_utf8(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9")
    write(tmp_path, {name: "red"})
    assert colours(load(tmp_path)) == {1: [1, 0, 0]}
    (tmp_path / "Annotations" / f"{name}.xml").rename(tmp_path / "Annotations/café.xml")
    with pytest.raises(DataError, match=r"caf\\udce9.xml' are not there.*The list is not in UTF-8: save it so"):
        load(tmp_path)


def test_hidden_images_are_not_taken(tmp_path: Path) -> None:
    write(tmp_path, {"a": "red"})
    (tmp_path / "JPEGImages/.a.jpg").write_bytes(b"")
    (tmp_path / "JPEGImages/a.txt").write_text("notes")
    assert colours(load(tmp_path)) == {1: [1, 0, 0]}


def test_an_unusual_ending_needs_the_file_name(tmp_path: Path) -> None:
    write(tmp_path, {"a": "red"}, {"a": "a.gif", "b": "b.gif"}, ending="gif")
    assert colours(load(tmp_path)) == {1: [1, 0, 0]}


# ---------------------------------------------------------------- lists


@pytest.mark.parametrize("encoding", ["utf-16", "utf-8-sig"])
def test_lists_in_other_encodings(tmp_path: Path, encoding: str) -> None:
    write(tmp_path, {"photo one": "red", "c": "lime"})
    (tmp_path / "ImageSets/Main/train.txt").write_bytes("photo one\r\nc\r\n".encode(encoding))
    assert colours(load(tmp_path)) == {1: [1, 0, 0], 2: [0, 1, 0]}


def test_lists_with_flags(tmp_path: Path) -> None:
    write(tmp_path, {"a": "red", "c": "lime", "d 1": "white"})
    (tmp_path / "ImageSets/Main/train.txt").write_text("a  1\nc\t-1\nd 1\n")
    assert colours(load(tmp_path)) == {1: [1, 0, 0], 2: [0, 1, 0], 3: [1, 1, 1]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a\na\n", "train.txt' has the name 'a' twice"),
        (b"a\na 1\n", "train.txt' has the name 'a' twice"),
        (b"a\n./a\n", "train.txt' has the name 'a' twice"),
        (b"../../a\n", r"train.txt' names '../../a.xml', which leads out of"),
        (b"/etc/a\n", r"train.txt' names '/etc/a.xml', which leads out of"),
        (b"none\n", "none.xml' are not there"),
        (b"x" * 400, "x.xml' cannot be read"),
        (b"a\0\n", "zero bytes.*UTF-8"),
        (b"\n", "train.txt' is empty. Write"),
    ],
)
def test_bad_lists(tmp_path: Path, content: bytes, message: str) -> None:
    write(tmp_path, {"a": "red"})
    (tmp_path / "ImageSets/Main/train.txt").write_bytes(content)
    with pytest.raises(DataError, match=message):
        load(tmp_path)


def test_a_name_in_both_lists_is_said(tmp_path: Path) -> None:
    write(tmp_path, {"a": "red", "b": "blue"})
    with pytest.warns(UserWarning, match=r"1 images of 'voc' are in two parts of it.*b.png' \(train\)"):
        load(tmp_path)


# ---------------------------------------------------------------- values


@pytest.mark.parametrize(("text", "difficult"), [("0", 0), ("0.0", 0), ("false", 0), ("", 0), ("1", 1), ("True", 1)])
def test_difficult_is_read_not_guessed(tmp_path: Path, text: str, difficult: int) -> None:
    write_voc(tmp_path)
    path = tmp_path / "Annotations/000004.xml"
    path.write_text(voc_xml("000004", [*BOX, BOX[0]]).replace("thing", "cat").replace("t>0<", f"t>{text}<", 1))
    found = load(tmp_path).ground_truth("test")["annotations"]
    assert [entry["iscrowd"] for entry in found] == [difficult, 0]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("t>0<", "t>Unspecified<", "Object 1 .*difficult is 'Unspecified', which is neither 0 nor 1"),
        ("t>0<", "t>2<", "difficult is '2'"),
        ("3.0", "nan", "xmin is 'nan', which is no finite number"),
        ("3.0", "left", "xmin is 'left', which is no finite number"),
        ("<annotation>", "<?xml version='1.0' encoding='gb2312'?><annotation>", "multi-byte.*save it in UTF-8"),
        ("<annotation>", "<?xml version='1.0' encoding='none'?><annotation>", "unknown encoding.*save it in UTF-8"),
        ("annotation>", "html>", "begin with <html>"),
    ],
)
def test_values_that_cannot_be_used(tmp_path: Path, old: str, new: str, message: str) -> None:
    write(tmp_path, {"a": "red"})
    path = tmp_path / "Annotations/a.xml"
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(DataError, match=message):
        load(tmp_path)


@pytest.mark.parametrize("width", ["inf", "40.5", "-1", "0", "", "wide"])
def test_a_size_that_says_nothing_is_that_of_the_image(tmp_path: Path, width: str) -> None:
    write(tmp_path, {"a": "red"})
    path = tmp_path / "Annotations/a.xml"
    path.write_text(path.read_text().replace("<width>40", f"<width>{width}"))
    assert colours(load(tmp_path)) == {1: [1, 0, 0]}
