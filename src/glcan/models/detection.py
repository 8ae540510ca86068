"""Detectors: torchvision's own classes, with backbones and pyramids of other sizes.

| name | model |
|---|---|
| `torchvision/retinanet_resnet50_fpn`, `torchvision/fcos_...`, ... | as torchvision builds it |
| `retinanet_resnet18_fpn`, `fcos_resnet34_fpn`, `fasterrcnn_resnet101_fpn`, ... | the same, any of four ResNets |
| `retinanet_small`, `fcos_small` | a narrow ResNet-18 with a pyramid of three levels, for small images and for CPUs |

`fcos_small` has the first three stages alone, and its pyramid begins at stride 4: at 96 pixels an object is 3 to 6
places wide on its own level.

All of them start from random weights. As in torchvision, label 0 is the background, so `num_classes` is the number of
kinds of objects plus one; and the model itself normalises, resizes and pads the images (`model.transform`).

Sources: RetinaNet, Lin et al. 2017, arXiv 1708.02002; FCOS, Tian et al. 2019, arXiv 1904.01355; Faster R-CNN, Ren et
al. 2015, arXiv 1506.01497; feature pyramids, Lin et al. 2017, arXiv 1612.03144.

Shapes: B batch, H height, W width.
"""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import nn

from glcan.errors import ConfigError, UnknownName

__all__ = ["create_detector", "detector_names", "is_detector"]

FAMILIES = ("retinanet", "fcos", "fasterrcnn")
BACKBONES = ("resnet18", "resnet34", "resnet50", "resnet101")
SMALL = {
    "retinanet_small": {"norm", "width", "channels"},
    "fcos_small": {"norm", "width", "channels", "convs"},
}
"""The small detectors, and the options that are ours."""
SMALL_SIZE = 96  # pixels of the shorter side
COCO_CLASSES = 91  # torchvision's default: COCO's category ids, background included
_GROUP = 8  # channels of a group of the normalisation in the heads of `fcos_small`
MAX_TO_MIN = 1333 / 800  # the usual limit of the longer side, in shorter sides


def detector_names() -> list[str]:
    """Names of all detectors; imports torchvision."""
    from torchvision import models

    from_torchvision = [
        f"torchvision/{name}"
        for name in models.list_models(module=models.detection)
        if name.startswith(tuple(f"{family}_" for family in FAMILIES))
    ]
    return [*from_torchvision, *(f"{family}_{body}_fpn" for family in FAMILIES for body in BACKBONES), *SMALL]


def is_detector(name: str) -> bool:
    """Whether `create_detector` takes this name; imports nothing for the names of other models."""
    return name.removeprefix("torchvision/").startswith(FAMILIES) and name in detector_names()


def create_detector(
    name: str, *, num_classes: int | None = None, in_channels: int = 3, image_size: int | None = None, **options: Any
) -> nn.Module:
    """A detector with random weights: ``model(images, targets)`` in train mode gives a dict of losses.

    Args:
        name: of `detector_names()`.
        num_classes: kinds of objects plus one for the background; None: 91, as COCO's category ids need.
        in_channels: 3; detectors take nothing else.
        image_size: pixels of the shorter side to which the model resizes every image (`min_size`); the longer side is
            limited to 1333/800 of that unless `max_size` is given. None: 800, 96 for the small ones.
        options: of torchvision's class (`score_thresh`, `detections_per_img`, ...); `min_size` may be a list, of which
            training draws one for each batch; further for those that torchvision has not built: `norm`, "batch" or
            "frozen" (BatchNorm as fixed scale and shift), `channels` of the pyramid (small ones), `width`, the channels
            of the first stage (small ones), and `convs`, the convolutions of each head (`fcos_small`).

    Raises:
        ConfigError: other channels than 3, or a value that the model does not take.
        UnknownName: an option that the model does not have.
    """
    if in_channels != 3:
        raise ConfigError(f"The detector {name!r} takes images of 3 channels, not {in_channels}. Convert them to RGB.")
    if num_classes is not None and num_classes < 2:
        raise ConfigError(
            f"num_classes={num_classes} of the detector {name!r}: it must be at least 2, background included."
        )
    _check_options(name, options)
    given = {"num_classes": num_classes or COCO_CLASSES} | _sizes(name, image_size, options)
    factory: Callable[..., nn.Module]
    if name.startswith("torchvision/"):
        from torchvision import models

        short = name.removeprefix("torchvision/")
        factory = partial(models.get_model, short, weights=None, weights_backbone=None)
    elif name in SMALL:
        factory = _small_retinanet if name == "retinanet_small" else _small_fcos
    else:
        family, body = name.split("_")[:2]
        factory = partial({"retinanet": _retinanet, "fcos": _fcos, "fasterrcnn": _faster_rcnn}[family], body)
    try:
        return factory(**given)
    except (TypeError, ValueError, AssertionError) as error:
        raise ConfigError(
            f"The detector {name!r} cannot be made with the options {options}: {error}. Leave out or correct them."
        ) from error


