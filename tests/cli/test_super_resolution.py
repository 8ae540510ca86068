"""The commands on super-resolution: train, evaluate, predict and compare on tiny photographs."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from glcan.data.bicubic import shrink_pixels
from glcan.training import load_model, upscale_picture

QUICK = ["--model", "edsr_baseline", "--model-option", "blocks=1", "--model-option", "channels=4", "--patch", 8]
QUICK += ["--crops", 2, "--batch", 4, "--epochs", 1, "--device", "cpu", "--quiet"]


def opened(path):
    with Image.open(path) as picture:
        return picture.copy()


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """Three train and two test photographs of 48 x 36 pixels."""
    root = tmp_path_factory.mktemp("photos")
    for split, count in (("train", 3), ("test", 2)):
        (root / split).mkdir()
        for i in range(count):
            coarse = np.random.default_rng([i, count]).integers(0, 256, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(coarse).resize((48, 36), Image.Resampling.BILINEAR).save(root / f"{split}/{i}.png")
    return root


@pytest.fixture(scope="session")
def enlarger(glcan, photos, tmp_path_factory):
    """The directory of a finished run."""
    out = tmp_path_factory.mktemp("cli-sr") / "run"
    place = ["--data", "photofolder", "--data-root", photos]
    result = glcan("train", "super-resolution", *QUICK, *place, "--method", "e2e", "--out", out)
    assert result.exit_code == 0, result.output
    assert "test psnr_y: " in result.output
    assert " dB\n" in result.output
    assert "test bicubic_ssim_y: " in result.output
    return out


@pytest.fixture
def small(photos, tmp_path):
    """The test photographs at half their size."""
    (tmp_path / "small").mkdir()
    files = []
    for path in sorted((photos / "test").iterdir()):
        pixels = shrink_pixels(torch.tensor(np.array(opened(path))).permute(2, 0, 1), 2)
        files.append(tmp_path / "small" / f"{path.stem}x2.png")
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(files[-1])
    return files


def test_evaluate_gives_what_the_run_ended_with(glcan, enlarger):
    found = json.loads(glcan("evaluate", enlarger, "--json").output)
    summary = json.loads((enlarger / "summary.json").read_text())
    for metric in summary["metrics"]:
        assert found[metric["name"]] == pytest.approx(metric["value"])
    table = glcan("evaluate", enlarger).output
    assert f"{found['psnr_y']:.2f} dB" in table
    assert f"{found['bicubic_ssim_y']:.4f}" in table


def test_evaluate_on_a_benchmark(glcan, enlarger, photos):
    result = glcan("evaluate", enlarger, "--data", "benchmark", "--data-root", photos / "train", "--tile", 20, "--json")
    found = json.loads(result.output)
    assert (found["data"], found["images"]) == ("benchmark", 3)


def test_evaluate_weights_without_a_run(glcan, enlarger, photos):
    place = ["--data", "benchmark", "--data-root", photos / "test", "--weights", enlarger / "model.safetensors"]
    model = ["--model", "edsr_baseline", "--model-option", "blocks=1", "--model-option", "channels=4"]
    found = json.loads(glcan("evaluate", "--task", "super-resolution", *model, *place, "--json").output)
    assert found["psnr_y"] == pytest.approx(json.loads(glcan("evaluate", enlarger, "--json").output)["psnr_y"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "classification"], "is of the task 'super-resolution'"),
        (["--tile", "3"], "tile=3 pixels"),
        (["--split", "val"], "no images in its 'val' split"),
        (["--scale", "3"], "do not fit the model EDSR"),
    ],
)
def test_evaluate_refuses(glcan, enlarger, arguments, message):
    result = glcan("evaluate", enlarger, *arguments)
    assert result.exit_code == 2
    assert message in result.stderr


def test_predict_enlarges_and_compares_with_the_truth(glcan, enlarger, photos, small):
    result = glcan("predict", enlarger, *small, "--truth", photos / "test", "--json")
    assert result.exit_code == 0, result.output
    entries = json.loads(result.output)["predictions"]
    for entry, file in zip(entries, small, strict=True):
        expected = upscale_picture(load_model(enlarger), opened(file))
        assert opened(entry["enlarged"]).tobytes() == expected.tobytes()
        assert entry["enlarged"] == str(enlarger / "predictions" / f"{file.stem}_x2.png")
        assert opened(entry["crop"]).width > 100
    mean = sum(entry["psnr_y"] for entry in entries) / len(entries)
    assert mean == pytest.approx(json.loads(glcan("evaluate", enlarger, "--json").output)["psnr_y"], abs=1e-4)


def test_predict_keeps_grey_and_alpha_in_a_folder_of_choice(glcan, enlarger, tmp_path):
    for mode in ("L", "RGBA"):
        Image.new(mode, (21, 30)).save(tmp_path / f"{mode}.png")
    files = [tmp_path / "L.png", tmp_path / "RGBA.png"]
    result = glcan("predict", enlarger, *files, "--out", tmp_path / "out", "--tile", 20, "--overlap", 4)
    assert result.exit_code == 0, result.output
    assert "L_x2.png" in result.output
    assert "PSNR" not in result.output
    for mode in ("L", "RGBA"):
        picture = opened(tmp_path / f"out/{mode}_x2.png")
        assert (picture.mode, picture.size) == (mode, (42, 60))


def test_predict_refuses(glcan, enlarger, photos, small, tmp_path, finished):
    (tmp_path / "a").mkdir()
    opened(small[0]).save(tmp_path / "a" / small[0].name)
    for arguments, message in (
        ([small[0], "--top", 2], "--top is not for the run's task"),
        ([small[0], tmp_path / "a" / small[0].name], "Two files are named"),
        ([photos / "test/0.png", "--truth", photos / "test"], "with scale 2 it must be 96 x 72"),
        ([small[0], "--truth", tmp_path / "a/nothing"], "does not exist"),
        ([photos / "train/2.png", "--truth", tmp_path / "a"], "no true image"),
        ([small[0], "--overlap", 200], "overlap=200 pixels"),
        ([tmp_path / "missing.png"], "no such file"),
    ):
        result = glcan("predict", enlarger, *arguments)
        assert result.exit_code == 2, arguments
        assert message in result.stderr
    refused = glcan("predict", finished, small[0], "--tile", 64)
    assert refused.exit_code == 2
    assert "--tile is not for the run's task 'classification'" in refused.stderr


def test_compare_has_a_row_for_bicubic(glcan, photos, tmp_path):
    place = ["--data", "photofolder", "--data-root", photos, "--out", tmp_path / "c"]
    result = glcan("compare", "super-resolution", *QUICK, *place, "--methods", "e2e,checkpoint", "--jobs", 1)
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "c/comparison.json").read_text())
    assert [reference["name"] for reference in found["references"]] == ["bicubic"]
    assert found["methods"][0]["metric"]["unit"] == "dB"
    text = (tmp_path / "c/comparison.md").read_text()
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert "| test psnr y (dB) | Δ (dB) | test ssim y | peak memory |" in lines[0]
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| bicubic", "| e2e", "| checkpoint"]
    bicubic, e2e = found["references"][0]["metric"]["mean"], found["methods"][0]["metric"]["mean"]
    similarity = found["references"][0]["beside"][0]
    assert similarity["name"] == "test_ssim_y"
    assert f"| bicubic | – | {bicubic:.2f} | {bicubic - e2e:+.2f} | {similarity['mean']:.4f} | – |" in text
    assert len({line.count(" | ") for line in lines if "---" not in line}) == 1


def test_settings_of_the_other_task_are_refused(glcan):
    for arguments, message in (
        (["classification", "--scale", 3], "scale = 3 is for super-resolution"),
        (["super-resolution", "--label-smoothing", 0.1], "label_smoothing = 0.1 is for classification"),
    ):
        result = glcan("train", *arguments)
        assert result.exit_code == 2
        assert message in result.stderr


def test_plan(glcan):
    small = ["--model-option", "blocks=4", "--model-option", "channels=8", "--batch", 2, "--image", "16x16"]
    result = glcan("plan", "edsr_baseline", "--task", "super-resolution", "--scale", 3, *small, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.output)
    assert (found["task"], found["image"], found["scale"]) == ("super-resolution", [16, 16], 3)
    assert (found["method"], found["family"]) == ("glcan:4", "local")
    assert found["auxiliary_parameters"] > 0
    assert {"e2e", "checkpoint", "selective"} <= found["baselines"].keys()
    refused = glcan("plan", "cifar_resnet20", "--scale", 3)
    assert refused.exit_code == 2
    assert "--scale 3 is for super-resolution" in refused.stderr
