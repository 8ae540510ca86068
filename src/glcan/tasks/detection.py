"""Object detection: lists of images and of boxes, for models that compute their own losses as torchvision's do.

Shapes: B images of a batch, N boxes of one image, C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from glcan.errors import ConfigError, DataError
from glcan.tasks.base import Task

_EXAMPLE_BOXES = 7  # of an image; COCO's have 7.3 on average


class Detection(Task):
    """Boxes and classes, learned through the losses that the model itself returns in train mode.

    A batch is ``(images, targets)``: a list of B images float [C, H, W] in 0..1, which may differ in size, and a list
    of B dicts with ``boxes``, float [N, 4] as x1, y1, x2, y2 in pixels, and ``labels``, int64 [N] from 1 (0 is the
    background). N may be 0. The model is called as ``model(images, targets)`` and returns a dict of losses, which are
    added up; so torchvision's RetinaNet, FCOS and Faster R-CNN are trained as they are. Auxiliary networks return a
    dict of losses as well.
    """

    name: ClassVar[str] = "detection"
    assumes: ClassVar[bool] = True
    """One-stage detectors match anchors to boxes by masks alone, and run on fake tensors; others fall back."""

    def arguments(self, batch: tuple[Any, ...]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if len(batch) != 2:
            raise ConfigError(f"A detection batch is (images, targets); this one has {len(batch)} items.")
        images, targets = batch
        _check_structure(images, targets)
        return (list(images), [dict(target) for target in targets]), {}

    def example(self, batch: int, channels: int, image: tuple[int, int]) -> tuple[Any, ...]:
        height, width = image
        corners = torch.arange(1, _EXAMPLE_BOXES + 1).unsqueeze(1) / _EXAMPLE_BOXES
        boxes = torch.cat([torch.zeros(_EXAMPLE_BOXES, 2), corners * torch.tensor([width, height])], 1)
        labels = torch.ones(_EXAMPLE_BOXES, dtype=torch.int64)
        images = [torch.zeros(channels, height, width) for _ in range(batch)]
        return images, [{"boxes": boxes.clone(), "labels": labels.clone()} for _ in range(batch)]

    def prepare(self, shapes: tuple[tuple[int, ...], ...], batch: tuple[Any, ...]) -> None:
        """Checks the sample; see `check_targets`."""
        check_targets(*batch)
        if any(shapes) or not shapes:
            raise ConfigError(
                f"The model returns tensors of shapes {list(shapes)}; in train mode a detector must return a dict of "
                "scalar losses, as torchvision's do. Call model.train() first, or wrap the model so that it does."
            )

    def loss(self, output: Any, batch: tuple[Any, ...]) -> Tensor:
        return total_loss(output, "The model")

    def local_loss(self, prediction: Any, batch: tuple[Any, ...]) -> Tensor:
        return total_loss(prediction, "An auxiliary network")


def total_loss(losses: Any, origin: str) -> Tensor:
    """The sum of a dict of scalar losses.

    Raises:
        ConfigError: it is no such dict; `origin` says whose.
    """
    if not isinstance(losses, Mapping) or not losses or not all(isinstance(v, Tensor) for v in losses.values()):
        raise ConfigError(
            f"{origin} returned {type(losses).__name__}; detection needs a dict of scalar losses, as torchvision's "
            "detectors return in train mode. Call model.train() first."
        )
    first: Tensor
    first, *rest = losses.values()
    return sum(rest, start=first)


def check_targets(images: Sequence[Tensor], targets: Sequence[Mapping[str, Tensor]]) -> None:
    """Checks that a batch is one of detection: see `Detection`. Values of fake tensors are not looked at.

    Raises:
        ConfigError: the batch has another form.
        DataError: a box without area or with a value that is no number, a label below 1.
    """
    _check_structure(images, targets)
    for index, (image, target) in enumerate(zip(images, targets, strict=True)):
        if image.dim() != 3 or not image.is_floating_point():
            raise ConfigError(
                f"Image {index} is {image.dtype} {list(image.shape)}; detection needs floating-point [C, H, W] in 0..1."
            )
        missing = {"boxes", "labels"} - set(target)
        if missing:
            raise ConfigError(
                f"Target {index} lacks {' and '.join(sorted(missing))}; it must be a dict with boxes [N, 4] and "
                "labels [N]."
            )
        boxes, labels = target["boxes"], target["labels"]
        if boxes.dim() != 2 or boxes.shape[1] != 4 or not boxes.is_floating_point():
            raise ConfigError(
                f"The boxes of target {index} are {boxes.dtype} {list(boxes.shape)}; they must be floating-point "
                "[N, 4], torch.zeros(0, 4) for an image without objects."
            )
        if labels.dtype != torch.int64 or labels.shape != boxes.shape[:1]:
            raise ConfigError(
                f"The labels of target {index} are {labels.dtype} {list(labels.shape)}; they must be torch.int64 "
                f"[{len(boxes)}], one for each box."
            )
        if isinstance(boxes, FakeTensor) or isinstance(labels, FakeTensor) or not len(boxes):
            continue
        wrong = ~(torch.isfinite(boxes).all(1) & (boxes[:, 2:] > boxes[:, :2]).all(1))
        if wrong.any():
            which = int(wrong.nonzero()[0, 0])
            raise DataError(
                f"Box {which} of target {index} is {boxes[which].tolist()}; it must be x1, y1, x2, y2 with x1 < x2 and "
                "y1 < y2. Leave such boxes out."
            )
        if int(labels.min()) < 1:
            raise DataError(
                f"A label of target {index} is {int(labels.min())}; labels of objects count from 1, 0 is the "
                "background."
            )


def _check_structure(images: Any, targets: Any) -> None:
    if not isinstance(targets, list | tuple) or not all(isinstance(target, Mapping) for target in targets):
        raise ConfigError(
            f"The targets of a detection batch are a list of dicts, one for each image, not {type(targets).__name__}."
        )
    if len(images) != len(targets):
        raise ConfigError(
            f"A detection batch has one target for each image; this one has {len(images)} images and {len(targets)} "
            "targets."
        )
