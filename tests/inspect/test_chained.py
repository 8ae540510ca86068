"""What the glue between two units reads: any property of a tensor is a use, so that nothing is recomputed over it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests import zoo
from tests.zoo import Small, assert_equal, gradients
from torch import Tensor, nn

import glcan
from glcan.inspect.record import profile

READS: dict[str, Callable[[Tensor], Any]] = {
    "shape": lambda x: x.shape[-2:],
    "dtype": lambda x: x.dtype,
    "numel": lambda x: x.numel(),
    "requires_grad": lambda x: x.requires_grad,
    "ndim": lambda x: x.ndim,
    "size": lambda x: x.size(),
    "stride": lambda x: x.stride(),
    "data_ptr": lambda x: x.data_ptr(),
    "is_contiguous": lambda x: x.is_contiguous(),
    "len": len,
}


@pytest.mark.parametrize("read", READS)
def test_what_is_read_between_two_units_does_not_chain_them(read: str) -> None:
    class Reads(Small):
        def body(self, x: Tensor) -> Tensor:
            x = self.b(self.a(x))
            READS[read](x)
            return self.d(self.c(x))

    chained = {u.name: u.chained for u in profile(Reads(), (zoo.images(2, 8),)).units}
    assert chained == {"stem": False, "a": True, "b": True, "c": False, "d": True, "head": False}


class ReadsASize(nn.Module):
    """The size before pooling, as segmentation networks and feature pyramids read it."""

    def __init__(self, times: int, channels: int = 8) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, channels, 3, padding=1), nn.Linear(channels, 5)
        self.pools = nn.ModuleList(nn.MaxPool2d(2) for _ in range(times))
        self.mids = nn.ModuleList(nn.Conv2d(channels, channels, 1) for _ in range(times))
        self.convs = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in range(times))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for pool, mid, conv in zip(self.pools, self.mids, self.convs, strict=True):
            size = x.shape[-2:]
            x = conv(F.relu(F.interpolate(mid(pool(x)), size=size)))
        return self.head(x.amax((2, 3)))


@pytest.mark.parametrize("method", ["e2e", "checkpoint", "checkpoint-sqrt"])
@pytest.mark.parametrize("times", [1, 6])
def test_checkpointing_a_model_that_reads_sizes_is_exact(method: str, times: int) -> None:
    model, images, labels = ReadsASize(times), torch.randn(16, 3, 12, 12), torch.randint(0, 5, (16,))
    plain = copy.deepcopy(model)
    loss = F.cross_entropy(plain(images), labels)
    loss.backward()
    learner = glcan.Learner(model, sample=(images, labels), method=method)
    assert bool(learner.plan.recompute) is (method != "e2e")
    assert torch.equal(learner.backward(images, labels)["block1"], loss.detach())
    assert_equal(gradients(model), gradients(plain))


@pytest.mark.filterwarnings("ignore")  # of timm
@pytest.mark.parametrize("method", ["checkpoint", "checkpoint-sqrt", "selective", "glcan:4"])
def test_poolformer_can_be_planned(method: str) -> None:
    model = zoo.timm("poolformer_s12", num_classes=10)
    sample = (zoo.images(2, 64), torch.tensor([1, 2]))
    found = glcan.plan(model, sample=sample, method=method, baselines=("e2e",))
    assert found.cost.activation_peak_bytes < found.baselines["e2e"].activation_peak_bytes
