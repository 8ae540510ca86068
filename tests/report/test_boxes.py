from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import Tensor

from glcan.report.boxes import COLOURS, describe_boxes, draw_boxes

CLASSES = ["cat", "dog"]


def prediction() -> dict[str, Tensor]:
    return {
        "boxes": torch.tensor(
            [[5.0, 20.0, 30.0, 45.0], [-10.0, 2.0, 90.0, 70.0], [60.0, 40.0, 70.0, 50.0], [4.0, 4, 4, 9]]
        ),
        "labels": torch.tensor([1, 2, 1, 1]),
        "scores": torch.tensor([0.6, 0.9, 0.2, 0.8]),
    }


def colour(text: str) -> tuple[int, ...]:
    return tuple(int(text[i : i + 2], 16) for i in (1, 3, 5))


def test_boxes_are_drawn_in_the_colours_of_their_classes() -> None:
    image = np.asarray(draw_boxes(torch.zeros(3, 60, 80, dtype=torch.uint8), prediction(), CLASSES))
    assert image.shape == (60, 80, 3)
    assert tuple(image[45, 15]) == colour(COLOURS[0])
    assert tuple(image[59, 40]) == colour(COLOURS[1])  # cut at the border
    assert tuple(image[50, 65]) == (0, 0, 0)  # of low score
    assert not np.asarray(
        draw_boxes(torch.zeros(3, 60, 80, dtype=torch.uint8), prediction(), CLASSES, min_score=1)
    ).any()


def test_ground_truth_without_scores_is_drawn_too() -> None:
    truth = {key: value for key, value in prediction().items() if key != "scores"}
    image = np.asarray(draw_boxes(torch.zeros(3, 60, 80, dtype=torch.uint8), truth, CLASSES))
    assert tuple(image[50, 65]) == colour(COLOURS[0])
    assert describe_boxes(truth, CLASSES)[0] == {"class": "cat", "box": [5, 20, 30, 45]}


def test_description() -> None:
    found = describe_boxes(prediction(), CLASSES)
    assert [entry["class"] for entry in found] == ["dog", "cat"]
    assert found[1] == {"class": "cat", "box": [5, 20, 30, 45], "score": pytest.approx(0.6)}
    assert json.loads(json.dumps(found)) == found
    odd = {key: value[:1] for key, value in prediction().items()} | {"labels": torch.tensor([7])}
    assert describe_boxes(odd, CLASSES)[0]["class"] == "class 7"
    draw_boxes(torch.zeros(3, 60, 80, dtype=torch.uint8), odd, CLASSES)


def test_no_box_at_all() -> None:
    none = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64), "scores": torch.zeros(0)}
    pixels = torch.randint(0, 256, (3, 20, 30), dtype=torch.uint8)
    assert np.array_equal(np.asarray(draw_boxes(pixels, none, CLASSES)), pixels.permute(1, 2, 0).numpy())
    assert describe_boxes(none, CLASSES) == []
