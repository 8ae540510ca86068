"""Checkpoints: written atomically, read without running code, with every random generator's state."""

from __future__ import annotations

import hashlib
import os
import pickle
import random
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from glcan.errors import CheckpointError

FORMAT = 2
_NO_COMMENT = b"\0\0"  # the last field of a zip archive: how long the comment is that follows
_DIGEST = 64  # characters of a SHA-256
_KEYS = {"format", "config", "learner", "rng", "progress", "history"}


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` fill a temporary file beside ``path``, then put it in place: readers see the old or the new file.

    The data is on the disk before the name changes, so that a power cut leaves one of the two as well.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")  # several processes may write the same file
    try:
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if os.name == "posix":
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def save(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint atomically; ``state`` holds config, learner, rng, progress and history."""

    def write(temporary: Path) -> None:
        torch.save({"format": FORMAT, **state}, temporary)
        _seal(temporary)

    write_atomically(path, write)


def _seal(path: Path) -> None:
    """Makes the hash of the whole archive its comment."""
    with path.open("r+b") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest().encode()
        file.seek(-len(_NO_COMMENT), os.SEEK_END)
        assert file.read() == _NO_COMMENT
        file.seek(-len(_NO_COMMENT), os.SEEK_END)
        file.write(struct.pack("<H", len(digest)) + digest)


def _is_sealed(path: Path) -> bool:
    """Whether the archive is what `_seal` saw, bit for bit."""
    with path.open("rb") as file:
        left = file.seek(0, os.SEEK_END) - len(_NO_COMMENT) - _DIGEST
        file.seek(0)
        digest = hashlib.sha256()
        while left > 0:
            digest.update(chunk := file.read(min(left, 2**20)))
            left -= len(chunk)
        digest.update(_NO_COMMENT)
        return file.read() == struct.pack("<H", _DIGEST) + digest.hexdigest().encode()


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU, without running code from it.

    Raises:
        CheckpointError: the file is damaged, is no checkpoint of glcan, or comes from another version.
    """
    remedy = "Restore the file from a copy, or start again with another --out."
    try:
        if not _is_sealed(path):  # torch.load does not look at checksums, so a flipped bit would pass
            raise ValueError("its content is not what its hash says")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError, KeyError, EOFError, pickle.UnpicklingError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise CheckpointError(f"Checkpoint {path} is damaged ({reason[0]}). {remedy}") from None
    if not isinstance(state, dict) or not state.keys() >= _KEYS:
        raise CheckpointError(f"{path} is not a checkpoint of glcan. {remedy}")
    if state["format"] != FORMAT:
        raise CheckpointError(
            f"Checkpoint {path} has format {state['format']}, this version of glcan reads {FORMAT}. "
            "Resume with the version that wrote it (see environment in config.json)."
        )
    return state


def seed_all(seed: int) -> None:
    """Seeds every generator that a checkpoint saves: torch's, Python's and NumPy's."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)


def rng_state(device: torch.device) -> dict[str, Any]:
    """State of the random generators of torch (CPU and the device's), numpy and python, in plain types."""
    state: Any = np.random.get_state(legacy=True)
    kind, keys, position, has_gauss, gauss = state
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "numpy": (str(kind), torch.from_numpy(keys.astype(np.int64)), int(position), int(has_gauss), float(gauss)),
        "python": random.getstate(),
    }


def set_rng_state(state: dict[str, Any], device: torch.device) -> None:
    """Put back what `rng_state` returned."""
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"], device)
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    random.setstate(state["python"])


@contextmanager
def preserved_rng(device: torch.device) -> Iterator[None]:
    """Leave every random generator as it was: for evaluation and for data loaders, which draw seeds for workers."""
    state = rng_state(device)
    try:
        yield
    finally:
        set_rng_state(state, device)
