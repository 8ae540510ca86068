"""What is imported by name is what the name says: no function or class hides a module."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest

import glcan

ROOT = Path(glcan.__file__).parent
MODULES = sorted(
    ".".join(("glcan", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__")
    for path in ROOT.rglob("*.py")
    if path.stem != "__main__"
)


@pytest.mark.parametrize("name", [name for name in MODULES if name != "glcan"])
def test_a_module_is_found_under_its_name(name: str) -> None:
    """``import glcan.X.Y as m`` gives the module: it reads the attribute of the package."""
    module = importlib.import_module(name)
    parent, _, last = name.rpartition(".")
    assert isinstance(module, ModuleType)
    assert getattr(sys.modules[parent], last) is module


def test_every_folder_is_a_package() -> None:
    folders = {path.parent for path in ROOT.rglob("*.py")}
    assert len(folders) > 10
    assert not [folder for folder in folders if not (folder / "__init__.py").exists()]
