"""Which images of a batch the early blocks learn from: those whose gradient is large.

The last block learns from every image, and so the gradient that it would send on is known of each before the blocks in
front of it are run for learning. A part of the images then does for all: each is taken with a probability in proportion
to its gradient, and its gradient is divided by that probability, so that the sum is right in the mean over the draws
and as certain as that many images can make it.

Source: importance sampling by the gradient at the network's end, Katharopoulos & Fleuret 2018 (arXiv 1803.00942,
section 3.2). Deviations: the gradient at a cut in place of that of the logits; images of one batch without replacement;
what was computed behind the cut is not computed again, and normalisation over the batch is that of the whole batch.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

from glcan.isolation import overridden

__all__ = ["BatchStatistics", "Received", "choose", "sizes_of"]

# A gradient at a cut says only about how large those before it are, so no image's probability is much smaller than the
# others': this share of the mean size is added to each.
_FLOOR = 0.1
# Rounds in which probabilities above 1 are cut off there, and the others raised instead.
_ROUNDS = 8
# What the sum of the sizes, in those of the largest one, is multiplied by to have a fraction that is as good as drawn.
_DIGITS = 1024


def choose(sizes: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Some images, with probabilities in proportion to their gradients' sizes.

    One is taken wherever their running sum passes a number with the same fraction (systematic sampling; Madow 1949).
    That fraction is the last digits of the sizes: nothing is drawn, and nothing is read from the device.

    Args:
        sizes: [B], norms of the gradients; what is not finite counts as 0.
        count: how many, from 1 to B.

    Returns:
        Their places [count], int64, ascending, and the weights [count] of their gradients: one by the probability.
    """
    sizes = sizes.to(_at_least_float32(sizes.dtype)).nan_to_num(0.0, 0.0, 0.0)
    # With all of them 0, every image is as good as another.
    sizes = sizes + _FLOOR * sizes.mean() + torch.finfo(torch.float32).tiny
    certain = torch.zeros_like(sizes, dtype=torch.bool)
    probabilities = sizes
    for _ in range(_ROUNDS):
        others = sizes.masked_fill(certain, 0.0)
        share = (count - certain.sum()) / others.sum().clamp_min(torch.finfo(torch.float32).tiny)
        probabilities = torch.where(certain, torch.ones_like(sizes), others * share)
        certain = probabilities >= 1
    probabilities = probabilities.clamp(max=1.0)
    sums = probabilities.cumsum(0)
    sums = sums * (count / sums[-1])
    fraction = sizes.sum() / sizes.max() * _DIGITS % 1
    steps = torch.arange(count, device=sums.device, dtype=sums.dtype) + fraction
    places = torch.searchsorted(sums, steps, right=True).clamp(max=len(sizes) - 1)
    return places, 1 / probabilities[places]


def sizes_of(gradients: Sequence[Tensor]) -> Tensor:
    """The norm of each image's gradient [B], over all tensors [B, ...]."""
    norms = [torch.linalg.vector_norm(g.flatten(1), dim=1, dtype=_at_least_float32(g.dtype)) for g in gradients]
    return torch.stack(norms).norm(dim=0)


def _at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


class Received:
    """Hands tensors on to a block that learns by itself, and keeps the gradients that it would send back.

    Attributes:
        gradients: of the tensors, in the order in which they were handed on; none where the block does not use one.
    """

    def __init__(self) -> None:
        self.gradients: list[Tensor | None] = []

    def hand_on(self, tensor: Tensor) -> Tensor:
        """The same values, without their graph; they may be written into."""
        self.gradients.append(None)
        wanted = torch.empty(0, device=tensor.device, requires_grad=True)
        out: Tensor = _Noted.apply(tensor.data, wanted, self.gradients, len(self.gradients) - 1)
        return out


