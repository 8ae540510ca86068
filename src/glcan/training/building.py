"""What a configuration stands for: its data, its model, its learner, checked against each other."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from glcan.errors import ConfigError, DataError, GlcanError, UnknownName
from glcan.training import checkpoint
from glcan.training.config import RunConfig
from glcan.training.detection import check_predictions
from glcan.training.machine import resolve_device

if TYPE_CHECKING:
    from glcan.data import DetectionData, ImageData, PairData
    from glcan.learner import Learner
    from glcan.tasks import Task


def load_data(config: RunConfig) -> ImageData | PairData | DetectionData:
    """The data set of a configuration.

    Raises:
        UnknownName, DataError: there is no such data set, or it cannot be used.
    """
    from glcan import data

    common: dict[str, Any] = {
        "root": config.data_root,
        "seed": config.seed,
        "val": config.val,
        "limit": config.limit,
        "skip_corrupt": config.skip_corrupt,
    }
    if config.task == "detection":
        return data.load_detection(config.data, image_size=config.image_size, **common)
    if config.task == "super-resolution":
        return data.load_pairs(config.data, scale=config.scale, patch=config.patch, crops=config.crops, **common)
    return data.load(config.data, image_size=config.image_size, download=config.download, **common)


def create_model(config: RunConfig, classes: int, shape: tuple[int, int | None, int | None]) -> nn.Module:
    """The model of a configuration, with the initial weights of its seed, on the CPU.

    Args:
        config: its ``task``, ``model``, ``model_options``, ``scale`` and ``seed``.
        classes: number of classes, for detection without the background; super-resolution has none and ignores it.
        shape: channels, height and width of an image; None for the model's own size. Of super-resolution the channels
            alone matter.
    """
    from glcan import models

    checkpoint.seed_all(config.seed)
    if config.task == "super-resolution":
        return models.create(config.model, in_channels=shape[0], scale=config.scale, **config.model_options)
    return models.create(
        config.model,
        num_classes=classes + (config.task == "detection"),  # the background is a class there
        in_channels=shape[0],
        image_size=shape[1],
        **config.model_options,
    )


def to_device(
    batch: Sequence[Any], device: torch.device, layout: torch.memory_format = torch.contiguous_format
) -> tuple[Any, ...]:
    """A batch, nested tensors of any task, on a device, with batches of images in a memory layout."""

    def move(tensor: Tensor) -> Tensor:
        return tensor.to(device, memory_format=layout) if tensor.dim() == 4 else tensor.to(device)

    return tuple(tree_map_only(Tensor, move, list(batch)))


def class_names(data: ImageData | PairData | DetectionData) -> list[str]:
    """Names of the classes; none where the data has no classes."""
    return getattr(data, "classes", [])


def _task(config: RunConfig) -> Task:
    from glcan.tasks import Classification, Detection, SuperResolution

    if config.task == "super-resolution":
        return SuperResolution(config.criterion)
    if config.task == "detection":
        return Detection()
    return Classification(label_smoothing=config.label_smoothing)


def build(config: RunConfig, data: ImageData | PairData | DetectionData) -> Learner:
    """The learner of a configuration: model from ``config.seed``, on ``config.device``, checked against the data.

    Raises:
        DataError: labels are out of range, or the images are not of the shape that the data set says.
        ConfigError: the model refuses such images, or does not give a score per class, an image of the size, or boxes.
    """
    from glcan.learner import Learner
    from glcan.planning import plan

    device = resolve_device(config.device)
    if data.size("train") == 0:
        raise DataError(
            f"Data set {data.name!r} has no training images. Lower --val, give more images, or choose another --data."
        )
    if data.size("test") == 0:
        raise DataError(f"Data set {data.name!r} has no test images to end the run with. Add some, or choose another.")
    batch = first_batch(config, data, device)
    if config.task != "detection":  # whose images may differ in size
        _check_images(batch[0], data)
    layout = torch.channels_last if config.channels_last else torch.contiguous_format
    model = create_model(config, len(class_names(data)), data.shape).to(device).to(memory_format=layout)
    batch = to_device(batch, device, layout)
    autocast = autocast_dtype(config)
    _check_model(config, model, batch, data, autocast)
    method, task = config.parsed, _task(config)
    common: dict[str, Any] = {"units": config.units, "optimizer": _optimizer(config), "autocast": autocast}
    try:
        if config.memory is not None:
            forecast = plan(
                model,
                task,
                batch,
                method=str(dataclasses.replace(method, freeze=1.0)),
                options=config.options,
                memory=config.memory,
                baselines=(),
                **common,
            )
            chosen: dict[str, Any] = {"plan": forecast}
        else:
            chosen = {
                "method": dataclasses.replace(method, start=0.0, freeze=1.0, finish=0.0),
                "options": config.options,
                "cuts": config.cuts,
                "recompute": config.recompute,
            }
        return Learner(model, task, batch, clip_norm=config.clip_norm, cuda_graph=config.cuda_graph, **common, **chosen)
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        few, remedy = f"{len(batch[0])} image per batch is", ""
        if method.accumulate > 1:
            few, remedy = f"{len(batch[0])} images in {method.accumulate} parts are", " or accumulate over fewer parts"
        raise ConfigError(
            f"{few} too few for the BatchNorm of {config.model!r} ({error}). Raise --batch{remedy}."
        ) from error


def first_batch(config: RunConfig, data: ImageData | PairData | DetectionData, device: torch.device) -> tuple[Any, ...]:
    """A training batch, which leaves the random generators as they were."""
    with checkpoint.preserved_rng(device):
        batch: tuple[Any, ...] = next(iter(data.loader("train", config.batch)))
    return batch


def autocast_dtype(config: RunConfig) -> torch.dtype | None:
    """The type of the autocast arithmetic; None for plain fp32."""
    return torch.bfloat16 if config.precision == "bf16" else None


def optimizer_factory(
    name: str, *, lr: float = 0.1, momentum: float = 0.9, nesterov: bool = True, weight_decay: float = 1e-4
) -> Callable[[list[nn.Parameter]], torch.optim.Optimizer]:
    """What makes an optimizer for a list of parameters: "sgd", "adamw" or "adam".

    Raises:
        UnknownName: no such optimizer.
    """
    if name == "adamw":
        return functools.partial(torch.optim.AdamW, lr=lr, weight_decay=weight_decay)
    if name == "adam":
        return functools.partial(torch.optim.Adam, lr=lr, weight_decay=weight_decay)
    if name == "sgd":
        return functools.partial(
            torch.optim.SGD, lr=lr, momentum=momentum, nesterov=nesterov, weight_decay=weight_decay
        )
    raise UnknownName("optimizer", name, ["sgd", "adamw", "adam"])


def _optimizer(config: RunConfig) -> Callable[[list[nn.Parameter]], torch.optim.Optimizer]:
    return optimizer_factory(
        config.optimizer,
        lr=config.lr,
        momentum=config.momentum,
        nesterov=config.nesterov,
        weight_decay=config.weight_decay,
    )


def _check_images(images: Tensor, data: ImageData | PairData | DetectionData) -> None:
    if tuple(images.shape[1:]) != tuple(data.shape) or not images.is_floating_point():
        raise DataError(
            f"Images of {data.name!r} come as {images.dtype} of shape {tuple(images.shape[1:])}, but the data set says "
            f"floating point of shape {tuple(data.shape)} (channels, height, width). Correct the data set."
        )


def _check_model(
    config: RunConfig,
    model: nn.Module,
    batch: tuple[Any, ...],
    data: ImageData | PairData | DetectionData,
    autocast: torch.dtype | None,
) -> None:
    """Run the model once on two images, as evaluation will."""
    images = batch[0][:2]
    training = model.training
    model.eval()
    device = images[0].device
    try:
        with (
            checkpoint.preserved_rng(device),
            torch.no_grad(),
            torch.autocast(device.type, dtype=autocast, enabled=autocast is not None),
        ):
            scores = model(tree_map_only(Tensor, Tensor.clone, images))
    except GlcanError:
        raise
    except Exception as error:  # whatever a model does with images that it was not made for
        reason = str(error).strip().splitlines() or [type(error).__name__]
        size = "--patch" if config.task == "super-resolution" else "--image-size"
        raise ConfigError(
            f"Model {config.model!r} refuses images of {data.name!r} with channels, height, width = "
            f"{tuple(images[0].shape)}: {reason[0]}. Set {size} or --model-option, or choose another --model."
        ) from error
    finally:
        model.train(training)
    if config.task == "detection":
        check_predictions(scores, len(images))
        return
    found = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
    if config.task == "super-resolution":
        expected = (len(images), *batch[1].shape[1:])
        if found != expected:
            raise ConfigError(
                f"Model {config.model!r} gives {found} for images {tuple(images.shape)}, but super-resolution with "
                f"scale {config.scale} needs {expected}. Set --scale or --model-option, or choose another --model."
            )
        return
    expected = (len(images), len(class_names(data)))
    if found != expected:
        raise ConfigError(
            f"Model {config.model!r} gives {found} for {expected[0]} images, but classification of {data.name!r} needs "
            f"scores of shape {expected}. Set the number of classes in --model-option, or choose another --model."
        )
