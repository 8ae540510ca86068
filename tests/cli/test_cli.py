"""The commands: what they print and leave behind, and how they end."""

import json
import os
import signal
import subprocess
import sys
import time
from importlib import metadata

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from glcan import report
from glcan.cli import app
from glcan.cli.options import SETTINGS, configure
from glcan.data import load
from glcan.errors import ConfigError, CutError
from glcan.training import RunConfig, RunDirectory
from glcan.training.config import flag
from glcan.training.side_by_side import cpus

QUICK = ["--limit", "96", "--batch", "32", "--epochs", "2", "--blocks", "2", "--lr", "0.05", "--device", "cpu"]


def test_version(glcan):
    result = glcan("--version")
    assert (result.exit_code, result.output) == (0, f"glcan {metadata.version('glcan')}\n")


@pytest.mark.parametrize("command", ["plan", "train", "compare", "evaluate", "predict", "data", "methods"])
def test_help(glcan, command):
    result = glcan(command, "--help")
    assert result.exit_code == 0
    assert command in result.output


def test_every_setting_has_an_option(glcan):
    assert set(SETTINGS) == set(RunConfig.model_fields) - {"task"}
    text = glcan("train", "--help").output
    assert [name for name in SETTINGS if flag(name) not in text] == []


# ---------------------------------------------------------------- train


def test_train(finished):
    summary = RunDirectory(finished).read_summary()
    config = summary.config
    assert (config.limit, config.batch, config.epochs, config.blocks, config.lr) == (96, 32, 2, 2, 0.05)
    assert (config.val, config.device, config.rule, config.data) == (40, "cpu", "glcan", "digits")


def test_train_again_is_refused_and_resume_reports(glcan, finished):
    refused = glcan("train", *QUICK, "--val", 40, "--out", finished)
    assert refused.exit_code == 2
    assert refused.stderr.startswith("error: ")
    assert "already holds the same run; add --resume" in refused.stderr
    resumed = glcan("train", "--resume", "--out", finished)  # without repeating the settings
    assert resumed.exit_code == 0
    assert "test accuracy: " in resumed.output
    assert str(finished / "model.safetensors") in resumed.output


def test_without_out_a_new_directory_each_time(glcan, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        assert glcan("train", *QUICK, "--epochs", 1, "--quiet").exit_code == 0
    names = sorted(path.name for path in (tmp_path / "runs").iterdir())
    assert names == ["digits-cifar_resnet20-glcan2-seed0", "digits-cifar_resnet20-glcan2-seed0-2"]


def test_options_of_every_kind(glcan, tmp_path):
    arguments = ["--no-nesterov", "--channels-last", "--optimizer", "adamw", "--val", "0.25"]
    arguments += ["--cuts", "layer2.0, layer3.0"]
    for option in ("use_local=true", "budget=0.2", "joint=0"):
        arguments += ["--rule-option", option]
    result = glcan("train", *QUICK[:4], "--epochs", 1, "--lr", 0.001, *arguments, "--out", tmp_path, "--device", "cpu")
    assert result.exit_code == 0, result.output
    summary = RunDirectory(tmp_path).read_summary()
    config = summary.config
    assert (config.nesterov, config.channels_last, config.optimizer, config.val) == (False, True, "adamw", 0.25)
    assert config.rule_options == {"use_local": True, "budget": 0.2, "joint": 0}
    assert summary.cuts == ["layer2.0", "layer3.0"]
    assert summary.blocks == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rule", "glcann"], "Unknown rule 'glcann'. Did you mean 'glcan'"),
        (["--model", "cifar_resnet2"], "Unknown model 'cifar_resnet2'. Did you mean"),
        (["--data", "digit"], "Unknown data set 'digit'. Did you mean 'digits'"),
        (["--lr", "-1", "--epochs", "0"], "lr = -1.0: should be greater than 0; set --lr"),
        (["poetry"], "task = 'poetry': should be 'classification', 'super-resolution' or 'detection'; set TASK"),
        (["--blocks", "1000"], "1000"),
        (["--cuts", "layer3.0,layer2.0"], "order"),
        (["--cuts", "layer9"], "layer9"),
        (["--rule-option", "width"], "--rule-option 'width' is not of the form KEY=VALUE"),
        (["--rule-option", "colour=blue"], "colour"),
        (["--recipe", "cifar10-resnet31"], "Unknown recipe 'cifar10-resnet31'. Did you mean 'cifar10-resnet32'"),
        (["--resume"], "Name it with --out"),
        (["--data", "imagefolder"], "--data-root"),
        (["--rule", "e2e", "--blocks", "4"], "e2e"),
    ],
)
def test_mistakes_end_with_one_message_and_code_2(glcan, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    result = glcan("train", *arguments)
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ")
    assert message in result.stderr
    assert "Traceback" not in result.output
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments",
    [["train", "--colour"], ["train", "--epochs", "many"], ["train", "--schedule", "linear"], ["fly"], ["predict"]],
)
def test_wrong_usage_ends_with_code_2(glcan, arguments):
    assert glcan(*arguments).exit_code == 2


