"""A run that is interrupted and resumed ends as if it had never stopped: the same metrics and weights, bit for bit."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from glcan.errors import RunError
from glcan.training import RunDirectory, Summary, train, trainer

SETTINGS = [
    pytest.param({}, id="glcan-sgd"),
    pytest.param({"method": "man:2", "precision": "bf16", "clip_norm": 1.0}, id="man-bf16"),  # has momentum copies
    pytest.param({"method": "e2e", "optimizer": "adamw", "lr": 1e-3, "schedule": "onecycle"}, id="e2e-adamw-onecycle"),
    pytest.param({"method": "checkpoint", "channels_last": True}, id="checkpoint-nhwc"),
    pytest.param({"method": "selective"}, id="selective"),
    pytest.param({"method": "glcan:2+accumulate:2", "recompute": True}, id="glcan-accumulated-recomputed"),
    pytest.param({"method": "glcan:3+freeze:0.5"}, id="a-block-freezes-before-the-stop"),
    pytest.param({"method": "glcan:2+start:0.56"}, id="start-ends-at-the-stop"),
    pytest.param({"method": "glcan:2+start:0.8", "precision": "bf16", "clip_norm": 1.0}, id="stopped-in-the-start"),
    pytest.param({"method": "glcan:2+finish:0.44"}, id="finish-begins-at-the-stop"),
    pytest.param({"method": "glcan:2+finish:0.5", "optimizer": "adam", "lr": 1e-3}, id="finish-begins-before-the-stop"),
]


def send(number: int):
    return lambda learner: os.kill(os.getpid(), number)


@pytest.mark.parametrize("settings", SETTINGS)
def test_stopped_in_the_middle_of_an_epoch(tiny, tmp_path, before_step, same_run, settings):
    config = tiny(**settings)
    train(config, tmp_path / "whole", progress=False)
    before_step(5, send(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path / "parts", progress=False)
    progress = torch.load(tmp_path / "parts/checkpoint.pt", weights_only=True)["progress"]
    assert (progress["epoch"], progress["batch"], progress["step"]) == (1, 2, 5)
    torch.manual_seed(123)  # another process has other random numbers
    train(config, tmp_path / "parts", resume=True, progress=False)
    same_run(tmp_path / "whole", tmp_path / "parts")


def test_stopped_after_every_single_batch(tiny, tmp_path, before_step, same_run):
    config = tiny(epochs=2)
    train(config, tmp_path / "whole", progress=False)
    for number in range(1, 7):
        before_step(1, send(signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            train(config, tmp_path / "parts", resume=number > 1, progress=False)
    train(config, tmp_path / "parts", resume=True, progress=False)
    same_run(tmp_path / "whole", tmp_path / "parts")


def test_sigterm_exits_with_143(tiny, tmp_path, before_step, same_run):
    before_step(4, send(signal.SIGTERM))
    previous = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as stopped:
        train(tiny(), tmp_path / "parts", progress=False)
    assert stopped.value.code == 143
    assert signal.getsignal(signal.SIGTERM) is previous
    train(tiny(), tmp_path / "parts", resume=True, progress=False)
    train(tiny(), tmp_path / "whole", progress=False)
    same_run(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.parametrize(
    ("number", "error", "steps"), [(signal.SIGINT, KeyboardInterrupt, 3), (signal.SIGTERM, SystemExit, 4)]
)
def test_a_second_interrupt_acts_at_once_and_a_second_sigterm_changes_nothing(
    tiny, tmp_path, before_step, number, error, steps
):
    def twice(learner):
        for _ in range(2):
            os.kill(os.getpid(), number)
            time.sleep(0.5)  # two signals that wait are one

    before_step(4, twice)
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where a shell began us with "&"
    try:
        with pytest.raises(error):
            train(tiny(), tmp_path, progress=False)
    finally:
        signal.signal(signal.SIGINT, previous)
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["progress"]["step"] == steps


def test_stopped_while_evaluating(tiny, tmp_path, monkeypatch, same_run):
    config, evaluate = tiny(), trainer.evaluate
    train(config, tmp_path / "whole", progress=False)

    def interrupted(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGINT)
        return evaluate(*args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(trainer, "evaluate", interrupted)
        train(config, tmp_path / "parts", progress=False)
    train(config, tmp_path / "parts", resume=True, progress=False)
    same_run(tmp_path / "whole", tmp_path / "parts")


KILLED = """
import json, os, signal, sys
from pathlib import Path
from glcan.learner import Learner
from glcan.training import RunConfig, train

