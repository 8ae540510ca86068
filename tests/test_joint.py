"""A part of each batch is trained end to end: the gradients, what is freed, and what stays as it was."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.zoo import assert_equal, gradients
from torch import Tensor, nn
from torch.optim import SGD

import glcan
from glcan import LocalLearner, measure_step
from glcan.errors import ConfigError
from glcan.models import create
from glcan.auxiliary import Joint
from glcan.auxiliary import create as create_rule
from glcan.tasks import Classification, SuperResolution

CUTS = ["body.1", "body.2"]


class Chain(nn.Module):
    """Residual units without a normalisation over the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.body = nn.ModuleList(nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.Tanh()) for _ in range(4))
        self.fc = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for unit in self.body:
            x = x + unit(x)
        return self.fc(x.mean((2, 3)))


def model() -> Chain:
    torch.manual_seed(0)
    return Chain().double()


def batch(size: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return (
        torch.randn(size, 3, 8, 8, generator=generator, dtype=torch.float64),
        torch.randint(0, 10, (size,), generator=generator),
    )


def learner(chain: nn.Module, joint: float, weight: float, **options: Any) -> LocalLearner:
    torch.manual_seed(2)
    rule: dict[str, Any] = {"joint": joint, "joint_weight": weight, "joint_by": "order"}
    return LocalLearner(chain, sample=batch(), cuts=CUTS, rule_options=rule, **options)


def part(begin: int, end: int) -> tuple[Tensor, Tensor]:
    images, labels = batch()
    return images[begin:end], labels[begin:end]


def end_to_end(begin: int, end: int) -> dict[str, Tensor]:
    chain = model()
    images, labels = part(begin, end)
    F.cross_entropy(chain(images), labels).backward()
    return gradients(chain)


def early(name: str) -> bool:
    return name.startswith(("stem", "body.0", "body.1"))


def assert_close(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-10, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}")


def test_the_gradients_are_the_weighted_sums() -> None:
    chain = model()
    mixed = learner(chain, 0.25, 0.4)
    losses = mixed.backward(*batch())
    alone = model()
    local = learner(alone, 0.0, 0.4)
    rest = local.backward(*part(2, 8))
    exact, exact_rest = end_to_end(0, 2), gradients(alone)
    expected = {
        name: 0.4 * exact[name] + 0.6 * own if early(name) else 0.25 * exact[name] + 0.75 * own
        for name, own in exact_rest.items()
    }
    assert_close(gradients(chain), expected)
    assert_close(gradients(mixed.auxiliary), gradients(local.auxiliary))
    images, labels = part(0, 2)
    model_loss = F.cross_entropy(model()(images), labels)
    assert losses.keys() == {"block1", "block2", "block3"}
    torch.testing.assert_close(losses["block1"], rest["block1"])
    torch.testing.assert_close(losses["block3"], 0.25 * model_loss + 0.75 * rest["block3"])


def test_with_a_weight_of_one_no_block_learns_locally() -> None:
    chain = model()
    joint = learner(chain, 0.25, 1.0)
    assert list(joint.auxiliary.parameters()) == []
    losses = joint.backward(*batch())
    some, every = end_to_end(0, 2), end_to_end(0, 8)  # the model's loss is a mean over images
    assert_close(gradients(chain), {name: some[name] if early(name) else every[name] for name in every})
    images, labels = batch()
    assert losses.keys() == {"block3"}
    torch.testing.assert_close(losses["block3"], F.cross_entropy(model()(images), labels))


@pytest.mark.parametrize("weight", [0.5, 1.0])
def test_backward_adds_up(weight: float) -> None:
    once, twice = model(), model()
    learner(once, 0.25, weight).backward(*batch())
    adding = learner(twice, 0.25, weight)
    adding.backward(*batch())
    adding.backward(*batch())
    assert_close(gradients(twice), {name: 2 * grad for name, grad in gradients(once).items()})


@pytest.mark.parametrize("weight", [0.5, 1.0])
def test_a_step_is_a_backward_pass_and_an_update(weight: float) -> None:
    stepped, collected = model(), model()
    optimizer = partial(SGD, lr=0.1, momentum=0.9)
    stepping = learner(stepped, 0.25, weight, optimizer=optimizer)
    collecting = learner(collected, 0.25, weight)
    reference = optimizer(collecting.parameters())
    trained: list[str] = []
    stepping.after_block = trained.append
    for _ in range(3):
        stepping.step(*batch())
        collecting.backward(*batch())
        reference.step()
        reference.zero_grad()
    assert_close(dict(stepped.state_dict()), dict(collected.state_dict()))
    assert sorted(trained) == sorted(["block1", "block2", "block3"] * 3)


@pytest.mark.parametrize("weight", [0.5, 1.0])
def test_frozen_blocks_get_no_gradient(weight: float) -> None:
    chain = model()
    joint = learner(chain, 0.25, weight)
    joint.frozen = 1
    joint.backward(*batch())
    found = gradients(chain)
    assert not any(name.startswith(("stem", "body.0")) for name in found)
    assert {name for name in found if early(name)} == {"body.1.0.weight", "body.1.0.bias"}


def test_a_batch_too_small_for_a_joint_image_learns_locally() -> None:
    first, second = model(), model()
    learner(first, 0.25, 0.5).backward(*part(0, 7))
    learner(second, 0.0, 0.5).backward(*part(0, 7))
    assert_equal(gradients(first), gradients(second))


def test_without_local_learning_one_image_is_joint() -> None:
    chain = model()
    joint = learner(chain, 0.25, 1.0, optimizer=partial(SGD, lr=0.1))
    before = copy.deepcopy(chain.state_dict())
    joint.step(*part(0, 1))
    assert all(not torch.equal(before[name], tensor) for name, tensor in chain.state_dict().items())
    chain = model()
    learner(chain, 0.25, 1.0).backward(*part(0, 1))
    assert_close(gradients(chain), end_to_end(0, 1))


@pytest.mark.parametrize("images", [2, 3, 6])
def test_without_local_learning_the_few_images_that_end_an_epoch_are_all_joint(images: int) -> None:
    chain = model()
    learner(chain, 0.75, 1.0).backward(*part(0, images))  # six of a whole batch are
    assert_close(gradients(chain), end_to_end(0, images))


def test_none_of_their_parts_is_too_small_for_batchnorm() -> None:
    net = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU()) for _ in range(6)))
    images, labels = torch.randn(64, 4), torch.randint(0, 4, (64,))
    joint = LocalLearner(net, sample=(images, labels), blocks=6)
    for count in (2, 3, 4, 5, 48, 49, 63):
        assert joint.backward(images[:count], labels[:count])["block6"].isfinite()


