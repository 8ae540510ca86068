"""Where to cut: the plan of a learner."""

from __future__ import annotations

import bisect
import dataclasses
import functools
import itertools
import math
import operator
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence

from glcan.errors import CutError, UnknownName
from glcan.inspect.features import Feature
from glcan.inspect.profile import Profile, Unit

__all__ = [
    "BlockCost",
    "EndCost",
    "Plan",
    "block_ends",
    "chains",
    "cheapest_cuts",
    "choose_cuts",
    "cut_places",
    "longest_end",
    "make_plan",
    "numbers_of_blocks",
]

BlockCost = Callable[[int, int], int]
"""What a block costs, by the places (see `cut_places`) where it begins and ends."""

EndCost = Callable[[int, int, float], tuple[int, list[tuple[int, int]]]]
"""What the last block costs, and its segments that are recomputed, see `glcan.cost.estimate.Estimate.end`."""


# How much larger than the largest of even blocks those with a long last one may be.
SLACK = 1.125
_TOGETHER = "+"


@dataclasses.dataclass(frozen=True)
class Plan:
    """The cuts of a model and what lies between them.

    Attributes:
        cuts: names of the units that begin block 2, 3, ...
        units: the profile's units, block by block. The first one of a block tells, as ``entering``, what it receives
            from the block before.
        recompute: names of the blocks whose activations are recomputed, unit by unit (activation checkpointing), and of
            single units, or "unit1+unit2+unit3" for units that follow each other and are recomputed together.
    """

    cuts: tuple[str, ...]
    units: tuple[tuple[Unit, ...], ...]
    recompute: tuple[str, ...] = ()

    @property
    def blocks(self) -> int:
        """K, the number of blocks."""
        return len(self.units)

    def entered_by(self, entering: Mapping[str, tuple[Feature, ...]]) -> Plan:
        """The same plan, but with what really enters each cut: of the tensors that do, only the ending block's own."""
        first, *rest = self.units
        units = (first, *((dataclasses.replace(u[0], entering=entering[u[0].name]), *u[1:]) for u in rest))
        return dataclasses.replace(self, units=units)

    def scaled(self, batch: int, other: int) -> Plan:
        """The same plan, with the figures of a batch of another size."""
        units = tuple(tuple(unit.scaled(batch, other) for unit in block) for block in self.units)
        return dataclasses.replace(self, units=units)

    @property
    def names(self) -> tuple[str, ...]:
        """The blocks' names: "block1" ... "blockK"."""
        return tuple(f"block{i}" for i in range(1, self.blocks + 1))

    def __str__(self) -> str:
        lines = [f"{self.blocks} block{'s' * (self.blocks > 1)}"]
        total = sum(unit.saved_bytes for block in self.units for unit in block) or 1
        for i, block in enumerate(self.units, 1):
            saved = sum(unit.saved_bytes for unit in block)
            lines.append(
                f"  block{i}: {block[0].name} ... {block[-1].name}  "
                f"{saved / 2**20:.1f} MiB saved ({saved / total:.0%}), "
                f"{sum(unit.flops for unit in block) / 1e9:.3g} GFLOPs forward" + self._recomputed(i)
            )
        return "\n".join(lines)

    def _recomputed(self, block: int) -> str:
        if f"block{block}" in self.recompute:
            return ", recomputed"
        names = {name for together in self.recomputed_units for name in together}
        count = sum(unit.name in names for unit in self.units[block - 1])
        return f", {count} of {len(self.units[block - 1])} units recomputed" if count else ""

    @property
    def recomputed_units(self) -> list[list[str]]:
        """The units in `recompute`, those together that are recomputed together."""
        return [entry.split(_TOGETHER) for entry in self.recompute if entry not in self.names]


