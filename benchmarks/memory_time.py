"""Peak memory against step time: exact methods, images chosen by gradient, and GLCAN, on steps of all tasks.

All methods of a model take turns (A B C, A B C, ...), so that a busy or warming machine meets them alike. Reported are
the median of the step times after warm-up, the median of the ratios to end-to-end within each round, the peak of live
tensors of a metered step, and on CUDA the allocator's peak. Needs torch, torchvision and timm alone.

    python benchmarks/memory_time.py                          # small sizes on a CPU, real sizes on a GPU
    python benchmarks/memory_time.py --models resnet50 --methods e2e checkpoint glcan:4     # the others' results stay
    python benchmarks/memory_time.py --plot benchmarks/results/memory_time_cpu.json     # draw it again

On a GPU whose hours count, models can be planned side by side and measured one after the other:

    for model in resnet50 retinanet; do python benchmarks/memory_time.py --models $model --lock /tmp/gpu.lock & done
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import functools
import gc
import itertools
import json
import re
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torch import nn
from torch.utils._pytree import tree_map_only

from glcan import Learner, measure_step
from glcan.errors import GlcanError
from glcan.inspect.tensors import tensors_in
from glcan.models import create
from glcan.tasks import create as create_task

RESULTS = Path(__file__).parent / "results"
RECOMPUTED = " recomputed"
EXACT = ("e2e", "checkpoint", "checkpoint-sqrt")
METHODS = (*EXACT, "e2e+accumulate:2", "selective", "glcan:2", "glcan:4", "glcan:8", f"glcan:4{RECOMPUTED}")
OTHERS = (*EXACT, "e2e+accumulate:2", "selective", "glcan:4")


@dataclasses.dataclass(frozen=True)
class Case:
    """A model, and the batch of its steps: images, and their height and width.

    Attributes:
        name, task, options: of the model, as `glcan.models.create` takes them.
        small: batch, height and width, on a CPU.
        real: the same, on a GPU: one at which a large one waits for its instructions, and one that needs its memory.
        methods: what takes turns.
        real_methods: what takes turns beside them on a GPU.
    """

    name: str
    small: tuple[int, int, int]
    real: tuple[tuple[int, int, int], ...]
    options: dict[str, Any] = dataclasses.field(default_factory=lambda: {"num_classes": 1000})
    task: str = "classification"
    methods: tuple[str, ...] = METHODS
    real_methods: tuple[str, ...] = ("e2e+accumulate:4",)


MODELS = {
    "resnet110": Case(
        "cifar_resnet110",
        (32, 32, 32),
        ((1024, 32, 32), (4096, 32, 32)),
        {"num_classes": 10},
        real_methods=("e2e+accumulate:4", "glcan:16"),
    ),
    "resnet50": Case("torchvision/resnet50", (8, 160, 160), ((64, 224, 224), (512, 224, 224))),
    "resnet101": Case("torchvision/resnet101", (8, 160, 160), ((64, 224, 224), (320, 224, 224))),
    "resnet152": Case("torchvision/resnet152", (4, 160, 160), ((64, 224, 224), (256, 224, 224))),
    "vit_b_16": Case("torchvision/vit_b_16", (4, 224, 224), ((64, 224, 224), (256, 224, 224))),
    "edsr_baseline": Case(
        "edsr_baseline", (8, 48, 48), ((16, 48, 48), (128, 96, 96)), {"scale": 2}, "super-resolution", OTHERS
    ),
    "retinanet": Case(
        "torchvision/retinanet_resnet50_fpn",
        (2, 256, 352),
        ((8, 800, 1088), (20, 800, 1088)),
        {"num_classes": 91},
        "detection",
        OTHERS,
        ("e2e+accumulate:4", "glcan:6"),
    ),
}
CPU_MODELS = ("resnet50", "resnet101", "vit_b_16", "resnet110", "edsr_baseline", "retinanet")
MARKERS = {"e2e": "o", "checkpoint": "s", "checkpoint-sqrt": "D", "e2e+accumulate:2": "v", "e2e+accumulate:4": "v"}
COLOURS = {"glcan": "tab:blue", "selective": "tab:green", "share": "tab:green"}
WARM_UP = 2


def main() -> None:
    """Measure, write the JSON file after every model, draw the plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--models", nargs="+", choices=MODELS, help="default: on a CPU the small ones, else all")
    parser.add_argument("--methods", nargs="+", help=f"as glcan writes them, local ones with '{RECOMPUTED}' or without")
    parser.add_argument("--precisions", nargs="+", choices=("fp32", "bf16"), help="default: fp32; on CUDA both")
    parser.add_argument("--rounds", type=int, default=15, help="steps of each method (default: 15)")
    parser.add_argument("--seconds", type=float, default=240, help="at most, for a model (default: 240)")
    parser.add_argument("--batch", type=int, nargs="+", help="default: the model's")
    parser.add_argument("--cuda-graph", action="store_true", help="record the steps of all methods")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    parser.add_argument("--lock", type=Path, help="measure only while this lock is held; planning goes on without it")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/memory_time_DEVICE.json")
    parser.add_argument("--plot", type=Path, metavar="JSON", help="only draw the plot of these results")
    options = parser.parse_args()
    if options.plot:
        draw(json.loads(options.plot.read_text()), options.plot.with_suffix(".png"))
        return
    if options.threads:
        torch.set_num_threads(options.threads)
    cuda = options.device.startswith("cuda")
    what = "cuda_graph" if options.cuda_graph else "cuda" if cuda else "cpu"
    out = options.out or RESULTS / f"memory_time_{what}.json"
    result: dict[str, Any] = {
        "benchmark": "peak memory against step time" + (", steps as CUDA graphs" if options.cuda_graph else ""),
        "optimizer": "SGD, momentum 0.9",
        "memory_format": "channels_last for convolutional networks",
        "environment": {"torch": torch.__version__, "device": device_name(options.device)},
        "models": [],
    }
    for name in options.models or (MODELS if cuda else CPU_MODELS):
        sizes = MODELS[name].real if cuda else (MODELS[name].small,)
        if options.batch:
            sizes = tuple(next((s for s in sizes if s[0] == n), (n, *sizes[-1][1:])) for n in options.batch)
        precisions = options.precisions or (("fp32", "bf16") if cuda else ("fp32",))
        for size, precision in itertools.product(sizes, precisions):
            try:
                found = measure(name, size, precision, options)
            except GlcanError as error:
                print(error, file=sys.stderr)
                sys.exit(2)
            with held(options.lock):  # others may have written meanwhile
                before = json.loads(out.read_text())["models"] if out.exists() else []
                others = [m for m in before if place(m) != place(found)]
                result["models"] = sorted([*others, found], key=place)
                out.parent.mkdir(parents=True, exist_ok=True)
                out.write_text(json.dumps(result, indent=2) + "\n")
    draw(result, out.with_suffix(".png"))
    print(f"wrote {out} and {out.with_suffix('.png')}")


