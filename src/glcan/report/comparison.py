"""Compare methods: the same data, seeds, schedule and initial weights for all, and one table of what came out."""

from __future__ import annotations

import gc
import itertools
import json
import statistics
from collections.abc import Iterator, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console

from glcan.console import plain_console
from glcan.cost.step import StepCost, measure_step
from glcan.errors import ConfigError, GlcanError, RunError
from glcan.learner import Learner
from glcan.report import tables
from glcan.report.costs import WARMUP_ROUNDS, averaged, enter, time_steps, weights_sha256
from glcan.report.results import Comparison, Curve, MethodResult, Metric, Reference, VersusE2E
from glcan.strategies import EXACT, family_of
from glcan.strategies.method import Method, parse_methods
from glcan.training import RunConfig, RunDirectory, Summary, build, environment, load_data, read_metrics, train
from glcan.training.building import to_device
from glcan.training.checkpoint import write_atomically
from glcan.training.evaluation import MEASURES
from glcan.training.phases import RunPhase, phases_of
from glcan.training.progress import Board
from glcan.training.run import write_json
from glcan.training.side_by_side import completed

REQUEST = "request.json"
RESULT = "comparison.json"
DOCUMENT = "comparison.md"


def compare(
    config: RunConfig,
    methods: Sequence[str],
    seeds: Sequence[int],
    out: Path,
    *,
    progress: bool = True,
    share_exact: bool = False,
    jobs: int = 1,
) -> Comparison:
    """Train every method with every seed, meter one step of each, and write down how they compare.

    Each run goes to ``out/METHOD/seedN``. Runs that are finished there are used as they are, interrupted ones are
    continued; so an interrupted comparison is continued by asking for it again, and methods and seeds can be added.
    Memory and FLOPs are those of one metered step; step times are taken with the methods taking turns, so that all
    meet the same machine. Ratios are against end-to-end training in the same comparison; without ``"e2e"`` among the
    methods there is nothing to compare against, and ``vs_e2e`` is None.

    Args:
        config: data, model and schedule of all runs. ``seed`` and ``method`` come from the other arguments; ``cuts``
            and ``options`` go to the methods of the same name as ``config.method``.
        methods: "e2e", "checkpoint", "selective", "glcan:4", "glcan:4+start", "e2e+accumulate:4", ...
        seeds: of the initial weights, the order of the images and their augmentation; one run each.
        out: new, empty, or the directory of this comparison.
        progress: report progress on standard error and print the table.
        share_exact: do not train the methods that compute what ``"e2e"`` does (checkpointing), but give them its
            metric, marked as such; their costs are measured all the same.
        jobs: runs trained side by side, each in a process of its own with its part of the CPU threads; sums in another
            order make them other runs than those with all threads. A script that asks for more than 1 needs
            ``if __name__ == "__main__":`` around what it does.

    Returns:
        What ``comparison.json`` holds. Beside it are ``comparison.md`` and the two plots.

    Raises:
        UnknownName, ConfigError, CutError: the methods, seeds, jobs or settings cannot work; raised before anything
            is written.
        RunError: ``out`` holds something else, or a comparison with other settings.
    """
    from glcan.report.plots import write_plots  # matplotlib: a second that a wrong option need not wait for

    out = Path(out)
    if jobs < 1:
        raise ConfigError(f"jobs = {jobs} runs side by side; at least 1 is needed.")
    parsed = parse_methods(methods)
    configs = _configs(config, parsed, seeds)
    request = _request(config, parsed, seeds)
    _check_out(out, request)
    digest = _check_initial_weights(configs[seeds[0]])

    console = plain_console(stderr=True, quiet=not progress)
    for name in ("cuts", "options"):
        if getattr(config, name) and all(method.base != config.parsed.base for method in parsed):
            console.print(
                f"{name} = {getattr(config, name)} are for {config.parsed.base!r}, which is no method here: left out"
            )
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / REQUEST, request)
    summaries: dict[str, list[Summary]] = {str(method): [] for method in parsed}
    curves: dict[str, list[list[dict[str, Any]]]] = {str(method): [] for method in parsed}
    end_to_end = next((method for method in parsed if str(method) == "e2e"), None)
    shared = [
        m for m in parsed if share_exact and end_to_end and m.base in EXACT and m.accumulate == 1 and m != end_to_end
    ]
    trained = [method for method in parsed if method not in shared]
    runs = [
        _Run(method, seed, configs[seed][method], out / method.folder / f"seed{seed}")
        for seed, method in itertools.product(seeds, trained)
    ]
    for run, summary in zip(runs, _train(runs, jobs, progress, console), strict=True):
        summaries[str(run.method)].append(summary)
        curves[str(run.method)].append(read_metrics(run.folder))

    for method in shared:
        assert end_to_end is not None
        summaries[str(method)], curves[str(method)] = summaries[str(end_to_end)], curves[str(end_to_end)]

    console.print("memory and time of a step, methods taking turns", style="bold")
    costs, seconds, batch = _costs(configs[seeds[0]])
    results = [
        _result(
            method,
            summaries[str(method)],
            curves[str(method)],
            costs[str(method)],
            seconds[str(method)],
            bool(config.val),
            "e2e" if method in shared else None,
        )
        for method in parsed
    ]
    _relate_to_e2e(results, seconds)
    comparison: Comparison = {
        "task": config.task,
        "model": config.model,
        "dataset": config.data,
        "epochs": config.epochs,
        "seeds": list(seeds),
        "methods": results,
        "references": _references(summaries[str(parsed[0])][0]),
        "timing": {"batch": batch, "warmup_rounds": WARMUP_ROUNDS, "rounds": len(seconds[str(parsed[0])])},
        "initial_weights_sha256": digest,
        "config": request["config"],
        "environment": environment(),
    }
    write_json(out / RESULT, comparison)
    write_atomically(out / DOCUMENT, lambda path: path.write_text(tables.markdown(comparison), encoding="utf-8"))
    write_plots(comparison, out)
    if progress:
        plain_console().print(tables.terminal(comparison))
        console.print(f"{out / RESULT}, {DOCUMENT} and plots are written")
    return comparison


