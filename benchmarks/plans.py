"""What `glcan plan` says at real sizes, for the three tasks: activations, peak and FLOPs of every family of methods.

Nothing is trained, and nothing computed: each method's step runs on tensors without contents, as in the command that
stands beside each plan. Writes one JSON file and the tables of the docs.

    python benchmarks/plans.py                             # half an hour on one core
    python benchmarks/plans.py --tasks detection           # the other tasks' plans stay
    python benchmarks/plans.py --models edsr_baseline      # and so do the other models'
    python benchmarks/plans.py --tables                    # only the tables, of the plans that are there
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from glcan import models, tasks
from glcan.cost.step import StepCost
from glcan.errors import GlcanError
from glcan.inspect.dryrun import UntouchedParameters
from glcan.planning import Forecast
from glcan.planning.bench import Bench
from glcan.strategies.method import parse_method
from glcan.training import environment
from glcan.training.building import optimizer_factory
from glcan.training.run import write_json

OUT = Path(__file__).parent / "results" / "plans.json"
DOCS = Path(__file__).parent.parent / "docs"
BASELINES = ("e2e", "checkpoint", "checkpoint-sqrt", "e2e+accumulate:4", "e2e+accumulate:8", "e2e+accumulate:16")


@dataclasses.dataclass(frozen=True)
class Case:
    """A model, and the steps that are planned for it.

    Attributes:
        model: as `glcan.models.create` takes it.
        task: of the model.
        batch, image: images, and their height and width.
        blocks: K of `glcan:K`; those that the model cannot be cut into are left out.
        scale: of super-resolution.
    """

    model: str
    task: str
    batch: int
    image: tuple[int, int]
    blocks: tuple[int, ...] = (2, 4, 8, 16)
    scale: int | None = None

    @property
    def optimizer(self) -> str:
        """With momentum for classifiers and detectors."""
        return "adam" if self.scale else "sgd"

    @property
    def label(self) -> str:
        """The model's name in a table."""
        return self.model.rpartition("/")[2] + (f" ×{self.scale}" if self.scale else "")

    @property
    def methods(self) -> tuple[str, ...]:
        """All that is planned, end-to-end training first."""
        parts = [name for name in BASELINES if parse_method(name).accumulate <= self.batch]
        return (*parts, *(f"glcan:{count}" for count in self.blocks), "selective")

    def about(self) -> dict[str, Any]:
        """What is the same for all of its plans."""
        return {
            "model": self.model,
            "task": self.task,
            "batch": self.batch,
            "image": list(self.image),
            "precision": "fp32",
            "optimizer": self.optimizer,
        } | ({"scale": self.scale} if self.scale else {})

    def command(self, method: str) -> str | None:
        """The command line that gives this plan; none with parts of a single image, which it refuses."""
        if self.batch < 2 * parse_method(method).accumulate:
            return None
        size = f"--batch {self.batch} --image {self.image[0]}x{self.image[1]} --optimizer {self.optimizer}"
        scale = f" --scale {self.scale}" if self.scale else ""
        return f"glcan plan {self.model} --task {self.task} {size}{scale} --method {method} --json"


def _classifier(model: str, batch: int = 64, side: int = 224) -> Case:
    return Case(model, "classification", batch, (side, side))


def _detector(model: str, batch: int) -> Case:
    return Case(model, "detection", batch, (800, 1088), (2, 4, 6, 8))


def _upscaler(model: str, scale: int = 2) -> Case:
    return Case(model, "super-resolution", 16, (48, 48), (2, 4, 8), scale)


CASES = (
    _classifier("torchvision/resnet50"),
    _classifier("torchvision/resnet101"),
    _classifier("torchvision/resnet152"),
    _classifier("cifar_resnet110", 1024, 32),
    _classifier("torchvision/vit_b_16"),
    _classifier("torchvision/efficientnet_b0"),
    _classifier("torchvision/convnext_tiny"),
    _detector("torchvision/retinanet_resnet50_fpn", 2),
    _detector("torchvision/retinanet_resnet50_fpn", 16),
    _detector("torchvision/fcos_resnet50_fpn", 2),
    _detector("torchvision/fcos_resnet50_fpn", 16),
    _detector("retinanet_resnet101_fpn", 2),
    _upscaler("edsr_baseline"),
    _upscaler("edsr_baseline", 4),
    _upscaler("edsr"),
    _upscaler("spandrel/SwinIR-light"),
    _upscaler("spandrel/RCAN"),
)
PAGES = {
    "classification": "memory.md",
    "detection": "tasks/detection.md",
    "super-resolution": "tasks/super-resolution.md",
}


