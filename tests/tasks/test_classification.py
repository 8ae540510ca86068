"""The task of classification: losses, what it reads from models, and what it refuses."""

from __future__ import annotations

import dataclasses
from collections import namedtuple
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from glcan import tasks
from glcan.errors import ConfigError, DataError, UnknownName
from glcan.tasks import Classification

LOGITS = torch.randn(4, 10)
LABELS = torch.tensor([0, 3, 9, 1])
IMAGES = torch.zeros(4, 3, 8, 8)


def test_by_name_or_as_it_is() -> None:
    assert tasks.names() == sorted(tasks.names())
    assert "classification" in tasks.names()
    assert isinstance(tasks.create("classification"), Classification)
    mine = Classification(label_smoothing=0.1)
    assert tasks.create(mine) is mine
    with pytest.raises(UnknownName, match="'classificaton'.*'classification'"):
        tasks.create("classificaton")


def test_losses() -> None:
    plain, smooth = Classification(), Classification(label_smoothing=0.1)
    batch = (IMAGES, LABELS)
    assert plain.loss(LOGITS, batch) == plain.local_loss(LOGITS, batch) == F.cross_entropy(LOGITS, LABELS)
    assert smooth.loss(LOGITS, batch) == smooth.local_loss(LOGITS, batch)
    assert smooth.loss(LOGITS, batch) == F.cross_entropy(LOGITS, LABELS, label_smoothing=0.1)
    mixed = torch.rand(4, 10).softmax(1)
    assert plain.loss(LOGITS, (IMAGES, mixed)) == F.cross_entropy(LOGITS, mixed)
    own = Classification(criterion=lambda logits, labels: logits.sum() * labels.sum())
    assert own.loss(LOGITS, batch) == own.local_loss(LOGITS, batch) == LOGITS.sum() * 13
    assert plain.arguments(batch) == ((IMAGES,), {})


@dataclasses.dataclass
class Output:
    logits: Any
    loss: Any = None


@pytest.mark.parametrize(
    "output",
    [
        LOGITS,
        {"features": IMAGES, "logits": LOGITS},
        Output(LOGITS),
        (LOGITS, IMAGES),
        [LOGITS],
        namedtuple("GoogLeNetOutputs", "logits aux")(LOGITS, IMAGES),
    ],
)
def test_logits_are_found(output: Any) -> None:
    assert Classification.logits(output) is LOGITS


@pytest.mark.parametrize("output", [None, {}, {"boxes": LOGITS}, [], ("a", LOGITS)])
def test_no_logits(output: Any) -> None:
    with pytest.raises(ConfigError, match="classification needs logits"):
        Classification.logits(output)


def test_the_number_of_classes_is_the_models() -> None:
    task = Classification()
    task.prepare(((4, 10), (4, 7)), (IMAGES, LABELS))
    assert task.classes == 10
    task.prepare(((4, 20),), (IMAGES, LABELS + 10))
    assert task.classes == 20, "another model, another number"
    given = Classification(classes=12)
    given.prepare(((4, 3, 2, 2),), (IMAGES, LABELS))
    assert given.classes == 12


@pytest.mark.parametrize(("labels", "wrong"), [(LABELS + 1, 10), (LABELS - 1, -1), (LABELS * 100, 900)])
def test_labels_out_of_range(labels: torch.Tensor, wrong: int) -> None:
    with pytest.raises(DataError, match=f"A label is {wrong}, but the model gives 10 classes.*0 ... 9"):
        Classification().prepare(((4, 10),), (IMAGES, labels))


@pytest.mark.parametrize(
    ("labels", "found"),
    [
        (LABELS.float(), r"float32 of shape \[4\]"),
        (LABELS.int(), r"int32 of shape \[4\]"),
        (LABELS[:3], r"int64 of shape \[3\]"),
        (LABELS[:, None], r"int64 of shape \[4, 1\]"),
        (torch.rand(4, 9), r"float32 of shape \[4, 9\]"),
        (LABELS.tolist(), "list"),
    ],
)
def test_labels_of_another_form(labels: Any, found: str) -> None:
    with pytest.raises(DataError, match=rf"Labels are {found}; with 4 images and 10 classes.*int64 of shape \[4\]"):
        Classification().prepare(((4, 10),), (IMAGES, labels))
    Classification(criterion=lambda logits, labels: logits.sum()).prepare(((4, 10),), (IMAGES, labels))


def test_labels_of_either_form() -> None:
    for labels in (LABELS, LABELS.to(torch.uint8), torch.rand(4, 10), torch.rand(4, 10).double()):
        Classification().prepare(((4, 10),), (IMAGES, labels))


def test_what_does_not_fit() -> None:
    with pytest.raises(ConfigError, match="this one has 3 items"):
        Classification().prepare(((4, 10),), (IMAGES, LABELS, LABELS))
    with pytest.raises(ConfigError, match=r"\(4, 10, 8, 8\).*classification needs logits"):
        Classification().prepare(((4, 10, 8, 8),), (IMAGES, LABELS))
    for smoothing in (-0.1, 1.0):
        with pytest.raises(ConfigError, match="label_smoothing"):
            Classification(label_smoothing=smoothing)
    Classification().prepare(((4, 10),), (IMAGES, torch.rand(4, 10)))
    Classification().prepare(((0, 10),), (IMAGES[:0], LABELS[:0]))
