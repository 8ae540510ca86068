"""The planner: what it predicts is what training needs, and it leaves nothing behind."""

from __future__ import annotations

import contextlib
import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.planning.models import MODELS, OPTIMIZER, DataDependent, batch
from tests.zoo import assert_equal
from torch import nn

import glcan
from glcan import strategies
from glcan.cost.step import measure_step
from glcan.errors import ConfigError, CutError
from glcan.models import create
from glcan.planning.bench import Bench

METHODS: list[dict[str, Any]] = [
    {"method": "e2e"},
    {"method": "e2e+accumulate:2"},
    {"method": "checkpoint"},
    {"method": "checkpoint-sqrt"},
    {"method": "selective"},
    {"method": "glcan:3"},
    {"method": "glcan:3+accumulate:2"},
    {"method": "glcan:3", "recompute": True},
    {"method": "glcan:4", "recompute": ["block1"]},
]


@pytest.mark.parametrize(("model", "count"), [("resnet", 12), ("vit", 4), ("convnext", 12)])
@pytest.mark.parametrize("options", METHODS, ids=str)
def test_predicted_is_measured(model: str, count: int, options: dict[str, Any]) -> None:
    network = MODELS[model]()
    sample = batch(count)
    forecast = glcan.plan(network, sample=sample, optimizer=OPTIMIZER, baselines=(), **options)
    learner = glcan.Learner(network, sample=sample, optimizer=OPTIMIZER, **options)
    assert (learner.plan.cuts, learner.plan.recompute) == (forecast.plan.cuts, forecast.plan.recompute)
    assert forecast.auxiliary_parameters == sum(p.numel() for p in learner.auxiliary.parameters())
    assert forecast.family == strategies.family_of(learner.method.base)
    measured = measure_step(learner, *sample)
    assert forecast.cost.peak_bytes == pytest.approx(measured.peak_bytes, rel=0.01)
    assert forecast.cost.activation_peak_bytes == pytest.approx(measured.activation_peak_bytes, rel=0.01)
    assert forecast.cost.flops == measured.flops
    assert sum(forecast.cost.by_kind.values()) == forecast.cost.peak_bytes
    assert max(forecast.cost.block_peak_bytes) == forecast.cost.peak_bytes
    assert len(forecast.cost.block_peak_bytes) == forecast.plan.blocks


def test_without_an_optimizer_all_gradients_stay() -> None:
    network, sample = MODELS["resnet"](), batch()
    forecast = glcan.plan(network, sample=sample, method="glcan:3")
    learner = glcan.Learner(network, sample=sample, method="glcan:3")
    assert forecast.cost.peak_bytes == pytest.approx(measure_step(learner, *sample).peak_bytes, rel=0.01)


def test_bfloat16_needs_less() -> None:
    options: dict[str, Any] = {"sample": batch(), "method": "glcan:3", "optimizer": OPTIMIZER, "baselines": ()}
    full = glcan.plan(MODELS["resnet"](), **options)
    half = glcan.plan(MODELS["resnet"](), autocast=torch.bfloat16, **options)
    assert half.cost.activation_peak_bytes < 0.75 * full.cost.activation_peak_bytes


def test_a_model_of_another_type_is_planned_as_it_is() -> None:
    """Auxiliary networks are made as the model is: on its device, with its type."""
    sample = (torch.rand(8, 3, 32, 32, dtype=torch.float64), torch.zeros(8, dtype=torch.int64))
    model = create("cifar_resnet20", num_classes=10).double()
    options: dict[str, Any] = {"method": "glcan:4", "optimizer": OPTIMIZER}
    predicted = glcan.plan(model, sample=sample, baselines=(), **options).cost
    learner = glcan.Learner(model, sample=sample, **options)
    assert {p.dtype for p in learner.auxiliary.parameters()} == {torch.float64}
    assert predicted.peak_bytes == measure_step(learner, *sample).peak_bytes


@pytest.mark.parametrize("method", ["e2e", "checkpoint", "selective", "glcan:3"])
@pytest.mark.parametrize("on_meta", ["model", "model and sample"])
def test_a_model_on_the_meta_device(method: str, on_meta: str) -> None:
    """It has all that a plan needs: the plan is that of the same model on the CPU."""
    sample = batch()
    options: dict[str, Any] = {"method": method, "optimizer": OPTIMIZER, "baselines": ("e2e",)}
    wanted = glcan.plan(MODELS["resnet"](), sample=sample, **options)
    with torch.device("meta"):
        model = MODELS["resnet"]()
    if on_meta != "model":
        sample = tuple(t.to("meta") for t in sample)
    found = glcan.plan(model, sample=sample, **options)
    assert found == wanted
    assert all(p.is_meta and p.grad is None for p in model.parameters())


