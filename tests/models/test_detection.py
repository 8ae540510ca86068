from __future__ import annotations

import pytest
import torch
from torch import nn
from torchvision.models.detection import FCOS, FasterRCNN, RetinaNet
from torchvision.ops import FrozenBatchNorm2d

from glcan.errors import ConfigError, UnknownName
from glcan.models import create, detector_names, names

KINDS = {"retinanet": RetinaNet, "fcos": FCOS, "fasterrcnn": FasterRCNN}


def kind_of(name: str) -> type[nn.Module]:
    return KINDS[name.removeprefix("torchvision/").split("_")[0]]


def test_every_detector_is_an_unmodified_class_of_torchvision() -> None:
    assert {f"torchvision/{kind}_resnet50_fpn" for kind in KINDS} <= set(detector_names())
    assert not set(detector_names()) & set(names())
    for name in detector_names():
        with torch.device("meta"):
            model = create(name, num_classes=6)
        assert type(model) is kind_of(name)
        assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_ours_with_resnet50_is_torchvisions(kind: str) -> None:
    with torch.device("meta"):
        theirs = create(f"torchvision/{kind}_resnet50_fpn", num_classes=6)
        ours = create(f"{kind}_resnet50_fpn", num_classes=6)
    assert {n: v.shape for n, v in ours.state_dict().items()} == {n: v.shape for n, v in theirs.state_dict().items()}
    assert [type(m) for m in ours.modules()] == [type(m) for m in theirs.modules()]
    assert (ours.transform.min_size, ours.transform.max_size) == (theirs.transform.min_size, theirs.transform.max_size)


@pytest.mark.parametrize("name", ["retinanet_small", "fcos_small", "fasterrcnn_resnet18_fpn"])
def test_losses_in_train_mode_and_boxes_in_eval_mode(name: str) -> None:
    model = create(name, num_classes=4, image_size=64)
    images = [torch.rand(3, 64, 64), torch.rand(3, 48, 64)]
    targets = [
        {"boxes": torch.tensor([[4.0, 4.0, 40.0, 44.0]]), "labels": torch.tensor([3])},
        {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)},
    ]
    losses = model.train()(images, targets)
    assert all(loss.dim() == 0 and torch.isfinite(loss) for loss in losses.values())
    with torch.no_grad():
        found = model.eval()(images)
    assert [set(one) for one in found] == [{"boxes", "labels", "scores"}] * 2


@pytest.mark.parametrize(("name", "finest"), [("retinanet_small", 16), ("fcos_small", 32)])
def test_small_detectors_have_three_levels_and_their_anchors(name: str, finest: int) -> None:
    model = create(name, num_classes=4, width=16, channels=32).eval()
    maps = list(model.backbone(torch.rand(1, 3, 128, 128)).values())
    assert [tuple(m.shape[1:]) for m in maps] == [(32, side, side) for side in (finest, finest // 2, finest // 4)]
    assert len(model.anchor_generator.sizes) == 3
    assert model.transform.min_size == (96,)


def test_the_levels_of_fcos_small_share_the_objects() -> None:
    """Each octave of the scenes has its level: small objects the finest alone, large ones the coarsest alone."""
    from torchvision.models.detection.image_list import ImageList

    model = create("fcos_small", num_classes=4, image_size=96).eval()
    maps = list(model.backbone(torch.rand(1, 3, 96, 96)).values())
    anchors = model.anchor_generator(ImageList(torch.rand(1, 3, 96, 96), [(96, 96)]), maps)[0]
    counts = [m.shape[-1] * m.shape[-2] for m in maps]
    matched: list[torch.Tensor] = []
    model.head.compute_loss = lambda targets, outputs, anchors, idxs: matched.append(idxs[0]) or {}
    levels = []
    for side in (16, 34, 68):
        box = torch.tensor([[48 - side / 2, 48 - side / 2, 48 + side / 2, 48 + side / 2]])
        model.compute_loss([{"boxes": box, "labels": torch.tensor([1])}], {}, [anchors], counts)
        levels.append([int((part >= 0).sum()) for part in matched.pop().split(counts)])
    assert [max(range(3), key=level.__getitem__) for level in levels] == [0, 1, 2]
    assert levels[0][1:] == [0, 0]
    assert levels[2][:2] == [0, 0]


def test_the_heads_of_fcos_small_are_torchvisions_with_groups_of_8_channels() -> None:
    from torchvision.models.detection.fcos import FCOSClassificationHead, FCOSHead, FCOSRegressionHead

    head = create("fcos_small", num_classes=4, channels=64).head
    assert [type(m) for m in (head, head.classification_head, head.regression_head)] == [
        FCOSHead,
        FCOSClassificationHead,
        FCOSRegressionHead,
    ]
    groups = [(m.num_groups, m.num_channels) for m in head.modules() if isinstance(m, nn.GroupNorm)]
    assert groups == [(8, 64)] * 4


def test_frozen_normalisation_has_no_batch_statistics() -> None:
    with torch.device("meta"):
        model = create("retinanet_resnet18_fpn", num_classes=4, norm="frozen")
    kinds = {type(m) for m in model.modules()}
    assert FrozenBatchNorm2d in kinds
    assert nn.BatchNorm2d not in kinds


def test_sizes() -> None:
    with torch.device("meta"):
        model = create("retinanet_resnet18_fpn", num_classes=4, image_size=600)
        several = create("torchvision/retinanet_resnet50_fpn", num_classes=4, min_size=[600, 700, 800], max_size=1333)
        theirs = create("torchvision/fasterrcnn_mobilenet_v3_large_320_fpn", num_classes=4)
    assert (model.transform.min_size, model.transform.max_size) == ((600,), 1000)
    assert (several.transform.min_size, several.transform.max_size) == ((600, 700, 800), 1333)
    assert theirs.transform.min_size == (320,)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("retinanet_small", {"in_channels": 1}, "3 channels, not 1"),
        ("retinanet_small", {"num_classes": 1}, "at least 2, background included"),
        ("retinanet_small", {"norm": "group"}, "'batch' or 'frozen'"),
        ("retinanet_small", {"width": 0}, "width=0"),
        ("fcos_small", {"channels": 36}, "multiple of 8"),
        ("fcos_small", {"convs": 0}, "at least 1 convolution"),
        ("retinanet_small", {"anchor_generator": 3}, "cannot be made"),
        ("retinanet_small", {"min_size": []}, "min_size="),
        ("retinanet_small", {"min_size": 100, "max_size": 90}, "at least min_size=100"),
    ],
)
def test_what_cannot_be_made(name: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        create(name, **options)  # type: ignore[arg-type]


def test_unknown_detectors_list_near_names() -> None:
    with pytest.raises(UnknownName, match="retinanet_resnet18_fpn"):
        create("retinanet_resnet19_fpn")
    for name in ("fcos_resnet18_fpn", "torchvision/fcos_resnet50_fpn", "retinanet_small"):
        with pytest.raises(UnknownName, match="'scor_thresh'.*'score_thresh'"):
            create(name, scor_thresh=0.1)
    with pytest.raises(UnknownName, match="torchvision/retinanet_resnet50_fpn"):
        create("torchvision/retinanet_resnet51_fpn")
