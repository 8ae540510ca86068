"""Joint images that are chosen by their gradients: which ones, what they learn, and what stays as it was."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.test_joint import CUTS, Chain, assert_close, early, model, part
from tests.test_joint import batch as data
from tests.zoo import assert_equal, gradients
from torch import Tensor, nn
from torch.optim import SGD

import glcan
from glcan import LocalLearner, measure_step, profile
from glcan.strategies.choosing import Received, choose, sizes_of
from glcan.errors import ConfigError
from glcan.models import create
from glcan.auxiliary import Joint
from glcan.auxiliary import create as create_rule
from glcan.tasks import Classification, Detection, SuperResolution

# -- which images ------------------------------------------------------------------------------------------------------


def test_the_sum_over_those_chosen_is_right_in_the_mean() -> None:
    torch.manual_seed(0)
    vectors = torch.randn(64, 5) * torch.rand(64, 1) ** 4
    found, uniform = [], []
    for _ in range(4000):
        order = vectors[torch.randperm(64)] * (1 + 0.01 * torch.randn(64, 1))  # in training, no batch is like another
        places, weights = choose(sizes_of([order]), 16)
        found.append((order[places] * weights[:, None]).sum(0))
        uniform.append(order[:16].sum(0) * 4)
    mean = torch.stack(found).mean(0)
    torch.testing.assert_close(mean, vectors.sum(0), atol=0.15, rtol=0)
    assert torch.stack(found).std(0).mean() < 0.5 * torch.stack(uniform).std(0).mean()


def test_so_many_are_chosen_and_the_largest_for_certain() -> None:
    sizes = torch.tensor([0.01, 100.0, 0.01, 0.02, 50.0, 0.01, 0.02, 0.01])
    for count in range(1, 9):
        places, weights = choose(sizes, count)
        assert len(places) == len(set(places.tolist())) == count
        assert places.tolist() == sorted(places.tolist())
        assert (weights >= 1).all()
    places, weights = choose(sizes, 4)
    assert {1, 4} <= set(places.tolist())
    assert weights[places.tolist().index(1)] == weights[places.tolist().index(4)] == 1


@pytest.mark.parametrize("sizes", [[0.0] * 6, [torch.nan] * 6, [torch.inf, 1, 1, 1, 1, 1], [1e-30] * 6, [1e30] * 6])
def test_sizes_that_say_nothing_choose_all_the_same(sizes: list[float]) -> None:
    places, weights = choose(torch.tensor(sizes), 3)
    assert len(set(places.tolist())) == 3
    assert weights.isfinite().all()


def test_the_size_is_over_all_that_crosses() -> None:
    first, second = torch.randn(4, 3, 2, 2), torch.randn(4, 7)
    expected = torch.cat([first.flatten(1), second], 1).norm(dim=1)
    torch.testing.assert_close(sizes_of([first, second]), expected)
    torch.testing.assert_close(sizes_of([first.bfloat16(), second]), expected, rtol=0.01, atol=0.01)


def test_what_is_handed_on_may_be_written_into() -> None:
    received = Received()
    x = torch.randn(3, 4).view(3, 2, 2).transpose(1, 2)
    handed = received.hand_on(x)
    received.hand_on(x)  # nobody uses it
    F.relu(handed * 1, inplace=True).sum().backward()
    assert received.gradients[1] is None
    torch.testing.assert_close(received.gradients[0], (x > 0).float())
    assert F.relu(Received().hand_on(torch.tensor([-1.0, 1.0])), inplace=True).tolist() == [0, 1]


# -- what they learn ---------------------------------------------------------------------------------------------------


class Weighted:
    """The mean loss, in which every image has a weight."""

    def __init__(self, weights: Tensor) -> None:
        self.weights = weights

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        found: Tensor = (self.weights * F.cross_entropy(logits, labels, reduction="none")).mean()
        return found


def learner(net: nn.Module, joint: float, sample: tuple[Tensor, Tensor] | None = None, **options: Any) -> LocalLearner:
    rule = {"joint": joint, "joint_weight": 1.0}
    if "blocks" not in options:
        options.setdefault("cuts", CUTS)
    built = LocalLearner(net, sample=sample or data(), rule_options=rule, **options)
    assert built._joint.by_gradient
    return built


def test_the_last_block_learns_from_every_image_and_the_others_from_those_with_a_gradient() -> None:
    weights = torch.tensor([0, 1, 0, 2, 0.5, 0, 1, 0], dtype=torch.float64)
    chain, whole = model(), model()
    task = Classification(criterion=Weighted(weights), classes=10)
    chosen = learner(chain, 0.75, task=task)  # six of eight, four of which have a gradient
    losses = chosen.backward(*data())
    images, labels = data()
    loss = Weighted(weights)(whole(images), labels)
    loss.backward()
    assert losses.keys() == {"block3"}
    torch.testing.assert_close(losses["block3"], loss.detach())
    assert_close(gradients(chain), gradients(whole))
    assert list(chosen.auxiliary.parameters()) == []


def test_some_weigh_for_those_left_out() -> None:
    chain, whole = model(), model()
    images, labels = data()
    chosen = learner(chain, 0.5)
    chosen.backward(images, labels)
    output = whole(images)
    F.cross_entropy(output, labels).backward()
    late = {name: g for name, g in gradients(whole).items() if not early(name)}
    assert_close({name: g for name, g in gradients(chain).items() if not early(name)}, late)
    by_hand = model()
    handed: list[Tensor] = []
    by_hand.body[2].register_forward_pre_hook(lambda _, args: handed.append(args[0]))
    loss = F.cross_entropy(by_hand(images), labels)
    (gradient,) = torch.autograd.grad(loss, handed, retain_graph=True)
    places, weights = choose(sizes_of([gradient]), 4)
    scale = torch.zeros(8, dtype=torch.float64).index_put((places,), weights)
    handed[0].backward(gradient * scale[:, None, None, None])
    assert_close({n: g for n, g in gradients(chain).items() if early(n)}, gradients(by_hand))


class Normalised(nn.Module):
    """With BatchNorm, something that works in place where a block begins, and a skip over the last cut."""

    def __init__(self, **norm: Any) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.body = nn.ModuleList(
            nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8, **norm))
            for _ in range(4)
        )
        self.fc = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = first = self.stem(x)
        for unit in self.body:
            x = unit(x + 0.1)
        return self.fc((x + first).mean((2, 3)))


def normalised(**norm: Any) -> Normalised:
    torch.manual_seed(3)
    return Normalised(**norm).double()


@pytest.mark.parametrize("norm", [{}, {"momentum": None}, {"affine": False}, {"track_running_stats": False}])
@pytest.mark.parametrize("recompute", [False, True])
def test_images_are_normalised_as_the_batch_was(norm: dict[str, Any], recompute: bool) -> None:
    """Four of eight images have a gradient. The others are in the statistics, and nowhere else."""
    images, labels = data()
    ours, whole = normalised(**norm), normalised(**norm)
    chosen = learner(ours, 0.75, recompute=recompute)
    for _ in range(2):
        whole(images)
        chosen.backward(images, labels)
    seen: dict[nn.Module, list[Tensor]] = {ours: [], whole: []}
    for net, outputs in seen.items():
        net.body[1].register_forward_hook(lambda _, args, out, outputs=outputs: outputs.append(out.detach()))
    whole(images)
    chosen.backward(images, labels)
    assert_close(dict(ours.named_buffers()), dict(whole.named_buffers()))
    (reference,), (first, again) = seen[whole], seen[ours]
    torch.testing.assert_close(first, reference)
    assert len(again) == 6
    distances = (again[:, None] - reference[None]).flatten(2).abs().amax(2)
    assert (distances.amin(1) < 1e-12).all()
    norms = [m for m in ours.modules() if isinstance(m, nn.BatchNorm2d)]
    assert all("forward" not in vars(m) for m in ours.modules())
    assert all(m.track_running_stats == norm.get("track_running_stats", True) for m in norms)


@pytest.mark.parametrize("images", [1, 2, 5, 6])
def test_a_batch_no_larger_than_those_chosen_of_a_whole_one_is_learned_exactly(images: int) -> None:
    ours, whole = normalised(), normalised()
    chosen = learner(ours, 0.75)
    chosen.backward(*part(0, images))
    given, labels = part(0, images)
    F.cross_entropy(whole(given), labels).backward()
    assert_close(gradients(ours), gradients(whole))
    assert_close(dict(ours.named_buffers()), dict(whole.named_buffers()))


def test_recomputation_and_the_number_of_blocks_change_nothing() -> None:
    torch.manual_seed(4)
    sample = torch.randn(16, 3, 16, 16), torch.randint(0, 10, (16,))
    net = create("cifar_resnet20", num_classes=10)
    found = []
    for options in ({"blocks": 6}, {"blocks": 6, "recompute": True}, {"cuts": ["layer3.2"]}):
        twin = copy.deepcopy(net)
        built = learner(twin, 0.5, sample, **options)
        cut = built.plan.cuts[-1]
        if options != {"blocks": 6}:
            built._joint_recomputed = [["conv1", "bn1"], ["layer1.0"], ["layer1.1", "layer1.2"]]
        if cut != "layer3.2":
            built = learner(twin, 0.5, sample, cuts=["layer1.2", "layer2.1", "layer3.2"])
        built.backward(*sample)
        found.append(gradients(twin))
    for other in found[1:]:
        for name, gradient in found[0].items():
            torch.testing.assert_close(other[name], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_step_is_a_backward_pass_and_an_update(accumulate: int) -> None:
    stepped, collected = normalised(), normalised()
    optimizer = partial(SGD, lr=0.1, momentum=0.9)
    stepping = learner(stepped, 0.5, optimizer=optimizer, accumulate=accumulate)
    collecting = learner(collected, 0.5, accumulate=accumulate)
    reference = optimizer(collecting.parameters())
    trained: list[str] = []
    stepping.after_block = trained.append
    for _ in range(3):
        stepping.step(*data())
        collecting.backward(*data())
        reference.step()
        reference.zero_grad()
    assert_close(dict(stepped.state_dict()), dict(collected.state_dict()))
    assert sorted(trained) == sorted(["block1", "block2", "block3"] * 3)


def test_backward_adds_up_and_frozen_blocks_get_nothing() -> None:
    once, twice = model(), model()
    learner(once, 0.5).backward(*data())
    adding = learner(twice, 0.5)
    adding.backward(*data())
    adding.backward(*data())
    assert_close(gradients(twice), {name: 2 * grad for name, grad in gradients(once).items()})
    for frozen, missing in ((1, ("stem", "body.0")), (2, ("stem", "body.0", "body.1"))):
        chain = model()
        freezing = learner(chain, 0.5)
        freezing.frozen = frozen
        freezing.backward(*data())
        found = gradients(chain)
        assert found.keys() == {name for name in gradients(once) if not name.startswith(missing)}
        assert_close(found, {name: gradients(once)[name] for name in found})


def test_a_gradient_that_is_scaled_is_sent_back_scaled() -> None:
    chain, scaled = model(), model()
    learner(chain, 0.5).backward(*data())
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    learner(scaled, 0.5).backward(*data(), scaler=scaler)
    assert_close(gradients(scaled), {name: 8 * g for name, g in gradients(chain).items()})


def test_autocast_of_ones_own_keeps_no_weights_that_need_no_gradient() -> None:
    sample = torch.randn(16, 3, 16, 16), torch.randint(0, 10, (16,))
    net = create("cifar_resnet20", num_classes=10)
    chosen = learner(net, 0.5, sample, blocks=4)
    with torch.autocast("cpu", torch.bfloat16):
        chosen.backward(*sample)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


# -- where it is, and where it is not ----------------------------------------------------------------------------------


class Odd(nn.Module):
    """Units in a row, of which one may do what allows no choice of images."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.body = nn.ModuleList(nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)) for _ in range(4))
        self.fc = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for i, unit in enumerate(self.body):
            if self.kind == "dropout" and i == 1:
                x = F.dropout(x, 0.1, self.training)
            x = unit(x)
            if self.kind == "twice" and i == 1:
                x = unit(x)
        if self.kind == "late dropout":
            x = F.dropout(x, 0.1, self.training)
        return self.fc(x.mean((2, 3)))


