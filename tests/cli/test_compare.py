"""`glcan compare`: what it hands over, and what it leaves behind."""

import json
import os
import signal
import time

import pytest
import torch

from glcan import report
from glcan.report import costs
from glcan.training import RunConfig, RunDirectory, read_metrics
from glcan.training.side_by_side import cpus


def test_compare_hands_over_what_was_given(glcan, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(report, "compare", lambda *args, **kwargs: calls.append((args, kwargs)))
    monkeypatch.setattr("glcan.report.tables.terminal", lambda comparison: "the table")
    monkeypatch.chdir(tmp_path)
    assert glcan("compare").exit_code == 0
    assert glcan("compare", "--batch", "4").exit_code == 0
    assert calls.pop()[0][1] == ["e2e", "checkpoint", "glcan:4", "selective"]
    quiet = glcan("compare", "--methods", "e2e, glcan:2", "--seeds", "3,4", "--lr", "0.2", "--quiet", "--jobs", "3")
    assert quiet.exit_code == 0
    assert "the table" in quiet.output
    (config, methods, seeds, out), options = calls[0]
    assert (config, seeds) == (RunConfig(), [0])
    assert methods == ["e2e", "checkpoint", "e2e+accumulate:4", "glcan:4", "selective"]
    assert str(out) == "runs/compare-digits-cifar_resnet20"
    assert options == {"progress": True, "share_exact": False, "jobs": 1 if torch.cuda.is_available() else 2 * cpus()}
    (config, methods, seeds, out), options = calls[1]
    assert (config.lr, methods, seeds, options) == (
        0.2,
        ["e2e", "glcan:2"],
        [3, 4],
        {"progress": False, "share_exact": False, "jobs": 3},
    )
    calls.clear()
    assert [glcan("compare", "detection", *flag).exit_code for flag in ([], ["--train-exact"])] == [0, 0]
    assert [options["share_exact"] for _, options in calls] == [True, False]
    refused = glcan("compare", "--seeds", "one")
    assert refused.exit_code == 2
    assert "--seeds 'one' is no list of whole numbers" in refused.stderr


def test_compare(glcan, tmp_path, monkeypatch):
    for name in ("MIN_ROUNDS", "MAX_ROUNDS", "WARMUP_ROUNDS"):
        monkeypatch.setattr(costs, name, 1)
    arguments = ["--limit", 64, "--batch", 32, "--epochs", 1, "--device", "cpu", "--share-exact", "--jobs", 1]
    result = glcan("compare", *arguments, "--methods", "e2e,glcan:4,selective,checkpoint", "--out", tmp_path)
    assert result.exit_code == 0, result.output
    comparison = json.loads((tmp_path / "comparison.json").read_text())
    rows = {method["name"]: method for method in comparison["methods"]}
    assert list(rows) == ["e2e", "glcan:4", "selective", "checkpoint"]
    assert [method["metric"]["same_as"] for method in comparison["methods"]] == [None, None, None, "e2e"]
    assert [method["family"] for method in comparison["methods"]] == ["exact", "local", "sampled", "exact"]
    assert rows["glcan:4"]["auxiliary_parameters"] > 0 == rows["selective"]["auxiliary_parameters"]
    assert (rows["glcan:4"]["blocks"], rows["selective"]["blocks"]) == (4, 1)
    (record,) = read_metrics(tmp_path / "glcan-4" / "seed0")
    assert list(record["train_loss"]) == ["block1", "block2", "block3", "block4"]
    assert not (tmp_path / "checkpoint").exists()
    assert comparison["methods"][1]["vs_e2e"]["activation_ratio"] < 1


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stopping_a_comparison_side_by_side(start, tmp_path, number, code):
    small = ["--limit", 96, "--batch", 32, "--epochs", 100000, "--device", "cpu", "--jobs", 2, "--out", tmp_path]
    process = start("compare", *small, "--methods", "e2e,glcan:2", start_new_session=True)
    runs = [RunDirectory(tmp_path / folder / "seed0") for folder in ("e2e", "glcan-2")]
    deadline = time.monotonic() + 100

    def epochs(run):
        return len(run.metrics.read_text().splitlines()) if run.checkpoint.exists() else 0

    # the first of ten has long been shown
    while min(map(epochs, runs)) < 10 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, number)  # as a terminal does
    _, errors = process.communicate(timeout=100)
    assert process.returncode == code, errors
    assert errors.endswith(f"Stopped. The same command with --out {tmp_path} continues.\n")
    assert "Traceback" not in errors
    assert "e2e, seed 0: epoch 1/100000" in errors
    for run in runs:
        assert torch.load(run.checkpoint, weights_only=True)["progress"]["step"] > 0
