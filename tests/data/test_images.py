"""Splits and the properties that resumption stands on, for data in memory and in folders alike."""

import random

import numpy as np
import pytest
import torch

from glcan.data import load
from glcan.data.images import stratified_order
from glcan.data.tensors import Augmentation, TensorImages
from glcan.errors import ConfigError, DataError, UnknownName


def in_memory(**options):
    pixels = torch.arange(30 * 2 * 36).remainder(251).to(torch.uint8).reshape(30, 2, 6, 6)
    labels = torch.arange(30) % 3
    return TensorImages(
        "memory",
        ["a", "b", "c"],
        {"train": pixels, "test": pixels[:9]},
        {"train": labels, "test": labels[:9]},
        augmentation=Augmentation(padding=2, flip=True),
        **options,
    )


@pytest.fixture(params=["memory", "folder"])
def make(request, tree):
    """A data set with 30 train images of three classes, by its options."""
    if request.param == "memory":
        return in_memory
    root = tree({f"{split}/{c}": n for split, n in (("train", 10), ("test", 3)) for c in "abc"})
    return lambda **options: load("imagefolder", root=root, image_size=16, **options)


def epoch_of(loader):
    images, labels = zip(*loader, strict=True)
    return torch.cat(images), torch.cat(labels)


def same(left, right):
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def test_batches_are_as_documented(make):
    data = make()
    loader = data.loader("train", 8)
    batches = list(loader)
    assert len(loader) == len(batches) == 4
    assert [len(labels) for _, labels in batches] == [8, 8, 8, 6]
    images, labels = batches[0]
    assert images.dtype == torch.float32
    assert labels.dtype == torch.int64
    assert images.shape[1:] == data.shape


def test_epoch_is_a_function_of_seed_and_epoch(make):
    first = epoch_of(make(seed=1).loader("train", 8, epoch=2))
    assert same(first, epoch_of(make(seed=1).loader("train", 8, epoch=2)))
    assert not same(first, epoch_of(make(seed=1).loader("train", 8, epoch=3)))
    assert not same(first, epoch_of(make(seed=2).loader("train", 8, epoch=2)))


def test_epoch_does_not_depend_on_the_batch_size(make):
    data = make()
    assert same(epoch_of(data.loader("train", 5)), epoch_of(data.loader("train", 30)))


def test_loader_can_be_iterated_again(make):
    loader = make().loader("train", 8)
    assert same(epoch_of(loader), epoch_of(loader))


@pytest.mark.parametrize("start", [0, 1, 3])
def test_start_skips_batches_and_changes_nothing_else(make, start):
    data = make()
    whole, rest = list(data.loader("train", 8)), data.loader("train", 8, start=start)
    assert len(rest) == 4
    for left, right in zip(whole[start:], rest, strict=True):
        assert same(left, right)


def test_start_at_the_end_yields_nothing(make):
    assert list(make().loader("train", 8, start=4)) == []


def test_global_generators_are_neither_read_nor_advanced(make):
    def states():
        return torch.get_rng_state().tolist(), random.getstate(), repr(np.random.get_state())

    torch.manual_seed(1)
    before = states()
    first = epoch_of(make(val=0.2, limit=20).loader("train", 8))
    assert states() == before
    torch.manual_seed(2)
    assert same(first, epoch_of(make(val=0.2, limit=20).loader("train", 8)))


def test_augmentation_of_a_sample_does_not_depend_on_the_others_in_use(make):
    def by_label_and_size(data):
        images, _ = epoch_of(data.loader("train", 8, epoch=4))
        return {image.numpy().tobytes() for image in images}

    assert by_label_and_size(make(limit=12)) < by_label_and_size(make())


def test_augment_false_leaves_the_images_as_in_evaluation(make):
    data = make(val=6)
    plain = {image.numpy().tobytes() for image in epoch_of(data.loader("train", 8, augment=False))[0]}
    assert plain == {image.numpy().tobytes() for image in epoch_of(data.loader("train", 8, augment=False, epoch=1))[0]}
    assert not same(epoch_of(data.loader("train", 8)), epoch_of(data.loader("train", 8, augment=False)))
    assert same(epoch_of(data.loader("val", 8)), epoch_of(data.loader("val", 8, epoch=5)))


