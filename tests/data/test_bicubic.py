import math

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from glcan.data.bicubic import downsample, shrink_pixels, upsample
from glcan.errors import DataError

# Keys' kernel (a = -0.5) at the distances 1/4, 3/4, 5/4, 7/4: 1.5x^3 - 2.5x^2 + 1, and -0.5x^3 + 2.5x^2 - 4x + 2.
QUARTERS = (0.8671875, 0.2265625, -0.0703125, -0.0234375)


def imresize(row, scale):
    """MATLAB's imresize of one row, from its source: function `contributions`, antialiased, borders mirrored."""

    def cubic(x):
        x = np.abs(x)
        near = 1.5 * x**3 - 2.5 * x**2 + 1
        far = -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
        return near * (x <= 1) + far * ((x > 1) & (x <= 2))

    width, kernel = (4 / scale, lambda x: scale * cubic(scale * x)) if scale < 1 else (4, cubic)
    size = len(row)
    x = np.arange(1, math.ceil(size * scale) + 1)
    u = x / scale + 0.5 * (1 - 1 / scale)
    left = np.floor(u - width / 2)
    indices = left[:, None] + np.arange(math.ceil(width) + 2)
    weights = kernel(u[:, None] - indices)
    weights /= weights.sum(1, keepdims=True)
    mirrored = np.concatenate([np.arange(size), np.arange(size)[::-1]])
    return (weights * row[mirrored[(indices.astype(int) - 1) % (2 * size)]]).sum(1)


def matlab(image, scale):
    rows = np.stack([imresize(row, scale) for row in image])
    return np.stack([imresize(column, scale) for column in rows.T]).T


def test_shrinking_an_impulse_gives_half_the_kernel_at_its_distances():
    row = torch.zeros(1, 2, 32, dtype=torch.float64)
    row[..., 16] = 1  # outputs 6 ... 9 lie at 12.5, 14.5, 16.5 and 18.5
    out = downsample(row, 2)[0, 0]
    assert out[6:10].tolist() == pytest.approx([0.5 * QUARTERS[i] for i in (3, 1, 0, 2)])
    assert not out[:6].any()


def test_enlarging_an_impulse_gives_the_kernel():
    row = torch.zeros(1, 1, 9, dtype=torch.float64)
    row[..., 4] = 1
    out = upsample(row, 2)[0, 0]
    assert out[5:13].tolist() == pytest.approx([*QUARTERS[::-1], *QUARTERS])
    assert not out[:5].any()


def test_shrinking_a_step_by_hand():
    step = torch.cat([torch.zeros(8), torch.ones(8)]).to(torch.float64).expand(1, 2, 16)
    out = downsample(step, 2)[0, 0]
    before = 0.5 * (QUARTERS[1] + QUARTERS[2] + QUARTERS[3])
    assert out[3].item() == pytest.approx(before)
    assert out[4].item() == pytest.approx(1 - before)
    assert out[2].item() == pytest.approx(0.5 * QUARTERS[3])


@pytest.mark.parametrize("scale", [2, 3, 4])
@pytest.mark.parametrize("size", [(1, 1), (2, 5), (11, 7)])
def test_both_directions_are_matlabs_imresize(scale, size):
    low = np.random.default_rng(0).random(size)
    up = upsample(torch.from_numpy(low)[None], scale)[0].numpy()
    np.testing.assert_allclose(up, matlab(low, scale), atol=1e-12)
    high = np.random.default_rng(1).random((size[0] * scale, size[1] * scale))
    down = downsample(torch.from_numpy(high)[None], scale)[0].numpy()
    np.testing.assert_allclose(down, matlab(high, 1 / scale), atol=1e-12)


def test_constants_stay_and_ramps_stay_ramps_inside():
    assert torch.allclose(upsample(torch.full((2, 3, 5, 4), 0.3), 3), torch.tensor(0.3))
    ramp = torch.arange(40, dtype=torch.float64).expand(1, 4, 40)
    down = downsample(ramp, 4)[0, 0]
    assert down[2:-2].diff().tolist() == pytest.approx([4.0] * 5)
    assert down[4].item() == pytest.approx(17.5)


def test_pixels_are_rounded_to_the_nearest_level_and_kept_in_range():
    checks = torch.zeros(3, 8, 8, dtype=torch.uint8)
    checks[:, :, 4:] = 255
    exact = downsample(checks.to(torch.float64), 2)
    pixels = shrink_pixels(checks, 2)
    assert exact.min() < 0
    assert exact.max() > 255
    assert torch.equal(pixels.to(torch.float64), exact.clamp(0, 255).round())


def test_float32_agrees_with_float64():
    image = torch.rand(2, 3, 24, 36)
    assert torch.allclose(downsample(image, 3).double(), downsample(image.double(), 3), atol=1e-6)


def test_gradients_and_fake_tensors_pass():
    image = torch.rand(1, 3, 6, 6, requires_grad=True)
    upsample(image, 2).sum().backward()
    assert image.grad.sum().item() == pytest.approx(3 * 144, rel=1e-5)
    with FakeTensorMode():
        assert upsample(torch.rand(2, 3, 6, 5), 4).shape == (2, 3, 24, 20)


def test_size_that_is_no_multiple_is_refused():
    with pytest.raises(DataError, match=r"7 x 6 .*multiples of 2.*6 x 6"):
        downsample(torch.rand(3, 6, 7), 2)
