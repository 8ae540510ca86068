"""Scenes: real garments (or digits) in colour, pasted on real photographs, with their boxes. Made here, no download.

Objects come from Fashion-MNIST where it is found, grouped into five kinds that differ in shape, else from the five
even digits of scikit-learn. Backgrounds are the photographs that the wheels of scikit-image and scikit-learn hold.
Train and test scenes have no object and no photograph in common. Each scene has one to five objects of three sizes, an
octave apart: 1/8 to 1/4 of the side of the image, 1/4 to 1/2, and 1/2 to 3/4; turned by up to 15 degrees, tinted,
partly overlapping.

Scene i is a function of (part, side, seed, i) alone, so that fewer scenes are the first of more.

Shapes: S side of a scene in pixels, N scenes.
"""

from __future__ import annotations

import colorsys
import functools
import importlib.util
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from glcan.data.annotations import Annotations
from glcan.data.detection import DetectionData
from glcan.data.images import derive_seed
from glcan.data.sets import SETS, read_set
from glcan.errors import ConfigError, DataError

Part = Literal["train", "test"]

SIDE = 96
TRAIN, TEST = 2000, 400
SIZES = ((1 / 8, 1 / 4), (1 / 4, 1 / 2), (1 / 2, 3 / 4))  # of the longer side of an object, in sides of the image
MOST = 5  # objects of a scene
MAX_ANGLE = 15.0  # degrees
MAX_IOU = 0.15  # of two boxes
MIN_VISIBLE = 0.8  # share of an object that later ones leave uncovered
_TRIES = 8  # places tried for an object before it is left out

#: The ten classes of Fashion-MNIST by kind. Finer classes (shirt, pullover, coat) differ in texture that 20 pixels do
#: not hold.
KINDS = {
    "top": ("T-shirt/top", "Pullover", "Coat", "Shirt"),
    "trousers": ("Trouser",),
    "dress": ("Dress",),
    "shoe": ("Sandal", "Sneaker", "Ankle boot"),
    "bag": ("Bag",),
}

#: The digits that stand in for them. With all ten, training of the same length knows where an object is, not which.
DIGITS = (0, 2, 4, 6, 8)

#: Photographs by part: no picture, and no motif (the motorcycle's stereo pair), is in both.
PHOTOGRAPHS: dict[Part, tuple[tuple[str, str], ...]] = {
    "train": (
        ("skimage", "data/astronaut.png"),
        ("skimage", "data/coffee.png"),
        ("skimage", "data/chelsea.png"),
        ("skimage", "data/motorcycle_left.png"),
        ("skimage", "data/hubble_deep_field.jpg"),
        ("skimage", "data/ihc.png"),
        ("skimage", "data/camera.png"),
        ("skimage", "data/brick.png"),
        ("skimage", "data/grass.png"),
        ("sklearn", "datasets/images/flower.jpg"),
    ),
    "test": (
        ("skimage", "data/rocket.jpg"),
        ("skimage", "data/retina.jpg"),
        ("skimage", "data/coins.png"),
        ("skimage", "data/gravel.png"),
        ("skimage", "data/moon.png"),
        ("sklearn", "datasets/images/china.jpg"),
    ),
}


class Objects(NamedTuple):
    """What is pasted: images uint8 [N, h, w] on black; of each kind (label 1, 2, ...) its name and its images' rows."""

    kinds: list[str]
    images: NDArray[np.uint8]
    rows: list[NDArray[np.int64]]

    def draw(self, draw: np.random.Generator) -> tuple[NDArray[np.uint8], int]:
        """An object at random, every kind as often as every other, and its label."""
        label = 1 + int(draw.integers(len(self.kinds)))
        rows = self.rows[label - 1]
        return self.images[rows[int(draw.integers(len(rows)))]], label


def _objects(kinds: list[str], images: Tensor, labels: NDArray[np.int64]) -> Objects:
    rows = [(labels == label).nonzero()[0] for label in range(1, len(kinds) + 1)]
    return Objects(kinds, images[:, 0].numpy(), rows)


class Scenes(DetectionData):
    """The embedded detection data set; see the module.

    Args:
        size: S, the side of the images.
        train, test: numbers of scenes.
        root: the folder of Fashion-MNIST's files; by default the usual places, and the digits where it is in none.
        scene_seed: of the scenes themselves; `seed` (of the order and the augmentation) leaves them as they are.
        common: see `DetectionData`.

    Raises:
        DataError: the photographs are not there.
        ConfigError: a size below 64, or no scenes.
    """

    def __init__(
        self,
        *,
        size: int = SIDE,
        train: int = TRAIN,
        test: int = TEST,
        root: Path | None = None,
        scene_seed: int = 0,
        **common: Any,
    ) -> None:
        if size < 64:
            raise ConfigError(f"image_size={size} of the scenes: objects would vanish; it must be at least 64 pixels.")
        if min(train, test) < 1:
            raise ConfigError(f"{train} train and {test} test scenes: at least 1 of each is needed.")
        made = {
            "train": make_scenes("train", train, size, scene_seed, root),
            "test": make_scenes("test", test, size, scene_seed, root),
        }
        self._images = {part: images for part, (images, _) in made.items()}
        kinds = load_objects("train", root).kinds
        super().__init__("scenes", kinds, {part: notes for part, (_, notes) in made.items()}, image_size=size, **common)

    def _pixels(self, source: str, index: int) -> Tensor:
        return self._images[source][index]


