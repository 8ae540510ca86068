"""A detection run: trained, interrupted, resumed, evaluated, used on files."""

from __future__ import annotations

import json
import math
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.data.detection_files import write_coco, write_image
from typer.testing import CliRunner

from glcan.cli import app
from glcan.data import scenes
from glcan.errors import ConfigError, DataError, NonFiniteLoss, UnknownName
from glcan.report import costs
from glcan.training import RunConfig, build, load_data, load_model, load_recipe, recipe_names, train
from glcan.training.schedule import learning_rate


@pytest.fixture(autouse=True)
def _few_scenes(monkeypatch: pytest.MonkeyPatch) -> None:
    defaults = scenes.Scenes.__init__.__kwdefaults__ | {"train": 24, "test": 6}
    monkeypatch.setattr(scenes.Scenes.__init__, "__kwdefaults__", defaults)


def few(**fields: Any) -> RunConfig:
    options = {"width": 8, "channels": 32}
    defaults = {"task": "detection", "model_options": options, "image_size": 64, "limit": 12, "batch": 4, "epochs": 2}
    return RunConfig(**(defaults | {"device": "cpu"} | fields))


def test_defaults_of_the_task() -> None:
    config = RunConfig(task="detection")
    assert (config.model, config.data, config.optimizer, config.clip_norm) == ("fcos_small", "scenes", "adamw", 5.0)
    assert RunConfig(task="detection", lr=0.5).lr == 0.5
    assert RunConfig().model == "cifar_resnet20"
    with pytest.raises(ConfigError, match="label_smoothing = 0.1 is for classification.*--label-smoothing"):
        RunConfig(task="detection", label_smoothing=0.1)


def test_a_run_and_its_metrics(tmp_path: Path) -> None:
    summary = train(few(val=6), tmp_path / "run", progress=False)
    assert (summary.metric.name, summary.metric.unit) == ("map", "fraction")
    assert {"map", "map_50", "map_75", "mar_100"} <= {metric.name for metric in summary.metrics}
    assert summary.val_metrics
    assert summary.classes == scenes.kinds()[0]
    assert summary.preprocessing == {"channels": 3, "size": 64}
    assert (summary.steps, summary.blocks) == (6, 4)
    model = load_model(tmp_path / "run")
    assert not model.training
    assert model.transform.min_size == (64,)


@pytest.mark.parametrize("step", [2, 3, 5])
def test_an_interrupted_run_ends_as_if_never_interrupted(
    tmp_path: Path, step: int, before_step: Callable[..., None], same_run: Callable[[Path, Path], None]
) -> None:
    config = few(method="checkpoint", model="retinanet_small")
    train(config, tmp_path / "whole", progress=False)
    before_step(step, lambda learner: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path / "cut", progress=False)
    train(config, tmp_path / "cut", resume=True, progress=False)
    same_run(tmp_path / "whole", tmp_path / "cut")


def test_checkpointing_learns_what_e2e_learns(tmp_path: Path, same_run: Callable[[Path, Path], None]) -> None:
    for method in ("e2e", "checkpoint"):
        train(few(method=method), tmp_path / method, progress=False)
    same_run(tmp_path / "e2e", tmp_path / "checkpoint")


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path: Path, before_step: Callable[..., None]) -> None:
    def spoil(learner: Any) -> None:
        with torch.no_grad():
            next(learner.model.head.parameters()).fill_(math.nan)

    before_step(2, spoil)
    with pytest.raises(NonFiniteLoss, match="block4"):
        train(few(), tmp_path / "run", progress=False)


