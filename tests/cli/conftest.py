"""One finished run for all tests of the commands: 2 epochs on 96 of the embedded digits."""

from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from glcan.cli import app

QUICK = ["--limit", "96", "--batch", "32", "--epochs", "2", "--blocks", "2", "--lr", "0.05", "--device", "cpu"]


@pytest.fixture(scope="session")
def glcan() -> Callable[..., Result]:
    """Run `glcan ARGUMENTS` in this process."""

    def run(*arguments: object) -> Result:
        return CliRunner().invoke(app, [str(argument) for argument in arguments])

    return run


@pytest.fixture(scope="session")
def finished(glcan, tmp_path_factory) -> Path:
    """The directory of a finished run."""
    out = tmp_path_factory.mktemp("cli") / "run"
    result = glcan("train", "classification", *QUICK, "--val", 40, "--out", out)
    assert result.exit_code == 0, result.output
    return out