def planned(case: Case) -> list[dict[str, Any]]:
    """The plans of all methods of a case, each against the exact ones."""
    bench = _bench(case)
    forecasts: dict[str, Forecast] = {}
    for method in case.methods:
        try:
            forecasts[method] = bench.run(method)
        except GlcanError as error:
            print(f"  {method}: {error}", flush=True)
    baselines: dict[str, StepCost] = {name: forecasts[name].cost for name in BASELINES if name in forecasts}
    found = []
    for method, forecast in forecasts.items():
        said = dataclasses.replace(forecast, baselines=baselines).as_dict()
        found.append({"command": case.command(method), **case.about(), **said})
        print(f"  {_cell(found[-1], 'activation_ratio')}  {forecast.headline}", flush=True)
    return found


def _bench(case: Case) -> Bench:
    """The model on tensors without contents, as `glcan plan` builds it."""
    detecting = case.task == "detection"
    sizes = {"min_size": min(case.image), "max_size": max(case.image)} if detecting else {}
    side = case.image[0] if case.image[0] == case.image[1] else None
    task = tasks.SuperResolution(scale=case.scale) if case.scale else tasks.create(case.task)
    with UntouchedParameters():
        model = models.create(case.model, image_size=side, scale=case.scale, **sizes)  # type: ignore[arg-type]
    return Bench(model, task, task.example(case.batch, 3, case.image), None, optimizer_factory(case.optimizer))


def main() -> None:
    """Plan, write the JSON file after every model, then the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=PAGES, default=list(PAGES))
    parser.add_argument("--models", nargs="+", choices=sorted({case.model for case in CASES}), help="default: all")
    parser.add_argument("--tables", action="store_true", help="plan nothing: the tables of the plans that are there")
    parser.add_argument("--out", type=Path, default=OUT, help="default: %(default)s")
    parser.add_argument("--docs", type=Path, default=DOCS, help="folder of the pages (default: %(default)s)")
    options = parser.parse_args()
    plans: list[dict[str, Any]] = []
    if options.out.exists():
        plans = json.loads(options.out.read_text(encoding="utf-8"))["plans"]
    for case in () if options.tables else CASES:
        if case.task not in options.tasks or case.model not in (options.models or [case.model]):
            continue
        print(f"{case.label}, batch {case.batch}", flush=True)
        plans = [plan for plan in plans if not _of(case, plan)] + planned(case)
        plans = [plan for other in CASES for plan in plans if _of(other, plan)]
        command = " ".join(["python", "benchmarks/plans.py", *sys.argv[1:]])
        about = {"benchmark": "glcan plan at real sizes, fp32", "command": command, "environment": environment()}
        write_json(options.out, {**about, "plans": plans})
    for task in options.tasks:
        _insert(options.docs / PAGES[task], tables([plan for plan in plans if plan["task"] == task]))
    print(f"wrote {options.out}")


def _of(case: Case, plan: dict[str, Any]) -> bool:
    return all(plan.get(name) == value for name, value in case.about().items())


def tables(plans: list[dict[str, Any]]) -> str:
    """Activations and FLOPs, and the whole peak, of every model (rows) with every method (columns)."""
    order = [*dict.fromkeys(name for case in CASES for name in case.methods if name.startswith("glcan"))]
    order += ["selective", *BASELINES[1:]]
    methods = [name for name in order if any(plan["method"] == name for plan in plans)]
    methods.sort(key=lambda name: (order.index("selective") <= order.index(name), parse_method(name).number or 0))
    rows: dict[tuple[str, int], dict[str, dict[str, Any]]] = {}
    for case in CASES:
        own = {plan["method"]: plan for plan in plans if _of(case, plan)}
        if own:
            rows[case.label, case.batch] = own
    parts = []
    for what, names in (("activations, FLOPs", ("activation_ratio", "flops_ratio")), ("peak", ("peak_ratio",))):
        heads = ["model", "batch", *(f"`{name}`" for name in methods)]
        lines = [" | ".join(heads), " | ".join(["---", "---:", *["---:"] * len(methods)])]
        for (label, batch), own in rows.items():
            cells = [_cell(own[name], *names) if name in own else "–" for name in methods]
            lines.append(" | ".join([label, str(batch), *cells]))
        parts.append(f"{what[0].upper()}{what[1:]}:\n\n" + "\n".join(f"| {line} |" for line in lines))
    return "\n\n".join(parts)


def _cell(plan: dict[str, Any], *names: str) -> str:
    return ", ".join(f"{plan['vs_e2e'][name]:.2f}×" for name in names)


def _insert(page: Path, text: str) -> None:
    begin, end = "<!-- results:plans -->\n", "\n<!-- /results:plans -->"
    before, _, rest = page.read_text(encoding="utf-8").partition(begin)
    _, _, after = rest.partition(end)
    page.write_text(f"{before}{begin}{text}{end}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
