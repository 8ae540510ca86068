"""One finished run for all tests of the commands: 2 epochs on 96 of the embedded digits."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from PIL import Image
from typer.testing import CliRunner

from glcan.cli import app

QUICK = ["--limit", "96", "--batch", "32", "--epochs", "2", "--method", "glcan:2", "--lr", "0.05", "--device", "cpu"]


@pytest.fixture(scope="session")
def glcan() -> Callable[..., Result]:
    """Run `glcan ARGUMENTS` in this process."""

    def run(*arguments: object) -> Result:
        return CliRunner().invoke(app, [str(argument) for argument in arguments])

    return run


@pytest.fixture(scope="session")
def start() -> Callable[..., subprocess.Popen[str]]:
    """Run `glcan ARGUMENTS` as a process of its own."""

    def run(*arguments: object, **options: Any) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "glcan", *map(str, arguments)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)

    return run


@pytest.fixture(scope="session")
def quick() -> list[str]:
    """Options of a run of seconds."""
    return list(QUICK)


@pytest.fixture(scope="session")
def finished(glcan, tmp_path_factory) -> Path:
    """The directory of a finished run."""
    out = tmp_path_factory.mktemp("cli") / "run"
    result = glcan("train", "classification", *QUICK, "--val", 40, "--out", out)
    assert result.exit_code == 0, result.output
    return out


@pytest.fixture(scope="session")
def digits(tmp_path_factory) -> list[Path]:
    """Three of the test digits as image files."""
    from sklearn.datasets import load_digits

    folder = tmp_path_factory.mktemp("digits")
    for i, image in enumerate(load_digits().images[:3]):
        Image.fromarray((image * 255 / 16).round().astype("uint8")).save(folder / f"{i}.png")
    return sorted(folder.iterdir())
