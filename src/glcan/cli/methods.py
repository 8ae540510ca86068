"""`glcan methods`: how blocks can learn."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table


def methods() -> None:
    """List the rules and the baselines, one line each."""
    from glcan import rules

    table = Table("method", "what it does")
    for name in rules.names():
        table.add_row(name, rules.RULES[name].summary)
    Console().print(table)
