"""Autocast, the learner's own and the user's, float16's scaler, and double precision."""

from __future__ import annotations

import pytest
import torch
from tests.learner.models import MODELS, MOMENTUM, TINY, batches, built
from tests.zoo import Small, assert_equal
from torch.optim import SGD

from glcan import Learner


@pytest.mark.parametrize("name", ["small", "tied", "vit"])
def test_autocast_of_the_learner_is_that_of_the_user(name: str) -> None:
    build, sample = MODELS[name]
    size = sample[0].shape[-1]
    states = []
    for own in (True, False, None):
        model = built(build)
        learner = Learner(
            model, sample=sample, method="glcan:3", optimizer=MOMENTUM, autocast=torch.bfloat16 if own else None
        )
        losses = []
        if own is None:  # around the whole loop: the casts of weights must not outlive their update
            with torch.autocast("cpu", torch.bfloat16):
                for seed, batch in enumerate(batches(3, size)):
                    torch.manual_seed(seed)
                    losses.append(learner.step(*batch))
        else:
            for seed, batch in enumerate(batches(3, size)):
                torch.manual_seed(seed)
                with torch.autocast("cpu", torch.bfloat16, enabled=not own):
                    losses.append(learner.step(*batch))
        assert all(p.dtype == torch.float32 for p in model.parameters())
        states.append((losses, dict(model.state_dict())))
    for losses, state in states[1:]:
        assert losses == states[0][0]
        assert_equal(state, states[0][1])
    plain = Learner(built(build), sample=sample, method="glcan:3", optimizer=MOMENTUM)
    torch.manual_seed(0)
    assert plain.step(*next(batches(1, size))) != states[0][0][0], "bfloat16 was on"


def test_a_gradient_scaler() -> None:
    plain = Learner(built(Small), sample=TINY, method="glcan:3")
    scaled = Learner(built(Small), sample=TINY, method="glcan:3")
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    optimizer, reference = SGD(scaled.parameters(), lr=0.1), SGD(plain.parameters(), lr=0.1)
    losses = scaled.backward(*TINY, scaler=scaler)
    assert losses == plain.backward(*TINY)
    weight = scaled.model.a.a.weight
    torch.testing.assert_close(weight.grad, plain.model.a.a.weight.grad * 2**10)
    scaler.step(optimizer)
    scaler.update()
    reference.step()
    torch.testing.assert_close(weight, plain.model.a.a.weight)


def test_double_precision_model() -> None:
    learner = Learner(built(Small).double(), sample=(TINY[0].double(), TINY[1]), method="glcan:3", optimizer=MOMENTUM)
    losses = learner.step(TINY[0].double(), TINY[1])
    assert all(loss.dtype == torch.float64 for loss in losses.values())
