"""A second pass over some images of a batch that sees the world of the first one.

Whatever a forward pass reads beside its input is noted while the whole batch runs, and given again while a part of it
runs: the statistics that it was normalised with, the numbers drawn at random for these very images (torch's, Python's
and NumPy's generators), and every buffer that it writes. Nothing goes by the class of a layer: operations are looked
at, generators and buffers are compared.

Shape letters: B images of the whole batch, n of the part, C channels.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import random
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

__all__ = ["Buffers", "Generators", "SecondPass", "recording"]


def recording() -> bool:
    """Whether what runs now is recorded as a CUDA graph: nothing may read a value or a random generator's state."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


class Buffers:
    """The buffers of some modules that their forward pass writes, found by comparing all of them once.

    Through `torch.Tensor.data`, whose changes autograd does not count as changes of what it has saved.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self._all = list({id(b): b for module in modules for b in module.buffers()}.values())
        # none are written where nothing is computed
        self._written: list[Tensor] | None = [] if any(isinstance(b, FakeTensor) for b in self._all) else None

    @contextlib.contextmanager
    def noted(self) -> Iterator[list[Tensor]]:
        """Entered around a forward pass; gives the values [one for each buffer] with which it begins."""
        watched = self._all if self._written is None else self._written
        before = _copies(watched)
        yield before
        if self._written is None:
            changed = [not _same(buffer, old) for buffer, old in zip(watched, before, strict=True)]
            self._written = [buffer for buffer, is_new in zip(watched, changed, strict=True) if is_new]
            before[:] = [old for old, is_new in zip(before, changed, strict=True) if is_new]

    @contextlib.contextmanager
    def held(self, values: Sequence[Tensor]) -> Iterator[None]:
        """Entered around the same pass once more: it begins with these values, and leaves the buffers as they are."""
        written = self._all if self._written is None else self._written
        after = _copies(written)
        _write(written, values)
        try:
            yield
        finally:
            _write(written, after)


def _copies(tensors: Sequence[Tensor]) -> list[Tensor]:
    copies = [torch.empty_like(t) for t in tensors]
    _write(copies, tensors)
    return copies


def _same(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one, other) or bool(((one == other) | (one.isnan() & other.isnan())).all())


def _write(tensors: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    if tensors:
        torch._foreach_copy_([t.data for t in tensors], list(values))


class Generators:
    """States of the random generators that a forward pass may draw from: torch's, Python's and NumPy's."""

    def __init__(self, device: torch.device, torchs: bool = True) -> None:
        self._device, self._torchs = device, torchs
        self._states = self._read()

    def _read(self) -> dict[str, Any]:
        states: dict[str, Any] = {"python": random.getstate()}
        if (numpy := sys.modules.get("numpy.random")) is not None:
            states["numpy"] = numpy.get_state()
        if self._torchs:
            states["cpu"] = torch.get_rng_state()
            if self._device.type == "cuda":
                states["cuda"] = torch.cuda.get_rng_state(self._device)
        return states

    def drawn(self) -> bool:
        """Whether torch's generators have been drawn from since."""
        now = self._read()
        return any(not torch.equal(self._states[k], now[k]) for k in ("cpu", "cuda") if k in self._states)

    @contextlib.contextmanager
    def again(self) -> Iterator[None]:
        """While this is open, the generators give what they gave then; afterwards they go on as if it had not been."""
        now = self._read()
        self._set(self._states)
        try:
            yield
        finally:
            self._set(now)

    def _set(self, states: dict[str, Any]) -> None:
        random.setstate(states["python"])
        if "numpy" in states:
            sys.modules["numpy.random"].set_state(states["numpy"])
        if "cpu" in states:
            torch.set_rng_state(states["cpu"])
        if "cuda" in states:
            torch.cuda.set_rng_state(states["cuda"], self._device)


@dataclasses.dataclass
class _Statistics:
    """What was normalised with in the first pass: mean [C] and biased variance [C]."""

    mean: Tensor
    variance: Tensor


