"""An isolated pass against the full graph, and models that make it hard."""

from __future__ import annotations

import copy
import dataclasses
from collections import OrderedDict
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from tests import zoo
from tests.zoo import Residual, Small, assert_equal, gradients, loss_of
from torch import Tensor, nn

from glcan.inspect.isolation import Boundary, Isolation
from glcan.inspect.record import profile
from glcan.inspect.tensors import tensors_in


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
