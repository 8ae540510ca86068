import warnings

import pytest
import torch

from glcan.data import load
from glcan.errors import DataError

IMAGENET = {"train/cat": 4, "train/dog": 3, "val/cat": 2, "val/dog": 1}


def open_folder(root, **options):
    return load("imagefolder", root=root, **({"image_size": 16} | options))


def sizes(data):
    return tuple(data.size(split) for split in ("train", "val", "test"))


def truncate(path):
    path.write_bytes(path.read_bytes()[:-40])


def test_imagenet_layout(tree):
    data = open_folder(tree(IMAGENET))
    assert data.classes == ["cat", "dog"]
    assert data.shape == (3, 16, 16)
    assert sizes(data) == (7, 0, 3)
    assert data.labels("test").tolist() == [0, 0, 1]


def test_size_is_224_by_default(tree):
    data = load("imagefolder", root=tree(IMAGENET))
    assert data.shape == (3, 224, 224)
    assert (data.preprocessing()["resize"], data.preprocessing()["crop"]) == (256, 224)


def test_val_and_test_folders(tree):
    root = tree(IMAGENET | {"test/dog": 2})
    assert sizes(open_folder(root)) == (7, 3, 2)
    assert sizes(open_folder(root, val=2)) == (5, 2, 2)


@pytest.mark.parametrize("prefix", ["", "train/"])
def test_single_tree_is_split_the_same_for_every_seed(tree, prefix):
    root = tree({f"{prefix}cat": 10, f"{prefix}dog": 5, f"{prefix}.hidden": 1})
    data, other = open_folder(root), open_folder(root, seed=1)
    assert sizes(data) == (12, 0, 3)
    assert data.labels("test").tolist() == [0, 0, 1]
    left, right = (next(iter(d.loader("test", 8)))[0] for d in (data, other))
    assert torch.equal(left, right)


def test_single_tree_does_not_depend_on_where_it_lies(tree, tmp_path):
    root = tree({"cat": 10, "dog": 5})
    before = next(iter(open_folder(root).loader("test", 8)))[0]
    root.rename(tmp_path / "moved")
    assert torch.equal(before, next(iter(open_folder(tmp_path / "moved").loader("test", 8)))[0])


def test_files_in_folders_below_a_class_count(tree):
    assert sizes(open_folder(tree(IMAGENET | {"train/cat/indoors": 2}))) == (9, 0, 3)


def test_workers_change_nothing(tree):
    data = open_folder(tree(IMAGENET))
    alone, helped = (list(data.loader("train", 2, workers=workers, epoch=1)) for workers in (0, 2))
    for left, right in zip(alone, helped, strict=True):
        assert torch.equal(left[0], right[0])
        assert torch.equal(left[1], right[1])


@pytest.mark.parametrize(
    ("counts", "reason"),
    [
        ({"empty": 0}, "one class only, 'empty'"),
        ({"train/cat": 3, "val/cat": 1}, "one class only, 'cat'"),
        ({"cat": 0, "dog": 0}, "no files that end in"),
        ({"cat": 3, "dog": 0}, "dog' of the class 'dog' has no images"),
        ({"cat": 3, "dog": 1}, "'dog' .* one image only"),
        ({"val/cat": 3, "val/dog": 3}, "none 'train'"),
        (IMAGENET | {"val/cow": 1}, "cow' is of a class that the train folder lacks"),
        ({"train/cat": 2, "train/dog": 2, "val/cat": 0}, "val' is empty"),
        ({".hidden": 2}, "no folders of classes"),
    ],
)
def test_folder_that_cannot_be_trained_on(tree, counts, reason):
    with pytest.raises(DataError, match=reason):
        open_folder(tree(counts))


def test_missing_folder_and_missing_root(tmp_path):
    with pytest.raises(DataError, match=r"does not exist.*ROOT/train/CLASS"):
        open_folder(tmp_path / "none")
    with pytest.raises(DataError, match="--data-root"):
        load("imagefolder")


@pytest.mark.parametrize("path", ["train/cat/2.png", "val/dog/0.png"])
def test_corrupt_file_is_named_before_training(tree, path):
    root = tree(IMAGENET)
    truncate(root / path)
    with pytest.raises(DataError, match=rf"{path}.*--skip-corrupt"):
        open_folder(root)


def test_skip_corrupt_goes_on_and_warns_once(tree):
    root = tree(IMAGENET)
    whole = open_folder(root)
    truncate(root / "train/cat/2.png")
    (root / "train/dog/1.png").write_text("no image")
    with pytest.warns(UserWarning, match=r"2 of 10 image files.*cat/2\.png.*dog/1\.png") as caught:
        data = open_folder(root, skip_corrupt=True)
    assert len(caught) == 1
    assert sizes(data) == (5, 0, 3)
    kept = {image.numpy().tobytes() for image in next(iter(data.loader("train", 8)))[0]}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        open_folder(root, skip_corrupt=True, verify=False)
    assert len(kept) == 5
    assert whole.size("train") == 7


def test_skip_corrupt_keeps_the_augmentation_of_the_other_files(tree):
    root = tree(IMAGENET)
    before = {image.numpy().tobytes() for image in next(iter(open_folder(root).loader("train", 8)))[0]}
    truncate(root / "train/cat/0.png")
    with pytest.warns(UserWarning, match="1 of 10"):
        data = open_folder(root, skip_corrupt=True)
    after = {image.numpy().tobytes() for image in next(iter(data.loader("train", 8)))[0]}
    assert after < before


def test_too_little_left_after_skipping(tree):
    root = tree({"train/cat": 2, "train/dog": 1, "val/cat": 1})
    truncate(root / "train/dog/0.png")
    with pytest.raises(DataError, match="two classes"):
        open_folder(root, skip_corrupt=True)


def test_only_files_in_use_are_checked(tree):
    root = tree(IMAGENET)
    used = open_folder(root, limit=2)
    keep = {used._files["train"][int(i)][0] for i in used._splits["train"][1]}
    for path in (root / "train").rglob("*.png"):
        if str(path) not in keep:
            truncate(path)
    assert sizes(open_folder(root, limit=2)) == (2, 0, 3)


@pytest.mark.parametrize("workers", [0, 1])
def test_file_that_breaks_during_training_is_named(tree, workers):
    root = tree(IMAGENET)
    data = open_folder(root)
    (root / "val/dog/0.png").unlink()
    with pytest.raises(DataError, match=r"^The image '.*val/dog/0\.png' cannot be read: there is no such file\.$"):
        list(data.loader("test", 2, workers=workers))


def test_progress_bar_for_many_files(tree, monkeypatch, capsys):
    monkeypatch.setattr("glcan.data.folders._PROGRESS_FROM", 5)
    open_folder(tree(IMAGENET))
    captured = capsys.readouterr()
    assert "Checking images" in captured.err
    assert captured.out == ""