class SecondPass:
    """Some images of a batch as they ran in the batch.

    ::

        second = SecondPass(model)
        with torch.no_grad(), second.first():
            outputs = model(images)
        with second.again(places):                       # holds until the backward pass is over
            with second.forward():
                outputs = model(images[places])
            outputs.backward(...)

    Normalisation over the batch: the images are normalised with the statistics of the whole batch, and the gradient
    that goes through the statistics is that of the images' own (`_Normalised`). With the derivative of the true
    statistics, the images that are left out would have a gradient too, and without theirs the others' is wrong; with
    corrections that count each image with its weight, the mean over many choices is closer to the whole batch's
    gradient, but each one further from it, and accuracy lower (docs/methods/selective.md).
    """

    def __init__(self, model: nn.Module) -> None:
        self._buffers = Buffers([model])
        like = next(model.parameters(), None)
        self._device = torch.device("cpu") if like is None else like.device
        self._fake = isinstance(like, FakeTensor)
        self._statistics: list[_Statistics] = []
        self._values: list[Tensor] = []
        self._generators: Generators | None = None
        self._drawn = False
        self._images = 0
        self._places: Tensor | None = None
        self._next = 0  # of the statistics
        self._open = threading.local()

    @contextlib.contextmanager
    def first(self, images: int) -> Iterator[None]:
        """Entered around the forward pass of the whole batch of B images."""
        self._statistics, self._images = [], images
        # neither fake tensors nor what is recorded as a CUDA graph have a state to read
        self._generators = Generators(self._device, torchs=not (self._fake or recording()))
        with self._buffers.noted() as self._values, _Noting(self._statistics):
            yield
        self._drawn = self._generators.drawn()

    @contextlib.contextmanager
    def again(self, places: Tensor) -> Iterator[None]:
        """Entered around the forward and backward pass of the images at these places [n]."""
        assert self._generators is not None
        self._places, self._next = places, 0
        try:
            with self._generators.again(), self._buffers.held(self._values):
                yield
        finally:
            self._statistics, self._values, self._places = [], [], None

    @contextlib.contextmanager
    def forward(self) -> Iterator[None]:
        """Entered around the forward pass of these images."""
        with self.resumed(0):
            yield

    def position(self) -> int:
        """Where the pass stands, for `resumed`."""
        return self._next

    @contextlib.contextmanager
    def resumed(self, position: int) -> Iterator[None]:
        """Entered around a part of the pass that is computed once more, by whatever thread."""
        before, self._next = self._next, position
        outer = getattr(self._open, "value", False)
        self._open.value = True
        try:
            if outer:
                yield
            else:
                with _Rows(self) if self._drawn else contextlib.nullcontext(), _Applying(self):
                    yield
        finally:
            self._open.value = outer
            if outer:
                self._next = before

    def statistics(self) -> _Statistics | None:
        """Those of the next normalisation."""
        self._next += 1
        return self._statistics[self._next - 1] if self._next <= len(self._statistics) else None

    def rows(self, size: int) -> Tensor | None:
        """Which rows of a tensor that had some for each of the B images are there in one with ``size`` rows."""
        assert self._places is not None
        each, rest = divmod(size, len(self._places))
        if rest or not each:
            return None
        if each == 1:
            return self._places
        return (self._places[:, None] * each + torch.arange(each, device=self._places.device)).flatten()


_PARAMETERS = tuple(inspect.signature(F.batch_norm).parameters)


def _arguments(args: Any, kwargs: Any) -> dict[str, Any]:
    return dict(zip(_PARAMETERS, args, strict=False)) | (kwargs or {})


def _over_the_batch(given: dict[str, Any]) -> bool:
    return bool(given.get("training", False)) or given.get("running_mean") is None


class _Noting(TorchFunctionMode):
    """Keeps what is normalised with over the batch. Running statistics change as ever."""

    def __init__(self, statistics: list[_Statistics]) -> None:
        super().__init__()
        self._statistics = statistics

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.batch_norm or not _over_the_batch(given := _arguments(args, kwargs)):
            return func(*args, **(kwargs or {}))
        x, running = given["input"], given.get("running_mean")
        like = next((t for t in (running, given.get("weight")) if t is not None), None)
        mean = torch.zeros(x.shape[1], device=x.device, dtype=torch.float32 if like is None else like.dtype)
        variance = torch.zeros_like(mean)
        momentum = given.get("momentum", 0.1)
        # with a momentum of 1, what is left as running statistics are the batch's own
        given |= {"running_mean": mean, "running_var": variance, "training": True, "momentum": 1.0}
        out = func(**given)
        self._statistics.append(_Statistics(mean, variance * (1 - x.shape[1] / x.numel())))
        if running is not None:
            own = _arguments(args, kwargs)
            own["running_mean"].data.lerp_(mean, momentum)
            own["running_var"].data.lerp_(variance, momentum)
        return out


