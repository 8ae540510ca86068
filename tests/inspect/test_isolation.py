"""Isolation: gradients, outputs and buffers against the full graph; what models do to break it."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import gc
from collections import OrderedDict
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from tests import zoo
from tests.zoo import Residual, Small, assert_equal, gradients, loss_of
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from glcan.errors import CutError, GradientLeak, UnknownName
from glcan.inspect.isolation import Boundary, Isolation
from glcan.inspect.leaks import leaked_parameters
from glcan.inspect.tensors import tensors_in
from glcan.learner import LocalLearner
from glcan.cost.step import LiveMemory
from glcan.inspect.profile import Profile
from glcan.inspect.record import profile


@dataclasses.dataclass
class Run:
    output: Any
    losses: list[Tensor]
    boundaries: list[Boundary]
    entering: list[tuple[Tensor, ...]]  # as it was at the cut


def isolated(model: nn.Module, batch: Any, units: list[str], cuts: list[str], held: Any = None) -> Run:
    """One pass with each block's backward at its cut."""
    losses: list[Tensor] = []
    boundaries: list[Boundary] = []
    values: list[tuple[Tensor, ...]] = []

    def at_cut(boundary: Boundary) -> None:
        loss = loss_of(boundary.entering)
        losses.append(loss.detach())
        boundaries.append(boundary)
        values.append(tuple(t.detach().clone() for t in boundary.entering))
        if loss.requires_grad:
            loss.backward()

    batch = zoo.copied(batch)
    with Isolation(model, units, cuts, at_cut, held) as isolation:
        output = zoo.call(model, batch)
        loss = loss_of(output)
        losses.append(loss.detach())
        with isolation.replay():
            loss.backward()
    return Run(output, losses, boundaries, values)


def assert_isolated(model: nn.Module, batch: Any, cuts: list[str] | int = 4, **options: Any) -> Run:
    """One isolated pass equals the full graph's local gradients, bit for bit, buffers included."""
    args, kwargs = zoo.arguments(batch)
    found = profile(model, args, kwargs, **options)
    if isinstance(cuts, int):
        cuts = zoo.evenly(found.cuttable, cuts)
    twin = copy.deepcopy(model)
    torch.manual_seed(1)
    run = isolated(model, batch, found.names, cuts, {cut: found.crossing[cut] for cut in cuts})
    state = torch.get_rng_state()
    torch.manual_seed(1)
    wanted = zoo.reference(twin, batch, found, cuts, run.entering)
    assert torch.equal(state, torch.get_rng_state())
    assert len(run.losses) == len(cuts) + 1
    for mine, theirs in zip(tensors_in(run.output), tensors_in(wanted.output), strict=True):
        assert torch.equal(mine, theirs)
    assert_equal(dict(model.named_buffers()), dict(twin.named_buffers()))
    assert_equal(gradients(model), wanted.gradients)
    assert sum(1 for g in wanted.gradients.values() if g.abs().sum() > 0) > len(wanted.gradients) // 2
    return run


@pytest.mark.filterwarnings("ignore")  # of other people's libraries
@pytest.mark.parametrize("name", zoo.ZOO)
def test_gradients_outputs_and_buffers_equal_the_full_graph(name: str) -> None:
    build, sample = zoo.ZOO[name]
    model = build().train()
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():  # the last layer of a residual branch, often: nothing would reach what is before
                parameter.normal_(0, 0.1)
    assert_isolated(model, sample())


def test_the_reference_is_not_plain_back_propagation() -> None:
    """The comparison above could fail: the last loss alone would give the early blocks other gradients."""
    model, batch = Small(), zoo.images(2, 8)
    found = profile(model, (batch,))
    wanted = zoo.reference(model, batch, found, ["c"]).gradients
    loss_of(model(batch)).backward()
    assert_equal(
        {n: p.grad for n, p in model.d.named_parameters()}, {n: wanted[f"d.{n}"] for n, _ in model.d.named_parameters()}
    )
    assert not torch.equal(model.a.a.weight.grad, wanted["a.a.weight"])


# -- what models do ------------------------------------------------------------------------------------------------


class SkipOverACut(Small):
    def body(self, x: Tensor) -> Tensor:
        skip = self.a(x)
        y = self.c(self.b(skip))
        return self.d(y + skip) * skip


