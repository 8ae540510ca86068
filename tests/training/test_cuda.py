"""Runs on a CUDA device, for each task: they stop and go on. Skipped where there is no such device."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from glcan.data import scenes
from glcan.training import RunConfig, train

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

RUNS: dict[str, dict[str, Any]] = {
    "classification": {"model": "cifar_resnet20", "limit": 96, "val": 40, "batch": 32, "epochs": 2, "lr": 0.05},
    "classification-bf16": {"limit": 96, "val": 40, "batch": 32, "epochs": 2, "precision": "bf16"},
    "detection": {
        "task": "detection",
        "model_options": {"width": 8, "channels": 32},
        "image_size": 64,
        "limit": 12,
        "val": 6,
        "batch": 4,
        "epochs": 2,
    },
    "super-resolution": {
        "task": "super-resolution",
        "model_options": {"blocks": 4, "channels": 8},
        "crops": 2,
        "patch": 24,
        "batch": 8,
        "epochs": 2,
    },
}


@pytest.mark.parametrize("cuda_graph", [False, True], ids=["", "recorded"])
@pytest.mark.parametrize("method", ["glcan:4", "selective", "checkpoint"])
@pytest.mark.parametrize("name", RUNS)
def test_a_run_stops_and_goes_on(
    name: str,
    method: str,
    cuda_graph: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    before_step: Callable[..., None],
) -> None:
    if cuda_graph and name == "detection":
        pytest.skip("detection is not recorded")
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    defaults = scenes.Scenes.__init__.__kwdefaults__ | {"train": 24, "test": 6}
    monkeypatch.setattr(scenes.Scenes.__init__, "__kwdefaults__", defaults)
    config = RunConfig(**RUNS[name] | {"method": method, "device": "auto", "cuda_graph": cuda_graph})
    whole = train(config, tmp_path / "whole", progress=False)
    assert whole.peak_bytes > 0
    before_step(4, lambda learner: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path / "parts", progress=False)
    parts = train(config, tmp_path / "parts", resume=True, progress=False)
    assert parts.steps == whole.steps
    # Some kernels add in whatever order their threads arrive.
    for block, loss in whole.train_loss.items():
        assert parts.train_loss[block] == pytest.approx(loss, rel=1e-3)


def test_a_recorded_run_learns_what_another_learns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    settings = RUNS["classification"] | {"method": "glcan:4+start:0.3+finish:0.3", "device": "auto", "epochs": 4}
    found = [
        train(RunConfig(**settings, cuda_graph=cuda_graph), tmp_path / str(cuda_graph), progress=False)
        for cuda_graph in (False, True)
    ]
    for block, loss in found[0].train_loss.items():
        assert found[1].train_loss[block] == pytest.approx(loss, rel=1e-3)
