"""The runs of LocalBench: which there are to be, which there are, and how one is made."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import closing
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from localbench_benches import Bench, Entry
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

from glcan import Learner, measure_step
from glcan.errors import GlcanError
from glcan.report.costs import averaged, enter
from glcan.strategies import family_of
from glcan.strategies.method import parse_method
from glcan.training import MEASURES, RunConfig, build, environment, load_data, load_model, train
from glcan.training.building import to_device
from glcan.training.config import PLACE_FIELDS
from glcan.training.phases import phases_of
from glcan.training.run import write_json
from glcan.training.side_by_side import completed

__all__ = ["Job", "Plan", "label_of", "linear_probes", "read", "run", "work"]

PROBE_IMAGES = 5000
#: Settings that are the row's, the run's or the machine's, and not the bench's.
_NOT_THE_BENCH = PLACE_FIELDS | {"method", "options", "lr", "seed", "cuts", "memory", "recompute", "units"}
_SETTINGS = tuple(sorted(set(RunConfig.model_fields) - _NOT_THE_BENCH))


@dataclasses.dataclass(frozen=True)
class Job:
    """One run: where it is trained, and the file that remains of it."""

    config: RunConfig
    folder: Path
    file: Path
    row: dict[str, Any]

    @property
    def identity(self) -> str:
        """Equal for runs that compute the same."""
        return _identity(self.row["entry"], self.config.lr, self.config.seed, self.config.model_dump(mode="json"))


def _identity(label: str, lr: float, seed: int, settings: dict[str, Any]) -> str:
    """What a run is known by; settings that are off may be newer than a run's file."""
    own = {name: settings[name] for name in _SETTINGS if settings.get(name)}
    return json.dumps([label, lr, seed, own], sort_keys=True)


def label_of(record: dict[str, Any]) -> str:
    """The row that a record belongs to. Records of old have rules' names, without the number of blocks."""
    head, comma, note = str(record["entry"]).partition(", ")
    try:
        method = parse_method(head)
    except GlcanError:  # a method that there is no more
        share = float(record.get("share") or 0)
        usual = not share or (head.startswith("selective") and share == 0.5)
        return str(record["entry"]) + ("" if usual else f" ({Fraction(share).limit_denominator(8)})")
    if method.number is None and family_of(method.base) == "local":
        method = dataclasses.replace(method, number=record["blocks"])
    return f"{method}{comma}{note}"


def read(file: Path) -> dict[str, Any]:
    """The record of a run."""
    record: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return record


class Plan:
    """The runs of a bench, and what is known of them.

    Args:
        name, bench: of the bench.
        results: folder of its JSON files, beside those of the other benches.
        runs: folder of the run directories.
        place: settings of all runs that change no result, see `PLACE_FIELDS`.
    """

    def __init__(self, name: str, bench: Bench, results: Path, runs: Path, place: dict[str, Any]) -> None:
        self.name, self.bench, self.results, self.runs, self.place = name, bench, results, runs, place
        self.rows = [(entry, k) for entry in bench.entries for k in (bench.blocks if entry.local else (1,))]

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
        found = self.records()
        return [
            self.job(entry, blocks, seed, self.rate(entry.label(blocks), found))
            for entry, blocks in self.rows
            for seed in self.bench.seeds
        ]

    def records(self) -> dict[str, dict[str, Any]]:
        """What there is of the bench, by identity."""
        return {key: read(file) for key, file in _made(self.results).items()}

    def rate(self, label: str, records: dict[str, dict[str, Any]]) -> float:
        """The learning rate with the best validation metric. Raises `LookupError` where not all were tried."""
        rates = self.bench.rates
        if len(rates) == 1:
            return rates[0]
        found = [records[self.identity(label, rate, self.bench.seeds[0], self.bench.choice)] for rate in rates]
        return max(zip(found, rates, strict=True), key=lambda pair: pair[0]["validation"])[1]

    def identity(self, label: str, rate: float, seed: int, change: dict[str, Any] | None = None) -> str:
        """What a run of this bench is known by."""
        settings = RunConfig(**self.bench.settings | (change or {}) | {"method": "e2e"}).model_dump(mode="json")
        return _identity(label, rate, seed, settings)

    def job(self, entry: Entry, blocks: int, seed: int, rate: float, change: dict[str, Any] | None = None) -> Job:
        """The run of an entry."""
        config = RunConfig(
            **self.bench.settings | (change or {}),
            method=str(entry.with_blocks(blocks)),
            options=entry.options,
            lr=rate,
            seed=seed,
            **self.place,
        )
        what = config.model_dump(mode="json", exclude=set(PLACE_FIELDS))
        digest = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:8]
        label = entry.label(blocks)
        stem = f"{label}-lr{rate:g}-seed{seed}-{digest}"
        stem = "".join(c if c.isalnum() or c in "-+." else "_" for c in stem)
        row = {"bench": self.name, "entry": label, "blocks": blocks, "lr": rate, "seed": seed}
        return Job(config, self.runs / self.name / stem, self.results / f"{stem}.json", row)


