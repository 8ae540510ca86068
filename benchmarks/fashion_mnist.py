"""ResNet-32 on Fashion-MNIST: end-to-end, checkpointing, and GLCAN in 4 and 16 blocks.

Runs `glcan.report.compare` on the recipe and copies what it wrote into benchmarks/results, where it is committed.

    python benchmarks/fashion_mnist.py                                   # the recipe, three seeds: for a GPU
    python benchmarks/fashion_mnist.py --epochs 5 --seeds 0 1 --limit 20000 --device cpu --channels-last
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

from glcan.errors import GlcanError
from glcan.report import compare
from glcan.training import load_recipe

NAME = "fashion_mnist_resnet32"
RECIPE = "fashion-mnist-resnet32"
RESULTS = Path(__file__).parent / "results" / NAME
FILES = ("comparison.json", "comparison.md", "metric_over_epochs.png", "metric_against_cost.png")


def main() -> None:
    """Run the comparison and copy its results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default=RECIPE)
    parser.add_argument("--methods", nargs="+", default=["e2e", "checkpoint", "glcan:4", "glcan:16"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, help="default: the recipe's")
    parser.add_argument("--batch", type=int, help="default: the recipe's")
    parser.add_argument("--lr", type=float, help="default: the recipe's")
    parser.add_argument("--limit", type=int, help="use at most so many training images (default: all)")
    parser.add_argument("--data-root", type=Path, help="folder of the IDX files (default: where glcan finds them)")
    parser.add_argument("--device", help="default: the first GPU, else the CPU")
    parser.add_argument("--channels-last", action="store_true", default=None, help="doubles the speed on CPUs")
    parser.add_argument("--out", type=Path, default=Path("runs") / NAME, help="where the runs go, and are continued")
    parser.add_argument("--results", type=Path, default=RESULTS, help=f"default: {RESULTS}")
    parser.add_argument("--share-exact", action="store_true", help="do not train checkpointing, only meter it")
    options = parser.parse_args()

    names = ("epochs", "batch", "lr", "limit", "data_root", "device", "channels_last")
    changes = {name: value for name in names if (value := getattr(options, name)) is not None}
    try:
        config = load_recipe(options.recipe, **changes)
        compare(config, options.methods, options.seeds, options.out, share_exact=options.share_exact)
    except GlcanError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    options.results.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        shutil.copyfile(options.out / name, options.results / name)
    print(f"copied to {options.results}")


if __name__ == "__main__":
    main()
