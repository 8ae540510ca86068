import pytest
import torch

from glcan.data.bicubic import upsample
from glcan.errors import DataError
from glcan.report.crops import busiest, side_by_side
from glcan.training.image_quality import psnr_y, quantized


def test_figure_has_the_same_square_of_each_with_its_psnr(tmp_path):
    low, truth = torch.rand(3, 20, 24), quantized(torch.rand(3, 40, 48))
    result = quantized(truth * 0.9)
    figure = side_by_side(low, result, truth, size=16, place=(3, 5))
    bicubic = quantized(upsample(low, 2))
    titles = [axes.get_title() for axes in figure.axes]
    assert titles[0] == f"bicubic, {psnr_y(bicubic[None], truth[None], 2).item():.2f} dB"
    assert titles[1].startswith("result, ")
    assert titles[2] == "truth"
    for axes, image in zip(figure.axes, (bicubic, result, truth), strict=True):
        shown = torch.tensor(axes.images[0].get_array())
        assert torch.allclose(shown.permute(2, 0, 1).float(), image[:, 3:19, 5:21], atol=1e-6)
    figure.savefig(tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 0


def test_without_truth_there_are_two_and_no_numbers():
    figure = side_by_side(torch.rand(3, 5, 6), torch.rand(3, 15, 18))
    assert [axes.get_title() for axes in figure.axes] == ["bicubic", "result"]


def test_the_square_is_where_the_difference_is():
    difference = torch.zeros(3, 40, 60)
    difference[:, 20:30, 40:50] = -1
    top, left = busiest(difference, 12)
    assert top <= 20
    assert top + 12 >= 30
    assert left <= 40
    assert left + 12 >= 50


def test_what_does_not_fit_is_refused():
    with pytest.raises(DataError, match="do not belong together"):
        side_by_side(torch.rand(3, 5, 6), torch.rand(3, 15, 19))
    with pytest.raises(DataError, match="do not belong together"):
        side_by_side(torch.rand(3, 5, 6), torch.rand(3, 15, 18), torch.rand(3, 10, 12))
    with pytest.raises(DataError, match="not inside the image"):
        side_by_side(torch.rand(3, 20, 20), torch.rand(3, 40, 40), size=16, place=(30, 0))
