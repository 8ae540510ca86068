"""The shape of a comparison: what ``comparison.json`` holds, key by key, with units."""

from __future__ import annotations

from typing import Any, TypedDict


class Metric(TypedDict):
    """What was measured on the test data at the end of training, one value for each seed."""

    name: str
    unit: str  # "fraction" (0 to 1, printed in percent) or the unit as it is printed
    mean: float
    std: float | None  # the sample standard deviation over seeds; None with one seed
    values: list[float]  # in the order of the comparison's seeds
    same_as: str | None  # the method whose runs these are, if this one was not trained itself


class VersusE2E(TypedDict):
    """A method's costs and metric against end-to-end training in the same comparison."""

    metric_delta: float  # mean minus end-to-end's mean, in the metric's unit
    peak_ratio: float
    activation_ratio: float
    time_ratio: float  # the median over rounds of this method's step time by that round's end-to-end step time
    flops_ratio: float


class Curve(TypedDict):
    """One quantity over the epochs of every run of a method."""

    name: str  # "val_accuracy", "val_psnr_y" or "train_loss"
    unit: str
    epochs: list[int]  # from 1
    values: list[list[float]]  # one list for each seed


class MethodResult(TypedDict):
    """One method: what it reached and what it cost."""

    name: str  # "glcan:4", "selective", "e2e+accumulate:4"
    family: str  # "exact", "sampled" or "local"
    blocks: int
    metric: Metric
    beside: list[Metric]  # further metrics that are shown
    peak_bytes: int  # live bytes of one training step at its peak: parameters, gradients, optimizer state, activations
    activation_peak_bytes: int
    by_kind: dict[str, int]  # bytes of each kind at the moment of the peak
    cuda_peak_bytes: int | None  # what the CUDA allocator held at its peak; None on other devices
    step_seconds: float  # median over the interleaved rounds
    step_seconds_quartiles: list[float]
    flops_per_step: int
    parameters: int
    auxiliary_parameters: int
    cuts: list[str]
    curve: Curve
    vs_e2e: VersusE2E | None  # None when the comparison has no end-to-end run


class Reference(TypedDict):
    """What no training was needed for, on the same test data with the same metric."""

    name: str  # "bicubic"
    metric: Metric
    beside: list[Metric]


class Timing(TypedDict):
    """How step times were taken: every method once in each round, in the order of the methods."""

    batch: int
    warmup_rounds: int
    rounds: int


class Comparison(TypedDict):
    """Everything ``comparison.json`` holds."""

    task: str
    model: str
    dataset: str
    epochs: int
    seeds: list[int]
    methods: list[MethodResult]
    references: list[Reference]
    timing: Timing
    initial_weights_sha256: str  # of the first seed's model before training: one value, since all methods share it
    config: dict[str, Any]
    environment: dict[str, Any]