def test_given_over_recipe_over_defaults():
    config = configure("classification", {"epochs": 5, "warmup_epochs": 1}, "cifar10-resnet32")
    assert (config.epochs, config.lr, config.blocks, config.seed) == (5, 0.8, 16, 0)
    assert configure("classification", {"blocks": 8}, "cifar10-resnet32").blocks == 8
    assert configure("classification", {"rule": "e2e"}, "cifar10-resnet32").blocks is None
    assert configure("classification", {"cuts": ["layer2.0"]}, "cifar10-resnet32").blocks is None
    with pytest.raises(ConfigError, match="warmup_epochs = 10 must be less than epochs = 5"):
        configure("classification", {"epochs": 5}, "cifar10-resnet32")


def test_options_of_a_recipe_are_kept(tmp_path):
    path = tmp_path / "own.toml"
    path.write_text("[rule_options]\nbudget = 0.2\nuse_local = false\n")
    config = configure("classification", {"rule_options": {"use_local": True}}, str(path))
    assert config.rule_options == {"budget": 0.2, "use_local": True}


# ---------------------------------------------------------------- evaluate, predict


def test_evaluate_equals_the_summary(glcan, finished):
    result = glcan("evaluate", finished, "--json")
    assert result.exit_code == 0, result.output
    summary, values = RunDirectory(finished).read_summary(), json.loads(result.stdout)
    assert {metric.name: values[metric.name] for metric in summary.metrics} == {
        m.name: m.value for m in summary.metrics
    }
    assert (values["split"], values["images"]) == ("test", 359)
    on_val = json.loads(glcan("evaluate", finished, "--split", "val", "--json").stdout)
    assert on_val["accuracy"] == summary.val_metrics[0].value