def test_it_is_off_with_one_block_and_in_a_start() -> None:
    chain, other = model(), model()
    rule = {"joint": 0.25}
    LocalLearner(chain, sample=batch(), blocks=1, rule_options=rule).backward(*batch())
    assert_close(gradients(chain), end_to_end(0, 8))
    joint = learner(other, 0.25, 0.5)
    joint.end_to_end = True
    joint.backward(*batch())
    assert_close(gradients(other), end_to_end(0, 8))


def cost(blocks: int | None, **options: Any) -> Any:
    sample = torch.rand(32, 3, 32, 32), torch.randint(0, 10, (32,))
    resnet = create("cifar_resnet32", num_classes=10)
    found = {} if blocks is None else {"blocks": blocks, "rule_options": options}
    trained = LocalLearner(
        resnet, sample=sample, rule="glcan" if blocks else "e2e", optimizer=partial(SGD, lr=0.1), **found
    )
    return measure_step(trained, *sample)


def test_it_costs_no_memory_and_saves_flops() -> None:
    whole, local = cost(None), cost(4, joint=0.0)
    mixed, exact = cost(4, joint=0.25), cost(4, joint=0.25, joint_weight=1.0)
    assert mixed.peak_bytes <= local.peak_bytes
    assert mixed.flops < local.flops
    assert exact.peak_bytes <= local.peak_bytes
    assert exact.flops < 0.8 * whole.flops
    assert len(mixed.block_peak_bytes) == len(exact.block_peak_bytes) == 4


