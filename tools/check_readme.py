"""Prints the README's lines, its widest line and the decimal numbers in its prose, and fails where it is too much.

Figures belong into its tables and real sample outputs; prose has none. python tools/check_readme.py
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"
MOST_LINES, WIDEST = 120, 120


def main() -> int:
    """Measures the README; 1 if a limit is not kept."""
    lines = README.read_text(encoding="utf-8").splitlines()
    code, prose = False, list[str]()
    for line in lines:
        if line.startswith("```"):
            code = not code
        elif not code and not line.startswith("|"):
            prose.append(line)
    widest = max(map(len, (line for line in lines if not line.startswith("|"))))
    text = re.sub(r"\]\([^)]*\)|`[^`]*`|arXiv \d+\.\d+|Python \d+\.\d+|Apache-2\.0", "", "\n".join(prose))
    decimals = re.findall(r"\d+\.\d+", text)
    print(
        f"README: {len(lines)} lines of at most {MOST_LINES}, widest {widest} of at most {WIDEST} outside of tables, "
    )
    print(f"decimal numbers in prose: {len(decimals)} {decimals}")
    return int(len(lines) > MOST_LINES or widest > WIDEST or bool(decimals))


if __name__ == "__main__":
    sys.exit(main())