@pytest.mark.parametrize(
    ("kind", "chooses"), [("", True), ("late dropout", True), ("dropout", False), ("twice", False)]
)
def test_chance_and_repeated_normalisation_allow_no_choice(kind: str, chooses: bool) -> None:
    images, labels = torch.randn(64, 3, 8, 8), torch.randint(0, 10, (64,))
    cuts = [f"body.{i}" for i in range(4)]
    built = LocalLearner(Odd(kind), sample=(images, labels), cuts=cuts)
    assert built._joint.by_gradient is chooses
    assert (built._choice is not None) is chooses
    built.backward(images, labels)
    assert all(p.grad is not None for p in built.model.parameters())


@pytest.mark.parametrize("kind", ["dropout", "twice"])
def test_a_choice_that_cannot_be_made_is_refused(kind: str) -> None:
    images, labels = torch.randn(64, 3, 8, 8), torch.randint(0, 10, (64,))
    asked = {"joint_by": "gradient"}
    with pytest.raises(ConfigError, match=r"before the cut at 'body\.3' random numbers .* Leave joint_by out"):
        LocalLearner(Odd(kind), sample=(images, labels), cuts=["body.1", "body.3"], rule_options=asked)
    assert LocalLearner(Odd(kind), sample=(images, labels), cuts=["body.0"], rule_options=asked)._joint.by_gradient
    assert LocalLearner(Odd(kind), sample=(images, labels), blocks=1, rule_options=asked).plan.blocks == 1