def test_joint_images_are_recomputed_where_they_would_set_the_peak() -> None:
    local, mixed = cost(12, coupling=0.0, joint=0.0), cost(12, coupling=0.0, joint=0.25)
    assert mixed.peak_bytes <= local.peak_bytes


@pytest.mark.parametrize("blocks", [2, 3, 4])
def test_few_blocks_of_classification_have_most_of_the_batch(blocks: int) -> None:
    joint = create_rule("glcan", {}).joint(Classification(), blocks, 128)
    assert joint == Joint(0.875, 1.0)
    assert joint.images(128) == 112  # and 16 others, for BatchNorm


@pytest.mark.parametrize(
    ("blocks", "share", "batch"), [(2, 1 / 2, 96), (4, 1 / 4, 96), (8, 1 / 8, 256), (16, 1 / 16, 256)]
)
def test_classification_has_as_many_as_cost_no_memory(blocks: int, share: float, batch: int) -> None:
    joint = create_rule("glcan", {}).joint(Classification(), blocks, batch)
    assert (joint.share, joint.weight) == (share, share)
    assert joint.images(batch) == int(share * batch)
    assert joint.images(30) == 0  # too few for BatchNorm


def test_where_that_is_too_few_images_most_of_them_are_joint() -> None:
    rule, task = create_rule("glcan", {}), Classification()
    assert rule.joint(task, 16, 128) == rule.joint(task, 8, 64) == Joint(0.75, 1.0)
    assert rule.joint(task, 4, 32).images(32) == 0  # eight others are too few as well


