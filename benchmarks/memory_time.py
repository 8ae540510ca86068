"""Peak memory against step time: end-to-end training, activation checkpointing and GLCAN, on real steps.

All methods of a model take turns (A B C, A B C, ...), so that a busy or warming machine meets them alike. Reported are
the median of the step times after warm-up, the median of the ratios to end-to-end within each round, the peak of live
tensors of a metered step, and on CUDA the allocator's peak. Needs torch, torchvision and timm alone.

    python benchmarks/memory_time.py                          # small sizes on a CPU, real sizes on a GPU
    python benchmarks/memory_time.py --models resnet50 --methods e2e checkpoint glcan:4
    python benchmarks/memory_time.py --plot benchmarks/results/memory_time_cpu.json     # draw it again
"""

from __future__ import annotations

import argparse
import copy
import functools
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from glcan import LocalLearner, measure_step
from glcan.errors import GlcanError
from glcan.models import create

RESULTS = Path(__file__).parent / "results"
METHODS = ("e2e", "checkpoint", "checkpoint-sqrt", "glcan:2", "glcan:4", "glcan:8", "glcan:4+recompute")
# model -> (name, classes, CPU: batch and image side, GPU: the same)
MODELS: dict[str, tuple[str, int, tuple[int, int], tuple[int, int]]] = {
    "resnet110": ("cifar_resnet110", 10, (32, 32), (1024, 32)),
    "resnet50": ("torchvision/resnet50", 1000, (8, 160), (64, 224)),
    "resnet101": ("torchvision/resnet101", 1000, (8, 160), (64, 224)),
    "resnet152": ("torchvision/resnet152", 1000, (4, 160), (64, 224)),
    "vit_b_16": ("torchvision/vit_b_16", 1000, (4, 224), (64, 224)),
}
CPU_MODELS = ("resnet50", "resnet101", "vit_b_16", "resnet110")
MARKERS = {"e2e": "o", "checkpoint": "s", "checkpoint-sqrt": "D"}
WARM_UP = 2


