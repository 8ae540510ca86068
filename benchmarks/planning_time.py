"""How long planning takes, against an older commit of glcan: is it slower than it was?

Both versions plan the same step in processes of their own, which take turns; every other round runs backwards, so that
a busy or warming machine meets both alike. The older commit is checked out into a temporary folder. Each process plans
a small model first, and then three things:

- plan: the method alone;
- same_baselines: with the baselines that both versions know;
- default_baselines: with those that `glcan plan` compares with by default, of which the newer version has more.

Seconds are of the wall and of the CPU; the ratio of the latter says more on a machine that has other work.

    python benchmarks/planning_time.py                                     # a quarter of an hour on two cores
    python benchmarks/planning_time.py --model resnet50 --rounds 3 --before ddd9608
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from glcan.training import environment
from glcan.training.run import write_json

ROOT = Path(__file__).parents[1]
OUT = Path(__file__).parent / "results" / "planning_time.json"
BEFORE = "ddd9608"
BATCH, SIDE, BLOCKS = 64, 224, 4

#: What each process runs: it knows both ways of naming four blocks of `glcan`.
PLANNING = """
import functools, inspect, json, sys, time
import torch, torchvision
import glcan

def planned(name, batch, side, baselines):
    model = getattr(torchvision.models, name)()
    sample = torch.empty(batch, 3, side, side), torch.zeros(batch, dtype=torch.int64)
    new = "method" in inspect.signature(glcan.plan).parameters
    method = {"method": f"glcan:{blocks}"} if new else {"blocks": blocks}
    optimizer = functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-4)
    start = time.perf_counter(), time.process_time()
    found = glcan.plan(model, sample=sample, optimizer=optimizer, **method, **baselines)
    return {"seconds": time.perf_counter() - start[0], "cpu_seconds": time.process_time() - start[1]}, found

name, batch, side, blocks, same = json.loads(sys.argv[1])
planned("resnet18", 2, 64, {})
kinds = {"plan": {"baselines": ()}, "same_baselines": {"baselines": same}, "default_baselines": {}}
found = {}
for kind, baselines in kinds.items():
    found[kind], forecast = planned(name, batch, side, baselines)
found["compared_with"] = list(forecast.baselines)
found["blocks"] = forecast.plan.blocks
print(json.dumps(found))
"""
SAME = ("e2e", "checkpoint", "checkpoint-sqrt", "e2e+accumulate:4")


@contextlib.contextmanager
def checked_out(commit: str) -> Iterator[Path]:
    """The tree of a commit, in a temporary folder."""
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        git = ["git", "-C", str(ROOT), "worktree"]
        subprocess.run([*git, "add", "--detach", str(tree), commit], check=True, capture_output=True)
        try:
            yield tree
        finally:
            subprocess.run([*git, "remove", "--force", str(tree)], check=True, capture_output=True)


def plan_once(tree: Path, model: str, threads: int) -> dict[str, Any]:
    """What a process that imports glcan from this tree took."""
    arguments = json.dumps([model, BATCH, SIDE, BLOCKS, SAME])
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PLANNING, arguments],
        env=os.environ | {"PYTHONPATH": str(tree / "src"), "OMP_NUM_THREADS": str(threads)},
        cwd=tree,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"planning with {tree} failed:\n{done.stderr}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def main() -> None:
    """Take turns, write the JSON file, and say what came out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet152", help="of torchvision (default: %(default)s)")
    parser.add_argument("--before", default=BEFORE, help="the older commit (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=1, help="of torch's (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=OUT, help="default: %(default)s")
    options = parser.parse_args()
    runs: dict[str, list[dict[str, Any]]] = {"before": [], "now": []}
    with checked_out(options.before) as tree:
        trees = {"before": tree, "now": ROOT}
        for i in range(options.rounds):
            for version in list(trees) if i % 2 == 0 else reversed(trees):
                runs[version].append(plan_once(trees[version], options.model, options.threads))
                taken = {kind: round(value["seconds"], 1) for kind, value in kinds(runs[version][-1]).items()}
                print(f"round {i + 1} of {options.rounds}, {version}: {taken}", flush=True)
    result = {
        "benchmark": "seconds of planning, against an older commit",
        "command": " ".join(["python", "benchmarks/planning_time.py", *sys.argv[1:]]),
        "model": options.model,
        "batch": BATCH,
        "image": [SIDE, SIDE],
        "method": f"glcan:{BLOCKS}",
        "before_commit": options.before,
        "rounds": options.rounds,
        "compared_with": {version: found[0]["compared_with"] for version, found in runs.items()},
        "results": {kind: compared(runs, kind) for kind in kinds(runs["now"][0])},
        "environment": environment() | {"threads": options.threads},
    }
    write_json(options.out, result)
    for kind, found in result["results"].items():
        print(
            f"{kind}: {found['before']['seconds']:.1f} s before, {found['now']['seconds']:.1f} s now; ratio "
            f"{found['ratio']:.2f} (CPU seconds {found['cpu_ratio']:.2f})"
        )
    print(f"wrote {options.out}")


def kinds(run: dict[str, Any]) -> dict[str, dict[str, float]]:
    """What was timed in a process."""
    return {kind: value for kind, value in run.items() if isinstance(value, dict)}


def compared(runs: dict[str, list[dict[str, Any]]], kind: str) -> dict[str, Any]:
    """Medians of both versions, and the median of the ratios within each round."""
    found: dict[str, Any] = {}
    for version, own in runs.items():
        every = [run[kind] for run in own]
        found[version] = {name: statistics.median(run[name] for run in every) for name in every[0]} | {"runs": every}
    for name, ratio in (("seconds", "ratio"), ("cpu_seconds", "cpu_ratio")):
        rounds = zip(runs["now"], runs["before"], strict=True)
        found[ratio] = statistics.median(now[kind][name] / before[kind][name] for now, before in rounds)
    return found


if __name__ == "__main__":
    main()
