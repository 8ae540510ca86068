"""LocalBench: every rule on the same data, epochs and tuning effort, for each task; and the ablation of `glcan`.

For each entry (a rule with its options) and number of blocks, the learning rate is chosen on validation images from one
small grid, the same for all entries; then the chosen one is trained with every seed, and the test data is looked at
after the last epoch. Every run leaves one JSON file under benchmarks/results/localbench/BENCH, and a run whose file is
there is not made again: a bench can be stopped, continued and extended, on another machine too.

    python benchmarks/localbench.py classification                        # all rules: hours on two cores
    python benchmarks/localbench.py classification --entries glcan dgl --blocks 16
    python benchmarks/localbench.py classification --entries my.rules:Nearest   # a rule of one's own
    python benchmarks/localbench.py ablation
    python benchmarks/localbench.py --quick --out runs/localbench-quick   # all, reduced: `make localbench-quick`
    python benchmarks/localbench.py classification --table                # tables and plots of what is there

On a CPU, runs are trained side by side with one thread each (--jobs).
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import hashlib
import json
import statistics
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

from glcan import LocalLearner, measure_step, rules
from glcan.data.sets import SETS
from glcan.errors import GlcanError
from glcan.report.compare import DEFAULT_START
from glcan.report.costs import FINISH as LAST
from glcan.report.costs import averaged, config_of, enter, phases
from glcan.report.plots import look
from glcan.sizes import format_bytes, format_scaled
from glcan.training import MEASURES, RunConfig, build, environment, load_data, load_model, train
from glcan.training.config import PLACE_FIELDS
from glcan.training.run import write_json
from glcan.training.side_by_side import completed, cpus
from glcan.training.trainer import to_device

RESULTS = Path(__file__).parent / "results" / "localbench"
PROBE_IMAGES = 5000
FINISH = 0.1
#: Settings that came after the first runs, whose value for "off" is not a false one.
OFF = {"accumulate": 1}


@dataclasses.dataclass(frozen=True)
class Entry:
    """A row of the table: a rule with options of its own, with or without a start, a finish or accumulation."""

    name: str
    rule: str
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    start: float = 0.0
    finish: float = 0.0
    accumulate: int = 1


@dataclasses.dataclass(frozen=True)
class Bench:
    """What is compared on which data.

    Attributes:
        settings: of all runs, as `RunConfig` takes them.
        entries: the rows.
        blocks: K; the baselines are trained once.
        rates: learning rates, of which one is chosen for each row and K.
        seeds: of the runs that count.
        choice: settings that differ while the learning rate is chosen (with the first seed), to make that cheaper. With
            none, the chosen run is the first seed's.
    """

    settings: dict[str, Any]
    entries: tuple[Entry, ...]
    blocks: tuple[int, ...]
    rates: tuple[float, ...]
    seeds: tuple[int, ...]
    choice: dict[str, Any] = dataclasses.field(default_factory=dict)


def _named(*names: str) -> tuple[Entry, ...]:
    return tuple(Entry(name, name) for name in names)


def _started(task: str, *names: str) -> tuple[Entry, ...]:
    return tuple(Entry(f"{name}+start", name, start=DEFAULT_START[task]) for name in names)


def _accumulated(*parts: int) -> tuple[Entry, ...]:
    """End-to-end training in parts, which any rule has to be worth more than."""
    return tuple(Entry(f"e2e+accumulate:{count}", "e2e", accumulate=count) for count in parts)


_FINISHED = tuple(Entry(f"{name}+finish", name, finish=FINISH) for name in ("dgl", "glcan"))
_FASHION = {
    "model": "cifar_resnet32",
    "data": "fashion-mnist",
    "limit": 22000,
    "val": 2000,
    "epochs": 5,
    "batch": 128,
    "warmup_epochs": 1,
    "channels_last": True,
    "precision": "bf16",  # half the time on a CPU with instructions for it (AMX)
}
_ALONE = {"joint": 0.0}  # what the auxiliary networks do alone, without joint images
# The default until images were chosen by their gradients: with four blocks 7/8 of each batch, with 16 3/4.
_FIRST = {"joint_by": "order"}
_QUARTER = {"joint": 0.25, "joint_weight": 0.25}  # the default of four blocks before those
_UNLIMITED = {"unit_share": 0.0, "unit_cost": 0.0, "memory": 100.0}  # so that the budget alone sets the width
_PARTS_OF_GLCAN: dict[str, dict[str, Any]] = {
    "both branches": {"use_local": True},
    "local only": {"use_global": False},
    "backbone units": {"unit": "backbone"},
    "backbone units, momentum": {"unit": "backbone", "momentum": 0.99},
    **{f"depth {depth}": {"depth": depth} for depth in (1, 2, 8)},
    **{f"budget {share:.0%}": {"budget": share} | _UNLIMITED for share in (0.02, 0.05, 0.1, 0.2, 0.5)},
}
_RULES = _named("e2e", "predsim", "dgl", "infopro", "auglocal", "man", "manpp", "glcan")
_DETECTION = {"task": "detection", "val": 200, "epochs": 16}
_SUPER_RESOLUTION = {"task": "super-resolution", "val": 2, "epochs": 40}
_ABLATION = (
    Entry("glcan", "glcan"),
    Entry("a quarter joint", "glcan", _QUARTER),
    Entry("without joint images", "glcan", _ALONE),
    Entry("global only, without joint images", "glcan", {"use_local": False} | _ALONE),
    Entry("local only, without joint images", "glcan", {"use_global": False} | _ALONE),
)

BENCHES = {
    "classification": Bench(
        _FASHION,
        (
            *_RULES,
            Entry("glcan without joint images", "glcan", _ALONE),
            Entry("glcan, a quarter joint", "glcan", _QUARTER),
            Entry("glcan, the first images joint", "glcan", _FIRST),
            *_started("classification", "dgl", "glcan"),
            *_FINISHED,
            *_accumulated(4, 16),
        ),
        (4, 16),
        (0.05, 0.1, 0.2),
        (0, 1, 2),
    ),
    "detection": Bench(
        _DETECTION,
        _named("e2e", "dgl", "glcan") + _started("detection", "dgl", "glcan") + _accumulated(4),
        (4,),
        (1e-3, 2e-3, 4e-3),
        (0, 1),
        {"limit": 600, "epochs": 4},
    ),
    "super-resolution": Bench(
        _SUPER_RESOLUTION,
        (
            *_named("e2e", "glcan"),
            *_started("super-resolution", "glcan"),
            Entry("glcan+finish", "glcan", finish=FINISH),
            *_accumulated(4),
        ),
        (4,),
        (5e-4, 1e-3, 2e-3),
        (0, 1),
        {"epochs": 10},
    ),
    "ablation": Bench(
        _FASHION,
        (
            Entry("glcan", "glcan"),
            Entry("without joint images", "glcan", _ALONE),
            Entry("the first images joint", "glcan", _FIRST),
            *(
                Entry(f"{name}, without joint images", "glcan", options | _ALONE)
                for name, options in _PARTS_OF_GLCAN.items()
            ),
            *(
                Entry(f"joint images {share:.0%}", "glcan", {"joint": share, "joint_weight": share})
                for share in (0.25, 0.5, 0.6, 0.75)
            ),
        ),
        (4, 16),
        (0.2,),  # the choice of `glcan` with four blocks in the bench of classification
        (0, 1),
    ),
    "ablation-detection": Bench(_DETECTION, _ABLATION, (4,), (4e-3,), (0, 1)),  # rates: as chosen for `glcan` above
    "ablation-super-resolution": Bench(_SUPER_RESOLUTION, _ABLATION, (4,), (2e-3,), (0, 1)),
}


def quick(name: str) -> Bench:
    """A bench so small that all of them together take minutes: it shows that everything works, and little else."""
    bench = BENCHES[name]
    images = {"limit": 3500, "val": 500, "epochs": 2, "warmup_epochs": 0.2}
    reductions: dict[str, dict[str, Any]] = {
        "classification": images,
        "detection": {"limit": 300, "val": 50, "epochs": 2},
        "super-resolution": {"epochs": 4, "crops": 32},
    }
    small = reductions[bench.settings.get("task", "classification")]
    if bench.settings.get("data") == "fashion-mnist" and SETS["fashion-mnist"].find(None) is None:
        small = small | {"data": "digits", "model": "cifar_resnet20", "limit": None, "val": 300, "epochs": 5}
    entries = bench.entries[:3] if name.startswith("ablation") else bench.entries
    rates = bench.rates[1:2] or bench.rates
    return dataclasses.replace(
        bench, settings=bench.settings | small, entries=entries, blocks=(4,), rates=rates, seeds=(0,), choice={}
    )


@dataclasses.dataclass(frozen=True)
class Job:
    """One run: where it is trained, and the file that remains of it."""

    config: RunConfig
    folder: Path
    file: Path
    row: dict[str, Any]


class Plan:
    """The runs of a bench, and what is known of them.

    Args:
        name, bench: of the bench.
        results: folder of its JSON files.
        runs: folder of the run directories.
        place: settings of all runs that change no result, see `PLACE_FIELDS`.
    """

    def __init__(self, name: str, bench: Bench, results: Path, runs: Path, place: dict[str, Any]) -> None:
        self.name, self.bench, self.results, self.runs, self.place = name, bench, results, runs, place
        self.rows = [
            (entry, blocks)
            for entry in bench.entries
            for blocks in ((1,) if entry.rule in rules.BASELINES else bench.blocks)
        ]

    def choices(self) -> list[Job]:
        """The runs in which learning rates are chosen; none where there is nothing to choose."""
        if len(self.bench.rates) == 1:
            return []
        return [
            self.job(entry, blocks, self.bench.seeds[0], rate, self.bench.choice)
            for entry, blocks in self.rows
            for rate in self.bench.rates
        ]

    def final(self) -> list[Job]:
        """The runs that count; the choices must have been made."""
        return [
            self.job(entry, blocks, seed, self.rate(entry, blocks))
            for entry, blocks in self.rows
            for seed in self.bench.seeds
        ]

    def rate(self, entry: Entry, blocks: int) -> float:
        """The learning rate with the best validation metric."""
        rates = self.bench.rates
        if len(rates) == 1:
            return rates[0]
        found = [read(self.job(entry, blocks, self.bench.seeds[0], rate, self.bench.choice).file) for rate in rates]
        return max(zip(found, rates, strict=True), key=lambda pair: pair[0]["validation"])[1]

    def job(self, entry: Entry, blocks: int, seed: int, rate: float, change: dict[str, Any] | None = None) -> Job:
        """The run of an entry."""
        config = RunConfig(
            **self.bench.settings | (change or {}),
            rule=entry.rule,
            rule_options=entry.options,
            blocks=None if entry.rule in rules.BASELINES else blocks,
            start=entry.start,
            finish=entry.finish,
            accumulate=entry.accumulate,
            lr=rate,
            seed=seed,
            **self.place,
        )
        what = config.model_dump(mode="json", exclude=set(PLACE_FIELDS))
        # What is off may be newer than a run's file.
        what = {name: value for name, value in what.items() if value and value != OFF.get(name)}
        digest = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:8]
        label = f"{entry.name}-k{blocks}-lr{rate:g}-seed{seed}-{digest}"
        label = "".join(c if c.isalnum() or c in "-+." else "_" for c in label)
        row = {"bench": self.name, "entry": entry.name, "blocks": blocks, "lr": rate, "seed": seed}
        return Job(config, self.runs / self.name / label, self.results / f"{label}.json", row)


def run(job: Job) -> None:
    """Train, meter and probe one run, and write its file."""
    warnings.simplefilter("ignore")
    summary = train(job.config, job.folder, resume=True, progress=False)
    data = load_data(job.config)
    learner = build(job.config, data)
    learner.model.load_state_dict(load_model(job.folder).state_dict())
    main = MEASURES[job.config.task].main
    validation = next(metric.value for metric in summary.val_metrics if metric.name == main)
    probes = linear_probes(learner, data, job.config) if job.config.task == "classification" else []
    layout = torch.channels_last if job.config.channels_last else torch.contiguous_format
    device = next(learner.model.parameters()).device
    batch = to_device(next(iter(data.loader("train", job.config.batch))), device, layout)
    shares = phases(job.config, learner.plan.blocks)
    costs = {}
    for phase in shares:
        if phase == LAST:
            del learner
            gc.collect()
            learner = build(config_of(phase, job.config), data)
        costs[phase] = measure_step(enter(learner, phase), *batch)
    cost = averaged(costs, shares)
    job.file.parent.mkdir(parents=True, exist_ok=True)
    record = job.row | {
        "metric": main,
        "unit": MEASURES[job.config.task].units[main],
        "validation": validation,
        "test": summary.metric.value,
        "test_metrics": {metric.name: metric.value for metric in summary.metrics},
        "train_loss": summary.train_loss,
        "probe_accuracy": probes,
        "peak_bytes": cost.peak_bytes,
        "activation_peak_bytes": cost.activation_peak_bytes,
        "flops_per_step": cost.flops,
        "auxiliary_parameters": summary.auxiliary_parameters,
        "train_seconds": summary.train_seconds,
        "steps": summary.steps,
        "cuts": summary.cuts,
        "config": job.config.model_dump(mode="json", exclude={"data_root"}),
        "environment": environment(),
    }
    write_json(job.file, record)


@torch.no_grad()
def linear_probes(learner: LocalLearner, data: Any, config: RunConfig) -> list[float]:
    """For each block but the last: accuracy on validation images of a logistic regression on its pooled output.

    It is fitted on the first `PROBE_IMAGES` training images, as they are augmented in the epoch after the last one.
    """
    model = learner.eval().model
    features: dict[str, list[Tensor]] = {cut: [] for cut in learner.plan.cuts}
    hooks = []
    for cut in learner.plan.cuts:

        def note(module: nn.Module, given: tuple[Any, ...], cut: str = cut) -> None:
            tensor = given[0]
            features[cut].append((tensor.mean((2, 3)) if tensor.dim() == 4 else tensor.mean(1)).float().cpu())

        hooks.append(model.get_submodule(cut).register_forward_pre_hook(note))
    device = next(model.parameters()).device
    sets: list[tuple[dict[str, Tensor], Tensor]] = []
    for split, most in (("train", PROBE_IMAGES), ("val", sys.maxsize)):
        labels: list[Tensor] = []
        for images, targets in data.loader(split, config.batch, epoch=config.epochs):
            model(images.to(device))
            labels.append(targets)
            if sum(map(len, labels)) >= most:
                break
        sets.append(({cut: torch.cat(tensors) for cut, tensors in features.items()}, torch.cat(labels)))
        for tensors in features.values():
            tensors.clear()
    for hook in hooks:
        hook.remove()
    (fitted, labels_fitted), (held, labels_held) = sets
    accuracies = []
    for cut in learner.plan.cuts:
        probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=300))
        probe.fit(fitted[cut].numpy(), labels_fitted.numpy())
        accuracies.append(float(probe.score(held[cut].numpy(), labels_held.numpy())))
    return accuracies


def taken_over(job: Job) -> bool:
    """Whether another bench or row has made the very same run: then its record is this row's, too."""
    digest = job.file.stem.rpartition("-")[2]
    made = min(job.file.parent.parent.glob(f"*/*-{digest}.json"), default=None)
    if made is None:
        return False
    job.file.parent.mkdir(parents=True, exist_ok=True)
    write_json(job.file, read(made) | job.row)
    return True