def make_plan(
    profile: Profile,
    *,
    blocks: int | None = None,
    cuts: Sequence[str] | None = None,
    cost: BlockCost | None = None,
    recompute: bool | Sequence[str] = False,
) -> Plan:
    """The plan for so many blocks, or for these cuts.

    Args:
        profile: of the model.
        blocks, cost: as `choose_cuts` takes them.
        cuts: names of the units that begin block 2, 3, ...
        recompute: whether, or of which blocks or units, activations are recomputed, see `Plan`.

    Raises:
        CutError: both or neither are given; more blocks than the model has places to cut; cuts out of order or at a
            unit that cannot begin a block.
        UnknownName: a cut is no unit, or a block to recompute is none.
    """
    if (blocks is None) == (cuts is None):
        raise CutError("Give either blocks=K or cuts=[...], not both and not neither.")
    if cuts is None:
        assert blocks is not None
        cuts = choose_cuts(profile, blocks, cost)
    else:
        _check_cuts(profile, cuts)
    starts = [0, *(profile.unit(cut).index for cut in cuts)]
    ends = [*starts[1:], len(profile.units)]
    plan = Plan(tuple(cuts), tuple(profile.units[a:b] for a, b in zip(starts, ends, strict=True)))
    wanted = list(plan.names) if recompute is True else recompute or []
    for entry in wanted:
        _check_recomputed(plan, profile, entry)
    order = {name: i for i, name in enumerate((*plan.names, *profile.names))}
    ordered = sorted(set(wanted), key=lambda entry: order[entry.split(_TOGETHER)[0]])
    return dataclasses.replace(plan, recompute=tuple(ordered))


def _check_recomputed(plan: Plan, profile: Profile, entry: str) -> None:
    names = entry.split(_TOGETHER)
    possible = [*plan.names, *profile.names] if len(names) == 1 else profile.names
    for name in names:
        if name not in possible:
            raise UnknownName("block or unit to recompute", name, possible)
    units = [profile.unit(name) for name in names] if len(names) > 1 else []
    starts = {block[0].name for block in plan.units}
    for one, other in itertools.pairwise(units):
        if other.index != one.index + 1 or not other.chained or other.name in starts:
            raise CutError(
                f"{other.name!r} cannot be recomputed together with {one.name!r}: in one block, it must be the next "
                "unit, and nothing else may read what lies between them. Name the units one by one."
            )


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


def choose_cuts(profile: Profile, blocks: int, cost: BlockCost | None = None) -> tuple[str, ...]:
    """The cuts that minimise the largest block's cost; among those, the most even ones.

    Dynamic programming over the units, first for the largest block, then for the least sum of squares under that bound.

    Args:
        profile: of the model.
        blocks: K.
        cost: ``cost(i, j)``, in bytes, of the block from place i to place j, see `cut_places`; by default what the
            block saves and what enters it.
    """
    places = cut_places(profile)
    possible = numbers_of_blocks(profile)
    if blocks not in possible:
        aside = "" if len(possible) == len(places) - 1 else ", some of which stand side by side"
        raise CutError(
            f"blocks={blocks}, but this model can be cut into 1 to {max(possible)} blocks "
            f"(it has {len(places) - 1} units at which a block may begin{aside}). Choose a number in that range."
        )
    cost, allowed = functools.cache(cost or _saved_bytes(profile)), _trainable(profile)
    largest, _ = _cheapest(len(places) - 1, blocks, cost, max, allowed)
    _, begins = _cheapest(len(places) - 1, blocks, cost, lambda joined, block: joined + block**2, allowed, largest)
    return tuple(profile.units[places[i]].name for i in begins[1:])


def cheapest_cuts(
    profile: Profile, blocks: int, cost: BlockCost, price: BlockCost, bound: float
) -> tuple[int, tuple[str, ...]] | None:
    """The cuts with the least sum of prices among those of which no block's cost is over the bound, and that sum.

    None where no cuts keep the bound.
    """
    places = cut_places(profile)
    if blocks > len(places) - 1:
        return None
    cost, price = functools.cache(cost), functools.cache(price)
    try:
        total, begins = _cheapest(len(places) - 1, blocks, cost, operator.add, _trainable(profile), bound, price)
    except KeyError:
        return None
    return total, tuple(profile.units[places[i]].name for i in begins[1:])


