"""What a number was measured with: versions, machine, commit."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from glcan.errors import ConfigError

_PACKAGES = ("glcan", "torchvision", "timm", "torchmetrics", "numpy")


def environment() -> dict[str, Any]:
    """Versions, machine and commit, as plain JSON types.

    ``commit`` is that of the glcan source tree, None when glcan does not run from one; ``commit_dirty`` says whether
    files of the package differed from it.
    """
    cuda = torch.cuda.is_available()
    commit, dirty = _commit()
    return {
        "versions": {"python": platform.python_version(), "torch": torch.__version__}
        | {name: _version(name) for name in _PACKAGES},
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "cpu_cores": os.cpu_count(),
        "cpu_threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if cuda else None,
        "cuda": torch.version.cuda if cuda else None,
        "cudnn": torch.backends.cudnn.version() if cuda else None,
        "commit": commit,
        "commit_dirty": dirty,
    }


def resolve_device(name: str) -> torch.device:
    """The device of a name; ``"auto"`` is the first GPU, else the CPU.

    Raises:
        ConfigError: this machine has no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    try:
        torch.empty(1, device=device)
    except Exception as error:  # each backend raises its own kind: AssertionError, RuntimeError, NotImplementedError
        gpus = torch.cuda.device_count()
        raise ConfigError(
            f"device = {name!r} cannot be used ({str(error).splitlines()[0]}); this machine has {gpus} CUDA devices. "
            "Set --device auto or --device cpu."
        ) from None
    return device


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _commit() -> tuple[str | None, bool | None]:
    package = Path(__file__).resolve().parents[1]

    def git(*args: str) -> str:
        command = ["git", "-C", str(package), *args]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        # An installed package may lie inside somebody else's repository (a .venv): only a tracked file counts.
        git("ls-files", "--error-unmatch", "errors.py")
        return git("rev-parse", "HEAD"), bool(git("status", "--porcelain", "--", "."))
    except (OSError, subprocess.SubprocessError):
        return None, None
