from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from glcan.data import scenes
from glcan.data.scenes import KINDS, PHOTOGRAPHS, Scenes, kinds, load_objects, load_photographs, make_scenes
from glcan.data.sets import SETS
from glcan.errors import DataError

COUNT, SIDE = 60, 160
garments = pytest.mark.skipif(SETS["fashion-mnist"].find(None) is None, reason="Fashion-MNIST is not here")


@pytest.fixture(autouse=True)
def _fresh() -> None:
    for cached in (make_scenes, load_objects, load_photographs):
        cached.cache_clear()


@pytest.fixture
def digits(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As where Fashion-MNIST is not installed."""
    for name in ("XDG_DATA_HOME", "XDG_DATA_DIRS", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.setattr(sys, "prefix", str(tmp_path))


def test_scenes_are_a_function_of_part_side_seed_and_index() -> None:
    images, notes = make_scenes("train", 8, 64, 3)
    make_scenes.cache_clear()
    again, _ = make_scenes("train", 8, 64, 3)
    fewer, fewer_notes = make_scenes("train", 5, 64, 3)
    assert images is not again
    assert torch.equal(images, again)
    assert torch.equal(images[:5], fewer)
    assert torch.equal(notes.boxes[: len(fewer_notes.boxes)], fewer_notes.boxes)
    for other in (make_scenes("train", 8, 64, 4)[0], make_scenes("test", 8, 64, 3)[0]):
        assert not torch.equal(images, other)
    assert make_scenes("train", 8, 64, 3)[0] is again  # made once


def test_scenes_do_not_differ_between_processes() -> None:
    code = "from glcan.data.scenes import make_scenes; print(make_scenes('train', 3, 64)[0].long().sum().item())"
    environment = os.environ | {"PYTHONHASHSEED": "7"}
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert int(there.stdout) == int(make_scenes("train", 3, 64)[0].long().sum())


@pytest.mark.parametrize("part", ["train", "test"])
def test_boxes_are_tight_and_of_three_octaves(part: scenes.Part, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a photograph of one colour, what differs from it is what was pasted."""
    black = tuple(image.point(lambda value: 0) for image in load_photographs(part, SIDE))
    monkeypatch.setattr(scenes, "load_photographs", lambda part, size: black)
    images, notes = make_scenes(part, COUNT, SIDE)
    longest = []
    for index in range(COUNT):
        boxes = notes.boxes[notes.of(index)]
        assert 1 <= len(boxes) <= scenes.MOST
        assert (boxes[:, :2] >= 0).all()
        assert (boxes[:, 2:] <= SIDE).all()
        longest += (boxes[:, 2:] - boxes[:, :2]).max(1).values.tolist()
        if len(boxes) == 1:
            pasted = images[index].amax(0) > 30
            y1, x1 = pasted.nonzero().min(0).values.tolist()
            y2, x2 = (pasted.nonzero().max(0).values + 1).tolist()
            assert (boxes[0] - torch.tensor([x1, y1, x2, y2])).abs().max() <= 3
    shares = np.histogram(np.array(longest) / SIDE, [0.1, 0.25, 0.5, 0.77])[0] / len(longest)
    assert shares.sum() == 1
    assert shares.min() > 0.15
    assert (notes.areas <= (notes.boxes[:, 2:] - notes.boxes[:, :2]).prod(1)).all()


def test_overlaps_are_partial() -> None:
    from torchvision.ops import box_iou

    _, notes = make_scenes("train", COUNT, SIDE)
    overlapping = 0
    for index in range(COUNT):
        boxes = notes.boxes[notes.of(index)]
        ious = box_iou(boxes, boxes).fill_diagonal_(0)
        assert ious.max() <= scenes.MAX_IOU
        overlapping += bool(ious.max() > 0.05)
    assert overlapping > COUNT / 10


def test_every_class_is_as_frequent() -> None:
    data = Scenes(size=64, train=5 * COUNT, test=COUNT)
    assert data.classes == kinds()[0]
    counts = torch.bincount(data._annotations["train"].labels, minlength=len(data.classes) + 1)
    assert counts[0] == 0
    assert counts[1:].min() > 0.5 * counts[1:].max()


def test_train_and_test_share_no_photograph() -> None:
    train, test = set(PHOTOGRAPHS["train"]), set(PHOTOGRAPHS["test"])
    assert not train & test
    pairs = [(a, b) for a in load_photographs("train", 64) for b in load_photographs("test", 64)]
    assert not any(a.size == b.size and a.tobytes() == b.tobytes() for a, b in pairs)


@garments
def test_garments() -> None:
    names = [name for members in KINDS.values() for name in members]
    train, test = load_objects("train"), load_objects("test")
    assert sorted(names) == sorted(set(names))
    assert (len(names), train.kinds) == (10, list(KINDS))
    assert [len(rows) for rows in train.rows] == [6000 * len(members) for members in KINDS.values()]
    assert [len(rows) for rows in test.rows] == [1000 * len(members) for members in KINDS.values()]


@pytest.mark.usefixtures("digits")
def test_digits_where_there_are_no_garments() -> None:
    assert kinds() == ([f"digit {digit}" for digit in (0, 2, 4, 6, 8)], "digits")
    data = Scenes(size=64, train=20, test=10)
    assert data.classes == kinds()[0]
    train, test = load_objects("train"), load_objects("test")
    pictures = {
        part: {image.tobytes() for image in objects.images} for part, objects in (("train", train), ("test", test))
    }
    assert not pictures["train"] & pictures["test"]
    digits, labels = load_digits(return_X_y=True)
    bundled = np.round(digits * 255 / 16).astype(np.uint8)
    named = {digit.tobytes(): label for digit, label in zip(bundled, labels, strict=True)}
    for label, rows in enumerate(train.rows):
        found = {named[image.tobytes()] for image in train.images[rows]}
        assert found == {2 * label}
    _, targets = next(iter(data.loader("train", 4)))
    assert all(len(target["boxes"]) for target in targets)
    with pytest.raises(DataError, match="'fashion-mnist' is not there"):
        Scenes(size=64, train=2, test=2, root=Path("nowhere"))


def test_a_missing_photograph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scenes, "PHOTOGRAPHS", {"train": (("skimage", "data/none.png"),)})
    with pytest.raises(DataError, match=r"none.png.*pip install --force-reinstall scikit-image"):
        load_photographs("train", 64)


def test_the_photographs_come_with_the_wheels() -> None:
    """Nothing is fetched: they are in the lists of the installed distributions."""
    from importlib.metadata import files

    shipped = {str(file) for name in ("scikit-image", "scikit-learn") for file in files(name) or ()}
    assert {f"{package}/{name}" for part in PHOTOGRAPHS.values() for package, name in part} <= shipped
