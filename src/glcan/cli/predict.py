"""`glcan predict`: what a trained model makes of image files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from glcan.cli.options import Trust
from glcan.console import plain_console

if TYPE_CHECKING:
    import torch
    from torch import nn

    from glcan.training import Summary

_BATCH = 64
_TILE = 256
_MIN_SCORE = 0.5
#: What each task has a use for.
_OPTIONS = {
    "classification": {"--top"},
    "super-resolution": {"--out", "--truth", "--tile", "--overlap"},
    "detection": {"--out", "--min-score"},
}


def predict(
    run: Annotated[Path, typer.Argument(help="Directory of a finished run.")],
    files: Annotated[list[Path], typer.Argument(help="Image files of any size.", metavar="FILE...")],
    top: Annotated[
        int | None, typer.Option(help="Classification: how many classes to show for each image; default: 3.", min=1)
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Super-resolution and detection: folder for the images that are written; default: RUN/predictions."
        ),
    ] = None,
    min_score: Annotated[
        float | None,
        typer.Option(help=f"Detection: leave out objects of a lower score; default: {_MIN_SCORE}.", min=0, max=1),
    ] = None,
    truth: Annotated[
        Path | None,
        typer.Option(
            help="Super-resolution: folder with the true large images, with the files' names, to compare with."
        ),
    ] = None,
    tile: Annotated[
        int | None,
        typer.Option(
            help=f"Super-resolution: enlarge in tiles of so many pixels, 0 for whole images; default: {_TILE}."
        ),
    ] = None,
    overlap: Annotated[
        int | None, typer.Option(help="Super-resolution: pixels that tiles share; default: an eighth of a tile.")
    ] = None,
    device: Annotated[str, typer.Option(help="Where to compute: auto, cpu, cuda, ...")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON in place of a table.")] = False,
    trust: Trust = False,
) -> None:
    """Classify image files with a trained model, prepared as in the run's evaluation; enlarge them; or find objects.

    Enlarged images are written as PNG, each with a crop of it beside bicubic enlargement (and the truth, with --truth).
    Detection writes each image with labelled boxes, and predictions.json beside them.
    """
    from glcan.errors import ConfigError
    from glcan.training import RunDirectory, load_model, resolve_device

    summary = RunDirectory(run).read_summary()
    options = {
        "--top": top,
        "--out": out,
        "--min-score": min_score,
        "--truth": truth,
        "--tile": tile,
        "--overlap": overlap,
    }
    for option, value in options.items():
        if value is not None and option not in _OPTIONS[summary.config.task]:
            raise ConfigError(f"{option} is not for the run's task {summary.config.task!r}. Leave it out.")
    place = resolve_device(device)
    model = load_model(run, trust=trust).to(place)
    if summary.config.task == "detection":
        score = _MIN_SCORE if min_score is None else min_score
        _detect(summary, model, files, out or run / "predictions", score, run, as_json)
        return
    if summary.config.task == "super-resolution":
        found = _enlarge(
            summary, model, files, out or run / "predictions", truth, _TILE if tile is None else tile, overlap
        )
        if as_json:
            typer.echo(json.dumps({"run": str(run), "predictions": found}, indent=2))
            return
        for entry in found:
            quality = f" (PSNR-Y {entry['psnr_y']:.2f} dB, SSIM-Y {entry['ssim_y']:.4f})" if "psnr_y" in entry else ""
            typer.echo(f"{entry['file']} -> {entry['enlarged']}{quality}, {entry['crop']}")
        return
    predictions = _classify(summary, model, files, top or 3, place)
    if as_json:
        typer.echo(json.dumps({"run": str(run), "predictions": predictions}, indent=2))
        return
    table = Table("file", *(f"{rank}." for rank in range(1, min(top or 3, len(summary.classes)) + 1)))
    for prediction in predictions:
        cells = [f"{entry['class']} ({100 * entry['probability']:.1f} %)" for entry in prediction["classes"]]
        table.add_row(prediction["file"], *cells)
    plain_console().print(table)


def _classify(
    summary: Summary, model: nn.Module, files: list[Path], top: int, place: torch.device
) -> list[dict[str, Any]]:
    import torch

    from glcan.data import read_images

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
    return predictions


def _detect(
    summary: Summary, model: nn.Module, files: list[Path], out: Path, min_score: float, run: Path, as_json: bool
) -> None:
    """Finds objects; writes images with boxes and one JSON file of all of them to `out`."""
    from glcan.errors import RunError
    from glcan.report.boxes import describe_boxes, draw_boxes
    from glcan.training.detection import detect_files

    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"{out} cannot be made ({error.strerror}). Choose another --out.") from None
    classes = summary.classes
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
    plain_console().print(table)


def _enlarge(
    summary: Summary,
    model: nn.Module,
    files: list[Path],
    out: Path,
    truth: Path | None,
    tile: int,
    overlap: int | None,
) -> list[dict[str, Any]]:
    """Writes NAME_x2.png and NAME_x2_crop.png for every file; what was written, and metrics where truth is known."""
    from glcan.errors import ConfigError, DataError
    from glcan.report.crops import side_by_side
    from glcan.training import open_picture, upscale_picture
    from glcan.training.image_quality import psnr_y, ssim_y
    from glcan.training.upscaling import as_tensor

    scale = summary.config.scale
    stems = [file.stem for file in files]
    twice = next((stem for i, stem in enumerate(stems) if stem in stems[:i]), None)
    if twice is not None:
        raise ConfigError(f"Two files are named {twice!r}, and would be written to one. Enlarge them one by one.")
    if truth is not None and not truth.is_dir():
        raise DataError(f"The folder {str(truth)!r} of the true images does not exist. Correct --truth.")
    pictures = [open_picture(file) for file in files]
    true = [None if truth is None else _true_picture(truth, file) for file in files]
    for file, small, large in zip(files, pictures, true, strict=True):
        if large is not None and large.size != (small.width * scale, small.height * scale):
            raise DataError(
                f"The true image of {str(file)!r} is {large.width} x {large.height} pixels; with scale {scale} it must "
                f"be {small.width * scale} x {small.height * scale}."
            )
    out.mkdir(parents=True, exist_ok=True)
    written: list[dict[str, Any]] = []
    for file, small, large in zip(files, pictures, true, strict=True):
        result = upscale_picture(model, small, tile=tile or None, overlap=overlap)
        entry: dict[str, Any] = {
            "file": str(file),
            "enlarged": str(out / f"{file.stem}_x{scale}.png"),
            "crop": str(out / f"{file.stem}_x{scale}_crop.png"),
        }
        result.save(entry["enlarged"])
        images = [None if p is None else as_tensor(p.convert("RGB")) for p in (small, result, large)]
        assert images[0] is not None
        assert images[1] is not None
        if images[2] is not None:
            pair = images[1][None], images[2][None]
            entry |= {"psnr_y": float(psnr_y(*pair, scale)), "ssim_y": float(ssim_y(*pair, scale))}
        side_by_side(images[0], images[1], images[2]).savefig(entry["crop"], dpi=150)
        written.append(entry)
    return written


def _true_picture(folder: Path, file: Path) -> Any:
    """The picture in a folder that is named as the file, with or without the file's ending x2."""
    from glcan.data.photographs import EXTENSIONS
    from glcan.errors import DataError
    from glcan.training import open_picture

    stems = (file.stem, *(file.stem.removesuffix(f"x{scale}") for scale in (2, 3, 4)))
    for path in sorted(folder.iterdir()):
        if path.stem in stems and path.suffix.lower() in EXTENSIONS:
            return open_picture(path)
    raise DataError(f"The folder {str(folder)!r} has no true image for {str(file)!r}: none is named {file.stem!r}.")
