"""Updates: one optimizer for each group of parameters, used as soon as the group's gradients are complete."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn
from torch.optim.optimizer import Optimizer

from glcan.errors import ConfigError
from glcan.strategies.base import Group

__all__ = ["OptimizerFactory", "Updates"]

OptimizerFactory = Callable[[list[nn.Parameter]], Optimizer]


class Updates:
    """The optimizers of groups of parameters.

    Args:
        groups: those without parameters have no optimizer.
        factory: ``factory(parameters) -> torch.optim.Optimizer``; none: there are no optimizers.
        clip_norm: bound on the norm of the whole gradient; with K groups each is clipped to ``clip_norm / sqrt(K)``,
            since the others' gradients are gone, or not there yet.
        state: of earlier optimizers, by parameter, which is taken over.

    Attributes:
        optimizers: those that there are, in the order of the groups.

    Raises:
        ConfigError: the factory gives something else, or an optimizer of other parameters.
    """

    def __init__(
        self,
        groups: Sequence[Group],
        factory: OptimizerFactory | None,
        clip_norm: float | None,
        state: Mapping[nn.Parameter, Any],
    ) -> None:
        self._groups, self._clip_norm = groups, clip_norm
        self._by_group: dict[int, Optimizer] = {}
        for i, group in enumerate(groups if factory is not None else ()):
            if group.parameters:
                assert factory is not None
                optimizer = factory(list(group.parameters))
                _check(optimizer, group)
                optimizer.state.update({p: state[p] for p in group.parameters if p in state})
                self._by_group[i] = optimizer
        self.optimizers = list(self._by_group.values())

    def of(self, group: int) -> Optimizer | None:
        """The optimizer of a group, by its index; None if it has no parameters."""
        return self._by_group.get(group)

    def state(self) -> dict[Any, Any]:
        """The optimizers' state, by parameter."""
        return {p: state for optimizer in self.optimizers for p, state in optimizer.state.items()}

    def make(self, group: int, frozen: int) -> None:
        """Updates a group, and frees its gradients; ``frozen`` groups, from the first one on, are not updated."""
        optimizer = self._by_group.get(group)
        if optimizer is None:
            return
        if self._clip_norm is not None:
            learning = sum(index >= frozen for index in self._by_group)
            nn.utils.clip_grad_norm_(self._groups[group].parameters, self._clip_norm / math.sqrt(max(1, learning)))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def _check(optimizer: Any, group: Group) -> None:
    if not isinstance(optimizer, Optimizer):
        raise ConfigError(
            f"optimizer(parameters) gave {type(optimizer).__name__}; it must return a torch.optim.Optimizer, as "
            "functools.partial(torch.optim.SGD, lr=0.1) does."
        )
    held = {id(p) for settings in optimizer.param_groups for p in settings["params"]}
    if held != {id(p) for p in group.parameters}:
        raise ConfigError(
            f"optimizer(parameters) was given the {len(group.parameters)} parameters of {group.name}, but holds "
            f"{len(held)} others or only some of them, so that some would never be trained. Make a new optimizer of "
            "what is given: functools.partial(torch.optim.SGD, lr=0.1)."
        )
