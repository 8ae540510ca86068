"""What a learner refuses: wrapped models, and models that changed after it was built."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.optim import SGD

from glcan import Learner, plan
from glcan.errors import ConfigError

BATCH = torch.randn(4, 3, 8, 8), torch.arange(4)
METHODS = ("e2e", "checkpoint", "selective", "glcan:3")


def network() -> nn.Sequential:
    body = [nn.Sequential(nn.Conv2d(c, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()) for c in (3, 8, 8, 8)]
    return nn.Sequential(*body, nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)))


def learner(method: str, model: nn.Module) -> Learner:
    return Learner(model, sample=BATCH, method=method, optimizer=partial(SGD, lr=0.1))


@pytest.fixture
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    store = dist.FileStore(os.fspath(tmp_path_factory.mktemp("store") / "file"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def test_a_model_in_data_parallel_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"wrapped in DataParallel.*model\.module"):
        learner("e2e", nn.DataParallel(network()))


@pytest.mark.parametrize("method", METHODS)
def test_a_model_in_distributed_data_parallel_is_refused(method: str, one_process: None) -> None:
    wrapped = nn.parallel.DistributedDataParallel(network())
    with pytest.raises(ConfigError, match="wrapped in DistributedDataParallel"):
        learner(method, wrapped)
    with pytest.raises(ConfigError, match="wrapped in DistributedDataParallel"):
        plan(wrapped, sample=BATCH, method=method)


def test_a_sharded_model_is_refused(one_process: None) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = network()
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    with pytest.raises(ConfigError, match="is sharded"):
        learner("glcan:3", model)


def frozen(model: nn.Sequential) -> None:
    model[0].requires_grad_(False)


def another_head(model: nn.Sequential) -> None:
    model[4] = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))


def in_double(model: nn.Sequential) -> None:
    model.double()


@pytest.mark.parametrize(
    ("change", "said"),
    [(frozen, "frozen or thawed"), (another_head, "replaced, added or removed"), (in_double, "moved or cast")],
)
@pytest.mark.parametrize("method", METHODS)
def test_a_change_after_building_is_refused_by_name(
    method: str, change: Callable[[nn.Sequential], None], said: str
) -> None:
    model = network()
    built = learner(method, model)
    built.step(*BATCH)
    change(model)
    with pytest.raises(ConfigError, match=rf"{said} since the learner was built \((0|4)\."):
        built.step(*BATCH)


@pytest.mark.parametrize("method", METHODS)
def test_thawed_layers_are_refused(method: str) -> None:
    model = network()
    model[0].requires_grad_(False)
    built = learner(method, model)
    built.step(*BATCH)
    model.requires_grad_(True)
    with pytest.raises(ConfigError, match=r"frozen or thawed.*0\.0"):
        built.step(*BATCH)


def test_an_optimizer_of_other_parameters_is_refused() -> None:
    model = network()
    whole = SGD(model.parameters(), lr=0.1)
    with pytest.raises(ConfigError, match="was given the .* parameters of block1"):
        Learner(model, sample=BATCH, method="glcan:3", optimizer=lambda parameters: whole)
    other = SGD([nn.Parameter(torch.ones(1))], lr=0.1)
    with pytest.raises(ConfigError, match="holds 1 others"):
        Learner(model, sample=BATCH, method="e2e", optimizer=lambda parameters: other)
