"""Which form of back-propagation on chosen images is the better one: Fashion-MNIST, ResNet-32, at equal memory.

Trains end-to-end, `selective` (half of each batch, chosen by gradient, no blocks) and a random half with the same
treatment of BatchNorm and a weight of 1, and meters a step of each. The form with blocks, which `selective` replaced,
is in the table from the runs of its time (fashion_mnist_resnet32_bf16_seeds/, fashion_mnist_resnet32_gpu_chosen.json).

    python benchmarks/selective_forms.py --data-root DIR --seeds 0 1 2 3 4 --jobs 2
"""

from __future__ import annotations

import argparse
import statistics
from functools import partial
from pathlib import Path
from typing import Any

import torch

from glcan.cost.step import measure_step
from glcan.training import RunConfig, build, environment, load_data, load_recipe, train
from glcan.training.building import to_device
from glcan.training.run import write_json
from glcan.training.side_by_side import completed

RESULT = Path(__file__).parent / "results" / "selective_forms.json"
FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "e2e": ("e2e", {}),
    "selective": ("selective", {}),
    "random half": ("selective", {"by": "random"}),
}
#: The form with blocks, by seed, from committed results: test accuracies on the same kind of machine, and on a GPU.
WITH_BLOCKS = {
    "selective:16 (AMD EPYC)": "fashion_mnist_resnet32_bf16_seeds/chosen_k16.json",
    "selective:4 (AMD EPYC)": "fashion_mnist_resnet32_bf16_seeds/chosen_k4.json",
    "selective:4 and selective:16 (H200, ten seeds)": "fashion_mnist_resnet32_gpu_chosen.json",
}


def main() -> None:
    """Train, meter, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", type=Path)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("runs/selective_forms"))
    parser.add_argument("--result", type=Path, default=RESULT)
    options = parser.parse_args()

    def config(form: str, seed: int) -> RunConfig:
        method, chosen = FORMS[form]
        return load_recipe(
            "fashion-mnist-resnet32",
            method=method,
            options=chosen,
            seed=seed,
            epochs=options.epochs,
            lr=0.2,
            precision="bf16",
            channels_last=True,
            device="cpu",
            data_root=options.data_root,
        )

    runs = [(form, seed) for seed in options.seeds for form in FORMS]
    calls = [
        partial(train, config(form, seed), options.out / form.replace(" ", "-") / f"seed{seed}", resume=True)
        for form, seed in runs
    ]
    values: dict[str, dict[int, float]] = {form: {} for form in FORMS}
    for index, result in completed(calls, options.jobs):
        if isinstance(result, BaseException):
            raise result
        form, seed = runs[index]
        values[form][seed] = result.metric.value
    rows = [row(form, values[form], values["e2e"], config(form, options.seeds[0])) for form in FORMS]
    write_json(
        options.result,
        {
            "task": "classification",
            "dataset": "fashion-mnist",
            "model": "cifar_resnet32",
            "epochs": options.epochs,
            "seeds": options.seeds,
            "methods": rows,
            "with_blocks": WITH_BLOCKS,
            "environment": environment(),
        },
    )
    print(f"{options.result} is written")


def row(form: str, values: dict[int, float], base: dict[int, float], config: RunConfig) -> dict[str, Any]:
    """Accuracies of a form with each seed, their distance to end-to-end training, and what a step costs."""
    learner = build(config, data := load_data(config))
    batch = to_device(next(iter(data.loader("train", config.batch))), torch.device("cpu"), torch.channels_last)
    cost = measure_step(learner, *batch)
    distances = [value - base[seed] for seed, value in sorted(values.items()) if seed in base]
    return {
        "name": form,
        "method": config.method,
        "options": config.options,
        "values": [values[seed] for seed in sorted(values)],
        "seeds": sorted(values),
        "mean": statistics.fmean(values.values()),
        "std": statistics.stdev(values.values()) if len(values) > 1 else None,
        "delta_to_e2e": statistics.fmean(distances) if distances else None,
        "peak_bytes": cost.peak_bytes,
        "activation_peak_bytes": cost.activation_peak_bytes,
        "flops_per_step": cost.flops,
        "auxiliary_parameters": 0,
    }


if __name__ == "__main__":
    main()
