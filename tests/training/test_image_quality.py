import math

import numpy as np
import pytest
import torch
from skimage.color import rgb2ycbcr
from skimage.metrics import peak_signal_noise_ratio
from torch import nn
from torchmetrics.functional.image import structural_similarity_index_measure

from glcan.data.bicubic import upsample
from glcan.data.super_resolution import Pair, PairData
from glcan.errors import ConfigError, DataError
from glcan.training.image_quality import evaluate_bicubic, evaluate_pairs, luma, psnr_y, quantized, ssim_y


def image(seed, size=(24, 30)):
    return torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(seed))


def numpy_luma(images, border):
    y = rgb2ycbcr(images[0].permute(1, 2, 0).double().numpy())[..., 0]
    return y[border:-border, border:-border]


def data(scale=2, sizes=((40, 44), (30, 36))):
    draw = torch.Generator().manual_seed(0)
    pairs = [
        Pair.of(f"{i}.png", torch.randint(256, (3, *size), generator=draw, dtype=torch.uint8), scale)
        for i, size in enumerate(sizes)
    ]
    return PairData("some", {"test": pairs}, scale=scale)


class Bicubic(nn.Module):
    def __init__(self, scale):
        super().__init__()
        self.scale = scale
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(self, x):
        assert not self.training
        return upsample(x, self.scale)


def test_luma_of_known_colours():
    colours = torch.tensor([[0, 0, 0], [1, 1, 1], [1, 0, 0], [0, 1, 0], [0, 0, 1]], dtype=torch.float64)
    y = luma(colours.T[None, :, :, None])[0, 0, :, 0]
    assert y.tolist() == pytest.approx([16, 235, 81.481, 144.553, 40.966])


def test_psnr_by_hand():
    """Every grey level 10 higher is 10 * 219 / 255 in luma, and only the border differs more."""
    one = torch.full((1, 3, 8, 8), 100 / 255)
    other = one + 10 / 255
    other[..., 0] = 1
    expected = 20 * math.log10(255 / (10 * 219 / 255))
    assert psnr_y(one, other, 1).tolist() == pytest.approx([expected], abs=1e-5)
    assert psnr_y(one, other, 0).item() < expected - 1


def test_equal_images_count_as_100_db():
    assert psnr_y(image(0), image(0), 2).tolist() == [100]


@pytest.mark.parametrize("border", [2, 3, 4])
def test_psnr_is_skimages_and_ssim_is_torchmetrics_without_its_border(border):
    one, other = quantized(image(0)), quantized(image(1) * 0.5 + 0.5 * image(0))
    y1, y2 = numpy_luma(one, border), numpy_luma(other, border)
    assert psnr_y(one, other, border).item() == pytest.approx(peak_signal_noise_ratio(y2, y1, data_range=255))
    maps = [torch.from_numpy(y)[None, None] for y in (y2, y1)]
    _, found = structural_similarity_index_measure(*maps, sigma=1.5, data_range=255.0, return_full_image=True)
    assert ssim_y(one, other, border).item() == pytest.approx(found[..., 5:-5, 5:-5].mean().item(), abs=1e-9)


def test_ssim_by_hand_in_its_only_window():
    """11 x 11 pixels have one window: Wang et al. 2004, equation 13, with Gaussian weights."""
    one, other = image(0, (11, 11)), image(1, (11, 11))
    x, y = (luma(i)[0, 0].numpy() for i in (one, other))
    g = np.exp(-((np.arange(11) - 5) ** 2) / (2 * 1.5**2))
    w = np.outer(g, g) / np.outer(g, g).sum()
    mx, my = (w * x).sum(), (w * y).sum()
    vx, vy, vxy = (w * x * x).sum() - mx**2, (w * y * y).sum() - my**2, (w * x * y).sum() - mx * my
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    expected = (2 * mx * my + c1) * (2 * vxy + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))
    assert ssim_y(one, other, 0).item() == pytest.approx(expected, abs=1e-9)
    assert ssim_y(one, one, 0).item() == pytest.approx(1)


def test_several_images_at_once():
    one, other = torch.cat([image(0), image(1)]), torch.cat([image(2), image(3)])
    for metric in (psnr_y, ssim_y):
        each = [metric(one[i : i + 1], other[i : i + 1], 2).item() for i in range(2)]
        assert metric(one, other, 2).tolist() == pytest.approx(each)


def test_rounding_is_to_8_bits():
    values = torch.tensor([-0.1, 0.49 / 255, 0.51 / 255, 1.2])
    assert quantized(values).tolist() == pytest.approx([0, 0, 1 / 255, 1])


def test_evaluation_averages_over_images_after_rounding():
    some = data()
    found = evaluate_pairs(Bicubic(2).train(), some)
    expected = {"psnr_y": 0.0, "ssim_y": 0.0, "loss": 0.0}
    for low, high in some.loader("test", 1):
        result = upsample(low, 2)
        expected["psnr_y"] += psnr_y(quantized(result), high, 2).item() / 2
        expected["ssim_y"] += ssim_y(quantized(result), high, 2).item() / 2
        expected["loss"] += (result - high).abs().mean().item() / 2
    assert found == pytest.approx(expected)
    assert evaluate_bicubic(some) == pytest.approx(expected)


def test_evaluation_leaves_the_training_mode_and_counts_images():
    model, seen = Bicubic(2).train(), []
    evaluate_pairs(model, data(), each_image=lambda: seen.append(1))
    assert model.training
    assert len(seen) == 2


def test_tiles_give_the_same_metrics():
    model = nn.Sequential(nn.Conv2d(3, 12, 3, padding=1), nn.PixelShuffle(2))
    some = data(sizes=((80, 120),))
    whole, tiled = evaluate_pairs(model, some), evaluate_pairs(model, some, tile=24, overlap=8)
    assert tiled == pytest.approx(whole, rel=1e-2)


def test_model_of_another_scale_is_refused():
    with pytest.raises(ConfigError, match="enlarges 3 times, but the images need 2 times"):
        evaluate_pairs(Bicubic(3), data())


def test_what_cannot_be_measured_is_named():
    with pytest.raises(DataError, match=r"0\.png' cannot be measured: 20 x 14 .*smaller than 15 x 15"):
        evaluate_bicubic(data(sizes=((14, 20),)))
    with pytest.raises(DataError, match="no images in its 'val' split"):
        evaluate_bicubic(data(), "val")
    with pytest.raises(DataError, match="cannot be compared"):
        psnr_y(image(0), image(0)[:, :1], 2)