@functools.lru_cache(maxsize=4)
def make_scenes(
    part: Part, count: int, size: int = SIDE, seed: int = 0, root: Path | None = None
) -> tuple[Tensor, Annotations]:
    """Scenes uint8 [N, 3, S, S] and their annotations, made once and kept; not to be written to.

    Boxes are tight around what was pasted, also where a later object covers a part of it.

    Raises:
        DataError: the photographs, or the objects in `root`, are not there.
    """
    objects, photographs = load_objects(part, root), load_photographs(part, size)
    images = torch.empty(count, 3, size, size, dtype=torch.uint8)
    rows: list[tuple[int, ...]] = []
    first = [0]
    for index in range(count):
        draw = np.random.Generator(np.random.PCG64(derive_seed("scene", part, size, seed, index)))
        scene, found = _make_scene(draw, size, objects, photographs)
        images[index] = torch.from_numpy(scene).permute(2, 0, 1)
        rows += found
        first.append(len(rows))
    table = torch.tensor(rows, dtype=torch.float64).reshape(-1, 6)
    offset = 0 if part == "train" else 1_000_000  # no id twice
    return images, Annotations(
        image_ids=[offset + index for index in range(1, count + 1)],
        sizes=torch.tensor([[size, size]]).repeat(count, 1),
        first=torch.tensor(first),
        boxes=table[:, :4].contiguous(),
        labels=table[:, 4].to(torch.int64),
        areas=table[:, 5].contiguous(),
        crowd=torch.zeros(len(rows), dtype=torch.bool),
    )


def _has_garments(root: Path | None) -> bool:
    return root is not None or SETS["fashion-mnist"].find(None) is not None


def kinds() -> tuple[list[str], str]:
    """The names of the classes, and what they are together, with no folder given. Reads no data."""
    if _has_garments(None):
        return list(KINDS), "garments"
    return _digits(), "digits"


def _digits() -> list[str]:
    return [f"digit {digit}" for digit in DIGITS]


@functools.lru_cache(maxsize=4)
def load_objects(part: Part, root: Path | None = None) -> Objects:
    """The objects of a part: Fashion-MNIST's where it is found, else the digits.

    Raises:
        DataError: `root` is given, and Fashion-MNIST is not in it or damaged.
    """
    if not _has_garments(root):
        pixels = read_set("digits", None, download=False)
        images, labels = pixels.train if part == "train" else pixels.test
        kept = np.isin(labels.numpy(), DIGITS)
        return _objects(_digits(), images[kept], 1 + np.searchsorted(DIGITS, labels.numpy()[kept]))
    pixels = read_set("fashion-mnist", root, download=False)
    images, labels = pixels.train if part == "train" else pixels.test
    kind_of = {name: label for label, names in enumerate(KINDS.values(), 1) for name in names}
    table = np.array([kind_of[name] for name in pixels.classes])
    return _objects(list(KINDS), images, table[labels.numpy()])


def photograph_folder(package: str = "skimage") -> Path | None:
    """Where a package is installed, without importing it; None where it is not."""
    spec = importlib.util.find_spec(package)
    return Path(spec.origin).parent if spec is not None and spec.origin else None


@functools.lru_cache(maxsize=4)
def load_photographs(part: Part, size: int) -> tuple[Image.Image, ...]:
    """The photographs of a part in RGB, reduced so that a scene shows a good part of each.

    Raises:
        DataError: one is not where the wheels of scikit-image and scikit-learn put it.
    """
    found = []
    for package, name in PHOTOGRAPHS[part]:
        path = (photograph_folder(package) or Path(package)) / name
        try:
            with Image.open(path) as image:
                photograph = image.convert("RGB")
        except OSError as error:
            library = {"skimage": "scikit-image", "sklearn": "scikit-learn"}[package]
            raise DataError(
                f"The photograph {str(path)!r}, a background of the scenes, cannot be read: {error}. It comes with "
                f"{library}: pip install --force-reinstall {library}."
            ) from error
        scale = 2 * size / min(photograph.size)
        found.append(
            photograph.resize((round(photograph.width * scale), round(photograph.height * scale)), Image.Resampling.BOX)
            if scale < 1
            else photograph
        )
    return tuple(found)


