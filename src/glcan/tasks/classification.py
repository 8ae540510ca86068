"""Image classification: images [B, C, H, W] and labels [B]."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from glcan.errors import ConfigError, DataError
from glcan.tasks.base import Task

_INDICES = (torch.int64, torch.uint8)  # what cross-entropy takes as class indices


class Classification(Task):
    """Cross-entropy over classes, for the model's logits and for every auxiliary network's.

    A batch is ``(images, labels)``: labels [B] with class indices, or [B, classes] with probabilities (mixup). The
    model may return logits [B, classes], or an object or dict that holds them as ``logits``.

    Args:
        label_smoothing: in [0, 1).
        criterion: ``criterion(logits, labels) -> scalar`` in place of cross-entropy, for every block.
        classes: number of classes; taken from the model's output when left out.
    """

    name: ClassVar[str] = "classification"

    def __init__(
        self,
        label_smoothing: float = 0.0,
        criterion: Callable[[Tensor, Tensor], Tensor] | None = None,
        classes: int | None = None,
    ) -> None:
        if not 0 <= label_smoothing < 1:
            raise ConfigError(f"label_smoothing is {label_smoothing}; it must lie in [0, 1), 0.1 for example.")
        self.label_smoothing = label_smoothing
        self.criterion = criterion
        self.classes = self._given_classes = classes

    def example(self, batch: int, channels: int, image: tuple[int, int]) -> tuple[Any, ...]:
        return torch.empty(batch, channels, *image), torch.zeros(batch, dtype=torch.int64)

    def prepare(self, shapes: tuple[tuple[int, ...], ...], batch: tuple[Any, ...]) -> None:
        if len(batch) != 2:
            raise ConfigError(f"A classification batch is (images, labels); this one has {len(batch)} items.")
        if self._given_classes is None:
            flat = [shape for shape in shapes if len(shape) == 2]
            if not flat:
                raise ConfigError(
                    f"The model returns tensors of shapes {list(shapes)}; classification needs logits "
                    "[batch, classes]. Give Classification(classes=N, criterion=...) if it has them in another form."
                )
            self.classes = flat[0][1]
        assert self.classes is not None
        labels = batch[1]
        if self.criterion is None:
            self._check_form(labels, len(batch[0]), self.classes)
        if not isinstance(labels, Tensor) or isinstance(labels, FakeTensor):
            return
        if not labels.is_floating_point() and labels.numel():
            low, high = int(labels.min()), int(labels.max())
            if low < 0 or high >= self.classes:
                raise DataError(
                    f"A label is {low if low < 0 else high}, but the model gives {self.classes} classes, so labels "
                    f"must lie in 0 ... {self.classes - 1}. Give the model as many classes as the data has."
                )

    @staticmethod
    def _check_form(labels: Any, images: int, classes: int) -> None:
        found = type(labels).__name__
        if isinstance(labels, Tensor):
            found = f"{str(labels.dtype).removeprefix('torch.')} of shape {list(labels.shape)}"
            wanted = [images, classes] if labels.is_floating_point() else [images]
            if list(labels.shape) == wanted and (labels.is_floating_point() or labels.dtype in _INDICES):
                return
        raise DataError(
            f"Labels are {found}; with {images} images and {classes} classes they must be a tensor of class indices, "
            f"int64 of shape [{images}], or of probabilities, floating-point of shape [{images}, {classes}]. Convert "
            "them (labels.long(), torch.tensor(labels)), or give Classification(criterion=...) for another loss."
        )

    def _cross_entropy(self, logits: Tensor, labels: Tensor) -> Tensor:
        if self.criterion is not None:
            return self.criterion(logits, labels)
        return F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)

    @staticmethod
    def logits(output: Any) -> Tensor:
        """The logits [B, classes] in whatever the model returned."""
        if isinstance(output, Tensor):
            return output
        if isinstance(output, dict) and "logits" in output:
            return output["logits"]
        if hasattr(output, "logits"):
            return output.logits
        if isinstance(output, (tuple, list)) and output and isinstance(output[0], Tensor):
            return output[0]
        raise ConfigError(
            f"The model returned {type(output).__name__}; classification needs logits [batch, classes], alone, "
            "first in a tuple, or as .logits. Wrap the model so that it returns them."
        )

    def loss(self, output: Any, batch: tuple[Any, ...]) -> Tensor:
        return self._cross_entropy(self.logits(output), batch[1])

    def local_loss(self, prediction: Tensor, batch: tuple[Any, ...]) -> Tensor:
        return self._cross_entropy(prediction, batch[1])
