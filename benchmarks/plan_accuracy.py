"""What the planner predicts, against what a real step needs; and what planning itself costs.

For each model, method and batch: `glcan.plan` on fake tensors, then `glcan.measure_step` on a real learner. Then the
time and the host memory of planning, each in a process of its own.

    python benchmarks/plan_accuracy.py                 # some minutes on two cores
    python benchmarks/plan_accuracy.py --device cuda   # beside the allocator's peak
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

import glcan
from glcan.models import create

RESULTS = Path(__file__).parent / "results"
# model -> (classes, image side, two batches)
MODELS: dict[str, tuple[int, int, tuple[int, int]]] = {
    "torchvision/resnet50": (1000, 224, (2, 4)),
    "torchvision/resnet101": (1000, 224, (2, 4)),
    "torchvision/vit_b_16": (1000, 224, (2, 4)),
    "torchvision/swin_t": (1000, 224, (2, 4)),
    "torchvision/convnext_tiny": (1000, 224, (2, 4)),
    "cifar_resnet110": (10, 32, (8, 32)),
}
RECOMPUTED = " recomputed"
METHODS = ("e2e", "checkpoint", "checkpoint-sqrt", "selective", "glcan:4", "glcan:8", f"glcan:4{RECOMPUTED}")
PLANS = (
    ["torchvision/resnet152", "--method", "glcan:4"],
    ["torchvision/resnet152", "--method", "glcan:26"],
    ["torchvision/resnet152", "--method", "glcan:51"],
    ["torchvision/resnet152", "--method", "selective"],
    ["torchvision/resnet152", "--batch", "4096", "--method", "glcan:8"],
    ["torchvision/resnet152", "--method", "glcan", "--memory", "4GiB"],
    ["torchvision/vit_h_14", "--batch", "256", "--method", "glcan:8"],
    ["torchvision/swin_v2_b", "--image", "256x256", "--method", "glcan:8"],
    ["torchvision/densenet201", "--method", "glcan:8"],
    ["torchvision/efficientnet_b7", "--method", "glcan:8"],
    ["timm/convnextv2_huge", "--method", "glcan:8"],
    ["cifar_resnet110", "--batch", "1024", "--method", "glcan:55"],
)


def main() -> None:
    """Compare, write the JSON file and say what came out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--no-plans", action="store_true", help="leave out what planning costs")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/plan_accuracy_DEVICE.json")
    options = parser.parse_args()
    optimizer = functools.partial(torch.optim.SGD, lr=1e-3, momentum=0.9)
    out = options.out or RESULTS / f"plan_accuracy_{options.device.partition(':')[0]}.json"
    result: dict[str, Any] = {
        "benchmark": "predicted against measured peak of live tensors",
        "environment": {"torch": torch.__version__, "device": options.device},
        "rows": [],
        "planning": [],
    }
    if out.exists():  # other models' rows stay
        before = json.loads(out.read_text())
        result["rows"] = [row for row in before["rows"] if row["model"] not in options.models]
        result["planning"] = before["planning"]

    def write() -> None:
        result["largest_error"] = max((abs(row["error"]) for row in result["rows"]), default=None)
        out.write_text(json.dumps(result, indent=2) + "\n")

    if not options.no_plans:
        result["planning"] = [planned(arguments) for arguments in PLANS]
        write()
    for name in options.models:
        classes, side, batches = MODELS[name]
        model = create(name, num_classes=classes).to(options.device)
        for batch in batches:
            sample = (
                torch.randn(batch, 3, side, side, device=options.device),
                torch.randint(classes, (batch,), device=options.device),
            )
            for method in METHODS:
                how: dict[str, Any] = {
                    "method": method.removesuffix(RECOMPUTED),
                    "recompute": method.endswith(RECOMPUTED),
                }
                predicted = glcan.plan(model, sample=sample, optimizer=optimizer, baselines=(), **how).cost
                learner = glcan.Learner(copy.deepcopy(model), sample=sample, optimizer=optimizer, **how)
                measured = glcan.measure_step(learner, *sample)
                row = {
                    "model": name,
                    "batch": batch,
                    "method": method,
                    "predicted_peak_bytes": predicted.peak_bytes,
                    "measured_peak_bytes": measured.peak_bytes,
                    "error": predicted.peak_bytes / measured.peak_bytes - 1,
                    "activation_error": predicted.activation_peak_bytes / measured.activation_peak_bytes - 1,
                    "cuda_peak_bytes": measured.cuda_peak_bytes,
                }
                result["rows"].append(row)
                write()
                print(f"{name:28} {batch:4} {method:18} {row['error']:+.4%}", flush=True)
    print(f"largest error {result['largest_error']:.4%}; wrote {out}")


def planned(arguments: list[str]) -> dict[str, Any]:
    """Seconds (of the wall, and of the CPU) and peak resident memory of `glcan plan` in a process of its own."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    start = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "glcan", "plan", *arguments, "--json"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    peak = 0
    while process.poll() is None:
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
            peak = max(peak, *(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")), 0)
        except (OSError, ValueError):
            pass
        time.sleep(0.05)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert process.stderr is not None
    found = {
        "arguments": arguments,
        "exit_code": process.returncode,
        "seconds": time.perf_counter() - start,
        "cpu_seconds": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        "host_peak_bytes": 1024 * peak,
        "said": process.stderr.read().strip(),
    }
    print(found, flush=True)
    return found


if __name__ == "__main__":
    main()