class _Run(NamedTuple):
    """One training of a comparison."""

    method: Method
    seed: int
    config: RunConfig
    folder: Path

    @property
    def name(self) -> str:
        return f"{self.method}, seed {self.seed}"


def _train(runs: list[_Run], jobs: int, progress: bool, console: Console) -> list[Summary]:
    """Train what is not trained yet, ``jobs`` side by side; the summaries of all."""
    jobs = min(jobs, len(runs))
    missing = [run for run in runs if not RunDirectory(run.folder).summary.exists()]
    if jobs > 1 and missing:
        console.print(f"{len(missing)} runs, {jobs} side by side", style="bold")
        calls = [partial(train, run.config, run.folder, resume=True, progress=False) for run in missing]
        with (
            Board([(run.name, run.config, run.folder) for run in missing], progress) as board,
            closing(completed(calls, jobs, watch=board.update)) as results,
        ):
            for index, result in results:
                if isinstance(result, GlcanError):
                    result.args = (f"{missing[index].name}: {result}",)
                    raise result
    summaries = []
    for i, run in enumerate(runs):
        if run in missing and jobs == 1:
            console.print(f"{run.name} ({i + 1} of {len(runs)} runs)", style="bold")
        summaries.append(train(run.config, run.folder, resume=True, progress=progress))
    return summaries


def _configs(config: RunConfig, methods: list[Method], seeds: Sequence[int]) -> dict[int, dict[Method, RunConfig]]:
    """The configuration of every run, by seed and method."""
    if not seeds:
        raise ConfigError("A comparison needs at least one seed, but got none. For example: --seeds 0 1 2.")
    for i, seed in enumerate(seeds):
        if seed in seeds[:i]:
            raise ConfigError(f"Seed {seed} is named more than once; its run would be the same. Name each seed once.")
    own = [method for method in methods if method.base == config.parsed.base]
    for method in own:
        if config.cuts is not None and method.number != len(config.cuts) + 1:
            raise ConfigError(
                f"Method '{method}' has {method.number} blocks, but {len(config.cuts)} cuts make "
                f"{len(config.cuts) + 1}. Write '{method.base}:{len(config.cuts) + 1}', or leave the cuts out."
            )
    settings = config.model_dump()
    configs: dict[int, dict[Method, RunConfig]] = {seed: {} for seed in seeds}
    for seed, method in itertools.product(seeds, methods):
        change: dict[str, Any] = {"method": str(method), "seed": seed, "memory": None, "recompute": False}
        change |= {"cuts": config.cuts, "options": config.options} if method in own else {"cuts": None, "options": {}}
        configs[seed][method] = RunConfig(**(settings | change))
    return configs


