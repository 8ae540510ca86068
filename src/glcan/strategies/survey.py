"""What a dry run tells of a model that is cut: who uses which parameters, and what crosses the cuts."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from glcan.cost.cuts import Plan
from glcan.errors import CutError, GradientLeak
from glcan.inspect.dryrun import dry_run
from glcan.inspect.features import Feature, read_feature
from glcan.inspect.isolation import Boundary, Crossings, Isolation
from glcan.inspect.leaks import leaked_parameters
from glcan.inspect.profile import Profile
from glcan.inspect.tensors import tensors_in
from glcan.strategies.base import Setting

__all__ = ["Survey", "check_trained", "survey", "users_of"]


@dataclasses.dataclass(frozen=True)
class Survey:
    """What crosses the cuts.

    Attributes:
        entering, skipping: by cut, of a block's own tensors those that enter its unit, and those that pass it by.
        crossings: how these are found again, see `Isolation.crossings`.
    """

    entering: Mapping[str, tuple[Feature, ...]]
    skipping: Mapping[str, tuple[Feature, ...]]
    crossings: Crossings


def users_of(model: nn.Module, profile: Profile, cuts: Sequence[str]) -> dict[int, set[int]]:
    """The blocks that use each parameter (by id)."""
    users: dict[int, set[int]] = defaultdict(set)
    block, block_after = 0, {-1: 0}
    for position, index in enumerate(profile.calls):
        unit = profile.units[index].name
        block += block < len(cuts) and unit == cuts[block]
        block_after[position] = block
        for parameter in model.get_submodule(unit).parameters():
            users[id(parameter)].add(block)
    named = dict(model.named_parameters())
    for name, positions in profile.glue.items():
        users[id(named[name])].update(block_after[i] for i in positions)
    return users


def check_trained(plan: Plan, model: nn.Module, users: Mapping[int, set[int]]) -> None:
    """That a local loss can train each block.

    Raises:
        CutError: nothing that a block computes enters its cut.
    """
    for k, cut in enumerate(plan.cuts):
        trainable = any(p.requires_grad and k in users.get(id(p), ()) for p in model.parameters())
        if trainable and not plan.units[k + 1][0].entering:
            raise CutError(
                f"Nothing that block{k + 1} computes enters the cut at {cut!r} (they stand side by side), so no "
                "local loss could train it. Cut elsewhere (cuts=[...])."
            )


def survey(setting: Setting, plan: Plan, users: Mapping[int, set[int]]) -> Survey:
    """A dry run with the cuts: what of a block's own enters the unit at each of them, and what passes it by.

    Raises:
        GradientLeak: a gradient crosses a cut.
    """
    profile, task = setting.profile, setting.task
    names = {id(p): name for name, p in setting.model.named_parameters()}

    def look(model: nn.Module, batch: tuple[Any, ...]) -> Survey:
        entering: dict[str, tuple[Feature, ...]] = {}
        skipping: dict[str, tuple[Feature, ...]] = {}
        twins = dict(model.named_parameters())
        allowed: list[list[nn.Parameter]] = [[] for _ in plan.units]
        for key, blocks in users.items():
            for k in blocks if key in names else ():
                allowed[k].append(twins[names[key]])

        def check(block: int, tensors: Sequence[Tensor]) -> None:
            total = sum((t.float().sum() for t in tensors if t.requires_grad), torch.zeros(()))
            if not setting.leak_check or not total.requires_grad:
                return
            known = {id(p): name for name, p in twins.items()}
            leaked = leaked_parameters(total, allowed[block])
            if found := sorted(known[id(p)] for p in leaked if id(p) in known):
                raise GradientLeak(_leak(block, found, plan.cuts[max(0, block - 1)]))

        def at_cut(boundary: Boundary) -> None:
            for noted, own in ((entering, boundary.entering), (skipping, boundary.skipping)):
                noted[boundary.cut] = tuple(read_feature(tuple(t.shape), profile.batch, profile.image) for t in own)
            check(boundary.block, (*boundary.entering, *boundary.skipping))

        held = {cut: profile.crossing[cut] for cut in plan.cuts}
        isolation = Isolation(model, profile.names, plan.cuts, at_cut, held)
        args, kwargs = task.arguments(batch)
        with torch.enable_grad(), isolation, setting.forward_autocast(batch):
            output = model(*args, **kwargs)
            check(plan.blocks - 1, [isolation.twin(t) for t in tensors_in(output) if t.is_floating_point()])
        return Survey(entering, skipping, isolation.crossings)

    return dry_run(setting.model, setting.batch, look, assume=task.assumes)


def _leak(block: int, names: Sequence[str], cut: str) -> str:
    shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    return (
        f"The loss of block{block + 1} would reach {shown}, which belong to an earlier block: "
        f"a gradient crosses the cut at {cut!r}. A custom autograd.Function between units, or a unit "
        "that reads a tensor from elsewhere than its arguments, hides it from the isolation. Put that "
        "operation into a unit (units=[...]), or cut elsewhere (cuts=[...])."
    )
