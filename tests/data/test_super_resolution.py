import itertools

import pytest
import torch

from glcan.data.bicubic import shrink_pixels
from glcan.data.super_resolution import Pair, PairData, turned, warn_of_cropping
from glcan.errors import ConfigError, DataError, UnknownName


def pairs(count=4, scale=2, size=(24, 20), seed=0):
    draw = torch.Generator().manual_seed(seed)
    return [
        Pair.of(f"{seed}-{i}", torch.randint(256, (3, *size), generator=draw, dtype=torch.uint8), scale)
        for i in range(count)
    ]


def data(scale=2, patch=6, crops=3, train=4, **options):
    sources = {"train": pairs(train, scale), "test": pairs(2, scale, (18, 30), seed=1)}
    return PairData("some", sources, scale=scale, patch=patch, crops=crops, **options)


def marked(scale, size=(12, 16)):
    """A pair in which every low-resolution pixel has its own value, repeated s x s times in the other image."""
    low = torch.arange(size[0] * size[1], dtype=torch.uint8).view(1, *size).expand(3, *size)
    return Pair("marked", low, low.repeat_interleave(scale, 1).repeat_interleave(scale, 2))


def equal(one, other):
    return all(torch.equal(a, b) for x, y in zip(one, other, strict=True) for a, b in zip(x, y, strict=True))


def test_low_resolution_is_the_bicubic_one_of_what_is_left_after_cropping():
    high = torch.randint(256, (3, 11, 14), dtype=torch.uint8)
    pair = Pair.of("odd", high, 3)
    assert torch.equal(pair.high, high[:, :9, :12])
    assert torch.equal(pair.low, shrink_pixels(high[:, :9, :12], 3))


def test_given_low_resolution_image_is_kept():
    low = torch.zeros(3, 3, 4, dtype=torch.uint8)
    assert torch.equal(Pair.of("given", torch.zeros(3, 11, 14, dtype=torch.uint8), 3, low).low, low)


def test_partners_of_other_sizes_are_refused():
    with pytest.raises(DataError, match=r"'a.png' is 14 x 11 .*scale 3 .*must be 4 x 3, but it is 5 x 3"):
        Pair.of("a.png", torch.zeros(3, 11, 14, dtype=torch.uint8), 3, torch.zeros(3, 3, 5, dtype=torch.uint8))


def test_image_smaller_than_the_scale_is_refused():
    with pytest.raises(DataError, match="5 x 1 pixels"):
        Pair.of("thin.png", torch.zeros(3, 1, 5, dtype=torch.uint8), 2)


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_patches_of_both_resolutions_show_the_same_place_and_turn(scale):
    source = PairData("marked", {"train": [marked(scale)]}, scale=scale, patch=5, crops=40)
    for low, high in source.loader("train", 8):
        assert low.shape == (8, 3, 5, 5)
        assert (low.dtype, high.dtype) == (torch.float32, torch.float32)
        assert torch.equal(low.repeat_interleave(scale, 2).repeat_interleave(scale, 3), high)
        assert 0 <= high.min() <= high.max() <= 1


def test_every_place_and_every_turn_occurs():
    pair = marked(2, size=(4, 5))
    seen = set()
    for low, _ in PairData("marked", {"train": [pair]}, scale=2, patch=3, crops=600).loader("train", 600):
        seen |= {tuple((patch[0] * 255).round().to(torch.int64).flatten().tolist()) for patch in low}
    windows = [pair.low[:1, y : y + 3, x : x + 3] for y in range(2) for x in range(3)]
    expected = {tuple(turned(w, t)[0].flatten().tolist()) for w, t in itertools.product(windows, range(8))}
    assert len(expected) == 48
    assert seen == expected


def test_without_augmentation_patches_are_cut_only():
    pair = marked(2)
    windows = {tuple(pair.low[0, y : y + 3, x : x + 3].flatten().tolist()) for y in range(10) for x in range(14)}
    loader = PairData("marked", {"train": [pair]}, scale=2, patch=3, crops=50).loader("train", 50, augment=False)
    for low, _ in loader:
        assert {tuple((patch[0] * 255).round().to(torch.int64).flatten().tolist()) for patch in low} <= windows


def test_epoch_has_crops_of_every_image_and_keeps_the_last_batch():
    loader = data(crops=3).loader("train", 5)
    assert len(loader) == 3
    assert [len(low) for low, _ in loader] == [5, 5, 2]
    assert [len(low) for low, _ in data(crops=3).loader("train", 5, drop_last=True)] == [5, 5]