def work(jobs: Iterable[Job], count: int, title: str, console: Console) -> None:
    """Make the runs that are not there yet, ``count`` side by side; stop with their errors after all are done."""
    missing = list({job.file: job for job in jobs if not (job.file.exists() or taken_over(job))}.values())
    if not missing:
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("runs"))
    failures: list[str] = []
    with (
        Progress(*columns, TimeElapsedColumn(), TextColumn("ETA"), TimeRemainingColumn(), console=console) as progress,
        closing(completed([partial(run, job) for job in missing], count)) as results,
    ):
        task = progress.add_task(title, total=len(missing))
        for index, result in results:
            if isinstance(result, GlcanError):
                failures.append(f"{missing[index].file.stem}: {result}")
            progress.advance(task)
    for failure in failures:
        console.print(failure, style="red", highlight=False, markup=False)
    if failures:
        sys.exit(2)


def read(file: Path) -> dict[str, Any]:
    """The record of a run."""
    record: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return record


def report(plan: Plan) -> str:
    """Write table.md and the plots of the runs that are there; returns the table."""
    rows = []
    for entry, blocks in plan.rows:
        try:
            rate = plan.rate(entry, blocks)
        except FileNotFoundError:
            continue
        files = [plan.job(entry, blocks, seed, rate).file for seed in plan.bench.seeds]
        records = [read(file) for file in files if file.exists()]
        if records:
            rows.append(summarised(entry, blocks, rate, records))
    if not rows:
        return f"{plan.name}: no run is there yet"
    text = table(plan, rows)
    (plan.results / "table.md").write_text(text, encoding="utf-8")
    write_json(plan.results / "table.json", {"bench": plan.name, "rows": rows})
    cost_plot(plan, rows).savefig(plan.results / "metric_against_cost.png", dpi=150)
    if any(row["probe_accuracy"] for row in rows):
        probe_plot(plan, rows).savefig(plan.results / "probes.png", dpi=150)
    return text


