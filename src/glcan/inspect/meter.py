"""Live memory: the bytes of tensor storages that are alive, by kind, now and at the peak; and the FLOPs of what ran.

`LiveMemory` is a `torch.utils._python_dispatch.TorchDispatchMode` with weak references on storages. It is exact and
repeatable on the CPU, works on fake tensors without computing anything, and survives a backward pass in the middle of
a forward pass. It does not see what a library allocates for itself (cuDNN workspaces, oneDNN scratch, the Python
heap). On CUDA `glcan.cost.step.measure_step` reports the allocator's peak beside it.

Units: bytes; FLOPs count a multiply-add as two operations.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from torch.optim.optimizer import (
    Optimizer,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from glcan.inspect.flops import FLOPS

__all__ = ["KINDS", "LiveMemory"]

KINDS = ("parameters", "gradients", "optimizer_state", "activations", "auxiliary", "inputs")
"""The kinds of live bytes.

parameters: the model's parameters and buffers. gradients: its ``.grad``. optimizer_state: its optimizers' state and,
while a step runs, their temporaries. auxiliary: parameters, buffers, gradients and optimizer state of the auxiliary
networks. inputs: the batch. activations: everything else, the auxiliary networks' activations included.
"""


class LiveMemory(TorchDispatchMode):
    """Meters live tensor storages while it is entered.

    ::

        with LiveMemory(model, inputs=(images, labels)) as memory:
            criterion(model(images), labels).backward()
        memory.peak_bytes, memory.activation_peak_bytes, memory.by_kind

    Args:
        model: its parameters and buffers are there from the start.
        auxiliary: a module that holds the auxiliary networks.
        optimizers: their state is there from the start.
        inputs: nested tensors of the batch.
        round_to: round each storage up to a multiple of so many bytes (512 for CUDA's caching allocator).

    Attributes:
        current: live bytes by kind, now.
        peak_bytes: the largest sum over the kinds so far.
        by_kind: live bytes by kind at that moment.
        activation_peak_bytes: the largest ``current["activations"]`` so far (not at the same moment, in general).
        lap_bytes: as ``peak_bytes`` and ``activation_peak_bytes``, since the last call of `lap`.
        idle: parameters whose optimizer made a step while they had no gradient.
        flops: floating-point operations of the convolutions, matrix products and attention that ran.
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        *,
        auxiliary: nn.Module | None = None,
        optimizers: Iterable[Optimizer] = (),
        inputs: Any = (),
        round_to: int = 1,
    ) -> None:
        super().__init__()
        self.round_to = round_to
        self.current = dict.fromkeys(KINDS, 0)
        self.total = self.peak_bytes = self.activation_peak_bytes = self.flops = 0
        self.by_kind = dict(self.current)
        self.lap_bytes = (0, 0)
        self._live: dict[int, list[Any]] = {}  # storage id -> [weak reference, bytes, kind]
        self._new = "activations"  # the kind of what is allocated now
        self._gradient_kind: dict[int, str] = {}
        self._handles: list[Any] = []
        self._parameters: list[nn.Parameter] = []
        self.idle: list[nn.Parameter] = []
        for module, kind, gradient in ((model, "parameters", "gradients"), (auxiliary, "auxiliary", "auxiliary")):
            for tensor in (*module.parameters(), *module.buffers()) if module is not None else ():
                self.track(tensor, kind)
                if isinstance(tensor, nn.Parameter):
                    self._gradient_kind.setdefault(id(tensor), gradient)
                    self._parameters.append(tensor)
                    if tensor.grad is not None:
                        self.track(tensor.grad, gradient)
        for optimizer in optimizers:
            self._track_state(optimizer)
        for leaf in tree_leaves(inputs):
            if isinstance(leaf, Tensor):
                self.track(leaf, "inputs")
        self._mark()

    # -- book-keeping --------------------------------------------------------------------------------------------

    def track(self, tensor: Tensor, kind: str | None = None) -> None:
        """Counts the tensor's storage; with a kind, also moves a storage that is already counted to that kind."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        entry = self._live.get(key)
        if entry is not None:
            if kind is not None and entry[2] != kind:
                self.current[entry[2]] -= entry[1]
                self.current[kind] += entry[1]
                entry[2] = kind
            return
        size = -(-storage.nbytes() // self.round_to) * self.round_to
        if size == 0:
            return
        kind = kind or self._new
        self._live[key] = [weakref.ref(storage, functools.partial(self._gone, key)), size, kind]
        self.current[kind] += size
        self.total += size

    def _gone(self, key: int, reference: Any) -> None:
        _, size, kind = self._live.pop(key)
        self.current[kind] -= size
        self.total -= size

    def _mark(self) -> None:
        if self.total > self.peak_bytes:
            self.peak_bytes = self.total
            self.by_kind = dict(self.current)
        activations = self.current["activations"]
        self.activation_peak_bytes = max(self.activation_peak_bytes, activations)
        self.lap_bytes = (max(self.lap_bytes[0], self.total), max(self.lap_bytes[1], activations))

    def lap(self) -> tuple[int, int]:
        """The peaks (all kinds, activations alone) since the last call, or since the beginning; begins anew."""
        lap, self.lap_bytes = self.lap_bytes, (self.total, self.current["activations"])
        return lap

    def _track_state(self, optimizer: Optimizer) -> None:
        for parameter, state in optimizer.state.items():
            own = self._gradient_kind.get(id(parameter)) != "auxiliary"
            for value in tree_leaves(state):
                if isinstance(value, Tensor):
                    self.track(value, "optimizer_state" if own else "auxiliary")

    # -- while it is entered -------------------------------------------------------------------------------------

    def __enter__(self) -> LiveMemory:
        for parameter in self._parameters:
            if parameter.requires_grad:
                self._handles.append(parameter.register_post_accumulate_grad_hook(self._accumulated))
        self._handles.append(register_optimizer_step_pre_hook(self._before_step))
        self._handles.append(register_optimizer_step_post_hook(self._after_step))
        super().__enter__()
        return self

    def __exit__(self, *exc: Any) -> None:
        super().__exit__(*exc)
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _accumulated(self, parameter: Tensor) -> None:
        if parameter.grad is not None:
            self.track(parameter.grad, self._gradient_kind[id(parameter)])

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._new = "optimizer_state"
        self.idle += [p for group in optimizer.param_groups for p in group["params"] if p.grad is None]

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._new = "activations"
        self._track_state(optimizer)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        count = FLOPS.get(func._overloadpacket)
        if count is not None:
            self.flops += count(*args, **kwargs, out_val=out)
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self.track(leaf)
        self._mark()
        return out