def _request(config: RunConfig, methods: list[Method], seeds: Sequence[int]) -> dict[str, Any]:
    """What was asked for; the settings that ``methods`` and ``seeds`` replace are at their defaults."""
    base = RunConfig(**(config.model_dump() | {"seed": RunConfig.model_fields["seed"].default}))
    return {
        "config": base.model_dump(mode="json"),
        "methods": [str(method) for method in methods],
        "seeds": list(seeds),
    }


def _check_out(out: Path, request: dict[str, Any]) -> None:
    """Check that a directory may be used for this comparison, without changing anything."""
    if not out.exists():
        return
    if not out.is_dir():
        raise RunError(f"{out} is a file, but a comparison needs a directory. Choose another --out.")
    names = (entry.name for entry in out.iterdir())
    found = sorted(name for name in names if not name.startswith(f".{REQUEST}."))  # half written by a killed process
    if not found:
        return
    if REQUEST not in found:
        shown = ", ".join(found[:3]) + (", ..." if len(found) > 3 else "")
        raise RunError(f"{out} holds files that belong to no comparison ({shown}). Choose another --out.")
    try:
        there = json.loads((out / REQUEST).read_text(encoding="utf-8"))
        before, methods, seeds = RunConfig(**there["config"]), there["methods"], there["seeds"]
    except (OSError, ValueError, KeyError, TypeError, ConfigError) as error:
        raise RunError(f"{out / REQUEST} cannot be read ({error}). Choose another --out.") from None
    differences = RunConfig(**request["config"]).differences(before)
    if differences:
        listed = "; ".join(f"{name}: {old!r} there, {new!r} asked" for name, (new, old) in differences.items())
        raise RunError(f"{out} holds a comparison with other settings ({listed}). Choose another --out.")
    for kind, old, new in (("methods", methods, request["methods"]), ("seeds", seeds, request["seeds"])):
        missing = [item for item in old if item not in new]
        if missing:
            raise RunError(
                f"{out} holds this comparison with more {kind}, and its results would be written over: asked were "
                f"{new}, there are also {missing}. Name these too, or choose another --out."
            )


def _check_initial_weights(configs: dict[Method, RunConfig]) -> str:
    """Build every method once, so that what cannot work fails before hours of training, and compare their weights."""
    digests = {}
    data = load_data(next(iter(configs.values())))
    for method, config in configs.items():
        digests[str(method)] = weights_sha256(build(config, data).model)
        gc.collect()
    assert len(set(digests.values())) == 1, f"methods begin with different weights: {digests}"
    return next(iter(digests.values()))


def _costs(configs: dict[Method, RunConfig]) -> tuple[dict[str, StepCost], dict[str, list[float]], int]:
    """Cost of a metered step of each method, seconds of the interleaved steps, and the images in such a step.

    Where a run has steps of several kinds (`glcan.training.phases`): the larger of the peaks, and the mean of FLOPs and
    seconds.
    """
    data = load_data(next(iter(configs.values())))
    batch: tuple[Any, ...] = ()
    kinds: dict[tuple[str, int], tuple[RunConfig, RunPhase]] = {}
    shares: dict[str, dict[int, float]] = {}
    for method, config in configs.items():
        steps = config.epochs * len(data.loader("train", config.batch))
        table = phases_of(method, steps, method.number or 1)
        shares[str(method)] = {i: (phase.end - phase.begin) / steps for i, phase in enumerate(table)}
        kinds |= {(str(method), i): (config, phase) for i, phase in enumerate(table)}

    def learner_of(key: tuple[str, int]) -> Learner:
        config, phase = kinds[key]
        return enter(build(config, data), phase)

    costs: dict[tuple[str, int], StepCost] = {}
    for key, (config, _) in kinds.items():
        learner = learner_of(key)
        batch = _batch(config, learner, next(iter(data.loader("train", config.batch))))
        costs[key] = measure_step(learner, *batch)
        del learner
        gc.collect()
    seconds = time_steps({key: learner_of(key) for key in kinds}, batch)
    means: dict[str, list[float]] = {}
    for name, share in shares.items():
        rounds = zip(*(seconds[name, phase] for phase in share), strict=True)
        means[name] = [sum(s * t for s, t in zip(share.values(), each, strict=True)) for each in rounds]
    return (
        {name: averaged({phase: costs[name, phase] for phase in share}, share) for name, share in shares.items()},
        means,
        len(batch[0]),
    )


