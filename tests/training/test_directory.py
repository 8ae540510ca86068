"""Whose directory it is: nothing of another run is ever written over."""

import json
import zipfile
from pathlib import Path

import pytest
import torch
from filelock import FileLock

from glcan.errors import CheckpointError, RunError
from glcan.training import RunDirectory, train


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture
def run(tiny, tmp_path) -> Path:
    """A run of one epoch, whose summary is missing, so that it counts as interrupted."""
    train(tiny(epochs=1), tmp_path / "run", progress=False)
    (tmp_path / "run/summary.json").unlink()
    return tmp_path / "run"


@pytest.mark.parametrize(
    ("fields", "resume", "error", "message"),
    [
        ({}, False, RunError, "already holds the same run; add --resume"),
        ({"seed": 1}, False, RunError, r"already holds another run \(seed: 0 there, 1 asked\)"),
        ({"batch": 16}, True, RunError, r"other settings \(batch: 32 there, 16 asked\)"),
        ({"method": "e2e"}, True, CheckpointError, "another model or method .*method: 'glcan:2' there, 'e2e' asked"),
        ({"model": "cifar_resnet20"}, True, CheckpointError, "another model or method .*'tiny_model:tiny' there"),
    ],
)
def test_a_directory_of_another_run_is_refused(tiny, run, fields, resume, error, message):
    before = contents(run)
    with pytest.raises(error, match=message):
        train(tiny(**{"epochs": 1, **fields}), run, resume=resume, progress=False)
    assert contents(run) == before


@pytest.mark.parametrize("resume", [False, True])
def test_foreign_files_are_refused(tiny, tmp_path, resume):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(RunError, match=r"files that belong to no run \(thesis.tex\)"):
        train(tiny(), tmp_path, resume=resume, progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_file_is_no_directory(tiny, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="is a file"):
        train(tiny(), tmp_path / "file", progress=False)


def test_a_directory_that_cannot_be_made(tiny, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="cannot be made"):
        train(tiny(), tmp_path / "file/run", progress=False)


def test_two_processes_do_not_share_a_directory(tiny, run):
    with FileLock(run / ".lock"), pytest.raises(RunError, match="Another process is training"):
        train(tiny(epochs=1), run, resume=True, progress=False)


def flip_a_bit(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        largest = max(archive.infolist(), key=lambda info: info.file_size)
    content = bytearray(path.read_bytes())
    content[largest.header_offset + 1000] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-2000]),
    "empty": lambda path: path.write_bytes(b""),
    "one bit": flip_a_bit,
    "text": lambda path: path.write_text("not a checkpoint"),
    "another format": lambda path: torch.save({"state_dict": {}}, path),
    "runs code": lambda path: torch.save({"learner": Path}, path),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_checkpoint(tiny, run, kind):
    DAMAGE[kind](run / "checkpoint.pt")
    before = contents(run)
    with pytest.raises(CheckpointError, match=r"checkpoint.pt .*Restore the file from a copy, or start again"):
        train(tiny(epochs=1), run, resume=True, progress=False)
    assert contents(run) == before


def test_a_checkpoint_of_another_version(tiny, run):
    state = torch.load(run / "checkpoint.pt", weights_only=True)
    torch.save(state | {"format": 99}, run / "checkpoint.pt")
    with pytest.raises(CheckpointError, match="has format 99"):
        train(tiny(epochs=1), run, resume=True, progress=False)


def test_a_checkpoint_of_another_run(tiny, run, tmp_path):
    train(tiny(epochs=1, seed=1), tmp_path / "other", progress=False)
    (tmp_path / "other/checkpoint.pt").replace(run / "checkpoint.pt")
    with pytest.raises(CheckpointError, match=r"other settings than config.json"):
        train(tiny(epochs=1), run, resume=True, progress=False)


def test_a_damaged_config(tiny, run):
    (run / "config.json").write_text("{")
    with pytest.raises(RunError, match=r"config.json cannot be read"):
        train(tiny(epochs=1), run, resume=True, progress=False)


def test_a_summary_of_another_version(tiny, tmp_path):
    train(tiny(epochs=1), tmp_path, progress=False)
    path = tmp_path / "summary.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"colour": "blue"}))
    with pytest.raises(RunError, match="cannot be read by this version"):
        RunDirectory(tmp_path).read_summary()


def test_a_run_that_is_not_finished(run):
    with pytest.raises(RunError, match="not finished"):
        RunDirectory(run).read_summary()
