"""The training loop: epochs, schedule, checkpoints, exact resumption, and the results of a run."""

from __future__ import annotations

import functools
import itertools
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from glcan.errors import CheckpointError, ConfigError, DataError, GlcanError, NonFiniteLoss, RunError, UnknownName
from glcan.training import checkpoint
from glcan.training.config import DEFAULT_BLOCKS, RunConfig
from glcan.training.detection import check_predictions
from glcan.training.environment import environment, resolve_device
from glcan.training.evaluation import MEASURES, evaluate
from glcan.training.progress import Reporter
from glcan.training.run import Metric, RunDirectory, Summary, write_json
from glcan.training.schedule import frozen_blocks, learning_rate, local_steps, schedule_share, start_steps
from glcan.training.stop import Stop, Stopped

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

    from glcan.data import DetectionData, ImageData, PairData
    from glcan.learner import LocalLearner
    from glcan.tasks import Task


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
        surroundings = environment()
        with run.claim(config, resume, surroundings):
            return _Training(config, run, data, learner, surroundings, progress).run_all()


def load_data(config: RunConfig) -> ImageData | PairData | DetectionData:
    """The data set of a configuration.

    Raises:
        UnknownName, DataError: there is no such data set, or it cannot be used.
    """
    from glcan import data

    common: dict[str, Any] = {
        "root": config.data_root,
        "seed": config.seed,
        "val": config.val,
        "limit": config.limit,
        "skip_corrupt": config.skip_corrupt,
    }
    if config.task == "detection":
        return data.load_detection(config.data, image_size=config.image_size, **common)
    if config.task == "super-resolution":
        return data.load_pairs(config.data, scale=config.scale, patch=config.patch, crops=config.crops, **common)
    return data.load(config.data, image_size=config.image_size, download=config.download, **common)


def create_model(config: RunConfig, classes: int, shape: tuple[int, int | None, int | None]) -> nn.Module:
    """The model of a configuration, with the initial weights of its seed, on the CPU.

    Args:
        config: its ``task``, ``model``, ``model_options``, ``scale`` and ``seed``.
        classes: number of classes, for detection without the background; super-resolution has none and ignores it.
        shape: channels, height and width of an image; None for the model's own size. Of super-resolution the channels
            alone matter.
    """
    from glcan import models

    torch.manual_seed(config.seed)
    if config.task == "super-resolution":
        return models.create(config.model, in_channels=shape[0], scale=config.scale, **config.model_options)
    return models.create(
        config.model,
        num_classes=classes + (config.task == "detection"),  # the background is a class there
        in_channels=shape[0],
        image_size=shape[1],
        **config.model_options,
    )


def to_device(
    batch: Sequence[Any], device: torch.device, layout: torch.memory_format = torch.contiguous_format
) -> tuple[Any, ...]:
    """A batch, nested tensors of any task, on a device, with batches of images in a memory layout."""

    def move(tensor: Tensor) -> Tensor:
        return tensor.to(device, memory_format=layout) if tensor.dim() == 4 else tensor.to(device)

    return tuple(tree_map_only(Tensor, move, list(batch)))


def class_names(data: ImageData | PairData | DetectionData) -> list[str]:
    """Names of the classes; none where the data has no classes."""
    return getattr(data, "classes", [])


def _task(config: RunConfig) -> Task:
    from glcan.tasks import Classification, Detection, SuperResolution

    if config.task == "super-resolution":
        return SuperResolution(config.criterion)
    if config.task == "detection":
        return Detection()
    return Classification(label_smoothing=config.label_smoothing)


def build(config: RunConfig, data: ImageData | PairData | DetectionData) -> LocalLearner:
    """The learner of a configuration: model from ``config.seed``, on ``config.device``, checked against the data.

    Raises:
        DataError: labels are out of range, or the images are not of the shape that the data set says.
        ConfigError: the model refuses such images, or does not give a score per class, an image of the size, or boxes.
    """
    from glcan import rules
    from glcan.learner import LocalLearner

    rule = rules.create(config.rule, config.rule_options)
    blocks = config.blocks
    if rule.local:
        blocks = None if config.cuts is not None or config.memory is not None else blocks or DEFAULT_BLOCKS
    device = resolve_device(config.device)
    if data.size("train") == 0:
        raise DataError(
            f"Data set {data.name!r} has no training images. Lower --val, give more images, or choose another --data."
        )
    if data.size("test") == 0:
        raise DataError(f"Data set {data.name!r} has no test images to end the run with. Add some, or choose another.")
    batch = _first_batch(config, data, device)
    if config.task != "detection":  # whose images may differ in size
        _check_images(batch[0], data)
    layout = torch.channels_last if config.channels_last else torch.contiguous_format
    model = create_model(config, len(class_names(data)), data.shape).to(device).to(memory_format=layout)
    batch = to_device(batch, device, layout)
    autocast = autocast_dtype(config)
    _check_model(config, model, batch, data, autocast)
    try:
        return LocalLearner(
            model,
            _task(config),
            batch,
            blocks=blocks,
            cuts=config.cuts,
            units=config.units,
            rule=rule,
            optimizer=_optimizer(config),
            autocast=autocast,
            clip_norm=config.clip_norm,
            recompute=config.recompute,
            memory=config.memory,
            accumulate=config.accumulate,
            cuda_graph=config.cuda_graph,
        )
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        few, remedy = f"{len(batch[0])} image per batch is", ""
        if config.accumulate > 1:
            few, remedy = f"{len(batch[0])} images in {config.accumulate} parts are", " or lower --accumulate"
        raise ConfigError(
            f"{few} too few for the BatchNorm of {config.model!r} ({error}). Raise --batch{remedy}."
        ) from error


