import itertools

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from glcan.data.bicubic import upsample
from glcan.errors import ConfigError, DataError
from glcan.models.edsr import EDSR
from glcan.training.upscaling import LEAST, open_picture, starts, upscale, upscale_picture, weights

REACH = 6  # of one EDSR block: head 1, block 2, body 1, tail 1, last convolution 1/s


@pytest.fixture
def edsr():
    torch.manual_seed(0)
    return EDSR(blocks=1, channels=4, scale=2)


class Nearest(nn.Module):
    def __init__(self, scale=2):
        super().__init__()
        self.scale = scale
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(self, x):
        return x.repeat_interleave(self.scale, 2).repeat_interleave(self.scale, 3)


class Vandal(Nearest):
    def forward(self, x):
        x *= 0.5
        return super().forward(x)


def alone(size, tile, overlap, scale):
    """Where one tile alone covers an enlarged row of pixels."""
    first = starts(size, min(tile, size), overlap)
    covered = torch.zeros(size * scale)
    for start in first:
        covered[start * scale : (start + tile) * scale] += 1
    return covered == 1


@pytest.mark.parametrize(
    ("size", "tile", "overlap"), [(50, 20, 6), (50, 20, 10), (21, 20, 0), (40, 20, 0), (97, 30, 7)]
)
def test_tiles_cover_everything_and_overlap_enough(size, tile, overlap):
    first = starts(size, tile, overlap)
    assert first[0] == 0
    assert first[-1] + tile == size
    assert all(one + tile - other >= overlap for one, other in itertools.pairwise(first))
    total = torch.zeros(size * 3)
    for start, own in zip(first, weights(first, tile, 3), strict=True):
        total[start * 3 : (start + tile) * 3] += own
    assert torch.allclose(total, torch.ones(()))


def test_weight_goes_over_in_a_straight_line():
    left, right = weights([0, 6], 10, 1)
    assert left.tolist() == pytest.approx([1] * 6 + [1, 0.75, 0.25, 0])
    assert right.tolist() == pytest.approx([0, 0.25, 0.75, 1] + [1] * 6)


@pytest.mark.parametrize("size", [(50, 37), (24, 61), (20, 24), (19, 90)])
def test_tiled_result_is_the_whole_one(edsr, size):
    """To the bit in double precision, whose convolutions do not depend on the size; in single, to the last bit."""
    image = torch.rand(1, 3, *size)
    rows, columns = (alone(side, 24, 2 * REACH, 2) for side in size)
    mask = rows[:, None] & columns
    assert mask.any()
    for kind, tolerance in ((torch.float32, 1e-6), (torch.float64, 0)):
        edsr, image = edsr.to(kind), image.to(kind)
        whole = upscale(edsr, image)
        tiled = upscale(edsr, image, tile=24, overlap=2 * REACH)
        assert torch.allclose(tiled[..., mask], whole[..., mask], atol=tolerance, rtol=0)
        assert (tiled - whole).abs().max() < 0.01  # in the overlaps


def test_four_times_the_reach_of_overlap_leaves_no_trace(edsr):
    image = torch.rand(1, 3, 70, 60)
    whole = upscale(edsr, image)
    assert torch.allclose(upscale(edsr, image, tile=50, overlap=4 * REACH), whole, atol=1e-6)


def test_without_enough_overlap_the_transition_is_smooth():
    """A model that knows only its tile's mean: hard edges would show as steps."""

    class Mean(Nearest):
        def forward(self, x):
            return super().forward(x.mean((2, 3), keepdim=True).expand_as(x))

    ramp = torch.linspace(0, 1, 64).expand(1, 3, 20, 64)
    hard, soft = (upscale(Mean(), ramp, tile=24, overlap=overlap)[0, 0, 0].diff().abs().max() for overlap in (0, 12))
    assert soft < hard / 1.5


def test_whole_images_go_through_the_model_as_they_are(edsr):
    image = torch.rand(2, 3, 20, 30)
    with torch.no_grad():
        assert torch.equal(upscale(edsr, image), edsr.eval()(image))
        assert torch.equal(upscale(edsr, image, tile=30), edsr(image))


@pytest.mark.parametrize("size", [(1, 1), (3, 40), (16, 5)])
def test_small_images_keep_their_size(size):
    image = torch.rand(1, 3, *size)
    assert torch.equal(upscale(Nearest(3), image), Nearest(3)(image))


