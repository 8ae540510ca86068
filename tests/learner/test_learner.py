"""The learner: equal to plain training where it must be, one step as the other, exact resumption, clear errors."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests import zoo
from tests.zoo import Residual, Small, assert_equal, gradients
from torch import Tensor, nn
from torch.optim import SGD, AdamW

from glcan import LiveMemory, LocalLearner, measure_step
from glcan.errors import CheckpointError, ConfigError, CutError, DataError, UnknownName
from glcan.models import create
from glcan.tasks import Classification

MOMENTUM = partial(SGD, lr=0.05, momentum=0.9, weight_decay=1e-4, nesterov=True)
ADAM = partial(AdamW, lr=1e-3)


def batches(count: int, size: int = 32) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(7)
    for _ in range(count):
        images = torch.randn(4, 3, size, size, generator=generator)
        yield images, torch.randint(0, 10, (4,), generator=generator)


SAMPLE = next(batches(1))
TINY = next(batches(1, 8))


def vit(**options: Any) -> nn.Module:
    return zoo.timm("vit_tiny_patch16_224", img_size=32, patch_size=8, num_classes=10, depth=4, embed_dim=48, **options)


class Dropout(Small):
    def body(self, x: Tensor) -> Tensor:
        return self.d(F.dropout(self.c(F.dropout(self.b(self.a(x)), 0.2)), 0.2))


class Tied(Small):
    def __init__(self) -> None:
        super().__init__()
        self.c.a.weight = self.a.a.weight
        self.d.norm = self.b.norm


class Again(Small):
    def body(self, x: Tensor) -> Tensor:
        return self.d(self.a(self.c(self.a(self.b(self.a(x))))))


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[Tensor, Tensor]]] = {
    "small": (Small, TINY),
    "dropout": (Dropout, TINY),
    "tied": (Tied, TINY),
    "again": (Again, TINY),
    "cifar_resnet20": (lambda: create("cifar_resnet20", num_classes=10), SAMPLE),
    "vit": (partial(vit, drop_rate=0.1, pos_drop_rate=0.1), SAMPLE),
}


def built(build: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return build().train()


def assert_same_state(a: nn.Module, b: nn.Module) -> None:
    assert_equal(dict(a.state_dict()), dict(b.state_dict()))


# -- equal to plain training ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", [MOMENTUM, ADAM], ids=["sgd", "adamw"])
@pytest.mark.parametrize("rule", ["glcan", "e2e", "checkpoint", "checkpoint-sqrt"])
@pytest.mark.parametrize("name", ["dropout", "tied", "cifar_resnet20", "vit"])
def test_one_block_is_plain_back_propagation(name: str, rule: str, optimizer: Any) -> None:
    build, sample = MODELS[name]
    model, plain = built(build), built(build)
    options = {"blocks": 1} if rule == "glcan" else {}
    learner = LocalLearner(model, sample=sample, rule=rule, optimizer=optimizer, **options)
    assert list(learner.auxiliary.parameters()) == []
    reference = optimizer(plain.parameters())
    # the rules share the code: 20 steps of one, and some of each
    for step, batch in enumerate(batches(20 if rule == "glcan" else 4, sample[0].shape[-1])):
        torch.manual_seed(step)
        losses = learner.step(*batch)
        torch.manual_seed(step)
        loss = F.cross_entropy(plain(batch[0]), batch[1])
        loss.backward()
        reference.step()
        reference.zero_grad()
        assert losses == {"block1": loss}
    assert_same_state(model, plain)


@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("name", MODELS)
def test_backward_and_step_agree(name: str, clip: float | None) -> None:
    build, sample = MODELS[name]
    optimizer = partial(SGD, lr=0.05, momentum=0.9) if name != "vit" else ADAM
    learners = []
    for _ in range(2):
        model = built(build)
        learners.append(LocalLearner(model, sample=sample, blocks=4, optimizer=optimizer, clip_norm=clip))
    stepping, collecting = learners
    assert_same_state(stepping.auxiliary, collecting.auxiliary)
    groups = [*collecting._own, collecting._shared]
    own = [(group, optimizer(group)) for group in groups if group]
    for seed, batch in enumerate(batches(4, sample[0].shape[-1])):
        torch.manual_seed(seed)
        a = stepping.step(*batch)
        torch.manual_seed(seed)
        b = collecting.backward(*batch)
        assert a == b
        assert list(a) == ["block1", "block2", "block3", "block4"]
        assert all(not loss.requires_grad and loss.dim() == 0 for loss in a.values())
        for group, updater in own:
            if clip is not None:
                nn.utils.clip_grad_norm_(group, clip)
            updater.step()
            updater.zero_grad()
        assert all(p.grad is None for p in stepping.parameters()), "gradients are freed"
    assert_same_state(stepping.model, collecting.model)
    assert_same_state(stepping.auxiliary, collecting.auxiliary)


@pytest.mark.parametrize("name", ["cifar_resnet20", "vit", "dropout", "tied", "again"])
def test_backward_gives_the_gradients_of_the_local_losses(name: str) -> None:
    """Each block's loss on one full graph, differentiated with respect to that block's parameters alone."""
    build, sample = MODELS[name]
    model = built(build)
    learner = LocalLearner(model, sample=sample, blocks=3)
    twin, auxiliary = copy.deepcopy(model), copy.deepcopy(learner.auxiliary)
    torch.manual_seed(5)
    losses = learner.backward(*sample)
    # the reference: cut by hand
    torch.manual_seed(5)
    cuts = list(learner.plan.cuts)
    wanted: list[Tensor] = []

    def at_cut(cut: str) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any) -> Any:
            k = len(wanted)
            if k < len(cuts) and cut == cuts[k]:
                from glcan.inspect.isolation import Boundary

                name = f"block{k + 1}"
                wanted.append(F.cross_entropy(auxiliary[name](Boundary(k, cut, args), sample), sample[1]))
                return tuple(a.detach() for a in args)
            return None

        return hook

    for cut in cuts:
        twin.get_submodule(cut).register_forward_pre_hook(at_cut(cut))
    wanted.append(F.cross_entropy(twin(sample[0]), sample[1]))
    sum(wanted).backward()
    assert list(losses.values()) == [w.detach() for w in wanted]
    if name in ("tied", "again"):  # summed in another order
        for (n, p), (_, q) in zip(model.named_parameters(), twin.named_parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-5, atol=1e-6, msg=n)
    else:
        assert_equal(gradients(model), gradients(twin))
    assert_equal(gradients(learner.auxiliary), gradients(auxiliary))
    assert_equal(dict(model.named_buffers()), dict(twin.named_buffers()))


def test_gradients_add_up_over_calls() -> None:
    learner = LocalLearner(built(Small).eval(), sample=TINY, blocks=3)
    learner.backward(*TINY)
    once = {n: g.clone() for n, g in gradients(learner.model).items()}
    learner.backward(*TINY)
    assert_equal(gradients(learner.model), {n: 2 * g for n, g in once.items()})


def test_every_parameter_is_in_one_place() -> None:
    for build, sample in MODELS.values():
        learner = LocalLearner(built(build), sample=sample, blocks=4, optimizer=MOMENTUM)
        mine = [id(p) for p in learner.parameters()]
        wanted = {id(p) for m in (learner.model, learner.auxiliary) for p in m.parameters()}
        assert len(mine) == len(set(mine))
        assert set(mine) == wanted
        grouped = [id(p) for o in learner.optimizers for g in o.param_groups for p in g["params"]]
        assert sorted(grouped) == sorted(mine)


def test_tied_parameters_are_updated_once_by_the_sum() -> None:
    learner = LocalLearner(built(Tied), sample=TINY, cuts=["b", "c", "d"], optimizer=partial(SGD, lr=1.0))
    other = LocalLearner(built(Tied), sample=TINY, cuts=["b", "c", "d"])
    other.backward(*TINY)
    before = learner.model.a.a.weight.detach().clone()
    learner.step(*TINY)
    assert torch.equal(before - learner.model.a.a.weight, before - (before - other.model.a.a.weight.grad))
    assert len(learner.optimizers) == 5


# -- precision -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["small", "tied", "vit"])
def test_autocast_of_the_learner_is_that_of_the_user(name: str) -> None:
    build, sample = MODELS[name]
    size = sample[0].shape[-1]
    states = []
    for own in (True, False, None):
        model = built(build)
        learner = LocalLearner(
            model, sample=sample, blocks=3, optimizer=MOMENTUM, autocast=torch.bfloat16 if own else None
        )
        losses = []
        if own is None:  # around the whole loop: the casts of weights must not outlive their update
            with torch.autocast("cpu", torch.bfloat16):
                for seed, batch in enumerate(batches(3, size)):
                    torch.manual_seed(seed)
                    losses.append(learner.step(*batch))
        else:
            for seed, batch in enumerate(batches(3, size)):
                torch.manual_seed(seed)
                with torch.autocast("cpu", torch.bfloat16, enabled=not own):
                    losses.append(learner.step(*batch))
        assert all(p.dtype == torch.float32 for p in model.parameters())
        states.append((losses, dict(model.state_dict())))
    for losses, state in states[1:]:
        assert losses == states[0][0]
        assert_equal(state, states[0][1])
    plain = LocalLearner(built(build), sample=sample, blocks=3, optimizer=MOMENTUM)
    torch.manual_seed(0)
    assert plain.step(*next(batches(1, size))) != states[0][0][0], "bfloat16 was on"


def test_a_gradient_scaler() -> None:
    plain = LocalLearner(built(Small), sample=TINY, blocks=3)
    scaled = LocalLearner(built(Small), sample=TINY, blocks=3)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    optimizer, reference = SGD(scaled.parameters(), lr=0.1), SGD(plain.parameters(), lr=0.1)
    losses = scaled.backward(*TINY, scaler=scaler)
    assert losses == plain.backward(*TINY)
    weight = scaled.model.a.a.weight
    torch.testing.assert_close(weight.grad, plain.model.a.a.weight.grad * 2**10)
    scaler.step(optimizer)
    scaler.update()
    reference.step()
    torch.testing.assert_close(weight, plain.model.a.a.weight)


def test_double_precision_model() -> None:
    learner = LocalLearner(built(Small).double(), sample=(TINY[0].double(), TINY[1]), blocks=3, optimizer=MOMENTUM)
    losses = learner.step(TINY[0].double(), TINY[1])
    assert all(loss.dtype == torch.float64 for loss in losses.values())


# -- what models and people do -------------------------------------------------------------------------------------


def test_frozen_parts() -> None:
    model = built(Small)
    model.stem.requires_grad_(False)
    model.c.requires_grad_(False)  # all of a block in the middle
    model.a.b.weight.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    learner = LocalLearner(model, sample=TINY, cuts=["b", "c", "d"], optimizer=MOMENTUM)
    losses = learner.step(*TINY)
    assert list(losses) == ["block1", "block2", "block4"]
    assert list(learner.auxiliary) == ["block1", "block2"]
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trainable - changed <= {"a.a.bias", "b.a.bias", "d.a.bias"}
    assert changed <= trainable


def test_freezing_afterwards_is_told() -> None:
    learner = LocalLearner(built(Small), sample=TINY, cuts=["b", "c"])
    learner.model.b.requires_grad_(False)
    with pytest.raises(ConfigError, match="frozen or thawed"):
        learner.backward(*TINY)


@pytest.mark.parametrize("name", ["small", "dropout", "tied", "cifar_resnet20", "vit"])
def test_frozen_blocks_only_run_forward(name: str) -> None:
    """The others get the very same gradients, and parameters that are used in both kinds those of the others."""
    build, sample = MODELS[name]
    learners = [LocalLearner(built(build), sample=sample, blocks=3, optimizer=MOMENTUM) for _ in range(2)]
    plain, mine = learners
    mine.auxiliary.load_state_dict(plain.auxiliary.state_dict())
    mine.frozen = 1
    losses = []
    for learner in learners:
        torch.manual_seed(3)
        losses.append(learner.backward(*sample))
    assert list(losses[1]) == ["block2", "block3"]
    assert all(torch.equal(loss, losses[0][key]) for key, loss in losses[1].items())
    assert torch.is_grad_enabled()
    own = [len(learner._own[0]) for learner in learners]
    assert own[0] == own[1] > 0
    assert all(p.grad is None for p in mine._own[0])
    for k in (1, 2):
        for one, other in zip(plain._own[k], mine._own[k], strict=True):
            assert torch.equal(one.grad, other.grad)
    assert all(p.grad is not None for p in mine._shared)

    mine.frozen = 0
    costs = []
    for frozen in range(3):
        mine.frozen = frozen
        costs.append(measure_step(mine, *sample))
    assert costs[0].flops > costs[1].flops > costs[2].flops
    assert costs[0].activation_peak_bytes >= costs[1].activation_peak_bytes >= costs[2].activation_peak_bytes


@pytest.mark.parametrize("name", list(MODELS))
def test_end_to_end_gradients_are_those_of_back_propagation(name: str) -> None:
    """Those of the model; the auxiliary networks get the ones that they get when blocks learn by themselves."""
    build, sample = MODELS[name]
    local, mine, plain = (LocalLearner(built(build), sample=sample, blocks=3) for _ in range(3))
    plain.auxiliary = torch.nn.ModuleDict()
    mine.auxiliary.load_state_dict(local.auxiliary.state_dict())
    mine.end_to_end = True
    called: list[str] = []
    mine.after_block = called.append
    losses = []
    for learner in (local, mine):
        torch.manual_seed(3)
        losses.append(learner.backward(*sample))
    torch.manual_seed(3)
    loss = plain.task.loss(plain.model(*sample[:1]), sample)
    loss.backward()
    assert losses[1]["block3"] == loss
    assert losses[0] == losses[1]
    assert called == ["block1", "block2", "block3"]
    for one, other in zip(mine.model.parameters(), plain.model.parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None)
        assert one.grad is None or torch.equal(one.grad, other.grad)
    for one, other in zip(mine.auxiliary.parameters(), local.auxiliary.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)


def test_end_to_end_steps_need_the_memory_of_checkpointing_and_no_block_frozen() -> None:
    build, sample = MODELS["cifar_resnet20"]
    mine = LocalLearner(built(build), sample=sample, blocks=3, optimizer=MOMENTUM)
    checkpoint, plain = (LocalLearner(built(build), sample=sample, rule=r) for r in ("checkpoint", "e2e"))
    mine.end_to_end = True
    activations = measure_step(mine, *sample).activation_peak_bytes
    assert activations <= 1.1 * measure_step(checkpoint, *sample).activation_peak_bytes
    assert activations < 0.6 * measure_step(plain, *sample).activation_peak_bytes
    mine.frozen = 1
    with pytest.raises(ConfigError, match="frozen is 1, but end_to_end trains every block"):
        mine.step(*sample)


@pytest.mark.parametrize("end_to_end", [False, True])
def test_thawed_blocks_have_the_gradients_of_blocks_never_frozen(end_to_end: bool) -> None:
    build, sample = MODELS["cifar_resnet20"]
    thawed, never = (LocalLearner(built(build), sample=sample, blocks=3) for _ in range(2))
    thawed.frozen = 2
    thawed.backward(*sample)
    for mine in (thawed, never):
        mine.frozen, mine.end_to_end = 0, end_to_end
        mine.model.load_state_dict(built(build).state_dict())
        for parameter in (*mine.model.parameters(), *mine.auxiliary.parameters()):
            parameter.grad = None
        mine.backward(*sample)
    for ours, theirs in zip(thawed.model.parameters(), never.model.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)


def test_end_to_end_clips_each_block_and_scales_for_float16() -> None:
    plain_sgd = partial(torch.optim.SGD, lr=1.0)
    clipped = LocalLearner(built(Small), sample=TINY, blocks=3, optimizer=plain_sgd, clip_norm=0.1)
    clipped.end_to_end = True
    before = [[p.detach().clone() for p in own] for own in clipped._own]
    clipped.step(*TINY)
    for own, old in zip(clipped._own, before, strict=True):
        moved = torch.cat([(p.detach() - o).flatten() for p, o in zip(own, old, strict=True)])
        assert moved.norm() == pytest.approx(0.1, rel=1e-3)
    scaled = LocalLearner(built(Small), sample=TINY, blocks=3)
    scaled.end_to_end = True
    scaled.backward(*TINY, scaler=torch.amp.GradScaler("cpu", init_scale=8.0))
    plain = LocalLearner(built(Small), sample=TINY, rule="e2e")
    plain.backward(*TINY)
    for one, other in zip(scaled.model.parameters(), plain.model.parameters(), strict=True):
        assert one.grad is None or torch.allclose(one.grad, 8 * other.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("frozen", [-1, 2])
def test_the_last_block_is_never_frozen(frozen: int) -> None:
    learner = LocalLearner(Small(), sample=TINY, blocks=2)
    learner.frozen = frozen
    with pytest.raises(ConfigError, match=f"frozen is {frozen}, but of 2 blocks 0 to 1 can be frozen"):
        learner.backward(*TINY)


def test_older_tensors_that_enter_a_later_cut() -> None:
    """A dense layer takes all earlier features: those of older blocks are no part of the local loss."""
    torchvision = pytest.importorskip("torchvision.models")
    model = built(lambda: torchvision.DenseNet(8, (4, 4), 16, num_classes=10))
    learner = LocalLearner(model, sample=SAMPLE, blocks=7, optimizer=MOMENTUM)
    layer = next(u for u in learner.plan.units[3:] if "denselayer" in u[0].name)[0]
    assert len(layer.entering) < len(learner.profile.unit(layer.name).entering)
    assert len(learner.step(*SAMPLE)) == 7
    learner.end_to_end = True  # all of them have a graph now
    assert len(learner.step(*SAMPLE)) == 7


def test_the_same_tensor_as_two_arguments() -> None:
    class Two(Residual):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return super().forward(x) + y

    class Twice(Small):
        unit = Two

        def body(self, x: Tensor) -> Tensor:
            for unit in (self.a, self.b, self.c, self.d):
                x = unit(x, x)
            return x

    assert len(LocalLearner(built(Twice), sample=TINY, blocks=4).backward(*TINY)) == 4


def test_blocks_that_stand_side_by_side_are_refused() -> None:
    class Parallel(Small):
        def body(self, x: Tensor) -> Tensor:
            return self.d(self.a(x) + self.b(x) + self.c(x))

    with pytest.raises(CutError, match="Nothing that block2 computes enters the cut at 'b'"):
        LocalLearner(built(Parallel), sample=TINY, cuts=["a", "b"])
    LocalLearner(built(Parallel), sample=TINY, cuts=["a", "d"])


def test_a_cut_that_is_not_reached() -> None:
    class Skips(Small):
        skip = False

        def body(self, x: Tensor) -> Tensor:
            x = self.b(self.a(x))
            return self.d(x if self.skip else self.c(x))

    learner = LocalLearner(built(Skips), sample=TINY, cuts=["b", "c"])
    learner.model.skip = True
    with pytest.raises(CutError, match="without reaching the cut 'c'"):
        learner.backward(*TINY)
    learner.model.skip = False
    learner.backward(*TINY)


def test_other_batch_and_image_sizes() -> None:
    learner = LocalLearner(built(MODELS["cifar_resnet20"][0]), sample=SAMPLE, blocks=4, optimizer=MOMENTUM)
    learner.step(torch.randn(2, 3, 32, 32), torch.tensor([1, 2]))
    learner.step(torch.randn(7, 3, 48, 48), torch.arange(7))
    learner.step(torch.randn(2, 3, 20, 36), torch.tensor([1, 2]))


def test_a_model_that_writes_into_its_input() -> None:
    class Writes(Small):
        def forward(self, x: Tensor) -> Tensor:
            x.mul_(2)
            return super().forward(x)

    images = TINY[0].clone()
    LocalLearner(built(Writes), sample=(images, TINY[1]), blocks=3, optimizer=MOMENTUM).step(images, TINY[1])
    assert torch.equal(images, TINY[0])


def test_outputs_of_other_kinds() -> None:
    class Dict(Small):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"features": x, "logits": super().forward(x)}

    plain = LocalLearner(built(Small), sample=TINY, blocks=3).backward(*TINY)
    task = Classification(classes=10)
    assert LocalLearner(built(Dict), task, sample=TINY, blocks=3).backward(*TINY) == plain
    learner = LocalLearner(zoo.hf_vit(), sample=SAMPLE, blocks=3, optimizer=MOMENTUM)
    assert len(learner.step(*SAMPLE)) == 3


def test_the_model_is_the_users_own() -> None:
    model = built(Small)
    names = list(model.state_dict())
    learner = LocalLearner(model, sample=TINY, blocks=4, optimizer=MOMENTUM)
    learner.step(*TINY)
    assert learner.model is model
    assert list(model.state_dict()) == names
    assert not any("forward" in m.__dict__ or "_forward_hooks" not in m.__dict__ for m in model.modules())
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())
    learner.eval()
    assert not model.training
    assert not learner.auxiliary.training
    assert learner.train() is learner
    assert model.training
    assert learner.auxiliary.training
    assert "4 blocks" in repr(learner)


def test_activations_peak_at_one_block() -> None:
    peaks = {}
    for blocks in (1, 4, 8):
        model = built(lambda: create("cifar_resnet32", num_classes=10))
        learner = LocalLearner(model, sample=SAMPLE, blocks=blocks, optimizer=MOMENTUM)
        learner.step(*SAMPLE)
        memory = LiveMemory(model, auxiliary=learner.auxiliary, optimizers=learner.optimizers, inputs=SAMPLE)
        with memory:
            learner.step(*SAMPLE)
        peaks[blocks] = memory.activation_peak_bytes
        assert memory.current["activations"] < 100
        assert memory.current["gradients"] == 0
    assert peaks[4] < 0.4 * peaks[1]
    assert peaks[8] < 0.26 * peaks[1]


def test_an_error_in_a_step_leaves_a_learner_that_goes_on() -> None:
    learner = LocalLearner(built(Small).eval(), sample=TINY, blocks=3)
    wanted = learner.backward(*TINY)
    with pytest.raises(RuntimeError):
        learner.backward(TINY[0][:, :2], TINY[1])
    with pytest.raises(ValueError, match="batch_size"):
        learner.backward(TINY[0], TINY[1][:2])
    assert not any("forward" in m.__dict__ for m in learner.model.modules())
    assert learner.backward(*TINY) == wanted


# -- resumption ----------------------------------------------------------------------------------------------------


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("optimizer", [MOMENTUM, ADAM], ids=["sgd", "adamw"])
@pytest.mark.parametrize("name", ["dropout", "tied", "vit"])
def test_resumption_is_exact(name: str, optimizer: Any) -> None:
    build, sample = MODELS[name]
    every = list(batches(5, sample[0].shape[-1]))
    whole = LocalLearner(built(build), sample=sample, blocks=4, optimizer=optimizer)
    first = LocalLearner(built(build), sample=sample, blocks=4, optimizer=optimizer)
    torch.manual_seed(1)
    for batch in every:
        whole.step(*batch)
    torch.manual_seed(1)
    for batch in every[:3]:
        first.step(*batch)
    rng, state = torch.get_rng_state(), through_a_file(first.state_dict())
    torch.manual_seed(99)
    second = LocalLearner(build().train(), sample=sample, blocks=4, optimizer=optimizer)
    second.load_state_dict(state)
    torch.set_rng_state(rng)
    for batch in every[3:]:
        second.step(*batch)
    assert_same_state(second.model, whole.model)
    assert_same_state(second.auxiliary, whole.auxiliary)


class Wider(Small):
    def __init__(self) -> None:
        super().__init__()
        self.d.b = nn.Conv2d(8, 8, 5, 1, 2)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (dict(cuts=["a", "c"]), "cuts"),
        (dict(rule="e2e", cuts=None), "rule='e2e'"),
        (dict(rule_options={"use_local": False}), "rule_options"),
        (dict(units=["stem", "a", "b", "c", "d"]), "units"),
        (dict(model=Wider), "'d.b.weight': 8x8x5x5 there, 8x8x3x3 here"),
        (dict(optimizer=None), "0 optimizers, this learner has 3"),
        (dict(optimizer=ADAM), "another kind"),
    ],
)
def test_a_state_of_another_learner_changes_nothing(other: dict[str, Any], message: str) -> None:
    def learner(model: Any = Small, **options: Any) -> LocalLearner:
        return LocalLearner(model(), sample=TINY, **({"cuts": ["b", "d"], "optimizer": MOMENTUM} | options))

    mine, theirs = learner(), learner(**other)
    mine.step(*TINY)
    before = copy.deepcopy(mine.state_dict())
    with pytest.raises(CheckpointError, match=message):
        mine.load_state_dict(theirs.state_dict())
    after = mine.state_dict()
    assert_equal(dict(after["model"]), dict(before["model"]))
    assert_equal(dict(after["auxiliary"]), dict(before["auxiliary"]))
    for new, old in zip(after["optimizers"], before["optimizers"], strict=True):
        assert new["param_groups"] == old["param_groups"]
        for key in old["state"]:
            assert torch.equal(new["state"][key]["momentum_buffer"], old["state"][key]["momentum_buffer"])


def test_what_is_no_state() -> None:
    learner = LocalLearner(Small(), sample=TINY, blocks=2)
    with pytest.raises(CheckpointError, match="auxiliary, identity, optimizers missing"):
        learner.load_state_dict({"model": {}})
    with pytest.raises(CheckpointError, match="no learner's state"):
        learner.load_state_dict(learner.model.state_dict())


def test_a_scheduler_does_not_hinder_resumption() -> None:
    learner = LocalLearner(Small(), sample=TINY, blocks=2, optimizer=MOMENTUM)
    schedules = [torch.optim.lr_scheduler.StepLR(o, 1) for o in learner.optimizers]
    learner.step(*TINY)
    for schedule in schedules:
        schedule.step()
    fresh = LocalLearner(Small(), sample=TINY, blocks=2, optimizer=MOMENTUM)
    fresh.load_state_dict(through_a_file(learner.state_dict()))
    assert fresh.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.005)


# -- errors --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (dict(sample=None, blocks=2), ConfigError, "sample is missing"),
        (dict(), CutError, "either blocks=K or cuts"),
        (dict(blocks=2, cuts=["b"]), CutError, "either blocks=K or cuts"),
        (dict(blocks=7), CutError, "blocks=7.*1 to 5 blocks"),
        (dict(blocks=0), CutError, "blocks=0"),
        (dict(cuts=["e"]), UnknownName, "cut 'e'"),
        (dict(cuts=["stem"]), CutError, "No block can begin at 'stem'"),
        (dict(cuts=["c", "b"]), CutError, r"use \['b', 'c'\]"),
        (dict(blocks=2, rule="e2e"), CutError, "baseline 'e2e' trains the whole model"),
        (dict(cuts=["b"], rule="checkpoint"), CutError, "baseline 'checkpoint'"),
        (dict(blocks=2, rule="glcn"), UnknownName, "rule 'glcn'.*'glcan'"),
        (dict(blocks=2, task="clasification"), UnknownName, "task 'clasification'"),
        (dict(blocks=2, autocast=torch.float64), ConfigError, "autocast is torch.float64"),
        (dict(blocks=2, clip_norm=0), ConfigError, "clip_norm is 0"),
        (dict(blocks=2, optimizer=lambda p: "sgd"), ConfigError, "gave str; it must return a torch.optim.Optimizer"),
        (dict(blocks=2, sample=(TINY[0], TINY[1] + 10)), DataError, "but the model gives 10 classes"),
        (dict(blocks=2, sample=(TINY[0], TINY[1] - 10)), DataError, "A label is -"),
        (dict(blocks=2, sample=(TINY[0],)), ConfigError, "this one has 1 items"),
        (dict(blocks=2, sample=(TINY[0][:, :1], TINY[1])), ConfigError, "cannot be run on a batch of shapes"),
        (dict(blocks=2, units=["a", "b.norm", "zz"]), UnknownName, "unit 'zz'"),
    ],
)
def test_errors(options: dict[str, Any], error: type[Exception], message: str) -> None:
    model = Small()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=message):
        LocalLearner(model, **({"sample": TINY} | options))
    assert_equal(dict(model.state_dict()), dict(before))
    assert not any("forward" in m.__dict__ for m in model.modules())


def test_step_needs_an_optimizer() -> None:
    learner = LocalLearner(Small(), sample=TINY, blocks=2)
    with pytest.raises(ConfigError, match="step.. needs an optimizer"):
        learner.step(*TINY)


@pytest.mark.parametrize("blocks", [1, 3])
@pytest.mark.parametrize("recompute", [True, ["block1"]])
def test_recomputation_inside_blocks_changes_no_bit(blocks: int, recompute: Any) -> None:
    torch.manual_seed(0)
    plain = create("cifar_resnet20", num_classes=10)
    again = copy.deepcopy(plain)
    batch = torch.randn(6, 3, 32, 32), torch.arange(6)
    learners = []
    for model, wanted in ((plain, False), (again, recompute)):
        torch.manual_seed(1)
        learners.append(
            LocalLearner(
                model, sample=batch, blocks=blocks, recompute=wanted, optimizer=partial(SGD, lr=0.1, momentum=0.9)
            )
        )
    for _ in range(3):
        losses = [learner.step(*batch) for learner in learners]
        assert_equal(losses[0], losses[1])
    assert_equal(plain.state_dict(), again.state_dict())
    assert_equal(learners[0].auxiliary.state_dict(), learners[1].auxiliary.state_dict())


def test_recomputation_is_for_blocks_that_exist() -> None:
    model = create("cifar_resnet20", num_classes=10)
    batch = torch.randn(6, 3, 32, 32), torch.arange(6)
    with pytest.raises(UnknownName, match="block or unit to recompute 'block9'"):
        LocalLearner(model, sample=batch, blocks=3, recompute=["block9"])
    with pytest.raises(ConfigError, match="choose the baseline 'checkpoint'"):
        LocalLearner(model, sample=batch, rule="e2e", recompute=True)


def test_the_isolation_does_not_look_at_the_optimizer(monkeypatch: pytest.MonkeyPatch) -> None:
    """AdamW and clipping have hundreds of operations, and a look at one takes as long as a small one itself."""
    seen = zoo.watched(monkeypatch)
    counts = []
    for options in ({"optimizer": partial(SGD, lr=0.1)}, {"optimizer": ADAM, "clip_norm": 1.0}):
        learner = LocalLearner(built(Small), sample=TINY, cuts=["b", "d"], **options)
        seen.clear()
        learner.step(*TINY)
        counts.append(len(seen))
    assert counts[0] == counts[1]


def test_blocks_report_when_they_are_trained() -> None:
    model = create("cifar_resnet20", num_classes=10)
    batch = torch.randn(6, 3, 32, 32), torch.arange(6)
    learner = LocalLearner(model, sample=batch, blocks=3, optimizer=partial(SGD, lr=0.1))
    seen: list[str] = []
    learner.after_block = seen.append
    learner.step(*batch)
    assert seen == ["block1", "block2", "block3"]
