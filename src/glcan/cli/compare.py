"""`glcan compare`: several methods on the same data, seeds and schedule."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from glcan.cli.options import Recipe, Task, configure, free_folder, settings

_METHODS = "e2e,checkpoint,e2e+accumulate:4,glcan:4,selective"


@settings(without=("memory", "recompute", "seed"))
def compare(
    task: Task = None,
    methods: Annotated[
        str | None,
        typer.Option(help=f"Methods, separated by commas; see `glcan methods`. \\[default: {_METHODS}]"),
    ] = None,
    seeds: Annotated[str, typer.Option(help="Seeds, separated by commas; each method is trained with each.")] = "0",
    out: Annotated[
        Path | None, typer.Option(help="Directory of the comparison; default: a new one under runs/.")
    ] = None,
    recipe: Recipe = None,
    share_exact: Annotated[
        bool | None,
        typer.Option(
            "--share-exact/--train-exact",
            help="Whether checkpointing, which computes what e2e does, is only metered, or trained as well. "
            "\\[default: trained; detection: metered]",
        ),
    ] = None,
    jobs: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Runs trained side by side, each with its part of the CPU threads. \\[default: 2 for each CPU, where "
            "runs are trained on CPUs, else 1]",
        ),
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress, only the result.")] = False,
    *,
    given: dict[str, Any],
) -> None:
    """Compare methods: the task's metric, peak memory and step time, each against end-to-end training.

    Without arguments: end-to-end training, the same with activation checkpointing and with gradient accumulation,
    local learning in four blocks with GLCAN, and back-propagation on chosen images, on the embedded digits (for
    super-resolution the bundled photographs, with bicubic enlargement beside them; for detection the embedded scenes).
    --option and --cuts are for the methods of the name that --method gives.
    """
    from glcan.console import plain_console
    from glcan.errors import ConfigError
    from glcan.report import compare as run_comparison
    from glcan.report.tables import terminal
    from glcan.training import resolve_device
    from glcan.training.side_by_side import cpus

    try:
        numbers = [int(seed) for seed in seeds.split(",")]
    except ValueError:
        raise ConfigError(f"--seeds {seeds!r} is no list of whole numbers; write for example --seeds 0,1,2.") from None
    config = configure(task, given, recipe)
    if out is None:
        out = free_folder(f"compare-{Path(config.data).name}-{config.model}".replace("/", "_").replace(":", "."))
    if methods is None:
        methods = _METHODS
        if config.batch < 8:  # parts of a single image, which BatchNorm may refuse
            methods = methods.replace("e2e+accumulate:4,", "")
    names = [name.strip() for name in methods.split(",") if name.strip()]
    if share_exact is None:
        share_exact = config.task == "detection"  # minutes of training there
    if jobs is None:  # with one for each CPU, some would be idle at the end, when the last of few runs goes on alone
        jobs = 2 * cpus() if resolve_device(config.device).type == "cpu" else 1

    try:
        result = run_comparison(config, names, numbers, out, progress=not quiet, share_exact=share_exact, jobs=jobs)
    except (KeyboardInterrupt, SystemExit):
        if out.exists():
            plain_console(stderr=True).print(f"Stopped. The same command with --out {out} continues.", soft_wrap=True)
        raise
    if quiet:
        plain_console().print(terminal(result))