def test_cuts_before_the_chance_are_by_image() -> None:
    found = profile(Odd("dropout"), (torch.randn(4, 3, 8, 8),))
    assert found.by_image == {"body.0"}
    assert not found.mostly_by_image


class Sequence(nn.Module):
    """Tokens first, images second."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 8)
        self.body = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(3))
        self.fc = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x.transpose(0, 1))
        for unit in self.body:
            x = unit(x)
        return self.fc(x.mean(0))


def test_the_batch_has_to_come_first() -> None:
    assert profile(Sequence(), (torch.randn(4, 5, 6),)).by_image == {"fc"}  # their mean is taken before


def test_attention_without_dropout_is_no_chance() -> None:
    for dropout, expected in ((0.0, True), (0.2, False)):
        encoder = nn.Sequential(
            *(nn.TransformerEncoderLayer(8, 2, 16, dropout=dropout, batch_first=True) for _ in range(4))
        )
        assert bool(profile(encoder, (torch.randn(4, 5, 8),)).by_image) is expected


def test_the_default() -> None:
    rule, task = create_rule("glcan", {}), Classification()
    assert rule.joint(task, 16, 128, by_image=True) == Joint(0.5, 1.0, by_gradient=True)
    assert rule.joint(task, 8, 16, by_image=True) == rule.joint(task, 16, 1024, by_image=True)
    assert rule.joint(task, 2, 128, by_image=True) == rule.joint(task, 16, 1024, by_image=True)
    assert rule.joint(task, 8, 15, by_image=True).images(15) == 0
    assert create_rule("glcan", {"joint_by": "order"}).joint(task, 4, 128, by_image=True) == Joint(0.875, 1.0)
    # where images cannot be chosen
    assert not rule.joint(task, 16, 128).by_gradient
    assert rule.joint(task, 4, 128) == Joint(0.875, 1.0)
    assert rule.joint(task, 4, 64) == Joint(0.25, 0.25, 16)
    assert not create_rule("glcan", {"joint_by": "order"}).joint(task, 16, 128, by_image=True).by_gradient
    assert not create_rule("glcan", {"joint_weight": 0.5}).joint(task, 16, 128, by_image=True).by_gradient
    for other in (Detection(), SuperResolution()):
        assert not rule.joint(other, 4, 16, by_image=True).by_gradient
    assert create_rule("glcan", {"joint_by": "gradient"}).joint(SuperResolution(), 4, 16, by_image=True).by_gradient


def test_super_resolution_may_choose_patches() -> None:
    torch.manual_seed(5)
    net = create("edsr_baseline", scale=2, blocks=6, channels=8)
    sample = torch.rand(8, 3, 12, 12), torch.rand(8, 3, 24, 24)
    options = {"joint_by": "gradient", "joint": 0.75}
    built = LocalLearner(net, "super-resolution", sample, blocks=3, rule_options=options)
    assert built._joint.by_gradient
    built.backward(*sample)
    whole = copy.deepcopy(net)
    whole.zero_grad()
    F.l1_loss(whole(sample[0]), sample[1]).backward()
    mine = torch.cat([g.flatten() for g in gradients(net).values()])
    theirs = torch.cat([g.flatten() for g in gradients(whole).values()])
    assert F.cosine_similarity(mine, theirs, dim=0) > 0.9


def test_it_takes_less_of_everything_than_the_first_images() -> None:
    sample = torch.rand(128, 3, 16, 16), torch.randint(0, 10, (128,))

    def cost(**options: Any) -> Any:
        return measure_step(LocalLearner(create("cifar_resnet32", num_classes=10), sample=sample, **options), *sample)

    whole, checkpoint, chosen = cost(rule="e2e"), cost(rule="checkpoint"), cost(blocks=16)
    first = cost(blocks=16, rule_options={"joint_by": "order"})
    assert chosen.activation_peak_bytes < 0.8 * first.activation_peak_bytes < checkpoint.activation_peak_bytes
    assert chosen.flops < min(first.flops, 1.02 * whole.flops)
    assert len(chosen.block_peak_bytes) == 16


def test_nothing_of_the_model_is_changed() -> None:
    net = normalised()
    names = [name for name, _ in net.named_modules()]
    before = {m: dict(vars(m)) for m in net.modules()}
    assert_equal(dict(copy.deepcopy(net).state_dict()), dict(net.state_dict()))
    chosen = learner(net, 0.5)
    images, labels = data()
    with pytest.raises(IndexError):
        chosen.backward(images, labels + 10)  # in the middle of a pass
    chosen.backward(images, labels)
    assert [name for name, _ in net.named_modules()] == names
    assert all(vars(m).keys() == old.keys() for m, old in before.items())
    assert all(m.momentum == 0.1 and m.training for m in net.modules() if isinstance(m, nn.BatchNorm2d))


def test_a_chain_without_normalisation_needs_no_statistics() -> None:
    assert isinstance(model(), Chain)
    built = learner(model(), 0.5)
    assert built._choice is not None
    assert built._choice.statistics._layers == []


def test_more_blocks_than_memory_can_have_hold_no_more_than_fewer() -> None:
    """Where the units of the images' pass alone hold more than a K-th, they are recomputed in longer chains."""
    sample = torch.rand(32, 3, 16, 16), torch.randint(0, 10, (32,))
    net = create("cifar_resnet110", num_classes=10)
    few, many = (glcan.plan(net, sample=sample, blocks=k, baselines=()).cost for k in (16, 55))
    assert many.activation_peak_bytes <= 1.01 * few.activation_peak_bytes
    assert many.flops < 1.05 * few.flops


