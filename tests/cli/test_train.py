"""`glcan train`: what it leaves behind, and how it ends."""

import os
import signal
import time

import pytest
import torch

from glcan.training import RunDirectory


def test_train(finished):
    summary = RunDirectory(finished).read_summary()
    config = summary.config
    assert (config.limit, config.batch, config.epochs, config.method, config.lr) == (96, 32, 2, "glcan:2", 0.05)
    assert (config.val, config.device, config.data) == (40, "cpu", "digits")
    assert (summary.method, summary.blocks) == ("glcan:2", 2)
    assert summary.auxiliary_parameters > 0


def test_train_again_is_refused_and_resume_reports(glcan, quick, finished):
    refused = glcan("train", *quick, "--val", 40, "--out", finished)
    assert refused.exit_code == 2
    assert refused.stderr.startswith("error: ")
    assert "already holds the same run; add --resume" in refused.stderr
    resumed = glcan("train", "--resume", "--out", finished)  # without repeating the settings
    assert resumed.exit_code == 0
    assert "test accuracy: " in resumed.output
    assert str(finished / "model.safetensors") in resumed.output


def test_without_out_a_new_directory_each_time(glcan, quick, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        assert glcan("train", *quick, "--epochs", 1, "--quiet").exit_code == 0
    names = sorted(path.name for path in (tmp_path / "runs").iterdir())
    assert names == ["digits-cifar_resnet20-glcan-2-seed0", "digits-cifar_resnet20-glcan-2-seed0-2"]


def test_options_of_every_kind(glcan, quick, tmp_path):
    arguments = ["--no-nesterov", "--channels-last", "--optimizer", "adamw", "--val", "0.25"]
    arguments += ["--cuts", "layer2.0, layer3.0"]
    arguments += ["--method", "glcan+accumulate:2"]
    for option in ("local=always", "budget=0.2", "look_ahead=0", "use_global=true"):
        arguments += ["--option", option]
    result = glcan("train", *quick[:4], "--epochs", 1, "--lr", 0.001, *arguments, "--out", tmp_path, "--device", "cpu")
    assert result.exit_code == 0, result.output
    summary = RunDirectory(tmp_path).read_summary()
    config = summary.config
    assert (config.nesterov, config.channels_last, config.optimizer, config.val) == (False, True, "adamw", 0.25)
    assert config.options == {"local": "always", "budget": 0.2, "look_ahead": 0, "use_global": True}
    assert summary.cuts == ["layer2.0", "layer3.0"]
    assert (summary.method, summary.blocks) == ("glcan:3+accumulate:2", 3)


def test_train_within_a_budget(glcan, tmp_path):
    quick = ["--limit", "64", "--batch", "32", "--epochs", "1", "--device", "cpu"]
    result = glcan("train", *quick, "--memory", "12MiB", "--out", tmp_path / "run")
    assert result.exit_code == 0, result.output
    summary = RunDirectory(tmp_path / "run").read_summary()
    assert summary.blocks > 1
    assert summary.method == f"glcan:{summary.blocks}"
    refused = glcan("train", *quick, "--memory", "2MiB", "--out", tmp_path / "small")
    assert refused.exit_code == 2
    assert "No plan fits 2 MiB" in refused.stderr
    assert not (tmp_path / "small").exists()


def test_a_mistake_in_a_process(start):
    process = start("train", "--method", "glcann:4")
    output, errors = process.communicate(timeout=100)
    assert process.returncode == 2
    assert output == ""
    assert errors.startswith("error: Unknown method 'glcann'. Did you mean 'glcan', 'auglocal'? ")
    assert errors.count("\n") == 1


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stopping_a_process(start, quick, tmp_path, number, code):
    process = start("train", *quick, "--epochs", 100000, "--out", tmp_path)
    deadline = time.monotonic() + 100
    while not (tmp_path / "checkpoint.pt").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(process.pid, number)
    _, errors = process.communicate(timeout=100)
    assert process.returncode == code, errors
    assert f"Continue with: glcan train --resume --out {tmp_path}" in errors
    assert "Traceback" not in errors
    progress = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["progress"]
    assert progress["step"] > 0
