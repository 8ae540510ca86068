"""What a training step will cost, as a table and as JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from glcan.cost.cuts import Plan
from glcan.cost.step import StepCost
from glcan.sizes import format_bytes, format_scaled

__all__ = ["Forecast"]


@dataclasses.dataclass(frozen=True)
class Forecast:
    """What a training step will cost.

    Attributes:
        method: "glcan:4+accumulate:2".
        family: "exact", "sampled" or "local".
        options: of the method.
        plan: the cuts, and what is recomputed.
        cost: of one step in its steady state.
        auxiliary_parameters: of all auxiliary networks; 0 for all but local learning.
        step: what a step does, in a few words.
        baselines: the cost of the same step end-to-end and with activation checkpointing, by name.
        memory: the budget in bytes, None if there was none.
    """

    method: str
    family: str
    options: Mapping[str, Any]
    plan: Plan
    cost: StepCost
    auxiliary_parameters: int
    step: str = ""
    baselines: Mapping[str, StepCost] = dataclasses.field(default_factory=dict)
    memory: int | None = None

    @property
    def headline(self) -> str:
        """The family, the blocks and what a step does, in a line."""
        blocks = f"{self.plan.blocks} blocks, " if self.plan.blocks > 1 else ""
        return f"{self.method} ({self.family}): {blocks}{self.step}"

    def ratios(self, baseline: str) -> dict[str, float]:
        """Peak, activation peak and FLOPs, each divided by the baseline's."""
        other = self.baselines[baseline]
        return {
            "peak_ratio": self.cost.peak_bytes / other.peak_bytes,
            "activation_ratio": self.cost.activation_peak_bytes / other.activation_peak_bytes,
            "flops_ratio": self.cost.flops / other.flops,
        }

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON: bytes and FLOPs of one step, and ratios."""
        found: dict[str, Any] = {
            "method": self.method,
            "family": self.family,
            "options": dict(self.options),
            "blocks": self.plan.blocks,
            "cuts": list(self.plan.cuts),
            "recompute": list(self.plan.recompute),
            "peak_bytes": self.cost.peak_bytes,
            "activation_peak_bytes": self.cost.activation_peak_bytes,
            "by_kind": self.cost.by_kind,
            "block_peak_bytes": list(self.cost.block_peak_bytes),
            "flops_per_step": self.cost.flops,
            "auxiliary_parameters": self.auxiliary_parameters,
        }
        if self.memory is not None:
            found["memory_bytes"] = self.memory
        if "e2e" in self.baselines:
            found["vs_e2e"] = self.ratios("e2e")
        found["vs_checkpoint"] = {name: self.ratios(name) for name in self.baselines if name.startswith("checkpoint")}
        found["baselines"] = {
            name: {
                "peak_bytes": cost.peak_bytes,
                "activation_peak_bytes": cost.activation_peak_bytes,
                "flops_per_step": cost.flops,
            }
            for name, cost in self.baselines.items()
        }
        return found

    def rows(self) -> list[list[str]]:
        """A table: a header, this forecast and the baselines; relative to end-to-end where that is there."""
        first = self.baselines.get("e2e")

        def cells(name: str, cost: StepCost) -> list[str]:
            row = [name, format_bytes(cost.peak_bytes), format_bytes(cost.activation_peak_bytes)]
            row.append(format_scaled(cost.flops, 1000, ("", "k", "M", "G", "T", "P")))
            if first is not None:
                ratios = (
                    cost.peak_bytes / first.peak_bytes,
                    cost.activation_peak_bytes / first.activation_peak_bytes,
                    cost.flops / first.flops,
                )
                row[1:] = [f"{cell} ({ratio:.2f}×)" for cell, ratio in zip(row[1:], ratios, strict=True)]
            return row

        own = [] if self.method in self.baselines else [cells(self.method, self.cost)]
        others = [cells(other, cost) for other, cost in self.baselines.items()]
        return [["method", "peak", "activations", "FLOPs a step"], *own, *others]

    def __str__(self) -> str:
        kinds = ", ".join(f"{k.replace('_', ' ')} {format_bytes(v)}" for k, v in self.cost.by_kind.items() if v)
        lines = [self.headline, str(self.plan), f"peak {format_bytes(self.cost.peak_bytes)}: {kinds}"]
        widths = [max(map(len, column)) for column in zip(*self.rows(), strict=True)]
        lines += [
            "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in self.rows()
        ]
        return "\n".join(lines)
