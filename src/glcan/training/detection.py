"""Detections of a trained model, and COCO's metrics of them.

Shapes: N detections of one image, H height, W width. Boxes are x1, y1, x2, y2 in pixels of the image as stored.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from glcan.errors import ConfigError, DataError
from glcan.training.checkpoint import preserved_rng

if TYPE_CHECKING:
    from glcan.data import DetectionData

#: Names of the metrics, in the order in which COCO's own code gives them.
COCO_METRICS = (
    "map",  # mean average precision: over classes, and over thresholds of the IoU from 0.50 to 0.95
    "map_50",
    "map_75",
    "map_small",  # objects below 32 x 32 pixels
    "map_medium",  # between
    "map_large",  # from 96 x 96 pixels
    "mar_1",  # mean average recall, with at most so many detections an image
    "mar_10",
    "mar_100",
    "mar_small",
    "mar_medium",
    "mar_large",
)


def coco_metrics(ground_truth: Mapping[str, Any], results: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """COCO's metrics, as pycocotools computes them (by faster-coco-eval): crowds, areas and numbers of detections.

    Args:
        ground_truth: as a COCO annotation file has it: `DetectionData.ground_truth(split)`.
        results: as a COCO result file has them: dicts of image_id, category_id, bbox [x, y, width, height], score.

    Returns:
        The metrics of `COCO_METRICS` as fractions; those of sizes that no object has are left out.

    Raises:
        DataError: a result is of an image that the ground truth lacks, or no object is left to find.
    """
    from faster_coco_eval import COCO, COCOeval_faster

    images = {image["id"] for image in ground_truth["images"]}
    foreign = next((result["image_id"] for result in results if result["image_id"] not in images), None)
    if foreign is not None:
        raise DataError(
            f"A detection is of image {foreign}, which is not among the {len(images)} images of the ground truth. "
            "Compare detections and annotations of the same split."
        )
    truth = COCO(dict(ground_truth))
    found = truth.loadRes([dict(result) for result in results])
    evaluation = COCOeval_faster(truth, found, "bbox", print_function=_silent)
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    values = [float(value) for value in evaluation.stats[: len(COCO_METRICS)]]
    metrics = {name: value for name, value in zip(COCO_METRICS, values, strict=True) if value >= 0}
    if "map" not in metrics:  # COCO's code says -1
        raise DataError("There is no object to find in the ground truth: crowds do not count. Give another split.")
    return metrics


def _silent(*_: object) -> None:
    pass


def coco_results(
    predictions: Sequence[Mapping[str, Tensor]], image_ids: Sequence[int], category_ids: Sequence[int]
) -> list[dict[str, Any]]:
    """What a detector returned for some images, as COCO result files have it.

    Args:
        predictions: dicts of boxes [N, 4], labels [N] from 1 and scores [N], one for each image.
        image_ids: of these images.
        category_ids: of the labels 1, 2, ... Detections with other labels (of a model with more outputs) are left out.
    """
    results = []
    for prediction, image_id in zip(predictions, image_ids, strict=True):
        boxes = prediction["boxes"].double().cpu()
        corners = torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], 1).tolist()
        for box, label, score in zip(
            corners, prediction["labels"].tolist(), prediction["scores"].tolist(), strict=True
        ):
            if 1 <= label <= len(category_ids):
                results.append(
                    {"image_id": image_id, "category_id": category_ids[label - 1], "bbox": box, "score": score}
                )
    return results


def detect(
    model: nn.Module,
    data: DetectionData,
    split: str = "test",
    *,
    batch: int = 8,
    autocast: torch.dtype | None = None,
    workers: int = 0,
    each_batch: Callable[[], object] | None = None,
) -> list[dict[str, Any]]:
    """Detections in all images of a split, as COCO result files have them; in evaluation mode, where the model is.

    The model's training mode and every random generator are left as they were.

    Args:
        model: ``model(images)`` gives a dict of boxes, labels and scores for each image.
        batch: images at a time.
        autocast: None, or the type of the autocast arithmetic.
        workers: processes that load images.
        each_batch: called after each batch.

    Raises:
        DataError: the split is empty.
        ConfigError: the model returns something else.
    """
    if data.size(split) == 0:
        raise DataError(f"Data set {data.name!r} has no images in its {split!r} split. Choose another --split.")
    device = next(model.parameters()).device
    results: list[dict[str, Any]] = []
    with preserved_rng(device), _evaluating(model):
        for images, targets in data.loader(split, batch, workers=workers, device=device):
            with torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
                predictions = model(images)
            check_predictions(predictions, len(images))
            ids = [int(target["image_id"]) for target in targets]
            results += coco_results(predictions, ids, data.category_ids)
            if each_batch is not None:
                each_batch()
    return results


def evaluate_detection(model: nn.Module, data: DetectionData, split: str = "test", **options: Any) -> dict[str, float]:
    """COCO's metrics of a detector on a split, as fractions; the options are those of `detect`.

    A model whose weights are not finite gives NaN for every metric.
    """
    if not all(bool(torch.isfinite(parameter).all()) for parameter in model.parameters()):
        return dict.fromkeys(COCO_METRICS[:3], math.nan)
    return coco_metrics(data.ground_truth(split), detect(model, data, split, **options))


def detect_files(
    model: nn.Module, files: Sequence[str | Path], *, image: Callable[[str | Path], Tensor] | None = None
) -> Iterator[tuple[str | Path, Tensor, dict[str, Tensor]]]:
    """For each image file: its name, its pixels uint8 [3, H, W], and the detections, on the CPU, best first.

    Args:
        model: on the device where it is to run.
        files: image files of any size and colour mode.
        image: reads one; by default `glcan.data.detection.read_pixels`.

    Raises:
        DataError: a file cannot be read.
        ConfigError: the model is no detector.
    """
    from glcan.data.detection import read_pixels

    read = image or read_pixels
    device = next(model.parameters()).device
    with _evaluating(model):
        for file in files:
            pixels = read(file)
            predictions = model([pixels.to(device, torch.float32) / 255])
            check_predictions(predictions, 1)
            yield file, pixels, {name: values.cpu() for name, values in predictions[0].items()}


def check_predictions(predictions: Any, images: int) -> None:
    """Raises `ConfigError` unless a model returned boxes, labels and scores for each of so many images."""
    needed = {"boxes", "labels", "scores"}
    if (
        not isinstance(predictions, list | tuple)
        or len(predictions) != images
        or not all(isinstance(p, Mapping) and needed <= p.keys() for p in predictions)
    ):
        raise ConfigError(
            f"The model returned {type(predictions).__name__} for {images} images; a detector in evaluation mode must "
            "return a list with a dict of boxes, labels and scores for each, as torchvision's do. Choose another model."
        )


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        model.train(training)
