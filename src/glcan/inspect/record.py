"""Taking the profile of a model, by running it (on fake tensors where that is possible); no table of architectures.

Two passes: the first watches every sub-module and every tensor and decides what the units are (`glcan.inspect.units`);
the second runs the model under `Isolation` with those units and takes the figures.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from glcan.errors import ConfigError, CutError, GlcanError
from glcan.inspect.dryrun import dry_run, undrawn
from glcan.inspect.features import read_feature
from glcan.inspect.isolation import Isolation, tag_of
from glcan.inspect.meter import LiveMemory
from glcan.inspect.profile import Profile, Unit
from glcan.inspect.refusals import refuse_wrapped
from glcan.inspect.tensors import differentiable, tensors_in
from glcan.inspect.units import find_units, weights_of

__all__ = ["profile"]


def profile(
    model: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None = None,
    *,
    units: Sequence[str] | None = None,
    assume: bool = False,
    few: tuple[Sequence[Any], Mapping[str, Any]] | None = None,
) -> Profile:
    """Finds the units of a model, and what they cost, by running it once.

    Args:
        model: any module. Looked at in train mode, and not changed.
        args, kwargs: a batch, as the model's ``forward`` takes it.
        units: names of sub-modules to take as units instead of looking for them.
        assume: see `glcan.inspect.dryrun.dry_run`.
        few: arguments of a few images, for a model that cannot be run without computing: the profile is of these.

    Raises:
        ConfigError: the model cannot be run on this batch, has nothing that could be a unit, or is compiled.
        UnknownName, CutError: the named units do not fit the model.
    """
    refuse_wrapped(model)
    batch = (tuple(args), dict(kwargs or {}))
    try:
        return dry_run(model, batch, lambda m, b: _profile(m, b[0], b[1], units), assume=assume, few=few)
    except GlcanError:
        raise
    except Exception as error:
        shapes = [tuple(t.shape) for t in tree_leaves(batch) if isinstance(t, Tensor)]
        raise ConfigError(
            f"{type(model).__name__} cannot be run on a batch of shapes {shapes}: {type(error).__name__}: {error}. "
            "Give a sample that the model accepts (batch of at least 2, its image size and channels)."
        ) from error


def _profile(model: nn.Module, args: Any, kwargs: Any, units: Sequence[str] | None) -> Profile:
    versions = [(t, t._version) for t in tensors_in((args, kwargs))]
    if units is None:
        with undrawn(model):  # so that the second pass skips the layers that this one does
            units = find_units(model, args, kwargs)
        writes = any(t._version != before for t, before in versions)
    else:
        writes = False
    meter = LiveMemory(model, inputs=(args, kwargs))
    recorder = _Recorder(model, units, meter)
    with torch.enable_grad(), meter, recorder:
        output = model(*args, **kwargs)
        recorder.finish(output)
    writes = writes or any(t._version != before for t, before in versions)
    return recorder.profile(args, kwargs, output, writes)


@dataclasses.dataclass
class _Note:
    """What is noted of the first call of a unit (shapes only: a tensor kept here would change the figures)."""

    clock: int
    entering: list[tuple[int, ...]]
    numbers: frozenset[int]
    chained: bool
    source: int | None
    output: tuple[int, ...] | None = None


class _Recorder(Isolation):
    """The model under isolation without cuts, taking notes."""

    def __init__(self, model: nn.Module, units: Sequence[str], meter: LiveMemory) -> None:
        super().__init__(model, units)
        self.meter = meter
        self.parameter_names = {id(p): name for name, p in model.named_parameters()}
        self.notes: dict[str, _Note] = {}  # in the order of first calls
        self.calls: list[str] = []
        self.clock = -1  # index of the latest call of a unit
        self.made: dict[int, int] = {}  # tensor number -> clock
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
        tensors = differentiable(value)
        for tensor in tensors:
            if (tag := tag_of(tensor, self._run)) is not None:
                self.last_use[tag.number] = self.clock
                self.users[tag.number] += 1
        return tensors

    def _source(self, tensors: Sequence[Tensor]) -> int | None:
        tags = [tag for tensor in tensors if (tag := tag_of(tensor, self._run)) is not None]
        known = [self.sources.get(tag.number) for tag in tags]
        return max((source for source in known if source is not None), default=None)

    def _train(self) -> None:
        """Trainable parameters are used now."""
        self.trained.add(self.clock)
        self.source = self.clock

    def _tag(self, tensor: Tensor, number: int) -> None:
        super()._tag(tensor, number)
        self.made[number] = self.clock
        if self.source is not None:
            self.sources[number] = self.source

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self._inside and getattr(func, "__name__", "") == "__get__":
            self.latest = None  # its shape or type is read: what lies between two units is needed
        elif not self._inside:
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
            numbers = frozenset(tag.number for t in entering if (tag := tag_of(t, self._run)) is not None)
            shapes = [tuple(t.shape) for t in entering]
            self.notes[name] = _Note(self.clock, shapes, numbers, chained, self.source)
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
            cuttable = bool(note.entering) and note.clock > 0 and weights_of(module) > 0
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
                    weights=weights_of(module),
                    saved_bytes=max(0, saved[name]),
                    flops=flops[name],
                    cuttable=cuttable,
                    chained=note.chained
                    and self.calls.count(name) == self.calls.count(self.calls[note.clock - 1]) == 1
                    and all(self.users[number] == 1 for number in note.numbers),
                )
            )
        index = {name: i for i, name in enumerate(self.notes)}
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
        )
