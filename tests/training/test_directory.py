"""Whose directory it is: nothing of another run is ever written over."""

import json
import zipfile
from pathlib import Path

import pytest
import torch
from filelock import FileLock

from glcan.errors import CheckpointError, ConfigError, RunError
from glcan.training import RunDirectory, checkpoint, load_model, train


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


def flip(place):
    """Flips a bit of the byte at this share of the file."""

    def change(path: Path) -> None:
        content = bytearray(path.read_bytes())
        content[round(place * (len(content) - 1))] ^= 0x10
        path.write_bytes(content)

    return change


def flip_in_the_directory(path: Path) -> None:
    """The attribute "is a folder" of an entry: torch then reads nothing, and takes memory as it finds it."""
    with zipfile.ZipFile(path) as archive:
        start = archive.start_dir
    content = bytearray(path.read_bytes())
    assert content[start : start + 4] == b"PK\x01\x02"
    content[start + 38] ^= 0x10
    path.write_bytes(content)


DAMAGE = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-2000]),
    "empty": lambda path: path.write_bytes(b""),
    **{f"one bit at {place:.0%}": flip(place) for place in (0, 0.3, 0.6, 0.9, 0.97, 1)},
    "one bit in the directory": flip_in_the_directory,
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
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
    checkpoint.save(run / "checkpoint.pt", state | {"format": 99})
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


def test_a_run_without_its_checkpoint_is_not_begun_anew(tiny, run):
    (run / "checkpoint.pt").unlink()
    before = contents(run)
    with pytest.raises(RunError, match=r"has no checkpoint.pt any more, .* write over metrics.jsonl"):
        train(tiny(epochs=1), run, resume=True, progress=False)
    assert contents(run) == before


def test_a_run_that_was_killed_before_its_first_checkpoint_begins_anew(tiny, run):
    (run / "checkpoint.pt").unlink()
    (run / "metrics.jsonl").write_text("")
    assert train(tiny(epochs=1), run, resume=True, progress=False).epochs == 1


def test_code_that_a_run_names_is_not_executed(tiny, tmp_path):
    train(tiny(epochs=1), tmp_path, progress=False)
    with pytest.raises(RunError, match="names model = 'tiny_model:tiny', code that would be imported.*--trust"):
        load_model(tmp_path)
    load_model(tmp_path, trust=True)
    for name in ("config.json", "summary.json"):
        values = json.loads((tmp_path / name).read_text())
        values["config"] |= {"model": "os:system", "model_options": {"command": f"touch {tmp_path / 'executed'}"}}
        (tmp_path / name).write_text(json.dumps(values))
    with pytest.raises(RunError, match="names model = 'os:system'"):
        load_model(tmp_path)
    assert not (tmp_path / "executed").exists()


def test_buffers_that_are_parts_of_one_tensor_and_tied_weights_are_saved(tiny, tmp_path):
    config = tiny(epochs=1, model="tiny_model:views", method="e2e")
    train(config, tmp_path, progress=False)
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["learner"]["model"]
    model = load_model(tmp_path, trust=True)
    assert model.scale is model.shift
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_what_cannot_be_saved_is_refused_before_the_first_step(tiny, tmp_path):
    with pytest.raises(ConfigError, match="'_extra_state', a dict that cannot be saved"):
        train(tiny(model="tiny_model:unsaveable", method="e2e"), tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def test_a_run_that_is_not_finished(run):
    with pytest.raises(RunError, match="not finished"):
        RunDirectory(run).read_summary()
