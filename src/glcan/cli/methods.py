"""`glcan methods`: how a batch can become gradients."""

from __future__ import annotations

from rich.table import Table

from glcan.console import plain_console


def methods() -> None:
    """List the methods, one line each: exact ones, sampled ones, and the rules of local learning."""
    from glcan import strategies

    table = Table("method", "family", "what it does")
    for name in strategies.names():
        family = strategies.family_of(name)
        table.add_row(f"{name}:BLOCKS" if family == "local" else name, family, strategies.summary_of(name))
    console = plain_console()
    console.print(table)
    console.print(
        "Behind any of them: +accumulate:PARTS. Behind local ones: +start, +freeze and +finish, with or without a share"
        " of the steps (:0.3)."
    )
