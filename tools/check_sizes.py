"""Prints the longest file and class of the package, and fails where one is too long to be read in one go.

python tools/check_sizes.py
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path

SOURCE = Path(__file__).parents[1] / "src"
MOST_LINES = {"file": 450, "class": 300}


def main() -> int:
    """Measures every file and class; 1 if one is over its limit."""
    found: dict[str, list[tuple[int, str]]] = {"file": [], "class": []}
    for path in sorted(SOURCE.rglob("*.py")):
        text, name = path.read_text(encoding="utf-8"), str(path.relative_to(SOURCE))
        found["file"].append((text.count("\n"), name))
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ClassDef):
                found["class"].append(((node.end_lineno or node.lineno) - node.lineno + 1, f"{name}: {node.name}"))
    too_long = False
    for kind, sizes in found.items():
        lines, name = max(sizes)
        print(f"longest {kind}: {lines} lines of at most {MOST_LINES[kind]} ({name})")
        for lines, name in sizes:
            if lines > MOST_LINES[kind]:
                too_long = True
                print(f"{name} has {lines} lines; a {kind} has at most {MOST_LINES[kind]}: split it by responsibility")
    return int(too_long)


if __name__ == "__main__":
    sys.exit(main())
