"""What can be said of recorded steps without a GPU; `test_cuda.py` has the rest."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from glcan import Learner
from glcan.errors import ConfigError
from glcan.models import create
from glcan.strategies.cuda_graph import _cause, _Recordings
from glcan.strategies.second_pass import recording
from glcan.tasks import create as create_task

SAMPLE = (torch.rand(8, 3, 16, 16), torch.arange(8))


def test_a_model_on_the_cpu_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"cuda_graph is for a model on a CUDA device, and this one is on 'cpu'"):
        Learner(create("cifar_resnet20", num_classes=10), sample=SAMPLE, method="e2e", cuda_graph=True)


def test_detection_is_no_task_that_is_recorded() -> None:
    """Its losses read values on the host."""
    assert [create_task(name).recordable for name in ("classification", "super-resolution", "detection")] == [1, 1, 0]
    assert not recording()


def test_gradients_that_are_there_are_added_to_and_not_recorded() -> None:
    model = nn.Linear(2, 2)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    batch = (torch.rand(1, 2), torch.zeros(1, dtype=torch.int64))
    graphs = _Recordings(model)
    for _ in range(4):
        assert graphs.find((), batch, lambda twin: {}, list(model.parameters()), recomputes=False) is None


def test_the_first_error_is_the_cause() -> None:
    with pytest.raises(RuntimeError) as caught:
        try:
            raise RuntimeError("operation not permitted when stream is capturing\nand more")
        finally:
            raise RuntimeError("the capture was invalidated")
    assert _cause(caught.value) == "operation not permitted when stream is capturing"
