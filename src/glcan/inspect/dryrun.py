"""Running a model without computing anything, and without touching it.

`dry_run` gives a structural copy of the model whose tensors are fake (shapes only), so that a profile, a leak check or
a plan costs neither memory nor arithmetic, and leaves BatchNorm statistics, caches and random generators alone. Where
a model cannot be run on fake tensors (data-dependent control flow, custom kernels) it falls back to the real model,
and puts buffers, gradients and generators back afterwards.
"""

from __future__ import annotations

import contextlib
import copy
import random
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from glcan.errors import GradientLeak, UnknownName

__all__ = ["AssumedValues", "UntouchedParameters", "dry_run", "fake_copy", "undrawn", "uninitialized"]

T = TypeVar("T")


def fake_copy(model: nn.Module, batch: Any, mode: FakeTensorMode) -> tuple[nn.Module, Any]:
    """A copy of the modules with fake parameters and buffers (tied ones stay tied), and the batch as fake tensors."""
    memo: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        memo[id(tensor)] = _faked(tensor, mode)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        twin = copy.deepcopy(model, memo)
    return twin, tree_map_only(Tensor, lambda tensor: _faked(tensor, mode), batch)


def _faked(tensor: Tensor, mode: FakeTensorMode) -> Tensor:
    """A fake tensor; of one on the meta device, as if it were on the CPU."""
    if not tensor.is_meta or isinstance(tensor, FakeTensor):
        return mode.from_tensor(tensor)
    with mode:
        fake = torch.empty_like(tensor, device="cpu", requires_grad=tensor.requires_grad)
    return nn.Parameter(fake, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else fake


@contextlib.contextmanager
def _untouched(model: nn.Module) -> Iterator[None]:
    """Puts buffers, gradients, modes and random generators (torch's, Python's, NumPy's) back."""
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    gradients = [(p, p.grad) for p in model.parameters()]
    modes = [(m, m.training) for m in model.modules()]
    try:
        for parameter, _ in gradients:
            parameter.grad = None
        with undrawn(model):
            yield
    finally:
        for parameter, gradient in gradients:
            parameter.grad = gradient
        for module, training in modes:
            module.training = training
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                if name in buffers:
                    buffer.copy_(buffers[name])


@contextlib.contextmanager
def undrawn(model: nn.Module) -> Iterator[None]:
    """Random generators (torch's, Python's, NumPy's) go on as if nothing had been drawn meanwhile."""
    devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    python, numpy = random.getstate(), sys.modules.get("numpy.random")
    numpy_state = numpy.get_state() if numpy is not None else None
    try:
        with torch.random.fork_rng(devices=[d for d in devices if d is not None]):
            yield
    finally:
        random.setstate(python)
        if numpy is not None:
            numpy.set_state(numpy_state)


@contextlib.contextmanager
def uninitialized() -> Iterator[None]:
    """Models that are made meanwhile do not draw their weights, for when only shapes matter: saves seconds."""
    before = {name: getattr(nn.init, name) for name in dir(nn.init) if name.endswith("_") and name[0] != "_"}
    try:
        for name in before:
            setattr(nn.init, name, lambda tensor, *args, **kwargs: tensor)
        yield
    finally:
        for name, function in before.items():
            setattr(nn.init, name, function)


class UntouchedParameters(TorchFunctionMode):
    """What would write into a parameter does nothing, for models that are made only to be planned.

    The memory of their weights is then asked for but never used, so that it does not count.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        writes = name.endswith("_") and not name.endswith("__") and name != "requires_grad_"
        kwargs = kwargs or {}
        written = args[0] if args else kwargs.get("tensor")  # as torch.nn.init calls itself
        if writes and isinstance(written, nn.Parameter):
            return written
        return func(*args, **kwargs)


class AssumedValues(TorchDispatchMode):
    """Stands in for values that fake tensors do not have: a scalar read from one is 0, a mask selects everything.

    To be entered inside of a `FakeTensorMode`, as `dry_run` does with ``assume``. So detectors run that match anchors
    to targets: what depends on a mask gets its largest size, and the figures are upper bounds there.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        try:
            return func(*args, **(kwargs or {}))
        except (DataDependentOutputException, DynamicOutputShapeException):
            name = func._overloadpacket.__name__
            if name == "_local_scalar_dense":
                dtype = args[0].dtype
                return False if dtype == torch.bool else 0.0 if dtype.is_floating_point else 0
            if name == "nonzero":
                return args[0].new_empty((args[0].numel(), args[0].dim()), dtype=torch.int64)
            if name in ("index", "index_put", "index_put_"):
                indices = [index for given in args[1] for index in _selecting_all(given)]
                return func(args[0], indices, *args[2:], **(kwargs or {}))
            raise


def _selecting_all(index: Any) -> list[Any]:
    """A mask as the positions of all of its elements, for each of its dimensions; any other index as it is."""
    if isinstance(index, Tensor) and index.dtype == torch.bool:
        return [index.new_empty(index.numel(), dtype=torch.int64) for _ in range(index.dim())]
    return [index]


def dry_run(
    model: nn.Module, batch: Any, use: Callable[[nn.Module, Any], T], *, assume: bool = False, few: Any = None
) -> T:
    """``use(model, batch)`` on a fake copy; on the real model where that is not possible. In train mode in any case.

    Args:
        model: the user's model; as it was afterwards. One that is in eval mode as a whole (as many come from libraries)
            is looked at in train mode; in one that is in train mode, what is not stays as it is.
        batch: nested tensors; never written to.
        use: runs the model and returns what was found out; called a second time after a failure on fake tensors.
        assume: on the fake copy, assume the values that decide something: scalars 0, masks full. For models that are
            known to do nothing else with them, as torchvision's one-stage detectors: the real run needs the memory of a
            whole training step.
        few: what the real model is run on, in place of the batch; it is said in a warning.

    Raises:
        Exception: whatever ``use`` raises on the real model.
    """
    if any(isinstance(p, FakeTensor) for p in model.parameters()):  # the caller is in a dry run already
        return use(model, batch)
    with _untouched(model):  # even a copy may reach the real model, through a closure that overrides a forward
        try:
            mode = FakeTensorMode(allow_non_fake_inputs=True)
            twin, fake_batch = fake_copy(model, batch, mode)
            _to_train_mode(twin)
            with warnings.catch_warnings(), mode, AssumedValues() if assume else contextlib.nullcontext():
                warnings.filterwarnings("ignore", category=FutureWarning, module="torch")  # of its own fake tensors
                return use(twin, fake_batch)
        except (GradientLeak, UnknownName):
            raise  # true of the real model too
        except Exception as error:
            if any(p.is_meta for p in model.parameters()):
                raise
            _to_train_mode(model)
            found = use(model, tree_map_only(Tensor, lambda t: t.detach().clone(), batch if few is None else few))
            if few is not None:
                warnings.warn(
                    f"{type(model).__name__} cannot be looked at without computing ({type(error).__name__}: "
                    f"{str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}), so it was run on "
                    "a few images, and bytes and FLOPs are scaled up from these. A profile that is at hand saves that "
                    "(profile=...).",
                    stacklevel=2,
                )
            return found


def _to_train_mode(model: nn.Module) -> None:
    if not model.training:
        model.train()
