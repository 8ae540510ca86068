from __future__ import annotations

import contextlib
import copy
import itertools
from functools import partial
from typing import Any

import pytest
import torch
from tests.tasks.per_cut import PER_CUT
from tests.zoo import assert_equal
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.optim import SGD

import glcan
from glcan.cost.cuts import numbers_of_blocks
from glcan.cost.step import measure_step
from glcan.errors import ConfigError, CutError, DataError, GradientLeak
from glcan.inspect.dryrun import dry_run
from glcan.inspect.meter import LiveMemory
from glcan.inspect.record import profile
from glcan.models import create
from glcan.tasks import Detection
from glcan.tasks import create as create_task
from glcan.tasks.detection import check_targets, classes_of

DETECTORS = ["retinanet_small", "fcos_small", "fasterrcnn_resnet18_fpn"]
CUTS = ["backbone.body.layer2.0", "backbone.body.layer3.1"]  # the second one inside a stage


def batch() -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    draw = torch.Generator().manual_seed(1)
    images = [torch.rand(3, 64, 64, generator=draw), torch.rand(3, 48, 64, generator=draw)]
    targets = [
        {"boxes": torch.tensor([[4.0, 4.0, 40.0, 44.0], [20.0, 2.0, 60.0, 30.0]]), "labels": torch.tensor([3, 1])},
        {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)},
    ]
    return images, targets


def detector(name: str) -> nn.Module:
    torch.manual_seed(0)
    few = {"rpn_pre_nms_top_n_train": 50, "rpn_post_nms_top_n_train": 20, "box_batch_size_per_image": 16}
    return create(name, num_classes=4, image_size=64, **(few if "rcnn" in name else {})).train()


def built(model: nn.Module, **options: Any) -> glcan.Learner:
    """A learner; a two-stage detector has to be run for that, which is said."""
    said = pytest.warns(UserWarning, match="FasterRCNN cannot be looked at without computing")
    with said if "RCNN" in type(model).__name__ else contextlib.nullcontext():
        return glcan.Learner(model, "detection", batch(), **options)


@pytest.mark.parametrize("method", ["e2e", "checkpoint", "checkpoint-sqrt", f"{PER_CUT}:1"])
@pytest.mark.parametrize("name", DETECTORS)
def test_exact_methods_are_plain_back_propagation_bit_for_bit(name: str, method: str) -> None:
    optimizer = partial(SGD, lr=1e-3, momentum=0.9)
    learner = built(detector(name), method=method, optimizer=optimizer)
    plain = detector(name)
    own = optimizer(plain.parameters())
    for step in range(2):
        torch.manual_seed(step)  # Faster R-CNN samples proposals
        losses = learner.step(*batch())
        torch.manual_seed(step)
        loss = sum(plain(*batch()).values())
        loss.backward()
        own.step()
        own.zero_grad()
        assert torch.equal(losses["block1"], loss.detach())
    assert_equal(dict(learner.model.state_dict()), dict(plain.state_dict()))


@pytest.mark.parametrize("name", DETECTORS)
def test_a_local_rule_on_every_detector(name: str) -> None:
    """The leak check passes, and each block's gradient is that of its own loss alone."""
    model = detector(name)
    learner = built(model, cuts=CUTS, method=PER_CUT)
    torch.manual_seed(5)
    losses = learner.backward(*batch())
    assert list(losses) == ["block1", "block2", "block3"]
    mine = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    assert mine.keys() == {n for n, _ in model.named_parameters()}
    # The last block alone, on detached features: the gradient is that of the model's own loss.
    plain = detector(name)
    hooks = [
        plain.get_submodule(CUTS[1]).register_forward_pre_hook(lambda m, args: tuple(a.detach() for a in args)),
        # C3 reaches the pyramid beside the second cut
        plain.get_submodule("backbone.fpn").register_forward_pre_hook(
            lambda m, args: ({k: v.detach() if k in BESIDE[name] else v for k, v in args[0].items()},)
        ),
    ]
    torch.manual_seed(5)
    total = sum(plain(*batch()).values())
    total.backward()
    for hook in hooks:
        hook.remove()
    last = {n for n, p in plain.named_parameters() if p.grad is not None}
    assert {n.split(".")[0] for n in last} >= {"backbone"}
    for name_, parameter in plain.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(mine[name_], parameter.grad, msg=name_)


