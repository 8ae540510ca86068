"""Super-resolution networks of the library spandrel that can be trained, by name.

spandrel finds a network's options in its weights; without weights they have to be said. Here are those of the published
models; `create(..., **options)` replaces single ones. Left out are networks that train other weights than they use
(SPAN), or leave some of theirs without a gradient (FDAT).

| name | published in | name | published in |
|---|---|---|---|
| `RCAN` | arXiv 1807.02758 | `CRAFT` | arXiv 2308.05022 |
| `SwinIR`, `SwinIR-light` | arXiv 2108.10257 | `OmniSR` | arXiv 2304.10244 |
| `Swin2SR` | arXiv 2209.11345 | `SAFMN` | arXiv 2302.13800 |
| `HAT`, `HAT-S` | arXiv 2205.04437 | `SeemoRe` | arXiv 2402.03412 |
| `DAT` | arXiv 2308.03364 | `DITN` | arXiv 2308.02794 |
| `DRCT` | arXiv 2404.00722 | `PLKSR` | arXiv 2404.11848 |
| `RGT` | arXiv 2303.06373 | `ESRGAN` (RRDBNet) | arXiv 1809.00219 |
| `ATD` | arXiv 2401.08209 | `Compact` (SRVGGNet) | arXiv 2107.10833 |

Also `RealPLKSR`, `MoSR` and `DCTLSA`, known by their code alone.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import nn

from glcan.errors import ConfigError, UnknownName

SCALES = (2, 3, 4)
PREFIX = "spandrel/"


class _Network(NamedTuple):
    module: str  # of spandrel.architectures; the class has the same name unless `kind` says another
    scale: str  # its argument for the scale
    options: Mapping[str, Any]  # defaults of ours, where the class has others than the published model
    kind: str = ""


_SHUFFLE: dict[str, Any] = {"upsampler": "pixelshuffle", "mlp_ratio": 2}
_SIX = (6, 6, 6, 6, 6, 6)
_SWIN: dict[str, Any] = _SHUFFLE | {"window_size": 8, "embed_dim": 180, "depths": _SIX, "num_heads": _SIX}
_HAT: dict[str, Any] = _SWIN | {"window_size": 16}
_LIGHT: dict[str, Any] = {"upsampler": "pixelshuffledirect", "embed_dim": 60, "depths": _SIX[:4], "num_heads": _SIX[:4]}

_NETWORKS: dict[str, _Network] = {
    "RCAN": _Network("RCAN", "scale", {}),
    "SwinIR": _Network("SwinIR", "upscale", _SWIN),
    "SwinIR-light": _Network("SwinIR", "upscale", _SWIN | _LIGHT),
    "Swin2SR": _Network("Swin2SR", "upscale", _SWIN),
    "HAT": _Network("HAT", "upscale", _HAT),
    "HAT-S": _Network("HAT", "upscale", _HAT | {"embed_dim": 144, "compress_ratio": 24, "squeeze_factor": 24}),
    "DAT": _Network("DAT", "upscale", {"split_size": [8, 32], "depth": [6] * 6, "num_heads": [6] * 6}),
    "DRCT": _Network("DRCT", "upscale", _SHUFFLE),
    "RGT": _Network("RGT", "upscale", {"split_size": [8, 32], "depth": [6] * 8, "num_heads": [6] * 8, "mlp_ratio": 2}),
    "ATD": _Network("ATD", "upscale", _HAT | {"embed_dim": 210, "num_tokens": 128, "reducted_dim": 20}),
    "CRAFT": _Network("CRAFT", "upscale", {}),
    "OmniSR": _Network("OmniSR", "up_scale", {"res_num": 5}),
    "SAFMN": _Network("SAFMN", "upscaling_factor", {"dim": 36}),
    "SeemoRe": _Network("SeemoRe", "scale", {}),
    "DITN": _Network("DITN", "upscale", {}),
    "PLKSR": _Network("PLKSR", "upscaling_factor", {}),
    "RealPLKSR": _Network("PLKSR", "upscaling_factor", {}, "RealPLKSR"),
    "ESRGAN": _Network("ESRGAN", "scale", {}),
    "Compact": _Network("Compact", "upscale", {}),
    "MoSR": _Network("MoSR", "upscale", {}),
    "DCTLSA": _Network("DCTLSA", "upscale", {}),
}


def names() -> list[str]:
    """The names that `create` takes, "spandrel/" before each. Does not import spandrel."""
    return [f"{PREFIX}{name}" for name in _NETWORKS]


def create(name: str, *, scale: int = 2, **options: Any) -> nn.Module:
    """A network with random weights for images [B, 3, H, W] in 0..1 to [B, 3, s*H, s*W].

    Args:
        name: one of `names()`.
        scale: s, one of 2, 3, 4.
        options: for the constructor of spandrel's class, in place of the published ones.

    Raises:
        UnknownName: no such network. ConfigError: another scale, or options that the network does not take.
    """
    if name not in names():
        raise UnknownName("model", name, names(), "Only spandrel's networks that can be trained for super-resolution.")
    if scale not in SCALES:
        raise ConfigError(f"scale={scale} of the model {name!r}: it must be one of {', '.join(map(str, SCALES))}.")
    network = _NETWORKS[name.removeprefix(PREFIX)]
    kind = getattr(importlib.import_module(f"spandrel.architectures.{network.module}"), network.kind or network.module)
    given = {network.scale: scale, **network.options, **options}
    try:
        with warnings.catch_warnings():  # of torch, about how some networks call it
            warnings.simplefilter("ignore")
            model: nn.Module = kind(**given)
    except (TypeError, ValueError, AssertionError, RuntimeError, KeyError, IndexError) as error:
        raise ConfigError(
            f"The model {name!r} cannot be made with {options}: {error}. Leave out or correct these options."
        ) from error
    return model
