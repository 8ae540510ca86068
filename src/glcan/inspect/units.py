"""What the units of a model are: found by watching it run once.

A *skip* is a tensor that passes by a sub-module and is used after it. Walking down from the model:

1. A sub-module is a unit if its class is a *repeated* one: two or more siblings of that class hold at least two weight
   matrices each, and no such class lies further inside (a residual block, a dense layer, a transformer layer).
2. It is opened if it contains such a unit, or if no skip spans its children (a chain).
3. Otherwise (a skip spans its children: a residual block that stands alone, a feature pyramid, a pair of heads) it is a
   unit, unless it is most of the model (a U-Net in a wrapper), which is opened.

Where this is not what you want, name the units yourself.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from glcan.errors import ConfigError
from glcan.inspect.tensors import differentiable

__all__ = ["find_units", "weights_of"]

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
# A sub-module with a skip over its children is opened all the same if it holds so much of the model's weights.
_MOST_OF_THE_MODEL = 0.5


@dataclasses.dataclass
class _Call:
    """One call of a sub-module: when it began and ended, and the calls made directly inside."""

    name: str
    module: nn.Module
    begin: int
    end: int = -1
    children: list[_Call] = dataclasses.field(default_factory=list)


class _Watcher(TorchFunctionMode):
    """Records which sub-module is called when, and when each differentiable tensor is made and used."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.names = {module: name for name, module in model.named_modules()}
        self.root = _Call("", model, 0)
        self.stack = [self.root]
        self.time = 0
        self.made: dict[int, int] = {}
        self.used: dict[int, list[int]] = defaultdict(list)
        self.alive: list[Tensor] = []  # keeps ids unique

    def __enter__(self) -> _Watcher:
        hooks = torch.nn.modules.module
        self.handles = [
            hooks.register_module_forward_pre_hook(self._enter_module),
            hooks.register_module_forward_hook(self._leave_module, always_call=True),
        ]
        super().__enter__()
        return self

    def __exit__(self, *exc: Any) -> None:
        super().__exit__(*exc)
        for handle in self.handles:
            handle.remove()

    def _enter_module(self, module: nn.Module, args: Any) -> None:
        if module in self.names and module is not self.root.module:
            self.time += 1
            call = _Call(self.names[module], module, self.time)
            self.stack[-1].children.append(call)
            self.stack.append(call)

    def _leave_module(self, module: nn.Module, args: Any, output: Any) -> None:
        if self.stack[-1].module is module and module is not self.root.module:
            self.time += 1
            self.stack.pop().end = self.time

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if getattr(func, "__name__", "") == "__get__":
            return out
        self.time += 1
        for tensor in differentiable((args, kwargs)):
            self.used[id(tensor)].append(self.time)
        for tensor in differentiable(out if out is not None else args[:1]):
            if id(tensor) not in self.made:
                self.made[id(tensor)] = self.time
                self.alive.append(tensor)
        return out

    def skips(self, call: _Call) -> bool:
        """Whether a tensor passes by a child of this call and is used after it, still inside this call."""
        for child in call.children[1:]:
            at = child.begin
            crossing = sum(
                1
                for tensor, made in self.made.items()
                if made < at and any(at <= t <= call.end for t in self.used[tensor])
            )
            if crossing > 1:
                return True
        return False


def weights_of(module: nn.Module) -> int:
    """Number of weight matrices and kernels (parameters with two or more dimensions that are larger than 1)."""
    return sum(1 for p in module.parameters() if sum(size > 1 for size in p.shape) >= 2 or p.dim() >= 4)


def find_units(model: nn.Module, args: Any, kwargs: Any) -> list[str]:
    """The names of the units, in the order of their first call; the model is run once.

    Raises:
        ConfigError: the model calls no sub-module.
    """
    watcher = _Watcher(model)
    with torch.enable_grad(), watcher:
        model(*args, **kwargs)
    watcher.root.end = watcher.time + 1
    called = {call.module for call in _walk(watcher.root)}
    repeated = _repeated_classes(model, called)
    total = weights_of(model)

    def holds_unit(module: nn.Module) -> bool:
        return any(type(m) in repeated for m in module.modules() if m is not module and m in called)

    units: dict[str, None] = {}

    def visit(call: _Call) -> None:
        module, own = call.module, weights_of(call.module)
        composite = bool(call.children) and own > 1
        if call is watcher.root:
            opened = True
        elif not composite or (type(module) in repeated and not holds_unit(module)):
            opened = False
        elif holds_unit(module):
            opened = True
        else:
            opened = not watcher.skips(call) or own > _MOST_OF_THE_MODEL * total
        if opened:
            for child in call.children:
                visit(child)
        else:
            units.setdefault(call.name)

    visit(watcher.root)
    if not units:
        raise ConfigError(
            f"{type(model).__name__} calls no sub-module, so there is nothing to cut; name units yourself."
        )
    # A module that is opened in one call and whole in another one is whole.
    return [name for name in units if not any(name.startswith(f"{other}.") for other in units)]


def _walk(call: _Call) -> list[_Call]:
    return [call, *itertools.chain.from_iterable(_walk(child) for child in call.children)]


def _repeated_classes(model: nn.Module, called: set[nn.Module]) -> set[type]:
    """Classes of which two or more siblings hold two or more weight matrices each, the innermost such classes only."""
    classes: set[type] = set()
    for parent in model.modules():
        siblings: dict[type, int] = defaultdict(int)
        for child in parent.children():
            inner = isinstance(child, _CONTAINERS) and type(child) in _CONTAINERS
            if child in called and not inner and any(True for _ in child.children()) and weights_of(child) >= 2:
                siblings[type(child)] += 1
        classes |= {cls for cls, count in siblings.items() if count >= 2}
    outer = {
        cls
        for cls in classes
        if any(
            type(m) in classes - {cls} for module in model.modules() if type(module) is cls for m in module.modules()
        )
    }
    return classes - outer
