"""A budget is kept as cheaply as it goes, or refused with a reason."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
from tests.planning.models import MODELS, OPTIMIZER, batch
from torch.optim import AdamW

import glcan
from glcan import strategies
from glcan.cost.step import measure_step
from glcan.errors import ConfigError
from glcan.planning.bench import Bench


@pytest.fixture(scope="module")
def known() -> dict[str, int]:
    """Peaks of methods with 64 images."""
    found = glcan.plan(MODELS["resnet"](), sample=batch(64), method="glcan:4", optimizer=OPTIMIZER)
    return {name: cost.peak_bytes for name, cost in found.baselines.items()} | {"glcan:4": found.cost.peak_bytes}


def test_a_budget_is_kept_as_cheaply_as_it_goes(known: dict[str, int]) -> None:
    network, sample = MODELS["resnet"](), batch(64)
    last = 0.0
    for share in (1.0, 0.8, 0.6, 0.4, 0.36):
        limit = int(share * known["e2e"])
        found = glcan.plan(network, sample=sample, method="glcan", memory=limit, optimizer=OPTIMIZER)
        assert found.cost.peak_bytes <= limit
        assert found.memory == limit
        assert found.method == f"glcan:{found.plan.blocks}"
        assert found.family == "local"
        # less memory never costs less compute, up to what counts as the same; less than end-to-end training is nothing
        whole = found.baselines["e2e"].flops
        assert found.cost.flops >= min(last, whole) - 0.05 * whole
        last = found.cost.flops
        if share == 1.0:
            assert found.plan.blocks == 1
            assert found.cost.flops == found.baselines["e2e"].flops
        if found.cost.peak_bytes > known["glcan:4"]:
            assert found.plan.blocks <= 4


@pytest.mark.parametrize("method", ["glcan", "predsim"])
def test_what_candidates_cost_is_foreseen(method: str) -> None:
    network, sample = MODELS["resnet"](), batch(64)
    bench = Bench(network, "classification", sample, optimizer=OPTIMIZER)
    strategy = strategies.create(method, "classification")
    whole = bench.run("e2e").cost
    setting = bench.setting(strategy, 1)
    with bench.context():
        candidates = list(strategy.candidates(setting, whole.activation_peak_bytes // 2, 4))
    assert len(candidates) > 3
    assert any(candidate.wanted.recompute for candidate in candidates)
    for candidate in candidates:
        found = bench.run(f"{method}:{candidate.blocks}", None, candidate.wanted)
        assert candidate.extra == pytest.approx(found.cost.flops / whole.flops - 1, abs=0.03)


def test_recomputation_is_used_where_it_is_cheaper_than_cuts() -> None:
    # full-width auxiliary networks cost more than computing a block twice
    network, sample = MODELS["resnet"](), batch(64)
    options: dict[str, Any] = {"optimizer": OPTIMIZER, "baselines": ()}
    whole = glcan.plan(network, sample=sample, method="man:1", recompute=True, **options)
    assert whole.plan.recompute == ("block1",)
    found = glcan.plan(network, sample=sample, method="man", memory=int(1.02 * whole.cost.peak_bytes), **options)
    assert found.plan.recompute
    assert found.cost.peak_bytes <= 1.02 * whole.cost.peak_bytes
    assert found.cost.flops <= 1.05 * whole.cost.flops


def test_what_cannot_fit_is_explained() -> None:
    network, sample = MODELS["resnet"](), batch(64)
    with pytest.raises(ConfigError) as caught:
        glcan.plan(network, sample=sample, method="glcan", memory="6MiB", optimizer=OPTIMIZER)
    message = str(caught.value)
    assert "No plan fits 6 MiB" in message
    assert "of activations in block" in message
    assert "a batch of about" in message
    assert "the same batch in about" in message
    assert "bf16" in message
    with pytest.raises(ConfigError, match="parameters, optimizer state"):
        adamw = partial(AdamW, lr=1e-3)
        glcan.plan(network, sample=sample, method="glcan", memory="1MiB", optimizer=adamw)


def test_a_budget_of_two_blocks_is_kept_by_two_blocks() -> None:
    options: dict[str, Any] = {"sample": batch(128), "optimizer": OPTIMIZER, "baselines": ()}
    two = glcan.plan(MODELS["resnet"](), method="glcan:2", **options)
    limit = int(1.05 * two.cost.peak_bytes)
    found = glcan.plan(MODELS["resnet"](), method="glcan", memory=limit, **options)
    assert found.plan.blocks == 2, "more cost about the same, and fewer lose less accuracy"
    assert found.cost.peak_bytes <= limit


def test_a_budget_with_a_number_of_blocks_and_with_accumulation() -> None:
    network, sample = MODELS["resnet"](), batch(64)
    options: dict[str, Any] = {"sample": sample, "optimizer": OPTIMIZER, "baselines": ()}
    plain = glcan.plan(network, method="glcan:3+accumulate:2", **options)
    limit = plain.cost.peak_bytes
    found = glcan.plan(network, method="glcan:3+accumulate:2", memory=limit, **options)
    assert (found.method, found.plan.blocks) == ("glcan:3+accumulate:2", 3)
    assert found.cost.peak_bytes <= limit
    any_number = glcan.plan(network, method="glcan+accumulate:2", memory=limit, **options)
    assert any_number.method == f"glcan:{any_number.plan.blocks}+accumulate:2"
    assert any_number.cost.peak_bytes <= limit
    learner = glcan.Learner(network, sample=sample, plan=any_number, optimizer=OPTIMIZER)
    assert measure_step(learner, *sample).peak_bytes == pytest.approx(any_number.cost.peak_bytes, rel=0.01)


@pytest.mark.parametrize("method", ["e2e", "checkpoint", "selective"])
def test_a_method_of_one_plan_has_nothing_to_search(method: str, known: dict[str, int]) -> None:
    options: dict[str, Any] = {"sample": batch(64), "method": method, "optimizer": OPTIMIZER, "baselines": ()}
    found = glcan.plan(MODELS["resnet"](), memory=known[method], **options)
    assert found.cost.peak_bytes == known[method]
    with pytest.raises(ConfigError, match="No plan fits"):
        glcan.plan(MODELS["resnet"](), memory=known[method] - 1, **options)


def test_a_learner_of_a_plan_keeps_its_budget(known: dict[str, int]) -> None:
    network, sample = MODELS["resnet"](), batch(64)
    limit = int(0.45 * known["e2e"])
    options: dict[str, Any] = {"sample": sample, "optimizer": OPTIMIZER, "baselines": ()}
    planned = glcan.plan(network, method="glcan", memory=limit, **options)
    learner = glcan.Learner(network, sample=sample, plan=planned, optimizer=OPTIMIZER)
    assert str(learner.method) == planned.method
    assert learner.plan.cuts == planned.plan.cuts
    assert learner.plan.recompute == planned.plan.recompute
    assert measure_step(learner, *sample).peak_bytes <= limit
    for method in ("glcan", "checkpoint"):
        planned = glcan.plan(network, method=method, memory="100GiB", **options)
        assert glcan.Learner(network, sample=sample, plan=planned, optimizer=OPTIMIZER).plan.blocks == 1


@pytest.mark.parametrize("method", ["e2e", "e2e+accumulate:2", "checkpoint", "checkpoint-sqrt", "selective", "glcan:3"])
def test_every_plan_gives_a_learner(method: str) -> None:
    """The plan's parts say what is recomputed, and the method says it again: both must be the same."""
    network, sample = MODELS["resnet"](), batch()
    planned = glcan.plan(network, sample=sample, method=method, optimizer=OPTIMIZER, baselines=())
    learner = glcan.Learner(network, sample=sample, plan=planned, optimizer=OPTIMIZER)
    assert (learner.plan.cuts, learner.plan.recompute) == (planned.plan.cuts, planned.plan.recompute)
    assert measure_step(learner, *sample).flops == planned.cost.flops


@pytest.mark.parametrize("other", [{"cuts": ["layer2.0"]}, {"recompute": True}], ids=str)
def test_a_budget_and_a_plan_decide_alone(other: dict[str, Any]) -> None:
    network, sample = MODELS["resnet"](), batch()
    with pytest.raises(ConfigError, match="not both"):
        glcan.plan(network, sample=sample, method="glcan", memory="1GiB", **other)
    planned = glcan.plan(network, sample=sample, method="glcan:2", baselines=())
    with pytest.raises(ConfigError, match="not both"):
        glcan.Learner(network, sample=sample, plan=planned, **other)


def test_auto_asks_a_cuda_device() -> None:
    with pytest.raises(ConfigError, match="on cpu"):
        glcan.plan(MODELS["resnet"](), sample=batch(), method="glcan", memory="auto")