#: The levels of the pyramid that come from before the second cut.
BESIDE = {"retinanet_small": {"0"}, "fcos_small": {"0", "1"}, "fasterrcnn_resnet18_fpn": {"0", "1"}}


def test_one_block_of_a_local_rule_is_plain_back_propagation() -> None:
    learner = built(detector("retinanet_small"), method=f"{PER_CUT}:1")
    plain = detector("retinanet_small")
    loss = sum(plain(*batch()).values())
    loss.backward()
    assert torch.equal(learner.backward(*batch())["block1"], loss.detach())
    assert_equal(
        {n: p.grad for n, p in learner.model.named_parameters()}, {n: p.grad for n, p in plain.named_parameters()}
    )


@pytest.mark.parametrize("name", DETECTORS)
def test_the_dry_run_falls_back_to_the_real_model_and_leaves_it_alone(name: str) -> None:
    """torchvision's detectors read values of tensors (which anchors match), which fake tensors do not have."""
    model = detector(name)
    before = copy.deepcopy(model.state_dict())
    given = batch()
    targets = copy.deepcopy(given[1])
    state = torch.get_rng_state()
    ran_on: list[bool] = []

    def use(model: nn.Module, batch: Any) -> None:
        ran_on.append(any(isinstance(p, FakeTensor) for p in model.parameters()))
        model(*batch)

    dry_run(model, given, use)
    assert ran_on[-1] is False
    found = profile(model, given)
    built(model, cuts=CUTS, method=PER_CUT)
    assert torch.equal(torch.get_rng_state(), state)
    assert_equal(dict(model.state_dict()), dict(before))
    assert all(p.grad is None for p in model.parameters())
    for target, original in zip(given[1], targets, strict=True):
        assert_equal(target, original)
    assert set(CUTS) <= set(found.cuttable)
    assert found.output == ((),) * len(found.output)


