"""FLOPs of convolutions with groups: torch's own formula of the backward pass ignores these; counts by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tests import zoo
from torch import nn

import glcan
from glcan.inspect.meter import LiveMemory


def by_hand(model: nn.Module, images: torch.Tensor) -> int:
    """FLOPs of a training step: forward, and twice that backward, but for the gradient of the images.

    Of convolutions and linear layers alone, with the groups of each.
    """
    counted: list[int] = []

    def count(module: Any, args: Any, output: torch.Tensor) -> None:
        # each element of the output is a product with a row of the weight, whose second dimension knows the groups
        counted.append(2 * output.numel() * math.prod(module.weight.shape[1:]))

    layers = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    handles = [layer.register_forward_hook(count) for layer in layers]
    model(images)
    for handle in handles:
        handle.remove()
    return 3 * sum(counted) - counted[0]


@pytest.mark.parametrize(
    ("name", "grouped"),
    [
        ("resnext50_32x4d", 16),
        ("mobilenet_v3_small", 11),
        ("efficientnet_b0", 16),
        ("convnext_tiny", 18),
        ("resnet18", 0),
    ],
)
def test_a_step_costs_three_forward_passes(name: str, grouped: int) -> None:
    model = zoo.torchvision(name, num_classes=10)
    assert sum(isinstance(m, nn.Conv2d) and m.groups > 1 for m in model.modules()) == grouped
    sample = (zoo.images(2, 64), torch.tensor([1, 2]))
    planned = glcan.plan(model, sample=sample, method="e2e", baselines=()).cost.flops
    assert planned == by_hand(model, sample[0])


@pytest.mark.parametrize("groups", [1, 2, 8])
@pytest.mark.parametrize("kind", [nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d])
@pytest.mark.parametrize("inputs", [False, True], ids=["weights", "weights and inputs"])
def test_backward_passes_of_a_convolution(kind: type[nn.Module], groups: int, inputs: bool) -> None:
    dimensions = int(kind.__name__[-2])
    layer = kind(8, 16, 3, stride=2, groups=groups)
    x = torch.randn(2, 8, *[7] * dimensions, requires_grad=inputs)
    with LiveMemory(layer, inputs=x) as meter:
        y = layer(x)
        forward = meter.flops
        y.sum().backward()
    products = x if isinstance(layer, nn.ConvTranspose2d) else y  # elements that meet a kernel each
    kernel = 3**dimensions * (16 if products is x else 8) // groups
    assert forward == 2 * products.numel() * kernel
    assert meter.flops == forward * (2 + inputs)
