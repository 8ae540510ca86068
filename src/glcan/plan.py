"""Where to cut: the plan of a learner."""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence

from glcan.errors import CutError, UnknownName
from glcan.profile import Feature, Profile, Unit

__all__ = ["Plan", "choose_cuts", "make_plan"]


@dataclasses.dataclass(frozen=True)
class Plan:
    """The cuts of a model and what lies between them.

    Attributes:
        cuts: names of the units that begin block 2, 3, ...
        units: the profile's units, block by block. The first one of a block tells, as ``entering``, what it receives
            from the block before.
    """

    cuts: tuple[str, ...]
    units: tuple[tuple[Unit, ...], ...]

    @property
    def blocks(self) -> int:
        """K, the number of blocks."""
        return len(self.units)

    def entered_by(self, entering: Mapping[str, tuple[Feature, ...]]) -> Plan:
        """The same plan, but with what really enters each cut: of the tensors that do, only the ending block's own."""
        first, *rest = self.units
        return Plan(
            self.cuts,
            (first, *((dataclasses.replace(u[0], entering=entering[u[0].name]), *u[1:]) for u in rest)),
        )

    def __str__(self) -> str:
        lines = [f"{self.blocks} block{'s' * (self.blocks > 1)}"]
        total = sum(unit.saved_bytes for block in self.units for unit in block) or 1
        for i, block in enumerate(self.units, 1):
            saved = sum(unit.saved_bytes for unit in block)
            lines.append(
                f"  block{i}: {block[0].name} ... {block[-1].name}  "
                f"{saved / 2**20:.1f} MiB saved ({saved / total:.0%}), "
                f"{sum(unit.flops for unit in block) / 1e9:.3g} GFLOPs forward"
            )
        return "\n".join(lines)


def make_plan(profile: Profile, *, blocks: int | None = None, cuts: Sequence[str] | None = None) -> Plan:
    """The plan for so many blocks, or for these cuts.

    Raises:
        CutError: both or neither are given; more blocks than the model has places to cut; cuts out of order or at a
            unit that cannot begin a block.
        UnknownName: a cut is no unit.
    """
    if (blocks is None) == (cuts is None):
        raise CutError("Give either blocks=K or cuts=[...], not both and not neither.")
    if cuts is None:
        assert blocks is not None
        cuts = choose_cuts(profile, blocks)
    else:
        _check_cuts(profile, cuts)
    starts = [0, *(profile.unit(cut).index for cut in cuts)]
    ends = [*starts[1:], len(profile.units)]
    return Plan(tuple(cuts), tuple(profile.units[a:b] for a, b in zip(starts, ends, strict=True)))


def _check_cuts(profile: Profile, cuts: Sequence[str]) -> None:
    for cut in cuts:
        if cut not in profile.names:
            raise UnknownName("cut", cut, profile.names, "A cut is the name of the unit that begins a block.")
        if not profile.unit(cut).cuttable:
            raise CutError(
                f"No block can begin at {cut!r}: it has no weights, or no gradient enters it. "
                f"Cut at one of: {', '.join(profile.cuttable)}."
            )
    order = [profile.unit(cut).index for cut in cuts]
    if order != sorted(set(order)):
        right = sorted(set(cuts), key=lambda cut: profile.unit(cut).index)
        raise CutError(f"The cuts {list(cuts)} are not in the order in which the model runs, or repeat; use {right}.")


def choose_cuts(profile: Profile, blocks: int) -> tuple[str, ...]:
    """The cuts that minimise the largest block's saved activations; among those, the most even ones.

    Dynamic programming over the units, first for the largest block, then for the least sum of squares under that bound.
    """
    places = [0, *(profile.unit(name).index for name in profile.cuttable)]
    if blocks < 1 or blocks > len(places):
        raise CutError(
            f"blocks={blocks}, but this model can be cut into 1 to {len(places)} blocks "
            f"(it has {len(places)} units with weights). Choose a number in that range."
        )
    ends = [*places, len(profile.units)]
    total = [0]
    for unit in profile.units:
        total.append(total[-1] + unit.saved_bytes)

    def cost(i: int, j: int) -> int:
        """Bytes of a block from place i to place j, with the boundary that it takes over."""
        entering = profile.units[places[i]].entering if i else ()
        shared = sum(4 * _numel(feature.shape) for feature in entering)
        return total[ends[j]] - total[places[i]] + shared

    n = len(places)

    def best(join: Callable[[int, int], int], bound: float = math.inf) -> tuple[int, list[int]]:
        """The least cost of all blocks joined, none of them over the bound, and where they begin."""
        rows: list[dict[int, tuple[int, int]]] = [
            {0: (0, 0)}
        ]  # blocks so far -> end -> (joined cost, begin of the last)
        for _ in range(blocks):
            options: dict[int, list[tuple[int, int]]] = defaultdict(list)
            for i, (joined, _) in rows[-1].items():
                for j in range(i + 1, n + 1):
                    if cost(i, j) <= bound:
                        options[j].append((join(joined, cost(i, j)), i))
            rows.append({j: min(found) for j, found in options.items()})
        begins, j = [], n
        for row in reversed(rows[1:]):
            j = row[j][1]
            begins.append(j)
        return rows[-1][n][0], begins[::-1]

    largest, _ = best(max)
    _, begins = best(lambda joined, block: joined + block**2, largest)
    return tuple(profile.units[places[i]].name for i in begins[1:])


def _numel(shape: tuple[int, ...]) -> int:
    product = 1
    for size in shape:
        product *= size
    return product
