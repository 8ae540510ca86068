"""The training loop: epochs, schedule, checkpoints, exact resumption, and the results of a run."""

from __future__ import annotations

import itertools
import math
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from glcan.errors import CheckpointError, DataError, NonFiniteLoss, RunError
from glcan.training import checkpoint
from glcan.training.building import autocast_dtype, build, class_names, load_data, to_device
from glcan.training.config import RunConfig
from glcan.training.evaluation import MEASURES, evaluate
from glcan.training.machine import environment
from glcan.training.phases import RunPhase, phases_of, schedule_share
from glcan.training.progress import Reporter
from glcan.training.run import Metric, RunDirectory, Summary, write_json
from glcan.training.schedule import learning_rate
from glcan.training.stop import Stop, Stopped
from glcan.training.weights import check_weights, save_weights

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

    from glcan.data import DetectionData, ImageData, PairData
    from glcan.learner import Learner


def train(config: RunConfig, out: Path, *, resume: bool = False, progress: bool = True) -> Summary:
    """Train a model and leave its weights, metrics and summary in a run directory.

    SIGINT and SIGTERM write a checkpoint after the batch in hand, then raise KeyboardInterrupt or SystemExit(143).

    Args:
        config: the whole run.
        out: the run directory; must be new or empty, or, with ``resume``, hold this run.
        resume: continue the run in ``out``, so that it ends as if never interrupted; begin it where there is none;
            return the summary of one that is complete.
        progress: whether to report progress on standard error.

    Raises:
        RunError: ``out`` holds another run or other files, or another process is training in it.
        CheckpointError: the checkpoint is damaged, or belongs to another model or rule.
        NonFiniteLoss: a block's loss, or a weight, became NaN or infinite; the last good checkpoint stays.
        DataError, ConfigError: the data or the settings cannot work; raised before anything is written.
    """
    run = RunDirectory(out)
    run.check(config, resume)
    if resume and run.summary.exists():
        return run.read_summary()
    with _arithmetic(config):
        data = load_data(config)
        learner = build(config, data)
        check_weights(learner.model)
        surroundings = environment()
        with run.claim(config, resume, surroundings):
            return _Training(config, run, data, learner, surroundings, progress).run_all()


@dataclass
class _Progress:
    """How far a run is; saved with every checkpoint."""

    epoch: int = 0  # epochs that are complete, evaluation included
    batch: int = 0  # batches of the current epoch that are behind
    step: int = 0  # optimizer steps
    images: int = 0  # images of the current epoch that are behind
    loss_sums: dict[str, float] = field(default_factory=dict)  # over these images, for each block
    loss_images: dict[str, int] = field(default_factory=dict)  # how many of them a block has seen
    epoch_seconds: float = 0.0  # training time of the current epoch
    train_seconds: float = 0.0
    wall_seconds: float = 0.0
    peak_bytes: int = 0


