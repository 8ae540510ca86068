"""GLCAN: Global-Local Collaborative Auxiliary Network (arXiv 2406.00446).

The paper's text beyond its abstract was not at hand; this is our construction in its spirit (docs/rules/glcan.md says
what is ours). The auxiliary network of a block has

- a *local branch*: what the task needs of the block's own features, at their own scale;
- a *global branch*: a macro-skeleton of the network that is still to come, one light unit for each remaining stage,
  with the real network's down-sampling, so that the local loss sees the receptive field of the final head;
- *collaboration*: both together go into a head of the task's own kind.

Its input is reduced to the first remaining stage's resolution before anything is computed, and the width of the
skeleton is solved for a compute budget.

Shape letters: B batch, C channels, H x W map, N tokens.
"""

from __future__ import annotations

import dataclasses
import math
import weakref
from collections.abc import Iterable
from typing import ClassVar, Literal

import torch
from torch import nn

from glcan.errors import ConfigError
from glcan.profile import Feature, Unit
from glcan.rules.backbone import followers, layers, move_towards
from glcan.rules.base import Joint, Rule, Site
from glcan.rules.dense_head import DenseHead, pyramid_grids, scale_of, total_classes
from glcan.rules.glcan.classification import ClassificationAuxiliary, LookAhead
from glcan.rules.glcan.detection import STEP, DetectionAuxiliary, fit_width, levels_of, pyramid_flops
from glcan.rules.glcan.skeleton import (
    BackboneSkeleton,
    Level,
    Skeleton,
    fit_widths,
    skeleton_levels,
    strides_of,
    widths_of,
)
from glcan.rules.glcan.super_resolution import SuperResolutionAuxiliary, fit
from glcan.tasks.base import Task
from glcan.tasks.classification import Classification
from glcan.tasks.detection import Detection
from glcan.tasks.super_resolution import SuperResolution

_BUDGETS = {"classification": 0.07, "super-resolution": 0.045, "detection": 0.09}
_LONG_ENDS = {"classification": 0.0, "super-resolution": 0.32, "detection": 0.08}
_JOINT = {"super-resolution": Joint(0.5, 1.0), "detection": Joint(0.75, 1.0)}
_CHOSEN = Joint(0.5, 1.0, by_gradient=True)  # for which BatchNorm sees the whole batch
# Classification: `_CHOSEN` of a batch of so many images at least. Where images cannot be chosen, so many are the joint
# ones and the others at least, for the statistics of BatchNorm: few blocks have `_FEW` of every batch that leaves as
# many others; more of them have `_MANY` where a K-th of the batch is fewer.
_LEAST_IMAGES = 16
_FEW_BLOCKS, _FEW = 4, Joint(0.875, 1.0)
_MANY = Joint(0.75, 1.0)
_OF_JOINT = ("joint", "joint_weight", "joint_by", "long_end")  # options that count without auxiliary networks
_UNIT_SHARES = {"classification": 0.6, "super-resolution": 0.3, "detection": 0.0}
# Classification with light units, and super-resolution: how far networks of the same structure are drawn together.
_COUPLING = 0.1
# Super-resolution: channels of the map at full resolution in the local branch, at most.
_WIDEST = 64
# Detection: convolutions before the head's predictions; the shares of an auxiliary network that it may cost to read the
# maps that pass by.
_TOWER, _PASSING = 2, 4


