"""Plans: optimal against brute force, and clear about what cannot be."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glcan.cost.cuts import cheapest_cuts, choose_cuts, longest_end, make_plan, numbers_of_blocks
from glcan.errors import CutError, UnknownName
from glcan.inspect.features import Feature
from glcan.inspect.profile import Profile, Unit


def a_profile(saved: list[int], weights: list[bool] | None = None, entering: list[int] | None = None) -> Profile:
    """Units u0, u1, ... that save so many bytes; ``entering``: elements of the tensor that each receives."""
    count = len(saved)
    weights = weights or [True] * count
    entering = entering or [0] * count
    units = tuple(
        Unit(
            name=f"u{i}",
            kind="Unit",
            index=i,
            entering=(Feature((entering[i],), "?", 1, (1, 1)),) if i else (),
            output=None,
            stage=0,
            parameters=1,
            weights=int(weights[i]),
            saved_bytes=saved[i],
            flops=10,
            cuttable=i > 0 and weights[i],
            chained=True,
        )
        for i in range(count)
    )
    crossing = {unit.name: frozenset() for unit in units if unit.cuttable}
    return Profile(units, crossing, tuple(range(count)), {}, (8, 8), 2, False, ())


def costs(profile: Profile, cuts: tuple[str, ...]) -> list[int]:
    """Saved bytes of each block and, at four bytes an element, of what enters it."""
    plan = make_plan(profile, cuts=list(cuts))
    return [
        sum(unit.saved_bytes for unit in block) + (4 * block[0].entering[0].shape[0] if i else 0)
        for i, block in enumerate(plan.units)
    ]


@settings(deadline=None, max_examples=150)
@given(
    st.lists(st.tuples(st.integers(0, 30), st.booleans(), st.integers(0, 4)), min_size=2, max_size=9),
    st.data(),
)
def test_the_cuts_are_optimal(units: list[tuple[int, bool, int]], data: st.DataObject) -> None:
    profile = a_profile([u[0] for u in units], [u[1] for u in units], [u[2] for u in units])
    blocks = data.draw(st.integers(1, len(profile.cuttable) + 1))
    every = [costs(profile, cuts) for cuts in itertools.combinations(profile.cuttable, blocks - 1)]
    best = min((max(found), sum(c * c for c in found)) for found in every)
    found = costs(profile, choose_cuts(profile, blocks))
    assert len(found) == blocks
    assert (max(found), sum(c * c for c in found)) == best


def test_the_most_even_of_equally_large_ones() -> None:
    # the last block is the largest whatever comes before it
    assert choose_cuts(a_profile([1, 2, 3, 3, 1, 9]), 3) == ("u2", "u5") or costs(
        a_profile([1, 2, 3, 3, 1, 9]), choose_cuts(a_profile([1, 2, 3, 3, 1, 9]), 3)
    ) == [6, 4, 9]


@settings(deadline=None, max_examples=100)
@given(st.lists(st.integers(1, 30), min_size=4, max_size=9), st.floats(0, 1), st.data())
def test_the_last_block_is_as_long_as_the_memory_allows(saved: list[int], most: float, data: st.DataObject) -> None:
    profile = a_profile(saved)
    count = len(saved)
    blocks = data.draw(st.integers(2, count - 1))

    def cost(i: int, j: int) -> int:
        return sum(saved[i:j])

    def end(i: int, stop: int, bound: float) -> tuple[int, list[tuple[int, int]]]:
        return max(sum(saved[stop:]), *saved[i:stop], 0), [(k, k + 1) for k in range(i, stop)]

    short = [0, *(profile.unit(cut).index for cut in choose_cuts(profile, blocks, cost))]
    bound = 1.125 * max(cost(i, j) for i, j in itertools.pairwise([*short, count]))
    cuts, names = longest_end(profile, blocks, cost, end, most)
    begins = [0, *(profile.unit(cut).index for cut in cuts)]
    stop = begins[-1] + len(names)
    assert [profile.unit(name).index for name in names] == list(range(begins[-1], stop))
    assert len(begins) == blocks
    assert begins[-1] <= short[-1]
    assert all(cost(i, j) <= bound for i, j in itertools.pairwise(begins))
    assert end(begins[-1], stop, bound)[0] <= bound
    assert stop == begins[-1] or end(begins[-1], stop - 1, bound)[0] > bound  # no more than is needed
    assert len(names) <= most * count


def test_units_that_are_recomputed_together() -> None:
    profile = a_profile([4, 4, 4, 4])
    plan = make_plan(profile, cuts=["u1"], recompute=["u3", "block1", "u1+u2"])
    assert plan.recompute == ("block1", "u1+u2", "u3")
    assert plan.recomputed_units == [["u1", "u2"], ["u3"]]
    assert str(plan).splitlines()[1].endswith(", recomputed")
    assert str(plan).splitlines()[2].endswith(", 3 of 3 units recomputed")
    for wrong in ("u1+u3", "u2+u1", "u0+u1"):
        with pytest.raises(CutError, match="one by one"):
            make_plan(profile, cuts=["u1"], recompute=[wrong])
    for unknown in ("u9", "u1+u9", "block1+u1", "block3"):
        with pytest.raises(UnknownName):
            make_plan(profile, cuts=["u1"], recompute=[unknown])


def side_by_side(saved: list[int]) -> Profile:
    """Units of which the last two both stand on the one before them."""
    chain = a_profile(saved)
    last = len(saved) - 1
    sources = {f"u{i}": i - 1 for i in range(1, last)} | {f"u{last}": last - 2}
    return dataclasses.replace(chain, trained=frozenset(range(last + 1)), sources=sources)


def test_no_block_that_a_loss_at_its_end_could_not_train() -> None:
    profile = side_by_side([1, 1, 9, 9])
    assert numbers_of_blocks(profile) == [1, 2, 3]
    assert choose_cuts(a_profile([1, 1, 9, 9]), 3) == ("u2", "u3")
    assert choose_cuts(profile, 3) in {("u1", "u2"), ("u1", "u3")}
    assert cheapest_cuts(profile, 3, lambda i, j: 0, lambda i, j: int(j - i != 1), 0) == (1, ("u1", "u2"))
    with pytest.raises(CutError, match=r"blocks=4.*1 to 3 blocks.*side by side"):
        choose_cuts(profile, 4)


def test_a_block_without_anything_to_train_may_stand_anywhere() -> None:
    profile = side_by_side([1, 1, 9, 9])
    assert not profile.trains(2, 3)
    assert profile.trains(1, 3)
    assert dataclasses.replace(profile, trained=frozenset({0, 1, 3})).trains(2, 3)
    assert numbers_of_blocks(dataclasses.replace(profile, trained=frozenset({0, 1, 3}))) == [1, 2, 3, 4]


@pytest.mark.parametrize("blocks", [0, -1, 5])
def test_a_number_of_blocks_that_does_not_fit(blocks: int) -> None:
    with pytest.raises(CutError, match=f"blocks={blocks}.*1 to 4 blocks"):
        make_plan(a_profile([1, 1, 1, 1, 1], [True, True, True, False, True]), blocks=blocks)


def test_one_block_and_as_many_as_there_are() -> None:
    profile = a_profile([5, 1, 7, 2])
    assert make_plan(profile, blocks=1).cuts == ()
    assert make_plan(profile, blocks=1).units == (profile.units,)
    assert make_plan(profile, blocks=4).cuts == ("u1", "u2", "u3")


def test_cuts_are_checked() -> None:
    profile = a_profile([1, 1, 1, 1], [True, True, False, True])
    with pytest.raises(UnknownName, match="cut 'u9'"):
        make_plan(profile, cuts=["u9"])
    with pytest.raises(CutError, match="'u2': it has no weights.*u1, u3"):
        make_plan(profile, cuts=["u2"])
    with pytest.raises(CutError, match="'u0'"):
        make_plan(profile, cuts=["u0"])
    with pytest.raises(CutError, match=r"not in the order.*use \['u1', 'u3'\]"):
        make_plan(profile, cuts=["u3", "u1"])
    with pytest.raises(CutError, match=r"repeat; use \['u1'\]"):
        make_plan(profile, cuts=["u1", "u1"])


@pytest.mark.parametrize("options", [{}, {"blocks": 2, "cuts": ["u1"]}])
def test_either_blocks_or_cuts(options: dict) -> None:
    with pytest.raises(CutError, match=r"either blocks=K or cuts"):
        make_plan(a_profile([1, 1]), **options)


def test_a_plan_as_text() -> None:
    plan = make_plan(a_profile([3 << 20, 1 << 20]), cuts=["u1"])
    lines = str(plan).splitlines()
    assert lines[0] == "2 blocks"
    assert "block1: u0 ... u0  3.0 MiB saved (75%)" in lines[1]
    assert str(make_plan(a_profile([0]), blocks=1)).startswith("1 block\n")


def test_what_really_enters_a_cut() -> None:
    plan = make_plan(a_profile([1, 1, 1]), cuts=["u1", "u2"])
    feature = Feature((7,), "?", 7, (1, 1))
    changed = plan.entered_by({"u1": (), "u2": (feature,)})
    assert [block[0].entering for block in changed.units] == [(), (), (feature,)]
    assert changed.cuts == plan.cuts
    assert [[u.name for u in block] for block in changed.units] == [["u0"], ["u1"], ["u2"]]