def test_a_budget_for_a_model_on_the_meta_device() -> None:
    options: dict[str, Any] = {"sample": batch(64), "method": "glcan", "optimizer": OPTIMIZER, "baselines": ()}
    whole = glcan.plan(MODELS["resnet"](), **{**options, "method": "e2e"}).cost.peak_bytes
    wanted = glcan.plan(MODELS["resnet"](), memory=whole // 2, **options)
    with torch.device("meta"):
        model = MODELS["resnet"]()
    assert glcan.plan(model, memory=whole // 2, **options) == wanted


def test_planning_changes_nothing() -> None:
    network = MODELS["resnet"]()
    before = copy.deepcopy(network.state_dict())
    generator = torch.get_rng_state()
    sample = batch()
    torch.set_rng_state(generator)
    glcan.plan(network, sample=sample, method="glcan", memory="100GiB", optimizer=OPTIMIZER)
    glcan.plan(network, sample=sample, method="glcan:4", optimizer=OPTIMIZER)
    assert torch.equal(torch.get_rng_state(), generator)
    assert_equal(network.state_dict(), before)
    assert all(p.grad is None for p in network.parameters())
    assert all("forward" not in vars(m) for m in network.modules())


def test_a_model_that_needs_values_is_planned_on_a_copy() -> None:
    network, sample = DataDependent(), batch()
    before = copy.deepcopy(network.state_dict())
    forecast = glcan.plan(network, sample=sample, method="glcan:2", optimizer=OPTIMIZER)
    assert_equal(network.state_dict(), before)
    assert all(p.grad is None for p in network.parameters())
    with pytest.warns(UserWarning, match="DataDependent cannot be looked at without computing"):
        learner = glcan.Learner(network, sample=sample, method="glcan:2", optimizer=OPTIMIZER)
    assert forecast.cost.peak_bytes == pytest.approx(measure_step(learner, *sample).peak_bytes, rel=0.01)


@pytest.mark.parametrize("build", [MODELS["resnet"], DataDependent])
@pytest.mark.parametrize("options", [{"method": "glcan:2"}, {"method": "glcan", "memory": "200KiB"}], ids=str)
def test_nothing_of_a_plan_stays_alive(
    build: Callable[[], nn.Module], options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[weakref.ref[Any]] = []
    init = Bench.__init__

    def watched(self: Bench, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        made.extend(map(weakref.ref, (self, self.model, next(self.model.parameters()))))

    monkeypatch.setattr(Bench, "__init__", watched)
    network = build()
    own = weakref.ref(network)
    too_little = pytest.raises(ConfigError, match="No plan fits") if "memory" in options else contextlib.nullcontext()
    with too_little:
        glcan.plan(network, sample=batch(), optimizer=OPTIMIZER, **options)
    del too_little
    del network
    gc.collect()
    assert len(made) == 3
    assert [reference() for reference in (*made, own)] == [None] * 4


def test_the_forecast_as_json_and_text() -> None:
    forecast = glcan.plan(MODELS["resnet"](), sample=batch(), method="glcan:4", optimizer=OPTIMIZER)
    found = forecast.as_dict()
    assert (found["method"], found["family"]) == ("glcan:4", "local")
    assert found["blocks"] == 4
    assert len(found["cuts"]) == 3
    assert found["auxiliary_parameters"] == forecast.auxiliary_parameters > 0
    assert found["vs_e2e"]["peak_ratio"] == found["peak_bytes"] / found["baselines"]["e2e"]["peak_bytes"]
    assert set(found["vs_checkpoint"]) == {"checkpoint", "checkpoint-sqrt"}
    assert found["vs_checkpoint"]["checkpoint"]["flops_ratio"] < 1 < found["vs_e2e"]["flops_ratio"]
    text = str(forecast)
    assert text.startswith(f"glcan:4 (local): 4 blocks, auxiliary networks with {forecast.auxiliary_parameters:,} par")
    for baseline in ("e2e", "checkpoint", "checkpoint-sqrt", "e2e+accumulate:4", "selective"):
        assert f"\n{baseline} " in text
        assert found["baselines"][baseline]["flops_per_step"] > 0
    assert "(1.00×)" in text
    assert text.count("\nglcan:4 ") == 1


@pytest.mark.parametrize("method", ["e2e", "checkpoint", "selective", "e2e+accumulate:2"])
def test_a_method_that_is_its_own_baseline_stands_in_the_table_once(method: str) -> None:
    forecast = glcan.plan(MODELS["resnet"](), sample=batch(), method=method, optimizer=OPTIMIZER)
    assert sum(row[0] == method for row in forecast.rows()) == 1
    assert forecast.as_dict()["auxiliary_parameters"] == 0
    assert str(forecast).startswith(f"{method} ({forecast.family}): ")


def test_the_method_does_not_depend_on_the_size_of_the_sample() -> None:
    plans = [glcan.plan(MODELS["resnet"](), sample=batch(n), method="glcan:4", baselines=()) for n in (2, 8, 16, 64)]
    assert {(p.method, p.family, p.auxiliary_parameters) for p in plans} == {
        ("glcan:4", "local", plans[0].auxiliary_parameters)
    }
    assert plans[0].auxiliary_parameters > 0


def test_something_has_to_be_asked() -> None:
    with pytest.raises(CutError, match="'glcan' has no number of blocks: write 'glcan:4'"):
        glcan.plan(MODELS["resnet"](), sample=batch(), method="glcan")
    with pytest.raises(ConfigError, match="sample is missing"):
        glcan.plan(MODELS["resnet"](), method="glcan:2")
