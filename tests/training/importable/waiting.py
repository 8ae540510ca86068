"""Calls for processes of their own; these import it by its name."""

import os
import time
from pathlib import Path


def forever(mark: Path) -> None:
    """Say where it runs, and never end."""
    mark.write_text(str(os.getpid()))
    time.sleep(600)