def _check_options(name: str, options: dict[str, Any]) -> None:
    """Torchvision's detectors take any keyword and ignore those they do not know."""
    from torchvision.models import detection

    classes = {"retinanet": detection.RetinaNet, "fcos": detection.FCOS, "fasterrcnn": detection.FasterRCNN}
    kind = classes[name.removeprefix("torchvision/").split("_")[0]]
    known = set(inspect.signature(kind).parameters) - {"backbone", "num_classes", "kwargs"}
    if name.startswith("torchvision/"):
        known |= {"trainable_backbone_layers", "progress"}
    else:
        known |= SMALL.get(name, {"norm"})
    for option in options:
        if option not in known:
            raise UnknownName(f"option of the model {name!r}", option, sorted(known))


def _sizes(name: str, image_size: int | None, options: dict[str, Any]) -> dict[str, Any]:
    """The options with `min_size` and `max_size`, checked."""
    given = dict(options)
    if name.startswith("torchvision/") and image_size is None and not given.keys() & {"min_size", "max_size"}:
        return given  # as torchvision has it
    default = SMALL_SIZE if name in SMALL else 800
    smallest: Any = given.get("min_size", image_size or default)
    if isinstance(smallest, list | tuple):
        smallest = tuple(smallest)
    sizes = smallest if isinstance(smallest, tuple) else (smallest,)
    if not sizes or not all(isinstance(size, int) and size > 0 for size in sizes):
        raise ConfigError(f"min_size={smallest} of the detector {name!r}: it must be pixels, or a list of pixels.")
    largest = given.get("max_size", max(sizes) if name in SMALL else round(max(sizes) * MAX_TO_MIN))
    if not isinstance(largest, int) or largest < max(sizes):
        raise ConfigError(
            f"max_size={largest} of the detector {name!r}: it must be at least min_size={max(sizes)} pixels."
        )
    return given | {"min_size": smallest, "max_size": largest}


# ---------------------------------------------------------------- full size


def _norm_layer(norm: str) -> Callable[..., nn.Module]:
    from torchvision.ops import FrozenBatchNorm2d

    if norm not in ("batch", "frozen"):
        raise ConfigError(f"norm={norm!r} of a detector: it must be 'batch' or 'frozen'.")
    return nn.BatchNorm2d if norm == "batch" else FrozenBatchNorm2d


def _pyramid(body: str, norm: str, *, extra: bool) -> nn.Module:
    """A whole trainable ResNet with a pyramid of 256 channels: P3 ... P7 (`extra`), or P2 ... P5 and a pooled P6."""
    from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
    from torchvision.ops.feature_pyramid_network import LastLevelP6P7

    more: dict[str, Any] = {"returned_layers": [2, 3, 4], "extra_blocks": LastLevelP6P7(256, 256)} if extra else {}
    return resnet_fpn_backbone(
        backbone_name=body, weights=None, norm_layer=_norm_layer(norm), trainable_layers=5, **more
    )


def _retinanet(body: str, *, norm: str = "batch", **options: Any) -> nn.Module:
    from torchvision.models.detection import RetinaNet

    return RetinaNet(_pyramid(body, norm, extra=True), **options)


def _fcos(body: str, *, norm: str = "batch", **options: Any) -> nn.Module:
    from torchvision.models.detection import FCOS

    return FCOS(_pyramid(body, norm, extra=True), **options)


def _faster_rcnn(body: str, *, norm: str = "batch", **options: Any) -> nn.Module:
    from torchvision.models.detection import FasterRCNN

    return FasterRCNN(_pyramid(body, norm, extra=False), **options)


# ---------------------------------------------------------------- small
#
# RetinaNet: strides 8, 16 and 32, anchors for objects of about 16-32, 32-64 and 64-128 pixels: half of what is
# published, because small images hold small objects. FCOS: strides 4, 8 and 16, for objects up to about 24 pixels, up
# to 48, and larger, so that at 96 pixels each octave of the scenes has a level of its own.


