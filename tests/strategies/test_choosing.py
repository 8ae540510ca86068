"""Which images of a batch are chosen: in proportion to their gradients, many of them, and every one in time."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

from glcan import Learner
from glcan.strategies.choosing import choose, fraction, sizes_of


def start(count: int) -> Tensor:
    return fraction(torch.tensor(count))


def test_the_sum_over_those_chosen_is_right_in_the_mean() -> None:
    vectors = torch.randn(64, 5) * torch.rand(64, 1) ** 4
    found, uniform = [], []
    for i in range(1500):
        order = vectors[torch.randperm(64)]
        places, weights = choose(sizes_of([order]), 16, start(i))
        found.append((order[places] * weights[:, None]).sum(0))
        uniform.append(order[:16].sum(0) * 4)
    mean = torch.stack(found).mean(0)
    torch.testing.assert_close(mean, vectors.sum(0).double(), atol=0.25, rtol=0)
    assert torch.stack(found).std(0).mean() < 0.5 * torch.stack(uniform).std(0).mean()


def test_so_many_are_chosen_and_the_largest_for_certain() -> None:
    sizes = torch.tensor([0.01, 100.0, 0.01, 0.02, 50.0, 0.01, 0.02, 0.01])
    for count in range(1, 9):
        places, weights = choose(sizes, count, start(count))
        assert len(places) == len(set(places.tolist())) == count
        assert places.tolist() == sorted(places.tolist())
        assert (weights >= 1).all()
    places, weights = choose(sizes, 4, start(0))
    assert {1, 4} <= set(places.tolist())
    assert weights[places.tolist().index(1)] == weights[places.tolist().index(4)] == 1
    places, weights = choose(sizes, 8, start(0))
    torch.testing.assert_close(weights, torch.ones(8, dtype=torch.float64))


@pytest.mark.parametrize("sizes", [[0.0] * 6, [torch.nan] * 6, [torch.inf, 1, 1, 1, 1, 1], [1e-30] * 6, [1e30] * 6])
def test_sizes_that_say_nothing_choose_all_the_same(sizes: list[float]) -> None:
    places, weights = choose(torch.tensor(sizes), 3, start(1))
    assert len(set(places.tolist())) == 3
    assert weights.isfinite().all()


def test_the_size_is_over_all_that_is_predicted() -> None:
    first, second = torch.randn(4, 3, 2, 2), torch.randn(4, 7)
    expected = torch.cat([first.flatten(1), second], 1).norm(dim=1)
    torch.testing.assert_close(sizes_of([first, second]), expected)
    torch.testing.assert_close(sizes_of([first.bfloat16(), second]), expected, rtol=0.01, atol=0.01)


def test_running_sums_of_ten_thousand_images_have_digits_enough() -> None:
    """Against exact sums; float32's are off by whole images from some 4,096 on."""
    generator = torch.Generator().manual_seed(4)
    sizes = torch.rand(10_000, generator=generator)
    wide = sizes.numpy().astype(np.longdouble)
    wide = wide + np.longdouble(0.1) * wide.mean()
    for i in (1, 2, 3):
        places, weights = choose(sizes, 2500, start(i))
        assert weights.dtype == torch.float64
        sums = np.cumsum(wide * (2500 / wide.sum()))
        steps = np.arange(2500, dtype=np.longdouble) + np.longdouble(float(start(i)))
        assert places.tolist() == np.searchsorted(sums, steps, side="right").tolist()
        torch.testing.assert_close(weights, torch.from_numpy((wide.sum() / 2500 / wide[places]).astype(np.float64)))


# -- the counter ---------------------------------------------------------------------------------------------------


def test_a_count_is_hashed_to_a_number_as_good_as_one_drawn() -> None:
    numbers = fraction(torch.arange(20_000))
    assert numbers.dtype == torch.float64
    assert float(numbers.min()) >= 0
    assert float(numbers.max()) < 1
    assert len(numbers.unique()) == 20_000
    counts = torch.histc(numbers.float(), 20, 0, 1)
    assert ((counts - 1000).abs() < 150).all()
    steps = numbers[1:] - numbers[:-1]  # one says nothing of the next
    assert abs(float(torch.corrcoef(torch.stack([numbers[1:], numbers[:-1]]))[0, 1])) < 0.03
    assert float(steps.abs().mean()) == pytest.approx(1 / 3, rel=0.03)
    assert torch.equal(fraction(torch.arange(5)), numbers[:5]), "nothing is drawn"
    assert 0 <= float(fraction(torch.tensor(2**50))) < 1


@pytest.mark.parametrize("count", [16, 32])
def test_every_image_of_an_unshuffled_batch_is_chosen_in_time(count: int) -> None:
    """A start from the digits of the norms trained 33 of 64 images for ever."""
    sizes = torch.rand(64, generator=torch.Generator().manual_seed(2)) + 0.05
    times = torch.zeros(64)
    for i in range(200):
        places, _ = choose(sizes, count, start(i))
        times[places] += 1
    assert (times > 0).all()
    expected = 200 * count * (sizes + 0.1 * sizes.mean()) / (sizes + 0.1 * sizes.mean()).sum()
    assert ((times - expected.clamp(max=200)).abs() < 0.35 * expected + 8).all()


def linear(images: int, **options: Any) -> tuple[Learner, tuple[Tensor, Tensor], list[list[int]]]:
    """A learner of a small model, its batch, and the places that it will have chosen."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    batch = torch.randn(images, 4), torch.arange(images) % 3
    learner = Learner(model, sample=batch, method="selective", options=options, optimizer=partial(SGD, lr=0.0))
    chosen: list[list[int]] = []
    take = learner.task.chosen

    def watch(batch: tuple[Any, ...], places: Tensor) -> tuple[Any, ...]:
        chosen.append(places.tolist())
        return take(batch, places)

    learner.task.chosen = watch  # type: ignore[method-assign]
    return learner, batch, chosen


@pytest.mark.parametrize("by", ["gradient", "random"])
def test_a_learner_chooses_every_image_of_a_batch_that_comes_again(by: str) -> None:
    learner, batch, chosen = linear(64, by=by)
    for _ in range(200):
        learner.step(*batch)
    assert all(len(places) == len(set(places)) == 32 for places in chosen)
    assert {place for places in chosen for place in places} == set(range(64))
    assert len({tuple(places) for places in chosen}) > 30


@pytest.mark.parametrize("by", ["gradient", "random"])
def test_choices_go_on_after_resumption(by: str) -> None:
    learner, batch, chosen = linear(16, by=by)
    for _ in range(5):
        learner.step(*batch)
    state = learner.state_dict()
    assert int(state["pass"]["count"]) == 5
    torch.manual_seed(99)
    for _ in range(5):
        learner.step(*batch)
    fresh, batch, again = linear(16, by=by)
    fresh.load_state_dict(state)
    for _ in range(5):
        fresh.step(*batch)
    assert again == chosen[5:]
    assert int(state["pass"]["count"]) == 5, "a copy"


@pytest.mark.parametrize(
    ("images", "share", "taken"), [(1, 0.5, 1), (2, 0.5, 1), (3, 0.5, 1), (8, 0.5, 4), (8, 0.3, 2)]
)
def test_so_many_images_are_taken(images: int, share: float, taken: int) -> None:
    learner, batch, chosen = linear(images, share=share)
    learner.step(*batch)
    assert [len(places) for places in chosen] == ([taken] if taken < images else [])
