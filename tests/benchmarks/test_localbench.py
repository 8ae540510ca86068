"""LocalBench on a few digits: what is chosen, what is kept, what is not done twice."""

import dataclasses
import json
from pathlib import Path

import pytest
from rich.console import Console

from glcan.errors import CutError
from glcan.auxiliary import RULES
from glcan.training import resolve_device

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SETTINGS = {"model": "cifar_resnet20", "data": "digits", "limit": 160, "val": 64, "epochs": 1, "batch": 32}


@pytest.fixture(scope="module")
def localbench():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        import localbench

        yield localbench


@pytest.fixture(scope="module")
def plan(localbench, tmp_path_factory):
    """A finished bench."""
    entries = (*localbench._named("e2e", "dgl"), localbench.Entry("dgl+finish", "dgl", finish=0.5))
    bench = localbench.Bench(SETTINGS, entries, (3,), (1e-6, 0.1), (0, 1))
    folder = tmp_path_factory.mktemp("localbench")
    plan = localbench.Plan("tiny", bench, folder / "results", folder / "runs", {"device": "cpu"})
    for jobs in (plan.choices, plan.final):
        for job in jobs():
            if not job.file.exists():
                localbench.run(job)
    return plan


def records(plan):
    return [json.loads(path.read_text()) for path in sorted(plan.results.glob("*-k*.json"))]


def test_the_rate_that_is_better_on_validation_images_is_trained_with_every_seed(plan):
    found = {(r["entry"], r["lr"], r["seed"]): r["validation"] for r in records(plan)}
    for entry in plan.bench.entries:
        chosen = plan.rate(entry, 1 if entry.rule == "e2e" else 3)
        assert chosen == max(plan.bench.rates, key=lambda rate: found[entry.name, rate, 0])
        assert [key[1:] for key in found if key[0] == entry.name and key[2] == 1] == [(chosen, 1)]
    assert len(found) == 3 * 3  # two rates and one more seed each: the chosen run of the first seed is not made again


def test_a_record_says_what_was_done_and_what_it_cost(plan):
    base = next(r for r in records(plan) if r["entry"] == "e2e")
    local = next(r for r in records(plan) if r["entry"] == "dgl")
    finish = next(r for r in records(plan) if r["entry"] == "dgl+finish")
    assert (base["probe_accuracy"], base["blocks"]) == ([], 1)
    assert (local["config"]["rule"], local["config"]["blocks"], len(local["cuts"])) == ("dgl", 3, 2)
    assert len(local["probe_accuracy"]) == 2
    assert all(0.1 < accuracy <= 1 for accuracy in local["probe_accuracy"])  # ten classes
    assert local["activation_peak_bytes"] < base["activation_peak_bytes"]
    assert local["train_loss"].keys() == {"block1", "block2", "block3"}
    assert "finish" in finish["train_loss"]
    assert finish["flops_per_step"] > local["flops_per_step"]
    assert local["environment"]["versions"]["torch"]


def test_what_is_there_is_not_made_again(localbench, plan):
    before = {path: path.stat().st_mtime_ns for path in plan.results.glob("*-k*.json")}
    localbench.work((*plan.choices(), *plan.final()), 1, "again", Console(quiet=True))
    assert {path: path.stat().st_mtime_ns for path in plan.results.glob("*-k*.json")} == before


def test_a_run_that_another_bench_has_made_is_not_made_again(localbench, plan):
    bench = dataclasses.replace(plan.bench, entries=(localbench.Entry("as dgl", "dgl"),), rates=(0.1,), seeds=(0,))
    other = localbench.Plan("other", bench, plan.results.parent / "other", plan.runs, {"device": "cpu"})
    (job,) = other.final()
    localbench.work([job], 1, "other", Console(quiet=True))
    (made,) = [r for r in records(plan) if (r["entry"], r["lr"], r["seed"]) == ("dgl", 0.1, 0)]
    assert not (plan.runs / "other").exists()
    assert json.loads(job.file.read_text()) == made | {"bench": "other", "entry": "as dgl"}


def test_what_went_wrong_is_said_at_the_end_of_the_bench(localbench, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(localbench, "run", resolve_device)  # what a new process can import
    jobs = [Job(tmp_path / f"bench/{name}.json", name) for name in ("cuda:99", "cpu", "meta")]
    with pytest.raises(SystemExit) as ended:
        localbench.work(jobs, 2, "three", Console(stderr=True, width=300))
    assert ended.value.code == 2
    assert "cuda:99: device = 'cuda:99' cannot be used" in capsys.readouterr().err


class Job(str):
    """A job that is, where it arrives, a word."""

    def __new__(cls, file, word):
        job = super().__new__(cls, word)
        job.file = file
        return job

    def __reduce__(self):
        return str, (str(self),)


def test_the_table_has_the_mean_over_the_seeds_that_are_there(localbench, plan):
    text = localbench.report(plan)
    rows = {row["entry"]: row for row in json.loads((plan.results / "table.json").read_text())["rows"]}
    values = [r["test"] for r in records(plan) if r["entry"] == "dgl" and r["lr"] == rows["dgl"]["lr"]]
    assert sorted(rows["dgl"]["values"]) == sorted(values)
    assert f"{100 * sum(values) / 2:.2f} ±" in text
    assert "| e2e | 1 |" in text
    assert all((plan.results / name).stat().st_size > 10_000 for name in ("metric_against_cost.png", "probes.png"))
    one = dataclasses.replace(plan.bench, seeds=(0, 1, 2))
    more = localbench.Plan("tiny", one, plan.results, plan.runs, {"device": "cpu"})
    localbench.report(more)
    assert len(json.loads((plan.results / "table.json").read_text())["rows"][0]["values"]) == 2


def test_a_run_that_cannot_be_made_is_named(localbench, plan):
    bench = dataclasses.replace(plan.bench, entries=(localbench.Entry("too many", "dgl"),), blocks=(99,), rates=(0.1,))
    (job, *_) = localbench.Plan("bad", bench, plan.results, plan.runs, {"device": "cpu"}).final()
    with pytest.raises(CutError, match="99"):
        localbench.run(job)
    assert not job.file.exists()


@pytest.mark.parametrize(
    "name",
    [
        "classification",
        "detection",
        "super-resolution",
        "ablation",
        "ablation-detection",
        "ablation-super-resolution",
    ],
)
def test_every_bench_is_made_of_settings_and_rules_that_there_are(localbench, name, tmp_path):
    for bench in (localbench.BENCHES[name], localbench.quick(name)):
        plan = localbench.Plan(
            name, dataclasses.replace(bench, rates=bench.rates[:1]), tmp_path, tmp_path, {"device": "cpu"}
        )
        jobs = plan.final()
        assert len({job.file for job in jobs}) == len(jobs) == len(plan.rows) * len(bench.seeds)
        assert all(RULES[entry.rule](entry.options) for entry in bench.entries)
    if name == "classification":
        covered = {entry.rule for entry in bench.entries}
        assert covered >= {rule.name for rule in RULES.values() if rule.local and name in rule.tasks}
