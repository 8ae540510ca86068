"""`glcan evaluate`: metrics of trained weights on one split of a data set."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.table import Table

from glcan.cli.options import Trust, configure, settings
from glcan.console import plain_console

_SETTINGS = (
    "model",
    "model_options",
    "data",
    "data_root",
    "image_size",
    "scale",
    "val",
    "limit",
    "skip_corrupt",
    "download",
    "batch",
    "precision",
    "channels_last",
    "device",
    "workers",
    "seed",
)


@settings(only=_SETTINGS)
def evaluate(
    run: Annotated[
        Path | None,
        typer.Argument(help="Directory of a finished run; or leave it out, and give --model and --weights."),
    ] = None,
    weights: Annotated[
        Path | None, typer.Option(help="Weights in place of the run's: .safetensors, or a saved state_dict.")
    ] = None,
    split: Annotated[Literal["train", "val", "test"], typer.Option(help="Which images.")] = "test",
    task: Annotated[
        str | None, typer.Option(help="What the model does; default: the run's, or classification.")
    ] = None,
    tile: Annotated[
        int | None, typer.Option(help="Super-resolution: enlarge in tiles of so many pixels; default: whole images.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON in place of a table.")] = False,
    trust: Trust = False,
    *,
    given: dict[str, Any],
) -> None:
    """Evaluate a run, or a model with weights of any origin, on a data set.

    Settings of the run hold where no option replaces them. Super-resolution: --data set5, set14, b100, urban100,
    manga109 or benchmark with --data-root gives what the field reports.
    """
    from glcan.errors import ConfigError
    from glcan.training import (
        MEASURES,
        RunDirectory,
        autocast_dtype,
        class_names,
        create_model,
        formatted,
        load_data,
        load_weights,
        resolve_device,
    )
    from glcan.training import evaluate as run_evaluation

    if run is None and (weights is None or "model" not in given):
        raise ConfigError("evaluate needs weights: name the directory of a run, or give --model and --weights.")
    if run is not None and weights is None:
        RunDirectory(run).read_summary()  # says so if the run is not finished
        weights = RunDirectory(run).weights
    stored = RunDirectory(run).read_config() if run is not None else None
    if stored is not None and task not in (None, stored.task):
        raise ConfigError(f"The run {run} is of the task {stored.task!r}, not {task!r}. Leave --task out.")
    if "data" in given:  # another data set lies elsewhere, and is there to evaluate on
        given = {"data_root": None, "val": 0, "limit": None} | given
    config = configure(task, given, run=run, trust=trust)
    if tile is not None and config.task != "super-resolution":
        raise ConfigError(f"tile = {tile} is for super-resolution, not for {config.task}; leave --tile out.")
    device = resolve_device(config.device)
    data = load_data(config)
    model = create_model(config, len(class_names(data)), data.shape)
    assert weights is not None
    load_weights(model, weights)
    metrics = run_evaluation(
        model.to(device),
        data,
        split,
        batch=config.batch,
        autocast=autocast_dtype(config),
        channels_last=config.channels_last,
        workers=config.workers,
        tile=tile,
    )
    if as_json:
        result = {"weights": str(weights), "data": data.name, "split": split, "images": data.size(split)}
        typer.echo(json.dumps(result | metrics, indent=2))
        return
    table = Table("metric", "value", title=f"{weights} on {data.size(split)} {split} images of {data.name}")
    for name, value in metrics.items():
        table.add_row(name, formatted(value, MEASURES[config.task].units[name]))
    plain_console().print(table)
