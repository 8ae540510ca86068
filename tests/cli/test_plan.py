"""`glcan plan`: its tables, its JSON, its mistakes."""

import json
from pathlib import Path

import pytest

PLAN = ["plan", "cifar_resnet20", "--batch", "64"]
TINY = ["plan", "tiny_model:tiny", "--image", "16x16", "--channels", "1", "--batch", "64"]


@pytest.fixture(autouse=True)
def _own_models(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "training" / "importable")


def test_plan_prints_one_json_object(glcan):
    result = glcan(*PLAN, "--method", "glcan:4", "--json")
    assert result.exit_code == 0
    found = json.loads(result.stdout)
    assert (found["model"], found["task"], found["batch"]) == ("cifar_resnet20", "classification", 64)
    assert (found["method"], found["family"], found["options"]) == ("glcan:4", "local", {})
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
    assert 0 < found["activation_peak_bytes"] < found["peak_bytes"]
    assert found["flops_per_step"] > 0
    assert list(found["baselines"]) == ["e2e", "checkpoint", "checkpoint-sqrt", "e2e+accumulate:4", "selective"]
    for name, ratio in (("e2e", 1), ("checkpoint", 4 / 3), ("e2e+accumulate:4", 1), ("selective", 1)):
        flops = found["baselines"][name]["flops_per_step"] / found["baselines"]["e2e"]["flops_per_step"]
        assert flops == pytest.approx(ratio, abs=0.06)
    assert found["vs_e2e"]["peak_ratio"] == found["peak_bytes"] / found["baselines"]["e2e"]["peak_bytes"]


@pytest.mark.parametrize("batch", [2, 8, 16, 256])
def test_glcan_has_auxiliary_networks_for_every_batch(glcan, batch):
    found = json.loads(glcan("plan", "cifar_resnet20", "--batch", batch, "--json").stdout)
    assert (found["method"], found["family"], found["blocks"]) == ("glcan:4", "local", 4)
    assert found["auxiliary_parameters"] > 0


@pytest.mark.parametrize(
    ("method", "family"), [("selective", "sampled"), ("e2e", "exact"), ("checkpoint+accumulate:2", "exact")]
)
def test_plan_of_a_method_without_blocks(glcan, method, family):
    result = glcan(*TINY, "--method", method, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert (found["method"], found["family"], found["blocks"], found["cuts"]) == (method, family, 1, [])
    assert found["auxiliary_parameters"] == 0
    assert found["vs_e2e"].keys() == {"peak_ratio", "activation_ratio", "flops_ratio"}
    within = glcan(*TINY, "--method", method, "--memory", "1GiB", "--json")
    assert json.loads(within.stdout)["peak_bytes"] == found["peak_bytes"]
    refused = glcan(*TINY, "--method", method, "--memory", "64KiB")
    assert refused.exit_code == 2
    assert "No plan fits 64 KiB" in refused.stderr


def test_plan_of_own_cuts(glcan):
    found = json.loads(glcan(*PLAN, "--cuts", "layer2.0,layer3.0", "--json").stdout)
    assert (found["method"], found["cuts"], found["blocks"]) == ("glcan:3", ["layer2.0", "layer3.0"], 3)
    assert found["vs_e2e"]["activation_ratio"] < 0.8


def test_plan_prints_tables(glcan):
    result = glcan(*PLAN, "--memory", "60MiB")
    assert result.exit_code == 0
    assert "Fits 60MiB" in result.output
    assert "checkpoint-sqrt" in result.output
    assert "block2: layer" in result.output


def test_plan_finds_the_largest_batches(glcan):
    result = glcan(*TINY, "--memory", "4MiB", "--max-batch", "--method", "glcan:3", "--json")
    assert result.exit_code == 0
    rows = {row["method"]: row for row in json.loads(result.stdout)["largest_batch"]}
    assert {"e2e", "checkpoint", "checkpoint-sqrt", "selective", "glcan:3", "glcan:3 recomputed"} == rows.keys()
    assert rows["glcan:3"]["batch"] > rows["e2e"]["batch"] > 0
    assert all(row["peak_bytes"] <= 4 * 2**20 for row in rows.values())


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
        ([*PLAN, "--memory", "1GiB", "--cuts", "layer2.0"], "not both"),
        ([*PLAN, "--method", "glcan"], "has no number of blocks"),
        ([*PLAN, "--method", "glcan:4+start"], "has phases"),
        ([*PLAN, "--method", "e2e+accumulate:40"], "less than two images a part"),
        ([*PLAN, "--method", "glcan:4", "--cuts", "layer2.0"], "4 blocks"),
        ([*PLAN, "--max-batch"], "needs a budget"),
        ([*PLAN, "--method", "glcan:99"], "can be cut into 1 to"),
        ([*PLAN, "--cuts", "layer9"], "layer"),
        ([*PLAN, "--method", "glcann"], "glcan"),
        ([*PLAN, "--option", "budgt=1"], "budget"),
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
