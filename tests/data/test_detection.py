"""COCO's and VOC's layouts, bad input, loaders, augmentation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tests.data.detection_files import CATEGORIES, coco_content, voc_xml, write_coco, write_image, write_voc
from torch import Tensor

from glcan.data import DetectionData, available, load, load_detection
from glcan.data.box_augmentation import BoxAugmentation
from glcan.data.images import generator
from glcan.data.preprocessing import read_pixels
from glcan.data.scenes import Scenes
from glcan.errors import ConfigError, DataError, UnknownName

Batches = list[tuple[list[Tensor], list[dict[str, Tensor]]]]


def assert_same(first: Batches, second: Batches) -> None:
    assert len(first) == len(second)
    for (images, targets), (others, other_targets) in zip(first, second, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(images, others, strict=True))
        for target, other in zip(targets, other_targets, strict=True):
            assert target.keys() == other.keys() == {"boxes", "labels", "image_id"}
            assert all(torch.equal(target[key], other[key]) for key in target)


def ids(batches: Batches) -> list[int]:
    return [int(target["image_id"]) for _, targets in batches for target in targets]


# ---------------------------------------------------------------- layouts


@pytest.mark.parametrize("images", ["", "images"])
def test_coco(tmp_path: Path, images: str) -> None:
    write_coco(tmp_path, images=images)
    data = load_detection("coco", root=tmp_path)
    assert (data.classes, data.category_ids) == (["dog", "cat"], [3, 7])
    # image 1 has no box, image 2 a crowd alone: neither can be learned, both are evaluated
    assert (data.size("train"), data.size("test"), data.size("val")) == (2, 3, 0)
    batches = list(data.loader("test", 2))
    assert ids(batches) == [1, 2, 3]
    images_, targets = batches[0]
    assert [tuple(image.shape) for image in images_] == [(3, 30, 40)] * 2
    assert images_[0].dtype == torch.float32
    assert 0 <= float(images_[0].min()) < float(images_[0].max()) <= 1
    assert [target["boxes"].shape for target in targets] == [(0, 4), (0, 4)]
    target = batches[1][1][0]
    assert target["labels"].tolist() == [2, 1]
    assert target["boxes"].tolist() == [[1.5, 2.25, 11.5, 10.75], [2.5, 2.25, 12.5, 10.75]]
    assert data.shape == (3, None, None)
    data.check(3)
    with pytest.raises(DataError, match="num_classes=3"):
        data.check(2)


def test_the_ground_truth_of_coco_is_what_the_file_says(tmp_path: Path) -> None:
    write_coco(tmp_path)
    truth = load_detection("coco", root=tmp_path).ground_truth("test")
    wanted = coco_content(3)
    assert truth["annotations"] == [
        {key: value for key, value in entry.items() if key != "id"} | {"id": number}
        for number, entry in enumerate(wanted["annotations"], 1)
    ]
    assert truth["categories"] == sorted(CATEGORIES, key=lambda category: category["id"])
    assert [image["id"] for image in truth["images"]] == [1, 2, 3]


def test_coco_of_images_of_mixed_sizes(tmp_path: Path) -> None:
    content = coco_content()
    content["images"][2] |= {"width": 50, "height": 60}
    write_coco(tmp_path, train=content)
    data = load_detection("coco", root=tmp_path)
    assert load_detection("coco", root=tmp_path, image_size=600).shape == (3, 600, 600)
    images, _ = next(iter(data.loader("train", 2)))
    assert {tuple(image.shape) for image in images} == {(3, 30, 40), (3, 60, 50)}


@pytest.mark.parametrize("below", ["VOCdevkit/VOC2007", "VOC2007", ""])
@pytest.mark.parametrize("parts", [("trainval", "test"), ("train", "val")])
def test_voc(tmp_path: Path, below: str, parts: tuple[str, str]) -> None:
    write_voc(tmp_path / below, parts)
    data = load_detection("voc", root=tmp_path)
    assert data.classes == ["cat", "dog"]
    assert (data.size("train"), data.size("test")) == (2, 1)  # 000002 has a difficult object alone
    _, targets = next(iter(data.loader("train", 2, augment=False)))
    by_id = {int(target["image_id"]): target for target in targets}
    assert by_id[1]["boxes"].tolist() == [[0, 0, 10, 20], [4, 4, 40, 30]]  # from 1, the last pixel included
    assert by_id[1]["labels"].tolist() == [2, 1]
    truth = data.ground_truth("test")
    assert [(entry["bbox"], entry["iscrowd"]) for entry in truth["annotations"]] == [
        ([2, 3, 10, 11], 0),
        ([7, 7, 23, 23], 1),
    ]


def test_voc_without_a_size_or_with_a_wrong_file_name(tmp_path: Path) -> None:
    write_voc(tmp_path)
    text = voc_xml("elsewhere", [("dog", (1.0, 1.0, 10.0, 20.0), 0)], size=None)
    (tmp_path / "Annotations/000003.xml").write_text(text)
    with pytest.warns(UserWarning, match=r"1 annotations .* '000003.xml' of 'elsewhere.jpg'"):
        data = load_detection("voc", root=tmp_path)
    assert tuple(next(iter(data.loader("train", 2)))[0][0].shape) == (3, 30, 40)


def test_unknown_names_and_places(tmp_path: Path) -> None:
    with pytest.raises(UnknownName, match="'coco'"):
        load_detection("cocoo")
    with pytest.raises(DataError, match="looked in.*data/coco.*--data-root"):
        load_detection("coco")
    with pytest.raises(DataError, match=r"not in COCO's layout. Expected: ROOT/annotations"):
        load_detection("coco", root=tmp_path)
    with pytest.raises(DataError, match=r"not in Pascal VOC's layout"):
        load_detection("voc", root=tmp_path)
    with pytest.raises(ConfigError, match="one for detection"):
        load("scenes")
    with pytest.raises(ConfigError, match="image_size=0"):
        load_detection("scenes", image_size=0)
    write_coco(tmp_path)
    assert {info.name: info.found for info in available(tmp_path)}["coco"] == tmp_path


# ---------------------------------------------------------------- bad annotations


def changed(position: int, **values: Any) -> dict[str, Any]:
    content = coco_content()
    content["annotations"][position] |= values
    return content


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (changed(2, category_id=99), r"Annotation 301 in '.*instances_train2017.json' has category 99.*3, 7.*Add it"),
        (changed(2, image_id=99), "Annotation 301 .* is of image 99, which the file does not list"),
        (changed(2, bbox=[1, 2, 3]), "Annotation 301 .*bbox"),
        (changed(2, bbox=None), "Annotation 301 .*bbox"),
        (changed(2, bbox=[1, 2, float("nan"), 3]), "Annotation 301 .*no finite number"),
        (changed(2, image_id=[]), r"Annotation 301 .*image_id is \[\]"),
        (coco_content(annotations=[3]), "Annotation 0 .*no object with names"),
        (coco_content(annotations=None), "lack the lists annotations"),
        ({"images": 3}, "lack the lists images, annotations, categories"),
        (coco_content(categories=[{"id": 7}]), "An entry of 'categories' .*'name'"),
        (coco_content(categories=[*CATEGORIES, CATEGORIES[0]]), "the same id"),
        (coco_content(categories=[*CATEGORIES, {"id": 9, "name": "cow"}]), r"different categories.*\(9, 'cow'\)"),
        (coco_content(annotations=[]), "None of the 4 train images .* has a box to learn"),
    ],
)
def test_bad_coco_annotations(tmp_path: Path, content: dict[str, Any], message: str) -> None:
    write_coco(tmp_path, train=content)
    with pytest.raises(DataError, match=message):
        load_detection("coco", root=tmp_path)


def test_json_that_does_not_parse(tmp_path: Path) -> None:
    write_coco(tmp_path)
    path = tmp_path / "annotations/instances_val2017.json"
    path.write_text(path.read_text()[:100])
    with pytest.raises(DataError, match=r"instances_val2017.json' cannot be read: .*line 1.*get it again"):
        load_detection("coco", root=tmp_path)


@pytest.mark.parametrize(
    ("box", "message"),
    [
        ([5, 5, 0, 8], r"annotation 301 has no area \(0 x 8 pixels\)"),
        ([5, 5, 8, -3], r"annotation 301 has no area \(8 x -3 pixels\)"),
        ([41, 5, 8, 8], "annotation 301 lies outside its image of 40 x 30 pixels"),
        ([5, -9, 8, 8], "annotation 301 lies outside"),
    ],
)
def test_boxes_without_area_or_outside_are_left_out_with_one_warning(
    tmp_path: Path, box: list[float], message: str
) -> None:
    write_coco(tmp_path, train=changed(2, bbox=box))
    with pytest.warns(UserWarning, match=rf"1 boxes in '.*instances_train2017.json' are left out: {message}"):
        data = load_detection("coco", root=tmp_path)
    targets = {int(t["image_id"]): t for _, ts in data.loader("train", 2, augment=False) for t in ts}
    assert len(targets[3]["boxes"]) == 1


def test_a_box_over_the_border_is_cut_for_training_and_kept_for_evaluation(tmp_path: Path) -> None:
    write_coco(tmp_path)
    path = tmp_path / "annotations/instances_val2017.json"
    content = json.loads(path.read_text())
    content["annotations"][-1]["bbox"] = [30, -2, 20, 10]
    path.write_text(json.dumps(content))
    data = load_detection("coco", root=tmp_path)
    *_, (_, targets) = data.loader("test", 1)
    assert targets[0]["boxes"][-1].tolist() == [30, 0, 40, 8]
    assert data.ground_truth("test")["annotations"][-1]["bbox"] == [30, -2, 20, 10]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<annotation><object>", r"000001.xml' cannot be read: .*line 1"),
        ("<annotation><size><width>40</width><height>30</height></size><object><name>cat</name></object></annotation>",
         "Object 1 in .*000001.xml' cannot be used: it has no bndbox/xmin"),
        (voc_xml("000001", [("cat", (1.0, 1.0, float("inf"), 3.0), 0)]), "Object 1 .*xmax is 'inf'.*no finite"),
        (None, "000001.xml' are not there, though ImageSets/Main lists them"),
    ],
)  # fmt: skip
def test_bad_voc_annotations(tmp_path: Path, text: str | None, message: str) -> None:
    write_voc(tmp_path)
    path = tmp_path / "Annotations/000001.xml"
    if text is None:
        path.unlink()
    else:
        path.write_text(text)
    with pytest.raises(DataError, match=message):
        load_detection("voc", root=tmp_path)


def test_a_class_that_no_train_image_has(tmp_path: Path) -> None:
    write_voc(tmp_path)
    (tmp_path / "Annotations/000004.xml").write_text(voc_xml("000004", [("cow", (1.0, 1.0, 9.0, 9.0), 0)]))
    with pytest.raises(DataError, match=r"000004.xml' is of class 'cow'.*cat, dog"):
        load_detection("voc", root=tmp_path)


# ---------------------------------------------------------------- bad images


def test_image_files_that_are_missing_corrupt_or_of_another_size(tmp_path: Path) -> None:
    write_coco(tmp_path)
    path = tmp_path / "train2017/000000000003.jpg"
    path.unlink()
    for verify in (True, False):
        with pytest.raises(DataError, match=r"000000000003.jpg' of 'coco' cannot be used: there is no such file"):
            load_detection("coco", root=tmp_path, verify=verify)
    path.write_bytes(b"")
    with pytest.raises(DataError, match="000000000003.jpg.*empty or no image.*--skip-corrupt"):
        load_detection("coco", root=tmp_path)
    write_image(path, (41, 30))
    with pytest.raises(DataError, match=r"000000000003.jpg.*41 x 30 pixels, but its annotations say 40 x 30"):
        load_detection("coco", root=tmp_path)
    unchecked = load_detection("coco", root=tmp_path, verify=False)
    for workers in (0, 1):
        with pytest.raises(DataError, match="000000000003.jpg"):
            list(unchecked.loader("train", 1, workers=workers))
    with pytest.warns(UserWarning, match=r"1 of 5 images of 'coco' cannot be used and are left out: .*0003.jpg"):
        data = load_detection("coco", root=tmp_path, skip_corrupt=True)
    assert ids(list(data.loader("train", 1))) == [4]


def test_no_image_left(tmp_path: Path) -> None:
    write_coco(tmp_path)
    for path in (tmp_path / "train2017").iterdir():
        path.write_bytes(b"no image")
    with pytest.raises(DataError, match="No train image of 'coco' can be used"):
        load_detection("coco", root=tmp_path, skip_corrupt=True)


def test_no_folder_of_images(tmp_path: Path) -> None:
    write_coco(tmp_path, images="elsewhere")
    with pytest.raises(DataError, match="no folder train2017"):
        load_detection("coco", root=tmp_path)


@pytest.mark.parametrize("mode", ["L", "RGBA", "CMYK", "P", "I;16"])
def test_other_colour_modes_become_rgb(tmp_path: Path, mode: str) -> None:
    path = tmp_path / ("image.jpg" if mode == "CMYK" else "image.png")
    if mode == "I;16":
        Image.new("I;16", (40, 30), 40000).save(path)
    else:
        write_image(path, (40, 30), mode)
    pixels = read_pixels(path)
    assert (pixels.shape, pixels.dtype) == ((3, 30, 40), torch.uint8)
    if mode == "I;16":
        assert pixels.unique().tolist() == [40000 >> 8]


def test_the_exif_orientation_follows_the_annotations(tmp_path: Path) -> None:
    """Boxes are of the pixels as stored, or as turned: the size in the annotations says which."""
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    content = coco_content()
    content["images"][2] |= {"width": 30, "height": 40}
    write_coco(tmp_path, train=content)
    for image in (3, 4):
        write_image(tmp_path / f"train2017/{image:012d}.jpg", (40, 30), exif=exif)
    data = load_detection("coco", root=tmp_path)
    shapes = {
        int(target["image_id"]): tuple(image.shape)
        for images, targets in data.loader("train", 2, augment=False)
        for image, target in zip(images, targets, strict=True)
    }
    assert shapes == {3: (3, 40, 30), 4: (3, 30, 40)}


# ---------------------------------------------------------------- loaders


def small_scenes(**options: Any) -> DetectionData:
    return Scenes(size=64, train=60, test=12, **options)


@pytest.fixture(scope="module")
def scenes() -> DetectionData:
    return small_scenes(limit=21, seed=5)


def test_an_epoch_is_a_function_of_seed_and_epoch(scenes: DetectionData) -> None:
    state = torch.get_rng_state()
    first = list(scenes.loader("train", 7, epoch=2))
    assert_same(first, list(scenes.loader("train", 7, epoch=2)))
    assert_same(first, list(small_scenes(limit=21, seed=5).loader("train", 7, epoch=2)))
    assert torch.equal(torch.get_rng_state(), state)
    other_epoch, other_seed = (
        list(scenes.loader("train", 7, epoch=3)),
        list(small_scenes(limit=21, seed=6).loader("train", 7, epoch=2)),
    )
    for other in (other_epoch, other_seed):
        assert ids(other) != ids(first)
        assert sorted(ids(other)) == sorted(ids(first))  # the limit takes the same images for every seed


@pytest.mark.parametrize("workers", [0, 1])
def test_an_epoch_resumes_in_the_middle(scenes: DetectionData, workers: int) -> None:
    whole = list(scenes.loader("train", 4, epoch=1))
    rest = scenes.loader("train", 4, epoch=1, start=3, workers=workers)
    assert len(rest) == len(whole) == 5  # 21 images; the last one alone is left out
    assert_same(list(rest), whole[3:])
    assert list(scenes.loader("train", 4, epoch=1, start=5)) == []


def test_augmentation_does_not_depend_on_the_batch(scenes: DetectionData) -> None:
    def images(batch: int) -> dict[int, Tensor]:
        loader = scenes.loader("train", batch, epoch=1, drop_last=False)
        return {
            int(t["image_id"]): image for images, targets in loader for image, t in zip(images, targets, strict=True)
        }

    one, many = images(1), images(7)
    assert one.keys() == many.keys()
    assert all(torch.equal(one[key], many[key]) for key in one)
    plain = {
        int(t["image_id"]): i
        for i_, t_ in scenes.loader("train", 7, augment=False)
        for i, t in zip(i_, t_, strict=True)
    }
    assert any(not torch.equal(one[key], plain[key]) for key in one if key in plain)


def test_test_images_come_in_order_and_unchanged(scenes: DetectionData) -> None:
    first = list(scenes.loader("test", 5))
    assert ids(first) == sorted(ids(first))
    assert sum(len(images) for images, _ in first) == scenes.size("test") == 12
    assert_same(first[:1], [next(iter(scenes.loader("test", 5, epoch=4)))])


def test_val_is_a_part_of_the_train_images() -> None:
    data = small_scenes(limit=10, val=15)
    held_out, train = ids(list(data.loader("val", 8))), ids(list(data.loader("train", 4)))
    assert (len(held_out), len(train)) == (15, 10)
    assert not set(held_out) & set(train)
    assert data.size("val") == len(data.ground_truth("val")["images"]) == 15


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"val": 60}, "val=60"), ({"val": -1}, "val=-1"), ({"val": 1e-9}, "less than one"), ({"limit": 0}, "limit=0"),
     ({"size": 32}, "image_size=32"), ({"test": 0}, "60 train and 0 test scenes")],
)  # fmt: skip
def test_arguments_out_of_range(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Scenes(**({"size": 64, "train": 60, "test": 12} | arguments))


def test_loader_arguments_out_of_range(scenes: DetectionData) -> None:
    for arguments in ({"batch": 0}, {"epoch": -1}, {"start": -1}, {"start": 7}, {"workers": -1}, {"batch": 22}):
        with pytest.raises(ConfigError, match=f"{next(iter(arguments))}="):
            scenes.loader("train", **({"batch": 4, "drop_last": True} | arguments))
    with pytest.raises(UnknownName, match="split"):
        scenes.loader("training", 4)
    with pytest.raises(DataError, match="no 'val' split"):
        scenes.loader("val", 4)


# ---------------------------------------------------------------- augmentation


def framed(height: int = 60, width: int = 80) -> tuple[Tensor, Tensor]:
    """A white rectangle on grey, and its box."""
    image = torch.full((3, height, width), 100, dtype=torch.uint8)
    image[:, 20:40, 10:50] = 255
    return image, torch.tensor([[10.0, 20.0, 50.0, 40.0]])


@pytest.mark.parametrize("seed", range(12))
def test_boxes_follow_the_pixels(seed: int) -> None:
    image, boxes = framed()
    moved, found, kept = BoxAugmentation(scale=(0.5, 1.3), visible=0.0)(image, boxes, generator(seed))
    assert moved.shape == image.shape
    assert kept.tolist() == [0]
    white = (moved[0] > 178).nonzero()
    y1, x1 = white.min(0).values.tolist()
    y2, x2 = (white.max(0).values + 1).tolist()
    assert (found[0] - torch.tensor([x1, y1, x2, y2])).abs().max() <= 1.01


def test_a_mirror_is_exact_and_scale_can_be_turned_off() -> None:
    image, boxes = framed()
    results = [BoxAugmentation(scale=(1, 1))(image, boxes, generator(seed)) for seed in range(8)]
    mirrored = [result for result in results if not torch.equal(result[0], image)]
    assert 0 < len(mirrored) < 8
    for moved, found, _ in mirrored:
        assert torch.equal(moved, image.flip(-1))
        assert found.tolist() == [[30, 20, 70, 40]]
    off = BoxAugmentation(flip=False, scale=(1, 1))(image, boxes, generator(1))
    assert torch.equal(off[0], image)


def test_boxes_that_leave_the_image_are_left_out() -> None:
    image = torch.zeros(3, 60, 60, dtype=torch.uint8)
    boxes = torch.tensor([[0.0, 0.0, 6.0, 6.0], [20.0, 20.0, 40.0, 40.0]])
    kept = {tuple(BoxAugmentation(scale=(2, 2))(image, boxes, generator(seed))[2].tolist()) for seed in range(20)}
    assert (1,) in kept
    empty = BoxAugmentation()(image, torch.zeros(0, 4), generator(1))
    assert (empty[1].shape, empty[2].shape) == ((0, 4), (0,))


def test_a_box_of_which_too_little_is_visible_is_left_out() -> None:
    """The share is computed here by hand, from the four numbers that the augmentation draws."""
    image = torch.randint(256, (3, 100, 100), dtype=torch.uint8, generator=generator("pixels"))
    boxes = torch.tensor([[0.0, 0.0, 24.0, 24.0], [70.0, 4.0, 100.0, 90.0], [40.0, 40.0, 60.0, 60.0]])
    slivers = 0
    for seed in range(300):
        draw, again = generator(seed), generator(seed)
        moved, found, kept = BoxAugmentation(flip=False, scale=(1.25, 1.25))(image, boxes, draw)
        _, _, down, right = torch.rand(4, generator=again, dtype=torch.float64).tolist()
        assert torch.equal(draw.get_state(), again.get_state())  # four numbers, however many boxes are left
        top, left = round(20 * down), round(20 * right)
        shares = [
            max(0, min(x2, left + 80) - max(x1, left))
            * max(0, min(y2, top + 80) - max(y1, top))
            / (x2 - x1)
            / (y2 - y1)
            for x1, y1, x2, y2 in boxes.tolist()
        ]
        assert kept.tolist() == [row for row, share in enumerate(shares) if share >= 0.3]
        slivers += sum(share < 0.3 for share in shares)
        every, whole, _ = BoxAugmentation(flip=False, scale=(1.25, 1.25), visible=0)(image, boxes, generator(seed))
        assert torch.equal(moved, every)
        assert torch.equal(found, whole[kept])
    assert slivers > 100


@pytest.mark.parametrize("flip", [False, True])
def test_the_visible_share_is_that_of_the_mirrored_box(flip: bool) -> None:
    """A window of 80 of 100 columns: of a box of 20 columns at a border at least 30 % is kept, or it is left out."""
    image = torch.zeros(3, 100, 100, dtype=torch.uint8)
    boxes = torch.tensor([[0.0, 0.0, 20.0, 100.0]])
    for seed in range(100):
        _, found, kept = BoxAugmentation(flip=flip, scale=(1.25, 1.25))(image, boxes, generator(seed))
        for x1, _, x2, _ in found.tolist():
            assert (x2 - x1) * 0.8 * 80 >= 0.3 * 20 * 100 - 1e-3
        mirrored, _, _, right = torch.rand(4, generator=generator(seed), dtype=torch.float64).tolist()
        left = round(20 * right)
        columns = left if flip and mirrored < 0.5 else 20 - left
        assert len(kept) == (columns * 80 >= 0.3 * 20 * 100)
