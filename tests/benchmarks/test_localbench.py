"""LocalBench on a few digits: what is chosen, what is kept, what is not done twice."""

import dataclasses
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from glcan import auxiliary, strategies
from glcan.errors import CutError
from glcan.training import resolve_device

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
RECORDED = BENCHMARKS / "results" / "localbench"
SETTINGS = {"model": "cifar_resnet20", "data": "digits", "limit": 160, "val": 64, "epochs": 1, "batch": 32}


@pytest.fixture(scope="module")
def localbench():
    """The script's parts under one name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        import localbench_benches
        import localbench_runs
        import localbench_tables

        yield SimpleNamespace(benches=localbench_benches, runs=localbench_runs, tables=localbench_tables)


@pytest.fixture(scope="module")
def plan(localbench, tmp_path_factory):
    """A finished bench."""
    entries = localbench.benches.named("e2e", "selective", "dgl", "dgl+finish:0.5")
    bench = localbench.benches.Bench(SETTINGS, entries, (3,), (1e-6, 0.1), (0, 1))
    folder = tmp_path_factory.mktemp("localbench")
    plan = localbench.runs.Plan("tiny", bench, folder / "results" / "tiny", folder / "runs", {"device": "cpu"})
    for jobs in (plan.choices, plan.final):
        for job in jobs():
            if not job.file.exists():
                localbench.runs.run(job)
    return plan


def records(plan):
    return [json.loads(path.read_text()) for path in sorted(plan.results.glob("*-seed*.json"))]


def test_the_rate_that_is_better_on_validation_images_is_trained_with_every_seed(plan):
    found = {(r["entry"], r["lr"], r["seed"]): r["validation"] for r in records(plan)}
    labels = [entry.label(blocks) for entry, blocks in plan.rows]
    assert labels == ["e2e", "selective", "dgl:3", "dgl:3+finish:0.5"]
    for label in labels:
        chosen = plan.rate(label, plan.records())
        assert chosen == max(plan.bench.rates, key=lambda rate: found[label, rate, 0])
        assert [key[1:] for key in found if key[0] == label and key[2] == 1] == [(chosen, 1)]
    assert len(found) == 4 * 3  # two rates and one more seed each: the chosen run of the first seed is not made again


def test_a_record_says_what_was_done_and_what_it_cost(plan):
    first = {r["entry"]: r for r in reversed(records(plan))}
    base, chosen, local, finish = (first[name] for name in ("e2e", "selective", "dgl:3", "dgl:3+finish:0.5"))
    assert (base["probe_accuracy"], base["blocks"]) == ([], 1)
    assert (chosen["blocks"], chosen["auxiliary_parameters"], chosen["probe_accuracy"]) == (1, 0, [])
    assert chosen["activation_peak_bytes"] < base["activation_peak_bytes"]
    assert (local["config"]["method"], local["blocks"], len(local["cuts"])) == ("dgl:3", 3, 2)
    assert len(local["probe_accuracy"]) == 2
    assert all(0.1 < accuracy <= 1 for accuracy in local["probe_accuracy"])  # ten classes
    assert local["activation_peak_bytes"] < base["activation_peak_bytes"]
    assert local["auxiliary_parameters"] > 0
    assert local["train_loss"].keys() == {"block1", "block2", "block3"}
    assert "finish" in finish["train_loss"]
    assert finish["flops_per_step"] > local["flops_per_step"]
    assert local["environment"]["versions"]["torch"]


def test_what_is_there_is_not_made_again(localbench, plan):
    before = {path: path.stat().st_mtime_ns for path in plan.results.glob("*-seed*.json")}
    localbench.runs.work((*plan.choices(), *plan.final()), 1, "again", Console(quiet=True))
    assert {path: path.stat().st_mtime_ns for path in plan.results.glob("*-seed*.json")} == before


def test_a_run_that_another_bench_has_made_is_not_made_again(localbench, plan):
    entries = localbench.benches.named("dgl")
    bench = dataclasses.replace(plan.bench, entries=entries, rates=(0.1,), seeds=(0,))
    other = localbench.runs.Plan("other", bench, plan.results.parent / "other", plan.runs, {"device": "cpu"})
    (job,) = other.final()
    localbench.runs.work([job], 1, "other", Console(quiet=True))
    (made,) = [r for r in records(plan) if (r["entry"], r["lr"], r["seed"]) == ("dgl:3", 0.1, 0)]
    assert not (plan.runs / "other").exists()
    assert json.loads(job.file.read_text()) == made | {"bench": "other"}


def test_runs_that_differ_in_a_setting_are_not_each_others(localbench, plan):
    bench = dataclasses.replace(plan.bench, settings=SETTINGS | {"weight_decay": 0.5}, rates=(0.1,), seeds=(0,))
    other = localbench.runs.Plan("decayed", bench, plan.results, plan.runs, {"device": "cpu"})
    assert len(list(localbench.runs.missing(other.final()))) == len(other.rows)


def test_what_went_wrong_is_said_at_the_end_of_the_bench(localbench, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(localbench.runs, "run", resolve_device)  # what a new process can import
    jobs = [Job(tmp_path / f"bench/{name}.json", name) for name in ("cuda:99", "cpu", "meta")]
    with pytest.raises(SystemExit) as ended:
        localbench.runs.work(jobs, 2, "three", Console(stderr=True, width=300))
    assert ended.value.code == 2
    assert "cuda:99: device = 'cuda:99' cannot be used" in capsys.readouterr().err


class Job(str):
    """A job that is, where it arrives, a word."""

    def __new__(cls, file, word):
        job = super().__new__(cls, word)
        job.file, job.identity = file, word
        return job

    def __reduce__(self):
        return str, (str(self),)


def test_the_table_has_the_mean_over_the_seeds_that_are_there(localbench, plan):
    text = localbench.tables.report(plan)
    rows = {row["entry"]: row for row in json.loads((plan.results / "table.json").read_text())["rows"]}
    values = [r["test"] for r in records(plan) if r["entry"] == "dgl:3" and r["lr"] == rows["dgl:3"]["lr"]]
    assert sorted(rows["dgl:3"]["values"]) == sorted(values)
    assert f"{100 * sum(values) / 2:.2f} ±" in text
    assert "| e2e | 1 |" in text
    assert "| selective | 1 |" in text
    assert all((plan.results / name).stat().st_size > 10_000 for name in ("metric_against_cost.png", "probes.png"))
    one = dataclasses.replace(plan.bench, seeds=(0, 1, 2))
    more = localbench.runs.Plan("tiny", one, plan.results, plan.runs, {"device": "cpu"})
    localbench.tables.report(more)
    assert len(json.loads((plan.results / "table.json").read_text())["rows"][0]["values"]) == 2


def test_a_run_that_cannot_be_made_is_named(localbench, plan):
    bench = dataclasses.replace(plan.bench, entries=localbench.benches.named("dgl"), blocks=(99,), rates=(0.1,))
    (job, *_) = localbench.runs.Plan("bad", bench, plan.results, plan.runs, {"device": "cpu"}).final()
    with pytest.raises(CutError, match="99"):
        localbench.runs.run(job)
    assert not job.file.exists()


@pytest.mark.parametrize("name", sorted(path.name for path in RECORDED.iterdir()))
def test_recorded_runs_all_stay_in_the_table_under_the_names_that_they_have(localbench, name, tmp_path):
    shutil.copytree(RECORDED / name, tmp_path / name, ignore=shutil.ignore_patterns("*.png"))
    before = json.loads((tmp_path / name / "table.json").read_text())["rows"]
    plan = localbench.runs.Plan(name, localbench.benches.BENCHES[name], tmp_path / name, tmp_path, {"device": "cpu"})
    made = [path for path in (tmp_path / name).glob("*-seed*.json")]
    assert len(plan.records()) == len(made)  # no two are taken for each other
    after = localbench.tables.rows_of(plan)
    assert {row["entry"]: row["values"] for row in after} == {row["entry"]: row["values"] for row in before}
    assert localbench.tables.table(name, plan.bench, after) == (RECORDED / name / "table.md").read_text()
    assert all(row["auxiliary_parameters"] for row in after if row["entry"].startswith("glcan"))


@pytest.mark.parametrize("name", sorted(path.name for path in RECORDED.iterdir()))
def test_every_bench_is_made_of_settings_and_methods_that_there_are(localbench, name, tmp_path):
    benches = localbench.benches
    for bench in (benches.BENCHES[name], benches.quick(name)):
        plan = localbench.runs.Plan(
            name, dataclasses.replace(bench, rates=bench.rates[:1]), tmp_path, tmp_path, {"device": "cpu"}
        )
        jobs = plan.final()
        assert len({job.file for job in jobs}) == len({job.identity for job in jobs}) == len(jobs)
        assert len(jobs) == len(plan.rows) * len(bench.seeds)
        for job in jobs:
            strategies.create(job.config.method, job.config.task, job.config.options)
        # of two rows of the same method and settings one alone would be trained
        assert len({(job.config.method, str(job.config.options), job.config.seed) for job in jobs}) == len(jobs)
    if not name.startswith("ablation"):
        there = {entry.method for entry in benches.BENCHES[name].entries}
        assert there >= {"e2e", "checkpoint", "e2e+accumulate:4", "selective", "glcan"}
        assert there >= {rule.name for rule in auxiliary.RULES if name in rule.tasks}
