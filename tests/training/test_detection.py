"""COCO's metrics against pycocotools, detections of a model, and how they are evaluated."""

from __future__ import annotations

import contextlib
import copy
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.data.detection_files import write_coco, write_image
from torch import Tensor, nn

from glcan.data import load_detection
from glcan.data.scenes import Scenes
from glcan.errors import ConfigError, DataError
from glcan.models import create
from glcan.training.detection import COCO_METRICS, coco_metrics, coco_results, detect, detect_files, evaluate_detection

SIDE = 400


def made_up(images: int = 12, seed: int = 0) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Annotations with crowds, all sizes and areas smaller than the boxes; predictions near them, and false ones."""
    draw = np.random.default_rng(seed)
    annotations: list[dict[str, Any]] = []
    results: list[dict[str, Any]] = []
    categories = [{"id": number, "name": f"kind {number}"} for number in (2, 5, 11)]
    for image in range(1, images + 1):
        for _ in range(0 if image == 3 else 130 if image == 4 else draw.integers(1, 15)):
            side = float(np.exp(draw.uniform(np.log(8), np.log(220))))
            width, height = side * draw.uniform(0.6, 1.5), side * draw.uniform(0.6, 1.5)
            x, y = draw.uniform(0, SIDE - 10, 2)
            category, crowd = int(draw.choice([2, 5, 11])), int(draw.random() < 0.1)
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image,
                    "category_id": category,
                    "bbox": [float(x), float(y), width, height],
                    "area": width * height * draw.uniform(0.4, 1),
                    "iscrowd": crowd,
                }
            )
            for _ in range(draw.integers(0, 4 if crowd else 3)):
                shift = draw.normal(0, 0.08, 4) * side
                results.append(
                    {
                        "image_id": image,
                        "category_id": category if draw.random() < 0.9 else 5,
                        "bbox": [x + shift[0], y + shift[1], max(2, width + shift[2]), max(2, height + shift[3])],
                        "score": round(draw.random(), 2),  # with ties
                    }
                )
        for _ in range(draw.integers(0, 6)):
            box = [*draw.uniform(0, SIDE, 2), *draw.uniform(4, 100, 2)]
            results.append({"image_id": image, "category_id": 11, "bbox": box, "score": draw.random()})
    listed = [
        {"id": image, "file_name": f"{image}.jpg", "width": SIDE, "height": SIDE} for image in range(1, images + 1)
    ]
    plain = json.loads(json.dumps(results, default=float))
    return {"images": listed, "annotations": annotations, "categories": categories}, plain


def pycocotools(truth: Path, results: list[dict[str, Any]]) -> list[float]:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):
        ground_truth = COCO(str(truth))
        evaluation = COCOeval(ground_truth, ground_truth.loadRes(copy.deepcopy(results)), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return [float(value) for value in evaluation.stats]


@pytest.mark.parametrize("seed", [0, 1])
def test_metrics_on_coco_layout_are_those_of_pycocotools(tmp_path: Path, seed: int) -> None:
    content, results = made_up(seed=seed)
    content["images"] = [image | {"width": SIDE, "height": SIDE} for image in content["images"]]
    (tmp_path / "annotations").mkdir()
    for name in ("train2017", "val2017"):
        (tmp_path / f"annotations/instances_{name}.json").write_text(json.dumps(content))
        for image in content["images"]:
            write_image(tmp_path / name / image["file_name"], (SIDE, SIDE))
    assert any(entry["iscrowd"] for entry in content["annotations"])
    assert max(sum(r["image_id"] == i for r in results) for i in range(1, 13)) > 100  # the limit of detections counts
    wanted = pycocotools(tmp_path / "annotations/instances_val2017.json", results)
    assert min(wanted) > 0.01
    data = load_detection("coco", root=tmp_path, verify=False)
    before = copy.deepcopy(results)
    found = coco_metrics(data.ground_truth("test"), results)
    assert list(found) == list(COCO_METRICS)
    assert list(found.values()) == pytest.approx(wanted, abs=1e-4)
    assert results == before


def test_perfect_no_and_foreign_detections(tmp_path: Path) -> None:
    write_coco(tmp_path)
    truth = load_detection("coco", root=tmp_path).ground_truth("test")
    perfect = [
        {key: entry[key] for key in ("image_id", "category_id", "bbox")} | {"score": 0.9}
        for entry in truth["annotations"]
        if not entry["iscrowd"]
    ]
    metrics = coco_metrics(truth, perfect)
    assert (metrics["map"], metrics["map_small"]) == (pytest.approx(1), pytest.approx(1))
    assert "map_large" not in metrics  # there is no such object
    # a second detection on the crowd is neither right nor wrong
    crowd = next(entry for entry in truth["annotations"] if entry["iscrowd"])
    extra = [{"image_id": crowd["image_id"], "category_id": crowd["category_id"], "bbox": crowd["bbox"], "score": 1.0}]
    assert coco_metrics(truth, perfect + extra) == metrics
    assert coco_metrics(truth, [])["map"] == 0
    with pytest.raises(DataError, match="of image 99"):
        coco_metrics(truth, [perfect[0] | {"image_id": 99}])
    with pytest.raises(DataError, match="no object to find"):
        coco_metrics(truth | {"annotations": [crowd]}, [])


def test_results_have_the_categories_of_the_file() -> None:
    prediction = {
        "boxes": torch.tensor([[1.0, 2, 4, 8], [0, 0, 1, 1]]),
        "labels": torch.tensor([2, 3]),
        "scores": torch.tensor([0.5, 0.75]),
    }
    assert coco_results([prediction], [17], [3, 7]) == [
        {"image_id": 17, "category_id": 7, "bbox": [1, 2, 3, 6], "score": 0.5}
    ]


class Oracle(nn.Module):
    """Knows the answers, in the order in which it is asked."""

    def __init__(self, answers: list[dict[str, Tensor]]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.answers = list(answers)

    def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        assert not self.training
        assert not torch.is_grad_enabled()
        torch.rand(1)
        taken, self.answers = self.answers[: len(images)], self.answers[len(images) :]
        return [{**answer, "scores": torch.ones(len(answer["labels"]))} for answer in taken]


def test_evaluation_of_a_model() -> None:
    data = Scenes(size=64, train=2, test=10)
    answers = [target for _, targets in data.loader("test", 4) for target in targets]
    state = torch.get_rng_state()
    model = Oracle(answers).train()
    batches: list[int] = []
    metrics = evaluate_detection(model, data, batch=4, each_batch=lambda: batches.append(1))
    assert metrics["map"] == metrics["map_50"] == pytest.approx(1)
    assert (len(batches), model.training) == (3, True)
    assert torch.equal(torch.get_rng_state(), state)
    swapped = [{**answer, "labels": answer["labels"] % len(data.classes) + 1} for answer in answers]
    assert evaluate_detection(Oracle(swapped), data)["map"] < 0.1
    with torch.no_grad():
        model.weight.fill_(float("nan"))
    assert np.isnan(evaluate_detection(model, data)["map"])


def test_what_is_no_detector_is_refused() -> None:
    data = Scenes(size=64, train=2, test=2)
    for output in (torch.zeros(2, 10), [torch.zeros(3)] * 2, [{"boxes": torch.zeros(0, 4)}] * 2, []):
        model = Oracle([])
        model.forward = lambda images, output=output: output  # type: ignore[method-assign,misc]
        with pytest.raises(ConfigError, match="a list with a dict of boxes, labels and scores"):
            detect(model, data)
    with pytest.raises(DataError, match="no images in its 'val' split"):
        detect(Oracle([]), data, "val")


def test_a_real_detector_on_files(tmp_path: Path) -> None:
    write_image(tmp_path / "grey.png", (70, 50), "L")
    write_image(tmp_path / "colour.jpg", (64, 64))
    model = create("fcos_small", num_classes=4, image_size=64, score_thresh=0.0).train()
    found = list(detect_files(model, [tmp_path / "grey.png", tmp_path / "colour.jpg"]))
    assert [tuple(pixels.shape) for _, pixels, _ in found] == [(3, 50, 70), (3, 64, 64)]
    assert model.training
    boxes = found[0][2]["boxes"]
    assert len(boxes)
    assert (boxes <= torch.tensor([70.0, 50, 70, 50]) + 1e-3).all()
    with pytest.raises(DataError, match=r"none.png' cannot be read"):
        list(detect_files(model, [tmp_path / "none.png"]))
