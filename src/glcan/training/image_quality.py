"""How close enlarged images are to the true ones, as the super-resolution literature reports it.

PSNR and SSIM of the luma (Y of BT.601, 16 ... 235 as MATLAB's ``rgb2ycbcr``, not rounded), on images that were rounded
to 8 bits, without a border of s pixels, averaged over images. SSIM (Wang et al. 2004, IEEE Transactions on Image
Processing 13(4)) has a Gaussian window of 11 x 11 with sigma 1.5, K1 = 0.01, K2 = 0.03, and counts the places where all
of the window lies in the image.

Shapes: B batch, H height, W width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from glcan.data.bicubic import upsample
from glcan.errors import DataError
from glcan.training.upscaling import upscale

if TYPE_CHECKING:
    from glcan.data import PairData

WINDOW = 11
MOST_DB = 100.0  # of equal images, whose ratio is infinite


def quantized(images: Tensor) -> Tensor:
    """Images with values about 0..1, rounded to the 256 levels of 8-bit pixels and cut off at 0 and 1."""
    return images.clamp(0, 1).mul(255).round_().div_(255)


def luma(images: Tensor) -> Tensor:
    """Y of RGB images [B, 3, H, W] in 0..1: float64 [B, 1, H, W] in 16 ... 235 (ITU-R BT.601, as ``rgb2ycbcr``)."""
    weights = torch.tensor([65.481, 128.553, 24.966], dtype=torch.float64, device=images.device)
    return (images.to(torch.float64) * weights[:, None, None]).sum(1, keepdim=True) + 16


def psnr_y(images: Tensor, truth: Tensor, border: int) -> Tensor:
    """Peak signal-to-noise ratio of the luma in dB, peak 255, at most 100: RGB [B, 3, H, W] in 0..1 to float64 [B].

    Args:
        images, truth: to compare; already rounded where that is wanted.
        border: pixels left out on every side; the field takes the scale.

    Raises:
        DataError: nothing is left inside the border.
    """
    from torchmetrics.functional.image import peak_signal_noise_ratio

    inside = _inside(images, truth, border, 1)
    found = peak_signal_noise_ratio(*inside, data_range=255.0, dim=(1, 2, 3), reduction="none")
    return found.clamp(max=MOST_DB)


def ssim_y(images: Tensor, truth: Tensor, border: int) -> Tensor:
    """Structural similarity of the luma: RGB [B, 3, H, W] in 0..1 to float64 [B]; see `psnr_y`. Computed on the CPU."""
    # torchmetrics' takes thirty times as long on a CPU, and 14 GB for an image of 2000 pixels.
    from skimage.metrics import structural_similarity

    one, other = (image[:, 0].cpu().numpy() for image in _inside(images, truth, border, WINDOW))
    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 255.0}
    return torch.tensor([structural_similarity(x, y, **options) for x, y in zip(one, other, strict=True)]).double()


def evaluate_pairs(
    model: nn.Module,
    data: PairData,
    split: str = "test",
    *,
    autocast: torch.dtype | None = None,
    channels_last: bool = False,
    tile: int | None = None,
    overlap: int | None = None,
    each_image: Callable[[], object] | None = None,
) -> dict[str, float]:
    """Metrics of a super-resolution model, in evaluation mode, on the device where the model is.

    The model's training mode is left as it was.

    Args:
        model: images [1, 3, h, w] in 0..1 to [1, 3, s*h, s*w].
        data: a data set with at least one image in ``split``.
        split: "train", "val" or "test"; whole images, also of "train".
        autocast: None, or the type of the autocast arithmetic.
        channels_last: whether images are given in the layout NHWC.
        tile, overlap: see `upscale`; by default whole images go through the model.
        each_image: called after each image.

    Returns:
        ``psnr_y`` in dB and ``ssim_y``, means over images; ``loss``, the mean absolute difference of pixels in 0..1,
        before rounding.

    Raises:
        DataError: the split is empty, or an image is too small for the metrics.
        ConfigError: the model does not enlarge by the scale of the data.
    """
    device = next(model.parameters()).device

    def enlarge(low: Tensor) -> Tensor:
        images = low.to(device, memory_format=torch.channels_last if channels_last else torch.contiguous_format)
        return upscale(model, images, tile=tile, overlap=overlap, autocast=autocast, scale=data.scale)

    return _evaluate(enlarge, data, split, each_image)


_KNOWN: WeakKeyDictionary[PairData, dict[str, dict[str, float]]] = WeakKeyDictionary()


def bicubic_of(data: PairData, split: str) -> dict[str, float]:
    """`evaluate_bicubic`, computed once for a data set and a split."""
    known = _KNOWN.setdefault(data, {})
    if split not in known:
        known[split] = evaluate_bicubic(data, split)
    return known[split]


def evaluate_bicubic(data: PairData, split: str = "test") -> dict[str, float]:
    """What `evaluate_pairs` gives for bicubic enlargement as MATLAB's imresize does it: the least to be expected."""
    return _evaluate(lambda low: upsample(low, data.scale), data, split, None)


def _evaluate(
    enlarge: Callable[[Tensor], Tensor], data: PairData, split: str, each_image: Callable[[], object] | None
) -> dict[str, float]:
    if data.size(split) == 0:
        raise DataError(f"Data set {data.name!r} has no images in its {split!r} split. Choose another --split.")
    sums = {"psnr_y": 0.0, "ssim_y": 0.0, "loss": 0.0}
    pairs = data.pairs(split)
    for pair in pairs:
        high = pair.high[None].to(torch.float32).div_(255)
        result = enlarge(pair.low[None].to(torch.float32).div_(255))
        high = high.to(result.device)
        rounded = quantized(result)
        try:
            sums["psnr_y"] += float(psnr_y(rounded, high, data.scale))
            sums["ssim_y"] += float(ssim_y(rounded, high, data.scale))
        except DataError as error:
            raise DataError(f"The image {pair.name!r} cannot be measured: {error}") from None
        sums["loss"] += float((result - high).abs().mean())
        if each_image is not None:
            each_image()
    return {name: total / len(pairs) for name, total in sums.items()}


def _inside(images: Tensor, truth: Tensor, border: int, least: int) -> tuple[Tensor, Tensor]:
    """The luma of both without the border."""
    if images.shape != truth.shape or images.ndim != 4 or images.shape[1] != 3:
        raise DataError(
            f"Images {list(images.shape)} and truth {list(truth.shape)} cannot be compared; both must be "
            "[B, 3, H, W] of one size."
        )
    height, width = (side - 2 * border for side in images.shape[-2:])
    if min(height, width) < least:
        raise DataError(
            f"{images.shape[-1]} x {images.shape[-2]} pixels without a border of {border} are less than "
            f"{least} x {least}. Leave out images smaller than {least + 2 * border} x {least + 2 * border}."
        )
    part = (..., slice(border, border + height), slice(border, border + width))
    return luma(images)[part], luma(truth)[part]