@pytest.mark.parametrize("kind", ["resnet18", "resnet50"])
def test_detection_takes_no_more_memory_or_flops_for_it(kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    images = [torch.rand(3, 128, 128, generator=generator) for _ in range(4)]
    targets = [{"boxes": torch.tensor([[8.0, 8.0, 60.0, 90.0]]), "labels": torch.tensor([1])} for _ in images]

    def cost(**options: Any) -> Any:
        model = create(f"retinanet_{kind}_fpn", num_classes=3, min_size=128)
        return measure_step(LocalLearner(model, "detection", (images, targets), **options), images, targets)

    whole, default = cost(rule="e2e"), cost(blocks=4)
    local = cost(blocks=4, rule_options={"joint": 0.0})
    assert default.activation_peak_bytes <= min(0.6 * whole.activation_peak_bytes, 1.1 * local.activation_peak_bytes)
    assert default.flops <= min(1.1 * whole.flops, local.flops)


def test_options_change_the_default_share() -> None:
    task = Classification()
    assert create_rule("glcan", {}).joint(task, 1, 64) == Joint()
    assert create_rule("glcan", {"joint": 0.0}).joint(task, 16, 64) == Joint()
    assert create_rule("glcan", {"joint": 0.3}).joint(task, 16, 64) == Joint(0.3, 0.3)
    assert create_rule("glcan", {"joint_weight": 0.5}).joint(task, 4, 64) == Joint(0.25, 0.5, least=16)
    assert create_rule("glcan", {"joint_weight": 1.0}).joint(task, 4, 128) == Joint(0.875, 1.0)
    assert create_rule("glcan", {"joint": 0.5}).joint(SuperResolution(), 4, 64) == Joint(0.5, 1.0)


def test_the_default_costs_no_memory_and_few_blocks_a_tenth_of_the_compute() -> None:
    sample = torch.rand(256, 3, 8, 8), torch.randint(0, 10, (256,))

    def peak(blocks: int, **options: Any) -> Any:
        resnet = create("cifar_resnet32", num_classes=10)
        return measure_step(LocalLearner(resnet, sample=sample, blocks=blocks, rule_options=options), *sample)

    for blocks in (2, 3, 4, 8, 16):
        with_joint, without = peak(blocks, joint_by="order"), peak(blocks, joint=0.0)
        bytes_more, flops_more = (1.02, 1.1) if blocks <= 4 else (1, 1.01)
        assert with_joint.activation_peak_bytes <= bytes_more * without.activation_peak_bytes, blocks
        assert with_joint.flops <= flops_more * without.flops, blocks


def test_blocks_that_are_recomputed_bound_joint_images_too() -> None:
    sample = torch.rand(128, 3, 8, 8), torch.randint(0, 10, (128,))

    def peak(**options: Any) -> Any:
        resnet = create("cifar_resnet32", num_classes=10)
        return measure_step(LocalLearner(resnet, sample=sample, blocks=4, **options), *sample)

    plain, recomputed = peak(), peak(recompute=True)
    quarter, local = (peak(recompute=True, rule_options={"joint": share}) for share in (0.25, 0.0))
    assert quarter.activation_peak_bytes <= 1.05 * local.activation_peak_bytes
    assert quarter.activation_peak_bytes < recomputed.activation_peak_bytes < plain.activation_peak_bytes


def test_no_more_is_recomputed_than_it_takes() -> None:
    sample = torch.rand(128, 3, 16, 16), torch.randint(0, 10, (128,))

    def cost(**options: Any) -> Any:
        resnet = create("cifar_resnet32", num_classes=10)
        return measure_step(LocalLearner(resnet, sample=sample, **options), *sample)

    whole, local = cost(rule="e2e"), cost(blocks=4, rule_options={"joint": 0.0})
    first = {"joint_weight": 1.0, "joint_by": "order"}
    alone = [cost(blocks=4, rule_options=first | {"joint": share}) for share in (0.25, 0.4, 0.6, 0.8)]
    assert [each.flops for each in alone] == sorted(each.flops for each in alone)
    assert all(each.activation_peak_bytes <= 1.02 * local.activation_peak_bytes for each in alone)
    # What they save of the FLOPs of end-to-end training is spent on less memory than that.
    assert all(each.activation_peak_bytes < 0.75 * local.activation_peak_bytes for each in alone[:3])
    assert 0.9 * whole.flops < alone[2].flops < 1.06 * whole.flops


def test_the_plan_knows_of_it() -> None:
    sample = torch.rand(32, 3, 32, 32), torch.randint(0, 10, (32,))
    forecast = glcan.plan(
        create("cifar_resnet32", num_classes=10),
        sample=sample,
        blocks=4,
        rule_options={"joint": 0.25},
        optimizer=partial(SGD, lr=0.1),
    )
    measured = cost(4, joint=0.25)
    assert (forecast.cost.peak_bytes, forecast.cost.flops) == (measured.peak_bytes, measured.flops)


def test_options_of_networks_that_are_not_built_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"glcan\.budget is 0\.2, but there are no.* with joint_weight 1\. "):
        create_rule("glcan", {"joint": 0.25, "joint_weight": 1.0, "budget": 0.2}).joint(Classification(), 4, 64)
    with pytest.raises(ConfigError, match=r"use_local is False.*the default of super-resolution"):
        create_rule("glcan", {"use_local": False}).joint(SuperResolution(), 4, 64)


def test_bad_values() -> None:
    for options, message in (
        ({"joint": 1.0}, r"glcan\.joint is 1\.0; it must lie in \[0, 1\)"),
        ({"joint": -0.1}, r"glcan\.joint is -0\.1"),
        ({"joint_weight": 0.0}, r"glcan\.joint_weight is 0\.0; it must lie in \(0, 1\]"),
    ):
        with pytest.raises(ConfigError, match=message):
            create_rule("glcan", options)
    assert create_rule("glcan", {"joint": 0.25, "joint_weight": 1.0}).joint(Classification(), 4, 64) == Joint(0.25, 1.0)
