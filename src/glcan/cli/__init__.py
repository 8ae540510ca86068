"""The command line: one file per command; `main` turns a user's mistake into one message and exit code 2."""

from __future__ import annotations

from importlib import metadata
from typing import Annotated, Any

import typer
from rich.text import Text
from typer.core import TyperGroup

from glcan.cli import compare, data, evaluate, methods, plan, predict, train
from glcan.console import plain_console
from glcan.errors import GlcanError


class _Commands(TyperGroup):
    """Exit codes: 2 for the user's mistakes, as for unknown options, and 130 after Ctrl-C."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except GlcanError as error:
            message = Text.assemble(("error: ", "bold red"), str(error))
            plain_console(stderr=True).print(message, soft_wrap=True)
            raise typer.Exit(2) from None
        except KeyboardInterrupt:
            raise typer.Exit(130) from None


app = typer.Typer(
    cls=_Commands,
    help="Train PyTorch vision models with less memory: local learning with GLCAN, and its rivals beside it.",
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for _module in (plan, train, compare, evaluate, predict, data, methods):
    app.command()(getattr(_module, _module.__name__.rpartition(".")[2]))  # each file's command has its name


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"glcan {metadata.version('glcan')}")
        raise typer.Exit


@app.callback()
def _glcan(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Entry point of the `glcan` command."""
    app()
