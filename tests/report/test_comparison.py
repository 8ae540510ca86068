"""Real, tiny comparisons on the embedded digits."""

import json
import math
import statistics

import pytest
import torch

from glcan import measure_step
from glcan.errors import ConfigError, CutError, NonFiniteLoss, RunError, UnknownName
from glcan.report import compare, costs
from glcan.report.comparison import _configs
from glcan.strategies import parse_method, parse_methods
from glcan.training import RunConfig, build, load_data, read_metrics
from glcan.training.phases import phases_of

METHODS = ["e2e", "checkpoint", "glcan:2", "selective"]


@pytest.fixture(scope="module", autouse=True)
def _few_rounds():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(costs, "MIN_ROUNDS", 3)
        patch.setattr(costs, "MAX_ROUNDS", 3)
        yield


def tiny(**changes):
    settings = {
        "model": "cifar_resnet20",
        "data": "digits",
        "epochs": 2,
        "batch": 32,
        "limit": 96,
        "val": 32,
        "lr": 0.05,
    }
    return RunConfig(**(settings | {"device": "cpu"} | changes))


def snapshot(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    out = tmp_path_factory.mktemp("comparison")
    return compare(tiny(), METHODS, [0, 3], out, progress=False), out


def test_the_json_file_holds_what_was_returned_with_the_promised_keys(done):
    result, out = done
    assert json.loads((out / "comparison.json").read_text()) == result
    assert result.keys() >= {"task", "model", "dataset", "epochs", "seeds", "environment", "methods"}
    assert (result["task"], result["model"], result["dataset"]) == ("classification", "cifar_resnet20", "digits")
    assert (result["epochs"], result["seeds"]) == (2, [0, 3])
    assert [method["name"] for method in result["methods"]] == METHODS
    for method in result["methods"]:
        assert method.keys() >= {
            "name", "family", "blocks", "metric", "peak_bytes", "activation_peak_bytes", "step_seconds",
            "flops_per_step", "parameters", "auxiliary_parameters", "cuts", "by_kind", "curve", "vs_e2e",
        }  # fmt: skip
        assert method["metric"].keys() >= {"name", "mean", "std", "values"}
        assert method["vs_e2e"].keys() == {
            "metric_delta", "peak_ratio", "activation_ratio", "time_ratio", "flops_ratio",
        }  # fmt: skip


def test_side_by_side_the_same_comes_out(tmp_path, capsys):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as those have that run side by side, of one for all
    try:
        results = [
            compare(tiny(), ["e2e", "glcan:2"], [0], tmp_path / str(jobs), progress=jobs > 1, jobs=jobs)
            for jobs in (1, 2)
        ]
    finally:
        torch.set_num_threads(threads)
    one, two = [[(method["metric"], method["curve"]) for method in result["methods"]] for result in results]
    assert one == two
    lines = capsys.readouterr().err
    assert "2 runs, 2 side by side" in lines
    assert "glcan:2, seed 0: epoch 2/2" in lines


def test_no_jobs_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="jobs = 0"):
        compare(tiny(), METHODS, [0], tmp_path / "none", progress=False, jobs=0)
    assert not (tmp_path / "none").exists()


def test_an_error_in_a_process_names_the_run(tmp_path):
    with pytest.raises(NonFiniteLoss, match=r"^e2e, seed [34]: .* became"):
        compare(tiny(lr=1e30, warmup_epochs=0), ["e2e"], [3, 4], tmp_path, progress=False, jobs=2)


def test_metrics_are_those_of_the_runs_with_sample_standard_deviation(done):
    result, out = done
    for method in result["methods"]:
        folder = out / method["name"].replace(":", "-")
        values = [json.loads((folder / f"seed{s}" / "summary.json").read_text())["metric"]["value"] for s in (0, 3)]
        assert method["metric"]["values"] == values
        assert method["metric"]["mean"] == pytest.approx(statistics.fmean(values))
        assert method["metric"]["std"] == pytest.approx(statistics.stdev(values))


def test_costs_are_related_to_end_to_end(done):
    e2e, checkpoint, local, selective = done[0]["methods"]
    assert [method["family"] for method in done[0]["methods"]] == ["exact", "exact", "local", "sampled"]
    assert e2e["vs_e2e"] == {
        "metric_delta": 0.0, "peak_ratio": 1.0, "activation_ratio": 1.0, "time_ratio": 1.0, "flops_ratio": 1.0,
    }  # fmt: skip
    assert checkpoint["vs_e2e"]["flops_ratio"] > 1.2
    assert selective["vs_e2e"]["flops_ratio"] == pytest.approx(1, abs=0.1)
    assert len({method["parameters"] for method in done[0]["methods"]}) == 1
    assert local["auxiliary_parameters"] > 0
    assert not any(method["auxiliary_parameters"] for method in (e2e, checkpoint, selective))
    assert (e2e["blocks"], local["blocks"], len(local["cuts"]), selective["blocks"]) == (1, 2, 1, 1)
    for method in (checkpoint, local, selective):
        assert method["activation_peak_bytes"] < e2e["activation_peak_bytes"]
        assert method["vs_e2e"]["peak_ratio"] == method["peak_bytes"] / e2e["peak_bytes"]
        assert sum(method["by_kind"].values()) == method["peak_bytes"]
        assert 0 < method["step_seconds"] < 60


