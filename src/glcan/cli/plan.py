"""`glcan plan`: what a training step will need, before any training."""

from __future__ import annotations

import contextlib
import json
import re
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from glcan.planning import LargestBatch


def plan(
    model: Annotated[
        str,
        typer.Argument(
            help="A model: torchvision/NAME, timm/NAME, cifar_resnetN, edsr, spandrel/NAME, or package.module:factory."
        ),
    ],
    task: Annotated[str, typer.Option(help="What is learned.")] = "classification",
    batch: Annotated[int, typer.Option(help="Images per step.")] = 64,
    image: Annotated[
        str | None,
        typer.Option(
            metavar="HxW",
            help="Image size in pixels. \\[default: 224x224; CIFAR ResNets 32x32; super-resolution 48x48, small "
            "images; detectors 800x1088, small ones 96x96]",
        ),
    ] = None,
    scale: Annotated[int | None, typer.Option(help="Factor of super-resolution: 2, 3 or 4. \\[default: 2]")] = None,
    classes: Annotated[int | None, typer.Option(help="Number of classes. \\[default: the model's own]")] = None,
    channels: Annotated[int, typer.Option(help="Channels of the images.")] = 3,
    method: Annotated[
        str | None,
        typer.Option(
            help="glcan:4, selective, checkpoint, e2e+accumulate:8, ...; see `glcan methods`. \\[default: glcan:4; "
            "glcan with --cuts or --memory, which decide the number of blocks]"
        ),
    ] = None,
    option: Annotated[
        list[str] | None, typer.Option("--option", metavar="KEY=VALUE", help="Option of the method.")
    ] = None,
    cuts: Annotated[str | None, typer.Option(metavar="NAME,NAME", help="Units at which a new block begins.")] = None,
    memory: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Budget for the peak, as 8GiB or 8GB; glcan without a number has as many blocks as are cheapest.",
        ),
    ] = None,
    max_batch: Annotated[
        bool, typer.Option("--max-batch", help="With --memory: the largest batch of each method.")
    ] = False,
    recompute: Annotated[bool, typer.Option("--recompute", help="Activation checkpointing inside all blocks.")] = False,
    model_options: Annotated[
        list[str] | None, typer.Option("--model-option", metavar="KEY=VALUE", help="Option of the model.")
    ] = None,
    optimizer: Annotated[str, typer.Option(help="sgd (with momentum), adamw or adam.")] = "sgd",
    precision: Annotated[str, typer.Option(help="fp32, or bf16 autocast with fp32 weights.")] = "fp32",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object in place of the tables.")] = False,
) -> None:
    """Predict a training step's peak memory and FLOPs, against every other family of methods.

    Nothing is trained and nothing of the batch's size is allocated: the real step runs on tensors without contents.
    """
    from rich.table import Table

    from glcan import models, planning, tasks
    from glcan.cli.options import pairs
    from glcan.console import plain_console
    from glcan.errors import ConfigError
    from glcan.inspect.dryrun import UntouchedParameters
    from glcan.sizes import format_bytes, parse_bytes
    from glcan.strategies import family_of, parse_method
    from glcan.training.building import optimizer_factory

    if batch < 2:
        raise ConfigError(f"--batch is {batch}; it must be at least 2, because normalisation layers need two images.")
    if max_batch and memory is None:
        raise ConfigError("--max-batch needs a budget: --memory 8GiB.")
    if method is None:
        method = "glcan:4" if cuts is None and memory is None else "glcan"
    parsed = parse_method(method)
    if parsed.phased:
        raise ConfigError(f"--method {method} has phases; plan '{parsed.core}' and the phases' own methods one by one.")
    if parsed.accumulate > 1 and max_batch:
        raise ConfigError(f"--method {method} has no largest batch: memory is that of a part. Leave +accumulate out.")
    if parsed.accumulate > 1 and batch < 2 * parsed.accumulate:
        raise ConfigError(
            f"--method {method} leaves --batch {batch} less than two images a part, which normalisation layers need; "
            "lower the one or raise the other."
        )
    if precision not in ("fp32", "bf16"):
        raise ConfigError(f"--precision is {precision!r}; it must be fp32 or bf16.")
    limit = None if memory is None else parse_bytes(memory)
    enlarging, detecting = task == tasks.SuperResolution.name, models.is_detector(model)
    if scale is not None and not enlarging:
        raise ConfigError(f"--scale {scale} is for super-resolution, not for {task}; leave it out.")
    size = _image(image or ("48x48" if enlarging else _usual(model)))
    side = size[0] if size[0] == size[1] else None
    the_task = tasks.SuperResolution(scale=scale or 2) if enlarging else tasks.create(task)
    options = pairs("--model-option", model_options)
    if detecting and not options.keys() & {"min_size", "max_size"}:
        options |= {"min_size": min(size), "max_size": max(size)}  # the images are of that size already
    with contextlib.nullcontext() if detecting else UntouchedParameters():  # two-stage detectors run for real
        network = models.create(
            model,
            num_classes=classes + 1
            if classes is not None and detecting
            else classes,  # the background is a class there
            in_channels=channels,
            image_size=side,
            scale=the_task.scale if isinstance(the_task, tasks.SuperResolution) else None,
            **options,
        )
    common: dict[str, Any] = {
        "options": pairs("--option", option),
        "optimizer": optimizer_factory(optimizer),
        "autocast": _autocast(precision),
    }
    about = {
        "model": model,
        "task": the_task.name,
        "batch": batch,
        "image": list(size),
        "precision": precision,
        "optimizer": optimizer,
    }
    if isinstance(the_task, tasks.SuperResolution):
        about["scale"] = the_task.scale
    console = plain_console()
    if max_batch:
        assert limit is not None
        numbers = (parsed.number,) if parsed.number is not None else (2, 4, 8)
        local = [f"{parsed.base}:{k}" for k in numbers] if family_of(parsed.base) == "local" else [method]
        largest = planning.largest_batches(
            network,
            the_task,
            lambda count: the_task.example(count, channels, size),
            limit,
            methods=[name for name in ("e2e", "checkpoint", "checkpoint-sqrt", "selective") if name != method] + local,
            **common,
        )
        if as_json:
            rows = [vars(found) for found in largest]
            typer.echo(json.dumps({**about, "batch": None, "memory_bytes": limit, "largest_batch": rows}, indent=2))
        else:
            console.print(f"{model} at {size[0]}x{size[1]}, {precision}, {optimizer}: the largest batch in {memory}")
            console.print(_batches(largest))
        return
    names = [name.strip() for name in cuts.split(",")] if cuts is not None else None
    forecast = planning.plan(
        network,
        the_task,
        the_task.example(batch, channels, size),
        method=method,
        cuts=names,
        memory=limit,
        recompute=recompute,
        **common,
    )
    if as_json:
        typer.echo(json.dumps({**about, **forecast.as_dict()}, indent=2))
        return
    console.print(f"{model}, batch {batch} at {size[0]}x{size[1]}, {precision}, {optimizer}")
    console.print(forecast.headline)
    console.print(str(forecast.plan))
    header, *rows_of_cells = forecast.rows()
    table = Table(*header)
    for row in rows_of_cells:
        table.add_row(*row)
    console.print(table)
    kinds = [
        f"{kind.replace('_', ' ')} {format_bytes(count)}" for kind, count in forecast.cost.by_kind.items() if count
    ]
    console.print("At the peak: " + ", ".join(kinds) + ".")
    if limit is not None:
        spare = limit - forecast.cost.peak_bytes
        console.print(f"Fits {memory} with {format_bytes(spare)} to spare. {_ADVICE}")


