"""Where photographs for super-resolution come from: bundled ones, DIV2K, folders, benchmarks; and how they are read."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from glcan.data.files import EXTENSIONS, holds_images, images_below, warn_of_files_in_two_places
from glcan.data.preprocessing import open_image
from glcan.data.sets import cache
from glcan.data.super_resolution import Pair, warn_of_cropping
from glcan.errors import DataError

TEST_FRACTION = 0.2  # of a folder that comes without a test folder
IN_MEMORY_BYTES = 4 * 2**30  # more decoded pixels than that go to a file that is mapped into memory
_PROGRESS_FROM = 100  # files: below, reading them takes no time worth a progress bar
_HIGH = ("HR", "GT", "GTmod12", "original")
_LOW = ("LR_bicubic/X{scale}", "LR_bicubic/x{scale}", "LRbicx{scale}")


class Source(NamedTuple):
    """The files of one photograph; `low` is None where the low-resolution image is to be made."""

    high: Path
    low: Path | None


Sources = dict[str, list[Source]]  # of "train", "test" and maybe "val"


@dataclass(frozen=True)
class PhotographSet:
    """A data set of photographs.

    Attributes:
        title: for people.
        remedy: how to get it.
        find: the folder that holds it, for `root` or None (the usual places); None if it is not there.
        sources: the files in that folder for a scale.
        train, test: numbers of images as published; None where they are the user's own.
    """

    title: str
    remedy: str
    find: Callable[[Path | None], Path | None]
    sources: Callable[[Path, int], Sources]
    train: int | None = None
    test: int | None = None


def read_photographs(name: str, root: Path | None, scale: int, skip_corrupt: bool) -> dict[str, list[Pair]]:
    """Finds and reads the data set `name` of `PHOTOGRAPHS`.

    Raises:
        DataError: it is not there, damaged, or low- and high-resolution images do not match.
    """
    known = PHOTOGRAPHS[name]
    if root is not None and name != "photographs" and not root.is_dir():
        raise DataError(f"The folder {str(root)!r} of the data set {name!r} does not exist. {known.remedy}")
    folder = known.find(root)
    if folder is None:
        where = f"in {str(root)!r}" if root is not None else "in the usual places"
        raise DataError(f"The data set {name!r} is not there ({where}). {known.remedy}")
    sources = known.sources(folder, scale)
    if not any(sources.values()):
        raise DataError(f"The folder {str(folder)!r} holds no images ({', '.join(EXTENSIONS)}). {known.remedy}")
    return read_sources(sources, scale, skip_corrupt, tell=name != "photographs")


def read_sources(
    sources: Mapping[str, Sequence[Source]], scale: int, skip_corrupt: bool, tell: bool = True
) -> dict[str, list[Pair]]:
    """Decodes all files, each once, on several threads; `tell` warns of images that are cropped.

    Raises:
        DataError: a file that cannot be read (with `skip_corrupt`: no file of a split can), or sizes that do not match.
    """
    files = [source for group in sources.values() for source in group]
    parts = [(str(source.high), split) for split, group in sources.items() for source in group]
    warn_of_files_in_two_places(parts, "the photographs")
    store = _Store(files)
    read: dict[Source, Pair | str] = {}
    sizes: list[tuple[str, tuple[int, int]]] = []
    for source, (result, size) in zip(files, _decoded(files, scale, skip_corrupt), strict=True):
        if isinstance(result, Pair):
            read[source] = Pair(result.name, store.keep(result.low), store.keep(result.high))
            sizes.append((result.name, size))
        else:
            read[source] = result
    corrupt = [reason for reason in read.values() if isinstance(reason, str)]
    if corrupt:
        if len(corrupt) == len(files):
            raise DataError(f"None of the {len(files)} images can be read. The first: {corrupt[0]}")
        more = f" (and {len(corrupt) - 1} more)" if len(corrupt) > 1 else ""
        warnings.warn(
            f"{len(corrupt)} of {len(files)} images cannot be read and are left out: {corrupt[0]}{more}", stacklevel=2
        )
    if tell:
        warn_of_cropping(sizes, scale)
    kept: dict[str, list[Pair]] = {}
    for split, group in sources.items():
        kept[split] = [pair for pair in (read[source] for source in group) if isinstance(pair, Pair)]
        if group and not kept[split]:
            raise DataError(f"None of the {len(group)} {split} images can be read. The first: {read[group[0]]}")
    return kept


class _Store:
    """Keeps decoded pixels: in memory, or above `IN_MEMORY_BYTES` in a temporary file without a name."""

    def __init__(self, files: Sequence[Source]) -> None:
        self._file: Tensor | None = None
        self._used = 0
        total = 0
        for path in (path for source in files for path in source if path is not None):
            try:
                with Image.open(path) as image:  # reads the header alone
                    total += 3 * image.width * image.height
            except Exception:  # the decoder will say what is wrong with it
                continue
        total += total // 4  # low-resolution images that are made, at scale 2 or more
        if total > IN_MEMORY_BYTES:
            cache().mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=cache(), prefix="pixels-") as file:  # the mapping outlives the name
                try:
                    self._file = torch.from_file(file.name, shared=True, size=total, dtype=torch.uint8)
                except RuntimeError as error:
                    raise DataError(
                        f"The decoded images need {total / 2**30:.1f} GiB, which do not fit into {str(cache())!r} "
                        f"({error}). Set XDG_CACHE_HOME to a larger disk, or use fewer images."
                    ) from error

    def keep(self, pixels: Tensor) -> Tensor:
        if self._file is None:
            return pixels
        place = self._file[self._used : self._used + pixels.numel()].view(pixels.shape)
        self._used += pixels.numel()
        return place.copy_(pixels)


def _decoded(files: Sequence[Source], scale: int, skip_corrupt: bool) -> Iterator[tuple[Pair | str, tuple[int, int]]]:
    """Each file's pair and its size (width, height) before cropping, or what is wrong with it; in order."""
    from rich.console import Console
    from rich.progress import track

    def one(source: Source) -> tuple[Pair | str, tuple[int, int]]:
        try:
            high = _pixels(source.high)
            low = None if source.low is None else _pixels(source.low)
        except DataError as error:
            if skip_corrupt:
                return str(error), (0, 0)
            raise DataError(
                f"{error} Replace or remove it, or go on without such files with skip_corrupt=True (--skip-corrupt)."
            ) from error
        return Pair.of(str(source.high), high, scale, low), (high.shape[-1], high.shape[-2])

    threads = os.cpu_count() or 1
    with ThreadPoolExecutor(threads) as pool:
        portions = (files[first : first + threads] for first in range(0, len(files), threads))
        yield from track(
            (result for portion in portions for result in pool.map(one, portion)),
            "Reading images",
            total=len(files),
            console=Console(stderr=True),
            disable=len(files) < _PROGRESS_FROM,
        )


