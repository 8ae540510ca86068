"""The profile of a model: its units in the order in which they run, with shapes, stages, bytes, FLOPs and parameters.

Everything comes from running the model once (on fake tensors where that is possible), nothing from a table of
architectures. Two passes: the first watches every sub-module and every tensor and decides what the units are; the
second runs the model under `Isolation` with those units and takes the figures.

How units are found. A *skip* is a tensor that passes by a sub-module and is used after it. Walking down from the model:

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
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from glcan.dryrun import RandomNumbers, dry_run
from glcan.errors import ConfigError, CutError, GlcanError
from glcan.isolation import _TAG, Isolation, tensors_in
from glcan.memory import LiveMemory

__all__ = ["Feature", "Profile", "Unit", "profile"]

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
# A sub-module with a skip over its children is opened all the same if it holds so much of the model's weights.
_MOST_OF_THE_MODEL = 0.5


@dataclasses.dataclass(frozen=True)
class Feature:
    """Shape of a tensor and how to read it as a map.

    Attributes:
        shape: as it is, the batch included.
        layout: "BCHW", "BHWC", "BNC" (tokens: `prefix` special ones, then the grid row by row), "BC" (no grid), or
            "?" (anything else: only the mean over all but the batch and the last dimension makes sense).
        channels: size of the channel dimension.
        grid: (height, width) of the map, (1, 1) where there is none.
        prefix: number of special tokens (class token, registers) before the grid.
    """

    shape: tuple[int, ...]
    layout: str
    channels: int
    grid: tuple[int, int]
    prefix: int = 0

    @property
    def bytes(self) -> int:
        """Size in bytes, as float32."""
        return 4 * math.prod(self.shape)


@dataclasses.dataclass(frozen=True)
class Unit:
    """A unit as it ran.

    Attributes:
        name: of the sub-module.
        kind: its class.
        index: position in the order of running, from 0.
        entering: the tensors that it received from earlier units and that need a gradient.
        output: its main output (the largest), None if it gives no floating-point tensor.
        stage: index of its stage, from 0.
        parameters: number of parameter elements, trainable or not.
        weights: number of its weight matrices and kernels; units without any (activations, normalisation, pooling) may
            work in place, so neither a block nor a checkpointed run begins there.
        saved_bytes: activations that stay alive for the backward pass, the glue after the unit included.
        flops: forward FLOPs, the glue after the unit included.
        cuttable: whether a block may begin here: it has a weight matrix, and tensors with a gradient enter it.
        chained: it receives one tensor, the very output of the unit before it, and nobody else does.
    """

    name: str
    kind: str
    index: int
    entering: tuple[Feature, ...]
    output: Feature | None
    stage: int
    parameters: int
    weights: int
    saved_bytes: int
    flops: int
    cuttable: bool
    chained: bool


@dataclasses.dataclass(frozen=True)
class Profile:
    """What one dry run tells of a model.

    Attributes:
        units: in the order of their first call.
        crossing: for each cuttable unit, the numbers (as `Isolation` counts) of the tensors that pass by it.
        calls: for each call of a unit, in the order of running, the unit's index. A unit may be called again and again.
        glue: for each parameter (by name) that is used between units, the positions in `calls` after which it is used
            (-1: before the first call).
        image: (height, width) of the first 4-d input, None without one. Of a model that makes the images' batch itself
            (detectors, from lists of 3-d images): of the first 4-d tensor that enters a unit with a convolution.
        batch: size of the batch, likewise.
        writes_input: the model changes its input in place.
        output: shapes of the model's output tensors.
        trained: the positions in `calls` at which trainable parameters are used, those of `glue` included.
        sources: for each cuttable unit, the last position of `trained` that what enters it depends on. None of them,
            and a unit is missing here.
        parted: names of the units at the end that blocks run for some images at a time (`checkpointing.in_parts`).
        by_image: names of the cuttable units before which a part of the batch can be run again as it ran in the whole:
            all that crosses the cut has the batch as its first dimension, no random numbers are drawn before it, and no
            BatchNorm before it runs more than once (`glcan.choosing`).
    """

    units: tuple[Unit, ...]
    crossing: Mapping[str, frozenset[int]]
    calls: tuple[int, ...]
    glue: Mapping[str, frozenset[int]]
    image: tuple[int, int] | None
    batch: int
    writes_input: bool
    output: tuple[tuple[int, ...], ...]
    trained: frozenset[int] = frozenset()
    sources: Mapping[str, int] = dataclasses.field(default_factory=dict)
    parted: tuple[str, ...] = ()
    by_image: frozenset[str] = frozenset()

    @property
    def names(self) -> list[str]:
        return [unit.name for unit in self.units]

    @property
    def cuttable(self) -> list[str]:
        """The names at which a block may begin."""
        return [unit.name for unit in self.units if unit.cuttable and unit.name not in self.parted[1:]]

    @property
    def mostly_by_image(self) -> bool:
        """Whether most cuttable units are `by_image`."""
        return 2 * len(self.by_image) > len(self.crossing)

    @property
    def flops(self) -> int:
        """Forward FLOPs of the whole model."""
        return sum(unit.flops for unit in self.units)

    @property
    def upsampler(self) -> tuple[Unit, ...]:
        """The units at the end that make larger maps than most others have, the convolution before a shuffle included.

        Empty where there is none, or where it is not a chain that is the smaller part of the model (a decoder).
        """
        grids = [unit.output.grid for unit in self.units if unit.output is not None]
        usual = max(set(grids), key=grids.count) if grids else (0, 0)
        start = len(self.units)
        while start and (output := self.units[start - 1].output) is not None and output.grid > usual:
            start -= 1
        if 0 < start < len(self.units) and not self.units[start].weights:  # a shuffle of what was made for it
            start -= 1
        chained = all(unit.chained for unit in self.units[start + 1 :])
        return self.units[start:] if chained and 2 * start > len(self.units) else ()

    def saved_bytes(self, start: int, end: int) -> int:
        """Activations of units ``start ... end - 1`` that stay alive for the backward pass in blocks."""
        return sum(unit.saved_bytes for unit in self.units[start:end] if unit.name not in self.parted)

    def unit(self, name: str) -> Unit:
        return next(unit for unit in self.units if unit.name == name)

    def trains(self, start: int, end: int) -> bool:
        """Whether a loss at unit number `end` can train a block that begins at unit number `start`.

        It cannot where nothing that the block computes enters there (they stand side by side), although the block has
        trainable parameters. The last block, up to the number of units, always can.
        """
        if end == len(self.units):
            return True
        begin = self.calls.index(start) if start else -1
        source = self.sources.get(self.units[end].name)
        if source is not None and source >= begin:
            return True
        return not any(begin <= position < self.calls.index(end) for position in self.trained)

    @property
    def stages(self) -> list[list[Unit]]:
        """The units by stage, those without a map (after the last one) left out."""
        grouped: dict[int, list[Unit]] = defaultdict(list)
        for unit in self.units:
            grouped[unit.stage].append(unit)
        return [grouped[i] for i in sorted(grouped)]


def profile(
    model: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None = None,
    *,
    units: Sequence[str] | None = None,
    assume: bool = False,
) -> Profile:
    """Finds the units of a model, and what they cost, by running it once.

    Args:
        model: any module, in the mode (train, eval) in which it is to be profiled. Not changed.
        args, kwargs: a batch, as the model's ``forward`` takes it.
        units: names of sub-modules to take as units instead of looking for them.
        assume: see `glcan.dryrun.dry_run`.

    Raises:
        ConfigError: the model cannot be run on this batch, has nothing that could be a unit, or is compiled.
        UnknownName, CutError: the named units do not fit the model.
    """
    _refuse_compiled(model)
    batch = (tuple(args), dict(kwargs or {}))
    try:
        return dry_run(model, batch, lambda m, b: _profile(m, b[0], b[1], units), assume=assume)
    except GlcanError:
        raise
    except Exception as error:
        shapes = [tuple(t.shape) for t in tree_leaves(batch) if isinstance(t, Tensor)]
        raise ConfigError(
            f"{type(model).__name__} cannot be run on a batch of shapes {shapes}: {type(error).__name__}: {error}. "
            "Give a sample that the model accepts (batch of at least 2, its image size and channels)."
        ) from error


def _refuse_compiled(model: nn.Module) -> None:
    """Compiled code does not call the sub-modules that a model is cut between."""
    for name, module in model.named_modules():
        where = f"its sub-module {name!r}" if name else "the model"
        if hasattr(module, "_orig_mod"):  # what torch.compile(module) gives
            raise ConfigError(
                f"{type(model).__name__}: {where} is compiled, and cannot be cut. Give the module that was compiled, "
                "as it was before torch.compile(module)."
            )
        if getattr(module, "_compiled_call_impl", None) is not None:
            raise ConfigError(
                f"{type(model).__name__}: {where} is compiled, and cannot be cut. Leave out its .compile()."
            )


def _profile(model: nn.Module, args: Any, kwargs: Any, units: Sequence[str] | None) -> Profile:
    versions = [(t, t._version) for t in tensors_in((args, kwargs))]
    if units is None:
        units = _find_units(model, args, kwargs)
        writes = any(t._version != before for t, before in versions)
    else:
        writes = False
    meter = LiveMemory(model, inputs=(args, kwargs))
    recorder = _Recorder(model, units, meter)
    with torch.enable_grad(), recorder.chance, meter, recorder:
        output = model(*args, **kwargs)
        recorder.finish(output)
    writes = writes or any(t._version != before for t, before in versions)
    return recorder.profile(args, kwargs, output, writes)


# -- first pass: what are the units? -----------------------------------------------------------------------------------


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
        for tensor in _differentiable((args, kwargs)):
            self.used[id(tensor)].append(self.time)
        for tensor in _differentiable(out if out is not None else args[:1]):
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


def _differentiable(value: Any) -> list[Tensor]:
    return [t for t in tensors_in(value) if t.requires_grad and not isinstance(t, nn.Parameter)]


def _weights(module: nn.Module) -> int:
    """Number of weight matrices and kernels (parameters with two or more dimensions that are larger than 1)."""
    return sum(1 for p in module.parameters() if sum(size > 1 for size in p.shape) >= 2 or p.dim() >= 4)


def _find_units(model: nn.Module, args: Any, kwargs: Any) -> list[str]:
    watcher = _Watcher(model)
    with torch.enable_grad(), watcher:
        model(*args, **kwargs)
    watcher.root.end = watcher.time + 1
    called = {call.module for call in _walk(watcher.root)}
    repeated = _repeated_classes(model, called)
    total = _weights(model)

    def holds_unit(module: nn.Module) -> bool:
        return any(type(m) in repeated for m in module.modules() if m is not module and m in called)

    units: dict[str, None] = {}

    def visit(call: _Call) -> None:
        module, own = call.module, _weights(call.module)
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
            if child in called and not inner and any(True for _ in child.children()) and _weights(child) >= 2:
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


# -- second pass: the figures ------------------------------------------------------------------------------------------


@dataclasses.dataclass
class _Note:
    """What is noted of the first call of a unit (shapes only: a tensor kept here would change the figures)."""

    clock: int
    entering: list[tuple[int, ...]]
    numbers: frozenset[int]
    chained: bool
    source: int | None
    drawn: bool
    output: tuple[int, ...] | None = None


class _Recorder(Isolation):
    """The model under isolation without cuts, taking notes."""

    def __init__(self, model: nn.Module, units: Sequence[str], meter: LiveMemory) -> None:
        super().__init__(model, units)
        self.meter = meter
        self.chance = RandomNumbers()
        self.parameter_names = {id(p): name for name, p in model.named_parameters()}
        self.notes: dict[str, _Note] = {}  # in the order of first calls
        self.calls: list[str] = []
        self.clock = -1  # index of the latest call of a unit
        self.made: dict[int, int] = {}  # tensor number -> clock
        self.first: dict[int, int] = {}  # tensor number -> its first dimension
        self.last_use: dict[int, int] = {}
        self.users: dict[int, int] = defaultdict(int)
        self.glue: dict[str, set[int]] = defaultdict(set)
        self.trained: set[int] = set()
        self.sources: dict[int, int] = {}  # tensor number -> the last clock of `trained` that the tensor depends on
        self.source: int | None = None  # of what is being made
        self.saved: list[int] = []
        self.flops: list[int] = []
        self.latest: Any = None  # what the latest unit gave
        self.images: tuple[int, ...] | None = None  # shape of the first 4-d tensor that enters a convolution

    def _use(self, value: Any) -> list[Tensor]:
        tensors = _differentiable(value)
        for tensor in tensors:
            tag = getattr(tensor, _TAG, None)
            if tag is not None and tag.run is self._run:
                self.last_use[tag.number] = self.clock
                self.users[tag.number] += 1
        return tensors

    def _source(self, tensors: Sequence[Tensor]) -> int | None:
        tags = [getattr(tensor, _TAG, None) for tensor in tensors]
        known = [self.sources.get(tag.number) for tag in tags if tag is not None and tag.run is self._run]
        return max((source for source in known if source is not None), default=None)

    def _train(self) -> None:
        """Trainable parameters are used now."""
        self.trained.add(self.clock)
        self.source = self.clock

    def _tag(self, tensor: Tensor, number: int) -> None:
        super()._tag(tensor, number)
        self.made[number] = self.clock
        self.first[number] = tensor.shape[0] if tensor.dim() else 0
        if self.source is not None:
            self.sources[number] = self.source

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self._inside and getattr(func, "__name__", "") != "__get__":
            self.source = self._source(self._use((args, kwargs or {})))
            for tensor in tensors_in((args, kwargs or {})):
                if isinstance(tensor, nn.Parameter) and id(tensor) in self.parameter_names:
                    self.glue[self.parameter_names[id(tensor)]].add(self.clock)
                    if tensor.requires_grad:
                        self._train()
            self.latest = None
        return super().__torch_function__(func, types, args, kwargs)

    def _call(self, name: str, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        latest, self.latest = self.latest, None
        chained = latest is not None and len(args) == 1 and not kwargs and args[0] is latest
        del latest
        self._note_costs()
        self.clock += 1
        self.calls.append(name)
        entering = self._use((args, kwargs))
        self.source = self._source(entering)
        first = name not in self.notes
        if first:
            tags = [getattr(t, _TAG, None) for t in entering]
            numbers = frozenset(tag.number for tag in tags if tag is not None and tag.run is self._run)
            shapes = [tuple(t.shape) for t in entering]
            self.notes[name] = _Note(self.clock, shapes, numbers, chained, self.source, self.chance.drawn)
            if self.images is None and any(len(p.shape) == 4 for p in self.modules[name].parameters()):
                given = (tuple(t.shape) for t in tensors_in((args, kwargs)))
                self.images = next((shape for shape in given if len(shape) == 4), None)
        del entering
        if any(p.requires_grad for p in self.modules[name].parameters()):
            self._train()
        out = super()._call(name, forward, args, kwargs)
        if first:
            with self.suspended():  # looking at a tensor is no use of it
                maps = [t for t in tensors_in(out) if t.is_floating_point() and t.dim() >= 2]
                main = max(maps, key=lambda t: t.numel(), default=None)
            self.notes[name].output = None if main is None else tuple(main.shape)
        self.latest = out if isinstance(out, Tensor) else None
        return out

    def _note_costs(self) -> None:
        self.saved.append(self.meter.current["activations"])
        self.flops.append(self.meter.flops)

    def finish(self, output: Any) -> None:
        self._note_costs()
        self.clock += 1
        self._use(output)
        self.latest = None

    def profile(self, args: Any, kwargs: Any, output: Any, writes: bool) -> Profile:
        missing = [name for name in self.modules if name not in self.notes]
        if missing:
            raise CutError(f"The units {missing} are never called by {type(self.model).__name__}; leave them out.")
        inputs = [tuple(t.shape) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t.dim()]
        images: tuple[int, ...] | None = next((shape for shape in inputs if len(shape) == 4), None)
        if images is None and self.images is not None:
            images, inputs = self.images, [self.images]
        image = (int(images[-2]), int(images[-1])) if images is not None else None
        batch = int(inputs[0][0]) if inputs else 1
        saved: dict[str, int] = defaultdict(int)
        flops: dict[str, int] = defaultdict(int)
        for i, name in enumerate(self.calls):
            # what the glue before the first unit made goes to the first unit
            saved[name] += self.saved[i + 1] - (self.saved[i] if i else 0)
            flops[name] += self.flops[i + 1] - (self.flops[i] if i else 0)
        crossing: dict[str, frozenset[int]] = {}
        units: list[Unit] = []
        stage, stage_grid = 0, None
        for name, note in self.notes.items():
            module = self.modules[name]
            feature = None if note.output is None else read_feature(note.output, batch, image)
            if feature is not None and feature.grid != (1, 1):
                stage += stage_grid is not None and feature.grid != stage_grid
                stage_grid = feature.grid
            cuttable = bool(note.entering) and note.clock > 0 and _weights(module) > 0
            if cuttable:
                crossing[name] = frozenset(
                    number
                    for number, made in self.made.items()
                    if made < note.clock <= self.last_use.get(number, -1) and number not in note.numbers
                )
            units.append(
                Unit(
                    name=name,
                    kind=type(module).__name__,
                    index=len(units),
                    entering=tuple(read_feature(shape, batch, image) for shape in note.entering),
                    output=feature,
                    stage=stage,
                    parameters=sum(p.numel() for p in module.parameters()),
                    weights=_weights(module),
                    saved_bytes=max(0, saved[name]),
                    flops=flops[name],
                    cuttable=cuttable,
                    chained=note.chained
                    and self.calls.count(name) == self.calls.count(self.calls[note.clock - 1]) == 1
                    and all(self.users[number] == 1 for number in note.numbers),
                )
            )
        index = {name: i for i, name in enumerate(self.notes)}
        repeated = min(
            (self.notes[name].clock for name in self.notes if self._normalises_twice(name)), default=self.clock
        )
        by_image = (
            name
            for name, passing in crossing.items()
            if not (note := self.notes[name]).drawn
            and note.clock <= repeated
            and all(shape[:1] == (batch,) for shape in note.entering)
            and all(self.first[number] == batch for number in passing)
        )
        return Profile(
            units=tuple(units),
            crossing=crossing,
            calls=tuple(index[name] for name in self.calls),
            glue={name: frozenset(clocks) for name, clocks in self.glue.items()},
            image=image,
            batch=batch,
            writes_input=writes,
            output=tuple(tuple(t.shape) for t in tensors_in(output)),
            trained=frozenset(self.trained),
            sources={name: source for name in crossing if (source := self.notes[name].source) is not None},
            by_image=frozenset(by_image),
        )

    def _normalises_twice(self, name: str) -> bool:
        """Whether a unit that normalises over the batch runs more than once."""
        norms = (m for m in self.modules[name].modules() if isinstance(m, _BatchNorm) and m.training)
        return self.calls.count(name) > 1 and any(True for _ in norms)


def read_feature(shape: tuple[int, ...], batch: int, image: tuple[int, int] | None) -> Feature:
    """How to read a tensor of this shape as a map, given the size of the images that it comes from."""
    if len(shape) == 4 and image is not None:
        first, last = _fits(shape[2:4], image), _fits(shape[1:3], image)
        if last and not first:
            return Feature(shape, "BHWC", shape[3], (shape[1], shape[2]))
        return Feature(shape, "BCHW", shape[1], (shape[2], shape[3]))
    if len(shape) == 3 and shape[0] == batch and image is not None:
        for prefix in range(9):
            grid = _grid_of(shape[1] - prefix, image)
            if grid is not None:
                return Feature(shape, "BNC", shape[2], grid, prefix)
    if len(shape) == 2:
        return Feature(shape, "BC", shape[1], (1, 1))
    return Feature(shape, "?", shape[-1] if shape else 1, (1, 1))


def _fits(grid: Sequence[int], image: tuple[int, int]) -> bool:
    """Whether a map of this size can come from the image by down- or up-sampling both sides alike."""
    (h, w), (image_h, image_w) = grid, image
    down = max(1, round(image_h / h)), max(1, round(image_w / w))
    up = max(1, round(h / image_h)), max(1, round(w / image_w))
    even = max(down) <= 2 * min(down) and max(up) <= 2 * min(up)
    # rounding at each halving may lose up to one row a stage
    return even and abs(h / w - image_h / image_w) <= 0.35 * image_h / image_w


def _grid_of(tokens: int, image: tuple[int, int]) -> tuple[int, int] | None:
    """The grid with this number of cells whose sides stand as the image's do, if there is one."""
    if tokens < 1:
        return None
    best: tuple[int, int] | None = None
    wanted = image[0] / image[1]
    for h in range(1, tokens + 1):
        if tokens % h == 0:
            w = tokens // h
            if best is None or abs(h / w - wanted) < abs(best[0] / best[1] - wanted):
                best = (h, w)
    if best is None or abs(best[0] / best[1] - wanted) > 0.1 * wanted:
        return None
    patch = max(1, round(image[0] / best[0]))  # else as many tokens by chance, as the anchors of a detector
    whole = all(side in (pixels // patch, -(-pixels // patch)) for side, pixels in zip(best, image, strict=True))
    return best if whole else None