_ADVICE = "The CUDA context and the libraries' workspaces (about 0.5 to 1 GiB) come on top."


def _autocast(precision: str) -> Any:
    import torch

    return torch.bfloat16 if precision == "bf16" else None


def _usual(model: str) -> str:
    """The image size that a classifier or detector is planned for by default."""
    from glcan import models

    if models.is_detector(model):
        return "96x96" if model.endswith("_small") else "800x1088"
    return "32x32" if model.startswith("cifar_") else "224x224"


def _image(text: str) -> tuple[int, int]:
    from glcan.errors import ConfigError

    match = re.fullmatch(r"(\d+)(?:[xX×](\d+))?", text.strip())
    size = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if min(size) < 1:
        raise ConfigError(f"--image {text!r} is no image size; write HEIGHTxWIDTH in pixels, for example 224x224.")
    return size


def _batches(largest: list[LargestBatch]) -> Any:
    from rich.table import Table

    from glcan.sizes import format_bytes, format_scaled

    table = Table("method", "largest batch", "peak", "FLOPs an image")
    for found in largest:
        flops = format_scaled(found.flops_per_image, 1000, ("", "k", "M", "G", "T", "P"))
        peak = format_bytes(found.peak_bytes) if found.batch else "–"
        table.add_row(found.method, f"{found.batch:,}" if found.batch else "none fits", peak, flops)
    return table
