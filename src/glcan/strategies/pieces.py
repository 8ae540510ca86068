"""What pieces of a model and auxiliary networks need, measured in dry runs: what `glcan.cost.estimate` stands on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from glcan.auxiliary.base import AuxiliaryRule, Site
from glcan.cost.cuts import cut_places
from glcan.cost.estimate import AuxiliaryCost, Piece
from glcan.errors import GlcanError
from glcan.inspect.dryrun import dry_run, uninitialized
from glcan.inspect.isolation import Boundary, Isolation
from glcan.inspect.meter import LiveMemory
from glcan.inspect.profile import Profile, Unit
from glcan.inspect.tensors import tensors_in
from glcan.strategies.recompute import Recomputation
from glcan.tasks.base import Task

__all__ = ["auxiliary_costs", "flops_of", "measure_pieces"]


def measure_pieces(
    model: nn.Module, args: Any, kwargs: Any, profile: Profile, *, assume: bool = False
) -> dict[str, Piece]:
    """Every piece, by the name of its first unit, from a dry run in which the model is cut at every place.

    Empty where the model does not allow that. ``assume``: see `glcan.inspect.dryrun.dry_run`.
    """
    places = cut_places(profile)
    cuts = [profile.units[index].name for index in places[1:-1]]
    starts = ["", *cuts]

    def run(model: nn.Module, batch: tuple[Any, Any]) -> dict[str, tuple[int, int]]:
        parameters = list(model.parameters())  # walks all modules, and is needed at every cut
        meter = LiveMemory(model, inputs=batch)
        found: dict[str, tuple[int, int]] = {}
        before = 0

        def train(unit: str, tensors: tuple[Tensor, ...]) -> None:
            nonlocal before
            norms = [torch.linalg.vector_norm(t.float()) for t in tensors if t.requires_grad]
            if norms:
                torch.stack(norms).sum().backward()
            for parameter in parameters:
                parameter.grad = None
            found[unit], before = (meter.lap()[1], meter.flops - before), meter.flops

        parts = Recomputation(model, [profile.parted], profile.batch)
        isolation = Isolation(
            model,
            profile.names,
            cuts,
            lambda boundary: train(starts[boundary.block], (*boundary.entering, *boundary.skipping)),
            {cut: profile.crossing[cut] for cut in cuts},
        )
        with torch.enable_grad(), meter, parts.applied(), isolation:
            output = model(*batch[0], **batch[1])
            with isolation.replay():
                train(starts[isolation.block], tuple(isolation.twin(t) for t in tensors_in(output)))
        return found

    if not cuts:
        return {}
    try:
        measured = dry_run(model, (args, kwargs), run, assume=assume)
    except (GlcanError, RuntimeError):
        return {}
    pieces: dict[str, Piece] = {}
    for start, end, unit in zip(places[:-1], places[1:], starts, strict=True):
        peak, flops = measured.get(unit, (0, 0))
        saved = profile.saved_bytes(start, end)
        entering = sum(f.bytes for f in profile.units[start].entering) if start else 0
        whole = 3 * sum(u.flops for u in profile.units[start:end])
        pieces[profile.units[start].name] = Piece(
            max(0, peak - saved - entering), max(0, whole - flops) if start and flops else 0
        )
    return pieces


def auxiliary_costs(
    rule: AuxiliaryRule,
    model: nn.Module,
    profile: Profile,
    task: Task,
    batch: tuple[Any, ...],
    blocks: int,
    known: dict[Any, AuxiliaryCost] | None = None,
) -> dict[str, AuxiliaryCost]:
    """What the rule's auxiliary network needs at every place where a model may be cut into so many blocks.

    Networks of the same structure are metered once; ``known`` remembers them from one number of blocks to the next.
    """
    known = {} if known is None else known

    def run(model: nn.Module, batch: tuple[Any, ...]) -> dict[str, AuxiliaryCost]:
        first = next(t for t in tensors_in(batch))
        costs: dict[str, AuxiliaryCost] = {}
        for index in cut_places(profile)[1:-1]:
            cut = profile.units[index]
            with first.device, uninitialized():
                network = rule.build(Site(model, profile, task, cut, blocks)).train(model.training)
            costs[cut.name] = _cost(network, rule, task, cut, batch, first, known)
        return costs

    return dry_run(model, batch, run, assume=task.assumes)


def flops_of(
    rule: AuxiliaryRule,
    model: nn.Module,
    profile: Profile,
    task: Task,
    batch: tuple[Any, ...],
    cuts: Sequence[Unit],
    known: dict[Any, AuxiliaryCost],
) -> int:
    """Forward and backward FLOPs of the rule's auxiliary networks at these cuts, for the batch.

    ``known``: as `auxiliary_costs` has it.
    """

    def run(model: nn.Module, batch: tuple[Any, ...]) -> int:
        first = next(t for t in tensors_in(batch))
        total = 0
        for index, cut in enumerate(cuts):
            with first.device, uninitialized():
                site = Site(model, profile, task, cut, len(cuts) + 1, index)
                network = rule.build(site).train()
            total += _cost(network, rule, task, cut, batch, first, known).flops
        return total

    return dry_run(model, batch, run, assume=task.assumes)


def _cost(
    network: nn.Module,
    rule: AuxiliaryRule,
    task: Task,
    cut: Unit,
    batch: tuple[Any, ...],
    like: Tensor,
    known: dict[Any, AuxiliaryCost],
) -> AuxiliaryCost:
    """As `_meter`, once for each structure."""
    key = (str(network), tuple(p.shape for p in network.parameters()), cut.entering)
    if key not in known:
        known[key] = _meter(network, rule, task, cut, batch, like)
    return known[key]


def _meter(
    network: nn.Module, rule: AuxiliaryRule, task: Task, cut: Unit, batch: tuple[Any, ...], like: Tensor
) -> AuxiliaryCost:
    entering = tuple(torch.empty(f.shape, device=like.device, requires_grad=True) for f in cut.entering)
    meter = LiveMemory(auxiliary=network, inputs=(batch, entering))
    with torch.enable_grad(), meter:
        rule.local_loss(task, network(Boundary(0, cut.name, entering), batch), batch).backward()
    elements = sum(p.numel() for p in network.parameters())
    return AuxiliaryCost(meter.activation_peak_bytes, meter.flops, elements)
