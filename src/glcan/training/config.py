"""The configuration of one run: every setting, its unit, its constraint, and the recipes that fill it."""

from __future__ import annotations

import difflib
import itertools
import tomllib
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_core import ErrorDetails

from glcan.errors import ConfigError, UnknownName
from glcan.sizes import parse_bytes
from glcan.strategies import family_of
from glcan.strategies.method import Method, parse_method

#: Fields that say where a run happens, not what it computes. They alone may differ when a run is resumed.
PLACE_FIELDS = frozenset({"data_root", "download", "device", "workers", "cuda_graph"})

#: Defaults of a task that are not those of the fields; the options go with the model, and only with it.
TASK_DEFAULTS: dict[str, dict[str, Any]] = {
    "super-resolution": {
        "model": "edsr_baseline",
        "model_options": {"blocks": 8, "channels": 32},
        "data": "photographs",
        "patch": 24,
        "crops": 64,
        "batch": 16,
        "optimizer": "adam",
        "lr": 1e-3,
        "weight_decay": 0.0,
    },
    "detection": {
        "model": "fcos_small",
        "data": "scenes",
        "epochs": 32,
        "batch": 16,
        "optimizer": "adamw",
        "lr": 2e-3,
        "weight_decay": 1e-2,
        "clip_norm": 5.0,
    },
}

#: Fields that some tasks have no use for, under each task that has one.
TASK_FIELDS: dict[str, tuple[str, ...]] = {
    "classification": ("image_size", "download", "label_smoothing"),
    "super-resolution": ("scale", "patch", "crops", "criterion"),
    "detection": ("image_size",),
}