def longest_end(
    profile: Profile,
    blocks: int,
    cost: BlockCost,
    end: EndCost,
    most: float,
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Cuts that make the last block as long as the memory allows, and what to recompute of it for that.

    The memory is that of the largest block where `choose_cuts` cuts. The last block learns as in end-to-end training:
    the longer it is, the better. Its first units may be recomputed, see `glcan.cost.estimate.Estimate.end`.

    Args:
        profile, blocks, cost: as `choose_cuts` takes them.
        end: what the last block costs.
        most: forward FLOPs of what may be recomputed, as a share of the model's.
    """
    places = cut_places(profile)
    count, allowed = len(places) - 1, _trainable(profile)
    cuts = choose_cuts(profile, blocks, cost)
    even = block_ends(profile, cuts)
    bound = SLACK * max(cost(i, j) for i, j in itertools.pairwise(even))
    runs = [profile.units[a:b] for a, b in itertools.pairwise(places)]
    flops = [sum(unit.flops for unit in run) for run in runs]
    parted = [any(unit.name in profile.parted for unit in run) for run in runs]
    for last in range(blocks - 1, even[-2]):
        try:
            _, found = _cheapest(last, blocks - 1, cost, lambda joined, block: joined + block**2, allowed, bound)
        except KeyError:
            continue
        begins = [*found, last]
        stop = last
        while stop < count and not parted[stop] and sum(flops[last : stop + 1]) <= most * profile.flops:
            stop += 1
        if not allowed(last, count) or end(last, stop, bound)[0] > bound:
            continue
        while stop > last and end(last, stop - 1, bound)[0] <= bound:
            stop -= 1
        names = tuple(profile.units[places[i]].name for i in begins[1:])
        return names, tuple(_TOGETHER.join(chain) for a, b in end(last, stop, bound)[1] for chain in chains(runs[a:b]))
    return cuts, ()


def chains(runs: Sequence[Sequence[Unit]]) -> Iterator[list[str]]:
    """Of units that follow each other, names of those that can be recomputed together: a segment, or parts of it."""
    names: list[str] = []
    for unit in itertools.chain.from_iterable(runs):
        if names and not unit.chained:
            yield names
            names = []
        if names or unit.weights:
            names.append(unit.name)
    if names:
        yield names


def cut_places(profile: Profile) -> list[int]:
    """Where blocks may begin and end: index 0, the index of each unit worth cutting at, and the number of units.

    A head that comes after the last map (a classifier, a detector's heads) is not worth a block of its own: it frees
    little, and alone it learns badly, on features that nothing of it shapes. Nor is an upsampler at the end, or a part
    of it. Naming them in ``cuts`` is still possible.
    """
    before = profile.units[: len(profile.units) - len(profile.upsampler)]
    maps = [u.index for u in before if u.output is not None and u.output.grid != (1, 1)]
    last = max(maps, default=len(profile.units))
    inner = [index for name in profile.cuttable if (index := profile.unit(name).index) <= last]
    return [0, *inner, len(profile.units)]


def block_ends(profile: Profile, cuts: Sequence[str]) -> list[int]:
    """The places (see `cut_places`) at which blocks begin and end; of a cut elsewhere, the last one before it."""
    places = cut_places(profile)
    return [0, *(bisect.bisect(places, profile.unit(cut).index) - 1 for cut in cuts), len(places) - 1]


def numbers_of_blocks(profile: Profile) -> list[int]:
    """The numbers of blocks into which a model can be cut so that every block can be trained, see `Profile.trains`."""
    count, allowed = len(cut_places(profile)) - 1, _trainable(profile)
    reached = [1] + [0] * count  # place -> bit k is set where k blocks can end there
    for j in range(1, count + 1):
        for i in range(j):
            if allowed(i, j):
                reached[j] |= reached[i] << 1
    return [k for k in range(1, count + 1) if reached[count] >> k & 1]


def _trainable(profile: Profile) -> Callable[[int, int], bool]:
    places = cut_places(profile)
    return functools.cache(lambda i, j: profile.trains(places[i], places[j]))


def _saved_bytes(profile: Profile) -> BlockCost:
    places = cut_places(profile)

    def cost(i: int, j: int) -> int:
        entering = profile.units[places[i]].entering if i else ()
        return profile.saved_bytes(places[i], places[j]) + sum(feature.bytes for feature in entering)

    return cost


def _cheapest(
    places: int,
    blocks: int,
    cost: BlockCost,
    join: Callable[[int, int], int],
    allowed: Callable[[int, int], bool],
    bound: float = math.inf,
    price: BlockCost | None = None,
) -> tuple[int, list[int]]:
    """The least price (by default: cost) of all blocks joined, allowed ones within the bound, and where they begin.

    Raises:
        KeyError: no cuts keep the bound.
    """
    price = price or cost
    # blocks so far -> end -> (joined price, begin of the last)
    rows: list[dict[int, tuple[int, int]]] = [{0: (0, 0)}]
    for _ in range(blocks):
        options: dict[int, list[tuple[int, int]]] = defaultdict(list)
        for i, (joined, _) in rows[-1].items():
            for j in range(i + 1, places + 1):
                if allowed(i, j) and cost(i, j) <= bound:
                    options[j].append((join(joined, price(i, j)), i))
        rows.append({j: min(found) for j, found in options.items()})
    begins, j = [], places
    for row in reversed(rows[1:]):
        j = row[j][1]
        begins.append(j)
    return rows[-1][places][0], begins[::-1]