def _make_scene(
    draw: np.random.Generator, size: int, objects: Objects, photographs: tuple[Image.Image, ...]
) -> tuple[NDArray[np.uint8], list[tuple[int, ...]]]:
    """A scene uint8 [S, S, 3] with a row (x1, y1, x2, y2, label, area) for each of its objects."""
    canvas = _background(draw, size, photographs).astype(np.float32)
    covered = np.full((size, size), -1, dtype=np.int16)  # which object is seen
    rows: list[tuple[int, ...]] = []
    # the larger ones first: a small one before a large one is seen, behind it it is not
    fractions = sorted((_fraction(draw) for _ in range(int(draw.integers(1, MOST + 1)))), reverse=True)
    for fraction in fractions:
        image, label = objects.draw(draw)
        shade, alpha = _shape(draw, image, max(8, round(fraction * size)))
        height, width = shape = alpha.shape
        mask = alpha > 0.5
        area = int(mask.sum())
        if not area or max(shape) > size:
            continue
        ys, xs = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        for _ in range(_TRIES):
            top, left = int(draw.integers(size - height + 1)), int(draw.integers(size - width + 1))
            box = (left + int(xs[0]), top + int(ys[0]), left + int(xs[-1]) + 1, top + int(ys[-1]) + 1)
            window = np.s_[top : top + height, left : left + width]
            if _fits(box, mask, covered, window, rows):
                tint = 255 * np.array(colorsys.hsv_to_rgb(draw.random(), draw.uniform(0.3, 1), draw.uniform(0.7, 1)))
                paint = shade[..., None] * tint.astype(np.float32)
                canvas[window] += alpha[..., None] * (paint - canvas[window])
                covered[window][mask] = len(rows)
                rows.append((*box, label, area))
                break
    return canvas.round().clip(0, 255).astype(np.uint8), rows


def _background(draw: np.random.Generator, size: int, photographs: tuple[Image.Image, ...]) -> NDArray[np.uint8]:
    """A part of a photograph, mirrored at random: a square of half to all of the shorter side."""
    photograph = photographs[int(draw.integers(len(photographs)))]
    side = round(min(photograph.size) * draw.uniform(0.5, 1))
    left, top = (int(draw.integers(length - side + 1)) for length in photograph.size)
    pixels = np.asarray(
        photograph.resize((size, size), Image.Resampling.BILINEAR, box=(left, top, left + side, top + side))
    )
    return pixels[:, ::-1] if draw.random() < 0.5 else pixels


def _fraction(draw: np.random.Generator) -> float:
    """The longer side of an object in sides of the image: an octave at random, uniform in its logarithm."""
    low, high = SIZES[int(draw.integers(len(SIZES)))]
    return float(low * (high / low) ** draw.random())


def _shape(
    draw: np.random.Generator, image: NDArray[np.uint8], longest: int
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """An object turned and resized to `longest` pixels: shade and opacity in 0..1, float32 [h, w]."""
    from scipy.ndimage import binary_fill_holes

    solid = binary_fill_holes(image > 16)
    layers = Image.fromarray(np.stack([np.maximum(image, 40 * solid), 255 * solid], axis=-1).astype(np.uint8), "LA")
    if draw.random() < 0.5:
        layers = layers.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    angle = float(draw.uniform(-MAX_ANGLE, MAX_ANGLE))
    enlarged = layers.resize((4 * layers.width, 4 * layers.height), Image.Resampling.BICUBIC)
    turned = enlarged.rotate(angle, Image.Resampling.BILINEAR, expand=True)
    turned = turned.crop(turned.getchannel("A").point(lambda value: 255 * (value > 127)).getbbox())
    scale = longest / max(turned.size)
    small = turned.resize(
        (max(1, round(turned.width * scale)), max(1, round(turned.height * scale))), Image.Resampling.BOX
    )
    values = np.asarray(small, dtype=np.float32) / 255
    alpha = values[..., 1]
    shade = np.clip(values[..., 0] / np.maximum(alpha, 0.25), 0.15, 1)
    return shade.astype(np.float32), alpha.astype(np.float32)


def _fits(
    box: tuple[int, ...],
    mask: NDArray[np.bool_],
    covered: NDArray[np.int16],
    window: tuple[slice, ...],
    rows: list[tuple[int, ...]],
) -> bool:
    """Whether an object may be pasted here: no box is too near another, every older object stays visible enough."""
    for index, (x1, y1, x2, y2, _, area) in enumerate(rows):
        across = max(0, min(x2, box[2]) - max(x1, box[0]))
        shared = across * max(0, min(y2, box[3]) - max(y1, box[1]))
        together = (x2 - x1) * (y2 - y1) + (box[2] - box[0]) * (box[3] - box[1]) - shared
        if shared > MAX_IOU * together:
            return False
        if shared:
            left = int((covered == index).sum()) - int((mask & (covered[window] == index)).sum())
            if left < MIN_VISIBLE * area:
                return False
    return True