class _Applying(TorchFunctionMode):
    """What was normalised over the batch is normalised with what was kept."""

    def __init__(self, second: SecondPass) -> None:
        super().__init__()
        self._second = second

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.batch_norm or not _over_the_batch(given := _arguments(args, kwargs)):
            return func(*args, **(kwargs or {}))
        noted = self._second.statistics()
        x = given["input"]
        if noted is None or len(noted.mean) != x.shape[1]:
            return func(*args, **(kwargs or {}))  # another way than the first pass took: its outputs will show it
        weight, bias, eps = given.get("weight"), given.get("bias"), given.get("eps", 1e-5)
        return _Normalised.apply(x, weight, bias, noted.mean, noted.variance, eps)


# The least variance of what is normalised, which is 1 over the whole batch: for channels that stand still in the part.
_LEAST_VARIANCE = 1e-2


class _Normalised(torch.autograd.Function):
    """Batch normalisation with given statistics, whose gradient takes out mean and scale of the images at hand.

    With g the gradient of the output times the layer's weight, and x the input, that of the input is
    ``(g - a - b (x - mean(x))) / deviation``, where a and b are such that neither it nor its product with x has a sum
    over the images at hand. With all images it is the gradient of batch normalisation.
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
        scale = (variance + ctx.eps).rsqrt()
        by = scale if weight is None else scale * weight
        places, count = [0, *range(2, x.dim())], x.numel() // x.shape[1]
        # of the images at hand: mean and variance of x [C]
        square, own = (x * x).mean(places, dtype=mean.dtype), x.mean(places, dtype=mean.dtype)
        spread = torch.maximum(torch.addcmul(square, own, own, value=-1), _LEAST_VARIANCE * variance)
        dx, dw, db = torch.ops.aten.native_batch_norm_backward(
            gradients[0],
            x,
            torch.ones_like(mean) if weight is None else weight,
            mean,
            variance,
            None,
            None,
            False,
            ctx.eps,
            [True, True, True],
        )
        # sum of g (x - own), from dw, the sum of g y
        along = torch.addcmul(dw / scale, mean - own, db)
        each = by / count
        taken = F.batch_norm(
            x, own, spread, along * each * (spread + ctx.eps).rsqrt(), db * each, training=False, eps=ctx.eps
        )
        dx.sub_(taken)
        return (dx, *((dw, db) if weight is not None else (None, None)), None, None, None)


class _Rows(TorchDispatchMode):
    """What is drawn at random for some images is what was drawn for them in the whole batch.

    It is drawn for the whole batch once more, and the others' is dropped. A tensor belongs to images if its first
    dimension is a multiple of their number; anything else is drawn as ever.
    """

    def __init__(self, second: SecondPass) -> None:
        super().__init__()
        self._second = second

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded not in func.tags or not _probability(func, args, kwargs):
            return func(*args, **kwargs)
        size = _first_size(func, args, kwargs)
        rows = None if size is None else self._second.rows(size)
        if rows is None:
            return func(*args, **kwargs)
        assert size is not None
        whole = size // len(self._second._places) * self._second._images  # type: ignore[arg-type]

        def widened(value: Tensor) -> Tensor:
            if value.dim() == 0 or len(value) != size:
                return value
            shape = (whole, *value.shape[1:])
            layout = torch.channels_last if value.dim() == 4 and _is_nhwc(value) else torch.contiguous_format
            wide = torch.empty(shape, dtype=value.dtype, device=value.device, memory_format=layout).zero_()
            return wide.index_copy_(0, rows, value)

        def own(value: Tensor) -> Tensor:
            return value.index_select(0, rows) if value.dim() and len(value) == whole else value

        wide_args, wide_kwargs = tree_map_only(Tensor, widened, (args, kwargs))
        if not any(isinstance(arg, Tensor) for arg in args):  # torch.rand(size)
            wide_args = ([whole, *args[0][1:]], *args[1:])
        out = func(*wide_args, **wide_kwargs)
        if func._schema.is_mutable:  # in place
            args[0].copy_(own(wide_args[0]))
            return args[0]
        return tree_map_only(Tensor, own, out)


def _is_nhwc(value: Tensor) -> bool:
    return value.is_contiguous(memory_format=torch.channels_last) and not value.is_contiguous()


def _first_size(func: Any, args: Any, kwargs: Any) -> int | None:
    first = args[0] if args else None
    if isinstance(first, Tensor):
        return len(first) if first.dim() else None
    if isinstance(first, (list, tuple)) and first and all(isinstance(i, int) for i in first):
        return int(first[0])
    return None


def _probability(func: Any, args: Any, kwargs: Any) -> float:
    """Of dropout in an attention kernel, which has its place there even where it is 0; else 1."""
    for place, argument in enumerate(func._schema.arguments):
        if argument.name == "dropout_p":
            given = args[place] if place < len(args) else kwargs.get("dropout_p", argument.default_value)
            return float(given)
    return 1.0
