"""One table of every strategy on every task: what the contract, resumption, scaling, leaks, ties and parts run over."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from tests import zoo
from torch import Tensor, nn
from torch.optim import AdamW

from glcan import Learner
from glcan.auxiliary import names as rules
from glcan.auxiliary import tasks_of
from glcan.models import create
from glcan.strategies import names
from glcan.tasks import TASKS

Batch = tuple[Any, ...]

# the models of each task; the first one is the smallest, and the only one that all tests run over
FAMILIES: dict[str, dict[str, Callable[[], nn.Module]]] = {
    "classification": {
        "small": zoo.Small,
        "cifar_resnet": lambda: create("cifar_resnet20", num_classes=10),
        "vit": lambda: zoo.timm(
            "vit_tiny_patch16_224", img_size=32, patch_size=4, num_classes=10, depth=4, embed_dim=48, drop_path_rate=0.1
        ),
        "swin": lambda: zoo.timm(
            "swin_tiny_patch4_window7_224",
            img_size=32,
            patch_size=2,
            window_size=4,
            embed_dim=24,
            depths=(1, 1, 2, 1),
            num_heads=(1, 2, 2, 2),
            num_classes=10,
        ),
        "convnext": lambda: zoo.timm(
            "convnext_atto", num_classes=10, depths=(1, 1, 2, 1), dims=(16, 24, 32, 48), drop_path_rate=0.1
        ),
    },
    "super-resolution": {
        "edsr": lambda: create("edsr_baseline", scale=2, blocks=6, channels=8),
        "swinir": lambda: create(
            "spandrel/SwinIR-light", scale=2, depths=(1,) * 6, num_heads=(2,) * 6, embed_dim=8, drop_path_rate=0.0
        ),
    },
    "detection": {
        name: partial(create, name, num_classes=4, image_size=64, width=8, channels=32)
        for name in ("fcos_small", "retinanet_small")
    },
}

# strategy -> the options that it is tried with beside none, by task
_BRANCHES: list[dict[str, Any]] = [{"use_local": False}, {"use_global": False}, {"width": 0.5}]
OPTIONS: dict[str, dict[str, list[dict[str, Any]]]] = {
    "selective": {task: [{"by": "random"}] for task in TASKS} | {"classification": [{"by": "random"}, {"share": 0.25}]},
    "predsim": {"classification": [{"beta": 0.0}]},
    "infopro": {"classification": [{"mode": "cross_entropy"}]},
    "man": {"classification": [{"base": "infopro", "bias": "none"}]},
    "manpp": {"classification": [{"bias": "channel", "units": 2}]},
    "glcan": {
        "classification": [{"local": "always"}, {"local": "never"}, {"use_global": False}, {"width": 0.5}],
        "super-resolution": _BRANCHES,
        "detection": _BRANCHES,
    },
}


def classification_batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(8, 3, 32, 32, generator=generator), torch.arange(8) % 4


def super_resolution_batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.rand(4, 3, 16, 16, generator=generator), torch.rand(4, 3, 32, 32, generator=generator)


def detection_batch() -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    generator = torch.Generator().manual_seed(3)
    boxes = torch.tensor([[4.0, 4.0, 40.0, 44.0], [20.0, 2.0, 60.0, 30.0]])
    return [torch.rand(3, 64, 64, generator=generator) for _ in range(4)], [
        {"boxes": boxes[: i % 3], "labels": torch.tensor([1, 3])[: i % 3]} for i in range(4)
    ]


BATCHES: dict[str, Callable[[], Batch]] = {
    "classification": classification_batch,
    "super-resolution": super_resolution_batch,
    "detection": detection_batch,
}


def served(strategy: str) -> list[str]:
    """The tasks of a strategy: of a rule its own, of any other one all."""
    return tasks_of(strategy) if strategy in rules() else list(TASKS)


def _families(strategy: str, options: dict[str, Any], task: str) -> list[str]:
    first, *others = FAMILIES[task]
    if not options and strategy in ("glcan", "selective"):
        return [first, *others]
    return [first] if options or task != "classification" else [first, "vit"]


def _settings() -> Iterator[Any]:
    for strategy in names():
        for task in served(strategy):
            for options in [{}, *OPTIONS.get(strategy, {}).get(task, [])]:
                for family in _families(strategy, options, task):
                    method = f"{strategy}:4" if strategy in rules() else strategy
                    shown = [method, *(f"{k}={v}" for k, v in options.items()), task, family]
                    yield pytest.param(method, options, task, family, id="-".join(shown))


#: (method, options, task, family): all of them, and every strategy once on every task that it serves.
SETTINGS = list(_settings())
EACH = [
    pytest.param(*setting.values[0::2], id=setting.id)
    for setting in SETTINGS
    if not setting.values[1] and setting.values[3] == next(iter(FAMILIES[setting.values[2]]))
]
every_setting = pytest.mark.parametrize(("method", "options", "task", "family"), SETTINGS)
every_strategy = pytest.mark.parametrize(("method", "task"), EACH)


def model_of(task: str, family: str | None = None) -> nn.Module:
    torch.manual_seed(0)
    families = FAMILIES[task]
    return families[family or next(iter(families))]().train()


#: What has been found for a setting: its profile, cuts, and what is recomputed. Looking takes longer than training.
_FOUND: dict[str, dict[str, Any]] = {}


def learner(
    method: str,
    task: str,
    family: str | None = None,
    *,
    model: nn.Module | None = None,
    **more: Any,
) -> Learner:
    """A learner whose auxiliary networks are drawn as those of any other one of this method."""
    own = model is not None or "sample" in more
    model = model_of(task, family) if model is None else model
    sample = more.pop("sample", None) or BATCHES[task]()
    key = f"{method} {task} {family} {more.get('options')}"
    torch.manual_seed(1)
    found = {} if own else _FOUND.get(key, {})
    built = Learner(model, task, sample, method=method, **{"optimizer": partial(AdamW, lr=1e-3)} | more | found)
    if not own and "+" not in method:
        planned = {"cuts": built.plan.cuts, "recompute": built.plan.recompute} if built.plan.blocks > 1 else {}
        _FOUND[key] = {"profile": built.profile} | planned
    return built
