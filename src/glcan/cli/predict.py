"""`glcan predict`: the most probable classes of image files, or the objects in them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from torch import nn

_BATCH = 64
MIN_SCORE = 0.5


def predict(
    run: Annotated[Path, typer.Argument(help="Directory of a finished run.")],
    files: Annotated[list[Path], typer.Argument(help="Image files of any size.", metavar="FILE...")],
    top: Annotated[int, typer.Option(help="Classification: how many classes to show for each image.", min=1)] = 3,
    min_score: Annotated[
        float, typer.Option(help="Detection: leave out objects of a lower score.", min=0, max=1)
    ] = MIN_SCORE,
    out: Annotated[
        Path | None,
        typer.Option(help="Detection: folder for the images with boxes; default: predictions/ in the run's directory."),
    ] = None,
    device: Annotated[str, typer.Option(help="Where to compute: auto, cpu, cuda, ...")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON in place of a table.")] = False,
) -> None:
    """Classify image files with a trained model, or find the objects in them, prepared as in the run's evaluation.

    Detection writes each image with labelled boxes, and predictions.json beside them.
    """
    import torch

    from glcan.data import read_images
    from glcan.training import RunDirectory, load_model, resolve_device

    summary = RunDirectory(run).read_summary()
    place = resolve_device(device)
    model = load_model(run).to(place)
    if summary.config.task == "detection":
        _detect(run, files, model, summary.classes, min_score, out or run / "predictions", as_json)
        return
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


def _detect(
    run: Path, files: list[Path], model: nn.Module, classes: list[str], min_score: float, out: Path, as_json: bool
) -> None:
    """Finds objects; writes images with boxes and one JSON file of all of them to `out`."""
    from glcan.errors import RunError
    from glcan.report.boxes import describe_boxes, draw_boxes
    from glcan.training.detection import detect_files

    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"{out} cannot be made ({error.strerror}). Choose another --out.") from None
    predictions: list[dict[str, Any]] = []
    pictures: set[str] = set()
    for file, pixels, prediction in detect_files(model, files):
        name = f"{Path(file).stem}.png"
        if name in pictures:  # of another folder, or another format
            name = f"{Path(file).stem}-{len(predictions) + 1}.png"
        pictures.add(name)
        draw_boxes(pixels, prediction, classes, min_score=min_score).save(out / name)
        objects = describe_boxes(prediction, classes, min_score=min_score)
        predictions.append({"file": str(file), "picture": str(out / name), "objects": objects})
    result = json.dumps({"run": str(run), "min_score": min_score, "predictions": predictions}, indent=2)
    (out / "predictions.json").write_text(result + "\n", encoding="utf-8")
    if as_json:
        typer.echo(result)
        return
    table = Table("file", "objects", "picture")
    for entry in predictions:
        found = ", ".join(f"{o['class']} ({100 * o['score']:.0f} %)" for o in entry["objects"])
        table.add_row(entry["file"], found or "none", entry["picture"])
    Console().print(table)