def held(lock: Path | None) -> contextlib.AbstractContextManager[Any]:
    """The lock, if there is one."""
    return FileLock(lock) if lock else contextlib.nullcontext()


def place(found: dict[str, Any]) -> tuple[int, list[int], str]:
    """Where a model's results stand in the file: as in `MODELS`."""
    where = [case.name for case in MODELS.values()].index(found["model"])
    return where, [found["batch"], *found["image"]], found["precision"]


def measure(name: str, size: tuple[int, int, int], precision: str, options: argparse.Namespace) -> dict[str, Any]:
    """All methods on one model."""
    case = MODELS[name]
    cuda = options.device.startswith("cuda")
    batch, *side = size
    torch.manual_seed(0)
    task = create_task(case.task)
    sizes = {"min_size": min(side), "max_size": max(side)} if case.task == "detection" else {}
    layout = torch.contiguous_format if name.startswith("vit") else torch.channels_last
    original = create(case.name, **case.options, **sizes).to(options.device, memory_format=layout)  # type: ignore[call-overload]

    def ready(tensor: torch.Tensor) -> torch.Tensor:
        values = torch.rand_like(tensor) if tensor.dim() > 2 else tensor  # images; else labels or boxes
        return values.to(options.device, memory_format=layout if tensor.dim() == 4 else torch.preserve_format)

    sample = tree_map_only(torch.Tensor, ready, task.example(batch, 3, (side[0], side[1])))
    methods = options.methods or case.methods + (case.real_methods if cuda else ())
    learners = {
        method: build(copy.deepcopy(original), case.task, sample, method, precision, options.cuda_graph)
        for method in methods
    }
    with held(options.lock):
        print(f"{case.name}, batch {batch} at {side[0]}x{side[1]} px, {precision}", flush=True)
        rows = take_turns(learners, sample, options)
        del learners
        gc.collect()
        if cuda:
            torch.cuda.empty_cache()  # others may wait for it
    return {
        "model": case.name,
        "batch": batch,
        "image": side,
        "precision": precision,
        "device": device_name(options.device),
        "methods": rows,
    }


