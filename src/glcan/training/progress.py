"""What a person sees while a run trains: a bar with ETA on a terminal, one line per epoch elsewhere, or nothing."""

from __future__ import annotations

import time
from datetime import timedelta
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from glcan.training.config import RunConfig
from glcan.training.evaluation import MEASURES, formatted


class Reporter:
    """Reports to standard error; a context manager.

    Args:
        config: of the run.
        total: optimizer steps in the whole run.
        done: steps that are behind already, when a run is resumed.
        progress: False for silence.
    """

    def __init__(self, config: RunConfig, total: int, done: int, progress: bool) -> None:
        self._config, self._total, self._done, self._start_step = config, total, done, done
        self._console = Console(stderr=True, quiet=not progress)
        self._started = time.monotonic()
        self._bar: Progress | None = None
        if progress and self._console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=None),
                MofNCompleteColumn(),
                TextColumn("steps"),
                TimeElapsedColumn(),
                TextColumn("ETA"),
                TimeRemainingColumn(),
                console=self._console,
            )
            self._task = self._bar.add_task("starting", total=total, completed=done)

    def __enter__(self) -> Reporter:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()

    def step(self, epoch: int) -> None:
        """One optimizer step is done; ``epoch`` counts from 1."""
        self._done += 1
        if self._bar is not None:
            self._bar.update(self._task, advance=1, description=f"epoch {epoch}/{self._config.epochs}")

    def epoch(self, record: dict[str, Any]) -> None:
        """One epoch is done."""
        losses = record["train_loss"]
        parts = [
            f"epoch {record['epoch']}/{self._config.epochs}",
            f"lr {record['lr']:.4g}",
            "loss " + " ".join(f"{loss:.3f}" for loss in losses.values()),
        ]
        measures = MEASURES[self._config.task]
        for split in ("val", "test"):
            if f"{split}_{measures.main}" in record:
                value = formatted(record[f"{split}_{measures.main}"], measures.units[measures.main])
                parts.append(f"{split} {measures.main} {value}")
        parts.append(f"{record['train_seconds']:.1f} s")
        if self._bar is None and self._done < self._total:
            per_step = (time.monotonic() - self._started) / max(self._done - self._start_step, 1)
            parts.append(f"ETA {timedelta(seconds=round(per_step * (self._total - self._done)))}")
        self._console.print("  ".join(parts), highlight=False, soft_wrap=True)