def _made(folder: Path) -> dict[str, Path]:
    """The files of the runs in a folder, by identity."""
    found = {}
    for file in sorted(folder.glob("*-seed*.json")):
        record = read(file)
        found[_identity(label_of(record), record["lr"], record["seed"], record["config"])] = file
    return found


def run(job: Job) -> None:
    """Train, meter and probe one run, and write its file."""
    warnings.simplefilter("ignore")
    summary = train(job.config, job.folder, resume=True, progress=False)
    data = load_data(job.config)
    learner = build(job.config, data)
    learner.model.load_state_dict(load_model(job.folder).state_dict())
    main = MEASURES[job.config.task].main
    validation = next(metric.value for metric in summary.val_metrics if metric.name == main)
    probing = job.config.task == "classification" and learner.plan.cuts
    probes = linear_probes(learner, data, job.config) if probing else []
    layout = torch.channels_last if job.config.channels_last else torch.contiguous_format
    device = next(learner.model.parameters()).device
    batch = to_device(next(iter(data.loader("train", job.config.batch))), device, layout)
    phases = dict(enumerate(phases_of(job.config.parsed, summary.steps, learner.plan.blocks)))
    shares = {i: (phase.end - phase.begin) / summary.steps for i, phase in phases.items()}
    costs = {i: measure_step(enter(learner, phase), *batch) for i, phase in phases.items()}
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
def linear_probes(learner: Learner, data: Any, config: RunConfig) -> list[float]:
    """For each block but the last: accuracy on validation images of a logistic regression on its pooled output.

    It is fitted on the first `PROBE_IMAGES` training images, as they are augmented in the epoch after the last one.
    """
    model = learner.eval().model
    cuts = learner.plan.cuts
    features: dict[str, list[Tensor]] = {cut: [] for cut in cuts}
    hooks = []
    for cut in cuts:

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
    for cut in cuts:
        probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=300))
        probe.fit(fitted[cut].numpy(), labels_fitted.numpy())
        accuracies.append(float(probe.score(held[cut].numpy(), labels_held.numpy())))
    return accuracies


def missing(jobs: Iterable[Job]) -> Iterator[Job]:
    """The runs that nobody has made; a record of another bench's very same run becomes this bench's, too."""
    made: dict[Path, dict[str, Path]] = {}
    for job in {job.file: job for job in jobs}.values():
        folder = job.file.parent
        for other in (folder, *sorted(set(folder.parent.glob("*")) - {folder})):
            if other not in made:
                made[other] = _made(other)
            if job.identity in made[other]:
                if other != folder:
                    folder.mkdir(parents=True, exist_ok=True)
                    write_json(job.file, read(made[other][job.identity]) | job.row)
                break
        else:
            yield job


def work(jobs: Iterable[Job], count: int, title: str, console: Console) -> None:
    """Make the runs that are not there yet, ``count`` side by side; stop with their errors after all are done."""
    todo = list(missing(jobs))
    if not todo:
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("runs"))
    failures: list[str] = []
    with (
        Progress(*columns, TimeElapsedColumn(), TextColumn("ETA"), TimeRemainingColumn(), console=console) as progress,
        closing(completed([functools.partial(run, job) for job in todo], count)) as results,
    ):
        task = progress.add_task(title, total=len(todo))
        for index, result in results:
            if isinstance(result, GlcanError):
                failures.append(f"{todo[index].file.stem}: {result}")
            progress.advance(task)
    for failure in failures:
        console.print(failure, style="red", highlight=False, markup=False)
    if failures:
        sys.exit(2)
