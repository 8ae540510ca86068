import json

import numpy as np
import pytest
import torch
from PIL import Image

from glcan.data import load, read_image, read_images
from glcan.data.preprocessing import Preprocessing, fault, open_image
from glcan.errors import DataError

RGB = Preprocessing(channels=3, resize=8, crop=8, mean=(0.0,) * 3, std=(1.0,) * 3, size=8)


def as_sixteen_bits(picture):
    return Image.fromarray(np.asarray(picture.convert("L")).astype(np.uint16) * 257)


def as_thirty_two_bits(picture):
    return Image.fromarray(np.asarray(picture.convert("L")).astype(np.int32) * 257)


def with_transparent_palette(picture):
    picture = picture.quantize(64)
    picture.info["transparency"] = bytes(range(64))
    return picture


@pytest.mark.parametrize(
    ("convert", "suffix"),
    [
        (lambda p: p.convert("L"), ".png"),
        (lambda p: p.convert("LA"), ".png"),
        (lambda p: p.convert("RGBA"), ".png"),
        (lambda p: p.quantize(64), ".png"),
        (with_transparent_palette, ".png"),
        (lambda p: p.convert("1"), ".png"),
        (lambda p: p.convert("CMYK"), ".jpg"),
        (lambda p: p.convert("L"), ".jpg"),
        (as_sixteen_bits, ".png"),
        (as_sixteen_bits, ".tiff"),
        (as_thirty_two_bits, ".tiff"),
        (lambda p: p, ".webp"),
    ],
)
@pytest.mark.parametrize("channels", [1, 3])
def test_every_colour_mode_becomes_grey_or_rgb(tmp_path, draw, convert, suffix, channels):
    picture = Image.fromarray(draw())
    path = tmp_path / f"picture{suffix}"
    convert(picture).save(path)
    opened = open_image(path, channels)
    assert opened.mode == {1: "L", 3: "RGB"}[channels]
    assert fault(path) is None
    difference = np.asarray(opened.convert("L"), dtype=float) - np.asarray(picture.convert("L"))
    dithered = convert(picture).mode == "1"
    assert abs(difference.mean()) < 12
    assert dithered or np.abs(difference).mean() < 12


def test_sixteen_bits_are_scaled_not_cut_off(tmp_path, draw):
    path = tmp_path / "sixteen.png"
    picture = Image.fromarray(draw()).convert("L")
    as_sixteen_bits(picture).save(path)
    assert np.array_equal(np.asarray(open_image(path, 1)), np.asarray(picture))


def test_exif_orientation_is_followed(tmp_path, draw):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(draw(size=(40, 30))).save(tmp_path / "turned.jpg", exif=exif)
    assert open_image(tmp_path / "turned.jpg", 3).size == (30, 40)


def test_shorter_side_is_resized_and_the_centre_cut_out():
    pixels = np.zeros((4, 12, 3), dtype=np.uint8)
    pixels[:, 4:8] = 255
    preprocessing = Preprocessing(3, 4, 4, (0.5,) * 3, (0.5,) * 3, 4)
    assert torch.equal(preprocessing(Image.fromarray(pixels)), torch.ones(3, 4, 4))


@pytest.mark.parametrize("size", [None, 16, 24])
def test_image_file_gives_the_very_tensor_of_the_test_loader(tmp_path, size):
    data = load("digits", image_size=size)
    images, _ = next(iter(data.loader("test", 7)))
    mean, std = data.preprocessing()["mean"][0], data.preprocessing()["std"][0]
    native = next(iter(load("digits", image_size=8).loader("test", 7)))[0]
    for index, image in enumerate(native):
        pixels = (image[0] * std + mean).mul(255).round().to(torch.uint8).numpy()
        Image.fromarray(pixels).save(tmp_path / f"{index}.png")
    stored = json.loads(json.dumps(data.preprocessing()))
    assert torch.equal(read_images([tmp_path / f"{index}.png" for index in range(7)], stored), images)


def test_image_of_a_folder_gives_the_tensor_of_the_test_loader(tree):
    root = tree({"train/a": 2, "train/b": 2, "test/a": 1, "test/b": 1}, suffix=".jpg")
    data = load("imagefolder", root=root, image_size=16)
    images, _ = next(iter(data.loader("test", 2)))
    assert torch.equal(read_image(root / "test/a/0.jpg", data.preprocessing()), images[0])


def test_dict_round_trip():
    assert Preprocessing.from_dict(json.loads(json.dumps(RGB.as_dict()))) == RGB


@pytest.mark.parametrize("change", [{"mean": None}, {"colour": 1}])
def test_preprocessing_with_other_keys_is_refused(tmp_path, change):
    values = RGB.as_dict() | change
    if change == {"mean": None}:
        del values["mean"]
    with pytest.raises(DataError, match="exactly"):
        read_image(tmp_path / "any.png", values)


def test_missing_file_folder_text_and_nothing(tmp_path):
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "empty.png").touch()
    for name, reason in (
        ("none.png", "no such file"),
        (".", "folder"),
        ("text.png", "empty or no"),
        ("empty.png", "empty"),
    ):
        with pytest.raises(DataError, match=reason):
            read_image(tmp_path / name, RGB)
    with pytest.raises(DataError, match="at least one"):
        read_images([], RGB)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".bmp", ".webp", ".tiff"])
def test_truncated_files_are_found(tmp_path, draw, suffix):
    path = tmp_path / f"picture{suffix}"
    Image.fromarray(draw(size=(400, 300))).save(path)
    assert fault(path) is None
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * 2 // 3])
    assert fault(path)
    with pytest.raises(DataError, match=rf"picture\{suffix}"):
        open_image(path, 3)


def test_damaged_png_is_found(tmp_path, draw):
    path = tmp_path / "picture.png"
    Image.fromarray(draw()).save(path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)
    assert fault(path)


def test_floating_point_pixels_are_refused(tmp_path):
    path = tmp_path / "float.tiff"
    Image.fromarray(np.random.default_rng(0).random((8, 8), dtype=np.float32)).save(path)
    assert "floating-point" in fault(path)
    with pytest.raises(DataError, match="floating-point"):
        open_image(path, 3)