def test_the_curve_is_validation_accuracy_per_epoch_and_seed(done):
    curve = done[0]["methods"][2]["curve"]
    assert (curve["name"], curve["unit"], curve["epochs"]) == ("val_accuracy", "fraction", [1, 2])
    assert [len(values) for values in curve["values"]] == [2, 2]


def test_a_local_run_has_the_losses_of_its_blocks_and_others_have_one(done):
    losses = {name: read_metrics(done[1] / name.replace(":", "-") / "seed0")[-1]["train_loss"] for name in METHODS}
    assert {name: list(found) for name, found in losses.items()} == {
        "e2e": ["block1"], "checkpoint": ["block1"], "glcan:2": ["block1", "block2"], "selective": ["block1"],
    }  # fmt: skip


def test_the_document_and_the_plots_are_beside_it(done):
    result, out = done
    text = (out / "comparison.md").read_text()
    assert all(f"| {name} |" in text for name in METHODS)
    assert result["environment"]["versions"]["torch"] in text
    for name in ("metric_over_epochs.png", "metric_against_cost.png"):
        assert (out / name).stat().st_size > 1000
        assert name in text


def test_asking_again_reuses_the_runs_and_gives_the_same_metrics(done):
    result, out = done
    before = {path: path.stat().st_mtime_ns for path in out.rglob("seed*/*") if path.is_file()}
    again = compare(tiny(), METHODS, [0, 3], out, progress=False)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    for old, new in zip(result["methods"], again["methods"], strict=True):
        assert new["metric"] == old["metric"]
        assert new["peak_bytes"] == old["peak_bytes"]
        assert new["flops_per_step"] == old["flops_per_step"]


@pytest.mark.parametrize(
    ("changes", "methods", "seeds", "message"),
    [
        ({"lr": 0.02}, METHODS, [0, 3], "lr: 0.05 there, 0.02 asked"),
        ({"model": "cifar_resnet32"}, METHODS, [0, 3], "cifar_resnet20"),
        ({}, ["e2e", "glcan:2", "selective"], [0, 3], "checkpoint"),
        ({}, METHODS, [0], "more seeds"),
    ],
)
def test_another_comparison_is_never_written_over(done, changes, methods, seeds, message):
    out = done[1]
    before = snapshot(out)
    with pytest.raises(RunError, match=message) as error:
        compare(tiny(**changes), methods, seeds, out, progress=False)
    assert "Choose another --out" in str(error.value) or "choose another --out" in str(error.value)
    assert snapshot(out) == before


def test_methods_and_seeds_can_be_added_and_the_train_loss_stands_in_for_validation(tmp_path, capsys):
    config = tiny(epochs=1, val=0)
    alone = compare(config, ["glcan:2"], [0], tmp_path, progress=False)
    assert alone["methods"][0]["vs_e2e"] is None
    assert alone["methods"][0]["metric"]["std"] is None
    assert alone["methods"][0]["curve"]["name"] == "train_loss"
    weights = (tmp_path / "glcan-2" / "seed0" / "model.safetensors").stat().st_mtime_ns
    assert capsys.readouterr().out == ""

    more = compare(config, ["e2e", "glcan:2"], [0, 1], tmp_path)
    assert (tmp_path / "glcan-2" / "seed0" / "model.safetensors").stat().st_mtime_ns == weights
    assert more["methods"][1]["metric"]["values"][0] == alone["methods"][0]["metric"]["values"][0]
    assert more["initial_weights_sha256"] == alone["initial_weights_sha256"]
    printed = capsys.readouterr()
    assert "glcan:2" in printed.out
    assert "test" in printed.out
    assert "glcan:2, seed 1 (4 of 4 runs)" in printed.err


def test_a_finish_has_the_larger_memory_and_its_share_of_the_costs(tmp_path):
    methods = ["e2e", "checkpoint", "glcan:2", "glcan:2+finish:0.25"]
    done = compare(tiny(epochs=1, limit=128), methods, [0], tmp_path, progress=False, share_exact=True)
    _, checkpoint, local, finish = done["methods"]
    assert finish["flops_per_step"] == round(0.75 * local["flops_per_step"] + 0.25 * checkpoint["flops_per_step"])
    for kind in ("peak_bytes", "activation_peak_bytes"):
        assert finish[kind] == max(local[kind], checkpoint[kind])
    assert (finish["blocks"], finish["cuts"]) == (2, local["cuts"])
    assert finish["auxiliary_parameters"] == local["auxiliary_parameters"]
    folders = [parse_method(method).folder for method in methods[2:]]
    losses = [read_metrics(tmp_path / folder / "seed0")[0]["train_loss"] for folder in folders]
    assert [list(each) for each in losses] == [["block1", "block2"], ["block1", "block2", "finish"]]