class GlueOnASkip(Small):
    """The glue works on an older block's tensor: without a gradient in a later block, with one in the whole graph."""

    def body(self, x: Tensor) -> Tensor:
        skip = self.a(x)
        y = self.b(skip)
        y = y + F.avg_pool2d(skip, 3, 1, 1).flatten(1).view_as(skip) * 2
        doubled = y * 2
        return self.d(self.c(y)) + doubled


class Two(Residual):
    def forward(self, x: Tensor, y: Tensor | None = None, *, scale: Tensor | None = None) -> Any:
        x = super().forward(x)
        x = x if y is None else x + y
        return x if scale is None else x * scale


class SeveralTensors(Small):
    unit = Two

    def body(self, x: Tensor) -> Tensor:
        y = self.a(x)
        z = self.b(y)
        z = self.c(z, y=y, scale=z.mean((2, 3), keepdim=True))
        return self.d(z, y)


class SameTensorTwice(Small):
    unit = Two

    def body(self, x: Tensor) -> Tensor:
        x = self.b(self.a(x))
        return self.d(self.c(x, x))


@dataclasses.dataclass
class Features:
    x: Tensor
    skip: Tensor | None = None
    step: int = 0


class Pair(NamedTuple):
    x: Tensor
    skip: Tensor


class _Structured(Residual):
    """Takes and gives a dict, a dataclass, a named tuple, a list or a transformers-like ordered dict."""

    def forward(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            value = {"x": value, "skip": value * 2}
        x, skip = (value["x"], value["skip"]) if isinstance(value, dict) else (value.x, value.skip)
        y = super().forward(x) + skip
        if type(value) is dict:
            return Features(y, x)
        if isinstance(value, Features):
            return Pair(y, x)
        if isinstance(value, Pair):
            return OrderedDict(x=y, skip=x)
        return y


class Structured(Small):
    unit = _Structured


class Listed(Small):
    class unit(Residual):
        def forward(self, features: Any) -> Any:
            features = features if isinstance(features, list) else [features]
            return [*features, super().forward(sum(features))]

    def body(self, x: Tensor) -> Tensor:
        return sum(super().body(x))


class InPlaceUnit(Small):
    class unit(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(8, 8, 3, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            return self.layers(x)


class InPlaceGlue(Small):
    def body(self, x: Tensor) -> Tensor:
        x = self.a(x)
        y = self.b(x.clone())
        x += y
        x[:, 1] = y[:, 0]
        x = self.c(x)
        x.mul_(2).add_(y)
        x[:, 0] += y[:, 2]
        return self.d(x)


class SetItem(Small):
    """The only operation that changes an older tensor gives nothing back."""

    def body(self, x: Tensor) -> Tensor:
        x = self.a(x)
        y = self.b(x * 1)
        x[:, 1] = y[:, 0]
        return self.d(self.c(x * 1) + x)


class BufferWrittenThroughAView(Small):
    def body(self, x: Tensor) -> Tensor:
        x = self.a(x)
        padded = x.new_zeros(x.shape[0], 8, x.shape[2] + 2, x.shape[3] + 2)
        padded[:, :, 1:-1, 1:-1].copy_(x)
        x = self.c(self.b(padded * 1))
        padded[:, :2].add_(x[:, :2])
        return self.d(padded)


class Dropout(Small):
    def body(self, x: Tensor) -> Tensor:
        return self.d(F.dropout(self.c(F.dropout2d(self.b(self.a(x)), 0.3)), 0.5))


class Tied(Small):
    def __init__(self) -> None:
        super().__init__()
        self.c.a.weight = self.a.a.weight
        self.d = self.d.requires_grad_(False)
        self.scale = nn.Parameter(torch.randn(8, 1, 1))

    def body(self, x: Tensor) -> Tensor:
        return self.d(self.c(self.b(self.a(x) * self.scale)) * self.scale)


class Again(Small):
    """A unit that is called in several blocks."""

    def body(self, x: Tensor) -> Tensor:
        return self.d(self.a(self.c(self.a(self.b(self.a(x))))))


class WritesIntoItsInput(Small):
    def forward(self, x: Tensor) -> Tensor:
        x *= 3
        return super().forward(x)


class Transposed(Small):
    def body(self, x: Tensor) -> Tensor:
        x = self.a(x)
        y = self.b(x.mT)
        return self.d(self.c(y.mT + x) + x.flatten(2).mT.mT.view_as(x))


MODELS = [
    SkipOverACut,
    GlueOnASkip,
    SeveralTensors,
    SameTensorTwice,
    Structured,
    Listed,
    InPlaceUnit,
    InPlaceGlue,
    SetItem,
    BufferWrittenThroughAView,
    Dropout,
    Tied,
    Again,
    WritesIntoItsInput,
    Transposed,
]


@pytest.mark.parametrize("cuts", [["b", "c", "d"], ["b", "head"], ["c"]], ids=",".join)
@pytest.mark.parametrize("model", MODELS, ids=lambda m: m.__name__)
def test_models_of_our_own(model: type[Small], cuts: list[str]) -> None:
    if model is Tied and "d" in cuts:
        cuts = [*cuts[:-1], "head"]
    assert_isolated(model(), zoo.images(2, 8), cuts, units=Small.units)


@pytest.mark.parametrize("model", [Small, SkipOverACut, Dropout])
def test_eval_mode_and_channels_last(model: type[Small]) -> None:
    assert_isolated(model().eval(), zoo.images(2, 8), ["b", "d"])
    model = model().to(memory_format=torch.channels_last)
    run = assert_isolated(model, zoo.images(2, 8).to(memory_format=torch.channels_last), ["b", "d"])
    assert all(b.entering[0].is_contiguous(memory_format=torch.channels_last) for b in run.boundaries)


@pytest.mark.parametrize("model", [Small, SkipOverACut, Tied])
def test_autocast(model: type[Small]) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        run = assert_isolated(model(), zoo.images(2, 8), ["b", "c"])
    assert run.output.dtype == torch.bfloat16


def test_a_user_mode_inside_and_outside() -> None:
    class Inside(Small):
        def body(self, x: Tensor) -> Tensor:
            skip = self.a(x)
            with torch.device("cpu"):
                y = self.b(skip) + torch.zeros(())
            return self.d(self.c(y) + skip)

    with torch.device("cpu"):
        assert_isolated(Inside(), zoo.images(2, 8), ["b", "c", "d"])


def test_a_cut_while_another_mode_is_on_top() -> None:
    class Inside(Small):
        def body(self, x: Tensor) -> Tensor:
            with torch.device("cpu"):
                return super().body(x)

    assert_isolated(Inside(), zoo.images(2, 8), ["b", "c", "d"])


def test_an_input_that_needs_a_gradient() -> None:
    model, batch = Small(), zoo.images(2, 8).requires_grad_()
    with Isolation(model, Small.units, ["b", "d"], lambda b: loss_of(b.entering).backward()):
        loss_of(model(batch)).backward()
    wanted = zoo.images(2, 8).copy_(batch.detach()).requires_grad_()
    loss_of(model.a(model.stem(wanted))).backward()
    assert torch.equal(batch.grad, wanted.grad)


# -- checkpointing inside the model --------------------------------------------------------------------------------


class CheckpointInside(Small):
    class unit(Residual):
        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(super().forward, x, use_reentrant=False)


class CheckpointAround(Small):
    def body(self, x: Tensor) -> Tensor:
        for unit in (self.a, self.b, self.c, self.d):
            x = checkpoint(unit, x, use_reentrant=False)
        return x


class CheckpointOverACut(Small):
    def body(self, x: Tensor) -> Tensor:
        return checkpoint_sequential([self.a, self.b, self.c, self.d], 2, x, use_reentrant=False)


class CheckpointOverACutOfLinears(CheckpointOverACut):
    """A linear layer saves its weight only if its input needs a gradient, so a recomputation must tell the blocks."""

    class unit(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.tanh(self.a(x)))


class LinearsAround(CheckpointOverACutOfLinears):
    body = CheckpointAround.body


@pytest.mark.parametrize(
    "model",
    [CheckpointInside, CheckpointAround, CheckpointOverACut, CheckpointOverACutOfLinears, LinearsAround],
)
@pytest.mark.parametrize("cuts", [["b", "c", "d"], ["c"], ["b", "d"]], ids=",".join)
def test_checkpointing_in_the_model(model: type[Small], cuts: list[str]) -> None:
    class Plain(Small):
        unit = Residual if issubclass(model.unit, Residual) else model.unit

    plain = Plain()
    plain.eval()  # a recomputation updates the statistics of batch normalisation again
    checkpointing = model()
    checkpointing.load_state_dict(plain.state_dict())
    checkpointing.eval()
    batch = zoo.images(2, 8)
    isolated(plain, batch, list(Small.units), cuts)
    isolated(checkpointing, batch, list(Small.units), cuts)
    assert_equal(gradients(checkpointing), gradients(plain))


def _peak(model: nn.Module, batch: Tensor, units: list[str], cuts: list[str]) -> int:
    model.zero_grad()
    isolation = Isolation(model, units, cuts, lambda b: loss_of(b.entering).backward())
    with LiveMemory(model, inputs=batch) as memory, isolation:
        loss = loss_of(model(batch))
        with isolation.replay():
            loss.backward()
    return memory.activation_peak_bytes


@pytest.mark.parametrize("library", ["timm", "transformers"])
def test_checkpointing_as_libraries_do_it(library: str) -> None:
    def build() -> Any:
        torch.manual_seed(0)
        if library == "timm":
            return zoo.timm("vit_tiny_patch16_224", img_size=32, patch_size=4, num_classes=10, depth=4, embed_dim=48)
        return zoo.hf_vit(patch_size=4)

    plain, checkpointing = build(), build()
    if library == "timm":
        checkpointing.set_grad_checkpointing()
    else:
        name = "activation_checkpointing_enable"  # from transformers 5 on
        enable = getattr(checkpointing, name, checkpointing.gradient_checkpointing_enable)
        enable({"use_reentrant": False})
    plain.train()
    checkpointing.train()
    batch = zoo.images(4, 32)
    found = profile(plain, (batch,))
    assert found.names == profile(checkpointing, (batch,)).names
    layers = [u.name for u in found.units if u.name.split(".")[-1].isdigit()]
    assert len(layers) == 4
    cuts = [layers[1], layers[3]]
    isolated(plain, batch, found.names, cuts)
    isolated(checkpointing, batch, found.names, cuts)
    assert_equal(gradients(checkpointing), gradients(plain))
    assert _peak(checkpointing, batch, found.names, cuts) < 0.8 * _peak(plain, batch, found.names, cuts)
    assert _peak(checkpointing, batch, found.names, layers[1:]) < 1.1 * _peak(
        checkpointing, batch, found.names, cuts
    ), "what a block saved inside a checkpoint is freed"


def test_save_on_cpu_stays_in_force_at_cuts() -> None:
    saved = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    counts = []

    def at_cut(boundary: Boundary) -> None:
        before = len(saved)
        loss = loss_of(boundary.entering)
        counts.append(len(saved) - before)
        loss.backward()

    model = Small()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), Isolation(model, Small.units, ["c"], at_cut):
        loss_of(model(zoo.images(2, 8))).backward()
    assert counts[0] > 0


# -- boundaries ----------------------------------------------------------------------------------------------------


def test_what_passes_by_a_cut() -> None:
    model, batch = GlueOnASkip(), zoo.images(2, 8)
    seen: dict[str, Tensor] = {}

    class Watched(GlueOnASkip):
        def body(self, x: Tensor) -> Tensor:
            skip = self.a(x)
            seen["skip"] = skip.detach().clone()
            y = self.b(skip)
            y = y + F.avg_pool2d(skip, 3, 1, 1).flatten(1).view_as(skip) * 2
            doubled = y * 2
            seen["doubled"] = doubled.detach().clone()
            return self.d(self.c(y)) + doubled

    model = Watched()
    found = profile(model, (batch,))
    for cuts in (["b", "c", "d"], ["c", "d"], ["b", "d"], ["c"], ["d"]):
        run = isolated(model, batch, found.names, cuts, {c: found.crossing[c] for c in cuts})
        skipping = {b.cut: b.skipping for b in run.boundaries}
        assert all(t.requires_grad for b in run.boundaries for t in (*b.entering, *b.skipping))
        by = {cut: [t for t in tensors] for cut, tensors in skipping.items()}
        owner = "c" if "c" in cuts else "d"  # the first cut after `doubled` was made
        assert [torch.equal(t, seen["doubled"]) for t in by[owner]] == [True]
        assert not by.get("b"), "the skip itself enters b"
        if cuts == ["c", "d"]:
            assert by["d"] == [], "doubled belongs to an older block there"


def test_entering_keeps_the_order_of_the_arguments() -> None:
    model = SeveralTensors()
    found = profile(model, (zoo.images(2, 8),))
    run = isolated(model, zoo.images(2, 8), found.names, ["c"])
    assert [tuple(t.shape) for t in run.boundaries[0].entering] == [(2, 8, 8, 8), (2, 8, 8, 8), (2, 8, 1, 1)]
    run = isolated(model, zoo.images(2, 8), found.names, ["b", "c"])
    assert [tuple(t.shape) for t in run.boundaries[1].entering] == [(2, 8, 8, 8), (2, 8, 1, 1)]


def test_no_gradient_crosses_a_cut() -> None:
    for last in range(3):
        model = SkipOverACut()
        losses: list[Tensor] = []
        cuts = ["b", "c"]
        with Isolation(model, Small.units, cuts, lambda b, losses=losses: losses.append(loss_of(b.entering))):
            losses.append(loss_of(model(zoo.images(2, 8))))
        losses[last].backward()
        blocks = [["stem", "a"], ["b"], ["c", "d", "head"]]
        reached = {name.split(".")[0] for name in gradients(model)}
        assert reached == set(blocks[last])


def test_finished_blocks_are_freed_before_the_next_one_runs() -> None:
    class Noted(Small):
        class unit(Residual):
            def forward(self, x: Tensor) -> Tensor:
                live.append(memory.current["activations"])
                return super().forward(x)

    model, batch = Noted(), zoo.images(4, 32)
    feature = 4 * 8 * 32 * 32 * 4  # bytes of one map
    results = {}
    for cuts in ([], ["b", "c", "d"]):
        live: list[int] = []
        with (
            LiveMemory(model, inputs=batch) as memory,
            Isolation(model, Small.units, cuts, lambda b: loss_of(b.entering).backward()),
        ):
            loss_of(model(batch)).backward()
        results[len(cuts)] = live
        model.zero_grad()
    assert results[0] == sorted(results[0])
    assert results[0][3] - results[0][0] >= 3 * 3 * feature
    # what is left of the blocks before: the tensor that enters, and the stem's, which the model's own `x` holds
    assert all(live <= 2.01 * feature for live in results[3])


# -- leaving things as they were -----------------------------------------------------------------------------------


def _modes() -> int:
    return torch._C._len_torch_function_stack()


@pytest.fixture(autouse=True)
def _no_mode_is_left() -> Iterator[None]:
    before = _modes()
    yield
    assert _modes() == before


def test_a_forward_that_was_overridden_before() -> None:
    model = Small()
    original = model.b.forward

    def doubled(x: Tensor) -> Tensor:
        return original(x) * 2

    model.b.forward = doubled  # type: ignore[method-assign]
    twin = Small()
    twin.load_state_dict(model.state_dict())
    run = isolated(model, batch := zoo.images(2, 8), list(Small.units), ["c"])
    assert model.b.__dict__["forward"] is doubled
    assert [n for n, m in model.named_modules() if "forward" in m.__dict__] == ["b"]
    plain = isolated(twin, batch, list(Small.units), ["c"])
    assert not torch.equal(run.output, plain.output)


@pytest.mark.parametrize("where", ["unit", "callback", "backward", "after"])
def test_an_exception_in_the_middle(where: str) -> None:
    class Fails(Small):
        broken = False

        def body(self, x: Tensor) -> Tensor:
            x = self.b(self.a(x))
            if self.broken and where == "unit":
                with torch.device("cpu"):
                    self.c(x[:, :3])
            return self.d(self.c(x))

    def at_cut(boundary: Boundary) -> None:
        if model.broken and where == "callback":
            raise KeyboardInterrupt
        loss = loss_of(boundary.entering)
        if model.broken and where == "backward":
            loss.register_hook(lambda g: 1 / 0)
        loss.backward()

    model, batch = Fails(), zoo.images(2, 8)
    model.eval()
    isolation = Isolation(model, Small.units, ["b", "c"], at_cut)

    def step() -> None:
        with isolation:
            output = model(batch)
            if model.broken and where == "after":
                raise RuntimeError("after")
            with isolation.replay():
                loss_of(output).backward()

    step()
    wanted = {name: g.clone() for name, g in gradients(model).items()}
    model.zero_grad()
    model.broken = True
    with pytest.raises((RuntimeError, KeyboardInterrupt, ZeroDivisionError)):
        step()
    assert not any("forward" in m.__dict__ for m in model.modules())
    assert _modes() == 0
    model.zero_grad()
    model.broken = False
    step()
    assert_equal(gradients(model), wanted)


def test_entering_twice_is_refused_and_changes_nothing() -> None:
    model = Small()
    isolation = Isolation(model, Small.units, ["b"])
    with isolation, pytest.raises(RuntimeError, match="already entered"), isolation:
        pass
    assert not any("forward" in m.__dict__ for m in model.modules())
    with isolation:
        model(zoo.images(2, 8))


def test_state_kept_on_the_model_from_an_earlier_run() -> None:
    class Remembers(Small):
        memory: Tensor | None = None

        def body(self, x: Tensor) -> Tensor:
            x = self.a(x)
            if self.memory is not None:
                x = x + self.memory.detach() + self.memory.detach().clone()
            self.memory = x
            y = self.c(self.b(x))
            return self.d(y + self.memory)

    model, batch = Remembers(), zoo.images(2, 8)
    isolated(model, batch, list(Small.units), ["b", "c"])
    model.zero_grad()
    kept = model.memory
    twin = Remembers()
    twin.load_state_dict(model.state_dict())
    twin.memory = kept.detach().clone()
    isolated(model, batch, list(Small.units), ["b", "c"])
    isolated(twin, batch, list(Small.units), ["b", "c"])
    assert_equal(gradients(model), gradients(twin))


def test_nothing_is_kept_alive_after_a_run() -> None:
    model, batch = SkipOverACut(), zoo.images(2, 8)
    found = profile(model, (batch,))
    isolation = Isolation(model, found.names, ["c", "d"], lambda b: None, {c: found.crossing[c] for c in ("c", "d")})
    gc.collect()
    gc.disable()
    try:
        with LiveMemory(model, inputs=batch) as memory:
            with isolation:
                model(batch)
            assert memory.current["activations"] == 0, "no reference cycles either"
    finally:
        gc.enable()


def test_nothing_is_kept_alive_after_an_exception() -> None:
    model, batch = SkipOverACut(), zoo.images(2, 8)
    found = profile(model, (batch,))
    isolation = Isolation(model, found.names, ["c", "d"], lambda b: None, {c: found.crossing[c] for c in ("c", "d")})
    model.c.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError), isolation:
        model(batch)
    assert found.crossing["d"]
    assert not isolation._kept


def test_tensors_of_another_run_are_nobodys() -> None:
    kept: list[Tensor] = []
    model = Small()
    with Isolation(model, Small.units, ["b"], lambda b: kept.extend(b.entering)):
        model(zoo.images(2, 8))
    other = Isolation(model, Small.units, ["b"])
    with other:
        model(zoo.images(2, 8))
        assert other.block == 1
        assert other.twin(kept[0]) is kept[0]


def test_one_model_inside_another_isolation_of_its_own() -> None:
    """A frozen teacher that is itself run under an isolation, in the middle of the student's run."""
    teacher, batch = Small(), zoo.images(2, 8)

    class Student(Small):
        def body(self, x: Tensor) -> Tensor:
            x = self.b(self.a(x))
            with torch.no_grad(), Isolation(teacher, Small.units, ["c"], lambda b: None):
                target = teacher(batch)
            return self.d(self.c(x)) * target.mean()

    student, plain = Student(), Small()
    plain.load_state_dict(student.state_dict())
    assert_isolated(student, batch, ["b", "c", "d"], units=Small.units)


# -- errors --------------------------------------------------------------------------------------------------------


def test_units_and_cuts_are_checked() -> None:
    model = Small()
    with pytest.raises(UnknownName, match="'sten'.*'stem'"):
        Isolation(model, ["sten"])
    with pytest.raises(UnknownName, match="unit ''"):
        Isolation(model, [""])
    with pytest.raises(UnknownName, match="cut 'a'"):
        Isolation(model, ["stem", "b"], ["a"])
    with pytest.raises(CutError, match=r"'a\.b' lies inside the unit 'a'"):
        Isolation(model, ["a.b", "a"])
    with pytest.raises(CutError, match="twice"):
        Isolation(model, ["a", "b"], ["b", "b"])
    model.b = model.a
    with pytest.raises(CutError, match="are the same module"):
        Isolation(model, ["a", "b"])
    assert not any("forward" in m.__dict__ for m in model.modules())


# -- leaks ---------------------------------------------------------------------------------------------------------


class _Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * 2


class LeaksInTheGlue(Small):
    def body(self, x: Tensor) -> Tensor:
        return self.d(self.c(self.b(_Double.apply(self.a(x)))))


class LeaksOverASkip(Small):
    def body(self, x: Tensor) -> Tensor:
        x = self.a(x)
        y = self.b(x)
        return self.d(self.c(y)) + _Double.apply(x)


class ReadsFromElsewhere(Small):
    class unit(Residual):
        aside: Any = None

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + (self.aside.pop() if self.aside else 0)

    def body(self, x: Tensor) -> Tensor:
        x = self.a(x)
        self.c.aside = [x]
        return self.d(self.c(self.b(x)))


class ReentrantCheckpoint(Small):
    def body(self, x: Tensor) -> Tensor:
        return self.d(checkpoint(lambda y: self.c(self.b(y)), self.a(x), use_reentrant=True))


def _learner(model: nn.Module, cuts: list[str], **options: Any) -> LocalLearner:
    sample = (zoo.images(2, 8), torch.tensor([0, 1]))
    return LocalLearner(model, sample=sample, cuts=cuts, units=Small.units, **options)


@pytest.mark.parametrize(
    ("model", "cuts", "parameter", "cut"),
    [
        (LeaksInTheGlue, ["b"], "a.a.weight", "b"),
        (LeaksInTheGlue, ["b", "d"], "a.a.weight", "b"),
        (LeaksOverASkip, ["c"], "a.a.weight", "c"),
        (ReadsFromElsewhere, ["b", "d"], "a.a.weight", "b"),
        (ReadsFromElsewhere, ["c"], "a.a.weight", "c"),
    ],
)
def test_a_leak_is_found_when_the_learner_is_built(model: Any, cuts: list[str], parameter: str, cut: str) -> None:
    with pytest.raises(GradientLeak, match=f"{parameter}.*{cut!r}"):
        _learner(model(), cuts)


def test_a_reentrant_checkpoint_over_a_cut_is_refused() -> None:
    with pytest.raises(CutError, match="no gradient enters it"):
        _learner(ReentrantCheckpoint(), ["c"])
    with pytest.raises(GradientLeak, match="a.a.weight.*'d'"):
        _learner(ReentrantCheckpoint(), ["d"])
    _learner(ReentrantCheckpoint(), ["head"])


def test_a_leak_inside_one_block_is_none() -> None:
    _learner(LeaksInTheGlue(), ["c"])
    _learner(ReadsFromElsewhere(), ["d"])


def test_the_leak_check_can_be_left_out() -> None:
    _learner(LeaksInTheGlue(), ["b"], leak_check=False)


def test_the_leak_check_leaves_the_model_as_it_was() -> None:
    model = LeaksInTheGlue()
    before = copy.deepcopy(model.state_dict())
    with contextlib.suppress(GradientLeak):
        _learner(model, ["b"])
    assert_equal(dict(model.state_dict()), dict(before))
    assert not any("forward" in m.__dict__ for m in model.modules())
    assert not gradients(model)


@pytest.mark.parametrize("model", MODELS, ids=lambda m: m.__name__)
def test_no_false_alarm(model: type[Small]) -> None:
    learner = _learner(model(), ["b", "c", "head"], optimizer=partial(torch.optim.SGD, lr=0.01))
    before = {name: p.detach().clone() for name, p in learner.model.named_parameters() if p.requires_grad}
    learner.step(zoo.images(2, 8), torch.tensor([0, 1]))
    same = [n for n, p in learner.model.named_parameters() if n in before and torch.equal(p, before[n])]
    # a bias before a batch normalisation has no gradient but rounding
    assert not [name for name in same if not name.endswith("a.bias")]


def test_leaked_parameters_walks_the_graph_only() -> None:
    a, b = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    loss = (a * b).sum()
    assert leaked_parameters(loss, [a]) == [b] or leaked_parameters(loss, [a])[0] is b
    assert leaked_parameters(loss, [a, b]) == []
    loss.backward()
    assert leaked_parameters(torch.zeros(()), []) == []


def test_profile_is_used() -> None:
    """`crossing` numbers count the same tensors with and without cuts, whatever needs a gradient."""
    found: Profile = profile(GlueOnASkip(), (zoo.images(2, 8),))
    assert len(found.crossing["d"]) == 1
    assert found.crossing["b"] == frozenset()