def _batch(config: RunConfig, learner: Learner, batch: tuple[Any, ...]) -> tuple[Any, ...]:
    """A batch as the trainer gives it to this learner."""
    device = next(learner.model.parameters()).device
    return to_device(batch, device, torch.channels_last if config.channels_last else torch.contiguous_format)


def _result(
    method: Method,
    summaries: list[Summary],
    records: list[list[dict[str, Any]]],
    cost: StepCost,
    seconds: list[float],
    validated: bool,
    same_as: str | None,
) -> MethodResult:
    first = summaries[0]
    quarters = statistics.quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else 3 * seconds
    return {
        "name": str(method),
        "family": family_of(method.base),
        "blocks": first.blocks,
        "metric": _metric(summaries, first.metric.name, same_as=same_as),
        "beside": [_metric(summaries, name, same_as=same_as) for name in MEASURES[first.config.task].beside],
        "peak_bytes": cost.peak_bytes,
        "activation_peak_bytes": cost.activation_peak_bytes,
        "by_kind": dict(cost.by_kind),
        "cuda_peak_bytes": cost.cuda_peak_bytes,
        "step_seconds": statistics.median(seconds),
        "step_seconds_quartiles": [quarters[0], quarters[2]],
        "flops_per_step": cost.flops,
        "parameters": first.parameters,
        "auxiliary_parameters": first.auxiliary_parameters,
        "cuts": first.cuts,
        "curve": _curve(first, records, validated),
        "vs_e2e": None,
    }


def _metric(summaries: list[Summary], name: str, of: str = "", same_as: str | None = None) -> Metric:
    """A test metric over the seeds; with `of`, that of a reference."""
    found = [next(metric for metric in summary.metrics if metric.name == of + name) for summary in summaries]
    values = [metric.value for metric in found]
    return {
        "name": f"test_{name}",
        "unit": found[0].unit,
        "mean": statistics.fmean(values),
        "std": statistics.stdev(values) if len(values) > 1 else None,
        "values": values,
        "same_as": same_as,
    }


def _references(first: Summary) -> list[Reference]:
    """What every run of the task measures beside its model; the same for every seed."""
    measures = MEASURES[first.config.task]
    name = measures.reference
    if name is None:
        return []
    main, *others = [_metric([first], metric, of=f"{name}_") for metric in (measures.main, *measures.beside)]
    return [{"name": name, "metric": main, "beside": others}]


def _curve(summary: Summary, records: list[list[dict[str, Any]]], validated: bool) -> Curve:
    """The validation metric over the epochs, or without validation data the model's own loss in training."""
    name = f"val_{summary.metric.name}" if validated else "train_loss"
    return {
        "name": name,
        "unit": summary.metric.unit if validated else MEASURES[summary.config.task].units["loss"],
        "epochs": [record["epoch"] for record in records[0]],
        "values": [
            [record[name] if validated else list(record[name].values())[-1] for record in run] for run in records
        ],
    }


def _relate_to_e2e(results: list[MethodResult], seconds: dict[str, list[float]]) -> None:
    base = next((result for result in results if result["name"] == "e2e"), None)
    if base is None:
        return
    for result in results:
        versus: VersusE2E = {
            "metric_delta": result["metric"]["mean"] - base["metric"]["mean"],
            "peak_ratio": result["peak_bytes"] / base["peak_bytes"],
            "activation_ratio": result["activation_peak_bytes"] / base["activation_peak_bytes"],
            "time_ratio": statistics.median(_ratios(seconds[result["name"]], seconds[base["name"]])),
            "flops_ratio": result["flops_per_step"] / base["flops_per_step"],
        }
        result["vs_e2e"] = versus


def _ratios(seconds: list[float], base: list[float]) -> Iterator[float]:
    return (own / other for own, other in zip(seconds, base, strict=True))
