"""What `glcan plan` says at real sizes, for the three tasks: activations, peak and FLOPs against end-to-end training.

Runs the command itself, one process a plan, and writes its JSON and the tables of the docs.

    python benchmarks/plans.py                             # some minutes; nothing is trained
    python benchmarks/plans.py --tasks detection
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
DOCS = Path(__file__).parent.parent / "docs"
# task -> the page with its table, the usual arguments, and for each model the numbers of blocks and further arguments
TASKS: dict[str, tuple[str, list[str], list[tuple[str, tuple[int, ...], list[str]]]]] = {
    "classification": (
        "memory.md",
        ["--batch", "64"],
        [
            ("torchvision/resnet50", (4, 8), []),
            ("torchvision/resnet101", (4, 8), []),
            ("torchvision/resnet152", (4,), []),
            ("torchvision/vit_b_16", (4, 8), []),
            ("cifar_resnet110", (16, 55), ["--batch", "1024"]),
        ],
    ),
    "super-resolution": (
        "tasks/super-resolution.md",
        ["--batch", "16", "--image", "48x48", "--optimizer", "adam"],
        [
            ("edsr_baseline", (4,), ["--scale", "2"]),
            ("edsr", (4,), ["--scale", "2"]),
            ("spandrel/RCAN", (4,), ["--scale", "2"]),
            ("spandrel/SwinIR", (4,), ["--scale", "2"]),
            ("edsr_baseline", (4,), ["--scale", "4"]),
            ("edsr", (4,), ["--scale", "4"]),
            ("spandrel/RCAN", (4,), ["--scale", "4"]),
            ("spandrel/SwinIR", (4,), ["--scale", "4"]),
        ],
    ),
    "detection": (
        "tasks/detection.md",
        ["--batch", "2", "--image", "800x1088"],
        [
            ("torchvision/retinanet_resnet50_fpn", (4, 6), []),
            ("torchvision/fcos_resnet50_fpn", (4, 6), []),
            ("retinanet_resnet101_fpn", (4, 8), []),
        ],
    ),
}
HEADER = (
    "| model | batch | K | activations | peak | FLOPs | checkpoint: activations, FLOPs | sqrt(n): activations, FLOPs | "
    "accumulated: activations |"
)


def main() -> None:
    """Plan, write the JSON file and the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    options = parser.parse_args()
    out = RESULTS / "plans.json"
    plans: list[dict[str, Any]] = json.loads(out.read_text())["plans"] if out.exists() else []
    for task in options.tasks:
        page, usual, models = TASKS[task]
        plans = [plan for plan in plans if plan["task"] != task]
        for model, numbers, more in models:
            for blocks in numbers:
                arguments = [model, "--task", task, *usual, *more, "--blocks", str(blocks), "--json"]
                print("glcan plan", *arguments, flush=True)
                command = [sys.executable, "-m", "glcan", "plan", *arguments]
                found = subprocess.run(command, capture_output=True, text=True, check=True).stdout
                plans.append({"command": " ".join(["glcan plan", *arguments]), **json.loads(found)})
        _insert(DOCS / page, _table([plan for plan in plans if plan["task"] == task]))
        out.write_text(json.dumps({"benchmark": "glcan plan at real sizes, fp32", "plans": plans}, indent=2) + "\n")
    print(f"wrote {out}")


def _table(plans: list[dict[str, Any]]) -> str:
    rows = [HEADER, "| --- | ---: | ---: | ---: | ---: | ---: | --- | --- | --- |"]
    for plan in plans:
        ratios, theirs = plan["vs_e2e"], plan["baselines"]["e2e"]
        others, accumulated = [], "–"
        for name, mine in plan["baselines"].items():
            activations = mine["activation_peak_bytes"] / theirs["activation_peak_bytes"]
            if name.startswith("checkpoint"):
                others.append(f"{activations:.3f}×, {mine['flops_per_step'] / theirs['flops_per_step']:.2f}×")
            elif "accumulate" in name:
                accumulated = f"{activations:.3f}× ({name.partition(':')[2]} parts)"
        shown = plan["model"] + (f" ×{plan['scale']}" if "scale" in plan else "")
        rows.append(
            f"| {shown} | {plan['batch']} | {plan['blocks']} | {ratios['activation_ratio']:.3f}× | "
            f"{ratios['peak_ratio']:.3f}× | {ratios['flops_ratio']:.3f}× | {' | '.join(others)} | "
            f"{accumulated} |"
        )
    return "\n".join(rows)


def _insert(page: Path, table: str) -> None:
    begin, end = "<!-- results:plans -->\n", "\n<!-- /results:plans -->"
    before, _, rest = page.read_text().partition(begin)
    _, _, after = rest.partition(end)
    page.write_text(f"{before}{begin}{table}{end}{after}")


if __name__ == "__main__":
    main()
