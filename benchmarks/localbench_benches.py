"""What LocalBench compares, on which data: the rows of each bench, and its reduced version."""

from __future__ import annotations

import dataclasses
from typing import Any

from glcan.data.sets import SETS
from glcan.strategies import family_of
from glcan.strategies.method import Method, parse_method

__all__ = ["BENCHES", "Bench", "Entry", "named", "quick"]


@dataclasses.dataclass(frozen=True)
class Entry:
    """A row of the table, or one for each number of blocks.

    Attributes:
        method: as it is written everywhere, of a local one without the number of blocks: "dgl+start:0.3", "selective".
        options: of the method.
        note: what differs from its defaults, in words; with options there is one.
    """

    method: str
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    note: str = ""

    @property
    def local(self) -> bool:
        """Whether the method has blocks."""
        return family_of(parse_method(self.method).base) == "local"

    def with_blocks(self, blocks: int) -> Method:
        """The method, in so many blocks where it has blocks."""
        method = parse_method(self.method)
        return dataclasses.replace(method, number=blocks) if self.local else method

    def label(self, blocks: int) -> str:
        """What the row is called: "glcan:4, depth 8"."""
        return str(self.with_blocks(blocks)) + (f", {self.note}" if self.note else "")


@dataclasses.dataclass(frozen=True)
class Bench:
    """What is compared on which data.

    Attributes:
        settings: of all runs, as `RunConfig` takes them.
        entries: the rows.
        blocks: K of the local ones; the others are trained once.
        rates: learning rates, of which one is chosen for each row and K.
        seeds: of the runs that count.
        choice: settings that differ while the learning rate is chosen (with the first seed), to make that cheaper. With
            none, the chosen run is the first seed's.
    """

    settings: dict[str, Any]
    entries: tuple[Entry, ...]
    blocks: tuple[int, ...]
    rates: tuple[float, ...]
    seeds: tuple[int, ...]
    choice: dict[str, Any] = dataclasses.field(default_factory=dict)


def named(*methods: str) -> tuple[Entry, ...]:
    """Rows of methods with their defaults."""
    return tuple(Entry(method) for method in methods)


_FASHION = {
    "model": "cifar_resnet32",
    "data": "fashion-mnist",
    "limit": 22000,
    "val": 2000,
    "epochs": 5,
    "batch": 128,
    "warmup_epochs": 1,
    "channels_last": True,
    "precision": "bf16",  # half the time on a CPU with instructions for it (AMX)
}
_DETECTION = {"task": "detection", "val": 200, "epochs": 16}
_SUPER_RESOLUTION = {"task": "super-resolution", "val": 2, "epochs": 40}
_UNLIMITED = {"unit_share": 0.0, "unit_cost": 0.0, "memory": 100.0}  # so that the budget alone sets the width
_PARTS_OF_GLCAN: dict[str, dict[str, Any]] = {
    "both branches": {"local": "always"},
    "local only": {"local": "always", "use_global": False},
    **{f"depth {depth}": {"depth": depth} for depth in (1, 2, 8)},
    **{f"budget {share:.0%}": {"budget": share} | _UNLIMITED for share in (0.02, 0.05, 0.1, 0.2, 0.5)},
}
_ABLATION = (
    Entry("glcan"),
    Entry("glcan", {"use_local": False}, "global only"),
    Entry("glcan", {"use_global": False}, "local only"),
)

BENCHES = {
    "classification": Bench(
        _FASHION,
        (
            *named("e2e", "checkpoint", "e2e+accumulate:4", "e2e+accumulate:16", "selective", "glcan"),
            *named("predsim", "dgl", "infopro", "auglocal", "man", "manpp"),
            *named("dgl+start:0.3", "glcan+start:0.3", "dgl+finish:0.1", "glcan+finish:0.1"),
        ),
        (4, 16),
        (0.05, 0.1, 0.2),
        (0, 1, 2),
    ),
    "detection": Bench(
        _DETECTION,
        named("e2e", "checkpoint", "e2e+accumulate:4", "selective", "glcan", "dgl", "dgl+start:0.5", "glcan+start:0.5"),
        (4,),
        (1e-3, 2e-3, 4e-3),
        (0, 1),
        {"limit": 600, "epochs": 4},
    ),
    "super-resolution": Bench(
        _SUPER_RESOLUTION,
        named("e2e", "checkpoint", "e2e+accumulate:4", "selective", "glcan", "glcan+start:0.5", "glcan+finish:0.1"),
        (4,),
        (5e-4, 1e-3, 2e-3),
        (0, 1),
        {"epochs": 10},
    ),
    "ablation": Bench(
        _FASHION,
        (Entry("glcan"), *(Entry("glcan", options, note) for note, options in _PARTS_OF_GLCAN.items())),
        (4, 16),
        (0.2,),  # the choice of `glcan:4` in the bench of classification
        (0, 1),
    ),
    "ablation-detection": Bench(_DETECTION, _ABLATION, (4,), (4e-3,), (0, 1)),
    "ablation-super-resolution": Bench(_SUPER_RESOLUTION, _ABLATION, (4,), (2e-3,), (0, 1)),
}


def quick(name: str) -> Bench:
    """A bench so small that all of them together take minutes: it shows that everything works, and little else."""
    bench = BENCHES[name]
    images = {"limit": 3500, "val": 500, "epochs": 2, "warmup_epochs": 0.2}
    reductions: dict[str, dict[str, Any]] = {
        "classification": images,
        "detection": {"limit": 300, "val": 50, "epochs": 2},
        "super-resolution": {"epochs": 4, "crops": 32},
    }
    small = reductions[bench.settings.get("task", "classification")]
    if bench.settings.get("data") == "fashion-mnist" and SETS["fashion-mnist"].find(None) is None:
        small = small | {"data": "digits", "model": "cifar_resnet20", "limit": None, "val": 300, "epochs": 5}
    entries = bench.entries[:3] if name.startswith("ablation") else bench.entries
    rates = bench.rates[1:2] or bench.rates
    return dataclasses.replace(
        bench, settings=bench.settings | small, entries=entries, blocks=(4,), rates=rates, seeds=(0,), choice={}
    )
