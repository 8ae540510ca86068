"""A tiny run that takes a second: 3 epochs of 3 steps on 96 of the embedded digits."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from glcan.learner import Learner
from glcan.training import RunConfig, read_metrics

IMPORTABLE = Path(__file__).parent / "importable"


@pytest.fixture(autouse=True)
def _own_models(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(IMPORTABLE)


@pytest.fixture
def tiny() -> Callable[..., RunConfig]:
    """RunConfig of the tiny run; keywords replace fields."""

    def config(**fields: Any) -> RunConfig:
        defaults = {"model": "tiny_model:tiny", "limit": 96, "val": 40, "batch": 32, "epochs": 3, "lr": 0.05}
        return RunConfig(**(defaults | {"method": "glcan:2", "device": "cpu"} | fields))

    return config


@pytest.fixture
def before_step(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, Callable[[Learner], object]], None]:
    """Arrange for an action right before the n-th optimizer step that is taken from now on (from 1)."""

    def arrange(number: int, action: Callable[[Learner], object]) -> None:
        step, taken = Learner.step, 0

        def counted(self: Learner, *batch: Any) -> Any:
            nonlocal taken
            taken += 1
            if taken == number:
                action(self)
            return step(self, *batch)

        monkeypatch.setattr(Learner, "step", counted)

    return arrange


def results(out: Path) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
    """What a run computed: its weights, and its metrics without times."""
    timed = {"train_seconds", "images_per_second"}
    records = [{name: value for name, value in r.items() if name not in timed} for r in read_metrics(out)]
    return load_file(out / "model.safetensors"), records


def assert_same_run(one: Path, other: Path) -> None:
    (weights, records), (other_weights, other_records) = results(one), results(other)
    assert records == other_records
    assert weights.keys() == other_weights.keys()
    for name, tensor in weights.items():
        assert torch.equal(tensor, other_weights[name]), name


@pytest.fixture
def same_run() -> Callable[[Path, Path], None]:
    """Assert that two finished runs computed the same, bit for bit."""
    return assert_same_run
