"""The run directory: whose it is, what it holds, and the summary of a finished run.

config.json         the configuration and the environment of the run; written first, decides whose directory it is
metrics.jsonl       one line per epoch
tensorboard/        the same for TensorBoard
checkpoint.pt       everything needed to continue; removed by nobody
model.safetensors   the plain model's state_dict after the last epoch
summary.json        written last: its presence means that the run is complete
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from pydantic import BaseModel, ConfigDict, ValidationError

from glcan.errors import CheckpointError, GlcanError, RunError
from glcan.training.checkpoint import write_atomically
from glcan.training.config import RunConfig

# A difference in one of these means other weights, so that the checkpoint could not even be loaded.
_MODEL_FIELDS = (
    "model",
    "model_options",
    "task",
    "method",
    "options",
    "cuts",
    "memory",
    "units",
    "optimizer",
)


class Metric(BaseModel):
    """One number with its name and unit."""

    name: str
    value: float
    unit: str


class Summary(BaseModel):
    """What a finished run reached and cost; `summary.json` holds the same."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    metric: Metric
    """The task's metric on the test data, after the last epoch, never the best one."""
    metrics: list[Metric]
    """All metrics on the test data after the last epoch."""
    val_metrics: list[Metric]
    """The same on the validation data; empty without."""
    train_loss: dict[str, float]
    """Mean loss of each block over the last epoch, {"block1": ...}."""
    seed: int
    """Seed of weights, order and augmentation."""
    epochs: int
    """Passes over the training images."""
    steps: int
    """Optimizer steps."""
    method: str
    """How a batch became gradients: "glcan:4", "selective", "e2e+accumulate:4"."""
    blocks: int
    """Number of gradient-isolated blocks; 1 where the whole model was trained."""
    cuts: list[str]
    """Units at which a block begins."""
    parameters: int
    """Parameters of the model."""
    auxiliary_parameters: int
    """Parameters of all auxiliary networks, which are dropped after training."""
    classes: list[str]
    """Names of the classes, in the order of the model's outputs."""
    preprocessing: dict[str, Any]
    """How an image becomes what the model gets: what `glcan.data.read_image` needs."""
    train_seconds: float
    """Time in the training loop, without evaluation and start."""
    wall_seconds: float
    """Time from start to end, summed over resumed parts."""
    peak_bytes: int | None
    """The CUDA allocator's peak over the training; None on other devices, where `glcan compare` measures it."""
    device: str
    """Where the run was trained."""
    config: RunConfig
    """The configuration."""
    environment: dict[str, Any]
    """Versions, machine and commit."""