def device_name(device: str) -> str:
    """What the times are of."""
    return torch.cuda.get_device_name() if device.startswith("cuda") else f"cpu, {torch.get_num_threads()} threads"


def take_turns(
    learners: dict[str, Learner], sample: tuple[Any, ...], options: argparse.Namespace
) -> list[dict[str, Any]]:
    """Memory of each learner, and the time of steps in turn."""
    cuda = options.device.startswith("cuda")
    steps: dict[str, Callable[[], Any]] = {}
    rows: dict[str, dict[str, Any]] = {}
    for method, learner in learners.items():
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
            own = sum(t.numel() * t.element_size() for t in (*kept(learner), *tensors_in(sample)))
            torch.cuda.reset_peak_memory_stats()
            learner.step(*sample)
            rows[method]["cuda_peak_bytes"] = torch.cuda.max_memory_allocated() - before + own
        steps[method] = functools.partial(learner.step, *sample)

    if options.cuda_graph:
        for method, step in steps.items():
            reserved = _reserved()
            step()
            rows[method]["graph_bytes"] = _reserved() - reserved
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
    return list(rows.values())


def _reserved() -> int:
    """What the allocator holds for good: with recorded steps, the memory of their passes."""
    gc.collect()
    torch.cuda.empty_cache()
    return torch.cuda.memory_reserved()


def kept(learner: Learner) -> list[torch.Tensor]:
    """What a learner holds between steps."""
    tensors = [*learner.model.parameters(), *learner.model.buffers(), *learner.auxiliary.parameters()]
    for optimizer in learner.optimizers:
        tensors += [t for state in optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor)]
    return tensors


def build(
    model: nn.Module, task: str, sample: tuple[Any, ...], method: str, precision: str, cuda_graph: bool
) -> Learner:
    """The learner of a method, such as "checkpoint", "glcan:4", "glcan:4 recomputed" or "e2e+accumulate:2"."""
    return Learner(
        model,
        task,
        sample=sample,
        method=method.removesuffix(RECOMPUTED),
        recompute=method.endswith(RECOMPUTED),
        cuda_graph=cuda_graph,
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
    names = list(dict.fromkeys(found["model"] for found in models))
    lines = max(Counter(found["model"] for found in models).values())
    figure = Figure(figsize=(4.6 * len(names), 4.6 * lines), layout="constrained")
    panels = figure.subplots(lines, len(names), squeeze=False)
    free = {name: iter(panels[:, column]) for column, name in enumerate(names)}
    for found in models:
        axes = next(free[found["model"]])
        for i, row in enumerate(found["methods"]):
            versus = row["vs_e2e"]
            x, y = versus.get("cuda_peak_ratio", versus["peak_ratio"]), versus["time_ratio"]
            base, added = re.match(r"([\w-]+)(?::\d+)?(.*)", row["method"]).groups()  # type: ignore[union-attr]
            colour = COLOURS.get(base, "0.3" if row["method"] == "e2e" else "tab:red")
            axes.plot(
                x,
                y,
                MARKERS.get(row["method"], "^" if "+" in row["method"] else "o"),
                color=colour,
                markerfacecolor=colour if base in COLOURS and not added else "none",
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
            f"{found['model']}, {found['precision']}\nbatch {found['batch']} at {found['image'][0]} px",
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
    for axes in itertools.chain.from_iterable(free.values()):
        axes.set_axis_off()
    devices = dict.fromkeys(found.get("device", result["environment"]["device"]) for found in models)
    figure.suptitle(f"lower and further left is better; {', '.join(devices)}", fontsize="small")
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
