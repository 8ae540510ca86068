"""Where text from outside is printed: names of files, classes and models, as they are."""

from __future__ import annotations

from typing import Any

from rich.console import Console

__all__ = ["plain_console"]


def plain_console(**options: Any) -> Console:
    """A console that prints text as it is: no markup in [brackets], no :emoji:, no colours for numbers."""
    return Console(markup=False, emoji=False, highlight=False, **options)