class GLCAN(Rule):
    """Light auxiliary networks with a local and a global branch, within a compute budget."""

    name: ClassVar[str] = "glcan"
    summary: ClassVar[str] = "global-local collaborative auxiliary networks (arXiv 2406.00446; our construction)"
    tasks: ClassVar[tuple[str, ...]] = ("classification", "super-resolution", "detection")

    @dataclasses.dataclass(frozen=True)
    class Config:
        """Options.

        Attributes:
            budget: forward FLOPs of all auxiliary networks together, as a share of the model's; none: the task's own
                default, 0.07 for classification, 0.045 for super-resolution, 0.09 for detection.
            unit_share: each auxiliary network may cost this share of the model's average unit even where the budget
                would give it less, as with many blocks; none: the task's own default, 0.6 for classification, 0.3 for
                super-resolution, 0 for detection (most of a detector is its heads).
            unit_cost: each unit of the skeleton may cost this share of the real unit that it stands for; 0: no limit.
            memory: bytes that an auxiliary network may hold, in multiples of the model's largest boundary. With 2, it
                hardly ever sets the peak: the backward pass of a block that ends at that boundary needs as much anyway.
            depth: of the skeleton, at least: with fewer stages to come, the last one's unit is repeated.
            use_local: the local branch; none: on, but for classification only where the skeleton cannot do without it:
                where that is narrower than there are classes, or special tokens or other tensors enter, which it does
                not read.
            use_global: the global branch.
            width: channels of the skeleton's units as a share of the real stages'; none: solved for the budget.
            unit: "conv" (a 3x3 convolution), or "backbone" (a full-width copy of the remaining stages' first units,
                as earlier work has it; the budget does not apply).
            momentum: before each pass the copies become ``momentum * copy + (1 - momentum) * real unit``; needs
                ``unit="backbone"``; none: no exchange.
            coupling: before each pass, three or more auxiliary networks of the same structure, behind units of the same
                class, move this share of the way to their mean; 0: each goes its own way; none: 0.1 for classification
                with ``unit="conv"`` and for super-resolution, else 0.
            look_ahead: where no more than this many units are to come, copies of them and of the classifier stand in
                place of both branches, if they cost no more than a third of all auxiliary networks; 0: nowhere.
            pyramid_maps: detection: maps of the block that pass by the cut on their way to the detector's own pyramid
                are read as well, if the narrowest network that does costs no more than four shares. The planner does
                not know of their cost when it chooses the cuts.
            long_end: units of the last block, which learns as in end-to-end training, are recomputed so that it can be
                longer within the memory of the other blocks, up to this share of the model's forward FLOPs; 0: not;
                none: the task's own default, 0.32 for super-resolution, 0.08 for detection, 0 for classification.
            joint: share of each batch on which all blocks learn end to end, see `glcan.rules.Joint`; none: the task's
                own default, 0.5 for super-resolution, 0.75 for detection. For classification 0.5 of batches of 16 and
                more where the model lets images be chosen; else 0.875 with up to four blocks and batches of 128 and
                more; else 1 / K where that is 16 images or more; else 0.75 where the batch has at least 64, and 0 in
                smaller ones.
            joint_weight: of that gradient in all blocks but the last one; with 1 there are no auxiliary networks; none:
                1 for super-resolution, detection and the 0.875, 0.75 and 0.5 of classification, else the share itself.
            joint_by: with a weight of 1, which images these are: "gradient", those with large gradients behind the last
                cut, or "order", the first ones of the batch; none: "gradient" for classification where the model allows
                it (`Profile.by_image`), else "order".
        """

        budget: float | None = None
        unit_share: float | None = None
        unit_cost: float = 0.5
        memory: float = 2.0
        depth: int = 4
        use_local: bool | None = None
        use_global: bool = True
        width: float | None = None
        unit: Literal["conv", "backbone"] = "conv"
        momentum: float | None = None
        coupling: float | None = None
        look_ahead: int = 2
        pyramid_maps: bool = True
        long_end: float | None = None
        joint: float | None = None
        joint_weight: float | None = None
        joint_by: Literal["gradient", "order"] | None = None

        def __post_init__(self) -> None:
            if self.budget is not None and not 0 < self.budget <= 10:
                raise ConfigError(
                    f"glcan.budget is {self.budget}; it must lie in (0, 10], 0.1 for a tenth of the model."
                )
            if self.unit_share is not None and not 0 <= self.unit_share <= 10:
                raise ConfigError(f"glcan.unit_share is {self.unit_share}; it must lie in [0, 10], 0 for none.")
            if not 0 <= self.unit_cost <= 10:
                raise ConfigError(f"glcan.unit_cost is {self.unit_cost}; it must lie in [0, 10], 0 for no limit.")
            if not 1 <= self.depth <= 16:
                raise ConfigError(f"glcan.depth is {self.depth}; it must lie in 1 ... 16.")
            if not self.memory > 0:
                raise ConfigError(
                    f"glcan.memory is {self.memory}; it must be positive, 2 for twice the largest boundary."
                )
            if self.use_local is False and not self.use_global:
                raise ConfigError("glcan.use_local and glcan.use_global are both off; leave at least one branch on.")
            if self.width is not None and not 0 < self.width <= 4:
                raise ConfigError(f"glcan.width is {self.width}; it must lie in (0, 4], 1 for the real stages' width.")
            if self.momentum is not None and not 0 <= self.momentum < 1:
                raise ConfigError(
                    f"glcan.momentum is {self.momentum}; it must lie in [0, 1): 1 would freeze the copies for good."
                )
            if self.coupling is not None and not 0 <= self.coupling <= 1:
                raise ConfigError(
                    f"glcan.coupling is {self.coupling}; it must lie in [0, 1], 0 for networks that go their own way."
                )
            if self.joint is not None and not 0 <= self.joint < 1:
                raise ConfigError(
                    f"glcan.joint is {self.joint}; it must lie in [0, 1), 0.25 for a quarter of each batch, 0 for none."
                )
            if self.joint_weight is not None and not 0 < self.joint_weight <= 1:
                raise ConfigError(f"glcan.joint_weight is {self.joint_weight}; it must lie in (0, 1].")
            if not 0 <= self.look_ahead <= 16:
                raise ConfigError(f"glcan.look_ahead is {self.look_ahead}; it must lie in 0 ... 16, 0 for nowhere.")
            if self.long_end is not None and not 0 <= self.long_end <= 1:
                raise ConfigError(
                    f"glcan.long_end is {self.long_end}; it must lie in [0, 1], 0 for nothing that is recomputed."
                )
            if self.momentum is not None and (self.unit != "backbone" or not self.use_global):
                raise ConfigError(
                    f"glcan.momentum is {self.momentum}, but it exchanges weights with the real units, so it needs "
                    "unit='backbone' and use_global=True. Set these, or leave momentum out."
                )

    config: Config

    def build(self, site: Site) -> nn.Module:
        if isinstance(site.task, Classification):
            return self._classification(site, site.task)
        if self.config.unit == "backbone":
            raise ConfigError(f"glcan.unit='backbone' is for classification; leave it out for {site.task.name}.")
        if isinstance(site.task, SuperResolution):
            return self._super_resolution(site, site.task)
        if isinstance(site.task, Detection):
            return self._detection(site, site.task)
        raise ConfigError(f"The rule 'glcan' serves {', '.join(self.tasks)}, not {site.task.name!r}.")

    def _local(self, needed: bool = True) -> bool:
        """Whether there is a local branch: as the user says, else where it is needed."""
        return needed if self.config.use_local is None else self.config.use_local

    def _share(self, site: Site) -> float:
        """Forward FLOPs that an auxiliary network may cost, for the whole batch."""
        weighted = sum(unit.weights > 0 for unit in site.profile.units)
        budget = self.config.budget or _BUDGETS[site.task.name]
        unit_share = self.config.unit_share
        if unit_share is None:
            unit_share = _UNIT_SHARES[site.task.name]
        return site.profile.flops * max(budget / max(1, site.blocks - 1), unit_share / max(1, weighted))

    def _detection(self, site: Site, task: Detection) -> nn.Module:
        transform = getattr(site.model, "transform", None)
        if not isinstance(transform, nn.Module):
            raise ConfigError(
                f"{type(site.model).__name__} has no sub-module 'transform', which torchvision's detectors "
                "resize images and boxes with; the auxiliary networks need the boxes as the model sees them."
            )
        pyramid, classes = pyramid_grids(site.profile), total_classes(site.model)
        each = self._share(site) / site.profile.batch
        read = list(range(len(site.features)))
        features, levels = site.features, levels_of(site.features, pyramid)
        if self.config.pyramid_maps and self.config.use_global:
            # What passes by is read where the detector will read it.
            passing = [i for i, f in enumerate(site.skipping) if f.grid in pyramid]
            wider = (*features, *(site.skipping[i] for i in passing))
            grids = levels_of(wider, pyramid)
            if pyramid_flops(wider, grids, STEP, _TOWER, classes) <= _PASSING * each:
                features, levels = wider, grids
                read += [len(site.features) + i for i in passing]
        if not self.config.use_global:
            levels = levels[:1]
        if self.config.width is not None:
            width = max(8, 8 * round(self.config.width * site.trunk.channels / 8))
        else:
            width = fit_width(features, levels, _TOWER, classes, each)
        head = DenseHead(width, _TOWER, classes, scale_of(site.model, site.profile))
        return DetectionAuxiliary(features, read, levels, task, transform, head, width, self._local())

    def _super_resolution(self, site: Site, task: SuperResolution) -> nn.Module:
        assert task.channels is not None
        feature = site.trunk
        image = site.profile.image or feature.grid
        scale = max(1, round(task.scale * image[0] / feature.grid[0]))
        local, wide = self._local(), self.config.use_global
        each = self._share(site) / (site.profile.batch * math.prod(feature.grid))
        kernel, context = fit(feature.channels, task.channels, scale, local, wide, each)
        if wide and self.config.width is not None:
            context = max(8, 8 * round(self.config.width * feature.channels / 8))
        return SuperResolutionAuxiliary(site.main, feature, task.channels, scale, _WIDEST, kernel, context)

    def _classification(self, site: Site, task: Classification) -> nn.Module:
        assert task.classes is not None
        units = self._units_ahead(site)
        if units:
            return LookAhead(site.main, site.model, units, classifier_after(site, units[-1]), task.classes)
        feature = site.trunk
        skeleton: Skeleton | BackboneSkeleton | None = None
        grid: tuple[int, int] | None = None
        if self.config.use_global and self.config.unit == "backbone":
            skeleton = BackboneSkeleton(site)
        elif self.config.use_global:
            levels = skeleton_levels(site, feature, self.config.depth)
            grid = levels[0].grid
            skeleton = self._skeleton(site, feature, levels)
        behind = site.profile.units[site.cut.index - 1].kind
        unread = len(site.features) > 1 or site.trunk.prefix > 0  # by the skeleton
        local = self._local(skeleton is None or unread or skeleton.narrowest < task.classes)
        return ClassificationAuxiliary(site.main, site.features, grid, local, skeleton, task.classes, behind)

    def _units_ahead(self, site: Site) -> list[Unit]:
        """The units for `LookAhead`; none if there is to be none."""
        config = self.config
        if not config.use_global or config.unit != "conv" or config.width is not None:
            return []
        ahead = {unit.name for unit in layers(site.profile) if unit.index >= site.cut.index}
        if not 0 < len(ahead) <= config.look_ahead:
            return []
        found = followers(site, len(ahead))
        affordable = sum(unit.flops for unit in found) <= self._share(site) * (site.blocks - 1) / 3
        return found if affordable and ahead <= {unit.name for unit in found} else []

    def _skeleton(self, site: Site, feature: Feature, levels: list[Level]) -> Skeleton:
        share = self._share(site)
        if self.config.width is not None:
            widths = widths_of(feature.channels, levels, self.config.width, math.inf)
        else:
            largest = max(sum(f.bytes for f in site.profile.unit(name).entering) for name in site.profile.cuttable)
            memory = self.config.memory * largest / site.profile.batch
            widths = fit_widths(
                feature.channels, levels, share / site.profile.batch, memory, self.config.unit_cost or math.inf
            )
        return Skeleton(feature.channels, widths, strides_of(levels))

    def segments(self, auxiliary: nn.Module) -> list[list[str]]:
        if isinstance(auxiliary, LookAhead):
            return [[f"units.{i}"] for i in range(len(auxiliary.units))]
        skeleton = auxiliary.skeleton if isinstance(auxiliary, ClassificationAuxiliary) else None
        if skeleton is None:
            return []
        names = [f"skeleton.units.{name}" for name, _ in skeleton.units.named_children()]
        if isinstance(skeleton, BackboneSkeleton):
            return [[name] for name in names]
        return [names[i : i + 3] for i in range(0, len(names), 3)]  # convolution, normalisation, activation

    def long_end(self, task: Task) -> float:
        return _LONG_ENDS[task.name] if self.config.long_end is None else self.config.long_end

    def joint(self, task: Task, blocks: int, batch: int, by_image: bool = False) -> Joint:
        if blocks == 1 or self.config.joint == 0:
            return Joint()
        own = _JOINT.get(task.name)
        by = self.config.joint_by or ("order" if own else None)
        chosen = (by_image and by != "order") or by == "gradient"
        if self.config.joint is not None:
            found = Joint(self.config.joint, own.weight if own else self.config.joint, by_gradient=chosen)
        elif own is not None:
            found = _CHOSEN if chosen else own
        else:
            found = self._of_classification(blocks, batch, chosen)
        weight = self.config.joint_weight or found.weight
        given = [f.name for f in dataclasses.fields(self.config) if getattr(self.config, f.name) != f.default]
        if weight == 1 and (useless := [name for name in given if name not in _OF_JOINT]):
            raise ConfigError(
                f"glcan.{useless[0]} is {getattr(self.config, useless[0])!r}, but there are no auxiliary networks with "
                f"joint_weight 1{'' if self.config.joint_weight else f', the default of {task.name} here'}. "
                "Leave it out, or set joint_weight below 1 or joint to 0."
            )
        return dataclasses.replace(found, weight=weight, by_gradient=found.by_gradient and weight == 1)

    def _of_classification(self, blocks: int, batch: int, chosen: bool) -> Joint:
        """The joint images by default: without local learning where that can be without harm to BatchNorm."""
        if self.config.joint_weight in (None, 1):
            if self.config.joint_by == "gradient" or (chosen and batch >= _LEAST_IMAGES):
                return _CHOSEN
            if blocks <= _FEW_BLOCKS and batch - _FEW.images(batch) >= _LEAST_IMAGES:
                return _FEW
            if batch // blocks < _LEAST_IMAGES and batch - _MANY.images(batch) >= _LEAST_IMAGES:
                return _MANY
        return Joint(1 / blocks, 1 / blocks, _LEAST_IMAGES)

    def before_pass(self, auxiliary: nn.ModuleDict, model: nn.Module) -> None:
        own = [network for network in auxiliary.values() if not isinstance(network, LookAhead)]
        share = self.config.coupling
        if share is None:
            light = self.config.unit == "conv" and own and not isinstance(own[0], DetectionAuxiliary)
            share = _COUPLING if light else 0.0
        if share:
            draw_together(own, share)
        for network in auxiliary.values():
            if isinstance(network, LookAhead):
                network.follow(model)
            elif self.config.momentum is not None:
                skeleton = network.skeleton
                assert isinstance(skeleton, BackboneSkeleton)
                move_towards(skeleton.names, skeleton.units, model, self.config.momentum)