def summarised(entry: Entry, blocks: int, rate: float, records: list[dict[str, Any]]) -> dict[str, Any]:
    """The mean over seeds of the runs of a row."""
    values = [record["test"] for record in records]
    first = records[0]
    return {
        "entry": entry.name,
        "blocks": blocks,
        "lr": rate,
        "unit": first["unit"],
        "metric": first["metric"],
        "seeds": [record["seed"] for record in records],
        "values": values,
        "mean": statistics.fmean(values),
        "std": statistics.stdev(values) if len(values) > 1 else None,
        "probe_accuracy": [
            statistics.fmean(each) for each in zip(*(r["probe_accuracy"] for r in records), strict=True)
        ],
        "validation": statistics.fmean(record["validation"] for record in records),
    } | {
        name: first[name] for name in ("peak_bytes", "activation_peak_bytes", "flops_per_step", "auxiliary_parameters")
    }


def table(plan: Plan, rows: list[dict[str, Any]]) -> str:
    """A Markdown table, ratios against end-to-end training where it is among the rows."""
    base = next((row for row in rows if row["entry"] == "e2e"), None)
    scale, unit = (100, "%") if rows[0]["unit"] == "fraction" else (1, rows[0]["unit"])
    heads = ["entry", "K", "lr", f"{rows[0]['metric'].replace('_', ' ')} ({unit})", "Δ", "seeds"]
    heads += ["peak", "activations", "FLOPs", "auxiliary parameters"]
    lines = [" | ".join(heads), " | ".join(["---"] * 3 + ["---:"] * (len(heads) - 3))]
    for row in rows:
        ratios = {}
        for name in ("peak_bytes", "activation_peak_bytes", "flops_per_step"):
            ratios[name] = f" ({row[name] / base[name]:.2f}×)" if base else ""
        spread = "" if row["std"] is None else f" ± {scale * row['std']:.2f}"
        cells = [row["entry"], str(row["blocks"]), f"{row['lr']:g}", f"{scale * row['mean']:.2f}{spread}"]
        cells += [f"{scale * (row['mean'] - base['mean']):+.2f}" if base else "–", str(len(row["values"]))]
        cells += [format_bytes(row[name]) + ratios[name] for name in ("peak_bytes", "activation_peak_bytes")]
        cells += [format_scaled(row["flops_per_step"], 1000, ("", "k", "M", "G", "T", "P")) + ratios["flops_per_step"]]
        cells += [f"{row['auxiliary_parameters']:,}"]
        lines.append(" | ".join(cells))
    settings = ", ".join(f"{name} {value}" for name, value in plan.bench.settings.items())
    note = (
        f"{settings}; learning rate of each row chosen from {', '.join(map(str, plan.bench.rates))} on validation data"
    )
    return f"# {plan.name}\n\n{note}.\n\n" + "\n".join(f"| {line} |" for line in lines) + "\n"


