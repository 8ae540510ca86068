"""Metrics of a model on one split of a data set, for every task."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from glcan.errors import DataError
from glcan.training.checkpoint import preserved_rng
from glcan.training.detection import COCO_METRICS, evaluate_detection

if TYPE_CHECKING:
    from glcan.data import DetectionData, ImageData, PairData


@dataclass(frozen=True)
class Measures:
    """What `evaluate` gives for a task.

    Attributes:
        main: the metric that a run and a comparison are judged by; more is better.
        units: of every metric, in the order in which they are shown; "" has none, "fraction" is printed in percent.
        reference: what to compare with that is no trained model; its metrics have its name before theirs.
        beside: metrics that a comparison shows beside the main one.
    """

    main: str
    units: Mapping[str, str]
    reference: str | None = None
    beside: tuple[str, ...] = ()


MEASURES: dict[str, Measures] = {
    "classification": Measures("accuracy", {"accuracy": "fraction", "accuracy_top5": "fraction", "loss": "nats"}),
    "super-resolution": Measures(
        "psnr_y",
        {"psnr_y": "dB", "ssim_y": "", "loss": "", "bicubic_psnr_y": "dB", "bicubic_ssim_y": "", "bicubic_loss": ""},
        "bicubic",
        ("ssim_y",),
    ),
    "detection": Measures("map", dict.fromkeys(COCO_METRICS, "fraction") | {"loss": ""}),
}


def formatted(value: float, unit: str) -> str:
    """A metric as it is printed: fractions in percent."""
    if unit == "fraction":
        return f"{100 * value:.2f} %"
    return f"{value:.2f} {unit}" if unit == "dB" else f"{value:.4f} {unit}".rstrip()


def evaluate(
    model: nn.Module,
    data: ImageData | PairData | DetectionData,
    split: str = "test",
    *,
    batch: int = 256,
    autocast: torch.dtype | None = None,
    channels_last: bool = False,
    workers: int = 0,
    each_batch: Callable[[], object] | None = None,
    tile: int | None = None,
) -> dict[str, float]:
    """Metrics of a model, in evaluation mode, on the device where the model is.

    The model's training mode and every random generator are left as they were.

    Args:
        model: images [B, C, H, W] to scores [B, number of classes], or to images [B, C, s*H, s*W]; or a detector, see
            `detect`.
        data: a data set with at least one image in ``split``.
        split: "train", "val" or "test".
        batch: images at a time.
        autocast: None, or the type of the autocast arithmetic.
        channels_last: whether images are given in the layout NHWC.
        workers: processes that load images.
        each_batch: called after each batch.
        tile: of super-resolution, enlarge images in tiles of so many pixels; by default whole.

    Returns:
        What `MEASURES` says of the task. Classification: ``accuracy`` and, with more than 5 classes, ``accuracy_top5``,
        as fractions; ``loss``, the mean cross-entropy in nats. Super-resolution: see `evaluate_pairs`, and
        ``bicubic_...`` of the bicubic enlargement. Detection: see `coco_metrics`.

    Raises:
        DataError: the split is empty.
    """
    from glcan.data import DetectionData, PairData

    if isinstance(data, DetectionData):
        return evaluate_detection(
            model, data, split, batch=batch, autocast=autocast, workers=workers, each_batch=each_batch
        )
    if isinstance(data, PairData):
        from glcan.training.image_quality import bicubic_of, evaluate_pairs

        with preserved_rng(next(model.parameters()).device):
            metrics = evaluate_pairs(
                model, data, split, autocast=autocast, channels_last=channels_last, tile=tile, each_image=each_batch
            )
        return metrics | {f"bicubic_{name}": value for name, value in bicubic_of(data, split).items()}
    from torchmetrics import MetricCollection
    from torchmetrics.classification import MulticlassAccuracy

    if data.size(split) == 0:
        raise DataError(f"Data set {data.name!r} has no images in its {split!r} split. Choose another --split.")
    device = next(model.parameters()).device
    classes = len(data.classes)
    top_k = {"accuracy": 1} | ({"accuracy_top5": 5} if classes > 5 else {})
    accuracy = MetricCollection(
        {name: MulticlassAccuracy(classes, top_k=k, average="micro", validate_args=False) for name, k in top_k.items()},
        compute_groups=False,
    ).to(device)
    loss_sum = torch.zeros((), dtype=torch.float64, device=device)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    training = model.training
    model.eval()
    try:
        with preserved_rng(device), torch.inference_mode():
            for images, labels in data.loader(split, batch, workers=workers, device=device):
                images = images.to(device, memory_format=layout)
                labels = labels.to(device)
                with torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
                    scores = model(images)
                scores = scores.float()
                accuracy.update(scores, labels)
                loss_sum += nn.functional.cross_entropy(scores, labels, reduction="sum")
                if each_batch is not None:
                    each_batch()
            results = accuracy.compute() | {"loss": loss_sum / data.size(split)}
    finally:
        model.train(training)
    return {name: float(value) for name, value in results.items()}
