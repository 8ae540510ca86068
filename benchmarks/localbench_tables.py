"""The tables and plots of LocalBench, of the runs that are there: those of rows that there are no more, too."""

from __future__ import annotations

import re
import statistics
from typing import Any

from localbench_benches import Bench
from localbench_runs import Plan, label_of
from matplotlib.figure import Figure
from rename_results import BOXES, LEGEND

from glcan.report.plots import look
from glcan.sizes import format_bytes, format_scaled
from glcan.training.run import write_json

__all__ = ["report", "rows_of", "table"]

_COSTS = ("peak_bytes", "activation_peak_bytes", "flops_per_step")


def report(plan: Plan) -> str:
    """Write table.md and the plots of the runs that are there; returns the table."""
    rows = rows_of(plan)
    if not rows:
        return f"{plan.name}: no run is there yet"
    text = table(plan.name, plan.bench, rows)
    (plan.results / "table.md").write_text(text, encoding="utf-8")
    before = all(BOXES in str(row.get("note")) for row in rows)
    note = {"note": BOXES} if before else {}
    write_json(plan.results / "table.json", {"bench": plan.name, "rows": rows} | note)
    cost_plot(plan, rows).savefig(plan.results / "metric_against_cost.png", dpi=150)
    if any(row["probe_accuracy"] for row in rows):
        probe_plot(plan, rows).savefig(plan.results / "probes.png", dpi=150)
    return text


def rows_of(plan: Plan) -> list[dict[str, Any]]:
    """A row for each method of the bench, and for each other one that there are runs of."""
    found = plan.records()
    asked = [entry.label(blocks) for entry, blocks in plan.rows]
    rows = []
    for label in dict.fromkeys([*asked, *map(label_of, found.values())]):
        try:
            rate = plan.rate(label, found)
        except LookupError:  # not all rates were tried
            continue
        wanted = [plan.identity(label, rate, seed) for seed in plan.bench.seeds]
        records = [found[identity] for identity in wanted if identity in found]
        if records:
            rows.append(summarised(label, rate, records))
    return rows


def summarised(label: str, rate: float, records: list[dict[str, Any]]) -> dict[str, Any]:
    """The mean over seeds of the runs of a row."""
    values = [record["test"] for record in records]
    first = records[0]
    found: dict[str, Any] = {
        "entry": label,
        **{name: first[name] for name in ("renamed_from", "share", "note") if name in first},
        "blocks": first["blocks"],
        "lr": rate,
        "unit": first["unit"],
        "metric": first["metric"],
        "seeds": [record["seed"] for record in records],
        "values": values,
        "mean": statistics.fmean(values),
        "std": statistics.stdev(values) if len(values) > 1 else None,
        "probe_accuracy": [
            statistics.fmean(each) for each in zip(*(r["probe_accuracy"] for r in records), strict=True)
        ],
        "validation": statistics.fmean(record["validation"] for record in records),
    }
    return found | {name: first[name] for name in (*_COSTS, "auxiliary_parameters")}


def table(name: str, bench: Bench, rows: list[dict[str, Any]]) -> str:
    """A Markdown table, ratios against end-to-end training where it is among the rows."""
    base = next((row for row in rows if row["entry"] == "e2e"), None)
    scale, unit = (100, "%") if rows[0]["unit"] == "fraction" else (1, rows[0]["unit"])
    heads = ["method", "K", "lr", f"{rows[0]['metric'].replace('_', ' ')} ({unit})", "Δ", "seeds"]
    heads += ["peak", "activations", "FLOPs", "auxiliary parameters"]
    lines = [" | ".join(heads), " | ".join(["---"] * 3 + ["---:"] * (len(heads) - 3))]
    for row in rows:
        ratios = {cost: f" ({row[cost] / base[cost]:.2f}×)" if base else "" for cost in _COSTS}
        spread = "" if row["std"] is None else f" ± {scale * row['std']:.2f}"
        cells = [row["entry"], str(row["blocks"]), f"{row['lr']:g}", f"{scale * row['mean']:.2f}{spread}"]
        cells += [f"{scale * (row['mean'] - base['mean']):+.2f}" if base else "–", str(len(row["values"]))]
        cells += [format_bytes(row[cost]) + ratios[cost] for cost in _COSTS[:2]]
        cells += [format_scaled(row["flops_per_step"], 1000, ("", "k", "M", "G", "T", "P")) + ratios["flops_per_step"]]
        cells += [f"{row['auxiliary_parameters']:,}"]
        lines.append(" | ".join(cells))
    settings = ", ".join(f"{key} {value}" for key, value in bench.settings.items())
    note = f"{settings}; learning rate of each row chosen from {', '.join(map(str, bench.rates))} on validation data"
    text = f"# {name}\n\n{note}.\n\n" + "\n".join(f"| {line} |" for line in lines) + "\n"
    said = _said(rows)
    return text + ("\n" + "\n".join(f"- {sentence}" for sentence in said) + "\n" if said else "")


