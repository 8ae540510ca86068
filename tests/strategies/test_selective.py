"""The gradient of chosen images: exact where it can be, by hand where it is not, right in the mean, or refused."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.strategies.models import Normalised, assert_close, batch, chain, end_to_end, normalised
from tests.zoo import assert_equal, gradients
from torch import Tensor, nn
from torch.optim import SGD

import glcan
from glcan import Learner, measure_step
from glcan.errors import ConfigError
from glcan.models import create
from glcan.strategies import second_pass
from glcan.strategies.choosing import choose, fraction, sizes_of
from glcan.tasks import Classification


def learner(model: nn.Module, share: float = 0.5, sample: Any = None, **more: Any) -> Learner:
    return Learner(model, sample=sample or batch(), method="selective", **{"options": {"share": share}} | more)


# -- a gradient by hand --------------------------------------------------------------------------------------------


def test_it_is_the_weighted_sum_of_the_gradients_of_those_chosen() -> None:
    """Without a normalisation over the batch, image by image."""
    model, whole = chain(), chain()
    images, labels = batch()
    chosen = learner(model)
    for step in (1, 2):
        model.zero_grad()
        losses = chosen.backward(images, labels)
        logits = whole(images).detach().requires_grad_()
        loss = F.cross_entropy(logits, labels)
        (gradient,) = torch.autograd.grad(loss, logits)
        places, weights = choose(sizes_of([gradient]), 4, fraction(torch.tensor(step)))
        whole.zero_grad()
        for place, weight in zip(places.tolist(), weights.tolist(), strict=True):
            (weight * F.cross_entropy(whole(images[place : place + 1]), labels[place : place + 1]) / 8).backward()
        torch.testing.assert_close(losses["block1"], loss.detach())  # of all images
        assert_close(gradients(model), gradients(whole), 1e-10)


def test_images_drawn_at_random_weigh_alike() -> None:
    model, whole = chain(), chain()
    images, labels = batch()
    chosen = learner(model, options={"share": 0.5, "by": "random"})
    taken: list[Tensor] = []
    take = chosen.task.chosen
    chosen.task.chosen = lambda batch, places: (taken.append(places), take(batch, places))[1]  # type: ignore
    losses = chosen.backward(images, labels)
    assert_close(gradients(model), end_to_end(whole, images[taken[0]], labels[taken[0]]), 1e-10)
    torch.testing.assert_close(losses["block1"], F.cross_entropy(whole(images), labels).detach())


class Weighted:
    """The mean loss, in which every image has a weight."""

    def __init__(self, weights: Tensor) -> None:
        self.weights = weights

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        found: Tensor = (self.weights * F.cross_entropy(logits, labels, reduction="none")).mean()
        return found


def test_images_without_a_gradient_are_left_out_first() -> None:
    weights = torch.tensor([0, 1, 0, 2, 0.5, 0, 1, 0], dtype=torch.float64)
    model, whole = chain(), chain()
    chosen = learner(model, 0.75, task=Classification(criterion=Weighted(weights), classes=10))
    losses = chosen.backward(*batch())  # six of eight, four of which have a gradient
    loss = Weighted(weights)(whole(batch()[0]), batch()[1])
    loss.backward()
    torch.testing.assert_close(losses["block1"], loss.detach())
    assert_close(gradients(model), gradients(whole))


# -- in the mean over many choices ---------------------------------------------------------------------------------


def mean_over_choices(model: nn.Module, sample: Any, choices: int) -> tuple[Tensor, Tensor]:
    """Of the gradient of all but the last layer: the mean over so many choices, and its standard error."""
    mine = copy.deepcopy(model)
    chosen = learner(mine, sample=sample)
    found = []
    for _ in range(choices):
        mine.zero_grad()
        chosen.backward(*sample)
        found.append(torch.cat([g.flatten() for name, g in gradients(mine).items() if not name.startswith("fc")]))
    each = torch.stack(found)
    return each.mean(0), each.std(0) / choices**0.5


def full(model: nn.Module, sample: Any) -> Tensor:
    found = end_to_end(copy.deepcopy(model), *sample)
    return torch.cat([g.flatten() for name, g in found.items() if not name.startswith("fc")])


def test_without_normalisation_the_mean_is_the_whole_gradient() -> None:
    model, sample = chain(), batch(16)
    mean, error = mean_over_choices(model, sample, 150)
    wanted = full(model, sample)
    assert error.norm() < 0.15 * wanted.norm()
    assert (mean - wanted).norm() < 2.5 * error.norm()


def test_with_batchnorm_the_gradient_through_the_statistics_is_that_of_the_images_at_hand(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Mean and scale are taken out of the chosen images' gradients; without the scale they are far off."""

    class Rows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(1, 8, 3, padding=1)
            self.body = nn.Sequential(
                *(
                    nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
                    for _ in range(4)
                )
            )
            self.fc = nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.body(self.stem(x)).mean((2, 3)))

    torch.manual_seed(0)
    model, labels = Rows().double(), torch.arange(16) % 4
    images = torch.randn(16, 1, 6, 6).double() * torch.linspace(0.3, 2, 16).double()[:, None, None, None]
    images += 0.3 * (labels.double() - 1.5)[:, None, None, None]
    optimizer = SGD(model.parameters(), lr=0.1)
    for _ in range(60):  # some images are learned by then, and their gradients small
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
    model.zero_grad()
    wanted = full(model, (images, labels))
    mean, error = mean_over_choices(model, (images, labels), 80)
    assert error.norm() < 0.1 * wanted.norm()
    assert (mean - wanted).norm() < 0.8 * wanted.norm()
    monkeypatch.setattr(second_pass, "_LEAST_VARIANCE", 1e9)
    mean, _ = mean_over_choices(model, (images, labels), 80)
    assert (mean - wanted).norm() > wanted.norm(), "this model would show it"