class RunConfig(BaseModel):
    """Everything that determines a run. Unknown fields and values out of range raise `ConfigError`.

    The same names serve everywhere: as keyword here, as key in a TOML recipe, and as ``--flag`` of the command line.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    model: str = "cifar_resnet20"
    """Model: a glcan name (cifar_resnet32, edsr_baseline, fcos_small), torchvision/NAME, timm/NAME, spandrel/NAME, or
    package.module:factory for your own."""
    model_options: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments for the model's constructor."""
    task: Literal["classification", "super-resolution", "detection"] = "classification"
    """What is learned. Super-resolution and detection have some defaults of their own: `TASK_DEFAULTS`."""

    data: str = "digits"
    """Data set: a name that `glcan data` lists; for images of your own, with --data-root: imagefolder (photofolder for
    super-resolution)."""
    data_root: Path | None = None
    """Folder that holds the data set; default: where `glcan data` finds it."""
    image_size: int | None = Field(default=None, ge=1)
    """Side length of the images that the model gets, in pixels; of detection, the shorter side to which the model
    resizes; default: the data set's (`glcan data`)."""
    scale: int = Field(default=2, ge=2, le=4)
    """Factor of super-resolution: 2, 3 or 4."""
    patch: int = Field(default=48, ge=1)
    """Side of a low-resolution training patch of super-resolution, in pixels."""
    crops: int = Field(default=16, ge=1)
    """Patches of super-resolution that are cut from each training image in an epoch."""
    val: int | float = Field(default=0, ge=0)
    """Validation images split off the training images: a count, or a fraction below 1; 0 for none."""
    limit: int | None = Field(default=None, ge=1)
    """Use at most this many training images; default: all."""
    skip_corrupt: bool = False
    """Leave out image files that cannot be read, where the default is to stop at the first one."""
    download: bool = False
    """Download the data set where torchvision can and it is not found."""

    method: str = "glcan:4"
    """How a batch becomes gradients: glcan:4 (local learning in 4 blocks), selective, checkpoint, e2e, ..., or
    package.module:Class:4 for a rule of your own; with +accumulate:N, +start, +freeze or +finish behind (`glcan
    methods`)."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Options of the method, for example budget of glcan or share of selective."""
    cuts: list[str] | None = None
    """Names of the units at which a new block begins, in the order of execution; default: as the memory is smallest."""
    memory: str | None = None
    """Budget for the peak of a step, such as 8GiB: with method glcan, which is the default then, as many blocks as are
    cheapest within it."""
    recompute: bool = False
    """Activation checkpointing inside all blocks: less memory, about a third more compute."""
    units: list[str] | None = None
    """Names of the modules that are never cut inside; default: found from the model."""

    epochs: int = Field(default=20, ge=1)
    """Passes over the training images."""
    batch: int = Field(default=64, ge=1)
    """Images per optimizer step."""
    optimizer: Literal["sgd", "adamw", "adam"] = "sgd"
    """Optimizer, one for each block."""
    lr: float = Field(default=0.1, gt=0, allow_inf_nan=False)
    """Peak learning rate, reached at the end of the warm-up."""
    momentum: float = Field(default=0.9, ge=0, lt=1)
    """Momentum of SGD; Adam and AdamW have their own betas (0.9, 0.999)."""
    nesterov: bool = True
    """Nesterov's variant of the momentum of SGD."""
    weight_decay: float = Field(default=1e-4, ge=0, allow_inf_nan=False)
    """Weight decay on every parameter, auxiliary ones included."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    """Share of the target's probability that is spread over all classes, in every block's loss."""
    criterion: Literal["l1", "charbonnier"] = "l1"
    """Distance to the true image in super-resolution: mean absolute difference, or Charbonnier (epsilon 0.001)."""
    schedule: Literal["cosine", "onecycle", "halving", "tenths"] = "cosine"
    """Learning rate over the steps: cosine to 0 after a linear warm-up, one cycle (lr/25 to lr to lr/250000), or halved
    or a tenth at each of the milestones."""
    milestones: list[float] | None = None
    """Where schedule halving or tenths lowers the learning rate, as increasing fractions of the run; default: 2/3 for
    halving, 2/3 and 8/9 for tenths."""
    warmup_epochs: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    """Epochs of rising learning rate; default: one, but at most a tenth of the run; 30 % of the run with onecycle; none
    with halving."""
    clip_norm: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Largest norm of the whole gradient, larger ones are scaled down; where blocks are updated one by one, each is
    clipped to its part, clip_norm / sqrt(blocks). Default: no limit."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic: fp32, or bf16 autocast with fp32 weights."""
    channels_last: bool = False
    """Memory layout NHWC for convolutional models, faster on GPUs together with bf16."""
    device: str = "auto"
    """Where to train: auto (the first GPU, else the CPU), cpu, cuda, cuda:1, ..."""
    cuda_graph: bool = False
    """Record the training step as a CUDA graph, so that the GPU does not wait for Python: for small models and
    batches. Not for detection, nor for models that draw random numbers in units that are recomputed."""
    workers: int = Field(default=0, ge=0)
    """Processes that load images; 0 loads them in the training process."""
    seed: int = Field(default=0, ge=0, lt=2**32)
    """Seed of the weights, the order of the images, their augmentation and the validation split."""
    deterministic: bool = False
    """Use deterministic algorithms alone, so that a run on a GPU repeats bit for bit too (slower)."""

    @model_validator(mode="wrap")
    @classmethod
    def _as_config_error(cls, values: Any, handler: Any) -> RunConfig:
        try:
            return handler(_with_task_defaults(values))
        except ValidationError as error:
            lines = [_line(cls, details) for details in error.errors()]
            raise ConfigError("\n".join(lines)) from None

    @field_validator("val")
    @classmethod
    def _fraction_below_one(cls, value: int | float) -> int | float:
        if isinstance(value, float) and value.is_integer():
            return int(value)
        if value > 1 and isinstance(value, float):
            raise ValueError("a fraction must be below 1; give a whole number for a count of images")
        return value

    @field_validator("device")
    @classmethod
    def _known_device(cls, value: str) -> str:
        if value != "auto":
            try:
                torch.device(value)
            except RuntimeError:
                raise ValueError("must be auto, cpu, cuda, cuda:N or another device that torch knows") from None
        return value

    @field_validator("milestones")
    @classmethod
    def _increasing_fractions(cls, value: list[float] | None) -> list[float] | None:
        if value is not None and not all(low < high for low, high in itertools.pairwise([0.0, *value, 1.0])):
            raise ValueError("must be fractions between 0 and 1, each larger than the one before")
        return value

    @model_validator(mode="after")
    def _fits_together(self) -> RunConfig:
        for name in (name for names in TASK_FIELDS.values() for name in names):
            tasks = [task for task, names in TASK_FIELDS.items() if name in names]
            value = getattr(self, name)
            if self.task not in tasks and value != type(self).model_fields[name].default:
                raise ConfigError(
                    f"{name} = {value!r} is for {' and '.join(tasks)}, not for {self.task}; leave {flag(name)} out."
                )
        if self.milestones is not None and self.schedule not in ("halving", "tenths"):
            raise ConfigError(
                f"milestones = {self.milestones} need schedule = 'halving' or 'tenths', not {self.schedule!r}; set "
                "--schedule to one of them or leave --milestones out."
            )
        if self.cuda_graph and self.task == "detection":
            raise ConfigError(
                "cuda_graph = true is not for detection, whose losses read values from the GPU to choose boxes; leave "
                "--cuda-graph out."
            )
        method = self.parsed
        if method.accumulate > self.batch:
            raise ConfigError(
                f"method = '{method}' divides a batch in {method.accumulate} parts, more than the images of batch = "
                f"{self.batch}; lower the one or raise --batch."
            )
        if self.memory is not None:
            parse_bytes(self.memory)
            others = [n for n in ("cuts", "recompute") if getattr(self, n) not in (None, False)]
            if others:
                raise ConfigError(f"memory = {self.memory!r} decides {others[0]} by itself; give one of the two.")
            if method.start or method.finish:
                raise ConfigError(
                    f"method = '{method}' has steps that train the whole model, and memory = {self.memory!r} plans for "
                    "the blocks alone; leave one of the two out."
                )
        local = family_of(method.base) == "local"
        if self.cuts is not None and method.number not in (None, len(self.cuts) + 1):
            raise ConfigError(
                f"method = '{method}' contradicts {len(self.cuts)} cuts, which make {len(self.cuts) + 1} blocks; "
                f"write {method.base}:{len(self.cuts) + 1}."
            )
        if local and method.number is None and self.cuts is None and self.memory is None:
            raise ConfigError(f"method = '{method}' has no number of blocks; write {method.base}:4, or set --memory.")
        if not local and (self.cuts is not None or self.recompute):
            raise ConfigError(
                f"cuts and recompute are for the blocks of local learning, and method = '{method}' has none; leave "
                "them out, or choose a local method such as glcan:4."
            )
        if self.optimizer == "sgd" and self.nesterov and self.momentum == 0:
            raise ConfigError("nesterov = true needs momentum above 0; set --momentum 0.9 or --no-nesterov.")
        if self.warmup_epochs is not None and self.warmup_epochs >= self.epochs:
            raise ConfigError(
                f"warmup_epochs = {self.warmup_epochs:g} must be less than epochs = {self.epochs}; "
                "lower --warmup-epochs or raise --epochs."
            )
        return self

    @property
    def parsed(self) -> Method:
        """The method."""
        return parse_method(self.method)

    @property
    def warmup(self) -> float:
        """Epochs of warm-up, the default filled in."""
        if self.warmup_epochs is not None:
            return self.warmup_epochs
        if self.schedule == "halving":
            return 0.0
        return 0.3 * self.epochs if self.schedule == "onecycle" else min(1.0, self.epochs / 10)

    def differences(self, other: RunConfig) -> dict[str, tuple[Any, Any]]:
        """Fields, those of place excepted, in which two configurations differ: {name: (own, other's)}."""
        return {
            name: (getattr(self, name), getattr(other, name))
            for name in type(self).model_fields
            if name not in PLACE_FIELDS and getattr(self, name) != getattr(other, name)
        }


