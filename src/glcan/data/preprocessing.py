"""From an image to what the model gets: the one way for data sets, evaluation and prediction.

Shapes: B batch, C channels, H height, W width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from glcan.errors import DataError


@dataclass(frozen=True)
class Preprocessing:
    """How an image becomes a tensor, in this order.

    Attributes:
        channels: 1 (grey) or 3 (RGB).
        resize: pixels of the shorter side after the first resize (bilinear, antialiased, on 8-bit pixels).
        crop: pixels of the side of the square that is then cut out of the centre.
        mean: per channel, of pixels in 0..1.
        std: per channel, of pixels in 0..1; pixels become (pixel / 255 - mean) / std.
        size: H = W that the model gets; where it is not `crop`, the normalised tensor is interpolated (bilinear).
    """

    channels: int
    resize: int
    crop: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    size: int

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Preprocessing:
        """The inverse of `as_dict`, also after a trip through JSON. DataError when a key is missing or unknown."""
        keys = {field.name for field in dataclasses.fields(cls)}
        if values.keys() != keys:
            raise DataError(
                f"The preprocessing has the keys {sorted(values)}; it must have exactly {sorted(keys)}, "
                "as ImageData.preprocessing() gives them."
            )
        plain: dict[str, Any] = {k: tuple(v) if isinstance(v, list | tuple) else v for k, v in values.items()}
        return cls(**plain)

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers and lists, for JSON."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}

    def __call__(self, image: Image.Image) -> Tensor:
        """An 8-bit image of any size in the mode for `channels` -> float32 [C, size, size]."""
        from torchvision.transforms.v2 import functional as F

        if min(image.size) != self.resize:
            image = F.resize(image, [self.resize], antialias=True)
        if image.size != (self.crop, self.crop):
            image = F.center_crop(image, [self.crop, self.crop])
        return self.normalise(F.pil_to_tensor(image)[None])[0]

    def normalise(self, pixels: Tensor) -> Tensor:
        """uint8 [B, C, crop, crop] -> float32 [B, C, size, size], on the device of `pixels`."""
        mean = torch.tensor(self.mean, dtype=torch.float32, device=pixels.device).mul_(255)[:, None, None]
        scale = torch.tensor(self.std, dtype=torch.float32, device=pixels.device).mul_(255).reciprocal_()[:, None, None]
        images = pixels.to(torch.float32).sub_(mean).mul_(scale)
        if images.shape[-1] != self.size:
            images = torch.nn.functional.interpolate(images, (self.size, self.size), mode="bilinear", antialias=True)
        return images


def open_image(path: str | Path, channels: int | None) -> Image.Image:
    """Opens an image file as 8-bit grey (`channels` 1) or RGB (3), turned as its EXIF orientation says.

    Grey, RGBA (alpha dropped), palette, CMYK and 16-bit images are converted. With `channels` None, grey stays grey and
    alpha stays: the mode is L, LA, RGB or RGBA.

    Raises:
        DataError: the file is missing, no image, truncated, or has floating-point pixels.
    """
    try:
        with Image.open(path) as image:
            ImageOps.exif_transpose(image, in_place=True)
            return _converted(image, _own_mode(image) if channels is None else "L" if channels == 1 else "RGB")
    except Exception as error:  # Pillow's readers raise nearly anything on damaged files
        raise DataError(f"The image {str(path)!r} cannot be read: {_reason(error)}.") from error


def read_pixels(path: str | Path, size: tuple[int, int] | None = None) -> Tensor:
    """An image file as uint8 [3, H, W]: grey, palette, RGBA (alpha dropped), CMYK and 16-bit images become RGB.

    Args:
        path: an image file.
        size: (H, W) of its annotations: boxes may be given for the pixels as stored, or as the EXIF orientation turns
            them. By default turned.

    Raises:
        DataError: the file is missing, no image, truncated, or of another size.
    """
    from torchvision.transforms.v2 import functional as F

    try:
        with Image.open(path) as image:
            if size is None or image.size[::-1] != size:
                ImageOps.exif_transpose(image, in_place=True)
            pixels = F.pil_to_tensor(_converted(image, "RGB"))
    except Exception as error:  # Pillow's readers raise nearly anything on damaged files
        raise DataError(f"The image {str(path)!r} cannot be read: {_reason(error)}.") from error
    if size is not None and tuple(pixels.shape[1:]) != size:
        raise DataError(f"The image {str(path)!r} cannot be used: {sizes_differ(tuple(pixels.shape[1:]), size)}.")
    return pixels


def sizes_differ(found: tuple[int, ...], noted: tuple[int, ...]) -> str:
    """Why an image of one (H, W) is not to be used with annotations for another."""
    return (
        f"it has {found[1]} x {found[0]} pixels, but its annotations say {noted[1]} x {noted[0]}: its boxes would be "
        "misplaced"
    )


def fault(path: str | Path) -> str | None:
    """What is wrong with an image file, None if nothing: reads all of it, decodes JPEG at reduced size for speed."""
    try:
        with Image.open(path) as image:
            image.verify()
        with Image.open(path) as image:
            image.draft("RGB", (1, 1))
            image.getexif()
            image.load()
            if image.mode == "F":
                return "its pixels are floating-point numbers of unknown range"
    except Exception as error:  # Pillow's readers raise nearly anything on damaged files
        return _reason(error)
    return None


def read_image(path: str | Path, preprocessing: Preprocessing | Mapping[str, Any]) -> Tensor:
    """An image file as the model got its images in evaluation: float32 [C, size, size].

    Args:
        path: an image file of any size and colour mode that Pillow reads.
        preprocessing: what `ImageData.preprocessing()` gave, also after a trip through JSON.

    Raises:
        DataError: the file cannot be read, or the preprocessing is none.
    """
    if not isinstance(preprocessing, Preprocessing):
        preprocessing = Preprocessing.from_dict(preprocessing)
    return preprocessing(open_image(path, preprocessing.channels))


def read_images(paths: Sequence[str | Path], preprocessing: Preprocessing | Mapping[str, Any]) -> Tensor:
    """Image files as one batch, float32 [B, C, size, size]; see `read_image`. DataError also when there are none."""
    if not paths:
        raise DataError("No image files were given; at least one is needed.")
    return torch.stack([read_image(path, preprocessing) for path in paths])


def _own_mode(image: Image.Image) -> str:
    """The 8-bit mode that keeps an image's colours and transparency."""
    grey = image.mode in ("1", "L", "LA", "La", "I") or image.mode.startswith("I;16")
    alpha = "A" in image.getbands() or "a" in image.getbands() or "transparency" in image.info
    return ("L" if grey else "RGB") + ("A" if alpha else "")


def _converted(image: Image.Image, mode: str) -> Image.Image:
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers of unknown range; save it with 8 or 16 bits")
    if image.mode == "I" or image.mode.startswith("I;16"):  # Pillow's own conversion cuts off instead of scaling
        import numpy as np

        sixteen = np.asarray(image).astype(np.int64).clip(0, 65535)
        image = Image.fromarray((sixteen >> 8).astype(np.uint8))
    elif image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    else:
        image.load()
    return image.convert(mode)


def _reason(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "there is no such file"
    if isinstance(error, IsADirectoryError):
        return "it is a folder"
    if isinstance(error, UnidentifiedImageError):
        return "it is empty or no image of a known format"
    return str(error).rstrip(".") or type(error).__name__
