"""`glcan train`: train a model by one of the methods."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from glcan.cli.options import Recipe, Task, Trust, configure, free_folder, settings
from glcan.console import plain_console


@settings()
def train(
    task: Task = None,
    out: Annotated[
        Path | None, typer.Option(help="Run directory; default: a new one under runs/, named after the run.")
    ] = None,
    recipe: Recipe = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Continue the run in --out as if it had never stopped (its settings need not be repeated); begin it "
            "where there is none.",
        ),
    ] = False,
    trust: Trust = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress, only the result.")] = False,
    *,
    given: dict[str, Any],
) -> None:
    """Train a model, and keep its weights, metrics and checkpoints in a run directory.

    Without arguments: a small ResNet on the embedded digits, in four blocks with GLCAN; for super-resolution a small
    EDSR on bundled photographs.
    """
    from glcan.errors import RunError
    from glcan.training import RunDirectory, formatted
    from glcan.training import train as run_training

    if resume and out is None:
        raise RunError("--resume needs the directory of the run to continue. Name it with --out.")
    stored = out if resume and out is not None and RunDirectory(out).config.exists() else None
    config = configure(task, given, recipe, stored, trust=trust)
    if out is None:
        name = f"{Path(config.data).name}-{config.model}-{config.parsed.folder}-seed{config.seed}"
        out = free_folder(name.replace("/", "_").replace(":", "."))
    run = RunDirectory(out)
    try:
        summary = run_training(config, out, resume=resume, progress=not quiet)
    except (KeyboardInterrupt, SystemExit):
        if run.checkpoint.exists():
            plain_console(stderr=True).print(
                f"Stopped; a checkpoint is written. Continue with: glcan train --resume --out {out}", soft_wrap=True
            )
        raise
    for metric in summary.metrics:
        percent = f" ({formatted(metric.value, metric.unit)})" if metric.unit == "fraction" else ""
        typer.echo(f"test {metric.name}: {metric.value:.4f} {metric.unit}".rstrip() + percent)
    typer.echo(f"{summary.method}, {summary.epochs} epochs, {summary.train_seconds:.1f} s of training")
    typer.echo(f"weights: {run.weights}")
    typer.echo(f"summary: {run.summary}")
