"""The planner: what it predicts is what training needs, and a budget is kept or refused with a reason."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from tests import zoo
from tests.zoo import assert_equal
from torch import Tensor, nn
from torch.optim import SGD, AdamW

import glcan
from glcan import LocalLearner, measure_step
from glcan.errors import ConfigError, CutError
from glcan.cost.estimate import Estimate, measure_pieces
from glcan.models import create
from glcan.planner import largest_batches
from glcan.tasks import Classification

OPTIMIZER = partial(SGD, lr=0.05, momentum=0.9)
MODELS = {
    "resnet": lambda: create("cifar_resnet20"),
    "vit": lambda: zoo.timm("vit_tiny_patch16_224", img_size=32, patch_size=4, num_classes=10, depth=6, embed_dim=48),
    "convnext": lambda: zoo.timm(
        "convnext_atto", num_classes=10, depths=(1, 1, 2, 1), dims=(16, 24, 32, 48), drop_path_rate=0.1
    ),
}


def batch(count: int = 8) -> tuple[Tensor, Tensor]:
    return torch.randn(count, 3, 32, 32), torch.arange(count) % 10


class DataDependent(nn.Module):
    """Looks at values, which fake tensors do not have."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.body = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 10)

    def forward(self, images: Tensor) -> Tensor:
        features = self.stem(images)
        if float(features.detach().abs().max()) > 1e6:
            features = features / 2
        return self.head(self.body(features).relu().mean((2, 3)))


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("count", [4, 12])
@pytest.mark.parametrize(
    "options",
    [
        {"rule": "e2e"},
        {"rule": "checkpoint"},
        {"rule": "checkpoint-sqrt"},
        {"blocks": 3},
        {"blocks": 3, "recompute": True},
        {"blocks": 4, "recompute": ["block1"]},
    ],
    ids=str,
)
def test_predicted_is_measured(model: str, count: int, options: dict[str, Any]) -> None:
    network = MODELS[model]()
    sample = batch(count)
    forecast = glcan.plan(network, sample=sample, optimizer=OPTIMIZER, baselines=(), **options)
    learner = LocalLearner(network, sample=sample, optimizer=OPTIMIZER, **options)
    assert learner.plan.cuts == forecast.plan.cuts
    measured = measure_step(learner, *sample)
    assert forecast.cost.peak_bytes == pytest.approx(measured.peak_bytes, rel=0.01)
    assert forecast.cost.activation_peak_bytes == pytest.approx(measured.activation_peak_bytes, rel=0.01)
    assert forecast.cost.flops == measured.flops
    assert sum(forecast.cost.by_kind.values()) == forecast.cost.peak_bytes
    assert max(forecast.cost.block_peak_bytes) == forecast.cost.peak_bytes
    assert len(forecast.cost.block_peak_bytes) == forecast.plan.blocks


def test_without_an_optimizer_all_gradients_stay() -> None:
    network, sample = MODELS["resnet"](), batch()
    forecast = glcan.plan(network, sample=sample, blocks=3)
    learner = LocalLearner(network, sample=sample, blocks=3)
    assert forecast.cost.peak_bytes == pytest.approx(measure_step(learner, *sample).peak_bytes, rel=0.01)


def test_bfloat16_needs_less() -> None:
    network, sample = MODELS["resnet"](), batch()
    full = glcan.plan(network, sample=sample, blocks=3, optimizer=OPTIMIZER, baselines=())
    half = glcan.plan(network, sample=sample, blocks=3, optimizer=OPTIMIZER, baselines=(), autocast=torch.bfloat16)
    assert half.cost.activation_peak_bytes < 0.75 * full.cost.activation_peak_bytes


def test_a_model_of_another_type_is_planned_as_it_is() -> None:
    """Auxiliary networks are made as the model is: on its device, with its type."""
    sample = (torch.rand(8, 3, 32, 32, dtype=torch.float64), torch.zeros(8, dtype=torch.int64))
    model = create("cifar_resnet20", num_classes=10).double()
    options: dict[str, Any] = {"blocks": 4, "rule_options": {"joint": 0.0}, "optimizer": OPTIMIZER}
    predicted = glcan.plan(model, sample=sample, baselines=(), **options).cost
    learner = LocalLearner(model, sample=sample, **options)
    assert {p.dtype for p in learner.auxiliary.parameters()} == {torch.float64}
    assert predicted.peak_bytes == measure_step(learner, *sample).peak_bytes


def test_planning_changes_nothing() -> None:
    network = MODELS["resnet"]()
    before = copy.deepcopy(network.state_dict())
    generator = torch.get_rng_state()
    sample = batch()
    torch.set_rng_state(generator)
    glcan.plan(network, sample=sample, memory="100GiB", optimizer=OPTIMIZER)
    glcan.plan(network, sample=sample, blocks=4, optimizer=OPTIMIZER)
    assert torch.equal(torch.get_rng_state(), generator)
    assert_equal(network.state_dict(), before)
    assert all(p.grad is None for p in network.parameters())
    assert all("forward" not in vars(m) for m in network.modules())


