"""A comparison as plots: the metric over the epochs, and against memory and time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from glcan.report.results import Comparison, MethodResult
from glcan.report.tables import metric_scale, metric_unit, title
from glcan.sizes import format_bytes

# Okabe and Ito's palette, which people with any colour vision can tell apart; markers and dashes say the same again.
COLOURS = ("#000000", "#E69F00", "#0072B2", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#F0E442")
MARKERS = ("o", "s", "D", "^", "v", "P", "X", "*")
DASHES = ("-", "--", "-.", ":")


def look(index: int) -> dict[str, str]:
    """Colour and marker of what is drawn as number ``index``; another marker where the colours begin again."""
    return {
        "color": COLOURS[index % len(COLOURS)],
        "marker": MARKERS[(index + index // len(COLOURS)) % len(MARKERS)],
    }


OVER_EPOCHS = "metric_over_epochs.png"
AGAINST_COST = "metric_against_cost.png"


def write_plots(comparison: Comparison, folder: Path) -> list[Path]:
    """Write both plots into a folder and return their paths."""
    figures = {OVER_EPOCHS: over_epochs(comparison), AGAINST_COST: against_cost(comparison)}
    for name, figure in figures.items():
        figure.savefig(folder / name, dpi=150)
    return [folder / name for name in figures]


def over_epochs(comparison: Comparison) -> Figure:
    """Validation metric over epochs, or the train loss when no data was held out; mean and range over seeds."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    curve = comparison["methods"][0]["curve"]
    for i, method in enumerate(comparison["methods"]):
        epochs = method["curve"]["epochs"]
        values = metric_scale(curve["unit"]) * np.array(method["curve"]["values"])  # [seeds, epochs]
        colour, marker = look(i).values()
        axes.plot(
            epochs,
            values.mean(0),
            color=colour,
            linestyle=DASHES[i % len(DASHES)],
            marker=marker if len(epochs) <= 40 else None,
            markersize=4,
            label=method["name"],
        )
        if len(values) > 1:
            axes.fill_between(epochs, values.min(0), values.max(0), color=colour, alpha=0.15, linewidth=0)
    unit = "%" if curve["unit"] == "fraction" else curve["unit"]
    axes.set_xlabel("epoch")
    axes.set_ylabel(f"{curve['name'].replace('_', ' ')} ({unit})" if unit else curve["name"].replace("_", " "))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if curve["name"] == "train_loss":
        axes.set_yscale("log")
        axes.set_title("No data was held out: this is the last block's loss on the training data", fontsize="small")
    elif len(comparison["seeds"]) > 1:
        axes.set_title(f"mean and range of {len(comparison['seeds'])} seeds", fontsize="small")
    axes.legend(frameon=False)
    _finish(figure, axes, comparison)
    return figure


def against_cost(comparison: Comparison) -> Figure:
    """The test metric against activation memory (left) and step time (right); as ratios if end-to-end is there."""
    figure = Figure(figsize=(10, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    metric = comparison["methods"][0]["metric"]
    relative = all(method["vs_e2e"] for method in comparison["methods"])
    for i, method in enumerate(comparison["methods"]):
        for axes, x in zip((left, right), _costs(method), strict=True):
            scale = metric_scale(metric["unit"])
            std = method["metric"]["std"]
            axes.errorbar(
                x,
                scale * method["metric"]["mean"],
                yerr=None if std is None else scale * std,
                **look(i),
                markersize=9,
                markerfacecolor="none",  # what lies below stays visible
                markeredgewidth=2,
                linestyle="none",
                capsize=3,
                label=f"{method['name']} ({format_bytes(method['activation_peak_bytes'])}, "
                f"{1e3 * method['step_seconds']:.3g} ms)",
            )
    spread = f", mean ± std of {len(comparison['seeds'])} seeds" if metric["std"] is not None else ""
    left.set_ylabel(f"{metric['name'].replace('_', ' ')} ({metric_unit(metric)}){spread}")
    left.set_xlabel("peak activation memory of a step" + (" / end-to-end" if relative else " (MiB)"))
    right.set_xlabel("time of a step" + (" / end-to-end" if relative else " (ms)"))
    left.set_ylim(*_metric_range(comparison))
    for axes in (left, right):
        axes.set_xlim(0, 1.05 * axes.get_xlim()[1])
        if relative:
            axes.axvline(1.0, color="0.7", linewidth=1, zorder=0)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    _finish(figure, left, comparison)
    right.grid(alpha=0.3)
    right.spines[["top", "right"]].set_visible(False)
    return figure


def _costs(method: MethodResult) -> tuple[float, float]:
    versus = method["vs_e2e"]
    if versus:
        return versus["activation_ratio"], versus["time_ratio"]
    return method["activation_peak_bytes"] / 2**20, 1e3 * method["step_seconds"]


def _metric_range(comparison: Comparison) -> tuple[float, float]:
    """Limits of the metric's axis: not so narrow that noise looks like an effect, and not beyond 100 %."""
    metrics = [method["metric"] for method in comparison["methods"]]
    scale = metric_scale(metrics[0]["unit"])
    low = scale * min(metric["mean"] - (metric["std"] or 0) for metric in metrics)
    high = scale * max(metric["mean"] + (metric["std"] or 0) for metric in metrics)
    margin = max(0.15 * (high - low), 0.005 * abs(high)) or 1.0
    top = high + margin
    return low - margin, min(top, 100.2) if metrics[0]["unit"] == "fraction" else top


def _finish(figure: Figure, axes: Axes, comparison: Comparison) -> None:
    figure.suptitle(title(comparison), fontsize="medium")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
