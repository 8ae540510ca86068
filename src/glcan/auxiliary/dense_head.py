"""What auxiliary networks of detection end in: a narrow, anchor-free head, shared by the levels of a small pyramid.

The head, the assignment of objects to places and the losses are those of FCOS (Tian et al. 2019, arXiv 1904.01355) as
torchvision computes them, whatever the detector itself is: with one prediction for each place it needs a ninth of the
memory and time of RetinaNet's nine anchors, and it asks for the same things of the features, classes, position and
scale. Deviations: few and narrow convolutions, one tower for classes and boxes.

Shapes: B batch, C channels, H x W a map, N places of all levels, K classes (background included).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from glcan.errors import ConfigError
from glcan.inspect.profile import Profile
from glcan.tasks.detection import classes_of

__all__ = ["DenseHead", "convolution", "head_flops", "pyramid_grids", "scale_of", "total_classes"]

_PRIOR = 0.01  # FCOS, section 4.1: the initial score of every class
_RADIUS = 1.5  # FCOS, section 3.2 of the journal version: center sampling, in strides
_GROUP = 8  # channels of a group of the normalisation


def convolution(channels: int, width: int, stride: int = 1) -> nn.Sequential:
    """A 3x3 convolution, GroupNorm and ReLU; not BatchNorm, because detectors train with two images."""
    conv = nn.Conv2d(channels, width, 3, stride, padding=1, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return nn.Sequential(conv, nn.GroupNorm(max(1, width // _GROUP), width), nn.ReLU(inplace=True))


def head_flops(width: int, depth: int, classes: int) -> float:
    """Forward FLOPs of `DenseHead` for each place."""
    return 2.0 * 9 * width * (depth * width + classes + 5)


class DenseHead(nn.Module):
    """Maps of one width -> the losses of classes, boxes and centerness.

    Args:
        width: channels of the maps, a multiple of 8.
        depth: convolutions before the predictions.
        classes: K.
        scale: sizes of objects that a level is for, as a share of what FCOS takes at its stride; see `scale_of`.
    """

    def __init__(self, width: int, depth: int, classes: int, scale: float) -> None:
        super().__init__()
        from torchvision.models.detection._utils import BoxLinearCoder

        self.scale = scale
        self.box_coder = BoxLinearCoder(normalize_by_size=True)
        self.tower = nn.Sequential(*(convolution(width, width) for _ in range(depth)))
        self.logits = nn.Conv2d(width, classes, 3, padding=1)
        self.boxes = nn.Conv2d(width, 4 + 1, 3, padding=1)
        for layer in (self.logits, self.boxes):
            assert layer.bias is not None
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.zeros_(layer.bias)
        assert self.logits.bias is not None
        nn.init.constant_(self.logits.bias, -math.log((1 - _PRIOR) / _PRIOR))

    def forward(self, maps: Sequence[Tensor], images: Any, targets: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """The losses.

        Args:
            maps: of the levels, the finest one first, [B, width, H, W] each.
            images, targets: as the detector's own transform gave them (torchvision's ``ImageList``; boxes resized).
        """
        from torchvision.models.detection.fcos import FCOSHead

        predictions: dict[str, list[Tensor]] = {"cls_logits": [], "bbox_regression": [], "bbox_ctrness": []}
        for feature_map in maps:
            shared = self.tower(feature_map)
            boxes = self.boxes(shared).flatten(2).transpose(1, 2)
            predictions["cls_logits"].append(self.logits(shared).flatten(2).transpose(1, 2))
            predictions["bbox_regression"].append(boxes[..., :4].relu())
            predictions["bbox_ctrness"].append(boxes[..., 4:])
        outputs = {name: torch.cat(levels, 1) for name, levels in predictions.items()}
        known = _ASSIGNED.setdefault(images, {})
        key = self.scale, tuple(m.shape[-2:] for m in maps)
        if key not in known:
            known[key] = assign(self.scale, maps, images, targets)
        losses: dict[str, Tensor] = FCOSHead.compute_loss(
            self,  # type: ignore[arg-type]  # it reads `box_coder` of its head
            targets,
            outputs,
            *known[key],
        )
        return losses


#: Of a step's images, by the scale of a head and the sizes of its maps: what `assign` gave. Blocks have it in common.
_ASSIGNED: WeakKeyDictionary[Any, dict[Any, tuple[list[Tensor], list[Tensor]]]] = WeakKeyDictionary()


def assign(
    scale: float, maps: Sequence[Tensor], images: Any, targets: list[dict[str, Tensor]]
) -> tuple[list[Tensor], list[Tensor]]:
    """Of each image its places, float [N, 4], and the object that each of them is to find, int64 [N], -1 for none.

    Args:
        scale, maps, images, targets: as `DenseHead` takes them.
    """
    from torchvision.models.detection import FCOS
    from torchvision.models.detection.anchor_utils import AnchorGenerator

    height, width = images.tensors.shape[-2:]
    strides = [max(height // m.shape[-2], width // m.shape[-1]) for m in maps]
    places = AnchorGenerator(tuple((s * scale,) for s in strides), ((1.0,),) * len(strides))(images, list(maps))
    found = _Assignment(_RADIUS / scale)
    FCOS.compute_loss(
        found,  # type: ignore[arg-type]
        targets,
        {},
        places,
        [m.shape[-2] * m.shape[-1] for m in maps],
    )
    return places, found.objects


class _Assignment:
    """What `FCOS.compute_loss` asks of its model and of the model's head, to which it hands the objects."""

    def __init__(self, center_sampling_radius: float) -> None:
        self.center_sampling_radius = center_sampling_radius
        self.head = self
        self.objects: list[Tensor] = []

    def compute_loss(self, targets: Any, outputs: Any, places: Any, objects: list[Tensor]) -> None:
        self.objects = objects


