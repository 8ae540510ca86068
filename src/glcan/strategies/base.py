"""What a strategy is: the code of a family of methods, which turns a batch into gradients."""

from __future__ import annotations

import contextlib
import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from glcan.cost.cuts import Plan, make_plan
from glcan.cost.estimate import Estimate, Piece
from glcan.errors import ConfigError, CutError
from glcan.inspect.profile import Profile
from glcan.inspect.tensors import tensors_in
from glcan.strategies.method import Family
from glcan.strategies.pieces import measure_pieces
from glcan.tasks.base import Task

__all__ = [
    "Backward",
    "Candidate",
    "Done",
    "Family",
    "Group",
    "Pass",
    "Phase",
    "Setting",
    "Strategy",
    "Wanted",
    "WrappedPass",
    "forget_casts",
    "no_autocast",
]

#: Runs the backward pass of a loss times a share, and times the scale of gradients where there is one.
Backward = Callable[[Tensor, float], None]

#: Called with the index of a group whose gradients are complete.
Done = Callable[[int], None]


@dataclasses.dataclass
class Setting:
    """What a strategy is bound to.

    Attributes:
        model: the user's, or a fake copy of it.
        task: prepared for this model.
        batch: what dry runs are made on: the largest part of a batch that is run at once, or a few images.
        profile: of the model on this batch.
        autocast: of the forward passes; none: as the model is.
        leak_check: whether to look for gradients that cross a cut.
    """

    model: nn.Module
    task: Task
    batch: tuple[Any, ...]
    profile: Profile
    autocast: torch.dtype | None = None
    leak_check: bool = True

    @property
    def pieces(self) -> Mapping[str, Piece]:
        """What the pieces of the model between two places to cut need; kept with the profile, as all strategies ask."""
        kept = vars(self.profile)
        if "pieces" not in kept:
            args, kwargs = self.task.arguments(self.batch)
            with self.task.running(self.model):
                kept["pieces"] = measure_pieces(self.model, args, kwargs, self.profile, assume=self.task.assumes)
        found: Mapping[str, Piece] = kept["pieces"]
        return found

    def arguments(self, batch: tuple[Any, ...]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The model's arguments; copies, where it writes into them."""
        arguments = self.task.arguments(batch)
        return tree_map_only(Tensor, Tensor.clone, arguments) if self.profile.writes_input else arguments

    def forward_autocast(self, batch: Any) -> contextlib.AbstractContextManager[Any]:
        """Entered around forward passes."""
        if self.autocast is None:
            return contextlib.nullcontext()
        device = next((t.device.type for t in tensors_in(batch)), "cpu")
        return torch.autocast(device, self.autocast)


@dataclasses.dataclass(frozen=True)
class Wanted:
    """What a user asks of a plan.

    Attributes:
        cuts: names of the units at which blocks 2 ... K begin, in place of a number of blocks.
        recompute: whether, or of which blocks or units, activations are recomputed.
    """

    cuts: tuple[str, ...] | None = None
    recompute: bool | tuple[str, ...] = False


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A plan that should fit a budget, by estimates.

    Attributes:
        wanted: what gives the plan.
        extra: FLOPs beyond end-to-end training, as a share of these.
        blocks: how many the model has then.
    """

    wanted: Wanted
    extra: float
    blocks: int


@dataclasses.dataclass(frozen=True)
class Phase:
    """How a pass of local learning differs for a while.

    Attributes:
        frozen: so many blocks, from the first one on, only run forward.
        end_to_end: the whole model is trained at once, and the auxiliary networks beside it.
    """

    frozen: int = 0
    end_to_end: bool = False


@dataclasses.dataclass(frozen=True)
class Group:
    """Parameters whose gradients are complete at the same moment."""

    name: str
    parameters: tuple[nn.Parameter, ...]


class Pass(ABC):
    """A strategy bound to a model: runs one batch, and hands out finished gradients, group by group.

    Attributes:
        plan: the cuts, and what is recomputed.
        groups: in the order in which they are complete.
        added: auxiliary networks by the name of their block; empty for all but local learning.
    """

    plan: Plan
    groups: Sequence[Group]
    added: nn.ModuleDict

    def prepare(self) -> None:
        """Called before each batch."""

    @abstractmethod
    def run(self, batch: tuple[Any, ...], backward: Backward, done: Done, share: float = 1.0) -> dict[str, Tensor]:
        """One forward pass and all that belongs to it.

        Args:
            batch: as the task has it, or a part of one.
            backward: ``backward(loss, share)``.
            done: called with the index of each group that is complete.
            share: of the batch's loss that these images have.

        Returns:
            The losses by block, detached scalars, not multiplied.
        """

    @property
    def phase(self) -> Phase:
        """How the next batches are run."""
        return Phase()

    def enter(self, phase: Phase) -> None:
        """Runs the next batches otherwise.

        Raises:
            ConfigError: the strategy has no such phase.
        """
        if phase != Phase():
            raise ConfigError(f"{phase} is for local learning alone, which this method is not.")

    @property
    def draws_twice(self) -> bool:
        """Whether parts of a forward pass are computed twice, and must then draw the same random numbers."""
        return bool(self.plan.recompute)

    def describe(self) -> str:
        """What a step does, in a few words, beyond its blocks and auxiliary networks."""
        return ""

    def state_dict(self) -> dict[str, Any]:
        """What exact resumption needs, beyond the model, the auxiliary networks and the optimizers."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Puts a `state_dict` back."""


class WrappedPass(Pass):
    """A pass around another one, which it leaves everything to but how a batch is run."""

    def __init__(self, inner: Pass) -> None:
        self.inner = inner
        self.plan, self.groups, self.added = inner.plan, inner.groups, inner.added

    def prepare(self) -> None:
        self.inner.prepare()

    @property
    def phase(self) -> Phase:
        return self.inner.phase

    def enter(self, phase: Phase) -> None:
        self.inner.enter(phase)

    @property
    def draws_twice(self) -> bool:
        return self.inner.draws_twice

    def describe(self) -> str:
        return self.inner.describe()

    def state_dict(self) -> dict[str, Any]:
        return self.inner.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.inner.load_state_dict(state)


class Strategy(ABC):
    """How a batch becomes gradients. Immutable; its options are a small dataclass.

    Attributes:
        number: behind the colon of the method: of blocks; none where there is none.
    """

    name: ClassVar[str]
    family: ClassVar[Family]
    summary: ClassVar[str]
    number: int | None = None

    def around(self, task: Task, model: nn.Module) -> contextlib.AbstractContextManager[Any]:
        """Entered around dry runs of the model."""
        return contextlib.nullcontext()

    def prepared(self, model: nn.Module, task: Task, profile: Profile, wanted: Wanted) -> Profile:
        """The profile as this strategy runs the model."""
        return profile

    def plan(self, setting: Setting, wanted: Wanted) -> Plan:
        """The cuts, and what is recomputed. By default one block, of which `recomputed` says the rest.

        Raises:
            CutError, ConfigError: what is wanted is for blocks, which this strategy has not.
        """
        if wanted.recompute:
            raise ConfigError(
                f"recompute={wanted.recompute!r} is for the blocks of local learning, and {self.name!r} has none; "
                "leave it out, or choose 'checkpoint'."
            )
        if wanted.cuts:
            raise CutError(
                f"{self.name!r} trains the whole model at once; leave out cuts, or choose a local method such as "
                "'glcan:4'."
            )
        return make_plan(setting.profile, blocks=1, recompute=["+".join(run) for run in self.recomputed(setting)])

    def recomputed(self, setting: Setting) -> list[list[str]]:
        """The chains of units that are recomputed, where the model is one block."""
        return []

    @abstractmethod
    def bind(self, setting: Setting, plan: Plan) -> Pass:
        """The pass that trains the model as planned.

        Raises:
            GradientLeak, CutError, ConfigError: it cannot be trained so.
        """

    def candidates(self, setting: Setting, bound: float, state: int) -> Iterable[Candidate]:
        """Plans that should keep a budget, the best one first; by default the only one there is.

        Args:
            setting: of a dry run.
            bound: bytes for activations and gradients.
            state: bytes of a weight's optimizer state, about.
        """
        return [Candidate(Wanted(), 0.0, 1)]

    def estimate(self, setting: Setting) -> Estimate:
        """Bytes and FLOPs of every block that the model could be cut into."""
        return Estimate(setting.profile, setting.pieces)


def no_autocast(like: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Backward passes run outside of autocast, as PyTorch advises."""
    device = like.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else contextlib.nullcontext()


def forget_casts(like: Tensor) -> None:
    """Drops the copies that autocast keeps of weights, which were updated since, or were cast without a graph."""
    if torch.is_autocast_enabled(like.device.type):
        torch.clear_autocast_cache()
