"""The profile of a model: its units in the order in which they run, with shapes, bytes, FLOPs and parameters."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Mapping

from glcan.inspect.features import Feature, scaled_shape

__all__ = ["Profile", "Unit"]


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

    def scaled(self, batch: int, other: int) -> Unit:
        """The same for a batch of another size: shapes, bytes and FLOPs in proportion."""
        return dataclasses.replace(
            self,
            entering=tuple(feature.scaled(batch, other) for feature in self.entering),
            output=None if self.output is None else self.output.scaled(batch, other),
            saved_bytes=round(self.saved_bytes * other / batch),
            flops=round(self.flops * other / batch),
        )


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
        parted: names of the units at the end that blocks run for some images at a time (`glcan.strategies.recompute`).
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

    @property
    def names(self) -> list[str]:
        return [unit.name for unit in self.units]

    @property
    def cuttable(self) -> list[str]:
        """The names at which a block may begin."""
        return [unit.name for unit in self.units if unit.cuttable and unit.name not in self.parted[1:]]

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

    def scaled(self, batch: int) -> Profile:
        """The same for a batch of so many images: shapes, bytes and FLOPs in proportion."""
        units = tuple(unit.scaled(self.batch, batch) for unit in self.units)
        output = tuple(scaled_shape(shape, self.batch, batch) for shape in self.output)
        return dataclasses.replace(self, units=units, output=output, batch=batch)

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
