"""LocalBench: every method on the same data, epochs and tuning effort, for each task; and the ablation of `glcan`.

For each entry (a method with its options) and number of blocks, the learning rate is chosen on validation images from
one small grid, the same for all entries; then the chosen one is trained with every seed, and the test data is looked at
after the last epoch. Every run leaves one JSON file under benchmarks/results/localbench/BENCH, and a run whose file is
there is not made again: a bench can be stopped, continued and extended, on another machine too. Recorded runs of
methods that are no entries any more stay in the tables.

    python benchmarks/localbench.py classification                        # all methods: hours on two cores
    python benchmarks/localbench.py classification --entries glcan dgl selective --blocks 16
    python benchmarks/localbench.py classification --entries my.rules:Nearest   # a rule of one's own
    python benchmarks/localbench.py ablation
    python benchmarks/localbench.py --quick --out runs/localbench-quick   # all, reduced: `make localbench-quick`
    python benchmarks/localbench.py classification --table                # tables and plots of what is there

On a CPU, runs are trained side by side with one thread each (--jobs). What is compared is in localbench_benches.py, a
run in localbench_runs.py, tables and plots in localbench_tables.py.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from localbench_benches import BENCHES, Bench, Entry, quick
from localbench_runs import Plan, work
from localbench_tables import report
from rich.console import Console

from glcan import strategies
from glcan.errors import GlcanError
from glcan.training.side_by_side import cpus

RESULTS = Path(__file__).parent / "results" / "localbench"


def main() -> None:
    """Make the runs that are missing, then tables and plots."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bench", nargs="*", metavar="BENCH", help=f"{', '.join(BENCHES)}; default: all")
    parser.add_argument("--quick", action="store_true", help="a reduced version, within 20 minutes on two cores")
    parser.add_argument("--entries", nargs="+", help="methods, of the bench or not; default: the bench's")
    parser.add_argument("--blocks", nargs="+", type=int, help="default: the bench's")
    parser.add_argument("--seeds", nargs="+", type=int, help="default: the bench's")
    parser.add_argument("--jobs", type=int, help="runs side by side; default: CPUs, or 1 on a GPU")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--cuda-graph", action="store_true", help="record steps: for GPUs that wait for Python")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results (default: %(default)s)")
    parser.add_argument("--runs", type=Path, default=Path("runs/localbench"), help="default: %(default)s")
    parser.add_argument("--table", action="store_true", help="train nothing: tables and plots of what is there")
    options = parser.parse_args()
    for name in options.bench:
        if name not in BENCHES:
            parser.error(f"there is no bench {name!r}; choose from {', '.join(BENCHES)}")
    console = Console(stderr=True)
    place = {"device": options.device, "cuda_graph": options.cuda_graph}
    jobs = options.jobs or (1 if torch.cuda.is_available() else cpus())
    for name in options.bench or BENCHES:
        bench = quick(name) if options.quick else BENCHES[name]
        try:
            bench = dataclasses.replace(bench, **dict(_chosen(bench, options)))
            plan = Plan(name, bench, options.out / name, options.runs / ("quick" if options.quick else ""), place)
            if not options.table:
                work(plan.choices(), jobs, f"{name}, learning rates", console)
                work(plan.final(), jobs, name, console)
        except GlcanError as error:
            console.print(str(error), style="red", highlight=False, markup=False)
            sys.exit(2)
        print(report(plan))


def _chosen(bench: Bench, options: argparse.Namespace) -> Iterator[tuple[str, Any]]:
    """What the command line replaces."""
    if options.entries:
        entries: list[Entry] = []
        for name in options.entries:
            own = [entry for entry in bench.entries if name in (entry.method, entry.note)]
            entries += own or [Entry(name)]
            for entry in entries:
                strategies.create(entry.with_blocks(2), bench.settings.get("task", "classification"), entry.options)
        yield "entries", tuple(entries)
    if options.blocks:
        yield "blocks", tuple(options.blocks)
    if options.seeds:
        yield "seeds", tuple(options.seeds)


if __name__ == "__main__":
    main()
