"""Runs of super-resolution: metrics, resumption, and what is refused before anything is written."""

import math
import os
import signal

import numpy as np
import pytest
from PIL import Image

from glcan.data import load_pairs
from glcan.errors import ConfigError, DataError, NonFiniteLoss, UnknownName
from glcan.training import RunConfig, evaluate, load_data, load_model, read_metrics, train
from glcan.training.image_quality import evaluate_bicubic


@pytest.fixture
def photos(tmp_path):
    """Five train and two test photographs of 48 x 36 pixels."""
    for split, count in (("train", 5), ("test", 2)):
        (tmp_path / "photos" / split).mkdir(parents=True)
        for i in range(count):
            coarse = np.random.default_rng([i, count]).integers(0, 256, (8, 8, 3), dtype=np.uint8)
            picture = Image.fromarray(coarse).resize((48, 36), Image.Resampling.BILINEAR)
            picture.save(tmp_path / f"photos/{split}/{i}.png")
    return tmp_path / "photos"


@pytest.fixture
def tiny(photos):
    def config(**fields):
        defaults = {
            "task": "super-resolution",
            "model": "edsr_baseline",
            "model_options": {"blocks": 2, "channels": 4},
            "data": "photofolder",
            "data_root": photos,
            "patch": 8,
            "crops": 2,
            "batch": 3,
            "val": 2,
            "epochs": 3,
            "method": "e2e",
            "device": "cpu",
        }
        return RunConfig(**(defaults | fields))

    return config


def test_a_run_ends_with_psnr_ssim_and_bicubic(tiny, tmp_path):
    summary = train(tiny(), tmp_path / "run", progress=False)
    assert (summary.metric.name, summary.metric.unit) == ("psnr_y", "dB")
    assert (summary.steps, summary.blocks, summary.classes) == (6, 1, [])
    assert summary.preprocessing == {"channels": 3, "scale": 2, "pixel_range": 1.0}
    found = {metric.name: metric.value for metric in summary.metrics}
    data = load_data(summary.config)
    assert evaluate(load_model(tmp_path / "run"), data) == pytest.approx(found)
    bicubic = evaluate_bicubic(data)
    assert {name: found[f"bicubic_{name}"] for name in bicubic} == bicubic
    assert [metric.name for metric in summary.val_metrics] == list(found)
    records = read_metrics(tmp_path / "run")
    assert [("val_psnr_y" in r, "test_psnr_y" in r) for r in records] == [(True, False), (True, False), (True, True)]


def test_checkpointing_computes_what_end_to_end_does(tiny, tmp_path, same_run):
    train(tiny(), tmp_path / "e2e", progress=False)
    train(tiny(method="checkpoint"), tmp_path / "checkpoint", progress=False)
    same_run(tmp_path / "e2e", tmp_path / "checkpoint")


@pytest.mark.parametrize("settings", [{}, {"criterion": "charbonnier", "schedule": "halving", "channels_last": True}])
def test_interrupted_and_resumed(tiny, tmp_path, before_step, same_run, settings):
    train(tiny(**settings), tmp_path / "whole", progress=False)
    before_step(4, lambda learner: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        train(tiny(**settings), tmp_path / "parts", progress=False)
    train(tiny(**settings), tmp_path / "parts", resume=True, progress=False)
    same_run(tmp_path / "whole", tmp_path / "parts")


def test_a_loss_that_is_not_finite(tiny, tmp_path, before_step):
    before_step(3, lambda learner: next(learner.model.parameters()).data.fill_(math.nan))
    with pytest.raises(NonFiniteLoss, match="The loss of block1 became nan at step 3"):
        train(tiny(), tmp_path / "run", progress=False)


def test_bicubic_is_measured_once(tiny, monkeypatch):
    from glcan.training import image_quality

    calls = []
    original = image_quality.evaluate_bicubic
    monkeypatch.setattr(image_quality, "evaluate_bicubic", lambda *args: calls.append(args) or original(*args))
    data = load_data(tiny())
    assert image_quality.bicubic_of(data, "test") == image_quality.bicubic_of(data, "test")
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"model": "cifar_resnet20", "model_options": {}}, ConfigError, "classifies images"),
        ({"model": "edsr_base"}, UnknownName, "edsr_baseline"),
        ({"patch": 21}, DataError, r"smaller than a patch of 42 .*at most 18"),
        ({"data": "cifar10"}, ConfigError, "for classification"),
        ({"data": "benchmark", "val": 0}, DataError, "no training images"),
        ({"model": "tiny_model:twice", "model_options": {}, "scale": 3}, ConfigError, r"needs \(2, 3, 24, 24\)"),
    ],
)
def test_nothing_is_written_before_the_settings_work(tiny, tmp_path, fields, error, message):
    with pytest.raises(error, match=message):
        train(tiny(**fields), tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def test_tiles_only_change_the_overlaps(tiny, tmp_path):
    train(tiny(epochs=1), tmp_path / "run", progress=False)
    model, data = load_model(tmp_path / "run"), load_pairs("photographs")
    whole, tiled = evaluate(model, data), evaluate(model, data, tile=128)
    assert tiled == pytest.approx(whole, rel=1e-4)
