"""A batch in parts whose gradients add up: the gradients, the memory, the run, and what is refused."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.test_joint import CUTS, Chain, batch, model
from tests.zoo import gradients
from torch import Tensor, nn
from torch.optim import SGD

from glcan import LocalLearner, measure_step
from glcan import plan as plan_step
from glcan.errors import ConfigError
from glcan.models import create
from glcan.report import compare
from glcan.report.methods import parse_method
from glcan.training import RunConfig, train

RULES: dict[str, dict[str, Any]] = {
    "e2e": {"rule": "e2e"},
    "checkpoint": {"rule": "checkpoint"},
    "glcan": {"cuts": CUTS},
    "dgl": {"rule": "dgl", "cuts": CUTS},
}
JOINT: dict[str, Any] = {"cuts": CUTS, "rule_options": {"joint": 0.5, "joint_weight": 0.25}}


def learner(chain: nn.Module, accumulate: int, **options: Any) -> LocalLearner:
    torch.manual_seed(2)
    return LocalLearner(chain, sample=batch(), accumulate=accumulate, **options)


def fixed(network: nn.Module) -> nn.Module:
    """Without normalisation over the batch: glcan's and dgl's auxiliary networks have it."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.eval()
    return network


def assert_close(found: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=tolerance, atol=tolerance)


def backward(accumulate: int, images: int, **options: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    chain = model()
    built = learner(chain, accumulate, **options)
    fixed(built.auxiliary)
    losses = built.backward(*batch(images))
    found = gradients(chain) | {f"auxiliary.{name}": value for name, value in gradients(built.auxiliary).items()}
    return losses, found


class TestGradients:
    @pytest.mark.parametrize("rule", RULES)
    @pytest.mark.parametrize(("parts", "images"), [(2, 8), (3, 7), (8, 8), (5, 3)])
    def test_equal_those_of_the_whole_batch(self, rule: str, parts: int, images: int) -> None:
        losses, found = backward(parts, images, **RULES[rule])
        expected_losses, expected = backward(1, images, **RULES[rule])
        assert found.keys() == expected.keys()
        assert_close(found, expected, tolerance=1e-12)
        assert_close(losses, expected_losses, tolerance=1e-12)

    @pytest.mark.parametrize(
        ("images", "parts"), [(64, 4), (63, 4), (33, 3), (17, 2), (16, 1), (5, 1), (2, 1), (80, 4)]
    )
    def test_the_images_that_end_an_epoch_are_in_no_smaller_parts(self, images: int, parts: int) -> None:
        net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 4))
        inputs, labels = torch.randn(80, 4), torch.randint(0, 4, (80,))
        built = LocalLearner(net, sample=(inputs[:64], labels[:64]), rule="e2e", accumulate=4)
        seen: list[int] = []
        net[0].register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
        assert built.backward(inputs[:images], labels[:images])["block1"].isfinite()
        assert len(seen) == parts
        assert sum(seen) == images
        assert max(seen) - min(seen) <= 1

    def test_end_to_end_steps_are_those_of_the_baseline(self) -> None:
        chain = model()
        built = learner(chain, 3, **RULES["glcan"])
        built.end_to_end = True
        built.backward(*batch())
        _, expected = backward(1, 8, rule="e2e")
        assert_close(gradients(chain), expected, tolerance=1e-12)

    def test_frozen_blocks_get_none(self) -> None:
        chain = model()
        built = learner(chain, 2, **RULES["glcan"])
        built.frozen = 1
        losses = built.backward(*batch())
        assert list(losses) == ["block2", "block3"]
        assert chain.stem.weight.grad is None
        assert chain.fc.weight.grad is not None

    def test_of_joint_images_are_the_mean_over_the_parts(self) -> None:
        _, found = backward(2, 8, **JOINT)
        images, labels = batch(8)
        mean: dict[str, Tensor] = {}
        for i in (0, 4):
            chain = model()
            built = learner(chain, 1, **JOINT)
            fixed(built.auxiliary)
            built.backward(images[i : i + 4], labels[i : i + 4])
            each = gradients(chain) | {f"auxiliary.{n}": g for n, g in gradients(built.auxiliary).items()}
            mean = {name: mean.get(name, 0) + gradient / 2 for name, gradient in each.items()}
        assert_close(found, mean, tolerance=1e-12)

    def test_come_on_top_of_those_that_are_there(self) -> None:
        chain = model()
        built = learner(chain, 2, rule="e2e")
        built.backward(*batch())
        once = {name: gradient.clone() for name, gradient in gradients(chain).items()}
        built.backward(*batch())
        assert_close(gradients(chain), {name: 2 * gradient for name, gradient in once.items()}, tolerance=1e-12)

    @pytest.mark.parametrize("rule", RULES)
    def test_a_step_updates_once(self, rule: str) -> None:
        chain, after = model(), []
        built = learner(chain, 4, optimizer=partial(SGD, lr=0.1), clip_norm=1e-3, **RULES[rule])
        fixed(built.auxiliary)
        built.after_block = after.append
        before = copy.deepcopy(chain.state_dict())
        built.step(*batch())
        assert after == list(built.names)
        change = torch.stack([(chain.state_dict()[n] - value).norm() for n, value in before.items()]).norm()
        blocks = built.plan.blocks
        assert 0 < float(change) <= 1e-4 * blocks**0.5 * 1.001  # each block moves by lr * clip_norm, once
        assert all(parameter.grad is None for parameter in chain.parameters())

    def test_a_scaler_scales_each_part(self) -> None:
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        chain = model()
        learner(chain, 4, rule="e2e").backward(*batch(), scaler=scaler)
        _, expected = backward(1, 8, rule="e2e")
        assert_close(gradients(chain), {name: 1024 * value for name, value in expected.items()}, tolerance=1e-9)