def _pixels(path: Path) -> Tensor:
    """An image file of any colour mode as uint8 RGB [3, H, W]."""
    return torch.from_numpy(np.array(open_image(path, 3))).permute(2, 0, 1).contiguous()


# ---------------------------------------------------------------- files and their partners


def _holds_images(folder: Path) -> bool:
    """Whether images lie in the folder itself, or in a folder for high-resolution ones; False where it is none."""
    return (folder.is_dir() and holds_images(folder)) or any((folder / name).is_dir() for name in _HIGH)


def with_partners(high: Path, low: Path | None, scale: int) -> list[Source]:
    """The images in `high` with those in `low`: NAME.png with NAMEx2.png (DIV2K's way) or NAME.png.

    Raises:
        DataError: an image of one folder has no partner in the other, or more than one.
    """
    if low is None:
        return [Source(path, None) for path in images_below(high)]
    named, partners = _by_name(high), _by_name(low)
    sources = []
    for name, path in named.items():
        both = name.with_name(f"{name.name}x{scale}"), name
        found = [partners.pop(partner) for partner in both if partner in partners]
        if not found:
            raise DataError(
                f"The high-resolution image {str(path)!r} has no low-resolution partner in {str(low)!r}: neither "
                f"{path.stem}x{scale}.png nor {path.stem}.png. Add it, or remove that folder: "
                "low-resolution images are then made."
            )
        if len(found) > 1:
            raise DataError(
                f"The high-resolution image {str(path)!r} has two low-resolution partners, {str(found[0])!r} and "
                f"{str(found[1])!r}. Remove one, or name all of them in one way."
            )
        sources.append(Source(path, found[0]))
    if partners:
        lonely = next(iter(partners.values()))
        raise DataError(
            f"The low-resolution image {str(lonely)!r} has no high-resolution partner in {str(high)!r} "
            f"({len(partners)} such). Add it, or remove that image."
        )
    return sources