# -- normalised as the whole batch was -----------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*cannot be looked at without computing")  # BatchNorm counts with momentum=None
@pytest.mark.parametrize("norm", [{}, {"momentum": None}, {"affine": False}, {"track_running_stats": False}], ids=str)
def test_images_are_normalised_as_the_batch_was(norm: dict[str, Any]) -> None:
    """The outputs of every unit, of the chosen images, are the rows that they were in the batch."""
    images, labels = batch()
    ours, whole = normalised(**norm), normalised(**norm)
    chosen = learner(ours)
    for _ in range(2):
        whole(images)
        chosen.backward(images, labels)
    seen: dict[str, list[Tensor]] = defaultdict(list)

    def keep(name: str, module: nn.Module, args: Any, out: Tensor) -> None:
        seen[name].append(out.detach().clone())

    for name, module in ours.named_modules():
        if isinstance(module, nn.Conv2d | nn.BatchNorm2d | nn.Linear):
            module.register_forward_hook(partial(keep, name))
    taken: list[Tensor] = []
    take = chosen.task.chosen
    chosen.task.chosen = lambda batch, places: (taken.append(places), take(batch, places))[1]  # type: ignore
    whole(images)
    chosen.backward(images, labels)
    assert_close(dict(ours.named_buffers()), dict(whole.named_buffers()))
    assert len(seen) == 10
    for outputs in seen.values():
        assert [len(out) for out in outputs] == [8, 4] or [len(out) for out in outputs] == [8, 4, 4]  # recomputed
        for again in outputs[1:]:
            torch.testing.assert_close(again, outputs[0][taken[0]], rtol=1e-10, atol=1e-12)
    assert all("forward" not in vars(m) for m in ours.modules())


@pytest.mark.parametrize("images", [1, 2, 3, 8])
@pytest.mark.parametrize("share", [0.5, 1.0])
def test_batches_of_any_size_run(images: int, share: float) -> None:
    """Half of a single image is all of it, and half of three is one."""
    ours, whole = normalised(), normalised()
    chosen = learner(ours, share, optimizer=partial(SGD, lr=0.01))
    some = tuple(item[:images] for item in batch())
    losses = chosen.backward(*some)
    torch.testing.assert_close(losses["block1"], F.cross_entropy(whole(some[0]), some[1]).detach())
    found = gradients(ours)
    assert found.keys() == dict(ours.named_parameters()).keys()
    assert all(gradient.isfinite().all() for gradient in found.values())
    if share == 1 or images == 1:
        assert_close(found, end_to_end(normalised(), *some))
    assert_close(dict(ours.named_buffers()), dict(whole.named_buffers()))
    ours.zero_grad()
    assert chosen.step(*some)["block1"].isfinite()


def test_backward_adds_up() -> None:
    once, twice = chain(), chain()
    first, second = learner(once), learner(twice)
    second.load_state_dict(first.state_dict())
    first.backward(*batch())
    first.backward(*batch())
    found = gradients(once)
    for _ in range(2):
        twice.zero_grad()
        second.backward(*batch())
        found = {name: found[name] - gradient for name, gradient in gradients(twice).items()}
    assert_close(found, {name: torch.zeros_like(gradient) for name, gradient in found.items()})


# -- what mixes images otherwise is refused at the first real step -------------------------------------------------


class _OwnNorm(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x - x.mean((0, 2, 3), keepdim=True)) / (x.std((0, 2, 3), keepdim=True) + 1e-5)