def test_a_model_that_needs_values_is_planned_on_a_copy() -> None:
    network, sample = DataDependent(), batch()
    before = copy.deepcopy(network.state_dict())
    forecast = glcan.plan(network, sample=sample, blocks=2, optimizer=OPTIMIZER)
    assert_equal(network.state_dict(), before)
    assert all(p.grad is None for p in network.parameters())
    learner = LocalLearner(network, sample=sample, blocks=2, optimizer=OPTIMIZER)
    assert forecast.cost.peak_bytes == pytest.approx(measure_step(learner, *sample).peak_bytes, rel=0.01)


def test_the_forecast_as_json_and_text() -> None:
    forecast = glcan.plan(MODELS["resnet"](), sample=batch(), blocks=4, optimizer=OPTIMIZER)
    found = forecast.as_dict()
    assert found["blocks"] == 4
    assert len(found["cuts"]) == 3
    assert found["vs_e2e"]["peak_ratio"] == found["peak_bytes"] / found["baselines"]["e2e"]["peak_bytes"]
    assert set(found["vs_checkpoint"]) == {"checkpoint", "checkpoint-sqrt"}
    assert found["vs_checkpoint"]["checkpoint"]["flops_ratio"] < 1 < found["vs_e2e"]["flops_ratio"]
    text = str(forecast)
    assert "glcan:4" in text
    assert "checkpoint-sqrt" in text
    assert "(1.00×)" in text


# -- a budget ------------------------------------------------------------------------------------------------------


def peaks(network: nn.Module, sample: Any) -> dict[str, int]:
    found = glcan.plan(network, sample=sample, blocks=4, optimizer=OPTIMIZER)
    return {name: cost.peak_bytes for name, cost in found.baselines.items()} | {"glcan:4": found.cost.peak_bytes}


def test_a_budget_is_kept_as_cheaply_as_it_goes() -> None:
    network, sample = MODELS["resnet"](), batch(64)
    known = peaks(network, sample)
    last = 0.0
    for share in (1.0, 0.8, 0.6, 0.4, 0.36):
        limit = int(share * known["e2e"])
        found = glcan.plan(network, sample=sample, memory=limit, optimizer=OPTIMIZER)
        assert found.cost.peak_bytes <= limit
        assert found.memory == limit
        # less memory never costs less compute, up to what counts as the same; less than end-to-end training is nothing
        whole = found.baselines["e2e"].flops
        assert found.cost.flops >= min(last, whole) - 0.05 * whole
        last = found.cost.flops
        if share == 1.0:
            assert found.plan.blocks == 1
            assert found.cost.flops == found.baselines["e2e"].flops
        if found.cost.peak_bytes > known["glcan:4"]:
            assert found.plan.blocks <= 4


def test_recomputation_is_used_where_it_is_cheaper_than_cuts() -> None:
    # full-width auxiliary networks cost more than computing a block twice
    network, sample = MODELS["resnet"](), batch(64)
    alone = {"unit": "backbone", "joint": 0.0}
    options: dict[str, Any] = {"rule_options": alone, "optimizer": OPTIMIZER, "baselines": ()}
    whole = glcan.plan(network, sample=sample, blocks=1, recompute=True, **options)
    assert whole.plan.recompute == ("block1",)
    found = glcan.plan(network, sample=sample, memory=int(1.02 * whole.cost.peak_bytes), **options)
    assert found.plan.recompute
    assert found.cost.peak_bytes <= 1.02 * whole.cost.peak_bytes
    assert found.cost.flops <= 1.05 * whole.cost.flops


def test_what_cannot_fit_is_explained() -> None:
    network, sample = MODELS["resnet"](), batch(64)
    with pytest.raises(ConfigError) as caught:
        glcan.plan(network, sample=sample, memory="6MiB", optimizer=OPTIMIZER)
    message = str(caught.value)
    assert "No plan fits 6 MiB" in message
    assert "of activations in block" in message
    assert "a batch of about" in message
    assert "the same batch in about" in message
    assert "bf16" in message
    with pytest.raises(ConfigError, match="parameters, optimizer state"):
        glcan.plan(network, sample=sample, memory="1MiB", optimizer=partial(AdamW, lr=1e-3))