def _first_batch(
    config: RunConfig, data: ImageData | PairData | DetectionData, device: torch.device
) -> tuple[Any, ...]:
    with checkpoint.preserved_rng(device):
        batch: tuple[Any, ...] = next(iter(data.loader("train", config.batch)))
    return batch


def autocast_dtype(config: RunConfig) -> torch.dtype | None:
    """The type of the autocast arithmetic; None for plain fp32."""
    return torch.bfloat16 if config.precision == "bf16" else None


@dataclass
class _Progress:
    """How far a run is; saved with every checkpoint."""

    epoch: int = 0  # epochs that are complete, evaluation included
    batch: int = 0  # batches of the current epoch that are behind
    step: int = 0  # optimizer steps
    images: int = 0  # images of the current epoch that are behind
    loss_sums: dict[str, float] = field(default_factory=dict)  # over these images, for each block
    loss_images: dict[str, int] = field(default_factory=dict)  # how many of them a block has seen
    finishing: bool = False  # whether the finish has begun
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
        learner: LocalLearner,
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
        self.local_steps = local_steps(config, self.steps_per_epoch)
        self.plan, self.auxiliary_parameters = learner.plan, _count(learner.auxiliary)
        self._pending: tuple[int, int, list[str], Tensor, torch.cuda.Event | None] | None = None
        self._started = time.monotonic()

    def run_all(self) -> Summary:
        # What follows draws the same random numbers whatever the rule drew for its auxiliary networks.
        torch.manual_seed(self.config.seed)
        if self.run.checkpoint.exists():
            self._restore()
        self.run.write_history(self.history)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        total = self.config.epochs * self.steps_per_epoch
        with (
            self.stop,
            self._tensorboard() as board,
            Reporter(self.config, total, self.state.step, self.progress) as report,
        ):
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
            if state.step >= self.local_steps and not state.finishing:
                self._begin_finish()
            self._set_rates()
            with self._memory_advice():
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

    def _set_rates(self) -> None:
        """The learning rates and the kind of the step to come, and which blocks have come to the end of theirs."""
        config, learner, step = self.config, self.learner, self.state.step
        blocks = learner.plan.blocks
        learner.end_to_end = step < start_steps(config, self.steps_per_epoch)
        learner.frozen = frozen_blocks(config, step, self.steps_per_epoch, blocks)
        for block, optimizer in learner.optimizer_of.items():
            if block >= learner.frozen:
                share = schedule_share(config, block, blocks)
                rate = learning_rate(config, step / share, self.steps_per_epoch)
                for group in optimizer.param_groups:
                    group["lr"] = rate

    def _begin_finish(self) -> None:
        """From here on, the same model is trained end to end, with checkpointing, without the auxiliary networks."""
        from glcan.learner import LocalLearner

        self._resolve_losses()
        self.state.finishing = True
        blocks, model = self.learner, self.learner.model
        batch = to_device(_first_batch(self.config, self.data, self.device), self.device, self.layout)
        with checkpoint.preserved_rng(self.device):
            self.learner = LocalLearner(
                model,
                _task(self.config),
                batch,
                units=self.config.units,
                rule="checkpoint",
                optimizer=_optimizer(self.config),
                autocast=autocast_dtype(self.config),
                clip_norm=self.config.clip_norm,
                accumulate=self.config.accumulate,
                cuda_graph=self.config.cuda_graph,
            ).train()
        if self.config.finish_lr is None:  # no cycle of its own: momentum goes on as well
            state = {parameter: state for each in blocks.optimizers for parameter, state in each.state.items()}
            for optimizer in self.learner.optimizers:
                for parameter in itertools.chain(*(group["params"] for group in optimizer.param_groups)):
                    optimizer.state[parameter] = state.get(parameter, {})

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
        names = ["finish"] if self.state.finishing else list(losses)
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
        if progress.finishing:
            self._begin_finish()
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
        from safetensors.torch import save_model

        learner, state, last = self.learner, self.state, self.history[-1]
        checkpoint.write_atomically(self.run.weights, lambda path: save_model(learner.model, str(path)))
        self._measure()
        measures = MEASURES[self.config.task]
        metrics = _metrics(measures.units, last, "test")
        summary = Summary(
            metric=next(metric for metric in metrics if metric.name == measures.main),
            metrics=metrics,
            val_metrics=_metrics(measures.units, last, "val"),
            train_loss=last["train_loss"],
            seed=self.config.seed,
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
    def _tensorboard(self) -> Iterator[SummaryWriter]:
        from torch.utils.tensorboard import SummaryWriter

        # What was logged after the checkpoint is hidden, and the last record, which a kill may have cut off, repeated.
        board = SummaryWriter(str(self.run.tensorboard), purge_step=len(self.history) or None)
        try:
            for record in self.history[-1:]:
                _log(board, record)
            yield board
        finally:
            board.close()

    @contextmanager
    def _memory_advice(self) -> Iterator[None]:
        try:
            yield
        except torch.OutOfMemoryError as error:
            raise RunError(
                f"The GPU's memory does not hold a step with batch = {self.config.batch} in "
                f"{self.learner.plan.blocks} blocks ({str(error).splitlines()[0]}). "
                "Raise --blocks, lower --batch, or set --precision bf16; and choose another --out."
            ) from None


def optimizer_factory(
    name: str, *, lr: float = 0.1, momentum: float = 0.9, nesterov: bool = True, weight_decay: float = 1e-4
) -> Callable[[list[nn.Parameter]], torch.optim.Optimizer]:
    """What makes an optimizer for a list of parameters: "sgd", "adamw" or "adam".

    Raises:
        UnknownName: no such optimizer.
    """
    if name == "adamw":
        return functools.partial(torch.optim.AdamW, lr=lr, weight_decay=weight_decay)
    if name == "adam":
        return functools.partial(torch.optim.Adam, lr=lr, weight_decay=weight_decay)
    if name == "sgd":
        return functools.partial(
            torch.optim.SGD, lr=lr, momentum=momentum, nesterov=nesterov, weight_decay=weight_decay
        )
    raise UnknownName("optimizer", name, ["sgd", "adamw", "adam"])


def _optimizer(config: RunConfig) -> Callable[[list[nn.Parameter]], torch.optim.Optimizer]:
    return optimizer_factory(
        config.optimizer,
        lr=config.lr,
        momentum=config.momentum,
        nesterov=config.nesterov,
        weight_decay=config.weight_decay,
    )


def _check_images(images: Tensor, data: ImageData | PairData | DetectionData) -> None:
    if tuple(images.shape[1:]) != tuple(data.shape) or not images.is_floating_point():
        raise DataError(
            f"Images of {data.name!r} come as {images.dtype} of shape {tuple(images.shape[1:])}, but the data set says "
            f"floating point of shape {tuple(data.shape)} (channels, height, width). Correct the data set."
        )


def _check_model(
    config: RunConfig,
    model: nn.Module,
    batch: tuple[Any, ...],
    data: ImageData | PairData | DetectionData,
    autocast: torch.dtype | None,
) -> None:
    """Run the model once on two images, as evaluation will."""
    images = batch[0][:2]
    training = model.training
    model.eval()
    device = images[0].device
    try:
        with (
            checkpoint.preserved_rng(device),
            torch.no_grad(),
            torch.autocast(device.type, dtype=autocast, enabled=autocast is not None),
        ):
            scores = model(tree_map_only(Tensor, Tensor.clone, images))
    except GlcanError:
        raise
    except Exception as error:  # whatever a model does with images that it was not made for
        reason = str(error).strip().splitlines() or [type(error).__name__]
        size = "--patch" if config.task == "super-resolution" else "--image-size"
        raise ConfigError(
            f"Model {config.model!r} refuses images of {data.name!r} with channels, height, width = "
            f"{tuple(images[0].shape)}: {reason[0]}. Set {size} or --model-option, or choose another --model."
        ) from error
    finally:
        model.train(training)
    if config.task == "detection":
        check_predictions(scores, len(images))
        return
    found = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
    if config.task == "super-resolution":
        expected = (len(images), *batch[1].shape[1:])
        if found != expected:
            raise ConfigError(
                f"Model {config.model!r} gives {found} for images {tuple(images.shape)}, but super-resolution with "
                f"scale {config.scale} needs {expected}. Set --scale or --model-option, or choose another --model."
            )
        return
    expected = (len(images), len(class_names(data)))
    if found != expected:
        raise ConfigError(
            f"Model {config.model!r} gives {found} for {expected[0]} images, but classification of {data.name!r} needs "
            f"scores of shape {expected}. Set the number of classes in --model-option, or choose another --model."
        )


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
