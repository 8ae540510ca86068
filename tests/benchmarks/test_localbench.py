"""LocalBench on a few digits: what is chosen, what is kept, what is not done twice."""

import dataclasses
import json
import operator
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from glcan.rules import RULES

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
                assert localbench.run(job, 1) == ""
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


def test_more_jobs_than_a_process_pool_would_have_survived(localbench, tmp_path, monkeypatch):
    monkeypatch.setattr(localbench, "run", operator.is_)  # what a new process can import; false: nothing went wrong
    jobs = [SimpleNamespace(file=tmp_path / f"bench/{i}.json") for i in range(5)]
    localbench.work(jobs, 1, "many", Console(quiet=True))


def test_a_run_whose_process_is_killed_is_told_of(localbench, tmp_path, monkeypatch):
    monkeypatch.setattr(localbench, "run", os.kill)
    assert "killed" in localbench.alone(Doomed(), 9)


def test_a_run_ends_with_the_bench_that_was_killed(tmp_path):
    script = tmp_path / "bench.py"
    script.write_text(
        f"import sys, time; sys.path.insert(0, {str(BENCHMARKS)!r})\n"
        "import localbench\n"
        "def wait(job, threads):\n"
        "    print('begun', flush=True); time.sleep(600)\n"
        "localbench.run = wait\n"
        "if __name__ == '__main__': localbench.alone(None, 1)\n"
    )
    bench = subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE)
    assert bench.stdout.readline() == b"begun\n"
    bench.kill()
    bench.communicate(timeout=100)  # until the run, too, has let go of the output


class Doomed(int):
    """A job that is, where it arrives, the number of the process it has arrived in."""

    file = Path("doomed.json")

    def __reduce__(self):
        return os.getpid, ()


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
    assert "99" in localbench.run(job, 1)
    assert not job.file.exists()


@pytest.mark.parametrize("name", ["classification", "detection", "super-resolution", "ablation"])
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
