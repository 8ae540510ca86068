"""Accuracy of the methods on real images, with their memory and time: one comparison for each task.

Runs `glcan.report.compare` and copies what it wrote into benchmarks/results/NAME, where it is committed.

    python benchmarks/accuracy.py fashion_mnist_resnet32                     # the recipe, three seeds: for a GPU
    python benchmarks/accuracy.py fashion_mnist_resnet32 --epochs 5 --seeds 0 1 --device cpu --channels-last
    python benchmarks/accuracy.py photographs_edsr_small --data-root DIR --share-exact   # DIR/train/*, DIR/test/*
    python benchmarks/accuracy.py scenes_fcos_small --share-exact --methods e2e glcan:4 glcan:4+start:0.5

On CPUs of few cores it pays to train several runs side by side, with one thread each: ``--jobs 2``.
"""

from __future__ import annotations

import argparse
import dataclasses
import shutil
import sys
from pathlib import Path
from typing import Any

from glcan.cli.options import pairs
from glcan.errors import GlcanError
from glcan.report import compare
from glcan.training import RunConfig, load_recipe
from glcan.training.run import write_json

RESULTS = Path(__file__).parent / "results"
#: One method of each family, and what a divided batch does in their place.
FAMILIES = ("e2e", "checkpoint", "e2e+accumulate:4", "glcan:4", "selective")
FILES = ("comparison.md", "metric_over_epochs.png", "metric_against_cost.png")


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What is compared: the settings, by recipe or the task's defaults, the methods and the seeds."""

    settings: str | dict[str, Any]
    methods: tuple[str, ...] = FAMILIES
    seeds: tuple[int, ...] = (0, 1)

    def config(self, **changes: Any) -> RunConfig:
        """The settings with some of them changed."""
        if isinstance(self.settings, str):
            return load_recipe(self.settings, **changes)
        return RunConfig(**(self.settings | changes))


COMPARISONS = {
    "fashion_mnist_resnet32": Comparison("fashion-mnist-resnet32", (*FAMILIES, "glcan:16"), (0, 1, 2)),
    "photographs_edsr_small": Comparison("photographs-edsr-small-x2"),
    "scenes_fcos_small": Comparison(
        {"task": "detection"}, (*FAMILIES, "dgl:4", "dgl:4+start:0.5", "glcan:4+start:0.5")
    ),
}


def main() -> None:
    """Run a comparison, or one run of it, and copy its results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=COMPARISONS)
    parser.add_argument("--methods", nargs="+")
    parser.add_argument("--seeds", nargs="+", type=int)
    parser.add_argument("--epochs", type=int, help="default: the recipe's, like the next ones")
    parser.add_argument("--batch", type=int)
    parser.add_argument("--lr", type=float)
    parser.add_argument("--option", metavar="NAME=VALUE", nargs="+", help="of the recipe's method: budget=0.2")
    parser.add_argument("--precision", choices=("fp32", "bf16"))
    parser.add_argument("--limit", type=int, help="use at most so many training images (default: all)")
    parser.add_argument("--data-root", type=Path, help="where the data set is (default: where glcan finds it)")
    parser.add_argument("--device", help="default: the first GPU, else the CPU")
    parser.add_argument("--channels-last", action="store_true", default=None, help="doubles the speed on CPUs")
    parser.add_argument("--cuda-graph", action="store_true", default=None, help="record steps: for GPUs that wait")
    parser.add_argument("--out", type=Path, help="where the runs go, and are continued (default: runs/NAME)")
    parser.add_argument("--results", type=Path, help="default: benchmarks/results/NAME")
    parser.add_argument("--share-exact", action="store_true", help="do not train checkpointing, only meter it")
    parser.add_argument("--jobs", type=int, default=1, help="runs trained side by side (default: %(default)s)")
    options = parser.parse_args()

    chosen = COMPARISONS[options.name]
    methods, seeds = options.methods or list(chosen.methods), options.seeds or list(chosen.seeds)
    out = options.out or Path("runs") / options.name
    results = options.results or RESULTS / options.name
    names = (
        "epochs",
        "batch",
        "lr",
        "precision",
        "limit",
        "data_root",
        "device",
        "channels_last",
        "cuda_graph",
    )
    changes = {name: value for name in names if (value := getattr(options, name)) is not None}
    try:
        if options.option:
            changes["options"] = pairs("--option", options.option)
        config = chosen.config(**changes)
        comparison = compare(config, methods, seeds, out, share_exact=options.share_exact, jobs=options.jobs)
    except GlcanError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    results.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        shutil.copyfile(out / name, results / name)
    comparison["config"]["data_root"] = None  # of this machine
    write_json(results / "comparison.json", comparison)
    print(f"copied to {results}")


if __name__ == "__main__":
    main()
