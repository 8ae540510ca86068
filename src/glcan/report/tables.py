"""A comparison as a table: in the terminal and in Markdown, from the same rows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich import box
from rich.table import Table

from glcan.report.results import Comparison, MethodResult, Metric, Reference
from glcan.sizes import format_bytes, format_scaled

NOTES = (
    "Metric: after the last epoch, mean ± sample standard deviation over the seeds; Δ: mean minus that of e2e.",
    "=: the metric of e2e, whose numbers the method computes bit for bit; it was not trained again.",
    "(×): ratio to e2e; for the step the median over interleaved rounds of the ratio within a round.",
    "Peak memory: live bytes of one training step; activations: what is kept for backward or in flight, at its peak.",
)


def columns(comparison: Comparison) -> list[str]:
    """The table's header."""
    metric = comparison["methods"][0]["metric"]
    unit = metric_unit(metric)
    return [
        "method",
        "blocks",
        _heading(metric),
        f"Δ ({'points' if unit == '%' else unit})",
        *(_heading(metric) for metric in comparison["methods"][0]["beside"]),
        "peak memory",
        "activations",
        "step",
        "FLOPs",
        "auxiliary parameters",
    ]


def rows(comparison: Comparison) -> list[list[str]]:
    """One row for each reference and method, in the order of :func:`columns`: text, ratios in parentheses."""
    base = next((method["metric"]["mean"] for method in comparison["methods"] if method["name"] == "e2e"), None)
    references = [_reference_row(reference, base) for reference in comparison["references"]]
    return references + [_row(method) for method in comparison["methods"]]


def title(comparison: Comparison) -> str:
    """What was compared, in one line."""
    seeds = comparison["seeds"]
    return (
        f"{comparison['model']} on {comparison['dataset']}, {_count(comparison['epochs'], 'epoch')}, "
        f"{_count(len(seeds), 'seed')} ({', '.join(map(str, seeds))}), batch {comparison['timing']['batch']}"
    )


def terminal(comparison: Comparison) -> Table:
    """The comparison for the terminal, narrow enough for 80 columns: ratios and spreads stand under their values."""
    table = Table(
        title=title(comparison),
        caption="\n".join(NOTES),
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        padding=0,
        pad_edge=False,
    )
    header = columns(comparison)
    breaks = {"activations": "activa-\ntions", "auxiliary parameters": "auxiliary\nparam."}
    shown = [i for i, column in enumerate(header) if column != "blocks"]  # a method's name says it
    for i in shown:
        text = breaks.get(header[i], header[i].replace(" ", "\n"))
        table.add_column(text, justify="right" if i else "left", no_wrap=True)
    for row in rows(comparison):
        name, *cells = (row[i].replace(" (", "\n(").replace(" ±", "\n±") for i in shown)
        table.add_row(name.replace("+", "\n+"), *cells)  # glcan:4+start
    return table


def markdown(comparison: Comparison) -> str:
    """The comparison as a Markdown document with its table, plots and circumstances."""
    header = columns(comparison)
    lines = [
        f"# {title(comparison)}",
        "",
        _markdown_row(header),
        _markdown_row(["---"] + ["---:"] * (len(header) - 1)),
        *(_markdown_row(row) for row in rows(comparison)),
        "",
        *(f"- {note}" for note in NOTES),
        "",
        "![Metric over epochs](metric_over_epochs.png)",
        "![Metric against memory and time](metric_against_cost.png)",
        "",
        "Measured with " + ", ".join(f"{key} {value}" for key, value in _flat(comparison["environment"])) + ".",
        "",
    ]
    return "\n".join(lines)


def metric_unit(metric: Metric) -> str:
    """The unit that the metric is printed in."""
    return "%" if metric["unit"] == "fraction" else metric["unit"]


def metric_scale(unit: str) -> float:
    """What a value in this unit is multiplied with before it is printed."""
    return 100.0 if unit == "fraction" else 1.0


def _heading(metric: Metric) -> str:
    unit = metric_unit(metric)
    return metric["name"].replace("_", " ") + (f" ({unit})" if unit else "")


def _value(metric: Metric) -> str:
    scale, digits = metric_scale(metric["unit"]), 2 if metric["unit"] else 4
    value = ("= " if metric["same_as"] else "") + f"{scale * metric['mean']:.{digits}f}"
    return value if metric["std"] is None else f"{value} ± {scale * metric['std']:.{digits}f}"


def _reference_row(reference: Reference, base: float | None) -> list[str]:
    metric = reference["metric"]
    delta = "–" if base is None else f"{metric_scale(metric['unit']) * (metric['mean'] - base):+.2f}"
    return [reference["name"], "–", _value(metric), delta, *map(_value, reference["beside"]), *["–"] * 5]


def _row(method: MethodResult) -> list[str]:
    metric, versus = method["metric"], method["vs_e2e"]
    scale = metric_scale(metric["unit"])
    peak = format_bytes(method["peak_bytes"])
    activations = format_bytes(method["activation_peak_bytes"])
    step = format_scaled(1e6 * method["step_seconds"], 1000, ("µs", "ms", "s"))
    flops = format_scaled(method["flops_per_step"], 1000, ("", "k", "M", "G", "T", "P"))
    if versus:
        peak += f" ({versus['peak_ratio']:.2f}×)"
        activations += f" ({versus['activation_ratio']:.2f}×)"
        step += f" ({versus['time_ratio']:.2f}×)"
        flops += f" ({versus['flops_ratio']:.2f}×)"
    return [
        method["name"],
        str(method["blocks"]),
        _value(metric),
        f"{scale * versus['metric_delta']:+.2f}" if versus else "–",
        *map(_value, method["beside"]),
        peak,
        activations,
        step,
        flops,
        f"{method['auxiliary_parameters']:,}",
    ]


def _markdown_row(cells: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def _flat(environment: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in environment.items():
        if isinstance(value, dict):
            yield from _flat(value)
        elif value is not None:
            yield key.replace("_", " "), value