def flag(name: str) -> str:
    """The command line's name of a field: ``--weight-decay`` of weight_decay, ``--option`` of options."""
    if name == "task":
        return "TASK"
    return "--" + name.removesuffix("s" if name.endswith("options") else "").replace("_", "-")


def _with_task_defaults(values: Any) -> Any:
    """What was given over the task's own defaults; cuts and a budget decide the number of blocks, not the default."""
    if not isinstance(values, dict):
        return values
    defaults = TASK_DEFAULTS.get(str(values.get("task")), {})
    if any(values.get(name) is not None for name in ("cuts", "memory")):
        defaults = defaults | {"method": "glcan"}
    if "model" in values:
        defaults = {name: value for name, value in defaults.items() if name != "model_options"}
    return defaults | values


def _line(cls: type[RunConfig], details: ErrorDetails) -> str:
    """One line on one wrong field: value, constraint, remedy."""
    name = str(details["loc"][0]) if details["loc"] else ""
    if details["type"] == "extra_forbidden":
        near = difflib.get_close_matches(name, cls.model_fields, n=3, cutoff=0.5)
        remedy = f"did you mean {', '.join(near)}?" if near else f"the settings are: {', '.join(cls.model_fields)}."
        return f"{name} = {details['input']!r}: there is no such setting; {remedy}"
    constraint = details["msg"].removeprefix("Value error, ").removeprefix("Input ")
    field = cls.model_fields[name]
    default = field.get_default(call_default_factory=True)
    return f"{name} = {details['input']!r}: {constraint}; set {flag(name)} or leave it out (default {default!r})."


def recipe_folder() -> Path:
    """Where the recipes lie: in the installed package, or at the top of the source tree."""
    installed = Path(str(resources.files("glcan"))) / "recipes"
    return installed if installed.is_dir() else Path(__file__).resolve().parents[3] / "recipes"


def recipe_names() -> list[str]:
    """Names of the recipes that come with glcan."""
    return sorted(path.stem for path in recipe_folder().glob("*.toml"))


def read_recipe(name_or_path: str | Path) -> dict[str, Any]:
    """The settings in a recipe, unchecked: a name from `recipe_names()`, or the path of a TOML file.

    Raises:
        UnknownName: no recipe of this name, and no file.
        ConfigError: the file is no TOML.
    """
    path = Path(name_or_path)
    if path.suffix != ".toml" and len(path.parts) == 1:
        path = recipe_folder() / f"{name_or_path}.toml"
    if not path.is_file():
        raise UnknownName("recipe", str(name_or_path), recipe_names(), "A recipe of your own is given as PATH.toml.")
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"Recipe {path} is not valid TOML: {error}. Correct the file.") from None


def load_recipe(name_or_path: str | Path, **overrides: Any) -> RunConfig:
    """A recipe as configuration; ``overrides`` replace single fields.

    Raises:
        UnknownName: no recipe of this name, and no file.
        ConfigError: no valid TOML, or settings that cannot work.
    """
    try:
        return RunConfig(**(read_recipe(name_or_path) | overrides))
    except ConfigError as error:
        raise ConfigError(f"Recipe {name_or_path}:\n{error}") from None
