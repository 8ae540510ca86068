"""The published rules: what their papers' losses and networks are, checked against values computed otherwise."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glcan import LocalLearner
from glcan.errors import ConfigError
from glcan.isolation import Boundary
from glcan.models import create
from glcan.profile import Feature
from glcan.rules.dgl import PooledClassifier
from glcan.rules.infopro import InfoProAuxiliary, contrast, published, scaled
from glcan.rules.predsim import PredSim, PredSimAuxiliary, halvings, similarity
from glcan.tasks import Classification


def batch(images: int = 6) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(2)
    return torch.randn(images, 3, 32, 32, generator=draw), torch.arange(images) % 3


def learner(rule: str, blocks: int = 4, **options: Any) -> LocalLearner:
    torch.manual_seed(0)
    model = create("cifar_resnet20", num_classes=10).train()
    return LocalLearner(model, sample=batch(), blocks=blocks, rule=rule, rule_options=options)


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


def test_values_that_cannot_be() -> None:
    with pytest.raises(ConfigError, match="nothing trains it"):
        learner("infopro", reconstruct_first=0)
    for rule, options in (
        ("predsim", {"beta": 1.0}),
        ("predsim", {"inputs": 0}),
        ("infopro", {"classify_last": -1}),
        ("dgl", {"layers": -1}),
        ("dgl", {"budget": 0}),
    ):
        with pytest.raises(ConfigError, match=f"{rule}.{next(iter(options))} is "):
            learner(rule, **options)
