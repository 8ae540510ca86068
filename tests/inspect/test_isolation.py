"""Isolation: gradients, outputs and buffers against the full graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests import zoo
from tests.inspect.isolation_cases import (
    MODELS,
    Dropout,
    SkipOverACut,
    Tied,
    assert_isolated,
    isolated,
)
from tests.zoo import Residual, Small, assert_equal, gradients, loss_of
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from glcan.inspect.isolation import Boundary, Isolation
from glcan.inspect.meter import LiveMemory
from glcan.inspect.record import profile


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
