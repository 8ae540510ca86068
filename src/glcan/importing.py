"""What a user names by import path, ``package.module:attribute``: their own models and rules."""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any

from glcan.errors import ConfigError, UnknownName

__all__ = ["import_path"]


def import_path(path: str, kind: str, example: str) -> Any:
    """The object that an import path names. The current directory stays importable, for what it imports later.

    Args:
        path: ``package.module:attribute``; the attribute may be nested, ``Zoo.Net``.
        kind: what it is, for messages: "model", "rule".
        example: of such a path, for messages.

    Raises:
        UnknownName: the module has no such attribute (near matches are listed).
        ConfigError: no import path, or a module that cannot be imported.
    """
    module_name, _, attribute = path.partition(":")
    if not module_name or not attribute or "/" in module_name:
        raise ConfigError(f"{path!r} is no import path. Write package.module:NAME, for example {example}.")
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is not None and f"{module_name}.".startswith(f"{error.name}."):
            raise ConfigError(
                f"There is no module {error.name!r} for the {kind} {path!r}. It must be installed, or lie below the "
                f"current directory {os.getcwd()} or on PYTHONPATH."
            ) from error
        raise ConfigError(f"The module {module_name!r} of the {kind} {path!r} cannot be imported: {error}.") from error
    found: Any = module
    for part in attribute.split("."):
        if not hasattr(found, part):
            known = [key for key, value in vars(found).items() if callable(value) and not key.startswith("_")]
            raise UnknownName(kind, path, (f"{module_name}:{key}" for key in known))
        found = getattr(found, part)
    return found
