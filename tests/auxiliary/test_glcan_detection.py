"""GLCAN for detection: the pyramid and its head, the targets it learns, its budget, and the losses in parts."""

from __future__ import annotations

from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
from tests import zoo
from torch import Tensor, nn
from torch.optim import SGD, AdamW
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.detection import FCOS

from glcan import Learner, plan, profile
from glcan.auxiliary import dense_head
from glcan.auxiliary.dense_head import DenseHead, pyramid_grids, scale_of, total_classes
from glcan.auxiliary.glcan.detection import DetectionAuxiliary, fit_width, levels_of, pyramid_flops
from glcan.errors import ConfigError
from glcan.inspect.isolation import Boundary
from glcan.models import create
from glcan.tasks import Detection, detection

SMALL = ["retinanet_small", "fcos_small"]
CUTS = ["backbone.body.layer2.0", "backbone.body.layer3.1"]


def batch(dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    draw = torch.Generator().manual_seed(1)
    images = [torch.rand(3, 64, 64, generator=draw), torch.rand(3, 48, 64, generator=draw)]
    boxes = torch.tensor([[4.0, 4.0, 40.0, 44.0], [20.0, 2.0, 60.0, 30.0]], dtype=dtype)
    none = {"boxes": torch.zeros(0, 4, dtype=dtype), "labels": torch.zeros(0, dtype=torch.int64)}
    return [image.to(dtype) for image in images], [{"boxes": boxes, "labels": torch.tensor([3, 1])}, none]


def detector(name: str, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    few = {"rpn_pre_nms_top_n_train": 50, "rpn_post_nms_top_n_train": 20, "box_batch_size_per_image": 16}
    return create(name, num_classes=4, **({"image_size": 64} | options | (few if "rcnn" in name else {}))).train()


def networks(learner: Learner) -> list[DetectionAuxiliary]:
    found = [network for network in learner.auxiliary.values() if isinstance(network, DetectionAuxiliary)]
    assert len(found) == learner.plan.blocks - 1
    return found


@pytest.mark.parametrize(
    ("anchors", "share", "together"), [(1, 10**9, 0), (7, 10**9, 0), (1, 5, 0), (10**6, 1, 0), (10**6, 1, 10**9)]
)
@pytest.mark.parametrize("name", SMALL)
def test_losses_in_parts_are_the_losses(
    name: str, anchors: int, share: int, together: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(detection, "_PART", anchors * 4)  # four classes
    monkeypatch.setattr(detection, "_SHARE", share)
    monkeypatch.setattr(detection, "_TOGETHER", together)
    model = detector(name).double()
    parameters = list(model.parameters())
    whole = model(*batch(torch.float64))
    wanted = torch.autograd.grad(sum(whole.values()), parameters)
    with detection.losses_in_parts(model):
        parts = model(*batch(torch.float64))
        assert list(parts) == list(whole)
        for loss in whole:
            torch.testing.assert_close(parts[loss], whole[loss], rtol=1e-12, atol=1e-12)
        total = sum(parts.values())
        found = torch.autograd.grad(2 * total, parameters, retain_graph=True)
        with pytest.raises(RuntimeError, match="once only"):
            torch.autograd.grad(total, parameters)
    torch.testing.assert_close(found, tuple(2 * gradient for gradient in wanted), rtol=1e-6, atol=1e-9)
    assert "compute_loss" not in vars(model.head)


def test_losses_of_other_heads_stay_as_they_are() -> None:
    model = detector("fasterrcnn_resnet18_fpn")
    with detection.losses_in_parts(model):
        assert not hasattr(model, "head")
    with detection.losses_in_parts(nn.Linear(1, 1)):
        pass


@pytest.mark.parametrize("name", SMALL)
def test_the_last_block_learns_from_the_models_own_losses(name: str) -> None:
    learner = Learner(detector(name), "detection", batch(), method="glcan", cuts=CUTS)
    losses = learner.backward(*batch())
    plain = sum(detector(name)(*batch()).values())
    torch.testing.assert_close(losses["block3"], plain.detach())


@pytest.mark.filterwarnings("ignore:.*cannot be looked at without computing")  # proposals
@pytest.mark.parametrize("name", [*SMALL, "fasterrcnn_resnet18_fpn"])
def test_every_detector_learns_in_blocks(name: str) -> None:
    learner = Learner(detector(name), "detection", batch(), method="glcan", cuts=CUTS, optimizer=partial(SGD, lr=1e-2))
    first = learner.step(*batch())
    for _ in range(8):
        last = learner.step(*batch())
    assert all(last[block] < first[block] for block in ("block1", "block2"))


def test_auxiliary_networks_learn_the_targets_as_the_model_sees_them() -> None:
    learner = Learner(
        detector("fcos_small", min_size=[48, 64, 80], max_size=96), "detection", batch(), method="glcan", cuts=CUTS
    )
    task = learner.task
    assert isinstance(task, Detection)
    seen: list[Any] = []
    for network in networks(learner):
        network.head.register_forward_pre_hook(lambda module, given: seen.append(given[1:]))
    made: list[Any] = []
    learner.model.transform.register_forward_hook(lambda module, given, output: made.append(output))  # type: ignore[union-attr]
    sizes = set()
    for _ in range(16):  # the size is drawn at random
        learner.backward(*batch())
        assert len(made) == 1
        images, targets = made.pop()
        assert len(seen) == 2
        assert all(given[0] is images and given[1] is targets for given in seen)
        sizes.add(images.tensors.shape[-2:])
        seen.clear()
    assert len(sizes) > 1
    assert task.transformed(batch(), learner.model.transform)[0].tensors.shape[0] == 2  # type: ignore[arg-type]


@pytest.mark.parametrize(("budget", "blocks"), [(0.05, 3), (0.09, 4), (0.3, 4)])
def test_the_budget_is_kept(budget: float, blocks: int) -> None:
    learner = Learner(
        detector("fcos_small", image_size=160),
        "detection",
        ([torch.rand(3, 160, 160)] * 2, [batch()[1][0]] * 2),
        method=f"glcan:{blocks}",
        options={"budget": budget},
    )
    sample = ([torch.rand(3, 160, 160)] * 2, [batch()[1][0]] * 2)
    each = budget / (blocks - 1) * learner.profile.flops
    for network in networks(learner):
        entering = tuple(torch.rand(f.shape) for f in network.features)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            network(Boundary(0, "", entering), sample)
        width = network.lateral[0].out_channels
        foreseen = 2 * pyramid_flops(network.features, network.levels, int(width), 2, 4)
        assert counter.get_total_flops() == pytest.approx(foreseen, rel=0.01)
        assert counter.get_total_flops() <= each or width == 16


def test_more_budget_gives_wider_pyramids() -> None:
    model = detector("retinanet_small", image_size=160)
    found = profile(model, *Detection().arguments(([torch.rand(3, 160, 160)] * 2, batch()[1])))
    features = found.unit(CUTS[0]).entering
    levels = levels_of(features, pyramid_grids(found))
    assert levels == [(20, 20), (10, 10), (5, 5)]
    widths = [fit_width(features, levels, 2, 4, flops) for flops in (0.0, 1e7, 1e8, 1e12)]
    assert widths == sorted(widths)
    assert widths[0] == 16
    assert widths[-1] == 256
    assert total_classes(model) == 4
    assert scale_of(model, found) == 0.5


def test_levels_begin_at_the_blocks_own_scale() -> None:
    learner = Learner(detector("retinanet_small"), "detection", batch(), method="glcan", cuts=CUTS)
    first, second = networks(learner)
    assert first.levels == [(8, 8), (4, 4), (2, 2)]  # its own map is 16 x 16, finer than the detector's finest level
    assert first.reduction == [2]
    assert second.levels == [(8, 8), (4, 4), (2, 2)]  # the end of the second stage passes by
    assert second.at == [1, 0]
    alone = Learner(detector("retinanet_small"), "detection", batch(), method="dgl", cuts=CUTS, options={"budget": 0.5})
    assert [network.levels for network in networks(alone)] == [[(8, 8)], [(4, 4)]]


def test_maps_that_pass_by_a_cut_are_levels_where_the_detector_will_read_them() -> None:
    cuts = ["backbone.body.layer2.1", "backbone.body.layer3.0"]
    options = {"pyramid_maps": False}
    alone = Learner(detector("fcos_small"), "detection", batch(), method="glcan", cuts=cuts, options=options)
    assert [network.levels[0] for network in networks(alone)] == [(8, 8), (8, 8)]
    learner = Learner(detector("fcos_small"), "detection", batch(), method="glcan", cuts=cuts)
    first, second = networks(learner)
    assert first.levels == [(16, 16), (8, 8), (4, 4)]
    assert first.at == [1, 0]  # what enters, and the end of the first stage, which goes on to the pyramid
    assert second.levels == [(8, 8), (4, 4)]  # the end of the first stage is the first block's
    seen: list[Boundary] = []
    first.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    second.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    learner.backward(*batch())
    assert [tuple(t.shape[-2:]) for t in seen[0].skipping] == [(16, 16)]
    assert seen[1].skipping == ()
    # Without the deeper unit, what passes by is all that teaches the first stage.
    learner.model.zero_grad()
    nn.init.zeros_(first.lateral[0].weight)
    learner.backward(*batch())
    gradients = dict(learner.model.named_parameters())
    assert gradients["backbone.body.layer1.1.conv2.weight"].grad.abs().max() > 0  # type: ignore[union-attr]
    assert gradients["backbone.body.layer2.0.conv2.weight"].grad.abs().max() == 0  # type: ignore[union-attr]


def test_a_cut_behind_the_pyramid_hands_on_all_of_its_levels() -> None:
    learner = Learner(
        detector("fcos_small"), "detection", batch(), method="glcan", cuts=["backbone.body.layer2.0", "head"]
    )
    *_, last = networks(learner)
    assert last.at == [0, 1, 2]
    learner.backward(*batch())
    assert all(p.grad is not None for p in learner.model.backbone.fpn.parameters())  # type: ignore[union-attr]


def test_without_the_local_branch_the_finest_level_comes_from_the_coarser_ones() -> None:
    options = {"use_local": False}
    learner = Learner(detector("retinanet_small"), "detection", batch(), method="glcan", cuts=CUTS, options=options)
    for network in networks(learner):
        given: list[Any] = []
        network.head.register_forward_pre_hook(lambda module, inputs, given=given: given.append(inputs[0]))
        network(Boundary(0, "", tuple(torch.rand(f.shape) for f in network.features)), batch())
        ((finest, coarser, *_),) = given
        assert torch.equal(finest[..., ::2, ::2], coarser)


def test_a_head_on_maps_of_other_sizes() -> None:
    head = DenseHead(16, 1, 4, 1.0)
    images, targets = Detection().transformed(batch(), detector("fcos_small").transform)  # type: ignore[arg-type]
    assert images.tensors.shape[-2:] == (64, 64)
    losses = head([torch.rand(2, 16, 8, 8), torch.rand(2, 16, 3, 5)], images, targets)
    assert set(losses) == {"classification", "bbox_regression", "bbox_ctrness"}
    assert all(loss.isfinite() for loss in losses.values())


def test_all_blocks_learn_from_one_assignment_of_objects_to_places(monkeypatch: pytest.MonkeyPatch) -> None:
    """Networks on the same levels share it: the losses are those of each by itself, and a new step has a new one."""
    cuts = ["backbone.body.layer1.0", "backbone.body.layer1.1"]
    learner = Learner(detector("fcos_small"), "detection", batch(), method="glcan", cuts=cuts)
    count = mock.Mock(side_effect=FCOS.compute_loss)
    monkeypatch.setattr(FCOS, "compute_loss", lambda *args: count(*args))
    shared = learner.backward(*batch())
    assert count.call_count == 2  # the model itself, and the first of two networks
    monkeypatch.setattr(dense_head, "_ASSIGNED", mock.Mock(setdefault=lambda images, known: {}))
    alone = learner.backward(*batch())
    assert count.call_count == 5
    assert {name: loss.item() for name, loss in shared.items()} == {name: loss.item() for name, loss in alone.items()}
    monkeypatch.undo()
    images, targets = batch()
    moved = [{**targets[0], "boxes": targets[0]["boxes"] / 2}, targets[1]]
    assert learner.backward(images, moved)["block1"] != shared["block1"]


@pytest.mark.parametrize("name", SMALL)
def test_to_the_isolation_the_losses_are_one_operation(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    learner = Learner(
        detector(name), "detection", batch(), method="glcan", cuts=CUTS, optimizer=partial(AdamW, lr=1e-3)
    )
    seen = zoo.watched(monkeypatch)
    learner.step(*batch())
    assert seen.count("compute_loss") == 1
    assert not {"sum", "clamp", "addcdiv_", "sub_", "_foreach_mul_"} & set(seen)  # of the losses, of the optimizer
    assert "compute_loss" not in vars(learner.model)


def test_losses_of_a_users_own_are_looked_into() -> None:
    class Own(FCOS):
        def compute_loss(self, *arguments: Any) -> dict[str, Tensor]:
            return super().compute_loss(*arguments)

    model = detector("fcos_small")
    for kind, wrapped in ((type(model), True), (Own, False)):
        model.__class__ = kind
        with Detection().running(model):
            assert ("compute_loss" in vars(model)) == wrapped
        assert "compute_loss" not in vars(model)


def test_it_needs_less_memory_than_end_to_end_training() -> None:
    model = detector("retinanet_small", image_size=160)
    sample = ([torch.rand(3, 160, 160)] * 4, [batch()[1][0]] * 4)
    found = plan(model, "detection", sample, method="glcan:4")
    assert found.ratios("e2e")["activation_ratio"] < 0.5
    assert found.ratios("e2e")["flops_ratio"] < 1.1


def test_what_it_does_not_serve_is_refused() -> None:
    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)

        def forward(self, images: list[Tensor], targets: Any) -> dict[str, Tensor]:
            return {"loss": self.second(self.first(torch.stack(images))).mean()}

    images = [torch.rand(3, 32, 32)] * 2
    with pytest.raises(ConfigError, match="Bare has no sub-module 'transform'"):
        Learner(Bare(), "detection", (images, batch()[1]), method="glcan", cuts=["second"])
    with pytest.raises(ConfigError, match="Linear does not say how many classes"):
        total_classes(nn.Linear(1, 1))
    with pytest.raises(ConfigError, match=r"dgl.budget is 0"):
        Learner(detector("fcos_small"), "detection", batch(), method="dgl", cuts=CUTS, options={"budget": 0})


def test_maps_that_pass_by_are_found_in_batches_of_any_size() -> None:
    """The transform gives tensors for each image, so what comes after them must not be known by its number alone."""
    images, targets = batch()
    learner = Learner(
        detector("fcos_small"), "detection", (images, targets), method="glcan", cuts=["backbone.body.layer2.1"]
    )
    (network,) = networks(learner)
    assert len(network.read) == 2  # the map of stride 4 goes straight to the pyramid
    for count in (1, 3):
        losses = learner.backward((images * 2)[:count], (targets * 2)[:count])
        assert all(torch.isfinite(loss) for loss in losses.values())
    assert all(layer.weight.grad is not None for layer in network.lateral)
