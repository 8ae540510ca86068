"""Small models and batches that the tests of `selective` and of accumulation share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CUTS = ["body.1", "body.2"]


class Chain(nn.Module):
    """Residual units without a normalisation over the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.body = nn.ModuleList(nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.Tanh()) for _ in range(4))
        self.fc = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for unit in self.body:
            x = x + unit(x)
        return self.fc(x.mean((2, 3)))


class Normalised(nn.Module):
    """With BatchNorm, something that works in place where a unit begins, and a skip over all of them."""

    def __init__(self, **norm: Any) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.body = nn.ModuleList(
            nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8, **norm))
            for _ in range(4)
        )
        self.fc = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = first = self.stem(x)
        for unit in self.body:
            x = unit(x + 0.1)
        return self.fc((x + first).mean((2, 3)))


def chain() -> Chain:
    torch.manual_seed(0)
    return Chain().double()


def normalised(**norm: Any) -> Normalised:
    torch.manual_seed(3)
    return Normalised(**norm).double()


def batch(size: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return (
        torch.randn(size, 3, 8, 8, generator=generator, dtype=torch.float64),
        torch.randint(0, 10, (size,), generator=generator),
    )


def end_to_end(model: nn.Module, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Gradients of plain torch."""
    F.cross_entropy(model(images), labels).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_close(a: Mapping[str, Tensor], b: Mapping[str, Tensor], tolerance: float = 1e-10) -> None:
    assert a.keys() == b.keys()
    for name in a:
        least = tolerance * 1e-2 * (1 + float(b[name].abs().max()) if b[name].numel() else 1)
        torch.testing.assert_close(
            a[name], b[name], rtol=tolerance, atol=least, msg=lambda m, name=name: f"{name}: {m}"
        )
