"""Whether a saved state fits, before anything is changed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from glcan.errors import CheckpointError

__all__ = ["check_identity", "check_module_state", "check_optimizer_state"]


def check_identity(mine: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    """That a learner's state is one, and of such a learner.

    Raises:
        CheckpointError: parts are missing, or something differs.
    """
    missing = {"identity", "model", "auxiliary", "optimizers", "pass"} - set(state)
    if missing:
        raise CheckpointError(f"This is no learner's state: {', '.join(sorted(missing))} missing.")
    for key, value in mine.items():
        if state["identity"].get(key) != value:
            raise CheckpointError(
                f"The checkpoint was made with {key}={_shortened(state['identity'].get(key))}, but this learner has "
                f"{key}={_shortened(value)}. Build the learner as the checkpoint's was, or start a new run."
            )


def check_module_state(part: str, module: nn.Module, state: Mapping[str, Any]) -> None:
    """That a ``state_dict`` has the names and shapes of a module's tensors.

    Raises:
        CheckpointError: it has others.
    """
    mine = {name: value.shape for name, value in module.state_dict().items() if isinstance(value, Tensor)}
    theirs = {name: value.shape for name, value in state.items() if isinstance(value, Tensor)}
    if mine != theirs:
        odd = sorted(n for n in mine.keys() | theirs.keys() if mine.get(n) != theirs.get(n))
        raise CheckpointError(
            f"The checkpoint's {part} differs from this one in {len(odd)} tensors, for example {odd[0]!r}: "
            f"{_shape(theirs.get(odd[0]))} there, {_shape(mine.get(odd[0]))} here. Use the model that it was made with."
        )


def check_optimizer_state(optimizers: Sequence[Optimizer], states: Sequence[Mapping[str, Any]]) -> None:
    """That there is a state for each optimizer, of the same kind and over as many parameters.

    Raises:
        CheckpointError: there is not.
    """
    if len(states) != len(optimizers):
        raise CheckpointError(
            f"The checkpoint has {len(states)} optimizers, this learner has {len(optimizers)}. "
            "Build the learner with the same optimizer=..."
        )
    for optimizer, saved in zip(optimizers, states, strict=True):
        if _groups(saved) != _groups(optimizer.state_dict()):
            raise CheckpointError(
                "The checkpoint's optimizers are of another kind, or over other parameters, than "
                f"{type(optimizer).__name__} here. Build the learner with the same optimizer=..."
            )


def _groups(state: Mapping[str, Any]) -> list[tuple[set[str], list[int]]]:
    # A scheduler adds keys such as initial_lr to the groups.
    return [({k for k in g if not k.startswith("initial_")}, g["params"]) for g in state["param_groups"]]


def _shape(shape: Iterable[int] | None) -> str:
    return "absent" if shape is None else "x".join(map(str, shape)) or "scalar"


def _shortened(value: Any, width: int = 200) -> str:
    """A value as text of at most so many characters."""
    text = repr(value)
    return text if len(text) <= width else text[: width - 3] + "..."