@pytest.mark.parametrize("name", DETECTORS)
def test_the_profile_knows_the_images_that_the_model_makes_of_its_list(name: str) -> None:
    found = profile(detector(name), batch())
    assert found.batch == 2
    assert found.image == ((64, 96) if "rcnn" in name else (64, 64))  # resized and padded
    trunk = [unit for unit in found.units if "backbone.body" in unit.name]
    assert {unit.output.layout for unit in trunk if unit.output} == {"BCHW"}
    entering = found.unit("backbone.body.layer3.1").entering
    assert [feature.grid for feature in entering] == [(4, found.image[1] // 16)]


@pytest.mark.parametrize("name", DETECTORS)
def test_a_dry_run_with_assumed_values_comes_close(name: str) -> None:
    """One-stage detectors then run on fake tensors alone, backward pass included; two stages need real proposals."""
    fake: list[bool] = []

    def meter(model: nn.Module, batch: Any) -> tuple[int, int]:
        fake.append(any(isinstance(p, FakeTensor) for p in model.parameters()))
        with LiveMemory(model, inputs=batch) as memory:
            sum(model(*batch).values()).backward()
        return memory.activation_peak_bytes, memory.flops

    model = detector(name)
    assumed = dry_run(model, batch(), meter, assume=True)
    assert fake[-1] is ("rcnn" not in name)
    real = dry_run(model, batch(), meter)
    assert fake[-1] is False
    assert assumed[1] == real[1]
    assert assumed[0] == pytest.approx(real[0], rel=0.03)  # the places on objects are assumed, not found


def test_the_model_is_given_copies_of_the_targets() -> None:
    images, targets = batch()
    (given_images, given_targets), kwargs = Detection().arguments((tuple(images), targets))
    assert (type(given_images), kwargs) == (list, {})
    given_targets[0]["more"] = torch.zeros(1)
    assert "more" not in targets[0]


def test_losses_are_added_up() -> None:
    task = create_task("detection")
    losses = {"classification": torch.tensor(1.5), "boxes": torch.tensor(0.25)}
    assert task.loss(losses, batch()) == task.local_loss(losses, batch()) == 1.75
    with pytest.raises(ConfigError, match=r"The model returned list.*model.train\(\)"):
        task.loss([], batch())
    with pytest.raises(ConfigError, match="An auxiliary network returned Tensor"):
        task.local_loss(torch.zeros(()), batch())


def spoiled(**changes: Any) -> tuple[list[Tensor], list[dict[str, Any]]]:
    images, targets = batch()
    return images, [{**targets[0], **changes}, targets[1]]


@pytest.mark.parametrize(
    ("sample", "error", "message"),
    [
        ((batch()[0],), ConfigError, "this one has 1 items"),
        ((batch()[0], batch()[1][:1]), ConfigError, "2 images and 1 targets"),
        ((batch()[0], batch()[1][0]), ConfigError, "a list of dicts, one for each image, not dict"),
        (([torch.zeros(64, 64)] * 2, batch()[1]), ConfigError, r"\[C, H, W\]"),
        (([torch.zeros(3, 64, 64, dtype=torch.uint8)] * 2, batch()[1]), ConfigError, "floating-point"),
        ((batch()[0], [{"boxes": torch.zeros(0, 4)}] * 2), ConfigError, "Target 0 lacks labels"),
        (spoiled(boxes=torch.zeros(2, 5)), ConfigError, r"boxes of target 0 are torch.float32 \[2, 5\]"),
        (spoiled(labels=torch.ones(3, dtype=torch.int64)), ConfigError, r"must be torch.int64 \[2\]"),
        (spoiled(labels=torch.ones(2)), ConfigError, "torch.int64"),
        (spoiled(boxes=torch.tensor([[1.0, 1, 5, 5], [9, 1, 2, 5]])), DataError, "Box 1 of target 0"),
        (spoiled(boxes=torch.tensor([[1.0, 1, 5, 5], [1, 1, 2, float("nan")]])), DataError, "Box 1 of target 0"),
        (spoiled(labels=torch.tensor([0, 1])), DataError, "0 is the background"),
    ],
)
def test_a_sample_is_checked(sample: Any, error: type[Exception], message: str) -> None:
    task = Detection()
    with pytest.raises(error, match=message):
        task.arguments(sample)
        task.prepare(((), ()), sample)


@pytest.mark.parametrize("method", ["e2e", "selective", "glcan:2"])
def test_a_model_in_eval_mode_is_looked_at_in_train_mode_and_not_trained_in_eval_mode(method: str) -> None:
    model = detector("retinanet_small").eval()
    learner = built(model, method=method)
    assert not model.training
    with pytest.raises(ConfigError, match=r"model.train\(\)"):
        learner.backward(*batch())
    model.train()
    assert all(loss > 0 for loss in learner.backward(*batch()).values())


def test_a_leak_is_found() -> None:
    """A head that reads an early feature from elsewhere than its arguments."""
    model = detector("retinanet_small")
    kept: list[Tensor] = []
    model.backbone.body.layer1.register_forward_hook(lambda module, args, output: kept.append(output))
    head = model.head.forward
    model.head.forward = lambda features: head([feature + kept[-1].mean() for feature in features])
    with pytest.raises(GradientLeak, match="backbone.body"):
        built(model, cuts=CUTS, method=PER_CUT)


ONE_STAGE = DETECTORS[:2]
OPTIMIZER = partial(SGD, lr=1e-3, momentum=0.9)


@pytest.mark.parametrize("name", ONE_STAGE)
@pytest.mark.parametrize(
    "options",
    [{"method": "e2e"}, {"method": "checkpoint"}, {"method": "selective"}, {"method": f"{PER_CUT}:3"}],
    ids=["e2e", "checkpoint", "selective", "local"],
)
def test_one_stage_detectors_are_planned_on_fake_tensors(
    name: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = detector(name)
    fake: list[bool] = []
    forward = type(model).forward

    def watched(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        fake.append(all(isinstance(p, FakeTensor) for p in self.parameters()))
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(type(model), "forward", watched)
    forecast = glcan.plan(model, "detection", batch(), optimizer=OPTIMIZER, baselines=(), **options)
    learner = built(model, optimizer=OPTIMIZER, **options)
    assert fake
    assert all(fake)
    assert learner.plan.cuts == forecast.plan.cuts
    measured = measure_step(learner, *batch())
    assert not fake[-1]
    assert forecast.cost.peak_bytes == pytest.approx(measured.peak_bytes, rel=0.02)
    assert forecast.cost.flops == measured.flops


def test_a_plan_within_a_budget() -> None:
    model = detector("retinanet_small")
    options: dict[str, Any] = {"optimizer": OPTIMIZER, "baselines": ()}
    whole = glcan.plan(model, "detection", batch(), method=f"{PER_CUT}:1", **options).cost.peak_bytes
    found = glcan.plan(model, "detection", batch(), method=PER_CUT, memory=int(0.9 * whole), **options)
    assert found.cost.peak_bytes <= 0.9 * whole
    assert found.method == f"{PER_CUT}:{found.plan.blocks}"
    assert found.plan.blocks > 1 or found.plan.recompute


def test_two_stages_are_planned_on_a_copy() -> None:
    model = detector("fasterrcnn_resnet18_fpn")
    before = copy.deepcopy(model.state_dict())
    forecast = glcan.plan(model, "detection", batch(), method="e2e", optimizer=OPTIMIZER, baselines=())
    assert_equal(model.state_dict(), before)
    learner = built(model, method="e2e", optimizer=OPTIMIZER)
    assert forecast.cost.peak_bytes == pytest.approx(measure_step(learner, *batch()).peak_bytes, rel=0.05)


def test_an_example_is_a_batch_of_the_task() -> None:
    images, targets = Detection().example(3, 3, (48, 96))
    check_targets(images, targets)
    assert [tuple(image.shape) for image in images] == [(3, 48, 96)] * 3
    assert all(
        len(target["boxes"]) == 7 and (target["boxes"].amax(0)[2:] <= torch.tensor([96, 48])).all()
        for target in targets
    )


@pytest.mark.parametrize("kind", ["fcos_small", "retinanet_small"])  # two stages are run with the sample before
def test_a_label_that_the_model_has_no_class_for(kind: str) -> None:
    model = detector(kind)
    classes = classes_of(model)
    model.backbone.num_classes = 0  # type: ignore[assignment, union-attr]  # as timm's have it
    assert classes is not None
    assert classes_of(model) == classes
    images, targets = batch()
    glcan.Learner(model, "detection", (images, targets), method="glcan:2")
    targets[0]["labels"] = torch.full_like(targets[0]["labels"], classes)
    with pytest.raises(
        DataError, match=rf"of target 0 is {classes}, but.* {classes} classes.* 1 \.\.\. {classes - 1}\."
    ):
        glcan.Learner(model, "detection", (images, targets), method="glcan:2")
    assert classes_of(detector("fasterrcnn_resnet18_fpn")) == classes
    assert classes_of(nn.Linear(1, 1)) is None


def test_a_detector_of_two_stages_is_cut_only_where_every_block_learns() -> None:
    """The proposals' head and the boxes' stand side by side, and so do the two heads at the end."""
    model = detector("fasterrcnn_resnet18_fpn")
    found = profile(model, batch())
    starts = [found.unit(name).index for name in found.cuttable]
    refused = {
        (found.units[a].name, found.units[b].name)
        for a, b in itertools.combinations(starts, 2)
        if not found.trains(a, b)
    }
    predictor = "roi_heads.box_predictor"
    assert refused == {("rpn", "roi_heads.box_head.fc6"), (f"{predictor}.cls_score", f"{predictor}.bbox_pred")}
    for cuts in refused:
        with pytest.raises(CutError, match="side by side"):
            built(model, cuts=list(cuts), method=PER_CUT)
    most = max(numbers_of_blocks(found))
    for blocks in (4, most):
        learner = built(model, method=f"{PER_CUT}:{blocks}")
        assert learner.plan.blocks == blocks
    with pytest.raises(CutError, match=f"1 to {most} blocks"):
        built(model, method=f"{PER_CUT}:{most + 1}")


def test_frozen_parts_stand_wherever_they_do() -> None:
    model = detector("fasterrcnn_resnet18_fpn")
    model.rpn.requires_grad_(False)
    found = profile(model, batch())
    assert found.trains(found.unit("rpn").index, found.unit("roi_heads.box_head.fc6").index)
    cuts = ["rpn", "roi_heads.box_head.fc6"]
    assert built(model, cuts=cuts, method=PER_CUT).plan.cuts == tuple(cuts)