def test_a_budget_that_local_learning_keeps_is_kept_with_joint_images() -> None:
    network, sample = MODELS["resnet"](), batch(64)
    options: dict[str, Any] = {"optimizer": OPTIMIZER, "baselines": ()}
    local = glcan.plan(network, sample=sample, blocks=8, rule_options={"joint": 0.0}, **options)
    found = glcan.plan(network, sample=sample, memory=local.cost.peak_bytes, **options)
    assert found.cost.peak_bytes <= local.cost.peak_bytes
    with pytest.raises(ConfigError, match=r"fewer joint images than \d+ of the batch"):
        glcan.plan(network, sample=sample, memory=local.cost.peak_bytes // 2, rule_options={"joint": 0.5}, **options)


def test_a_budget_is_kept_by_few_blocks_where_most_images_are_joint() -> None:
    options: dict[str, Any] = {"optimizer": OPTIMIZER, "baselines": ()}
    two = glcan.plan(create("cifar_resnet20"), sample=batch(128), blocks=2, **options)
    found = glcan.plan(create("cifar_resnet20"), sample=batch(128), memory=two.cost.peak_bytes, **options)
    assert found.plan.blocks == 2
    assert found.cost.peak_bytes <= two.cost.peak_bytes


@pytest.mark.parametrize(
    ("blocks", "share", "by_gradient"), [(2, 0.875, False), (4, 0.875, False), (4, 0.5, True), (8, 0.5, True)]
)
def test_the_flops_of_joint_images_are_foreseen(blocks: int, share: float, by_gradient: bool) -> None:
    network, sample = create("cifar_resnet20"), batch(128)
    options = {"joint_by": "gradient" if by_gradient else "order"}
    learner = LocalLearner(network, sample=sample, blocks=blocks, rule_options=options)
    pieces = measure_pieces(network, (sample[0],), {}, learner.profile)
    extra = Estimate(learner.profile, pieces).extra_flops_alone(learner.plan, share, by_gradient)
    whole = measure_step(LocalLearner(network, sample=sample, rule="e2e"), *sample).flops
    assert extra / whole == pytest.approx(measure_step(learner, *sample).flops / whole - 1, abs=0.005)


def test_a_baseline_has_nothing_to_search() -> None:
    network, sample = MODELS["resnet"](), batch(64)
    known = peaks(network, sample)
    found = glcan.plan(network, sample=sample, memory=known["e2e"], rule="e2e", optimizer=OPTIMIZER)
    assert found.cost.peak_bytes == known["e2e"]
    with pytest.raises(ConfigError, match="No plan fits"):
        glcan.plan(network, sample=sample, memory=known["e2e"] - 1, rule="e2e", optimizer=OPTIMIZER)


def test_a_learner_with_a_budget_keeps_it() -> None:
    network, sample = MODELS["resnet"](), batch(64)
    limit = int(0.45 * peaks(network, sample)["e2e"])
    learner = LocalLearner(network, sample=sample, memory=limit, optimizer=OPTIMIZER)
    assert learner.forecast is not None
    assert learner.plan.cuts == learner.forecast.plan.cuts
    assert learner.plan.recompute == learner.forecast.plan.recompute
    assert measure_step(learner, *sample).peak_bytes <= limit
    whole = LocalLearner(network, sample=sample, memory="100GiB", optimizer=OPTIMIZER)
    assert whole.plan.blocks == 1
    baseline = LocalLearner(network, sample=sample, memory="100GiB", rule="checkpoint", optimizer=OPTIMIZER)
    assert baseline.plan.blocks == 1


@pytest.mark.parametrize("other", [{"blocks": 2}, {"cuts": ["layer2.0"]}, {"recompute": True}], ids=str)
def test_a_budget_decides_alone(other: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="not both"):
        LocalLearner(MODELS["resnet"](), sample=batch(), memory="1GiB", **other)


def test_auto_asks_a_cuda_device() -> None:
    with pytest.raises(ConfigError, match="on cpu"):
        LocalLearner(MODELS["resnet"](), sample=batch(), memory="auto")


def test_something_has_to_be_asked() -> None:
    with pytest.raises(CutError, match="blocks=K"):
        glcan.plan(MODELS["resnet"](), sample=batch())
    with pytest.raises(ConfigError, match="sample is missing"):
        glcan.plan(MODELS["resnet"](), blocks=2)


# -- the largest batch ---------------------------------------------------------------------------------------------


def test_the_largest_batch_fits_and_one_more_does_not() -> None:
    network, task = MODELS["resnet"](), Classification()
    limit = 60 * 2**20

    def sample(count: int) -> Any:
        return task.example(count, 3, (32, 32))

    found = {row.method: row for row in largest_batches(network, task, sample, limit, blocks=(4,), optimizer=OPTIMIZER)}
    assert list(found) == ["e2e", "checkpoint", "checkpoint-sqrt", "glcan:4", "glcan:4+recompute"]
    assert found["glcan:4"].batch > 1.5 * found["e2e"].batch
    for name, options in {"e2e": {"rule": "e2e"}, "checkpoint": {"rule": "checkpoint"}}.items():
        row = found[name]
        for count, fits in ((row.batch, True), (row.batch + 1, False)):
            peak = glcan.plan(
                network, sample=sample(count), optimizer=OPTIMIZER, baselines=(), **options
            ).cost.peak_bytes
            assert (peak <= limit) is fits
        assert row.peak_bytes <= limit


def test_no_image_fits_a_byte() -> None:
    task = Classification()
    found = largest_batches(
        MODELS["resnet"](), task, lambda n: task.example(n, 3, (32, 32)), 1, blocks=(), optimizer=OPTIMIZER
    )
    assert [row.batch for row in found] == [0, 0, 0]