def cost_plot(plan: Plan, rows: list[dict[str, Any]]) -> Figure:
    """The metric against FLOPs and against peak memory of a step; an entry has a colour, a number of blocks a fill."""
    figure = Figure(figsize=(10, 5), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    names = list(dict.fromkeys(row["entry"] for row in rows))
    most = max(row["blocks"] for row in rows)
    scale = 100 if rows[0]["unit"] == "fraction" else 1
    base = next((row for row in rows if row["entry"] == "e2e"), rows[0])
    for row in rows:
        i = names.index(row["entry"])
        for axes, name in ((left, "flops_per_step"), (right, "peak_bytes")):
            axes.errorbar(
                row[name] / base[name],
                scale * row["mean"],
                yerr=None if row["std"] is None else scale * row["std"],
                **look(i),
                markerfacecolor="none" if row["blocks"] == most else None,
                markersize=8,
                capsize=3,
                linestyle="none",
                label=f"{row['entry']}, K = {row['blocks']}",
            )
    left.set_xlabel(f"FLOPs of a step / {base['entry']}")
    right.set_xlabel(f"peak memory of a step / {base['entry']}")
    left.set_ylabel(f"test {rows[0]['metric'].replace('_', ' ')} ({'%' if scale == 100 else rows[0]['unit']})")
    figure.legend(*left.get_legend_handles_labels(), loc="outside right upper", fontsize="small", frameon=False)
    figure.suptitle(f"{plan.name}: {plan.bench.settings.get('model', '')} {plan.bench.settings.get('data', '')}")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def probe_plot(plan: Plan, rows: list[dict[str, Any]]) -> Figure:
    """Accuracy of a linear probe behind each block, and of the model itself at the end."""
    numbers = sorted({row["blocks"] for row in rows if row["probe_accuracy"]})
    figure = Figure(figsize=(5 * len(numbers), 4.5), layout="constrained")
    for axes, blocks in zip(figure.subplots(1, len(numbers), squeeze=False)[0], numbers, strict=True):
        for i, row in enumerate(row for row in rows if row["blocks"] == blocks):
            accuracies = [*row["probe_accuracy"], row["validation"]]
            axes.plot(
                range(1, blocks + 1),
                [100 * value for value in accuracies],
                **look(i),
                markersize=4,
                label=row["entry"],
            )
        axes.set_xlabel(f"block of {blocks}; the last one is the model itself")
        axes.set_ylabel("validation accuracy (%)")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize="small")
    figure.suptitle(f"{plan.name}: linear probes")
    return figure


def main() -> None:
    """Make the runs that are missing, then tables and plots."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bench", nargs="*", metavar="BENCH", help=f"{', '.join(BENCHES)}; default: all")
    parser.add_argument("--quick", action="store_true", help="a reduced version, within 20 minutes on two cores")
    parser.add_argument("--entries", nargs="+", help="of the bench, or package.module:Class; default: all")
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
        known = {entry.name: entry for entry in bench.entries}
        for name in options.entries:
            if name not in known:
                rules.create(name)
        yield "entries", tuple(known.get(name, Entry(name.partition(":")[2] or name, name)) for name in options.entries)
    if options.blocks:
        yield "blocks", tuple(options.blocks)
    if options.seeds:
        yield "seeds", tuple(options.seeds)


if __name__ == "__main__":
    main()
