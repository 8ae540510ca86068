"""The largest batch of each method that fits a budget."""

from __future__ import annotations

from typing import Any

from tests.planning.models import MODELS, OPTIMIZER

import glcan
from glcan.planning import largest_batches
from glcan.tasks import Classification


def sample(count: int) -> Any:
    return Classification().example(count, 3, (32, 32))


def test_the_largest_batch_fits_and_one_more_does_not() -> None:
    network, limit = MODELS["resnet"](), 60 * 2**20
    methods = ("e2e", "checkpoint", "checkpoint-sqrt", "selective", "glcan:4")
    rows = largest_batches(network, Classification(), sample, limit, methods=methods, optimizer=OPTIMIZER)
    found = {row.method: row for row in rows}
    assert list(found) == [*methods, "glcan:4 recomputed"]
    assert found["glcan:4"].batch > 1.5 * found["e2e"].batch
    for name in ("e2e", "checkpoint", "selective"):
        row = found[name]
        for count, fits in ((row.batch, True), (row.batch + 1, False)):
            planned = glcan.plan(network, sample=sample(count), method=name, optimizer=OPTIMIZER, baselines=())
            assert (planned.cost.peak_bytes <= limit) is fits
        assert row.peak_bytes <= limit


def test_no_image_fits_a_byte() -> None:
    methods = ("e2e", "checkpoint", "checkpoint-sqrt")
    found = largest_batches(MODELS["resnet"](), Classification(), sample, 1, methods=methods, optimizer=OPTIMIZER)
    assert [row.batch for row in found] == [0, 0, 0]