def test_what_does_not_fit_is_refused_before_training(tmp_path: Path) -> None:
    data = load_data(few())
    with pytest.raises(UnknownName, match="Unknown option of 'glcan' 'look_ahead'"):  # is for classification
        build(few(options={"look_ahead": 1}), data)
    with pytest.raises(ConfigError, match="cifar_resnet20.*(refuses|returned)"):
        build(few(model="cifar_resnet20", model_options={}), data)
    with pytest.raises(DataError, match="not in COCO's layout"):
        train(few(data="coco", data_root=tmp_path), tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def test_test_images_without_objects_are_refused_before_training(tmp_path: Path) -> None:
    write_coco(tmp_path / "coco")
    path = tmp_path / "coco/annotations/instances_val2017.json"
    content = json.loads(path.read_text())
    crowds = [entry | {"iscrowd": 1} for entry in content["annotations"]]
    for entries in ([], crowds):
        path.write_text(json.dumps(content | {"annotations": entries}))
        with pytest.raises(DataError, match="no mAP can be computed"):
            train(few(data="coco", data_root=tmp_path / "coco"), tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def test_images_of_mixed_sizes_from_files(tmp_path: Path) -> None:
    write_coco(tmp_path / "coco")
    config = few(data="coco", data_root=tmp_path / "coco", batch=2, epochs=1, model="retinanet_small")
    summary = train(config, tmp_path / "run", progress=False)
    assert summary.classes == ["dog", "cat"]


def test_the_command_that_plans() -> None:
    def found(*arguments: str, method: str = "e2e") -> dict[str, Any]:
        common = ["--task", "detection", "--method", method, "--batch", "2", "--json"]
        result = CliRunner().invoke(app, ["plan", *arguments, *common])
        assert result.exit_code == 0, result.output
        plan: dict[str, Any] = json.loads(result.output)
        return plan

    small = found("fcos_small", "--image", "64x96", "--classes", "3")
    assert (small["task"], small["image"]) == ("detection", [64, 96])
    own = ["--model-option", "min_size=64", "--model-option", "max_size=96"]
    asked = found("fcos_small", "--image", "64x96", "--classes", "3", *own)
    assert asked["peak_bytes"] == small["peak_bytes"]  # the model does not resize what it is planned for
    assert found("fcos_small")["image"] == [96, 96]
    for method in ("dgl:4", "glcan:4"):
        local = found("fcos_small", "--image", "160x160", method=method)
        assert (local["method"], local["family"], local["blocks"]) == (method, "local", 4)
        assert local["auxiliary_parameters"] > 0
        assert local["vs_e2e"]["activation_ratio"] < 0.7


def test_the_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    def glcan(*arguments: str, code: int = 0) -> str:
        result = CliRunner().invoke(app, list(arguments))
        assert result.exit_code == code, result.output
        return result.output

    small = ["--image-size", "64", "--limit", "8", "--batch", "4", "--epochs", "1", "--device", "cpu"]
    low = ["--model-option", "score_thresh=0.0"]
    assert "test map:" in glcan("train", "detection", "--out", "run", "--quiet", *small, *low)
    evaluated = json.loads(glcan("evaluate", "run", "--json"))
    assert evaluated["images"] == 6
    summary = json.loads(Path("run/summary.json").read_text())
    assert evaluated["map"] == summary["metric"]["value"]
    glcan("evaluate", "run", "--task", "classification", code=2)
    write_image(tmp_path / "a/one.jpg", (90, 70))
    write_image(tmp_path / "b/one.png", (50, 60), "L")
    output = json.loads(glcan("predict", "run", "a/one.jpg", "b/one.png", "--min-score", "0", "--json"))
    assert [Path(entry["picture"]).is_file() for entry in output["predictions"]] == [True, True]
    assert len({entry["picture"] for entry in output["predictions"]}) == 2
    assert json.loads(Path("run/predictions/predictions.json").read_text()) == output
    assert set(output["predictions"][0]["objects"][0]) == {"class", "box", "score"}
    table = glcan("predict", "run", "a/one.jpg", "--min-score", "1", "--out", "elsewhere")
    assert "none" in table
    assert "--top is not for the run's task 'detection'" in glcan("predict", "run", "a/one.jpg", "--top", "2", code=2)
    assert Path("elsewhere/one.png").is_file()
    for name in ("MIN_ROUNDS", "MAX_ROUNDS", "WARMUP_ROUNDS"):
        monkeypatch.setattr(costs, name, 1)
    glcan("compare", "detection", "--out", "compared", "--quiet", "--jobs", "1", *small)
    compared = json.loads(Path("compared/comparison.json").read_text())
    assert [method["name"] for method in compared["methods"]] == ["e2e", "checkpoint", "glcan:4", "selective"]
    assert compared["methods"][1]["metric"]["same_as"] == "e2e"
    assert {method["metric"]["name"] for method in compared["methods"]} == {"test_map"}


def test_a_tenth_at_the_milestones() -> None:
    config = few(schedule="tenths", epochs=9, lr=1.0, warmup_epochs=0)
    rates = [learning_rate(config, step, 10) for step in range(90)]
    assert rates == pytest.approx([1.0] * 60 + [0.1] * 20 + [0.01] * 10)
    own = few(schedule="tenths", milestones=[0.5], epochs=2, lr=1.0, warmup_epochs=0)
    assert [learning_rate(own, step, 2) for step in range(4)] == pytest.approx([1, 1, 0.1, 0.1])
    with pytest.raises(ConfigError, match="milestones = .* need schedule = 'halving' or 'tenths'"):
        few(milestones=[0.5])
    with pytest.raises(ConfigError, match="fractions between 0 and 1"):
        few(schedule="tenths", milestones=[0.5, 0.4])


def test_the_recipe_of_coco() -> None:
    assert "coco-retinanet-r50" in recipe_names()
    config = load_recipe("coco-retinanet-r50")
    assert (config.task, config.model, config.data) == ("detection", "retinanet_resnet50_fpn", "coco")
    from glcan.training import create_model

    with torch.device("meta"):
        model = create_model(config, 80, (3, config.image_size, config.image_size))
    assert model.transform.min_size == (600, 640, 680, 720, 760, 800)
    assert model.transform.max_size == 1333
    assert model.head.classification_head.num_classes == 81
