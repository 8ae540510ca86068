"""Activation checkpointing of an unmodified model, on `torch.utils.checkpoint`.

Non-reentrant, and exact: what is computed a second time sees the world of the first (`second_pass`): buffers that the
forward pass writes (running statistics, the vectors of spectral normalisation) begin as they began and end as they
were, and all random generators give the same numbers.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map, tree_map_only
from torch.utils.checkpoint import checkpoint

from glcan.errors import ConfigError
from glcan.inspect.tensors import overridden
from glcan.strategies.second_pass import Buffers, Generators, SecondPass, recording

__all__ = ["Recomputation"]

_PARTS = 8


class Recomputation:
    """The units of a model whose activations are recomputed in the backward pass.

    Args:
        model: any module.
        runs: names of units, in chains that are recomputed together. Of each, only the inputs are kept.
        parts: so many images at a time, forward and backward, for a batch of this size: an eighth of them; none: the
            whole batch at once.
    """

    def __init__(self, model: nn.Module, runs: Sequence[Sequence[str]], parts: int | None = None) -> None:
        self.runs = [list(run) for run in runs if run]
        self._part = None if parts is None else math.ceil(parts / _PARTS)
        self._modules = [[model.get_submodule(name) for name in run] for run in self.runs]
        self._buffers = [Buffers(modules) for modules in self._modules]

    def __bool__(self) -> bool:
        return bool(self.runs)

    @contextlib.contextmanager
    def applied(self, second: SecondPass | None = None) -> Iterator[None]:
        """While this is open, the model's forward recomputes; on exit the modules are as before.

        Args:
            second: where the forward pass itself is a second one.

        Raises:
            ConfigError: units of one chain did not run one after the other.
        """
        chains = [
            _Chain(run, modules, buffers, self._part, second)
            for run, modules, buffers in zip(self.runs, self._modules, self._buffers, strict=True)
        ]
        with overridden((module, forward) for chain in chains for module, forward in chain.forwards()):
            yield
        for chain in chains:
            chain.check()


class _Chain:
    """Units that are computed at the first one of them; the others hand on what they are given."""

    def __init__(
        self,
        names: Sequence[str],
        modules: Sequence[nn.Module],
        buffers: Buffers,
        part: int | None,
        second: SecondPass | None,
    ) -> None:
        self._names, self._modules, self._buffers, self._part, self._second = names, modules, buffers, part, second
        self._forwards = [module.forward for module in modules]
        self._writes = getattr(_first_leaf(modules[0]), "inplace", False)
        self._handed: int | None = None  # id of what the other units are to hand on
        self._left = 0  # of these units, still to come
        self._device = next((p.device for m in modules for p in m.parameters()), torch.device("cpu"))

    def forwards(self) -> Iterator[tuple[nn.Module, Callable[..., Any]]]:
        yield self._modules[0], self._run
        for name, module in zip(self._names[1:], self._modules[1:], strict=True):
            yield module, functools.partial(self._hand_on, name)

    def check(self) -> None:
        """That the units ran one after the other."""
        if self._left:
            raise ConfigError(self._skipped(self._names[-self._left]))

    def _skipped(self, name: str) -> str:
        return (
            f"{name!r} is recomputed together with {self._names[0]!r}, but did not run right after it this time: the "
            "model skips layers, or something reads what lies between. Choose 'checkpoint', which recomputes each unit "
            "by itself."
        )

    def _hand_on(self, name: str, value: Tensor) -> Tensor:
        if not self._left or name != self._names[-self._left] or id(value) != self._handed:
            raise ConfigError(self._skipped(name))
        self._left -= 1
        return value

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        self.check()
        args, kwargs = tree_map(lambda leaf: leaf, (args, kwargs))  # lists of one's own: the model may append to its
        if self._part is None or kwargs or len(args) != 1:
            out = self._again(*args, **kwargs)
        else:
            out = torch.cat([self._again(images) for images in args[0].split(self._part)])
        self._handed, self._left = id(out), len(self._names) - 1
        return out

    def _again(self, *args: Any, **kwargs: Any) -> Any:
        position = None if self._second is None else self._second.position()
        values: list[Tensor] = []
        # torch's own generators are checkpoint's matter; one that is being recorded has no state to read
        generators = None if recording() else Generators(self._device, torchs=False)

        @contextlib.contextmanager
        def first() -> Iterator[None]:
            with self._buffers.noted() as found:
                yield
            values[:] = found

        @contextlib.contextmanager
        def second() -> Iterator[None]:
            with contextlib.ExitStack() as stack:
                if generators is not None:
                    stack.enter_context(generators.again())
                stack.enter_context(self._buffers.held(values))
                if self._second is not None and position is not None:
                    stack.enter_context(self._second.resumed(position))
                yield

        return checkpoint(
            self._compute,
            *args,
            use_reentrant=False,
            preserve_rng_state=generators is not None,  # a recorded pass refuses what would need it
            context_fn=lambda: (first(), second()),
            **kwargs,
        )

    def _compute(self, *args: Any, **kwargs: Any) -> Any:
        if self._writes:  # into what the recomputation will begin with
            args, kwargs = tree_map_only(Tensor, Tensor.clone, (args, kwargs))
        out = self._forwards[0](*args, **kwargs)
        for forward in self._forwards[1:]:
            out = forward(out)
        return out


def _first_leaf(module: nn.Module) -> nn.Module:
    """The first module inside that has no others inside: a dropout in front of a classifier."""
    while (first := next(module.children(), None)) is not None:
        module = first
    return module