def _small_pyramid(width: int, channels: int, norm: str, stages: int = 4) -> nn.Module:
    """ResNet-18 with `width` in place of 64 channels, and a pyramid of `channels` channels on its last three stages."""
    from torchvision.models.detection.backbone_utils import BackboneWithFPN

    widths = [width * 2**stage for stage in range(stages)]
    body = _narrow_resnet(widths, _norm_layer(norm))
    layers = {f"layer{stages - 2 + level}": str(level) for level in range(3)}
    pyramid = BackboneWithFPN(body, layers, widths[-3:], channels)
    pyramid.fpn.extra_blocks = None  # three levels, no pooled one
    return pyramid


def _narrow_resnet(widths: Sequence[int], norm_layer: Callable[..., nn.Module]) -> nn.Module:
    """The ResNet-18 of torchvision's own residual blocks, without the classifier, initialised as torchvision does."""
    from torchvision.models.resnet import BasicBlock

    if min(widths) < 1:
        raise ConfigError(f"width={widths[0]} of a small detector: it must be at least 1.")
    layers: list[tuple[str, nn.Module]] = [
        ("conv1", nn.Conv2d(3, widths[0], 7, stride=2, padding=3, bias=False)),
        ("bn1", norm_layer(widths[0])),
        ("relu", nn.ReLU(inplace=True)),
        ("maxpool", nn.MaxPool2d(3, stride=2, padding=1)),
    ]
    before = widths[0]
    for stage, channels in enumerate(widths, 1):
        stride = 1 if stage == 1 else 2
        shortcut = None
        if stride != 1 or before != channels:
            conv = nn.Conv2d(before, channels, 1, stride=stride, bias=False)
            shortcut = nn.Sequential(conv, norm_layer(channels))
        blocks = [
            BasicBlock(before, channels, stride, shortcut, norm_layer=norm_layer),
            BasicBlock(channels, channels, norm_layer=norm_layer),
        ]
        layers.append((f"layer{stage}", nn.Sequential(*blocks)))
        before = channels
    model = nn.Sequential(OrderedDict(layers))
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return model


def _small_retinanet(*, width: int = 32, channels: int = 64, norm: str = "batch", **options: Any) -> nn.Module:
    from torchvision.models.detection import RetinaNet
    from torchvision.models.detection.anchor_utils import AnchorGenerator

    sizes = tuple((size, round(size * 2 ** (1 / 3)), round(size * 2 ** (2 / 3))) for size in (16, 32, 64))
    anchors = AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * len(sizes))
    return RetinaNet(_small_pyramid(width, channels, norm), **({"anchor_generator": anchors} | options))


def _small_fcos(
    *, num_classes: int, width: int = 16, channels: int = 32, convs: int = 2, norm: str = "batch", **options: Any
) -> nn.Module:
    from torchvision.models.detection import FCOS
    from torchvision.models.detection.anchor_utils import AnchorGenerator

    if convs < 1:
        raise ConfigError(f"convs={convs} of fcos_small: its heads need at least 1 convolution.")
    if channels < _GROUP or channels % _GROUP:
        raise ConfigError(f"channels={channels} of fcos_small: it must be a multiple of {_GROUP}, for its GroupNorm.")
    # A location belongs to the level whose anchor is 1/8 to 1/4 of its distance to the farthest side of the object.
    finest = 1.75
    anchors = AnchorGenerator(tuple((finest * 2**level,) for level in range(3)), ((1.0,),) * 3)
    defaults = {
        "anchor_generator": anchors,
        "center_sampling_radius": 6 / finest,  # in anchors: 1.5 strides, as published
        "score_thresh": 0.05,  # as published; torchvision's 0.2 costs average precision where scores are low
        "head": _small_fcos_head(channels, num_classes, convs),
    }
    return FCOS(_small_pyramid(width, channels, norm, stages=3), num_classes=num_classes, **(defaults | options))


def _small_fcos_head(channels: int, num_classes: int, convs: int) -> nn.Module:
    """Torchvision's head of FCOS with fewer convolutions (published are 4), for training from random weights.

    Deviations: groups of 8 channels in the normalisation, where 32 groups would be 1 or 2 channels each; and He et
    al.'s initial weights before it, where steps of Adam are large beside the published standard deviation of 0.01.
    """
    from torchvision.models.detection.fcos import FCOSClassificationHead, FCOSHead, FCOSRegressionHead

    norm_layer = partial(nn.GroupNorm, channels // _GROUP)
    head = FCOSHead(channels, 1, num_classes, num_convs=convs)
    head.classification_head = FCOSClassificationHead(channels, 1, num_classes, convs, norm_layer=norm_layer)
    head.regression_head = FCOSRegressionHead(channels, 1, convs, norm_layer=norm_layer)
    for tower in (head.classification_head.conv, head.regression_head.conv):
        for layer in tower:
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    return head
