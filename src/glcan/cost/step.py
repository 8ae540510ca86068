"""What one training step costs: a real step under the meter."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.optim.optimizer import Optimizer
from torch.utils._pytree import tree_leaves

from glcan.inspect.meter import LiveMemory

__all__ = ["StepCost", "Steppable", "measure_step"]


class Steppable(Protocol):
    """What can be metered: a `glcan.Learner`, or anything like it."""

    model: nn.Module

    @property
    def auxiliary(self) -> nn.ModuleDict: ...

    @property
    def optimizers(self) -> Sequence[Optimizer]: ...

    def step(self, *batch: Any) -> dict[str, Tensor]: ...

    def backward(self, *batch: Any) -> dict[str, Tensor]: ...

    def watched(self, watch: Callable[[str], None]) -> AbstractContextManager[None]:
        """While this is open, ``watch`` is called with the name of each group of parameters when it is complete."""
        ...


@dataclasses.dataclass(frozen=True)
class StepCost:
    """What one training step costs.

    Attributes:
        peak_bytes: peak of all live tensor storages.
        by_kind: live bytes by kind (see `KINDS`) at that moment.
        activation_peak_bytes: peak of the activations alone.
        flops: floating-point operations, a multiply-add counting as two.
        cuda_peak_bytes: the CUDA allocator's peak over the step, None on other devices.
        block_peak_bytes: peak of all live tensor storages while each block was computed and trained.
    """

    peak_bytes: int
    by_kind: dict[str, int]
    activation_peak_bytes: int
    flops: int
    cuda_peak_bytes: int | None
    block_peak_bytes: tuple[int, ...] = ()


def measure_step(learner: Steppable, *batch: Any) -> StepCost:
    """Meters one real ``learner.step(*batch)`` in its steady state (``learner.backward`` if it has no optimizer).

    On real tensors this runs two steps: the first one creates the optimizers' state, the second is metered. Both train
    the model, so use a learner that is thrown away afterwards. On fake tensors nothing is computed.
    """
    train = learner.step if learner.optimizers else learner.backward
    parameters = [*learner.model.parameters(), *learner.auxiliary.parameters()]
    fake = any(isinstance(p, FakeTensor) for p in parameters)
    if fake:
        _create_state(learner.optimizers)
    else:
        train(*batch)
    for parameter in parameters:
        parameter.grad = None
    device = next((p.device for p in learner.model.parameters()), torch.device("cpu"))
    on_cuda = device.type == "cuda"
    if on_cuda:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    memory = LiveMemory(learner.model, auxiliary=learner.auxiliary, optimizers=learner.optimizers, inputs=batch)
    peaks: dict[str, int] = {}
    with learner.watched(lambda name: peaks.update({name: memory.lap()[0]})), memory:
        train(*batch)
    cuda_peak = torch.cuda.max_memory_allocated(device) if on_cuda else None
    never = _state_bytes(learner.optimizers, memory.idle) if fake else {}
    extra = sum(never.values())  # there from the first to the last moment
    by_kind = {kind: value - never.get(kind, 0) for kind, value in memory.by_kind.items()}
    return StepCost(
        memory.peak_bytes - extra,
        by_kind,
        memory.activation_peak_bytes,
        memory.flops,
        cuda_peak,
        tuple(peak - extra for peak in peaks.values()),
    )


def _create_state(optimizers: Iterable[Optimizer]) -> None:
    """Lets optimizers over fake parameters make their state, without a forward and a backward pass."""
    for optimizer in optimizers:
        if optimizer.state:
            continue
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def _state_bytes(optimizers: Iterable[Optimizer], idle: Iterable[nn.Parameter]) -> dict[str, int]:
    """Bytes of state that `_create_state` made for parameters that no loss reaches, of which there is none."""
    unreached = set(idle)
    tensors = {
        leaf.untyped_storage()._cdata: leaf
        for optimizer in optimizers
        for parameter, state in optimizer.state.items()
        if parameter in unreached
        for leaf in tree_leaves(state)
        if isinstance(leaf, Tensor)
    }
    return {"optimizer_state": sum(leaf.untyped_storage().nbytes() for leaf in tensors.values())}
