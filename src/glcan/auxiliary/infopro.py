"""Information propagation (InfoPro, Wang et al. 2021, arXiv 2101.10832).

Each block's loss is ``l1 * reconstruction + l2 * classification`` (equations 6 and 7): a decoder makes the image of the
features, so that what later blocks may need is not thrown away, and a classifier keeps what the labels need. The
weights go in a straight line from the first block to the last. As in the authors' code for CIFAR: the decoder
upsamples the features to the image's size, a 3x3 convolution to 12 channels with BatchNorm and ReLU, one to the image's
channels, sigmoid, binary cross-entropy; the classifier ("1c2f") is a 3x3 convolution with BatchNorm and ReLU (of stride
2 and twice the channels, or as it is in the last stage), the mean, a hidden layer of 128, and either logits
or 128 features for the supervised contrastive loss (Khosla et al. 2020) at temperature 0.07.

Deviations: the image is scaled to 0..1 by its batch's least and largest value for each channel, where the authors undo
the normalisation of their data; images larger than 32 pixels are reconstructed at an eighth of their size; a boundary
of several tensors is read as its largest map. The default weights are those published for ResNet-110 on CIFAR-10 with
so many blocks.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glcan.auxiliary.base import AuxiliaryRule, Site
from glcan.auxiliary.maps import as_map
from glcan.errors import ConfigError
from glcan.inspect.features import Feature
from glcan.inspect.isolation import Boundary
from glcan.tasks.base import Task
from glcan.tasks.classification import Classification

_DECODER, _HIDDEN, _TEMPERATURE = 12, 128, 0.07
_LARGEST = 32  # pixels of a side that are reconstructed


def published(blocks: int) -> tuple[float, float, float, float]:
    """Weights of reconstruction and classification of the first block, then of the last one."""
    if blocks <= 2:
        return 5.0, 0.5, 0.0, 0.0
    if blocks <= 4:
        return 1.0, 0.0, 0.0, 1.0
    return (5.0, 0.0, 0.0, 1.0) if blocks <= 8 else (5.0, 0.0, 0.5, 1.0)


class InfoPro(AuxiliaryRule):
    """Reconstruction of the image, and contrastive or cross-entropy classification."""

    name: ClassVar[str] = "infopro"
    summary: ClassVar[str] = "information propagation: reconstruction and classification (arXiv 2101.10832)"
    tasks: ClassVar[tuple[str, ...]] = ("classification",)

    @dataclasses.dataclass(frozen=True)
    class Config:
        """Options.

        Attributes:
            mode: "contrast" or "cross_entropy".
            reconstruct_first, classify_first, reconstruct_last, classify_last: weights of the two losses in the first
                block and in the last one with an auxiliary network; none: as published for so many blocks.
        """

        mode: Literal["contrast", "cross_entropy"] = "contrast"
        reconstruct_first: float | None = None
        classify_first: float | None = None
        reconstruct_last: float | None = None
        classify_last: float | None = None

        def __post_init__(self) -> None:
            for field in dataclasses.fields(self)[1:]:
                value = getattr(self, field.name)
                if value is not None and value < 0:
                    raise ConfigError(f"infopro.{field.name} is {value}; it must not be negative.")

    config: Config

    def build(self, site: Site) -> nn.Module:
        assert isinstance(site.task, Classification)
        assert site.task.classes is not None
        config, depth = self.config, site.depth
        given = (config.reconstruct_first, config.classify_first, config.reconstruct_last, config.classify_last)
        usual = published(site.blocks)
        first1, first2, last1, last2 = (u if g is None else g for g, u in zip(given, usual, strict=True))
        reconstruct, classify = first1 + (last1 - first1) * depth, first2 + (last2 - first2) * depth
        if reconstruct + classify <= 0:
            raise ConfigError(
                f"infopro: both weights of the block that ends before {site.cut.name!r} are 0, so nothing trains it; "
                "make one of them positive."
            )
        image = site.profile.image or site.trunk.grid
        outputs = _HIDDEN if config.mode == "contrast" else site.task.classes
        colours = next((m.in_channels for m in site.model.modules() if isinstance(m, nn.Conv2d)), 3)
        return InfoProAuxiliary(
            site.main, site.trunk, image, colours, bool(site.to_come), outputs, reconstruct, classify
        )

    def local_loss(self, task: Task, prediction: Any, batch: tuple[Any, ...]) -> Tensor:
        reconstruction, outputs, classify = prediction
        loss = reconstruction
        if outputs is not None:
            how = contrast(outputs, batch[1]) if self.config.mode == "contrast" else task.local_loss(outputs, batch)
            loss = classify * how if loss is None else loss + classify * how
        assert isinstance(loss, Tensor)
        return loss


def contrast(features: Tensor, labels: Tensor) -> Tensor:
    """The supervised contrastive loss, averaged over the images that have another one of their class in the batch."""
    if labels.is_floating_point():  # probabilities, as mixup gives them
        labels = labels.argmax(1)
    unit = F.normalize(features.float(), dim=1)
    alone = torch.eye(len(unit), dtype=torch.bool, device=unit.device)
    logits = (unit @ unit.T / _TEMPERATURE).masked_fill(alone, float("-inf"))
    chances = logits.log_softmax(1).masked_fill(alone, 0)
    same = (labels[:, None] == labels[None, :]) & ~alone
    count = same.sum(1)
    each = -(chances * same).sum(1) / count.clamp(min=1)
    return each.sum() / (count > 0).sum().clamp(min=1)


class InfoProAuxiliary(nn.Module):
    """A block's map -> the weighted reconstruction loss (or None), logits or features (or None), their weight.

    Args:
        main, feature: the map.
        image: (height, width) of the images.
        colours: their channels.
        halves: more stages follow, so the classifier's convolution has stride 2.
        outputs: of the classifier.
        reconstruct, classify: the weights; what has none is not built.
    """

    def __init__(
        self,
        main: int,
        feature: Feature,
        image: tuple[int, int],
        colours: int,
        halves: bool,
        outputs: int,
        reconstruct: float,
        classify: float,
    ) -> None:
        super().__init__()
        self.main, self.feature = main, feature
        self.reconstruct, self.classify = reconstruct, classify
        smaller = 8 if max(image) > _LARGEST else 1
        self.size = max(1, image[0] // smaller), max(1, image[1] // smaller)
        channels = feature.channels
        self.decoder = (
            nn.Sequential(
                nn.Conv2d(channels, _DECODER, 3, padding=1),
                nn.BatchNorm2d(_DECODER),
                nn.ReLU(inplace=True),
                nn.Conv2d(_DECODER, colours, 3, padding=1),
            )
            if reconstruct
            else None
        )
        wide = 2 * channels if halves else channels
        self.classifier = (
            nn.Sequential(
                nn.Conv2d(channels, wide, 3, 2 if halves else 1, padding=1, bias=False),
                nn.BatchNorm2d(wide),
                nn.ReLU(inplace=True),
                nn.AdaptiveAvgPool2d(1),
                nn.Flatten(),
                nn.Linear(wide, _HIDDEN),
                nn.ReLU(inplace=True),
                nn.Linear(_HIDDEN, outputs),
            )
            if classify
            else None
        )

    def forward(self, boundary: Boundary, batch: Any) -> tuple[Tensor | None, Tensor | None, float]:
        """-> the reconstruction loss, logits or features, their weight."""
        own = as_map(boundary.entering[self.main], self.feature)
        loss = None
        if self.decoder is not None:
            wanted = F.adaptive_avg_pool2d(scaled(batch[0]), self.size)
            made = self.decoder(F.interpolate(own, size=self.size, mode="bilinear", align_corners=True))
            loss = self.reconstruct * F.binary_cross_entropy_with_logits(made, wanted)
        return loss, None if self.classifier is None else self.classifier(own), self.classify


def scaled(images: Tensor) -> Tensor:
    """Each channel's values in the batch to 0..1."""
    least, most = images.amin((0, 2, 3), keepdim=True), images.amax((0, 2, 3), keepdim=True)
    return (images - least) / (most - least).clamp_min(1e-8)