def _said(rows: list[dict[str, Any]]) -> list[str]:
    """A line for each name that is not plain, and one where rows come from before the boxes were mended."""
    labels = [row["entry"] for row in rows]
    kinds = {"share": r"share:\d", "selective": r"selective:\d", "+joint": r".*\+joint"}
    said = [LEGEND[kind] for kind, name in kinds.items() if any(re.match(name, label) for label in labels)]
    before = [row["entry"] for row in rows if BOXES in str(row.get("note"))]
    if before:
        said.append(f"Measured {BOXES}{'' if len(before) == len(rows) else ': ' + '; '.join(before)}.")
    return said


def cost_plot(plan: Plan, rows: list[dict[str, Any]]) -> Figure:
    """The metric against FLOPs and against peak memory of a step; a method has a colour, a number of blocks a fill."""
    figure = Figure(figsize=(10, 5), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    names = list(dict.fromkeys(_without_blocks(row) for row in rows))
    most = max(row["blocks"] for row in rows)
    scale = 100 if rows[0]["unit"] == "fraction" else 1
    base = next((row for row in rows if row["entry"] == "e2e"), rows[0])
    for row in rows:
        for axes, name in ((left, "flops_per_step"), (right, "peak_bytes")):
            axes.errorbar(
                row[name] / base[name],
                scale * row["mean"],
                yerr=None if row["std"] is None else scale * row["std"],
                **look(names.index(_without_blocks(row))),
                markerfacecolor="none" if row["blocks"] == most else None,
                markersize=8,
                capsize=3,
                linestyle="none",
                label=row["entry"],
            )
    left.set_xlabel(f"FLOPs of a step / {base['entry']}")
    right.set_xlabel(f"peak memory of a step / {base['entry']}")
    left.set_ylabel(f"test {rows[0]['metric'].replace('_', ' ')} ({'%' if scale == 100 else rows[0]['unit']})")
    figure.legend(*left.get_legend_handles_labels(), loc="outside right upper", fontsize="small", frameon=False)
    figure.suptitle(f"{plan.name}: {plan.bench.settings.get('model', '')} {plan.bench.settings.get('data', '')}")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def _without_blocks(row: dict[str, Any]) -> str:
    """The same for 4 and for 16 blocks, and for the shares that these have."""
    return re.sub(r":\d+\b| \(.*\)", "", row["entry"]) if row["blocks"] > 1 else str(row["entry"])


def probe_plot(plan: Plan, rows: list[dict[str, Any]]) -> Figure:
    """Accuracy of a linear probe behind each block, and of the model itself at the end."""
    numbers = sorted({row["blocks"] for row in rows if row["probe_accuracy"]})
    figure = Figure(figsize=(5 * len(numbers), 4.5), layout="constrained")
    for axes, blocks in zip(figure.subplots(1, len(numbers), squeeze=False)[0], numbers, strict=True):
        for i, row in enumerate(row for row in rows if row["blocks"] == blocks):
            accuracies = [*row["probe_accuracy"], row["validation"]]
            axes.plot(
                range(1, blocks + 1),
                [100 * value for value in accuracies],
                **look(i),
                markersize=4,
                label=row["entry"],
            )
        axes.set_xlabel(f"block of {blocks}; the last one is the model itself")
        axes.set_ylabel("validation accuracy (%)")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize="small")
    figure.suptitle(f"{plan.name}: linear probes")
    return figure
