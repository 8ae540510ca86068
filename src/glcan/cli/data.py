"""`glcan data`: which data sets there are, and where."""

from __future__ import annotations

import dataclasses
import json
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from glcan.console import plain_console


def data(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON in place of a table.")] = False,
) -> None:
    """List the data sets: which are at hand and where, and how to get the rest."""
    from glcan.data import available

    infos = available()
    if as_json:
        typer.echo(json.dumps([dataclasses.asdict(info) for info in infos], indent=2, default=str))
        return
    table = Table("data set", "what it is", "classes", "train", "test", "found in, or how to get it")
    task = infos[0].task
    for info in infos:
        if info.task != task:
            table.add_section()
            table.add_row("", Text(f"for {info.task}:", style="italic"), "", "", "", "")
            task = info.task
        numbers = ("" if number is None else f"{number:,}" for number in (info.classes, info.train, info.test))
        where = Text.assemble((str(info.found), "green")) if info.found else Text(info.remedy)
        table.add_row(info.name, info.title, *numbers, where)
    plain_console().print(table)