def _by_name(folder: Path) -> dict[Path, Path]:
    """The images below a folder by their names relative to it, without the ending.

    Raises:
        DataError: two images differ in the ending alone.
    """
    found: dict[Path, Path] = {}
    for path in images_below(folder):
        first = found.setdefault(path.relative_to(folder).with_suffix(""), path)
        if first != path:
            raise DataError(
                f"The images {str(first)!r} and {str(path)!r} differ in the ending of their names alone, so that "
                "partners cannot be told by name. Rename or remove one."
            )
    return found


def _in_folder(folder: Path, scale: int) -> list[Source]:
    """The photographs of one folder: HR/ beside LR_bicubic/X2 (benchmarks' layout), or images alone."""
    high = next((folder / name for name in _HIGH if (folder / name).is_dir()), None)
    if high is None:
        return [Source(path, None) for path in images_below(folder)]
    places = (folder / name.format(scale=scale) for name in _LOW)
    return with_partners(high, next((place for place in places if place.is_dir()), None), scale)


def _photo_folder(folder: Path, scale: int) -> Sources:
    """ROOT/train with ROOT/test or ROOT/val, or images alone, of which a fifth by a hash of their names is for test."""
    if (folder / "train").is_dir():
        train, held_out = folder / "train", [name for name in ("test", "val") if (folder / name).is_dir()]
        if held_out:
            found = {"train": _in_folder(train, scale), "test": _in_folder(folder / held_out[0], scale)}
            if len(held_out) == 2:
                found["val"] = _in_folder(folder / "val", scale)
            for split, sources in found.items():
                if not sources:
                    raise DataError(
                        f"The {split} folder in {str(folder)!r} holds no images ({', '.join(EXTENSIONS)}). Add some."
                    )
            return found
        folder = train
    sources = _in_folder(folder, scale)
    if len(sources) == 1:
        raise DataError(
            f"The folder {str(folder)!r} holds one image; one to train and one to test on are needed. Add images, or "
            "evaluate on it as the data set 'benchmark'."
        )
    order = sorted(sources, key=lambda s: hashlib.blake2b(os.fsencode(s.high.relative_to(folder).as_posix())).digest())
    test = set(order[: max(1, round(TEST_FRACTION * len(sources)))])
    return {"train": [s for s in sources if s not in test], "test": [s for s in sources if s in test]}


# ---------------------------------------------------------------- the data sets


def _given(root: Path | None) -> Path | None:
    return root


def _usual(root: Path | None, *names: str) -> list[Path]:
    places = [root] if root is not None else [cache(), Path("data")]
    return [place / name for place in places for name in names]


def _div2k_folder(root: Path | None) -> Path | None:
    places = _usual(root, "", "DIV2K")
    return next((place for place in places if (place / "DIV2K_train_HR").is_dir()), None)


def _div2k(folder: Path, scale: int) -> Sources:
    found: Sources = {}
    for split, prefix in (("train", "DIV2K_train"), ("test", "DIV2K_valid")):
        if (folder / f"{prefix}_HR").is_dir():
            low = folder / f"{prefix}_LR_bicubic" / f"X{scale}"
            found[split] = with_partners(folder / f"{prefix}_HR", low if low.is_dir() else None, scale)
    return found


