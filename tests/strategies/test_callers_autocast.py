"""A caller's own `torch.autocast` around a pass keeps copies of weights: none may outlive a pass without a graph."""

from __future__ import annotations

import pytest
import torch

from glcan import Learner
from glcan.models import create


@pytest.mark.parametrize("method", ["selective", "glcan:3", "checkpoint", "selective+accumulate:2"])
def test_the_callers_autocast_gives_the_gradients_of_the_learners_own(method: str) -> None:
    batch = torch.randn(8, 3, 32, 32), torch.arange(8)
    found = []
    for callers in (False, True):
        torch.manual_seed(0)
        model = create("cifar_resnet20", num_classes=10)
        learner = Learner(model, sample=batch, method=method, autocast=None if callers else torch.bfloat16)
        with torch.autocast("cpu", torch.bfloat16, enabled=callers):
            learner.backward(*batch)
        assert all(p.grad is not None for p in model.parameters())
        found.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert torch.equal(*found)