def test_evaluate_weights_of_a_model(glcan, finished, tmp_path):
    state = torch.load(finished / "checkpoint.pt", weights_only=True)["learner"]["model"]
    torch.save(state, tmp_path / "weights.pth")
    result = glcan("evaluate", "--model", "cifar_resnet20", "--weights", tmp_path / "weights.pth", "--device", "cpu")
    assert result.exit_code == 0, result.output
    accuracy = RunDirectory(finished).read_summary().metric.value
    assert f"{100 * accuracy:.2f} %" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name the directory of a run, or give --model and --weights"),
        (["nowhere"], "nowhere is no directory of a run"),
        (["--model", "cifar_resnet20", "--weights", "nowhere.pt"], "no weights at nowhere.pt"),
    ],
)
def test_evaluate_without_weights(glcan, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    result = glcan("evaluate", *arguments)
    assert result.exit_code == 2
    assert message in result.stderr


def test_evaluate_another_model(glcan, finished):
    result = glcan("evaluate", finished, "--model", "cifar_resnet32")
    assert result.exit_code == 2
    assert "do not fit the model CifarResNet" in result.stderr


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """Three of the test digits as image files."""
    folder = tmp_path_factory.mktemp("photos")
    from sklearn.datasets import load_digits

    for i, image in enumerate(load_digits().images[:3]):
        Image.fromarray((image * 255 / 16).round().astype("uint8")).save(folder / f"{i}.png")
    return sorted(folder.iterdir())


def test_predict(glcan, finished, photos):
    result = glcan("predict", finished, *photos, "--top", 2, "--json", "--device", "cpu")
    assert result.exit_code == 0, result.output
    predictions = json.loads(result.stdout)["predictions"]
    assert [prediction["file"] for prediction in predictions] == [str(photo) for photo in photos]
    for prediction in predictions:
        first, second = (entry["probability"] for entry in prediction["classes"])
        assert 0 <= second <= first <= 1
        assert prediction["classes"][0]["class"] in load("digits").classes


def test_predict_prepares_images_as_evaluation_does(finished, photos):
    from glcan.data import read_images
    from glcan.training import load_model

    summary = RunDirectory(finished).read_summary()
    with torch.inference_mode():
        expected = load_model(finished)(read_images(photos, summary.preprocessing)).softmax(1)
    result = CliRunner().invoke(app, ["predict", str(finished), *map(str, photos), "--top", "10", "--json"])
    for row, prediction in zip(expected, json.loads(result.stdout)["predictions"], strict=True):
        found = {entry["class"]: entry["probability"] for entry in prediction["classes"]}
        assert [found[name] for name in summary.classes] == pytest.approx(row.tolist(), abs=1e-6)


def test_predict_prints_a_table(glcan, finished, photos):
    result = glcan("predict", finished, photos[0])
    assert result.exit_code == 0
    assert "0.png" in result.output
    assert "%)" in result.output


def test_predict_on_what_is_no_image(glcan, finished, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    for name in ("broken.png", "missing.png"):
        result = glcan("predict", finished, tmp_path / name)
        assert result.exit_code == 2
        assert name in result.stderr
        assert result.stderr.startswith("error: ")


# ---------------------------------------------------------------- the rest


def test_data(glcan):
    result = glcan("data")
    assert result.exit_code == 0
    assert "digits" in result.output
    assert "imagefolder" in result.output
    values = {info["name"]: info for info in json.loads(glcan("data", "--json").stdout)}
    assert values["digits"]["found"]


def test_methods(glcan):
    result = glcan("methods")
    assert result.exit_code == 0
    assert all(name in result.output for name in ("e2e", "checkpoint", "glcan"))


def test_compare_hands_over_what_was_given(glcan, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(report, "compare", lambda *args, **kwargs: calls.append((args, kwargs)))
    monkeypatch.setattr("glcan.report.tables.terminal", lambda comparison: "the table")
    monkeypatch.chdir(tmp_path)
    assert glcan("compare").exit_code == 0
    assert glcan("compare", "--batch", "4").exit_code == 0
    assert calls.pop()[0][1] == ["e2e", "checkpoint", "glcan:4", "glcan:8"]
    quiet = glcan("compare", "--methods", "e2e, glcan:2", "--seeds", "3,4", "--lr", "0.2", "--quiet", "--jobs", "3")
    assert quiet.exit_code == 0
    assert "the table" in quiet.output
    (config, methods, seeds, out), options = calls[0]
    assert (config, seeds) == (RunConfig(), [0])
    assert methods == ["e2e", "checkpoint", "e2e+accumulate:4", "glcan:4", "glcan:8"]
    assert str(out) == "runs/compare-digits-cifar_resnet20"
    assert options == {"progress": True, "share_exact": False, "jobs": 1 if torch.cuda.is_available() else 2 * cpus()}
    (config, methods, seeds, out), options = calls[1]
    assert (config.lr, methods, seeds, options) == (
        0.2,
        ["e2e", "glcan:2"],
        [3, 4],
        {"progress": False, "share_exact": False, "jobs": 3},
    )
    calls.clear()
    assert [glcan("compare", "detection", *flag).exit_code for flag in ([], ["--train-exact"])] == [0, 0]
    assert [options["share_exact"] for _, options in calls] == [True, False]
    refused = glcan("compare", "--seeds", "one")
    assert refused.exit_code == 2
    assert "--seeds 'one' is no list of whole numbers" in refused.stderr


@pytest.mark.parametrize("methods", [[], ["--methods", "e2e,glcan:8"]])
def test_the_default_comparison_leaves_out_what_the_model_is_too_small_for(glcan, tmp_path, monkeypatch, methods):
    tried = []

    def comparing(config, names, *args, **kwargs):
        tried.append(names)
        if "glcan:8" in names:
            raise CutError("blocks=8, but this model can be cut into 1 to 5 blocks.")

    monkeypatch.setattr(report, "compare", comparing)
    monkeypatch.chdir(tmp_path)
    result = glcan("compare", *methods)
    if methods:
        assert result.exit_code == 2
        assert "1 to 5 blocks" in result.stderr
        assert tried == [["e2e", "glcan:8"]]
    else:
        assert result.exit_code == 0
        assert tried[1:] == [["e2e", "checkpoint", "e2e+accumulate:4", "glcan:4"]]


def test_compare(glcan, tmp_path):
    arguments = ["--limit", 64, "--batch", 32, "--epochs", 1, "--device", "cpu", "--share-exact", "--jobs", 1]
    result = glcan("compare", *arguments, "--methods", "e2e,glcan:2,checkpoint", "--out", tmp_path)
    assert result.exit_code == 0, result.output
    comparison = json.loads((tmp_path / "comparison.json").read_text())
    assert [method["name"] for method in comparison["methods"]] == ["e2e", "glcan:2", "checkpoint"]
    assert [method["metric"]["same_as"] for method in comparison["methods"]] == [None, None, "e2e"]
    assert not (tmp_path / "checkpoint").exists()
    assert comparison["methods"][1]["vs_e2e"]["activation_ratio"] < 1


# ---------------------------------------------------------------- as a process


def start(*arguments, **options):
    command = [sys.executable, "-m", "glcan", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def test_a_mistake_in_a_process():
    process = start("train", "--rule", "glcann")
    output, errors = process.communicate(timeout=100)
    assert process.returncode == 2
    assert output == ""
    assert errors == "error: Unknown rule 'glcann'. Did you mean 'glcan', 'auglocal'?\n"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stopping_a_process(tmp_path, number, code):
    process = start("train", *QUICK, "--epochs", 100000, "--out", tmp_path)
    deadline = time.monotonic() + 100
    while not (tmp_path / "checkpoint.pt").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(process.pid, number)
    _, errors = process.communicate(timeout=100)
    assert process.returncode == code, errors
    assert f"Continue with: glcan train --resume --out {tmp_path}" in errors
    assert "Traceback" not in errors
    progress = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["progress"]
    assert progress["step"] > 0


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stopping_a_comparison_side_by_side(tmp_path, number, code):
    small = ["--limit", 96, "--batch", 32, "--epochs", 100000, "--device", "cpu", "--jobs", 2, "--out", tmp_path]
    process = start("compare", *small, "--methods", "e2e,glcan:2", start_new_session=True)
    runs = [RunDirectory(tmp_path / folder / "seed0") for folder in ("e2e", "glcan-2")]
    deadline = time.monotonic() + 100

    def epochs(run):
        return len(run.metrics.read_text().splitlines()) if run.checkpoint.exists() else 0

    # the first of ten has long been shown
    while min(map(epochs, runs)) < 10 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, number)  # as a terminal does
    _, errors = process.communicate(timeout=100)
    assert process.returncode == code, errors
    assert errors.endswith(f"Stopped. The same command with --out {tmp_path} continues.\n")
    assert "Traceback" not in errors
    assert "e2e, seed 0: epoch 1/100000" in errors
    for run in runs:
        assert torch.load(run.checkpoint, weights_only=True)["progress"]["step"] > 0


# ---------------------------------------------------------------- plan

PLAN = ["plan", "cifar_resnet20", "--batch", "64"]


def test_plan_prints_one_json_object(glcan):
    result = glcan(*PLAN, "--blocks", 4, "--rule-option", "joint=0", "--json")
    assert result.exit_code == 0
    found = json.loads(result.stdout)
    assert (found["model"], found["task"], found["batch"]) == ("cifar_resnet20", "classification", 64)
    assert (found["blocks"], len(found["cuts"]), found["image"]) == (4, 3, [32, 32])
    assert set(found["by_kind"]) == {
        "parameters",
        "gradients",
        "optimizer_state",
        "activations",
        "auxiliary",
        "inputs",
    }
    assert sum(found["by_kind"].values()) == found["peak_bytes"]
    assert found["auxiliary_parameters"] > 0
    assert found["vs_e2e"].keys() == {"peak_ratio", "activation_ratio", "flops_ratio"}
    assert found["vs_e2e"]["activation_ratio"] < 0.5
    assert found["vs_checkpoint"].keys() == {"checkpoint", "checkpoint-sqrt"}
    assert found["flops_per_step"] > 0


def test_plan_prints_tables(glcan):
    result = glcan(*PLAN, "--memory", "60MiB")
    assert result.exit_code == 0
    assert "Fits 60MiB" in result.output
    assert "checkpoint-sqrt" in result.output
    assert "block2: layer" in result.output


def test_plan_finds_the_largest_batches(glcan):
    result = glcan("plan", "cifar_resnet20", "--memory", "64MiB", "--max-batch", "--blocks", 3, "--json")
    assert result.exit_code == 0
    rows = {row["method"]: row for row in json.loads(result.stdout)["largest_batch"]}
    assert rows["glcan:3"]["batch"] > rows["e2e"]["batch"] > 0
    assert all(row["peak_bytes"] <= 64 * 2**20 for row in rows.values())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["plan", "cifar_resnet21"], "cifar_resnet20"),
        ([*PLAN, "--image", "0x32"], "is no image size"),
        ([*PLAN, "--image", "large"], "is no image size"),
        ([*PLAN, "--batch", "0"], "must be at least 2"),
        ([*PLAN, "--memory", "8"], "no unit"),
        ([*PLAN, "--memory", "8Gigs"], "unknown"),
        ([*PLAN, "--memory", "-1GiB"], "not positive"),
        ([*PLAN, "--memory", "5MiB"], "No plan fits 5 MiB"),
        ([*PLAN, "--memory", "1GiB", "--blocks", "4"], "not both"),
        ([*PLAN, "--max-batch"], "needs a budget"),
        ([*PLAN, "--blocks", "99"], "can be cut into 1 to"),
        ([*PLAN, "--cuts", "layer9"], "layer"),
        ([*PLAN, "--rule", "glcann"], "glcan"),
        ([*PLAN, "--rule-option", "budgt=1"], "budget"),
        ([*PLAN, "--optimizer", "sdg"], "sgd"),
        ([*PLAN, "--precision", "fp8"], "fp32 or bf16"),
        ([*PLAN, "--task", "detektion"], "detection"),
        (["plan", "timm/vit_tiny_patch16_224", "--image", "225x97", "--batch", "2"], "225"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value[1:]),
)
def test_plan_refuses_in_one_line(glcan, arguments, said):
    result = glcan(*arguments)
    assert result.exit_code == 2
    assert said in result.stderr
    assert "Traceback" not in result.output + result.stderr


def test_train_within_a_budget(glcan, tmp_path):
    quick = ["--limit", "64", "--batch", "32", "--epochs", "1", "--device", "cpu", "--model", "cifar_resnet20"]
    result = glcan("train", *quick, "--memory", "12MiB", "--out", tmp_path / "run")
    assert result.exit_code == 0, result.output
    assert RunDirectory(tmp_path / "run").read_summary().blocks > 1
    refused = glcan("train", *quick, "--memory", "2MiB", "--out", tmp_path / "small")
    assert refused.exit_code == 2
    assert "No plan fits 2 MiB" in refused.stderr
    assert not (tmp_path / "small").exists()