def _benchmark_set(title: str, count: int, *aliases: str) -> PhotographSet:
    def find(root: Path | None) -> Path | None:
        nested = [name for alias in aliases for name in (alias, f"benchmark/{alias}")]
        place = next((place for place in _usual(root, *nested) if place.is_dir()), None)
        if place is None and root is not None and _holds_images(root):
            return root
        return place

    remedy = f"Give the folder that holds {aliases[0]}/HR/*.png, or these images themselves, with --data-root."
    return PhotographSet(title, remedy, find, lambda folder, scale: {"test": _in_folder(folder, scale)}, None, count)


# Shipped in the wheels of scikit-image and scikit-learn, so at hand without a network.
_BUNDLED_TRAIN = (
    "skimage/data/astronaut.png",
    "skimage/data/brick.png",
    "skimage/data/camera.png",
    "skimage/data/coins.png",
    "skimage/data/grass.png",
    "skimage/data/gravel.png",
    "skimage/data/hubble_deep_field.jpg",
    "skimage/data/motorcycle_left.png",
    "skimage/data/rocket.jpg",
    "sklearn/datasets/images/flower.jpg",
)
_BUNDLED_TEST = ("skimage/data/chelsea.png", "skimage/data/coffee.png", "sklearn/datasets/images/china.jpg")


def _bundled(folder: Path, scale: int) -> Sources:
    found: Sources = {}
    for split, files in (("train", _BUNDLED_TRAIN), ("test", _BUNDLED_TEST)):
        found[split] = []
        for file in files:
            package, _, inside = file.partition("/")
            spec = importlib.util.find_spec(package)
            path = Path(str(spec.origin)).parent / inside if spec else Path(file)
            if not path.is_file():
                raise DataError(f"The bundled photograph {file} is missing. {PHOTOGRAPHS['photographs'].remedy}")
            found[split].append(Source(path, None))
    return found


def _bundled_folder(root: Path | None) -> Path | None:
    spec = importlib.util.find_spec("skimage")
    return Path(str(spec.origin)).parent / "data" if spec else None


PHOTOGRAPHS: dict[str, PhotographSet] = {
    "photographs": PhotographSet(
        "photographs bundled with scikit-image and scikit-learn",
        "They come with two libraries: pip install scikit-image scikit-learn.",
        _bundled_folder,
        _bundled,
        len(_BUNDLED_TRAIN),
        len(_BUNDLED_TEST),
    ),
    "div2k": PhotographSet(
        "DIV2K, 2K photographs",
        "Get DIV2K_train_HR.zip and DIV2K_valid_HR.zip (and LR_bicubic, or they are made) from "
        "https://data.vision.ee.ethz.ch/cvl/DIV2K/, unpack them into one folder and give it with --data-root.",
        _div2k_folder,
        _div2k,
        800,
        100,
    ),
    "photofolder": PhotographSet(
        "photographs of your own",
        "Give the folder with --data-root: ROOT/train/* with ROOT/test/* or ROOT/val/*, or ROOT/* (a fifth for test).",
        _given,
        _photo_folder,
    ),
    "benchmark": PhotographSet(
        "photographs of your own, all to test on",
        "Give the folder with --data-root: ROOT/HR/* with ROOT/LR_bicubic/X2/*x2.png, or ROOT/*.",
        _given,
        lambda folder, scale: {"test": _in_folder(folder, scale)},
    ),
    "set5": _benchmark_set("Set5 (to test on)", 5, "Set5"),
    "set14": _benchmark_set("Set14 (to test on)", 14, "Set14"),
    "b100": _benchmark_set("BSD100 (to test on)", 100, "B100", "BSD100", "BSDS100"),
    "urban100": _benchmark_set("Urban100 (to test on)", 100, "Urban100"),
    "manga109": _benchmark_set("Manga109 (to test on)", 109, "Manga109", "manga109"),
}

__all__ = ["EXTENSIONS", "PHOTOGRAPHS", "PhotographSet", "Source", "read_photographs", "read_sources"]
