"""The phases of a run: start, freeze and finish as one table, and the schedules of blocks that come to rest."""

import itertools

import pytest

from glcan.strategies.method import Method, parse_method
from glcan.training import RunConfig
from glcan.training.phases import RunPhase, phases_of, schedule_share
from glcan.training.schedule import learning_rate


def table(text, steps, blocks):
    """The kinds of steps and how many there are: "start", "finish", or how many blocks are frozen."""
    phases = phases_of(parse_method(text), steps, blocks)
    assert (phases[0].begin, phases[-1].end) == (0, steps)
    assert all(one.end == other.begin for one, other in itertools.pairwise(phases))
    return [("start" if p.end_to_end else "finish" if p.finish else p.frozen, p.end - p.begin) for p in phases]


def test_most_methods_have_one_phase():
    for text in ("e2e", "selective", "checkpoint+accumulate:2"):
        assert phases_of(parse_method(text), 80, 1) == [RunPhase(0, 80, parse_method(text))]
    assert phases_of(parse_method("glcan:4+accumulate:2"), 80, 4) == [RunPhase(0, 80, Method("glcan", 4, accumulate=2))]


@pytest.mark.parametrize(
    ("text", "blocks", "expected"),
    [
        ("glcan:3+freeze:0.5", 3, [(0, 40), (1, 20), (2, 20)]),
        ("glcan:1+freeze:0.5", 1, [(0, 80)]),
        ("glcan:2+freeze:0.5+finish:0.2", 2, [(0, 40), (1, 24), ("finish", 16)]),
        ("glcan:3+freeze:0.8+finish:0.25", 3, [(0, 60), ("finish", 20)]),
        ("glcan:3+start:0.25", 3, [("start", 20), (0, 60)]),
        ("glcan:2+start:0.5+freeze:0.5+finish:0.25", 2, [("start", 40), (1, 20), ("finish", 20)]),
        ("glcan:2+start", 2, [("start", 24), (0, 56)]),
        ("glcan:2+finish", 2, [(0, 72), ("finish", 8)]),
        ("glcan:2+freeze", 2, [(0, 40), (1, 40)]),
    ],
)
def test_the_kinds_of_steps_and_how_many_there_are(text, blocks, expected):
    assert table(text, 80, blocks) == expected


def test_a_finish_has_a_step_and_leaves_one():
    assert table("glcan:2+finish:0.01", 3, 2) == [(0, 2), ("finish", 1)]
    assert table("glcan:2+finish:0.9", 2, 2) == [(0, 1), ("finish", 1)]


def test_a_finish_checkpoints_and_accumulates_as_the_rest_of_the_run():
    *_, last = phases_of(parse_method("glcan:2+finish+accumulate:4"), 80, 2)
    assert last.method == Method("checkpoint", accumulate=4)


def test_blocks_freeze_one_after_the_other():
    method = parse_method("glcan:3+freeze:0.5")
    assert [schedule_share(method, block, 3) for block in range(4)] == [0.5, 0.75, 1, 1]
    assert schedule_share(method, 0, 1) == 1  # end-to-end training
    assert [schedule_share(parse_method("glcan:3"), block, 3) for block in range(3)] == [1, 1, 1]


@pytest.mark.parametrize("freeze", [0.1, 0.3, 0.55, 0.7, 0.9])
def test_a_block_that_is_not_frozen_has_a_learning_rate(freeze):
    config = RunConfig(epochs=10, method=f"glcan:6+freeze:{freeze}")
    for phase in phases_of(config.parsed, 100, 6):
        for step, block in itertools.product(range(phase.begin, phase.end), range(phase.frozen, 6)):
            rate = learning_rate(config, step / schedule_share(config.parsed, block, 6), 10)
            assert 0 <= rate <= config.lr
