"""Back-propagation on some images of each batch, chosen by their gradient: near-exact, sampled.

A step in three moves:

1. all images run forward, without a graph, to the predictions; the loss gives each prediction's gradient;
2. half of the images are chosen, with probabilities in proportion to the size of that gradient (`choosing`);
3. these run once more, as they ran in the batch (`second_pass`), with activations recomputed, and their predictions'
   gradients, divided by the probabilities, run back through the model.

So the gradient is right in the mean over the choices, normalisation sees the whole batch, memory is that of
checkpointing half of the batch, and the FLOPs are those of end-to-end training: one forward pass, and half of two
forward passes and a backward pass. No local learning, no auxiliary networks: docs/methods/selective.md.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from glcan.auxiliary.base import read_config
from glcan.cost.cuts import Plan
from glcan.cost.estimate import Estimate
from glcan.errors import ConfigError
from glcan.strategies.backprop import whole_model
from glcan.strategies.base import Backward, Done, Family, Pass, Setting, Strategy, forget_casts, no_autocast
from glcan.strategies.choosing import choose, fraction, sizes_of
from glcan.strategies.recompute import Recomputation
from glcan.strategies.second_pass import SecondPass, recording

__all__ = ["Selective", "SelectivePass"]

# How far the predictions of a second pass may be from those of the first, relative to their size: rounding alone.
_CLOSE = {torch.float64: 1e-6, torch.float32: 2e-3}
_CLOSE_LOW_PRECISION = 0.1


class Selective(Strategy):
    """Back-propagation on images chosen by their gradient."""

    name: ClassVar[str] = "selective"
    family: ClassVar[Family] = "sampled"
    summary: ClassVar[str] = "back-propagation on half of each batch, chosen by gradient; near-exact"

    @dataclasses.dataclass(frozen=True)
    class Config:
        """Options.

        Attributes:
            share: of the images of a batch that are back-propagated; one image at least. With 1 it is checkpointing.
            by: "gradient", the size of the gradient at the predictions; or "random", where every image is as likely as
                another, as for models whose predictions glcan does not know (two-stage detectors).
        """

        share: float = 0.5
        by: Literal["gradient", "random"] = "gradient"

        def __post_init__(self) -> None:
            if not 0 < self.share <= 1:
                raise ConfigError(f"selective.share is {self.share}; it must lie in (0, 1], 0.5 for half of a batch.")

    def __init__(self, options: Mapping[str, Any] | None = None) -> None:
        self.config: Selective.Config = read_config(self.name, self.Config, options or {})

    def recomputed(self, setting: Setting) -> list[list[str]]:
        """The chains that need the least memory: what half of a batch saves pays for recomputing all of them."""
        return Estimate(setting.profile, setting.pieces, gradients=False).least()[1]

    def bind(self, setting: Setting, plan: Plan) -> Pass:
        by = self.config.by if setting.task.choosable(setting.model) else "random"
        return SelectivePass(setting, plan, self.config.share, by)


class SelectivePass(Pass):
    """Two forward passes, the first one of all images and without a graph; one backward pass of some."""

    def __init__(self, setting: Setting, plan: Plan, share: float, by: str) -> None:
        self._setting, self.plan, self._share, self._by = setting, plan, share, by
        self.groups = [whole_model(setting.model)]
        self.added = nn.ModuleDict()
        self._recomputation = Recomputation(setting.model, plan.recomputed_units)
        self._second = SecondPass(setting.model)
        device = next((p.device for p in setting.model.parameters()), torch.device("cpu"))
        self._count = torch.zeros((), dtype=torch.int64, device=device)  # of choices made
        self._compared = False

    def images(self, batch: int) -> int:
        """How many images of so many are back-propagated."""
        return max(1, math.floor(self._share * batch))

    def describe(self) -> str:
        how = "chosen by gradient" if self._by == "gradient" else "drawn at random"
        return f"{self._share:.0%} of each batch back-propagated, {how}"

    @property
    def draws_twice(self) -> bool:
        return True

    def run(self, batch: tuple[Any, ...], backward: Backward, done: Done, share: float = 1.0) -> dict[str, Tensor]:
        images = len(batch[0])
        if (count := self.images(images)) == images:
            loss = self._all(batch, backward, share)
        elif self._by == "gradient":
            loss = self._by_gradient(batch, count, backward, share)
        else:
            loss = self._at_random(batch, count, backward, share)
        done(0)
        return {self.groups[0].name: loss.detach()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._count.copy_(state["count"])

    def state_dict(self) -> dict[str, Any]:
        return {"count": self._count.clone()}

    def _all(self, batch: tuple[Any, ...], backward: Backward, share: float) -> Tensor:
        setting = self._setting
        args, kwargs = setting.arguments(batch)
        with setting.forward_autocast(batch), self._recomputation.applied():
            loss = setting.task.loss(setting.model(*args, **kwargs), batch)
        backward(loss, share)
        return loss

    def _by_gradient(self, batch: tuple[Any, ...], count: int, backward: Backward, share: float) -> Tensor:
        setting, task, model = self._setting, self._setting.task, self._setting.model
        with task.repeatable(model) as again:
            with torch.no_grad(), self._second.first(len(batch[0])), setting.forward_autocast(batch):
                first = task.predict(model, batch, setting.arguments(batch))
            forget_casts(first.tensors[0])  # of weights, without a graph
            predictions = [tensor.detach().requires_grad_() for tensor in first.tensors]
            with torch.enable_grad(), setting.forward_autocast(batch):
                loss = first.loss(predictions)
            backward(loss, share)
            loss = loss.detach()
            gradients = [tensor.grad for tensor in predictions]
            places, weights = self._choose(sizes_of([g for g in gradients if g is not None]), count)
            given = [None if g is None else _weighted(g[places], weights) for g in gradients]
            expected = [t.detach()[places] for t in predictions] if self._to_compare(predictions) else None
            del first, predictions, gradients
            chosen = task.chosen(batch, places)
            with again(places), self._second.again(places):
                with (
                    self._recomputation.applied(self._second),
                    self._second.forward(),
                    setting.forward_autocast(chosen),
                ):
                    second = task.predict(model, chosen, setting.arguments(chosen)).tensors
                if expected is not None:
                    self._compare(second, expected)
                pairs = [(t, g) for t, g in zip(second, given, strict=True) if g is not None and t.requires_grad]
                del second, given
                with no_autocast(loss):
                    torch.autograd.backward([t for t, _ in pairs], [g for _, g in pairs])
        return loss

    def _at_random(self, batch: tuple[Any, ...], count: int, backward: Backward, share: float) -> Tensor:
        """Every image is as likely as another; the first pass tells what is normalised with."""
        setting, task, model = self._setting, self._setting.task, self._setting.model
        with task.repeatable(model) as again:
            args, kwargs = setting.arguments(batch)
            with torch.no_grad(), self._second.first(len(batch[0])), setting.forward_autocast(batch):
                whole = task.loss(model(*args, **kwargs), batch)
            forget_casts(whole)
            places, _ = self._choose(torch.ones(len(batch[0]), device=self._count.device), count)
            chosen = task.chosen(batch, places)
            args, kwargs = setting.arguments(chosen)
            with again(places), self._second.again(places):
                with (
                    self._recomputation.applied(self._second),
                    self._second.forward(),
                    setting.forward_autocast(chosen),
                ):
                    loss = task.loss(model(*args, **kwargs), chosen)
                backward(loss, share)
        return whole

    def _choose(self, sizes: Tensor, count: int) -> tuple[Tensor, Tensor]:
        self._count.add_(1)
        if self._by == "gradient":
            return choose(sizes, count, fraction(self._count))
        # a shuffle from the count alone, so that a run can be resumed
        order = fraction(self._count * len(sizes) + torch.arange(len(sizes), device=sizes.device))
        places = torch.argsort(order)[:count].sort().values
        return places, sizes.new_full((count,), len(sizes) / count)

    def _to_compare(self, predictions: Sequence[Tensor]) -> bool:
        return not (self._compared or recording() or any(isinstance(t, FakeTensor) for t in predictions))

    def _compare(self, second: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
        """That the chosen images ran as they ran in the batch, once: whatever a layer does that nobody foresaw."""
        for tensor, wanted in zip(second, expected, strict=True):
            distance = float((tensor.detach() - wanted).double().norm() / wanted.double().norm().clamp_min(1e-12))
            autocast = self._setting.autocast is not None or torch.is_autocast_enabled(wanted.device.type)
            if not distance <= (_CLOSE_LOW_PRECISION if autocast else _CLOSE.get(wanted.dtype, _CLOSE_LOW_PRECISION)):
                raise ConfigError(
                    f"The chosen images do not run as they ran in the batch: their predictions are {distance:.1%} "
                    f"off. {type(self._setting.model).__name__} mixes the images of a batch in a way of its own, or "
                    "draws random numbers that cannot be drawn again. Choose 'checkpoint' or 'e2e+accumulate:4'."
                )
        self._compared = True


def _weighted(gradient: Tensor, weights: Tensor) -> Tensor:
    return gradient.mul_(weights.to(gradient.dtype).view(-1, *[1] * (gradient.dim() - 1)))