def test_windowed_models_take_any_size():
    from glcan.models import create

    model = create("spandrel/SwinIR-light", scale=2, depths=(1,), num_heads=(2,), embed_dim=8)
    for size in ((1, 1), (9, 21), (17, 17)):
        assert upscale(model, torch.rand(1, 3, *size)).shape == (1, 3, 2 * size[0], 2 * size[1])


def test_model_and_images_are_left_as_they_were(edsr):
    image = torch.rand(1, 3, 20, 20)
    before = image.clone()
    upscale(Vandal(), image)
    assert torch.equal(image, before)
    assert edsr.train().training
    result = upscale(edsr, image)
    assert edsr.training
    assert not result.requires_grad


def test_autocast_gives_floats(edsr):
    image = torch.rand(1, 3, 20, 20)
    low = upscale(edsr, image, autocast=torch.bfloat16)
    assert low.dtype == torch.float32
    assert not torch.equal(low, upscale(edsr, image))


def test_every_tile_is_counted(edsr):
    seen = []
    upscale(edsr, torch.rand(1, 3, 50, 20), tile=20, overlap=5, each_tile=lambda: seen.append(1))
    assert len(seen) == 3


@pytest.mark.parametrize("bad", [{"tile": LEAST - 1}, {"tile": 20, "overlap": 11}, {"tile": 20, "overlap": -1}])
def test_tiles_out_of_range_are_refused(edsr, bad):
    with pytest.raises(ConfigError, match="pixels: it must"):
        upscale(edsr, torch.rand(1, 3, 20, 20), **bad)


def test_models_that_do_not_enlarge_are_refused():
    with pytest.raises(ConfigError, match=r"makes \[1, 7\]"):
        upscale(nn.Sequential(nn.Flatten(), nn.Linear(1200, 7)), torch.rand(1, 3, 20, 20))
    with pytest.raises(ConfigError, match="one whole factor"):
        upscale(nn.AvgPool2d(2), torch.rand(1, 3, 20, 20))
    with pytest.raises(ConfigError, match="enlarges 3 times, but the images need 2"):
        upscale(Nearest(3), torch.rand(1, 3, 20, 20), scale=2)


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA"])
def test_pictures_keep_their_mode(mode):
    bands = len(Image.new(mode, (1, 1)).getbands())
    pixels = np.random.default_rng(0).integers(0, 256, (19, 23, bands), dtype=np.uint8).squeeze()
    picture = Image.fromarray(pixels)
    assert picture.mode == mode
    result = upscale_picture(Nearest(3), picture)
    assert (result.mode, result.size) == (mode, (69, 57))
    colours = np.asarray(picture.convert("RGB")).repeat(3, 0).repeat(3, 1)
    assert np.array_equal(np.asarray(result.convert("RGB")), colours)
    if "A" in mode:
        alpha = torch.tensor(np.asarray(picture.getchannel("A")))[None] / 255
        expected = (upsample(alpha, 3).clamp(0, 1) * 255).round().to(torch.uint8)[0]
        assert np.array_equal(np.asarray(result.getchannel("A")), expected.numpy())


def test_grey_goes_through_the_model_as_rgb(edsr):
    grey = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 20), dtype=np.uint8))
    assert upscale_picture(edsr, grey).tobytes() == upscale_picture(edsr, grey.convert("RGB")).convert("L").tobytes()


def test_pictures_of_other_modes_are_refused(edsr):
    with pytest.raises(ConfigError, match="mode 'CMYK'"):
        upscale_picture(edsr, Image.new("CMYK", (20, 20)))


@pytest.mark.parametrize(
    ("mode", "suffix", "expected"),
    [
        ("1", "png", "L"),
        ("L", "png", "L"),
        ("LA", "png", "LA"),
        ("P", "png", "RGB"),
        ("I;16", "png", "L"),
        ("RGB", "jpg", "RGB"),
        ("RGBA", "png", "RGBA"),
        ("CMYK", "jpg", "RGB"),
    ],
)
def test_files_open_in_a_mode_that_keeps_colours_and_alpha(tmp_path, mode, suffix, expected):
    Image.new(mode, (5, 4)).save(tmp_path / f"a.{suffix}")
    assert open_picture(tmp_path / f"a.{suffix}").mode == expected


def test_transparent_palette_becomes_alpha(tmp_path):
    Image.new("P", (5, 4)).save(tmp_path / "a.png", transparency=0)
    assert open_picture(tmp_path / "a.png").mode == "RGBA"


def test_missing_picture_is_named(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        open_picture(tmp_path / "a.png")
