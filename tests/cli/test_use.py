"""`glcan evaluate` and `glcan predict`: what a finished run is good for."""

import json
import shutil

import pytest
import torch

from glcan.data import load
from glcan.training import RunDirectory


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


def test_predict(glcan, finished, digits):
    result = glcan("predict", finished, *digits, "--top", 2, "--json", "--device", "cpu")
    assert result.exit_code == 0, result.output
    predictions = json.loads(result.stdout)["predictions"]
    assert [prediction["file"] for prediction in predictions] == [str(digit) for digit in digits]
    for prediction in predictions:
        first, second = (entry["probability"] for entry in prediction["classes"])
        assert 0 <= second <= first <= 1
        assert prediction["classes"][0]["class"] in load("digits").classes


def test_predict_prepares_images_as_evaluation_does(glcan, finished, digits):
    from glcan.data import read_images
    from glcan.training import load_model

    summary = RunDirectory(finished).read_summary()
    with torch.inference_mode():
        expected = load_model(finished)(read_images(digits, summary.preprocessing)).softmax(1)
    result = glcan("predict", finished, *digits, "--top", 10, "--json")
    for row, prediction in zip(expected, json.loads(result.stdout)["predictions"], strict=True):
        found = {entry["class"]: entry["probability"] for entry in prediction["classes"]}
        assert [found[name] for name in summary.classes] == pytest.approx(row.tolist(), abs=1e-6)


def test_predict_prints_a_table(glcan, finished, digits):
    result = glcan("predict", finished, digits[0])
    assert result.exit_code == 0
    assert "0.png" in result.output
    assert "%)" in result.output


def test_names_of_files_and_classes_are_shown_as_they_are(glcan, finished, digits, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "[red]run"
    shutil.copytree(finished, run)
    summary = json.loads((run / "summary.json").read_text())
    summary["classes"] = [f"[b]{name}[/b] :cat:" for name in summary["classes"]]
    (run / "summary.json").write_text(json.dumps(summary))
    for name in ("[red]x.png", "[x].png", ":dog:.png"):
        shutil.copy(digits[0], name)
    result = glcan("predict", run, "[red]x.png", "[x].png", ":dog:.png")
    assert result.exit_code == 0, result.output
    assert all(name in result.output for name in ("[red]x.png", "[x].png", ":dog:.png", "[/b] :cat:"))
    result = glcan("evaluate", run)
    assert result.exit_code == 0, result.output
    assert "[red]run" in result.output
    result = glcan("predict", run, "[/x].png")
    assert "[/x].png" in result.stderr
    assert result.exit_code == 2


def test_code_that_a_run_names_needs_trust(glcan, finished, digits, tmp_path):
    run, mark = tmp_path / "run", tmp_path / "executed"
    shutil.copytree(finished, run)
    for name in ("config.json", "summary.json"):
        values = json.loads((run / name).read_text())
        values["config"] |= {"model": "os:system", "model_options": {"command": f"touch {mark}"}}
        (run / name).write_text(json.dumps(values))
    for command in (["predict", run, digits[0]], ["evaluate", run], ["train", "--resume", "--out", run]):
        refused = glcan(*command)
        assert refused.exit_code == 2, refused.output
        assert "names model = 'os:system', code that would be imported" in refused.stderr
        assert "--trust" in refused.stderr
        assert not mark.exists()
    trusted = glcan("predict", run, digits[0], "--trust")  # what it asked for
    assert "it must return an nn.Module" in trusted.stderr
    mark.unlink()
    again = glcan("evaluate", run, "--model", "os:system")
    assert "it must return an nn.Module" in again.stderr


def test_predict_on_what_is_no_image(glcan, finished, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    for name in ("broken.png", "missing.png"):
        result = glcan("predict", finished, tmp_path / name)
        assert result.exit_code == 2
        assert name in result.stderr
        assert result.stderr.startswith("error: ")