# -- detection ---------------------------------------------------------------------------------------------------------


def scenes() -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    generator = torch.Generator().manual_seed(6)
    sizes = [(64, 80), (80, 64), (64, 64), (72, 80)]
    images = [torch.rand(3, *size, generator=generator) for size in sizes]
    boxes = [torch.tensor([[8.0 + 4 * i, 8.0, 40.0, 50.0], [2.0, 3.0, 30.0, 20.0 + i]]) for i in range(len(sizes))]
    return images, [{"boxes": box, "labels": torch.tensor([1, 2])} for box in boxes]


def detector(**sizes: Any) -> nn.Module:
    torch.manual_seed(7)
    return create("fcos_small", num_classes=3, width=8, channels=32, **sizes)


@pytest.mark.parametrize("joint", [1.0, 0.5])
def test_detectors_see_images_as_they_were_resized_and_padded_the_first_time(joint: float) -> None:
    net = detector(min_size=(48, 64, 80), max_size=96)
    whole = copy.deepcopy(net)
    built = LocalLearner(net, "detection", scenes(), blocks=3, rule_options={"joint_by": "gradient"})
    assert built._joint == Joint(0.5, 1.0, by_gradient=True)
    built._joint = Joint(joint, 1.0, by_gradient=True)
    torch.manual_seed(8)
    losses = built.backward(*scenes())
    torch.manual_seed(8)
    expected = LocalLearner(whole, "detection", scenes(), rule="e2e").backward(*scenes())
    torch.testing.assert_close(list(losses.values()), list(expected.values()))
    mine, theirs = gradients(net), gradients(whole)
    cut = built.plan.cuts[-1]
    names = [name for name, _ in net.named_parameters()]
    early = names[: next(i for i, name in enumerate(names) if name.startswith(cut))]
    for name in mine:
        if joint == 1 or name not in early:
            torch.testing.assert_close(mine[name], theirs[name], rtol=1e-3, atol=1e-5)
    assert early
    flat = [torch.cat([found[name].flatten() for name in early]) for found in (mine, theirs)]
    assert F.cosine_similarity(*flat, dim=0) > 0.5


def test_detectors_that_draw_random_numbers_elsewhere_do_not_choose() -> None:
    net = detector()
    net.backbone.body.bn1 = nn.Sequential(nn.Dropout(0.1), net.backbone.body.bn1)  # type: ignore[union-attr]
    with pytest.raises(ConfigError, match="random numbers are drawn"):
        LocalLearner(net, "detection", scenes(), blocks=3, rule_options={"joint_by": "gradient"})
