"""`glcan predict`: the most probable classes of image files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

_BATCH = 64


def predict(
    run: Annotated[Path, typer.Argument(help="Directory of a finished run.")],
    files: Annotated[list[Path], typer.Argument(help="Image files of any size.", metavar="FILE...")],
    top: Annotated[int, typer.Option(help="How many classes to show for each image.", min=1)] = 3,
    device: Annotated[str, typer.Option(help="Where to compute: auto, cpu, cuda, ...")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON in place of a table.")] = False,
) -> None:
    """Classify image files with a trained model, prepared as in the run's evaluation."""
    import torch

    from glcan.data import read_images
    from glcan.training import RunDirectory, load_model, resolve_device

    summary = RunDirectory(run).read_summary()
    place = resolve_device(device)
    model = load_model(run).to(place)
    predictions: list[dict[str, Any]] = []
    for start in range(0, len(files), _BATCH):
        batch = files[start : start + _BATCH]
        with torch.inference_mode():
            scores = model(read_images(batch, summary.preprocessing).to(place)).float().softmax(dim=1)
        best = scores.topk(min(top, len(summary.classes)), dim=1)
        for file, values, indices in zip(batch, best.values.tolist(), best.indices.tolist(), strict=True):
            classes = [
                {"class": summary.classes[index], "probability": value}
                for index, value in zip(indices, values, strict=True)
            ]
            predictions.append({"file": str(file), "classes": classes})
    if as_json:
        typer.echo(json.dumps({"run": str(run), "predictions": predictions}, indent=2))
        return
    table = Table("file", *(f"{rank}." for rank in range(1, min(top, len(summary.classes)) + 1)))
    for prediction in predictions:
        cells = [f"{entry['class']} ({100 * entry['probability']:.1f} %)" for entry in prediction["classes"]]
        table.add_row(prediction["file"], *cells)
    Console().print(table)