class _Training:
    """One run in a directory that it has claimed."""

    def __init__(
        self,
        config: RunConfig,
        run: RunDirectory,
        data: ImageData | PairData | DetectionData,
        learner: Learner,
        surroundings: dict[str, Any],
        progress: bool,
    ) -> None:
        self.config, self.run, self.data, self.learner = config, run, data, learner
        self.surroundings, self.progress = surroundings, progress
        self.device = next(learner.model.parameters()).device
        self.layout = torch.channels_last if config.channels_last else torch.contiguous_format
        self.steps_per_epoch = len(data.loader("train", config.batch))
        self.state = _Progress()
        self.history: list[dict[str, Any]] = []
        self.stop = Stop()
        self.plan, self.auxiliary_parameters = learner.plan, _count(learner.auxiliary)
        # with the number of blocks that the plan has, where cuts or a budget decided it
        self.method = replace(config.parsed, number=learner.method.number)
        self.phases = phases_of(self.method, config.epochs * self.steps_per_epoch, learner.plan.blocks)
        self.phase: RunPhase | None = None
        self._pending: tuple[int, int, list[str], Tensor, torch.cuda.Event | None] | None = None
        self._started = time.monotonic()

    def run_all(self) -> Summary:
        # What follows draws the same random numbers whatever the method drew for its auxiliary networks.
        checkpoint.seed_all(self.config.seed)
        if self.run.checkpoint.exists():
            self._restore()
        self.run.write_history(self.history)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        total = self.config.epochs * self.steps_per_epoch
        with (
            self.stop,
            _tensorboard(self.run, self.history) as board,
            Reporter(self.config, total, self.state.step, self.progress) as report,
        ):
            report.say(repr(self.learner).partition("\n")[0])
            try:
                while self.state.epoch < self.config.epochs:
                    self._train_epoch(report)
                    record = self._evaluate_epoch()
                    self.history.append(record)
                    self.state = replace(
                        self.state,
                        epoch=self.state.epoch + 1,
                        batch=0,
                        images=0,
                        loss_sums={},
                        loss_images={},
                        train_seconds=self.state.train_seconds + self.state.epoch_seconds,
                        epoch_seconds=0.0,
                    )
                    self._save()
                    self.run.append_record(record)
                    _log(board, record)
                    report.epoch(record)
                    self.stop.check()
            except Stopped:
                self._save()
                raise self.stop.exception() from None
            return self._finish()

    def _train_epoch(self, report: Reporter) -> None:
        """Train from where the epoch stands to its end."""
        state = self.state
        if state.batch >= self.steps_per_epoch:  # stopped while it was evaluated
            return
        self.learner.train()
        batches = self._batches()
        while True:
            began = time.monotonic()
            batch = next(batches, None)
            if batch is None:
                break
            batch = to_device(batch, self.device, self.layout)
            self._enter(state.step)
            self._set_rates()
            with _memory_advice(self.config):
                losses = self.learner.step(*batch)
            images = len(batch[0])
            state.step += 1
            state.batch += 1
            state.images += images
            self._note_losses(losses, images)
            state.epoch_seconds += time.monotonic() - began
            report.step(state.epoch + 1)
            self.stop.check()
        if state.batch < self.steps_per_epoch:
            raise DataError(
                f"Data set {self.data.name!r} gave {state.batch} batches where it promised {self.steps_per_epoch}. "
                "Check that its files have not changed since the run began."
            )
        began = time.monotonic()
        self._resolve_losses()
        state.epoch_seconds += time.monotonic() - began

    def _enter(self, step: int) -> None:
        """Makes the learner ready for the phase of a step."""
        phase = next(phase for phase in self.phases if step < phase.end)
        if phase is self.phase:
            return
        self._resolve_losses()
        self.phase = phase
        with checkpoint.preserved_rng(self.device):
            same = phase.method.core == self.learner.method.core
            self.learner.switch(None if same else phase.method, frozen=phase.frozen, end_to_end=phase.end_to_end)
            self.learner.train()

    def _set_rates(self) -> None:
        """The learning rates of the step to come."""
        config, learner, step = self.config, self.learner, self.state.step
        assert self.phase is not None
        for group in range(self.phase.frozen, len(learner.groups)):
            optimizer = learner.optimizer_of(group)
            share = 1.0 if self.phase.finish else schedule_share(config.parsed, group, self.plan.blocks)
            rate = learning_rate(config, step / share, self.steps_per_epoch)
            for settings in optimizer.param_groups if optimizer is not None else ():
                settings["lr"] = rate

    def _batches(self) -> Iterator[tuple[Any, ...]]:
        """The batches of the current epoch that are still to come."""
        loader = self.data.loader(
            "train",
            self.config.batch,
            epoch=self.state.epoch,
            start=self.state.batch,
            workers=self.config.workers,
            device=self.device,
        )
        # Starting a loader draws a seed for its workers: a run that starts one more because it was resumed would
        # otherwise go on with other random numbers.
        with checkpoint.preserved_rng(self.device):
            batches: Iterator[tuple[Any, ...]] = iter(loader)
            first = list(itertools.islice(batches, 1))
        return itertools.chain(first, batches)

    def _note_losses(self, losses: dict[str, Tensor], images: int) -> None:
        """Check and add up one step's losses; on a GPU those of the step before, so that nothing waits for a copy."""
        self._resolve_losses()
        values = torch.stack([loss.detach().double() for loss in losses.values()])
        event = None
        if values.is_cuda:
            values = values.to("cpu", non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        names = ["finish"] if self.phase is not None and self.phase.finish else list(losses)
        self._pending = (self.state.step, images, names, values, event)
        if event is None:
            self._resolve_losses()

    def _resolve_losses(self) -> None:
        if self._pending is None:
            return
        step, images, names, values, event = self._pending
        self._pending = None
        if event is not None:
            event.synchronize()
        for name, value in zip(names, values.tolist(), strict=True):
            if not math.isfinite(value):
                raise self._not_finite(f"The loss of {name} became {value} at step {step}")
            self.state.loss_sums[name] = self.state.loss_sums.get(name, 0.0) + value * images
            self.state.loss_images[name] = self.state.loss_images.get(name, 0) + images

    def _not_finite(self, what: str) -> NonFiniteLoss:
        config = self.config
        kept = f"The checkpoint of the last complete epoch stays in {self.run.path}." if self.history else ""
        clip = "" if config.clip_norm else " set --clip-norm 1,"
        return NonFiniteLoss(
            f"{what} (epoch {self.state.epoch + 1}, lr {config.lr:g}). {kept} "
            f"Start again with another --out:{clip} lower --lr, or raise --warmup-epochs (now {config.warmup:g})."
        )

    def _evaluate_epoch(self) -> dict[str, Any]:
        """The record of the epoch whose training is complete; the test data is used after the last one alone."""
        config, state = self.config, self.state
        record: dict[str, Any] = {
            "epoch": state.epoch + 1,
            "step": state.step,
            "lr": learning_rate(config, state.step - 1, self.steps_per_epoch),
            "train_loss": {name: total / state.loss_images[name] for name, total in state.loss_sums.items()},
            "train_seconds": state.epoch_seconds,
            "images_per_second": state.images / max(state.epoch_seconds, 1e-9),
        }
        splits = ["val"] if self.data.size("val") else []
        if state.epoch + 1 == config.epochs:
            splits.append("test")
        for split in splits:
            metrics = evaluate(
                self.learner.model,
                self.data,
                split,
                batch=config.batch,
                autocast=autocast_dtype(config),
                channels_last=config.channels_last,
                workers=config.workers,
                each_batch=self.stop.check,
            )
            for name, value in metrics.items():
                if not math.isfinite(value):
                    raise self._not_finite(f"The {split} {name} became {value} after step {state.step}")
                record[f"{split}_{name}"] = value
        return record

    def _save(self) -> None:
        """Write the checkpoint, unless a weight is NaN or infinite."""
        self._resolve_losses()
        for name, tensor in itertools.chain(
            self.learner.model.named_parameters(), self.learner.auxiliary.named_parameters(prefix="auxiliary")
        ):
            if not torch.isfinite(tensor).all():
                raise self._not_finite(f"Parameter {name} became NaN or infinite by step {self.state.step}")
        self._measure()
        checkpoint.save(
            self.run.checkpoint,
            {
                "config": self.config.model_dump(mode="json"),
                "learner": self.learner.state_dict(),
                "rng": checkpoint.rng_state(self.device),
                "progress": asdict(self.state),
                "history": self.history,
            },
        )

    def _restore(self) -> None:
        state = checkpoint.load(self.run.checkpoint)
        if RunConfig(**state["config"]).differences(self.config):
            raise CheckpointError(
                f"{self.run.checkpoint} belongs to a run with other settings than config.json beside it. "
                "Put back the checkpoint of this run, or choose another --out."
            )
        progress = _Progress(**state["progress"])
        expected = progress.epoch * self.steps_per_epoch + progress.batch
        if progress.step != expected:
            raise DataError(
                f"The checkpoint is at step {progress.step}, which with {self.steps_per_epoch} batches per epoch would "
                f"be step {expected}: data set {self.data.name!r} has another size now. Give it the files it had."
            )
        self._enter(max(0, progress.step - 1))  # as it was when the checkpoint was written
        self.learner.load_state_dict(state["learner"])
        self.state, self.history = progress, state["history"]
        checkpoint.set_rng_state(state["rng"], self.device)

    def _measure(self) -> None:
        now = time.monotonic()
        self.state.wall_seconds += now - self._started
        self._started = now
        if self.device.type == "cuda":
            self.state.peak_bytes = max(self.state.peak_bytes, torch.cuda.max_memory_allocated(self.device))

    def _finish(self) -> Summary:
        """Write weights and summary of the trained model."""
        learner, state, last = self.learner, self.state, self.history[-1]
        checkpoint.write_atomically(self.run.weights, lambda path: save_weights(learner.model, path))
        self._measure()
        measures = MEASURES[self.config.task]
        metrics = _metrics(measures.units, last, "test")
        summary = Summary(
            metric=next(metric for metric in metrics if metric.name == measures.main),
            metrics=metrics,
            val_metrics=_metrics(measures.units, last, "val"),
            train_loss=last["train_loss"],
            seed=self.config.seed,
            method=str(self.method),
            epochs=self.config.epochs,
            steps=state.step,
            blocks=self.plan.blocks,
            cuts=list(self.plan.cuts),
            parameters=_count(learner.model),
            auxiliary_parameters=self.auxiliary_parameters,
            classes=class_names(self.data),
            preprocessing=self.data.preprocessing(),
            train_seconds=state.train_seconds,
            wall_seconds=state.wall_seconds,
            peak_bytes=state.peak_bytes or None,
            device=str(self.device),
            config=self.config,
            environment=self.surroundings,
        )
        write_json(self.run.summary, summary.model_dump(mode="json"))
        return summary


@contextmanager
def _tensorboard(run: RunDirectory, history: list[dict[str, Any]]) -> Iterator[SummaryWriter]:
    from torch.utils.tensorboard import SummaryWriter

    # What was logged after the checkpoint is hidden, and the last record, which a kill may have cut off, repeated.
    board = SummaryWriter(str(run.tensorboard), purge_step=len(history) or None)
    try:
        for record in history[-1:]:
            _log(board, record)
        yield board
    finally:
        board.close()


@contextmanager
def _memory_advice(config: RunConfig) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise RunError(
            f"The GPU's memory does not hold a step with batch = {config.batch} and method = {config.method} "
            f"({str(error).splitlines()[0]}). Ask `glcan plan --memory` for a method that fits, lower --batch, or set "
            "--precision bf16; and choose another --out."
        ) from None


def _metrics(units: Mapping[str, str], record: dict[str, Any], split: str) -> list[Metric]:
    return [
        Metric(name=name, value=record[f"{split}_{name}"], unit=unit)
        for name, unit in units.items()
        if f"{split}_{name}" in record
    ]


def _log(board: SummaryWriter, record: dict[str, Any]) -> None:
    for name, value in record.items():
        if isinstance(value, dict):
            for block, loss in value.items():
                board.add_scalar(f"{name}/{block}", loss, record["epoch"])
        elif name not in ("epoch", "step"):
            board.add_scalar(name, value, record["epoch"])
    board.flush()


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@contextmanager
def _arithmetic(config: RunConfig) -> Iterator[None]:
    """Deterministic algorithms, where asked for, and as before afterwards."""
    if not config.deterministic:
        yield
        return
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when CUDA is first used
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.backends.cudnn.benchmark = before[1]
