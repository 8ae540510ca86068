"""Passes recorded as CUDA graphs, which a GPU replays without waiting for Python to launch kernel after kernel.

`Recorded` wraps any pass.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map_only

from glcan.errors import ConfigError, GlcanError
from glcan.inspect.tensors import tensors_in
from glcan.strategies.base import Backward, Done, Pass, WrappedPass
from glcan.tasks.base import Task

__all__ = ["Recorded"]

_WARM_UP = 2  # passes in which libraries choose their algorithms and take their workspaces
_MOST = 8  # graphs of one model; each holds a set of gradients


class Recorded(WrappedPass):
    """A pass that is recorded once for each kind of batch, and replayed; updates are made when all of it is over.

    The first passes run as ever. The gradients of all groups stay in memory, and what a pass needs is not free for
    anything else between two of them. What Python decides in a pass stays as recorded.

    Args:
        inner: the pass.
        model: on a CUDA device.
        task: of the model.

    Raises:
        ConfigError: the model is elsewhere, or the task's losses read values from the GPU.
    """

    def __init__(self, inner: Pass, model: nn.Module, task: Task) -> None:
        super().__init__(inner)
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        if device.type != "cuda":
            raise ConfigError(
                f"cuda_graph is for a model on a CUDA device, and this one is on {device.type!r}. Move it there first "
                "(model.cuda()), or leave cuda_graph (--cuda-graph) out."
            )
        if not task.recordable:
            raise ConfigError(
                f"cuda_graph is not for {task.name}, whose losses read values from the GPU to choose boxes. Leave "
                "cuda_graph out."
            )
        self._recordings = _Recordings(model)
        self._parameters = [parameter for group in self.groups for parameter in group.parameters]

    def prepare(self) -> None:
        """Part of what is recorded."""

    def run(self, batch: tuple[Any, ...], backward: Backward, done: Done, share: float = 1.0) -> dict[str, Tensor]:
        def run(given: tuple[Any, ...], finished: Done) -> dict[str, Tensor]:
            self.inner.prepare()
            return self.inner.run(given, backward, finished, share)

        recorded = self._recordings.find(
            self.phase, batch, lambda twin: run(twin, lambda group: None), self._parameters, self.draws_twice
        )
        if recorded is None:
            return run(batch, done)
        losses = recorded.replay(batch)
        for group in range(self.phase.frozen, len(self.groups)):
            done(group)
        return losses


@dataclasses.dataclass
class _Recording:
    """A pass that can be replayed on another batch of the same shapes.

    Attributes:
        graph: of the forward and backward passes.
        inputs: the tensors that it reads, in the order of the batch.
        losses: what it writes, by block.
        gradients: what it writes, by parameter.
        recomputes: whether it computes parts of the forward pass twice, which must draw the same random numbers.
        fresh: not yet replayed.
    """

    graph: torch.cuda.CUDAGraph
    inputs: list[Tensor]
    losses: dict[str, Tensor]
    gradients: list[tuple[nn.Parameter, Tensor]]
    recomputes: bool
    fresh: bool = True

    def replay(self, batch: Sequence[Any]) -> dict[str, Tensor]:
        """The losses; ``.grad`` is set, to tensors that the next replay overwrites.

        Raises:
            ConfigError: the pass draws random numbers, and recomputes.
        """
        for held, tensor in zip(self.inputs, tensors_in(batch), strict=True):
            held.copy_(tensor, non_blocking=True)
        device = self.inputs[0].device
        before = torch.cuda.get_rng_state(device) if self.fresh and self.recomputes else None
        self.graph.replay()
        if before is not None and not torch.equal(before, torch.cuda.get_rng_state(device)):
            raise ConfigError(
                "The model draws random numbers (dropout, stochastic depth), and a recorded step cannot draw the same "
                "ones again where units are recomputed. Leave cuda_graph (--cuda-graph) out, or the dropout."
            )
        self.fresh = False
        for parameter, gradient in self.gradients:
            parameter.grad = gradient
        return {name: loss.clone() for name, loss in self.losses.items()}


class _Recordings:
    """The recorded passes of a model, one for each kind of batch and each state that they can be in.

    The first passes of a kind run as ever; the next one is recorded. All graphs share one pool of memory, because they
    run one at a time; gradients and losses stay in it.
    """

    def __init__(self, model: nn.Module) -> None:
        self._modules, self._parameters = list(model.modules()), list(model.parameters())
        self._seen: Counter[Hashable] = Counter()
        self._passes: dict[Hashable, _Recording] = {}
        self._pool: Any = None

    def find(
        self,
        state: Hashable,
        batch: tuple[Any, ...],
        run: Callable[[tuple[Any, ...]], dict[str, Tensor]],
        parameters: Sequence[nn.Parameter],
        recomputes: bool,
    ) -> _Recording | None:
        """The recorded pass for a batch, which is recorded if need be; None where the pass has to run as ever.

        Args:
            state: all that decides, beside the batch's shapes, the model's modes and autocast, what the pass does.
            batch: its tensors lie on one CUDA device, else there is no graph.
            run: the pass: sets ``.grad`` and returns the losses by block.
            parameters: whose ``.grad`` it sets; where one is set already, the pass adds to it, and there is no graph.
            recomputes: see `_Recording`.

        Raises:
            ConfigError: the pass cannot be recorded.
        """
        leaves, structure = tree_flatten(list(batch))
        tensors = list(tensors_in(batch))
        if not tensors or any(t.device.type != "cuda" for t in tensors) or any(p.grad is not None for p in parameters):
            return None
        kind = (
            state,
            torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda"),  # the caller's own
            repr(structure),
            tuple((leaf.shape, leaf.dtype) if isinstance(leaf, Tensor) else repr(leaf) for leaf in leaves),
            tuple(module.training for module in self._modules),
            tuple(parameter.requires_grad for parameter in self._parameters),
        )
        if kind in self._passes:
            return self._passes[kind]
        self._seen[kind] += 1
        if self._seen[kind] <= _WARM_UP or len(self._passes) >= _MOST:
            return None
        twin = tree_map_only(Tensor, Tensor.clone, batch)
        self._passes[kind] = self._record(twin, tensors[0].device, run, parameters, recomputes)
        return self._passes[kind]

    def _record(
        self,
        batch: tuple[Any, ...],
        device: torch.device,
        run: Callable[[tuple[Any, ...]], dict[str, Tensor]],
        parameters: Sequence[nn.Parameter],
        recomputes: bool,
    ) -> _Recording:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(device), _left_as_it_was(device):
            if self._pool is None:
                self._pool = torch.cuda.graph_pool_handle()
            try:
                # "thread_local": a loader's thread may pin memory meanwhile
                with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                    losses = run(batch)
                gradients = [(p, p.grad) for p in parameters if p.grad is not None]
            except (GlcanError, torch.OutOfMemoryError):
                raise
            except RuntimeError as error:
                raise ConfigError(
                    f"The step cannot be recorded as a CUDA graph ({_cause(error)}). Something in the model, the loss "
                    "or the rule reads a value from the GPU (.item(), .nonzero(), if tensor: ...) or moves one to it. "
                    "Leave cuda_graph (--cuda-graph) out."
                ) from error
            finally:
                for parameter in parameters:
                    parameter.grad = None
        return _Recording(graph, list(tensors_in(batch)), losses, gradients, recomputes)


@contextlib.contextmanager
def _left_as_it_was(device: torch.device) -> Iterator[None]:
    """A recording that fails leaves its own stream the current one, and a random generator that refuses to draw."""
    stream = torch.cuda.current_stream(device)
    try:
        yield
    except BaseException:
        torch.cuda.set_stream(stream)
        generator = torch.cuda.default_generators[torch.cuda.current_device()]
        with contextlib.suppress(RuntimeError):  # the first error is the one to show
            generator.graphsafe_set_state(generator.clone_state())
        raise


def _cause(error: BaseException) -> str:
    """The first line of the first of the errors: ending a recording that has failed is one more."""
    while isinstance(error.__context__, RuntimeError):
        error = error.__context__
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