def test_same_seed_and_epoch_give_the_same_batches_and_others_others():
    first = list(data(seed=1).loader("train", 4, epoch=2))
    assert equal(first, data(seed=1).loader("train", 4, epoch=2))
    assert not equal(first, data(seed=1).loader("train", 4, epoch=3))
    assert not equal(first, data(seed=2).loader("train", 4, epoch=2))


def test_epoch_entered_in_the_middle_is_the_same():
    whole = list(data().loader("train", 5, epoch=1))
    assert equal(whole[2:], data().loader("train", 5, epoch=1, start=2))


def test_patches_depend_neither_on_the_batch_size_nor_on_a_limit():
    def patches(**options):
        return {
            (low.numpy().tobytes(), high.numpy().tobytes())
            for batch in data(**options).loader("train", options.pop("batch", 4))
            for low, high in zip(*batch, strict=True)
        }

    everything = patches()
    assert patches(limit=2) < everything
    assert len(everything) == 12


def test_global_random_generator_is_left_alone():
    before = torch.get_rng_state()
    list(data(val=1, limit=2).loader("train", 4))
    assert torch.equal(torch.get_rng_state(), before)


def test_whole_images_come_one_at_a_time_in_order():
    some = data(val=1)
    for split in ("val", "test"):
        batches = list(some.loader(split, 16))
        assert len(batches) == some.size(split) == len(some.loader(split, 16))
        for (low, high), pair in zip(batches, some.pairs(split), strict=True):
            assert torch.equal((low[0] * 255).round().to(torch.uint8), pair.low)
            assert torch.equal((high[0] * 255).round().to(torch.uint8), pair.high)


def test_val_images_are_held_out_and_depend_on_the_seed():
    names = {seed: {p.name for p in data(train=8, val=0.25, seed=seed).pairs("val")} for seed in range(6)}
    assert all(len(held_out) == 2 for held_out in names.values())
    assert len(set(map(frozenset, names.values()))) > 1
    some = data(train=8, val=2)
    assert not {p.name for p in some.pairs("train")} & {p.name for p in some.pairs("val")}


def test_limits_are_nested_and_the_same_for_every_seed():
    chosen = [{p.name for p in data(train=8, limit=n, seed=n).pairs("train")} for n in (2, 5, 8)]
    assert [len(names) for names in chosen] == [2, 5, 8]
    assert chosen[0] < chosen[1] < chosen[2]


def test_batches_lie_on_the_device_asked_for():
    low, high = next(iter(data().loader("train", 4, device="meta")))
    assert (low.device.type, high.device.type) == ("meta", "meta")


def test_train_image_smaller_than_a_patch_is_named():
    with pytest.raises(DataError, match=r"'0-0' is 20 x 24 pixels, smaller than a patch of 24 .*at most 10"):
        data(patch=12)


def test_evaluation_sets_have_no_train_images():
    some = PairData("bench", {"test": pairs(2)}, scale=2)
    assert (some.size("train"), some.size("val"), some.size("test")) == (0, 0, 2)
    with pytest.raises(DataError, match="'bench' has no 'train' split.*for evaluation"):
        some.loader("train", 4)
    with pytest.raises(ConfigError, match="no train images to split"):
        PairData("bench", {"test": pairs(2)}, scale=2, val=1)


@pytest.mark.parametrize("bad", [{"patch": 0}, {"crops": 0}, {"limit": 0}, {"val": 4}, {"val": 0.01}, {"val": -1}])
def test_numbers_out_of_range_are_refused(bad):
    with pytest.raises(ConfigError, match="some"):
        data(**bad)


@pytest.mark.parametrize("bad", [{"batch": 0}, {"epoch": -1}, {"start": -1}, {"start": 9}, {"workers": -1}])
def test_loader_arguments_out_of_range_are_refused(bad):
    with pytest.raises(ConfigError, match="of a loader"):
        data().loader("train", **({"batch": 4} | bad))


def test_batch_that_leaves_nothing_is_refused():
    with pytest.raises(ConfigError, match="none of the 12 patches"):
        data().loader("train", 13, drop_last=True)


def test_unknown_splits_and_empty_sets_are_refused():
    with pytest.raises(UnknownName, match="train"):
        data().size("trian")
    with pytest.raises(DataError, match="no 'val' split"):
        data().loader("val", 1)
    with pytest.raises(DataError, match="no images"):
        PairData("empty", {"train": [], "test": []}, scale=2)


def test_cropping_is_said_once():
    with pytest.warns(UserWarning, match=r"2 of 3 images .*'b' from 7 x 8 to 6 x 8") as warned:
        warn_of_cropping([("a", (8, 8)), ("b", (7, 8)), ("c", (8, 9))], 2)
    assert len(warned) == 1
    warn_of_cropping([("a", (8, 8))], 2)