class RunDirectory:
    """A directory that holds one run, and refuses any other.

    Args:
        path: need not exist yet.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self.config = self.path / "config.json"
        self.metrics = self.path / "metrics.jsonl"
        self.tensorboard = self.path / "tensorboard"
        self.checkpoint = self.path / "checkpoint.pt"
        self.weights = self.path / "model.safetensors"
        self.summary = self.path / "summary.json"

    def check(self, config: RunConfig, resume: bool) -> None:
        """Check that this directory may be used, without changing anything.

        Raises:
            RunError: it holds another run, or files that belong to no run, or it is a run and ``resume`` is False.
            CheckpointError: ``resume``, and the run there has another model or method.
        """
        if not self.path.exists():
            return
        if not self.path.is_dir():
            raise RunError(f"{self.path} is a file, but a run needs a directory. Choose another --out.")
        if not self.config.exists():
            others = sorted(entry.name for entry in self.path.iterdir() if not entry.name.startswith("."))
            if others:
                shown = ", ".join(others[:3]) + (", ..." if len(others) > 3 else "")
                raise RunError(f"{self.path} holds files that belong to no run ({shown}). Choose another --out.")
            return
        if resume and not self.checkpoint.exists() and not self.summary.exists() and self._trained():
            raise RunError(
                f"{self.path} has no {self.checkpoint.name} any more, and resuming would begin the run anew and write "
                f"over {self.metrics.name}. Put the file back, or choose another --out."
            )
        differences = config.differences(self.read_config())
        listed = "; ".join(f"{name}: {there!r} there, {here!r} asked" for name, (here, there) in differences.items())
        if not resume:
            same = "the same run; add --resume to continue it" if not differences else f"another run ({listed})"
            raise RunError(f"{self.path} already holds {same}. Choose another --out to start anew.")
        if any(name in differences for name in _MODEL_FIELDS):
            raise CheckpointError(
                f"The checkpoint in {self.path} belongs to another model or method ({listed}). "
                "Resume with the settings of that run, or choose another --out."
            )
        if differences:
            raise RunError(
                f"{self.path} holds a run with other settings ({listed}), and a resumed run keeps its settings. "
                "Resume with these, or choose another --out."
            )

    @contextmanager
    def claim(self, config: RunConfig, resume: bool, environment: Mapping[str, Any]) -> Iterator[None]:
        """Make the directory this run's own, and keep other processes out while the context is open.

        Raises:
            RunError: as `check`, or another process is training here.
            CheckpointError: as `check`.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunError(f"{self.path} cannot be made ({error.strerror}). Choose another --out.") from None
        lock = FileLock(self.path / ".lock", timeout=0)
        try:
            with lock:
                self.check(config, resume)
                if not self.config.exists():
                    write_json(self.config, {"config": config.model_dump(mode="json"), "environment": environment})
                yield
        except Timeout:
            raise RunError(
                f"Another process is training in {self.path}. Wait until it has ended, or choose another --out."
            ) from None

    def read_config(self) -> RunConfig:
        """The configuration of the run that is here.

        Raises:
            RunError: there is none, or it cannot be read.
        """
        return RunConfig(**self._read(self.config, "config.json is written when a run begins").get("config", {}))

    def read_summary(self) -> Summary:
        """The summary of the finished run that is here.

        Raises:
            RunError: the run is not finished, or there is none.
        """
        if not self.config.exists():
            raise RunError(f"{self.path} is no directory of a run. Give one that `glcan train --out ...` has written.")
        values = self._read(self.summary, "The run is not finished: continue it with `glcan train --resume --out ...`")
        try:
            return Summary(**values)
        except (ValidationError, GlcanError) as error:
            raise RunError(f"{self.summary} cannot be read by this version of glcan: {error}") from None

    def write_history(self, history: list[dict[str, Any]]) -> None:
        """Make metrics.jsonl hold exactly these records: after a kill it may lack a line, or hold one too many."""
        text = "".join(json.dumps(record) + "\n" for record in history)
        write_atomically(self.metrics, lambda path: path.write_text(text, encoding="utf-8"))

    def append_record(self, record: Mapping[str, Any]) -> None:
        """Add one epoch's line to metrics.jsonl."""
        with self.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def _trained(self) -> bool:
        """Whether an epoch was completed."""
        return self.metrics.exists() and "\n" in self.metrics.read_text(encoding="utf-8")

    def _read(self, path: Path, remedy: str) -> dict[str, Any]:
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise RunError(f"{self.path} has no {path.name}. {remedy}.") from None
        except (OSError, ValueError) as error:
            raise RunError(f"{path} cannot be read ({error}). Restore it, or train again with another --out.") from None
        if not isinstance(values, dict):
            raise RunError(f"{path} does not hold a JSON object. Restore it, or train again with another --out.")
        return values


def check_code(out: Path, config: RunConfig, names: Sequence[str], given: Mapping[str, Any] | None = None) -> None:
    """Refuses a run whose directory names code that would be executed, unless the same was given.

    Args:
        out: the run's directory, which may be somebody else's.
        config: what it says.
        names: of "model" and "method", what would be used.
        given: what the user gave.

    Raises:
        RunError: it names a model or a rule as package.module:NAME.
    """
    for name in names:
        value = getattr(config, name)
        code = config.parsed.base if name == "method" else value
        if ":" in code and (given or {}).get(name) != value:
            raise RunError(
                f"The run in {out} names {name} = {value!r}, code that would be imported, and so executed. If you know "
                "what it does, add --trust (in Python: trust=True)."
            )


def read_metrics(out: Path) -> list[dict[str, Any]]:
    """The records of a run's metrics.jsonl, one per epoch, from the first.

    Raises:
        RunError: the directory holds no run that has finished an epoch.
    """
    path = RunDirectory(out).metrics
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise RunError(f"{path} cannot be read ({error}). Name a run directory that `glcan train` wrote.") from None


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write JSON atomically."""
    text = json.dumps(values, indent=2, allow_nan=False) + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
