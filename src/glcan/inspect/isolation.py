"""Gradient isolation of an unmodified model.

`Isolation` runs ``model(*args, **kwargs)`` as it is, and keeps gradients from crossing the cuts. It stands on a
`torch.overrides.TorchFunctionMode`: every tensor that a block produces is tagged with that block; when a later block
uses it, the operation receives a detached twin instead. Skip connections, feature pyramids and tensors that travel in
lists, dicts or dataclasses are therefore isolated without being declared, and nothing of the model is renamed, copied
or rewritten.

Inside a *unit* (a sub-module that is never cut inside) the mode is off: operations there cost nothing extra. Only the
glue between units is intercepted.

What the mode cannot see, because PyTorch does not show it: a custom `torch.autograd.Function` applied in the glue, and
older tensors that a unit takes from somewhere else than its arguments. `glcan.inspect.leaks` finds both.

Activation checkpointing (non-reentrant) may stand inside a unit, around a unit, or around a chain of units with a cut
in it: a recomputed unit is put into the block that it ran in.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, _pop_mode, _push_mode
from torch.overrides import _get_current_function_mode as _top_mode

from glcan.errors import CutError, UnknownName
from glcan.inspect.tensors import overridden, replaced, tensors_in

__all__ = ["Boundary", "Crossings", "Isolation", "check_units", "tag_of"]

#: For each cut, what crosses it: places among the tensors in the unit's arguments, and numbers of those that pass by.
Crossings = dict[str, tuple[tuple[int, ...], tuple[int, ...]]]

_TAG = "_glcan_tag"
_CALL = 32  # bits of a tensor's number for its place after a unit's call
# The properties of a tensor that give a differentiable tensor; every other one (shape, dtype, ...) is left alone.
_TENSOR_PROPERTIES = frozenset(getattr(Tensor, name).__get__ for name in ("T", "mT", "H", "mH", "real", "imag"))


@dataclasses.dataclass(frozen=True)
class Boundary:
    """The tensors that cross a cut. All require a gradient and belong to the block that ends there.

    Attributes:
        block: index of the block that ends, from 0.
        cut: name of the unit that begins the next block.
        entering: the tensors passed to that unit, in the order of its arguments.
        skipping: tensors of the block that pass by the unit and are used further on (skip connections, pyramid levels).
    """

    block: int
    cut: str
    entering: tuple[Tensor, ...]
    skipping: tuple[Tensor, ...] = ()

    def detached(self) -> Boundary:
        """The same tensors without their graphs: what is learned from them sends the block no gradient."""
        return dataclasses.replace(
            self,
            entering=tuple(tensor.detach() for tensor in self.entering),
            skipping=tuple(tensor.detach() for tensor in self.skipping),
        )


class _Tag:
    """What is known of a tensor: the run and the block that produced it, its number, and its detached twin."""

    __slots__ = ("block", "number", "run", "twin")

    def __init__(self, run: object, block: int, number: int) -> None:
        self.run, self.block, self.number = run, block, number
        self.twin: Tensor | None = None


def tag_of(tensor: Tensor, run: object) -> _Tag | None:
    """What is known of a tensor that was made in this run."""
    tag: _Tag | None = getattr(tensor, _TAG, None)
    return tag if tag is not None and tag.run is run else None


class Isolation(TorchFunctionMode):
    """Runs a model block by block, no gradient crossing a cut.

    ::

        with Isolation(model, units, cuts, on_boundary) as isolation:
            output = model(images)                       # on_boundary(boundary) is called at each cut
            loss = criterion(output, labels)             # only the last block's gradient is in here
            with isolation.replay():
                loss.backward()

    The callback runs while the model's forward stands at the cut, and may run ``backward`` at once: the saved
    activations of the finished block are then freed before the next block begins. The object can be entered again and
    again. Whatever happens inside, the model's own ``forward`` attributes are as before on exit.

    Args:
        model: any module. Its parameters, buffers and mode (train, eval) are not touched.
        units: names of sub-modules, none inside another, that are never cut inside.
        cuts: names of the units, in the order in which they run, at which a new block begins.
        on_boundary: called with the `Boundary` at each cut; must not run the model.
        held: for each cut, the numbers (see `Profile.crossing`) of the tensors that pass by it, so that they can be
            given as ``Boundary.skipping``. Numbers count from entering, so let nothing but the model run before.

    Attributes:
        isolating: whether gradients are kept from crossing. If not, the callback is called all the same, but the model
            is one piece: its graph is that of plain back-propagation. May be set between two runs, to false after a
            first one, or with `crossings` of another object for the same model and cuts.
        crossings: what crossed each cut when gradients were last kept from it. Without isolation the tensors do not
            show it.

    Raises:
        UnknownName: a unit or a cut is not there.
        CutError: a unit lies inside another one, or the cuts are no units, or repeat.
    """

    def __init__(
        self,
        model: nn.Module,
        units: Sequence[str],
        cuts: Sequence[str] = (),
        on_boundary: Callable[[Boundary], None] | None = None,
        held: Mapping[str, Collection[int]] | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.modules = check_units(model, units)
        for cut in cuts:
            if cut not in self.modules:
                raise UnknownName("cut", cut, self.modules, "A cut is the name of the unit that begins a block.")
        if len(set(cuts)) != len(cuts):
            raise CutError(f"The cuts {list(cuts)} name a unit twice; name each at most once.")
        self.cuts = tuple(cuts)
        self.on_boundary = on_boundary
        self.isolating = True
        self.crossings: Crossings = {}
        self.held = {cut: frozenset(numbers) for cut, numbers in (held or {}).items()}
        self._entered: contextlib.ExitStack | None = None
        self._reset()

    def _reset(self) -> None:
        self.block = 0
        self._run = object()
        self._number = 0
        self._calls = 0  # of units
        self._replaying = False
        self._inside = 0  # depth of units in which the mode could not be taken off the stack
        self._ran: dict[str, set[int]] = defaultdict(set)  # the blocks that each unit ran in
        self._kept: dict[int, Tensor] = {}
        self._keep: frozenset[int] = frozenset().union(*self.held.values())

    # -- entering and leaving ------------------------------------------------------------------------------------

    def __enter__(self) -> Isolation:
        if self._entered is not None:
            raise RuntimeError("This Isolation is already entered; a run inside a run needs an Isolation of its own.")
        self._reset()
        with contextlib.ExitStack() as stack:
            stack.enter_context(overridden((m, self._wrap(name, m.forward)) for name, m in self.modules.items()))
            super().__enter__()
            self._entered = stack.pop_all()
        return self

    def __exit__(self, *exc: Any) -> None:
        try:
            super().__exit__(*exc)
        finally:
            assert self._entered is not None
            self._entered.close()
            self._entered = None
            self._kept.clear()

    @contextlib.contextmanager
    def replay(self) -> Iterator[None]:
        """While this is open, unit calls are recomputations (activation checkpointing), not steps forward."""
        before = self._replaying, self.block
        self._replaying = True
        try:
            yield
        finally:
            self._replaying, self.block = before

    @contextlib.contextmanager
    def suspended(self) -> Iterator[None]:
        """Operations are not looked at, and run at full speed: a unit's, or those of what is no part of the model.

        Other modes of the user's stay.
        """
        if _top_mode() is self:
            _pop_mode()
            try:
                yield
            finally:
                _push_mode(self)
        else:
            self._inside += 1
            try:
                yield
            finally:
                self._inside -= 1

    # -- tensors -------------------------------------------------------------------------------------------------

    def twin(self, tensor: Tensor) -> Tensor:
        """The tensor itself if the current block (or nobody) produced it, else its detached twin (same storage)."""
        if not self.isolating:
            return tensor
        tag: _Tag | None = getattr(tensor, _TAG, None)
        while tag is not None and tag.block < self.block and tag.run is self._run:
            if tag.twin is None:
                tag.twin = tensor.detach()
            tensor = tag.twin
            tag = getattr(tensor, _TAG, None)  # an in-place operation may have made the twin a later block's tensor
        return tensor

    def _incoming(self, value: Any) -> Any:
        return replaced(value, self.twin) if self.block else value

    def _outgoing(self, value: Any) -> None:
        for tensor in tensors_in(value):
            # Every tensor has a number, so that numbers do not depend on what needs a gradient, hence on the cuts.
            if not self._replaying:
                self._number += 1
            if tensor.requires_grad and not isinstance(tensor, nn.Parameter):
                self._tag(tensor, self._number)

    def _tag(self, tensor: Tensor, number: int) -> None:
        if self._replaying:
            if self._is_new(tensor):
                setattr(tensor, _TAG, _Tag(self._run, self.block, -1))
            return
        setattr(tensor, _TAG, _Tag(self._run, self.block, number))
        if number in self._keep:
            self._kept[number] = tensor
        base = tensor._base  # a buffer that was written into through this view needs a gradient from now on
        if base is not None and base.grad_fn is not None and self._is_new(base):
            setattr(base, _TAG, _Tag(self._run, self.block, -1))

    def _is_new(self, tensor: Tensor) -> bool:
        return tag_of(tensor, self._run) is None

    # -- the two places where operations are seen: the glue, and the units ------------------------------------------

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._inside or (getattr(func, "__name__", "") == "__get__" and func not in _TENSOR_PROPERTIES):
            return func(*args, **kwargs)
        if self.block:
            args, kwargs = replaced(args, self.twin), replaced(kwargs, self.twin)
        out = func(*args, **kwargs)
        if not self._replaying:
            self._outgoing(out if out is not None else args[:1])  # x[i] = y returns nothing, and changes x
        return out

    def _wrap(self, name: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(forward)
        def unit(*args: Any, **kwargs: Any) -> Any:
            if self._inside:
                return forward(*args, **kwargs)
            if self._replaying:
                if len(self._ran[name]) == 1:
                    (self.block,) = self._ran[name]
                return self._run_unit(forward, args, kwargs)
            if self.block < len(self.cuts) and name == self.cuts[self.block]:
                self._cross(name, args, kwargs)
            self._ran[name].add(self.block)
            return self._call(name, forward, args, kwargs)

        return unit

    def _call(self, name: str, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        return self._run_unit(forward, args, kwargs)

    def _run_unit(self, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        with self.suspended():
            args, kwargs = self._incoming((args, kwargs))
            out = forward(*args, **kwargs)
            if not self._replaying:
                # Numbers begin anew with each call: how many there were before may depend on the batch (a detector's
                # transform gives a tensor for each image).
                self._calls += 1
                self._number = self._calls << _CALL
            self._outgoing(out)
        return out

    def _cross(self, cut: str, args: Any, kwargs: Any) -> None:
        with self.suspended():
            given = [self.twin(tensor) for tensor in tensors_in((args, kwargs))]
            if self.isolating:
                places = (i for i, t in enumerate(given) if t.requires_grad and not isinstance(t, nn.Parameter))
                numbers = (n for n in sorted(self.held.get(cut, ())) if self._is_of_this_block(n))
                self.crossings[cut] = tuple(places), tuple(numbers)
        crossing, passing = self.crossings[cut]
        entering = {id(given[i]): given[i] for i in crossing if i < len(given)}
        skipping = {id(t): t for n in passing if (t := self._kept.get(n)) is not None}
        boundary = Boundary(
            self.block, cut, tuple(entering.values()), tuple(t for i, t in skipping.items() if i not in entering)
        )
        del given, entering, skipping
        if self.on_boundary is not None:
            with self.replay(), _outside_of_checkpoints():
                self.on_boundary(boundary)
        self._begin_block()

    def _begin_block(self) -> None:
        self.block += 1
        later = self.cuts[self.block :]
        still = frozenset().union(*(self.held.get(c, frozenset()) for c in later))
        self._kept = {n: t for n, t in self._kept.items() if n in still}

    def _is_of_this_block(self, number: int) -> bool:
        tensor = self._kept.get(number)
        return tensor is not None and getattr(tensor, _TAG).block == self.block


@contextlib.contextmanager
def _outside_of_checkpoints() -> Iterator[None]:
    """Tensors are saved for backward as they are, although this runs inside of a function that is checkpointed.

    A model may checkpoint around the unit at which a cut stands. What the callback saves there must not count as the
    unit's: it would be dropped, and looked for in the unit's recomputation.
    """
    autograd = torch._C._autograd  # type: ignore[attr-defined]
    dropped = []
    while hooks := autograd._top_saved_tensors_default_hooks(False):
        if getattr(hooks[0], "__module__", "") != "torch.utils.checkpoint":
            break  # the user's own, such as save_on_cpu
        autograd._pop_saved_tensors_default_hooks()
        dropped.append(hooks)
    try:
        yield
    finally:
        for hooks in reversed(dropped):
            autograd._push_saved_tensors_default_hooks(*hooks)


def check_units(model: nn.Module, units: Sequence[str]) -> dict[str, nn.Module]:
    """The units by name.

    Raises:
        UnknownName: a unit is no sub-module of the model.
        CutError: a unit lies inside another one, or is the same module as another one.
    """
    known = dict(model.named_modules(remove_duplicate=False))
    modules: dict[str, nn.Module] = {}
    for name in units:
        if name not in known or name == "":
            raise UnknownName("unit", name, [n for n in known if n], "A unit is the name of a sub-module.")
        modules[name] = known[name]
    owner = {module: name for name, module in modules.items()}
    for name, module in modules.items():
        if owner[module] != name:
            raise CutError(f"The units {owner[module]!r} and {name!r} are the same module; name only one of them.")
        for inner in module.modules():
            if inner is not module and inner in owner:
                raise CutError(f"The unit {owner[inner]!r} lies inside the unit {name!r}; name only one of them.")
    return modules
