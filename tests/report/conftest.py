"""A comparison made up for the tests of tables and plots; no number in it was measured."""

from typing import Any

import pytest


def method(name: str, blocks: int, mean: float, std: float | None, scale: float) -> dict[str, Any]:
    seeds = 1 if std is None else 2
    return {
        "name": name,
        "family": "local" if blocks > 1 else "exact",
        "blocks": blocks,
        "metric": {
            "name": "test_accuracy",
            "unit": "fraction",
            "mean": mean,
            "std": std,
            "values": [mean] * seeds,
            "same_as": None,
        },
        "beside": [],
        "peak_bytes": int(100 * 2**20 * scale),
        "activation_peak_bytes": int(80 * 2**20 * scale),
        "by_kind": {"activations": int(80 * 2**20 * scale)},
        "cuda_peak_bytes": None,
        "step_seconds": 0.1234 * scale,
        "step_seconds_quartiles": [0.12 * scale, 0.13 * scale],
        "flops_per_step": int(1e9 * scale),
        "parameters": 1000,
        "auxiliary_parameters": 12345 if blocks > 1 else 0,
        "cuts": [],
        "curve": {
            "name": "val_accuracy",
            "unit": "fraction",
            "epochs": [1, 2, 3],
            "values": [[mean - 0.2 - 0.01 * i, mean - 0.1, mean] for i in range(seeds)],
        },
        "vs_e2e": {
            "metric_delta": mean - 0.95,
            "peak_ratio": scale,
            "activation_ratio": scale,
            "time_ratio": scale,
            "flops_ratio": scale,
        },
    }


@pytest.fixture
def comparison() -> dict[str, Any]:
    return {
        "task": "classification",
        "model": "cifar_resnet20",
        "dataset": "digits",
        "epochs": 3,
        "seeds": [0, 1],
        "methods": [
            method("e2e", 1, 0.95, 0.01, 1.0),
            method("checkpoint", 1, 0.95, 0.01, 0.5),
            method("glcan:4", 4, 0.94, 0.02, 0.25),
        ],
        "references": [],
        "timing": {"batch": 64, "warmup_rounds": 2, "rounds": 7},
        "initial_weights_sha256": "0" * 64,
        "config": {},
        "environment": {"versions": {"torch": "2.8"}, "device": "cpu", "gpu": None},
    }