def classifier_after(site: Site, last: Unit) -> str | None:
    """The linear layer that classifies the last unit's averaged map, if nothing else with weights is behind it."""
    assert isinstance(site.task, Classification)
    assert last.output is not None
    behind = [unit for unit in site.profile.units[last.index + 1 :] if unit.parameters]
    if len(behind) != 1:
        return None
    module = site.model.get_submodule(behind[0].name)
    fits = isinstance(module, nn.Linear) and module.weight.shape == (site.task.classes, last.output.channels)
    return behind[0].name if fits else None


_STRUCTURES: weakref.WeakKeyDictionary[nn.Module, str] = weakref.WeakKeyDictionary()


@torch.no_grad()
def draw_together(networks: Iterable[nn.Module], share: float) -> None:
    """Three or more networks of the same structure move this share of the way to their mean, their buffers do not.

    Elastic averaging (Zhang, Choromanska & LeCun 2015, arXiv 1412.6651), among networks that learn from different
    blocks instead of different data.
    """
    alike: dict[str, list[nn.Module]] = {}
    for network in networks:
        if network not in _STRUCTURES:
            shapes = [(name, tuple(parameter.shape)) for name, parameter in network.named_parameters()]
            _STRUCTURES[network] = f"{network!r} {shapes}"
        alike.setdefault(_STRUCTURES[network], []).append(network)
    for group in alike.values():
        for together in zip(*(network.parameters() for network in group), strict=True) if len(group) > 2 else ():
            mean = sum(together[1:], start=together[0].detach()) / len(together)
            for parameter in together:
                parameter.lerp_(mean, share)
