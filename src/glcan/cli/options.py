"""Command-line options made from the fields of RunConfig, so that each setting is named and described once."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import tomllib
import types
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import typer

from glcan.errors import ConfigError
from glcan.strategies import parse_method
from glcan.training import RunConfig, RunDirectory, read_recipe
from glcan.training.config import flag
from glcan.training.run import check_code

Task = Annotated[
    str | None,
    typer.Argument(
        help="What is learned: classification, super-resolution, detection. \\[default: the recipe's, or "
        "classification]",
        metavar="TASK",
        show_default=False,
    ),
]
Recipe = Annotated[
    str | None, typer.Option(help="Settings to start from: the name of a recipe that comes with glcan, or PATH.toml.")
]

Trust = Annotated[
    bool,
    typer.Option(
        "--trust", help="Import what the run names as package.module:NAME, which executes code; see what it is first."
    ),
]

_PANELS = {
    "Model": ("model", "model_options"),
    "Data": ("data", "data_root", "image_size", "scale", "patch", "crops", "val", "limit", "skip_corrupt", "download"),
    "Method": ("method", "options", "cuts", "memory", "recompute", "units"),
    "Optimization": (
        "epochs",
        "batch",
        "optimizer",
        "lr",
        "momentum",
        "nesterov",
        "weight_decay",
        "label_smoothing",
        "criterion",
        "schedule",
        "milestones",
        "warmup_epochs",
        "clip_norm",
    ),
    "Machine": ("precision", "channels_last", "device", "cuda_graph", "workers", "seed", "deterministic"),
}
#: Every setting that a command line can give; the task is an argument of its own.
SETTINGS = tuple(name for names in _PANELS.values() for name in names)


def settings(*, only: Iterable[str] = SETTINGS, without: Iterable[str] = ()) -> Callable[..., Callable[..., None]]:
    """Decorator: in place of its parameter ``given``, a command gets an option for each setting.

    ``given`` then holds the settings that were given, by the names of the fields.
    """
    names = [name for name in only if name not in set(without)]

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def wrapped(**arguments: Any) -> None:
            given = {name: _value(name, arguments.pop(name)) for name in names}
            command(**arguments, given={name: value for name, value in given.items() if value is not None})

        signature = inspect.signature(command, eval_str=True)
        own = [parameter for parameter in signature.parameters.values() if parameter.name != "given"]
        keyword = inspect.Parameter.KEYWORD_ONLY
        parameters = [parameter.replace(kind=keyword) for parameter in own]
        parameters += [inspect.Parameter(name, keyword, default=None, annotation=_option(name)) for name in names]
        wrapped.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        wrapped.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return wrapped

    return decorate


def configure(
    task: str | None,
    given: Mapping[str, Any],
    recipe: str | None = None,
    run: Path | None = None,
    *,
    trust: bool = False,
) -> RunConfig:
    """A configuration: what was given over the recipe, or over the settings of a run, over the defaults.

    Another method comes without the cuts and options that the recipe has for its own; cuts and a budget of memory
    replace each other, and the number of blocks. The task is the recipe's, unless another one is given.

    Raises:
        ConfigError, UnknownName: the recipe or the settings cannot be used.
        RunError: the run names code that is neither given again nor trusted.
    """
    base: dict[str, Any] = {}
    if recipe is not None:
        base = read_recipe(recipe)
    elif run is not None:
        stored = RunDirectory(run).read_config()
        if not trust:
            check_code(run, stored, ("model", "method"), given)
        base = stored.model_dump()
    task = task or base.get("task", "classification")
    if base and task != base.get("task", "classification"):
        raise ConfigError(
            f"The recipe {recipe} is for {base.get('task', 'classification')}, not for {task}; leave the task out, or "
            "choose another recipe."
        )
    if given.get("method", base.get("method")) != base.get("method"):
        base = {name: value for name, value in base.items() if name not in ("cuts", "options", "memory")}
    if given.keys() & {"cuts", "memory"}:
        base = {name: value for name, value in base.items() if name not in ("cuts", "memory")}
        if "method" in base:  # the number of blocks, too, is decided anew
            base["method"] = str(dataclasses.replace(parse_method(base["method"]), number=None))
    merged = {
        name: base[name] | value if isinstance(value, dict) and isinstance(base.get(name), dict) else value
        for name, value in given.items()
    }
    return RunConfig(**(base | {"task": task} | merged))


def free_folder(name: str) -> Path:
    """The first of runs/NAME, runs/NAME-2, ... that does not exist."""
    number = 1
    while (path := Path("runs") / (name if number == 1 else f"{name}-{number}")).exists():
        number += 1
    return path


def _option(name: str) -> Any:
    field = RunConfig.model_fields[name]
    help_text = field.description or ""
    default = field.get_default(call_default_factory=True)
    if default is not None and default != {} and "default:" not in help_text:
        shown = str(default).lower() if isinstance(default, bool) else default
        help_text += f" [default: {shown}]"
    panel = next(panel for panel, names in _PANELS.items() if name in names)
    kind, metavar = _kind(name), None
    declaration = flag(name)
    if field.annotation is bool:
        declaration += f"/--no-{declaration.removeprefix('--')}"
    elif get_origin(kind) is list:
        metavar = "KEY=VALUE"
    elif _is_list(field.annotation):
        metavar = "NUMBER,NUMBER" if name == "milestones" else "NAME,NAME"
    # rich would take [default: ...] for markup: typer escapes nothing in help texts.
    option = typer.Option(declaration, help=help_text.replace("[", "\\["), metavar=metavar, rich_help_panel=panel)
    return Annotated[kind | None, option]


def _kind(name: str) -> Any:
    """The type of an option that typer can read."""
    annotation = RunConfig.model_fields[name].annotation
    if name == "val":
        return float  # RunConfig takes whole numbers for counts
    if get_origin(annotation) is dict:
        return list[str]
    if _is_list(annotation):
        return str
    if get_origin(annotation) is Literal:
        return annotation
    kinds = [kind for kind in get_args(annotation) if kind is not types.NoneType]
    return kinds[0] if kinds else annotation


def _is_list(annotation: Any) -> bool:
    return any(get_origin(kind) is list for kind in get_args(annotation))


def _value(name: str, text: Any) -> Any:
    """What typer read, as RunConfig takes it; None where the option was not given."""
    annotation = RunConfig.model_fields[name].annotation
    if _is_list(annotation) and text is not None:
        return [part.strip() for part in text.split(",") if part.strip()]
    if get_origin(annotation) is dict:
        return pairs(flag(name), text) or None
    return text


def pairs(option: str, texts: Iterable[str] | None) -> dict[str, Any]:
    """KEY=VALUE options as a dictionary; values are read as TOML, plain words as strings."""
    return dict(_pair(option, text) for text in texts or ())


def _pair(option: str, text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise ConfigError(f"{option} {text!r} is not of the form KEY=VALUE; write for example {option} width=0.5.")
    try:
        return key, tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return key, value  # a plain word is a string
