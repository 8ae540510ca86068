"""What a person sees while runs train: bars with ETA on a terminal, one line per epoch elsewhere, or nothing."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from glcan.console import plain_console
from glcan.errors import RunError
from glcan.training.config import RunConfig
from glcan.training.evaluation import MEASURES, formatted
from glcan.training.run import read_metrics


class _Bars:
    """Standard error, and on a terminal bars at its end while the context is open."""

    def __init__(self, unit: str, progress: bool) -> None:
        self._console = plain_console(stderr=True, quiet=not progress)
        self._bars: Progress | None = None
        if progress and self._console.is_terminal:
            self._bars = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=None),
                MofNCompleteColumn(),
                TextColumn(unit),
                TimeElapsedColumn(),
                TextColumn("ETA"),
                TimeRemainingColumn(),
                console=self._console,
            )

    def __enter__(self) -> Self:
        if self._bars is not None:
            self._bars.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        if self._bars is not None:
            self._bars.stop()


class Reporter(_Bars):
    """Reports to standard error; a context manager.

    Args:
        config: of the run.
        total: optimizer steps in the whole run.
        done: steps that are behind already, when a run is resumed.
        progress: False for silence.
    """

    def __init__(self, config: RunConfig, total: int, done: int, progress: bool) -> None:
        super().__init__("steps", progress)
        self._config, self._total, self._done, self._start_step = config, total, done, done
        self._started = time.monotonic()
        if self._bars is not None:
            self._task = self._bars.add_task("starting", total=total, completed=done)

    def say(self, line: str) -> None:
        """One line, before the first step."""
        self._console.print(line, soft_wrap=True)

    def step(self, epoch: int) -> None:
        """One optimizer step is done; ``epoch`` counts from 1."""
        self._done += 1
        if self._bars is not None:
            self._bars.update(self._task, advance=1, description=f"epoch {epoch}/{self._config.epochs}")

    def epoch(self, record: dict[str, Any]) -> None:
        """One epoch is done."""
        line = _line(self._config, record)
        if self._bars is None and self._done < self._total:
            per_step = (time.monotonic() - self._started) / max(self._done - self._start_step, 1)
            line += _eta(per_step * (self._total - self._done))
        self._console.print(line, soft_wrap=True)


class Board(_Bars):
    """Reports on runs in other processes to standard error, from what they write; a context manager.

    Args:
        runs: name, configuration and directory of each.
        progress: False for silence.
    """

    def __init__(self, runs: Sequence[tuple[str, RunConfig, Path]], progress: bool) -> None:
        super().__init__("epochs", progress)
        self._runs, self._progress = runs, progress
        self._begun: dict[int, tuple[float, int]] = {}  # when a run began here, and with how many epochs behind it
        self._seen: dict[int, int] = {}  # epochs of a run that have been reported
        self._bar_of: dict[int, TaskID] = {}

    def update(self, running: Collection[int]) -> None:
        """Look at the runs of these indices."""
        for index in running if self._progress else ():
            name, config, folder = self._runs[index]
            records = _records(folder)
            if index not in self._begun:
                self._begun[index] = time.monotonic(), len(records)
                self._seen[index] = len(records)
                if self._bars is not None:
                    self._bar_of[index] = self._bars.add_task(name, total=config.epochs, completed=len(records))
            for record in records[self._seen[index] :]:
                self._report(index, record)
            self._seen[index] = max(len(records), self._seen[index])

    def _report(self, index: int, record: dict[str, Any]) -> None:
        name, config, _ = self._runs[index]
        line = f"{name}: {_line(config, record)}"
        if self._bars is not None:
            self._bars.update(self._bar_of[index], completed=record["epoch"])
        elif record["epoch"] < config.epochs:
            began, epochs = self._begun[index]
            per_epoch = (time.monotonic() - began) / (record["epoch"] - epochs)
            line += _eta(per_epoch * (config.epochs - record["epoch"]))
        self._console.print(line, soft_wrap=True)


def _records(folder: Path) -> list[dict[str, Any]]:
    """The epochs of a run so far; none where it has written no line, or is about to."""
    try:
        return read_metrics(folder)
    except RunError:
        return []


def _line(config: RunConfig, record: dict[str, Any]) -> str:
    losses = record["train_loss"]
    parts = [
        f"epoch {record['epoch']}/{config.epochs}",
        f"lr {record['lr']:.4g}",
        "loss " + " ".join(f"{loss:.3f}" for loss in losses.values()),
    ]
    measures = MEASURES[config.task]
    for split in ("val", "test"):
        if f"{split}_{measures.main}" in record:
            value = formatted(record[f"{split}_{measures.main}"], measures.units[measures.main])
            parts.append(f"{split} {measures.main} {value}")
    parts.append(f"{record['train_seconds']:.1f} s")
    return "  ".join(parts)


def _eta(seconds: float) -> str:
    return f"  ETA {timedelta(seconds=round(seconds))}"