step, taken = Learner.step, 0

def counted(self, *batch):
    global taken
    taken += 1
    if taken == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, *batch)

Learner.step = counted
train(RunConfig(**json.loads(sys.argv[1])), Path(sys.argv[2]), progress=False)
"""


def test_killed_in_the_middle_of_an_epoch(tiny, tmp_path, same_run):
    config = tiny()
    train(config, tmp_path / "whole", progress=False)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", KILLED, config.model_dump_json(), str(tmp_path / "parts")]
    assert subprocess.run(command, env=environment, check=False).returncode == -signal.SIGKILL
    assert len((tmp_path / "parts/metrics.jsonl").read_text().splitlines()) == 1
    assert not (tmp_path / "parts/model.safetensors").exists()
    train(config, tmp_path / "parts", resume=True, progress=False)
    same_run(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.parametrize("method", ["append_record", "write_history"])
def test_killed_around_the_line_of_metrics(tiny, tmp_path, monkeypatch, same_run, method):
    config = tiny()
    train(config, tmp_path / "whole", progress=False)
    with monkeypatch.context() as patch, pytest.raises(OSError, match="disk full"):
        patch.setattr(RunDirectory, method, lambda *args: (_ for _ in ()).throw(OSError("disk full")))
        train(config, tmp_path / "parts", progress=False)
    with (tmp_path / "parts/metrics.jsonl").open("a") as file:
        file.write('{"epoch": 99')  # a line that was cut off
    train(config, tmp_path / "parts", resume=True, progress=False)
    same_run(tmp_path / "whole", tmp_path / "parts")


def test_killed_while_the_checkpoint_is_written(tiny, tmp_path, monkeypatch, same_run):
    config, save, calls = tiny(), torch.save, []
    train(config, tmp_path / "whole", progress=False)

    def broken(state, path):
        calls.append(path)
        save(state, path)
        if len(calls) == 2:
            Path(path).write_bytes(Path(path).read_bytes()[:1000])
            raise OSError("disk full")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="disk full"):
        patch.setattr(torch, "save", broken)
        train(config, tmp_path / "parts", progress=False)
    assert sorted(p.name for p in (tmp_path / "parts").glob(".*.tmp")) == []
    train(config, tmp_path / "parts", resume=True, progress=False)
    same_run(tmp_path / "whole", tmp_path / "parts")


def test_a_seed_is_of_every_generator(tiny, tmp_path, same_run):
    """A run does not depend on what was drawn before it, by Python, NumPy or torch."""
    for name in ("one", "two"):
        random.random()
        np.random.rand()
        torch.rand(1)
        train(tiny(epochs=1, model="tiny_model:noisy", method="e2e"), tmp_path / name, progress=False)
    same_run(tmp_path / "one", tmp_path / "two")


def test_resume_begins_a_run_where_there_is_none(tiny, tmp_path):
    summary = train(tiny(epochs=1), tmp_path / "new", resume=True, progress=False)
    assert summary.epochs == 1


def test_a_complete_run_is_reported_and_left_alone(tiny, tmp_path):
    config = tiny(epochs=1)
    first = train(config, tmp_path, progress=False)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    again = train(config, tmp_path, resume=True, progress=False)
    assert isinstance(again, Summary)
    assert again == first
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before


def test_place_may_change_settings_may_not(tiny, tmp_path, before_step):
    before_step(2, send(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        train(tiny(epochs=1), tmp_path, progress=False)
    with pytest.raises(RunError, match=r"lr: 0.05 there, 0.5 asked"):
        train(tiny(epochs=1, lr=0.5), tmp_path, resume=True, progress=False)
    train(tiny(epochs=1, device="auto", workers=1), tmp_path, resume=True, progress=False)
    assert json.loads((tmp_path / "config.json").read_text())["config"]["device"] == "cpu"
