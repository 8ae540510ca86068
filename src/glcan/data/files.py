"""Files and folders as people have them: one walk for all readers of folders, names, lists."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from glcan.errors import DataError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
_BOMS = ((b"\xef\xbb\xbf", "utf-8"), (b"\xff\xfe", "utf-16-le"), (b"\xfe\xff", "utf-16-be"))


def is_image(name: str) -> bool:
    """Whether a file name is that of an image, and not hidden."""
    return not name.startswith(".") and name.lower().endswith(EXTENSIONS)


def folders_in(root: Path) -> list[str]:
    """The names of the folders in a folder, sorted; none that begins with a dot, no link that leads back.

    Raises:
        DataError: the folder cannot be listed.
    """
    folders = [entry for entry in _entries(root) if entry.is_dir() and not entry.name.startswith(".")]
    place = os.path.realpath(root)
    back = sorted(entry.path for entry in folders if entry.is_symlink() and _leads_back(entry, (place,)))
    _warn_of_links_back(root, back)
    return sorted(entry.name for entry in folders if entry.path not in back)


def holds_images(root: Path) -> bool:
    """Whether an image file lies in the folder itself."""
    return any(is_image(entry.name) and entry.is_file() for entry in _entries(root))


def images_below(root: Path) -> list[Path]:
    """The image files in a folder and the folders below it, sorted; nothing whose name begins with a dot.

    Links are followed, except those that lead back to a folder above them, which one warning names.

    Raises:
        DataError: a folder cannot be listed.
    """
    found: list[Path] = []
    back: list[str] = []
    _walk(root, (os.path.realpath(root),), found, back)
    _warn_of_links_back(root, back)
    return sorted(found)


def _walk(folder: Path, real: tuple[str, ...], found: list[Path], back: list[str]) -> None:
    """Collects images, and links that lead back; `real` are the true places of the folder and those it was come by."""
    for entry in sorted(_entries(folder), key=lambda entry: entry.name):
        if entry.name.startswith("."):
            continue
        if not entry.is_dir():
            if is_image(entry.name):
                found.append(folder / entry.name)
        elif not entry.is_symlink():
            _walk(folder / entry.name, (*real[:-1], os.path.join(real[-1], entry.name)), found, back)
        elif _leads_back(entry, real):
            back.append(entry.path)
        else:
            _walk(folder / entry.name, (*real, os.path.realpath(entry.path)), found, back)


def _leads_back(entry: os.DirEntry[str], passed: Sequence[str]) -> bool:
    """Whether a link leads to a folder that was passed on the way to it, or to one above that."""
    place = os.path.realpath(entry.path)
    return any(Path(folder).is_relative_to(place) for folder in passed)


def _warn_of_links_back(root: Path, back: Sequence[str]) -> None:
    if back:
        warnings.warn(
            f"{len(back)} links in {str(root)!r} lead back to a folder above them and are not followed, for example "
            f"{back[0]!r}. Remove them.",
            stacklevel=3,
        )


def _entries(folder: Path) -> Iterator[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            yield from entries
    except OSError as error:
        raise DataError(
            f"The folder {str(folder)!r} cannot be listed: {error.strerror}. Give yourself the right to read it, or "
            "remove it."
        ) from error


def warn_of_files_in_two_places(files: Sequence[tuple[str, str]], what: str) -> None:
    """Says once that a file, by way of links or lists, is in two parts of a data set.

    Args:
        files: paths, and for each what it is in ("train", "train as 'cat'").
        what: the data set, for the message.
    """
    numbers = np.array([_file_number(path)[1] & (2**64 - 1) for path, _ in files], dtype=np.uint64)
    values, counts = np.unique(numbers, return_counts=True)  # one number for a file keeps little of a million files
    repeated = np.isin(numbers, values[(counts > 1) & (values > 0)])
    seen: dict[tuple[int, int], tuple[str, str]] = {}
    twice: list[str] = []
    for index in repeated.nonzero()[0].tolist():
        path, part = files[index]
        first = seen.setdefault(_file_number(path), (path, part))
        if first[1] != part:
            twice.append(f"{first[0]!r} ({first[1]}) is {path!r} ({part})")
    if twice:
        warnings.warn(
            f"{len(twice)} images of {what} are in two parts of it, as links or lists lead to the same file: "
            f"{twice[0]}. Remove them from one of the parts.",
            stacklevel=3,
        )


def _file_number(path: str) -> tuple[int, int]:
    """What two names of one file have in common; zeros where that is not known."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):  # whoever reads it says what is wrong
        return 0, 0
    return status.st_dev, status.st_ino


def inside(root: Path, folder: Path, name: str, origin: str) -> Path:
    """The path of `name` in a folder of the data set in `root`.

    Args:
        root: what the path must lie in, links aside.
        folder: what the name is relative to.
        name: as an annotation file or a list has it.
        origin: who says so, for messages.

    Raises:
        DataError: the name leads out of `root`.
    """
    path = folder / name
    if (os.path.isabs(name) or ".." in path.parts) and not _lies_in(path, root):
        raise DataError(
            f"{origin} names {name!r}, which leads out of the data set's folder {str(root)!r}. Put the file into "
            f"{str(folder)!r}, and write its name relative to that."
        )
    return path


def _lies_in(path: Path, root: Path) -> bool:
    return Path(os.path.abspath(path)).is_relative_to(os.path.abspath(root))


def read_lines(path: Path) -> list[str]:
    """The lines of a text file that are not blank, without white space around them.

    UTF-8, and what begins with a byte order mark of UTF-8 or UTF-16 (as PowerShell writes). Bytes that are not UTF-8
    are kept as Python keeps them in file names, so that they match those of files.

    Raises:
        DataError: the file cannot be read, or is no such text.
    """
    try:
        content = path.read_bytes()
        mark, encoding = next(((mark, name) for mark, name in _BOMS if content.startswith(mark)), (b"", "utf-8"))
        content = content[len(mark) :]
        text = content.decode(encoding, "surrogateescape" if encoding == "utf-8" else "strict")
    except (OSError, ValueError) as error:
        raise DataError(f"The list {str(path)!r} cannot be read: {error}. Save it as text in UTF-8.") from error
    if "\0" in text:
        raise DataError(
            f"The list {str(path)!r} is not text in UTF-8: it has zero bytes, as UTF-16 without a byte order mark has. "
            "Save it as UTF-8."
        )
    lines = (line.strip() for line in re.split(r"\r\n|\r|\n", text))
    return [line for line in lines if line]


def printable(name: str) -> bool:
    """Whether a name is proper Unicode, so that it can be written to reports; file names may be any bytes."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True