def main() -> None:
    """Measure, write the JSON file after every model, draw the plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--models", nargs="+", choices=MODELS, help="default: on a CPU the small ones, else all")
    parser.add_argument("--methods", nargs="+", default=METHODS, help="baselines, RULE:BLOCKS, RULE:BLOCKS+recompute")
    parser.add_argument("--precisions", nargs="+", choices=("fp32", "bf16"), help="default: fp32; on CUDA both")
    parser.add_argument("--rounds", type=int, default=15, help="steps of each method (default: 15)")
    parser.add_argument("--seconds", type=float, default=240, help="at most, for a model (default: 240)")
    parser.add_argument("--batch", type=int, help="default: the model's")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/memory_time_DEVICE.json")
    parser.add_argument("--plot", type=Path, metavar="JSON", help="only draw the plot of these results")
    options = parser.parse_args()
    if options.plot:
        draw(json.loads(options.plot.read_text()), options.plot.with_suffix(".png"))
        return
    if options.threads:
        torch.set_num_threads(options.threads)
    cuda = options.device.startswith("cuda")
    out = options.out or RESULTS / f"memory_time_{'cuda' if cuda else 'cpu'}.json"
    result: dict[str, Any] = {
        "benchmark": "peak memory against step time",
        "optimizer": "SGD, momentum 0.9",
        "memory_format": "channels_last for convolutional networks",
        "environment": {
            "torch": torch.__version__,
            "device": torch.cuda.get_device_name() if cuda else f"cpu, {torch.get_num_threads()} threads",
        },
        "models": [],
    }
    for name in options.models or (MODELS if cuda else CPU_MODELS):
        for precision in options.precisions or (("fp32", "bf16") if cuda else ("fp32",)):
            try:
                result["models"].append(measure(name, precision, options))
            except GlcanError as error:
                print(error, file=sys.stderr)
                sys.exit(2)
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(json.dumps(result, indent=2) + "\n")
    draw(result, out.with_suffix(".png"))
    print(f"wrote {out} and {out.with_suffix('.png')}")


def measure(name: str, precision: str, options: argparse.Namespace) -> dict[str, Any]:
    """All methods on one model."""
    full, classes, small, real = MODELS[name]
    cuda = options.device.startswith("cuda")
    batch, side = real if cuda else small
    batch = options.batch or batch
    torch.manual_seed(0)
    original = create(full, num_classes=classes).to(options.device)
    convolutional = not name.startswith("vit")
    if convolutional:
        original = original.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    images = torch.randn(batch, 3, side, side, device=options.device)
    if convolutional:
        images = images.contiguous(memory_format=torch.channels_last)
    sample = images, torch.randint(classes, (batch,), device=options.device)
    print(f"{full}, batch {batch} at {side} px, {precision}", flush=True)

    steps: dict[str, Callable[[], Any]] = {}
    rows: dict[str, dict[str, Any]] = {}
    for method in options.methods:
        learner = build(copy.deepcopy(original), sample, method, precision)
        cost = measure_step(learner, *sample)
        rows[method] = {
            "method": method,
            "blocks": learner.plan.blocks,
            "cuts": list(learner.plan.cuts),
            "recompute": list(learner.plan.recompute),
            "peak_bytes": cost.peak_bytes,
            "activation_peak_bytes": cost.activation_peak_bytes,
            "flops_per_step": cost.flops,
            "auxiliary_parameters": sum(p.numel() for p in learner.auxiliary.parameters()),
        }
        if cuda:
            # all learners stay for the timing: what the others hold is not this one's
            gc.collect()
            before = torch.cuda.memory_allocated()
            own = sum(t.numel() * t.element_size() for t in kept(learner))
            torch.cuda.reset_peak_memory_stats()
            learner.step(*sample)
            rows[method]["cuda_peak_bytes"] = torch.cuda.max_memory_allocated() - before + own
        steps[method] = functools.partial(learner.step, *sample)

    seconds: dict[str, list[float]] = {method: [] for method in steps}
    start = time.monotonic()
    for i in range(options.rounds + WARM_UP):
        for method, step in steps.items():
            seconds[method].append(timed(step, cuda))
        if i >= WARM_UP + 4 and time.monotonic() - start > options.seconds:
            break
    first = "e2e" if "e2e" in rows else next(iter(rows))
    for method, row in rows.items():
        own_times, base = seconds[method][WARM_UP:], seconds[first][WARM_UP:]
        row["step_seconds"] = statistics.median(own_times)
        row["rounds"] = len(own_times)
        ratios = [a / b for a, b in zip(own_times, base, strict=True)]
        row["vs_e2e"] = {
            "time_ratio": statistics.median(ratios),
            "fastest_time_ratio": min(own_times) / min(base),
            "peak_ratio": row["peak_bytes"] / rows[first]["peak_bytes"],
            "activation_ratio": row["activation_peak_bytes"] / rows[first]["activation_peak_bytes"],
            "flops_ratio": row["flops_per_step"] / rows[first]["flops_per_step"],
        }
        if cuda:
            row["vs_e2e"]["cuda_peak_ratio"] = row["cuda_peak_bytes"] / rows[first]["cuda_peak_bytes"]
        versus = row["vs_e2e"]
        print(
            f"  {method:18} {row['step_seconds'] * 1e3:8.1f} ms ({versus['time_ratio']:.2f}x)  peak "
            f"{row['peak_bytes'] / 2**20:8.1f} MiB ({versus['peak_ratio']:.2f}x)  FLOPs {versus['flops_ratio']:.2f}x",
            flush=True,
        )
    return {
        "model": full,
        "batch": batch,
        "image": [side, side],
        "precision": precision,
        "methods": list(rows.values()),
    }


def kept(learner: LocalLearner) -> list[torch.Tensor]:
    """What a learner holds between steps."""
    tensors = [*learner.model.parameters(), *learner.model.buffers(), *learner.auxiliary.parameters()]
    for optimizer in learner.optimizers:
        tensors += [t for state in optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor)]
    return tensors


def build(model: nn.Module, sample: tuple[torch.Tensor, ...], method: str, precision: str) -> LocalLearner:
    """The learner of a method, such as "checkpoint", "glcan:4" or "glcan:4+recompute"."""
    name, _, again = method.partition("+")
    rule, _, blocks = name.partition(":")
    return LocalLearner(
        model,
        sample=sample,
        rule=rule,
        blocks=int(blocks) if blocks else None,
        recompute=again == "recompute",
        autocast=torch.bfloat16 if precision == "bf16" else None,
        optimizer=functools.partial(torch.optim.SGD, lr=1e-3, momentum=0.9),
    )


def timed(step: Callable[[], Any], cuda: bool) -> float:
    """Seconds of one step."""
    if cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def draw(result: dict[str, Any], path: Path) -> None:
    """The Pareto plot: peak memory against step time, both relative to end-to-end training."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("matplotlib is not installed, so there is no plot; run again with --plot where it is", file=sys.stderr)
        return
    models = result["models"]
    figure = Figure(figsize=(4.6 * len(models), 4.6), layout="constrained")
    for axes, found in zip(figure.subplots(1, len(models), squeeze=False)[0], models, strict=True):
        for i, row in enumerate(found["methods"]):
            versus = row["vs_e2e"]
            x, y = versus.get("cuda_peak_ratio", versus["peak_ratio"]), versus["time_ratio"]
            local = ":" in row["method"]
            axes.plot(
                x,
                y,
                MARKERS.get(row["method"], "^" if "+" in row["method"] else "o"),
                color="tab:blue" if local else "tab:red" if row["method"] != "e2e" else "0.3",
                markerfacecolor="tab:blue" if local and "+" not in row["method"] else "none",
                markersize=8,
                markeredgewidth=1.8,
            )
            left = i % 2 == 1
            axes.annotate(
                row["method"],
                (x, y),
                textcoords="offset points",
                xytext=(-7 if left else 7, 6),
                ha="right" if left else "left",
                fontsize="x-small",
            )
        axes.set_title(
            f"{found['model']}, batch {found['batch']} at {found['image'][0]} px, {found['precision']}",
            fontsize="small",
        )
        axes.set_xlabel("peak memory / end-to-end")
        axes.set_ylabel("step time / end-to-end")
        axes.axhline(1.0, color="0.7", linewidth=1, zorder=0)
        axes.axvline(1.0, color="0.7", linewidth=1, zorder=0)
        axes.set_xlim(0, 1.15)
        axes.margins(y=0.15)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"lower and further left is better; {result['environment']['device']}", fontsize="small")
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
