"""What can be said of recorded steps without a GPU; `test_cuda.py` has the rest."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn
from torch.optim import SGD

from glcan import LocalLearner
from glcan.errors import ConfigError
from glcan.strategies.cuda_graph import PassGraphs, _cause, recording
from glcan.models import create
from glcan.training import RunConfig

SAMPLE = (torch.rand(8, 3, 16, 16), torch.arange(8))


def test_a_model_on_the_cpu_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"cuda_graph is for a model on a CUDA device, and this one is on 'cpu'"):
        LocalLearner(create("cifar_resnet20", num_classes=10), sample=SAMPLE, rule="e2e", cuda_graph=True)


def test_detection_is_refused() -> None:
    with pytest.raises(ConfigError, match="cuda_graph = true is not for detection"):
        RunConfig(task="detection", cuda_graph=True)


def test_a_run_may_go_on_with_or_without() -> None:
    assert not RunConfig().differences(RunConfig(cuda_graph=True))


def test_batches_on_the_cpu_run_as_ever() -> None:
    learner = LocalLearner(
        create("cifar_resnet20", num_classes=10), sample=SAMPLE, rule="e2e", optimizer=partial(SGD, lr=0.01)
    )
    learner.cuda_graph = True
    losses = [float(learner.step(*SAMPLE)["block1"]) for _ in range(4)]
    assert losses[-1] < losses[0]
    assert not recording()


def test_gradients_that_are_there_are_added_to_and_not_recorded() -> None:
    model = nn.Linear(2, 2)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    batch = (torch.rand(1, 2), torch.zeros(1, dtype=torch.int64))
    graphs = PassGraphs(model)
    for _ in range(4):
        assert graphs.find((), batch, lambda twin: {}, list(model.parameters()), recomputes=False) is None


def test_the_first_error_is_the_cause() -> None:
    with pytest.raises(RuntimeError) as caught:
        try:
            raise RuntimeError("operation not permitted when stream is capturing\nand more")
        finally:
            raise RuntimeError("the capture was invalidated")
    assert _cause(caught.value) == "operation not permitted when stream is capturing"