class TestMemory:
    def test_is_that_of_a_part(self) -> None:
        def cost(parts: int, images: int, **options: Any) -> int:
            torch.manual_seed(0)
            sample = (torch.zeros(images, 3, 32, 32), torch.zeros(images, dtype=torch.long))
            built = LocalLearner(Chain(), sample=sample, accumulate=parts, optimizer=partial(SGD, lr=0.1), **options)
            return measure_step(built, *sample).activation_peak_bytes

        for options in ({"rule": "e2e"}, {"blocks": 3}):
            whole, parts, part = cost(1, 64, **options), cost(4, 64, **options), cost(1, 16, **options)
            assert part <= parts < 0.35 * whole, options

    def test_the_planner_predicts_it(self) -> None:
        sample = (torch.zeros(16, 3, 32, 32), torch.zeros(16, dtype=torch.long))
        options: dict[str, Any] = {"blocks": 3, "accumulate": 4, "optimizer": partial(SGD, lr=0.1)}
        network = create("cifar_resnet20", num_classes=10)
        forecast = plan_step(network, sample=sample, **options)
        built = LocalLearner(network, sample=sample, **options)
        assert forecast.plan.cuts == built.plan.cuts
        assert forecast.cost.peak_bytes == pytest.approx(measure_step(built, *sample).peak_bytes, rel=1e-3)

    def test_a_plan_shows_what_accumulating_would_cost(self) -> None:
        sample = (torch.zeros(16, 3, 32, 32), torch.zeros(16, dtype=torch.long))
        network = create("cifar_resnet20", num_classes=10)
        forecast = plan_step(network, sample=sample, blocks=4)
        e2e, parts = forecast.baselines["e2e"], forecast.baselines["e2e+accumulate:4"]
        assert parts.activation_peak_bytes < 0.3 * e2e.activation_peak_bytes
        assert parts.flops == pytest.approx(e2e.flops, rel=1e-3)

    def test_a_budget_counts_with_parts(self) -> None:
        sample = (torch.zeros(64, 3, 32, 32), torch.zeros(64, dtype=torch.long))
        network = create("cifar_resnet20", num_classes=10)
        limit = plan_step(network, sample=sample, blocks=1).cost.peak_bytes // 2
        whole = plan_step(network, sample=sample, memory=limit)
        parts = plan_step(network, sample=sample, memory=limit, accumulate=4)
        assert whole.plan.blocks > 1 == parts.plan.blocks
        assert max(whole.cost.peak_bytes, parts.cost.peak_bytes) <= limit


class TestRun:
    def config(self, **changes: Any) -> RunConfig:
        settings: dict[str, Any] = {"model": "cifar_resnet20", "epochs": 2, "limit": 60, "batch": 20, "blocks": 2}
        return RunConfig(**settings | changes)

    def test_trains_and_says_so(self, tmp_path: Path) -> None:
        summary = train(self.config(accumulate=4), tmp_path, progress=False)
        assert summary.steps == 2 * 3
        assert summary.config.accumulate == 4

    def test_more_parts_than_images_are_refused(self) -> None:
        with pytest.raises(ConfigError, match=r"accumulate = 32 is more than batch = 20.*lower --accumulate"):
            self.config(accumulate=32)

    def test_a_comparison_has_it_as_a_method(self, tmp_path: Path) -> None:
        methods = ["e2e", "checkpoint", "e2e+accumulate:2", "glcan:2+accumulate:2"]
        found = compare(self.config(epochs=1), methods, [0], tmp_path, progress=False, share_exact=True)
        rows = {row["name"]: row for row in found["methods"]}
        assert list(rows) == methods
        assert rows["checkpoint"]["metric"]["same_as"] == "e2e"
        assert rows["e2e+accumulate:2"]["metric"]["same_as"] is None
        versus = rows["e2e+accumulate:2"]["vs_e2e"]
        assert versus is not None
        assert versus["activation_ratio"] < 0.6
        assert versus["flops_ratio"] == pytest.approx(1, rel=1e-3)
        assert (tmp_path / "e2e+accumulate-2" / "seed0" / "summary.json").is_file()

    @pytest.mark.parametrize("value", [0, -1, True, 2.0, "2"])
    def test_no_number_of_parts(self, value: Any) -> None:
        with pytest.raises(ConfigError, match="accumulate is"):
            learner(model(), value, rule="e2e")


class TestMethods:
    def test_are_read(self) -> None:
        assert parse_method("e2e + accumulate:04").name == "e2e+accumulate:4"
        method = parse_method("glcan:4+accumulate:2+start")
        assert method.name == "glcan:4+start+accumulate:2"
        assert (method.blocks, method.start, method.accumulate) == (4, True, 2)

    @pytest.mark.parametrize(
        ("text", "complaint"),
        [
            ("e2e+accumulate", "over '' parts"),
            ("e2e+accumulate:0", "over '0' parts"),
            ("glcan:4+accumulate:x", "over 'x' parts"),
            ("glcan:4+accumulate:2+accumulate:2", r"'\+accumulate:2' twice"),
            ("glcan:4+start:2", r"'\+start:2'; behind"),
            ("e2e+accumulate:2+start", "gives a start to 'e2e'"),
        ],
    )
    def test_that_make_no_sense_are_refused(self, text: str, complaint: str) -> None:
        with pytest.raises(ConfigError, match=complaint):
            parse_method(text)
