"""`glcan evaluate`: metrics of trained weights on one split of a data set."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Table

from glcan.cli.options import configure, settings

_SETTINGS = (
    "model",
    "model_options",
    "data",
    "data_root",
    "image_size",
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
    task: Annotated[
        str | None, typer.Option(help="Task of --model: classification (default) or detection; a run has its own.")
    ] = None,
    weights: Annotated[
        Path | None, typer.Option(help="Weights in place of the run's: .safetensors, or a saved state_dict.")
    ] = None,
    split: Annotated[Literal["train", "val", "test"], typer.Option(help="Which images.")] = "test",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON in place of a table.")] = False,
    *,
    given: dict[str, Any],
) -> None:
    """Evaluate a run, or a model with weights of any origin, on a data set.

    Settings of the run hold where no option replaces them.
    """
    from glcan.errors import ConfigError
    from glcan.training import RunDirectory, autocast_dtype, create_model, load_data, load_weights, resolve_device
    from glcan.training import evaluate as run_evaluation
    from glcan.training.evaluation import MEASURES

    if run is None and (weights is None or "model" not in given):
        raise ConfigError("evaluate needs weights: name the directory of a run, or give --model and --weights.")
    if run is not None and weights is None:
        RunDirectory(run).read_summary()  # says so if the run is not finished
        weights = RunDirectory(run).weights
    if run is not None:
        own = RunDirectory(run).read_config().task
        if task not in (None, own):
            raise ConfigError(f"--task {task} contradicts the run {run}, whose task is {own}. Leave --task out.")
        task = own
    config = configure(task or "classification", given, run=run)
    device = resolve_device(config.device)
    data = load_data(config)
    model = create_model(config, len(data.classes), data.shape)
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
    )
    if as_json:
        result = {"weights": str(weights), "data": data.name, "split": split, "images": data.size(split)}
        typer.echo(json.dumps(result | metrics, indent=2))
        return
    table = Table("metric", "value", title=f"{weights} on {data.size(split)} {split} images of {data.name}")
    units = MEASURES[config.task].units
    for name, value in metrics.items():
        table.add_row(name, f"{100 * value:.2f} %" if units[name] == "fraction" else f"{value:.4f} {units[name]}")
    Console().print(table)
