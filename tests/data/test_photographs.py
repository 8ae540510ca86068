"""Every layout of photographs, in tiny folders; and what bad files get."""

import os
import struct
import warnings
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from glcan.data import available, load, load_pairs, photographs
from glcan.data.bicubic import shrink_pixels
from glcan.errors import ConfigError, DataError, UnknownName


@pytest.fixture(autouse=True)
def nowhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def write(tmp_path, draw):
    """Writes PNG files by their paths below `tmp_path`; sizes are (width, height)."""
    count = 0

    def make(*names, size=(40, 30), pixels=None):
        nonlocal count
        for name in names:
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(draw(count, size) if pixels is None else pixels).save(path)
            count += 1
        return tmp_path

    return make


def pixels(path):
    return torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1)


def names(some, split):
    return [os.path.basename(pair.name) for pair in some.pairs(split)]


def png16(path, values):
    """A PNG with 16 bits per channel, RGB; Pillow cannot write one."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    head = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], 16, 2, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    )


# ---------------------------------------------------------------- layouts


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_bundled_photographs_are_disjoint_and_large_enough(scale):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        some = load_pairs("photographs", scale=scale)
    assert (some.size("train"), some.size("test")) == (10, 3)
    assert not set(names(some, "train")) & set(names(some, "test"))
    for pair in some.pairs("test"):
        assert pair.high.shape == (3, pair.low.shape[1] * scale, pair.low.shape[2] * scale)
    low, high = next(iter(some.loader("train", 4)))
    assert (low.shape, high.shape) == ((4, 3, 48, 48), (4, 3, 48 * scale, 48 * scale))


def test_div2k_with_and_without_its_low_resolution_images(write):
    root = write(*(f"DIV2K_{split}_HR/{i:04}.png" for split in ("train", "valid") for i in (1, 2)))
    made = load_pairs("div2k", root=root, patch=8)
    assert names(made, "train") == names(made, "test") == ["0001.png", "0002.png"]
    assert torch.equal(made.pairs("train")[0].low, shrink_pixels(pixels(root / "DIV2K_train_HR/0001.png"), 2))
    root = write(*(f"DIV2K_train_LR_bicubic/X2/{i:04}x2.png" for i in (1, 2)), size=(20, 15))
    given = load_pairs("div2k", root=root, patch=8)
    assert torch.equal(given.pairs("train")[1].low, pixels(root / "DIV2K_train_LR_bicubic/X2/0002x2.png"))
    assert torch.equal(given.pairs("test")[1].low, made.pairs("test")[1].low)


def test_div2k_is_found_below_the_root_and_in_usual_places(write, tmp_path):
    write("data/DIV2K/DIV2K_train_HR/0001.png")
    assert load_pairs("div2k", patch=8).size("train") == 1
    assert load_pairs("div2k", root=tmp_path / "data", patch=8).size("train") == 1
    assert {info.name: info.found for info in available()}["div2k"] is not None


@pytest.mark.parametrize("held_out", ["test", "val"])
def test_photo_folder_with_train_and_test(write, held_out):
    root = write("p/train/a.png", "p/train/album/b.png", f"p/{held_out}/c.png", "p/train/.hidden/d.png")
    some = load_pairs("photofolder", root=root / "p", patch=8)
    assert (names(some, "train"), names(some, "test")) == (["a.png", "b.png"], ["c.png"])


def test_photo_folder_with_train_val_and_test(write):
    root = write("p/train/a.png", "p/train/b.png", "p/val/c.png", "p/test/d.png")
    some = load_pairs("photofolder", root=root / "p", patch=8)
    assert (names(some, "val"), names(some, "test")) == (["c.png"], ["d.png"])
    assert names(load_pairs("photofolder", root=root / "p", patch=8, val=1), "val")[0] in ("a.png", "b.png")


def test_flat_photo_folder_gives_a_fifth_for_test_whatever_the_seed_is(write):
    root = write(*(f"p/{i}.png" for i in range(10)))
    some = [load_pairs("photofolder", root=root / "p", patch=8, seed=seed) for seed in (0, 1)]
    assert [s.size("test") for s in some] == [2, 2]
    assert names(some[0], "test") == names(some[1], "test")
    assert len({*names(some[0], "train"), *names(some[0], "test")}) == 10


@pytest.mark.parametrize("place", ["Set5", "benchmark/Set5", "."])
def test_benchmark_with_both_resolutions(write, place):
    write(f"r/{place}/HR/baby.png", f"r/{place}/HR/bird.png", size=(31, 40))
    root = write(f"r/{place}/LR_bicubic/X3/babyx3.png", f"r/{place}/LR_bicubic/X3/birdx3.png", size=(10, 13))
    with pytest.warns(UserWarning, match="2 of 2 images have sizes that are no multiples of 3"):
        some = load_pairs("set5", scale=3, root=root / "r")
    assert names(some, "test") == ["baby.png", "bird.png"]
    assert some.size("train") == 0
    assert some.pairs("test")[0].high.shape == (3, 39, 30)


def test_flat_benchmark_and_its_other_names(write):
    root = write("r/BSD100/1.png")
    assert load_pairs("b100", root=root / "r").size("test") == 1
    assert load_pairs("benchmark", root=root / "r/BSD100").size("test") == 1
    with pytest.raises(DataError, match=r"'set14' is not there .*Set14/HR"):
        load_pairs("set14", root=root / "r")


def test_many_pixels_are_kept_in_a_file(write, monkeypatch):
    root = write("p/train/a.png", "p/train/b.png", "p/test/c.png")
    in_memory = load_pairs("photofolder", root=root / "p", patch=8)
    monkeypatch.setattr(photographs, "IN_MEMORY_BYTES", 0)
    mapped = load_pairs("photofolder", root=root / "p", patch=8)
    for one, other in zip(in_memory.pairs("train"), mapped.pairs("train"), strict=True):
        assert torch.equal(one.low, other.low)
        assert torch.equal(one.high, other.high)
    assert not list((root / "cache/glcan").iterdir())


# ---------------------------------------------------------------- bad files


def test_colour_modes_become_rgb(write, tmp_path, draw):
    folder = write("p/train/a.png") / "p/test"
    folder.mkdir()
    picture = Image.fromarray(draw(9))
    picture.convert("L").save(folder / "1-grey.png")
    picture.convert("P").save(folder / "2-palette.png")
    picture.convert("CMYK").save(folder / "3-cmyk.jpg", quality=95)
    picture.convert("RGBA").save(folder / "4-alpha.png")
    Image.fromarray(np.asarray(picture.convert("L")).astype(np.uint16) * 257).save(folder / "5-grey16.png")
    png16(folder / "6-rgb16.png", np.asarray(picture).astype(np.uint16) * 257)
    grey, palette, cmyk, alpha, grey16, rgb16 = (
        pair.high.int() for pair in load_pairs("photofolder", root=tmp_path / "p", patch=8).pairs("test")
    )
    exact = torch.tensor(np.asarray(picture)).permute(2, 0, 1).int()
    assert torch.equal(grey, grey16)
    assert torch.equal(grey[0], grey[2])
    assert torch.equal(alpha, exact)
    assert torch.equal(rgb16, exact)
    assert (cmyk - exact).abs().float().mean() < 6
    assert (palette - exact).abs().float().mean() < 20


def test_corrupt_file_is_named_or_skipped(write):
    root = write("p/train/a.png", "p/train/b.png", "p/test/c.png")
    (root / "p/train/b.png").write_bytes((root / "p/train/b.png").read_bytes()[:60])
    with pytest.raises(DataError, match=r"b\.png' cannot be read.*--skip-corrupt"):
        load_pairs("photofolder", root=root / "p", patch=8)
    with pytest.warns(UserWarning, match=r"1 of 3 images cannot be read.*b\.png"):
        some = load_pairs("photofolder", root=root / "p", patch=8, skip_corrupt=True)
    assert names(some, "train") == ["a.png"]


def test_nothing_but_corrupt_files_is_an_error(tmp_path):
    (tmp_path / "p").mkdir()
    for i in range(2):
        (tmp_path / f"p/{i}.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"None of the 2 images can be read.*empty or no image"):
        load_pairs("benchmark", root=tmp_path / "p", skip_corrupt=True)


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("LR_bicubic/X2/bx2.png", r"HR/b\.png' has no low-resolution partner.*bx2\.png nor b\.png"),
        ("HR/b.png", r"X2/bx2\.png' has no high-resolution partner"),
    ],
)
def test_image_without_a_partner_is_named(write, missing, message):
    write("p/HR/a.png", "p/HR/b.png")
    root = write("p/LR_bicubic/X2/ax2.png", "p/LR_bicubic/X2/bx2.png", size=(20, 15))
    os.remove(root / "p" / missing)
    with pytest.raises(DataError, match=message):
        load_pairs("benchmark", root=root / "p")


def test_partners_of_other_sizes_are_named(write):
    write("p/HR/a.png")
    root = write("p/LR_bicubic/X2/ax2.png", size=(10, 8))
    with pytest.raises(DataError, match=r"a\.png' is 40 x 30 .*must be 20 x 15, but it is 10 x 8"):
        load_pairs("benchmark", root=root / "p")


def test_small_photograph_is_named(write):
    root = write("p/train/a.png", "p/test/b.png")
    with pytest.raises(DataError, match=r"a\.png' is 40 x 30 pixels, smaller than a patch of 96"):
        load_pairs("photofolder", root=root / "p")


def test_empty_and_missing_folders_are_named(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"empty' holds no images"):
        load_pairs("benchmark", root=tmp_path / "empty")
    with pytest.raises(DataError, match=r"nowhere' .*does not exist"):
        load_pairs("photofolder", root=tmp_path / "nowhere")
    with pytest.raises(DataError, match="needs the folder"):
        load_pairs("photofolder")
    with pytest.raises(DataError, match=r"'div2k' is not there .*DIV2K_train_HR.zip"):
        load_pairs("div2k")


def test_train_folder_without_images_is_named(write):
    root = write("p/test/a.png")
    (root / "p/train").mkdir()
    with pytest.raises(DataError, match="train folder"):
        load_pairs("photofolder", root=root / "p")


def test_single_photograph_cannot_be_divided(write):
    root = write("p/a.png")
    with pytest.raises(DataError, match="holds one image"):
        load_pairs("photofolder", root=root / "p")


def test_names_of_other_tasks_and_unknown_ones():
    with pytest.raises(ConfigError, match="'cifar10' is for classification"):
        load_pairs("cifar10")
    with pytest.raises(ConfigError, match="'coco' is for detection"):
        load_pairs("coco")
    with pytest.raises(ConfigError, match="'div2k' is for super-resolution"):
        load("div2k")
    with pytest.raises(UnknownName, match="'div2k'"):
        load_pairs("div2")
    with pytest.raises(ConfigError, match="scale=5"):
        load_pairs("photographs", scale=5)


def test_data_sets_say_their_task():
    assert {info.task for info in available()} == {"classification", "super-resolution", "detection"}
    tasks = {info.name: info.task for info in available()}
    assert (tasks["div2k"], tasks["scenes"], tasks["digits"]) == ("super-resolution", "detection", "classification")