class _Noted(torch.autograd.Function):
    """The identity; its gradient goes to a list."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, wanted: Tensor, gradients: list[Tensor | None], place: int) -> Tensor:
        ctx.gradients, ctx.place = gradients, place
        ctx.mark_dirty(tensor)  # it is no view of itself, so it may be written into
        return tensor

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, ...]:
        ctx.gradients[ctx.place] = gradients[0]
        return None, None, None, None


@dataclasses.dataclass
class _Statistics:
    """What a layer normalised with in the first pass: mean [C] and biased variance [C]."""

    mean: Tensor
    variance: Tensor


class BatchStatistics:
    """Normalises a part of a batch as the whole batch was normalised, in BatchNorm layers that are in train mode.

    The gradient that goes through the statistics is that of the part's own: it takes the same directions out of the
    images' gradients, scale and mean, as that of the whole batch. With the part's share in the batch's statistics, the
    images that are left out would have a gradient too, and without theirs the others' is wrong (docs/findings.md).

    Args:
        layers: each of them runs once in a pass.
    """

    def __init__(self, layers: Sequence[_BatchNorm]) -> None:
        self._layers = layers
        self._noted: dict[_BatchNorm, _Statistics] = {}

    @contextlib.contextmanager
    def noted(self) -> Iterator[None]:
        """While this is open, layers keep what they normalise with. Running statistics change as ever."""
        self._noted.clear()
        found: dict[_BatchNorm, tuple[Tensor, Tensor]] = {}

        def noting(layer: _BatchNorm, forward: Callable[..., Any], x: Tensor, *args: Any, **kwargs: Any) -> Any:
            like = next((t for t in (before[layer]["running_mean"], layer.weight) if t is not None), None)
            mean = torch.zeros(x.shape[1], device=x.device, dtype=torch.float32 if like is None else like.dtype)
            found[layer] = mean, torch.zeros_like(mean)
            # With a momentum of 1, what the layer leaves as its running statistics are the batch's own.
            running = dict(zip(("running_mean", "running_var"), found[layer], strict=True))
            _set(layer, **running, momentum=1.0, num_batches_tracked=None, track_running_stats=True)
            out = forward(x, *args, **kwargs)
            biased = 1 - x.shape[1] / x.numel()
            self._noted[layer] = _Statistics(mean, found[layer][1] * biased)
            return out

        before = {layer: _get(layer) for layer in self._layers if layer.training}
        try:
            with overridden((layer, partial(noting, layer, layer.forward)) for layer in before):
                yield
        finally:
            for layer, values in before.items():
                _set(layer, **values)
                if layer in found and layer.track_running_stats and layer.running_mean is not None:
                    _update(layer, *found[layer])

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """While this is open, a part of the batch is normalised with what was kept."""

        def again(noted: _Statistics, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            with _NormalisedAs(noted):
                return forward(*args, **kwargs)

        before = {layer: layer.num_batches_tracked for layer in self._noted}
        try:
            for layer in before:
                layer.num_batches_tracked = None  # else the layer counts the batch once more
            with overridden((layer, partial(again, noted, layer.forward)) for layer, noted in self._noted.items()):
                yield
        finally:
            for layer, batches in before.items():
                layer.num_batches_tracked = batches
            self._noted.clear()


_ATTRIBUTES = ("running_mean", "running_var", "num_batches_tracked", "momentum", "track_running_stats")


def _get(layer: nn.Module) -> dict[str, Any]:
    return {name: getattr(layer, name) for name in _ATTRIBUTES}


def _set(layer: nn.Module, **values: Any) -> None:
    for name, value in values.items():
        setattr(layer, name, value)


@torch.no_grad()
def _update(layer: _BatchNorm, mean: Tensor, variance: Tensor) -> None:
    """Running statistics after one more batch, as `torch.nn.BatchNorm2d` has it."""
    assert layer.running_mean is not None
    assert layer.running_var is not None
    factor = layer.momentum
    if layer.num_batches_tracked is not None:
        layer.num_batches_tracked.add_(1)
        if factor is None:
            factor = 1 / float(layer.num_batches_tracked)
    layer.running_mean.lerp_(mean, factor or 0.0)
    layer.running_var.lerp_(variance, factor or 0.0)


class _NormalisedAs(TorchFunctionMode):
    """What a layer normalises while this is open, it normalises with given statistics; also a layer that does more."""

    def __init__(self, statistics: _Statistics) -> None:
        super().__init__()
        self.statistics = statistics

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not F.batch_norm:
            return func(*args, **kwargs)
        given = dict(zip(_PARAMETERS, args, strict=False)) | kwargs
        weight, bias, eps = given.get("weight"), given.get("bias"), given.get("eps", 1e-5)
        return _Normalised.apply(given["input"], weight, bias, self.statistics.mean, self.statistics.variance, eps)


_PARAMETERS = tuple(inspect.signature(F.batch_norm).parameters)


class _Normalised(torch.autograd.Function):
    """Batch normalisation with given statistics, whose gradient is that with the images' own.

    With g the gradient of its output times the weight, and y the normalised input, that of the input is
    (g - mean(g) - y mean(g y)) / deviation, the means over the images at hand.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, variance: Tensor, eps: float
    ) -> Tensor:
        ctx.save_for_backward(x, weight, mean, variance)
        ctx.eps = eps
        return F.batch_norm(x, mean, variance, weight, bias, training=False, eps=eps)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, variance = ctx.saved_tensors
        scale, wanted = (variance + ctx.eps).rsqrt(), [True, weight is not None, weight is not None]
        found = torch.ops.aten.native_batch_norm_backward(
            gradients[0], x, weight, None, None, mean, scale, True, ctx.eps, wanted
        )
        return *(found if weight is not None else (found[0], None, None)), None, None, None
