"""Auxiliary networks that are made of the model's own units: copies, gradients, momentum."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

from glcan import Learner
from glcan.auxiliary.backbone import Adapter, copied, copyable, frozen_copy, layers, move_towards, redrawn
from glcan.inspect.dryrun import dry_run
from glcan.inspect.features import Feature
from glcan.inspect.isolation import Boundary
from glcan.inspect.record import profile as take_profile
from glcan.models import create

CUTS = ["layer1.1", "layer2.0", "layer3.1"]


def batch() -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(2)
    return torch.randn(6, 3, 16, 16, generator=draw), torch.arange(6) % 3


def learner(rule: str, cuts: list[str] | None = None, model: nn.Module | None = None, **options: Any) -> Learner:
    torch.manual_seed(0)
    model = create("cifar_resnet20", num_classes=10).train() if model is None else model
    optimizer = partial(SGD, lr=0.1, momentum=0.9, weight_decay=0.1)
    return Learner(model, sample=batch(), method=rule, cuts=cuts or CUTS, options=options, optimizer=optimizer)


def weights(unit: nn.Module) -> dict[str, Tensor]:
    """Of a copy, the buffers that are weights of the real unit."""
    return {name: b for name, b in unit.named_buffers() if "running" not in name and "batches" not in name}


def test_the_momentum_copy_begins_as_its_source_and_moves_by_the_average_alone() -> None:
    mine = learner("manpp", momentum=0.9)
    pairs = [(a.copies[0], mine.model.get_submodule(a.names[0])) for a in mine.auxiliary.values()]
    assert [a.names for a in mine.auxiliary.values()] == [[cut] for cut in CUTS]
    trained = {id(p) for o in mine.optimizers for g in o.param_groups for p in g["params"]}
    expected: list[dict[str, Tensor]] = []
    for copy, real in pairs:
        assert not list(copy.parameters())
        source = dict(real.named_parameters())
        assert list(weights(copy)) == list(source)
        for name, value in weights(copy).items():
            assert torch.equal(value, source[name])
            assert value.data_ptr() != source[name].data_ptr()
            assert not value.requires_grad
            assert id(value) not in trained
        for name, value in real.named_buffers():
            assert torch.equal(dict(copy.named_buffers())[name], value)
        expected.append({name: value.clone() for name, value in weights(copy).items()})
    for run in (mine.step, mine.step, mine.step, mine.backward):  # the average is taken before each pass
        for (_, real), old in zip(pairs, expected, strict=True):
            for name, source in real.named_parameters():
                old[name] = 0.9 * old[name] + 0.1 * source.detach()
        run(*batch())
        for (copy, real), old in zip(pairs, expected, strict=True):
            source = dict(real.named_parameters())
            for name, value in weights(copy).items():
                assert not torch.equal(old[name], source[name].detach())
                torch.testing.assert_close(value, old[name], rtol=1e-6, atol=1e-7)
    for copy, real in pairs:  # statistics are of what the copy itself saw
        own = dict(copy.named_buffers())["bn1.running_mean"]
        assert own.abs().sum() > 0
        assert not torch.equal(own, dict(real.named_buffers())["bn1.running_mean"])


@pytest.mark.parametrize(
    ("rule", "options"),
    [("auglocal", {}), ("man", {}), ("man", {"base": "infopro"}), ("manpp", {"bias": "channel"})],
)
def test_a_local_loss_reaches_the_block_and_its_auxiliary_network_alone(rule: str, options: dict[str, Any]) -> None:
    mine = learner(rule, **options)
    for name, network in mine.auxiliary.items():
        index = mine.plan.names.index(name)
        (entering,) = (torch.randn(f.shape, requires_grad=True) for f in mine.plan.units[index + 1][0].entering)
        mine.strategy.rule.local_loss(mine.task, network(Boundary(index, "", (entering,)), batch()), batch()).backward()
        assert entering.grad is not None
        assert entering.grad.abs().sum() > 0
        assert all(p.grad is not None for p in network.parameters())
        assert all(p.grad is None for p in mine.model.parameters())
    own = {p.data_ptr() for p in mine.model.parameters()}
    assert own.isdisjoint(t.data_ptr() for t in (*mine.auxiliary.parameters(), *mine.auxiliary.buffers()))


def test_what_man_and_manpp_hand_to_the_other_rules_network() -> None:
    entering = torch.randn(6, 16, 16, 16)
    for rule, bias, scale in (
        ("man", "unit", 1.0),
        ("manpp", "unit", 1.3),
        ("man", "channel", 1.0),
        ("man", "none", 1),
    ):
        network = learner(rule, ["layer2.0"], bias=bias).auxiliary["block1"]
        given: list[Tensor] = []
        network.base.register_forward_pre_hook(lambda _, args, given=given: given.append(args[0].entering[0]))
        if network.scale is not None:
            assert network.scale == 1
            nn.init.constant_(network.scale, scale)
        if bias == "channel":
            nn.init.normal_(network.bias)
        network(Boundary(0, "layer2.0", (entering,)), batch())
        copy = network.copies[0](entering)
        assert copy.shape == (6, 32, 8, 8)
        own = network.bias_units[0](entering) if bias == "unit" else network.bias if bias == "channel" else 0
        torch.testing.assert_close(given[0], (2 - scale) * copy + scale * own)


def test_man_copies_several_units_and_says_where_it_finds_none() -> None:
    assert learner("man", units=2).auxiliary["block1"].names == ["layer1.1", "layer1.2"]
    assert learner("man", units=16).auxiliary["block3"].names == ["layer3.1", "layer3.2"]
    with pytest.warns(UserWarning, match="man' has nothing to copy there and works as 'dgl'"):
        mine = learner("man", ["fc"])
    mine.step(*batch())
    assert not any("copies" in name for name, _ in mine.auxiliary.named_buffers())
    alone = learner("auglocal", ["fc"])  # no layer is left
    assert sum(p.numel() for p in alone.auxiliary.parameters()) == 64 * 10 + 10
    alone.step(*batch())


def test_copies_are_drawn_anew() -> None:
    model = create("cifar_resnet20", num_classes=10).train()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(5.0)
    network = learner("auglocal", model=model).auxiliary["block3"]
    weight = network.units[-1].conv1.weight
    assert weight.std().item() == pytest.approx((2 / (9 * 64)) ** 0.5, rel=0.05)
    assert torch.equal(network.units[-1].bn1.weight, torch.ones(64))

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.gamma = nn.Linear(3, 3), nn.Parameter(torch.full((3,), 0.5))

    unit = redrawn(copied(nn.ModuleDict({"unit": Scaled().requires_grad_(False)}), "unit"))
    assert torch.equal(unit.gamma, torch.full((3,), 0.5))  # held by a module without reset_parameters: as it was
    assert all(p.requires_grad for p in unit.parameters())


def test_copies_of_fake_models_share_their_mode() -> None:
    # deepcopy alone would copy the mode with every tensor, and the process crashed later on
    def look(model: nn.Module, batch: Any) -> list[bool]:
        mode = model.conv1.weight.fake_mode
        tensors = [*copied(model, "layer1.0").state_dict(keep_vars=True).values()]
        tensors += frozen_copy(model, "layer1.0").state_dict(keep_vars=True).values()
        return [t.fake_mode is mode for t in tensors]

    found = dry_run(create("cifar_resnet20", num_classes=10), batch(), look)
    assert len(found) == 2 * 12
    assert all(found)


def test_tied_weights_of_a_unit_move_once() -> None:
    unit = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    unit[1].weight = unit[0].weight
    model = nn.ModuleDict({"unit": unit})
    for copy in (copied(model, "unit"), frozen_copy(model, "unit")):
        nn.init.zeros_(unit[0].weight)
        with torch.no_grad():
            copy[0].weight.fill_(1.0)
        move_towards(["unit"], [copy], model, 0.9)
        assert torch.equal(copy[0].weight, torch.full((2, 2), 0.9))
        assert torch.equal(copy[1].weight, copy[0].weight)


def test_layers_and_what_leads_from_one_stage_to_the_next() -> None:
    class Stage(nn.Module):
        def __init__(self, channels: int) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(channels, channels, 3, padding=1), nn.Conv2d(channels, channels, 1)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.second(self.first(x).relu())

    class Down(nn.Sequential):
        pass

    down = [Down(nn.Conv2d(n, 2 * n, 2, 2)) for n in (8, 16)]
    blocks = [Stage(8), Stage(8), down[0], Stage(16), Stage(16), down[1], Stage(32), Stage(32)]
    tail = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)]
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), *blocks, *tail).train()
    names = [str(i) for i in (*range(9), 11)]
    profile = take_profile(model, batch()[:1], units=[*names[:9], "9", "10", "11"])
    assert [u.name for u in copyable(profile)] == names[:9]
    assert [u.name for u in layers(profile)] == ["0", "1", "2", "4", "5", "7", "8"]
    made = Learner(model, sample=batch(), method="auglocal", cuts=["2"], units=names, options={"depth": 3})
    assert made.auxiliary["block1"].names == ["3", "4", "5", "6", "8"]  # 4, 5 and 8, behind what leads there
    made = Learner(model, sample=batch(), method="man", cuts=["3"], units=names)
    assert made.auxiliary["block1"].names == ["3", "4"]
    strided = nn.Sequential(*(nn.Conv2d(a, b, 3, 2, 1) for a, b in ((3, 8), (8, 16), (16, 16))), *tail)
    strided[-1] = nn.Linear(16, 10)
    assert [u.name for u in layers(take_profile(strided, batch()[:1], units=["0", "1", "2", "5"]))] == ["0", "1", "2"]


@pytest.mark.parametrize(
    ("layout", "shape", "wanted"),
    [
        ("BCHW", (2, 16, 4, 4), (2, 16, 4, 4)),
        ("BHWC", (2, 4, 4, 16), (2, 4, 4, 16)),
        ("BNC", (2, 18, 16), (2, 18, 16)),
    ],
)
def test_an_adapter_makes_the_form_that_is_wanted(layout: str, shape: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    before = Feature((2, 8, 8, 8), "BCHW", 8, (8, 8))
    made = Adapter(before, Feature(shape, layout, 16, (4, 4), 2 if layout == "BNC" else 0))(torch.randn(2, 8, 8, 8))
    assert made.shape == wanted
    if layout == "BNC":  # the special tokens, the means
        torch.testing.assert_close(made[:, 0], made[:, 2:].mean(1))
        torch.testing.assert_close(made[:, 1], made[:, 0])