class _Derived(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        mean, variance = x.mean((0, 2, 3)), x.var((0, 2, 3))
        scale = (variance + self.eps).rsqrt() * self.weight
        return x * scale[:, None, None] + (self.bias - mean * scale)[:, None, None]


class _Neighbours(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 0.5 * x.roll(1, 0)


class _Attention(nn.Module):
    """Over the batch, as where tokens come first and images second."""

    def forward(self, x: Tensor) -> Tensor:
        rows = x.mean((2, 3))
        return x + ((rows @ rows.T).softmax(-1) @ rows)[:, :, None, None]


class _Native(nn.Module):
    """Batch normalisation of torch's, but not by its usual name."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.native_batch_norm(x, None, None, None, None, True, 0.1, 1e-5)[0]


class _Shuffles(nn.Module):
    """Draws numbers by which images are mixed: of no row alone."""

    def forward(self, x: Tensor) -> Tensor:
        return x + 0.5 * x[torch.randperm(len(x), device=x.device)]


@pytest.mark.filterwarnings("ignore:.*cannot be looked at without computing")
@pytest.mark.parametrize("layer", [_OwnNorm, partial(_Derived, 16), _Neighbours, _Attention, _Native, _Shuffles])
def test_models_that_mix_images_in_a_way_of_their_own_are_refused(layer: Callable[[], nn.Module]) -> None:
    model = chain()
    model.body[1] = nn.Sequential(model.body[1], layer()).double()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    chosen = learner(model, optimizer=partial(SGD, lr=0.1))
    with pytest.raises(ConfigError, match=r"predictions are .*% off. Chain mixes the images .*Choose 'checkpoint'"):
        chosen.step(*batch())
    assert all(p.grad is None for p in model.parameters())
    assert_equal(dict(model.named_parameters()), before)
    exact = Learner(model, sample=batch(), method="selective", options={"share": 1.0})  # all images at once
    exact.backward(*batch())


def test_predictions_are_compared_once_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = learner(normalised())
    calls: list[int] = []
    compare = type(chosen._pass)._compare
    monkeypatch.setattr(type(chosen._pass), "_compare", lambda self, *args: (calls.append(1), compare(self, *args)))
    for _ in range(3):
        chosen.backward(*batch())
    assert calls == [1]


# -- what it costs, and what it leaves -----------------------------------------------------------------------------


def test_it_takes_little_of_the_memory_and_no_more_flops_than_end_to_end() -> None:
    sample = torch.rand(32, 3, 16, 16), torch.randint(0, 10, (32,))

    def cost(method: str) -> Any:
        return measure_step(Learner(create("cifar_resnet32", num_classes=10), sample=sample, method=method), *sample)

    whole, checkpoint, chosen = cost("e2e"), cost("checkpoint"), cost("selective")
    assert chosen.activation_peak_bytes < 0.2 * whole.activation_peak_bytes
    assert chosen.activation_peak_bytes < 0.75 * checkpoint.activation_peak_bytes
    assert chosen.flops < 1.02 * whole.flops
    planned = glcan.plan(create("cifar_resnet32", num_classes=10), sample=sample, method="selective", baselines=()).cost
    assert planned.peak_bytes == pytest.approx(chosen.peak_bytes, rel=0.02)
    assert planned.flops == pytest.approx(chosen.flops, rel=0.01)


def test_it_says_what_it_does() -> None:
    chosen = learner(chain(), 0.25)
    assert chosen.describe() == "25% of each batch back-propagated, chosen by gradient"
    assert repr(chosen).startswith("selective (sampled) of Chain: 25% of each batch")
    other = learner(chain(), options={"by": "random"})
    assert other.describe() == "50% of each batch back-propagated, drawn at random"


def test_nothing_of_the_model_is_changed() -> None:
    model = normalised()
    names = [name for name, _ in model.named_modules()]
    before = {m: dict(vars(m)) for m in model.modules()}
    chosen = learner(model)
    images, labels = batch()
    with pytest.raises(IndexError):
        chosen.backward(images, labels + 10)  # in the middle of a pass
    chosen.backward(images, labels)
    assert [name for name, _ in model.named_modules()] == names
    assert all(vars(m).keys() == old.keys() for m, old in before.items())
    assert all(m.momentum == 0.1 and m.training for m in model.modules() if isinstance(m, nn.BatchNorm2d))


def test_autocast_of_ones_own_keeps_no_weights_that_need_no_gradient() -> None:
    sample = torch.randn(16, 3, 16, 16), torch.randint(0, 10, (16,))
    model = create("cifar_resnet20", num_classes=10)
    chosen = learner(model, sample=sample)
    with torch.autocast("cpu", torch.bfloat16):
        chosen.backward(*sample)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_a_learner_built_in_eval_mode_is_as_one_built_in_train_mode() -> None:
    """Models from a library come in eval mode, and dropout is not seen in it."""

    def built(training: bool) -> tuple[dict[str, Tensor], Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Dropout(0.5), nn.Conv2d(8, 8, 3), nn.AdaptiveAvgPool2d(1))
        model = nn.Sequential(model, nn.Flatten(), nn.Linear(8, 10)).double().train(training)
        chosen = learner(model)
        chosen.train()
        torch.manual_seed(1)
        loss = chosen.backward(*batch())["block1"]
        return gradients(model), loss

    (first, loss), (second, other) = built(True), built(False)
    assert loss == other
    assert_equal(first, second)


def test_more_than_the_images_of_the_sample_and_fewer() -> None:
    assert isinstance(normalised(), Normalised)
    model = normalised()
    chosen = learner(model, sample=batch(4))
    for images in (16, 2, 8):
        chosen.backward(*batch(images))
    assert int(chosen.state_dict()["pass"]["count"]) == 3