def pyramid_grids(profile: Profile) -> list[tuple[int, int]]:
    """The maps that the detector itself predicts from, the finest one first.

    They enter one unit together, with one number of channels. A detector without a pyramid: the last map of its trunk.
    """
    for unit in profile.units:
        maps = [f for f in unit.entering if f.layout == "BCHW" and f.grid != (1, 1)]
        if len(maps) > 1 and len({f.channels for f in maps}) == 1:
            return sorted((f.grid for f in maps), reverse=True)
    finest = None
    for unit in profile.units:
        if unit.output is not None and unit.output.layout == "BCHW":
            if finest is not None and unit.output.grid > finest:
                break
            finest = unit.output.grid
    if finest is None:
        raise ConfigError("The model has no maps [B, C, H, W] that a detection head could stand on.")
    return [finest]


def total_classes(model: nn.Module) -> int:
    """The number of classes that the detector predicts, the background included.

    Raises:
        ConfigError: it does not say so in any of torchvision's ways.
    """
    if (classes := classes_of(model)) is not None:
        return classes
    raise ConfigError(
        f"{type(model).__name__} does not say how many classes it predicts; give its classification head an attribute "
        "num_classes, as torchvision's heads have it."
    )


def scale_of(model: nn.Module, profile: Profile) -> float:
    """Sizes of the detector's anchors at their stride, as a share of the published ones: 0.5 for small images.

    Published are anchors of 4 strides for RetinaNet, 1 stride for FCOS (which measures in them), 8 for Faster R-CNN.
    """
    from torchvision.models import detection
    from torchvision.models.detection.anchor_utils import AnchorGenerator

    generator = next((m for m in model.modules() if isinstance(m, AnchorGenerator)), None)
    if generator is None or profile.image is None:
        return 1.0
    usual = 4.0 if isinstance(model, detection.RetinaNet) else 1.0 if isinstance(model, detection.FCOS) else 8.0
    stride = profile.image[0] / pyramid_grids(profile)[0][0]
    return float(min(1.0, generator.sizes[0][0] / (usual * stride)))