def test_a_start_has_its_share_of_the_costs(tmp_path):
    methods = ["e2e", "glcan:2", "glcan:2+start:0.25"]
    done = compare(tiny(epochs=1, limit=128), methods, [0], tmp_path, progress=False)
    _, local, start = done["methods"]
    learner = build(tiny(method="glcan:2"), load_data(tiny()))
    batch = next(iter(load_data(tiny()).loader("train", tiny().batch)))
    beginning = measure_step(costs.enter(learner, phases_of(parse_method(methods[2]), 4, 2)[0]), *batch)
    assert beginning.flops > 1.2 * local["flops_per_step"]
    assert start["flops_per_step"] == round(0.75 * local["flops_per_step"] + 0.25 * beginning.flops)
    assert start["peak_bytes"] == max(local["peak_bytes"], beginning.peak_bytes)


def test_options_that_no_method_takes_are_told(tmp_path, capsys):
    compare(tiny(epochs=1, options={"width": 0.5}), ["e2e"], [0], tmp_path)
    assert "options = {'width': 0.5} are for 'glcan', which is no method here: left out" in capsys.readouterr().err


def test_a_folder_with_other_files_and_a_file_are_refused(tmp_path):
    note = tmp_path / "thesis.tex"
    note.write_text("years of work")
    for out in (tmp_path, note):
        with pytest.raises(RunError, match="hoose another --out"):
            compare(tiny(), METHODS, [0], out, progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    assert note.read_text() == "years of work"


def test_a_request_half_written_by_a_killed_process_is_no_other_file(tmp_path):
    (tmp_path / ".request.json.123.tmp").write_text("{")
    compare(tiny(epochs=1), ["e2e"], [0], tmp_path, progress=False)
    assert (tmp_path / "e2e" / "seed0" / "summary.json").exists()


def test_a_damaged_request_is_refused(tmp_path):
    (tmp_path / "request.json").write_text("{")
    with pytest.raises(RunError, match="cannot be read"):
        compare(tiny(), METHODS, [0], tmp_path, progress=False)


@pytest.mark.parametrize(
    ("changes", "methods", "seeds", "error", "message"),
    [
        ({}, ["e2e", "glcann:4"], [0], UnknownName, "'glcan'"),
        ({}, ["e2e", "glcan:400"], [0], CutError, "400"),
        ({}, METHODS, [], ConfigError, "at least one seed"),
        ({}, METHODS, [1, 2, 1], ConfigError, "Seed 1 is named more than once"),
        ({}, METHODS, [-1], ConfigError, "seed"),
        ({"method": "glcan:3", "cuts": ["layer2.0", "layer3.0"]}, METHODS, [0], ConfigError, "'glcan:3'"),
        ({"model": "cifar_resnet21"}, METHODS, [0], UnknownName, "cifar_resnet20"),
    ],
)
def test_what_cannot_work_fails_before_anything_is_written(tmp_path, changes, methods, seeds, error, message):
    with pytest.raises(error, match=message):
        compare(tiny(**changes), methods, seeds, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def test_own_cuts_and_options_go_to_the_methods_of_the_same_name():
    methods = parse_methods(["e2e", "glcan:2", "glcan:2+start", "dgl:4"])
    configs = _configs(tiny(method="glcan", cuts=["layer2.0"], options={"width": 0.5}), methods, [5])[5]
    assert [configs[method].options for method in methods] == [{}, {"width": 0.5}, {"width": 0.5}, {}]
    assert [configs[method].cuts for method in methods] == [None, ["layer2.0"], ["layer2.0"], None]
    assert [configs[method].method for method in methods] == ["e2e", "glcan:2", "glcan:2+start:0.3", "dgl:4"]
    assert {config.seed for config in configs.values()} == {5}


def test_frozen_blocks_cost_less(tmp_path):
    methods = ["glcan:3", "glcan:3+freeze:0.5"]
    done = compare(tiny(epochs=1, limit=128), methods, [0], tmp_path, progress=False)
    plain, frozen = done["methods"]
    assert frozen["activation_peak_bytes"] == plain["activation_peak_bytes"]
    assert frozen["flops_per_step"] < 0.9 * plain["flops_per_step"]


def test_accumulation_is_a_method_of_its_own(tmp_path):
    done = compare(tiny(epochs=1, limit=64), ["e2e", "e2e+accumulate:4"], [0], tmp_path, progress=False)
    plain, accumulated = done["methods"]
    assert (accumulated["name"], accumulated["family"], accumulated["blocks"]) == ("e2e+accumulate:4", "exact", 1)
    assert accumulated["activation_peak_bytes"] < 0.5 * plain["activation_peak_bytes"]
    assert accumulated["flops_per_step"] == pytest.approx(plain["flops_per_step"], rel=0.01)


def test_every_learner_takes_its_turn_in_each_round():
    order = []

    class Counter:
        def __init__(self, name):
            self.name = name

        def step(self, *batch):
            order.append(self.name)

    seconds = costs.time_steps({"a": Counter("a"), "b": Counter("b")}, (torch.zeros(1),))
    assert order == ["a", "b"] * (costs.WARMUP_ROUNDS + 3)
    assert all(len(values) == 3 and all(math.isfinite(value) for value in values) for values in seconds.values())
