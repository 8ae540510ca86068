"""The published rules: what their papers' losses and networks are, checked against values computed otherwise."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glcan import Learner
from glcan.auxiliary.auglocal import AugLocalAuxiliary, pyramidal, uniform
from glcan.auxiliary.dgl import PooledClassifier
from glcan.auxiliary.infopro import InfoProAuxiliary, contrast, published, scaled
from glcan.auxiliary.predsim import PredSim, PredSimAuxiliary, halvings, similarity
from glcan.errors import ConfigError
from glcan.inspect.features import Feature
from glcan.inspect.isolation import Boundary
from glcan.models import create
from glcan.tasks import Classification


def batch(images: int = 6) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(2)
    return torch.randn(images, 3, 32, 32, generator=draw), torch.arange(images) % 3


def learner(rule: str, blocks: int = 4, **options: Any) -> Learner:
    torch.manual_seed(0)
    model = create("cifar_resnet20", num_classes=10).train()
    return Learner(model, sample=batch(), method=f"{rule}:{blocks}", options=options)


def resnet32(rule: str, **options: Any) -> list[nn.Module]:
    """The auxiliary networks of a ResNet-32 in 16 blocks: its first convolution, and each of its 15 residual blocks."""
    cuts = [f"layer{stage}.{i}" for stage in (1, 2, 3) for i in range(5)]
    model = create("cifar_resnet32", num_classes=10).train()
    made = Learner(model, sample=batch(), method=rule, cuts=cuts, options=options, leak_check=False)
    return list(made.auxiliary.values())


def count(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def feature(channels: int, side: int) -> Feature:
    return Feature((6, channels, side, side), "BCHW", channels, (side, side))


def test_similarity_is_the_correlation_of_rows() -> None:
    rows = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(similarity(rows), torch.corrcoef(rows))


def test_the_loss_of_predsim_by_hand() -> None:
    rule = PredSim({"beta": 0.99})
    task = Classification(classes=10)
    images, labels = batch()
    draw = torch.Generator().manual_seed(4)
    logits, features = torch.randn(6, 10, generator=draw), torch.randn(6, 16, generator=draw)
    wanted = torch.corrcoef(F.one_hot(labels, 10).float())
    by_hand = 0.01 * F.cross_entropy(logits, labels) + 0.99 * ((torch.corrcoef(features) - wanted) ** 2).mean()
    torch.testing.assert_close(rule.local_loss(task, (logits, features), (images, labels)), by_hand)
    soft = F.one_hot(labels, 10).float()
    torch.testing.assert_close(rule.local_loss(task, (logits, features), (images, soft)), by_hand)


@pytest.mark.parametrize(
    ("channels", "side", "window"), [(16, 32, (2, 2)), (32, 16, (2, 1)), (64, 8, (1, 1)), (512, 1, (1, 1))]
)
def test_the_pooling_of_predsim(channels: int, side: int, window: tuple[int, int]) -> None:
    assert halvings(channels, (side, side), 4096) == window


def test_networks_of_predsim() -> None:
    network = PredSimAuxiliary(0, feature(16, 32), 4096, 10, True)
    assert count(network) == (16 * 16 * 16 * 10 + 10) + 16 * 16 * 9
    entering = torch.randn(6, 16, 32, 32)
    logits, features = network(Boundary(0, "", (entering,)), batch())
    assert torch.equal(logits, network.classifier.bias.expand(6, 10))  # it begins at zero
    assert network.matched is not None
    assert features is not None
    torch.testing.assert_close(features, network.matched(entering).std((2, 3)))


def test_networks_of_dgl() -> None:
    network = PooledClassifier(0, feature(16, 32), 3, 3, 10)
    # three 1x1 convolutions with BatchNorm, three hidden layers of 2 x 2 x 16 with BatchNorm, the classifier
    assert count(network) == 3 * (16 * 16 + 32) + 3 * (64 * 64 + 64 + 128) + 64 * 10 + 10
    assert network.grid == (8, 8)
    assert network(Boundary(0, "", (torch.randn(6, 16, 32, 32),)), batch()).shape == (6, 10)


def test_networks_of_infopro() -> None:
    network = InfoProAuxiliary(0, feature(16, 32), (32, 32), 3, True, 128, 5.0, 0.5)
    assert network.decoder is not None
    assert network.classifier is not None
    assert count(network.decoder) == (16 * 12 * 9 + 12) + 24 + (12 * 3 * 9 + 3)
    assert count(network.classifier) == 16 * 32 * 9 + 64 + (32 * 128 + 128) + (128 * 128 + 128)
    loss, features, weight = network(Boundary(0, "", (torch.randn(6, 16, 32, 32),)), batch())
    assert weight == 0.5
    assert features is not None
    assert features.shape == (6, 128)
    assert loss is not None
    assert loss > 0


def test_the_contrastive_loss_by_hand() -> None:
    features = torch.randn(6, 8, generator=torch.Generator().manual_seed(5))
    labels = torch.tensor([0, 0, 1, 1, 1, 2])  # the last one is alone in its class
    unit = features / features.norm(dim=1, keepdim=True)
    logits = unit @ unit.T / 0.07
    each = []
    for i in range(5):
        others = [j for j in range(6) if j != i]
        total = torch.logsumexp(logits[i, others], 0)
        each.append(torch.stack([total - logits[i, j] for j in others if labels[j] == labels[i]]).mean())
    torch.testing.assert_close(contrast(features, labels), torch.stack(each).mean())
    torch.testing.assert_close(contrast(features, F.one_hot(labels, 3).float()), contrast(features, labels))


def test_the_weights_of_infopro_go_from_the_first_block_to_the_last() -> None:
    networks = [network for _, network in learner("infopro", 5).auxiliary.items()]
    assert [network.reconstruct for network in networks] == pytest.approx([5, 5 * 2 / 3, 5 / 3, 0])
    assert [network.classify for network in networks] == pytest.approx([0, 1 / 3, 2 / 3, 1])
    assert networks[0].classifier is None
    assert networks[-1].decoder is None
    assert published(16) == (5.0, 0.0, 0.5, 1.0)
    images = scaled(batch()[0])
    assert images.amin() == 0
    assert images.amax() == 1


def test_the_selection_of_auglocal_is_uniform() -> None:
    # ResNet-32 has 16 layers, the first convolution included; the numbers are those of the authors' code
    assert uniform(0, 16, 2) == [8, 15]
    assert uniform(0, 16, 3) == [5, 10, 15]
    assert uniform(0, 16, 5) == [3, 6, 9, 12, 15]
    assert uniform(4, 16, 2) == [10, 15]  # 9.5: Python rounds a half to the even number
    assert uniform(8, 16, 2) == [12, 15]  # 11.5
    assert uniform(11, 16, 2) == [13, 15]
    assert uniform(13, 16, 2) == [14, 15]  # no more than two are left
    assert uniform(14, 16, 2) == [15]
    assert uniform(15, 16, 2) == []
    for layer in range(60):
        for depth in range(1, 9):
            chosen = uniform(layer, 61, depth)
            gaps = [b - a for a, b in zip([layer, *chosen], chosen, strict=False)]
            assert len(chosen) == min(depth, 60 - layer)
            assert chosen[-1] == 60
            assert max(gaps) - min(gaps) <= 1


def test_the_depth_of_auglocal_is_a_pyramid() -> None:
    places = [k / 14 for k in range(15)]
    # the authors' lists for K = 16: depth 3 and 5 with coefficient 0.5, depth 5 with 1
    assert [pyramidal(3, 1, 0.5, p) for p in places] == [3] * 7 + [2] * 8
    assert [pyramidal(5, 1, 0.5, p) for p in places] == [5] * 4 + [4] * 7 + [3] * 4
    assert [pyramidal(5, 1, 1.0, p) for p in places] == [5] * 2 + [4] * 4 + [3] * 3 + [2] * 4 + [1] * 2
    assert [pyramidal(4, 2, 1.0, p) for p in (0, 0.5, 1)] == [4, 3, 2]
    assert [pyramidal(4, 1, 0.0, p) for p in (0, 1)] == [4, 4]
    networks = [network for _, network in learner("auglocal", 5, depth=4, pyramid=1.0).auxiliary.items()]
    assert [len(network.units) for network in networks] == [4, 3, 2, 1]


def test_networks_of_auglocal() -> None:
    networks = resnet32("auglocal", depth=2)
    assert all(isinstance(network, AugLocalAuxiliary) for network in networks)
    # where a selected layer does not take what is there, the first one of its stage stands for it
    first = ["layer2.0", "layer3.0"]
    assert [network.names for network in networks] == [
        *[first] * 6,
        ["layer2.4", "layer3.0"],
        *[["layer3.0", "layer3.4"]] * 4,
        ["layer3.2", "layer3.4"],
        *[["layer3.3", "layer3.4"]] * 2,
        ["layer3.4"],
    ]
    half, wide, quarter, widest = 13952, 18560, 55552, 73984  # 16 -> 32, 32 -> 32, 32 -> 64, 64 -> 64
    assert half == 16 * 32 * 9 + 32 * 32 * 9 + 4 * 32
    assert widest == 2 * 64 * 64 * 9 + 4 * 64
    head = 64 * 10 + 10
    sizes = [half + quarter + head] * 6 + [wide + quarter + head] + [quarter + widest + head] * 4
    sizes += [2 * widest + head] * 3 + [widest + head]
    assert [count(network) for network in networks] == sizes
    # the authors' code, whose shortcuts have weights where the shape changes (576 and 2176), has 1,564,310
    assert sum(sizes) + 6 * (576 + 2176) + 5 * 2176 == 1_564_310
    shallow = resnet32("auglocal", depth=1)
    assert shallow[0].names == ["", "layer3.4"]  # pooling and a 1x1 convolution, since no layer leads there
    assert count(shallow[0]) == 16 * 64 + 128 + widest + 128 + head  # BatchNorm before the classifier, as theirs
    assert count(shallow[-1]) == widest + 128 + head


def test_networks_of_man() -> None:
    # two convolutions with BatchNorm each, by the channels that they make: 16, 16 -> 32, 32, 32 -> 64, 64
    units = [4672] * 5 + [13952] + [18560] * 4 + [55552] + [73984] * 4
    decoders, classifiers = (2091, 3819, 7275), (10186, 28170, 46602)
    for rule, scale in (("man", 0), ("manpp", 1)):
        networks = resnet32(rule, base="infopro")
        assert [network.names for network in networks] == [[f"layer{s}.{i}"] for s in (1, 2, 3) for i in range(5)]
        for k, network in enumerate(networks):
            decoder, classifier = decoders[k // 5], classifiers[k // 5]  # the counts of the authors' code
            assert count(network.base.decoder) == decoder
            assert count(network.base.classifier) == classifier
            assert count(network) == units[k] + scale + decoder + classifier
            assert count(network.copies) == 0
            weights = [b for n, b in network.copies.named_buffers() if n.endswith(("weight", "bias"))]
            assert sum(b.numel() for b in weights) == units[k]
    # the authors' code, whose shortcuts have weights (576 and 2176), has 956,522 with the scales
    assert sum(count(network) for network in networks) + 576 + 2176 == 956_522


def test_values_that_cannot_be() -> None:
    with pytest.raises(ConfigError, match="nothing trains it"):
        learner("infopro", reconstruct_first=0)
    for rule, options in (
        ("predsim", {"beta": 1.0}),
        ("predsim", {"inputs": 0}),
        ("infopro", {"classify_last": -1}),
        ("dgl", {"layers": -1}),
        ("dgl", {"budget": 0}),
        ("auglocal", {"depth": 0}),
        ("auglocal", {"least": 3}),
        ("auglocal", {"pyramid": 1.5}),
        ("man", {"momentum": 1.0}),
        ("man", {"units": 0}),
        ("manpp", {"classify": -1.0}),
        ("manpp", {"bias": "units"}),
    ):
        with pytest.raises(ConfigError, match=f"{rule}.{next(iter(options))} is "):
            learner(rule, **options)