def test_test_split_keeps_its_order(make):
    data = make()
    assert torch.equal(epoch_of(data.loader("test", 4))[1], data.labels("test"))


@pytest.mark.parametrize(("val", "count"), [(6, 6), (0.2, 6), (0, 0), (29, 29)])
def test_val_is_split_off_the_train_images(make, val, count):
    data = make(val=val)
    assert (data.size("train"), data.size("val"), data.size("test")) == (30 - count, count, 9)


def test_val_is_stratified_and_depends_on_the_seed(make):
    chosen = [make(val=6, seed=seed) for seed in (0, 0, 1)]
    assert torch.bincount(chosen[0].labels("val")).tolist() == [2, 2, 2]
    images = [epoch_of(data.loader("val", 8))[0] for data in chosen]
    assert torch.equal(images[0], images[1])
    assert not torch.equal(images[0], images[2])


def test_limit_is_stratified_nested_and_the_same_for_every_seed(make):
    def images(**options):
        return {i.numpy().tobytes() for i in epoch_of(make(**options).loader("train", 30, augment=False))[0]}

    assert torch.bincount(make(limit=9).labels("train")).tolist() == [3, 3, 3]
    assert images(limit=7) < images(limit=9) == images(limit=9, seed=5)
    assert make(limit=100).size("train") == 30
    assert (make(limit=20, val=15).size("train"), make(limit=20, val=15).size("val")) == (15, 15)


@pytest.mark.parametrize(
    ("split", "batch", "drop_last", "sizes"),
    [
        ("train", 29, None, [29]),
        ("train", 29, False, [29, 1]),
        ("train", 20, None, [20, 10]),
        ("train", 20, True, [20]),
        ("train", 1, None, [1] * 30),
        ("train", 15, True, [15, 15]),
        ("test", 8, None, [8, 1]),
    ],
)
def test_last_batch(split, batch, drop_last, sizes):
    loader = in_memory().loader(split, batch, drop_last=drop_last)
    assert [len(labels) for _, labels in loader] == sizes
    assert len(loader) == len(sizes)


@pytest.mark.parametrize(
    "bad",
    [{"batch": 0}, {"epoch": -1}, {"start": -1}, {"start": 5}, {"workers": -1}, {"batch": 31, "drop_last": True}],
)
def test_loader_arguments_out_of_range(bad):
    with pytest.raises(ConfigError, match=next(iter(bad))):
        in_memory().loader("train", **({"batch": 8} | bad))


def test_unknown_and_missing_split():
    with pytest.raises(UnknownName, match="'train'"):
        in_memory().loader("trian", 8)
    with pytest.raises(DataError, match=r"val=0\.1"):
        in_memory().loader("val", 8)


@pytest.mark.parametrize("val", [-1, 30, 1.0, 1.5, 0.001, True, -0.5])
def test_val_out_of_range(val):
    with pytest.raises(ConfigError, match="val="):
        in_memory(val=val)


def test_limit_out_of_range():
    with pytest.raises(ConfigError, match="limit=0"):
        in_memory(limit=0)


def test_check_names_label_image_and_range():
    with pytest.raises(DataError, match=r"Label 2 of train image 2 .* outside 0\.\.1 \(10 of 30.*at least 3 classes"):
        in_memory().check(2)
    in_memory().check(3)
    in_memory().check(10)


@pytest.mark.parametrize("count", [1, 5, 10, 37, 100])
def test_every_prefix_of_a_stratified_order_is_in_proportion(count):
    labels = torch.tensor([0] * 60 + [1] * 30 + [3] * 10)
    order = stratified_order(labels, "test")
    assert sorted(order.tolist()) == list(range(100))
    share = torch.bincount(labels[order[:count]], minlength=4) / count
    assert torch.all((share - torch.tensor([0.6, 0.3, 0, 0.1])).abs() * count <= 1)
