"""The rule glcan: its options, its budget, networks drawn together, the end of the model looked ahead to."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from tests import zoo
from torch import Tensor, nn
from torch.optim import SGD

from glcan import Boundary, Learner, LiveMemory
from glcan.auxiliary import create
from glcan.auxiliary.glcan.classification import LookAhead
from glcan.auxiliary.maps import as_map, reduce_to
from glcan.errors import ConfigError
from glcan.models import create as create_model

BATCH = (torch.randn(4, 3, 32, 32), torch.tensor([1, 2, 3, 4]))
OPTIMIZER = partial(SGD, lr=0.05)


def resnet() -> nn.Module:
    return create_model("cifar_resnet32", num_classes=10)


def vit() -> nn.Module:
    return zoo.timm("vit_tiny_patch16_224", img_size=32, patch_size=4, num_classes=10, depth=6, embed_dim=48)


def learner(model: nn.Module | None = None, blocks: int = 4, **options: Any) -> Learner:
    model = model or resnet()
    return Learner(model, sample=BATCH, method=f"glcan:{blocks}", options=options, optimizer=OPTIMIZER)


def auxiliary_flops(mine: Learner) -> int:
    """Forward FLOPs of all auxiliary networks, as they run."""
    total = 0

    def metered(name: str, network: nn.Module) -> Any:
        forward = network.forward

        def run(boundary: Boundary, batch: Any) -> Tensor:
            nonlocal total
            with LiveMemory() as memory:
                out = forward(boundary, batch)
            total += memory.flops
            return out

        return run

    for name, network in mine.auxiliary.items():
        network.forward = metered(name, network)
    mine.backward(*BATCH)
    for network in mine.auxiliary.values():
        del network.forward
    return total


@pytest.mark.parametrize("build", [resnet, vit, lambda: create_model("torchvision/resnet18", num_classes=10)])
@pytest.mark.parametrize(("budget", "blocks"), [(0.1, 4), (0.3, 4), (0.05, 2), (0.1, 6)])
def test_the_budget_is_kept(build: Any, budget: float, blocks: int) -> None:
    mine = learner(build(), blocks, budget=budget, unit_share=0.0)
    smallest = auxiliary_flops(learner(build(), blocks, budget=1e-6, unit_share=0.0))
    # the branches are fitted; the last linear layer and the local one come on top
    allowed = 1.02 * budget * mine.profile.flops
    assert auxiliary_flops(mine) <= max(allowed, smallest)


def test_more_budget_gives_wider_skeletons() -> None:
    sizes = [auxiliary_flops(learner(budget=budget, unit_share=0.0)) for budget in (0.02, 0.1, 0.5)]
    assert sizes == sorted(sizes)
    assert sizes[0] < sizes[2]


def test_width_overrides_the_budget() -> None:
    sizes = [auxiliary_flops(learner(width=width, budget=0.001)) for width in (0.25, 0.5, 1.0)]
    assert sizes[0] < sizes[1] < sizes[2]


@pytest.mark.parametrize("build", [resnet, vit])
def test_branches_can_be_switched_off(build: Any) -> None:
    options = ({"local": "always"}, {"use_global": False}, {"local": "never"})
    both, local, far = (learner(build(), **chosen) for chosen in options)

    def convolutions(mine: Learner) -> int:
        return sum(isinstance(m, nn.Conv2d) for m in mine.auxiliary.modules())

    def norms(mine: Learner) -> int:
        return sum(isinstance(m, nn.LayerNorm) for m in mine.auxiliary.modules())

    assert convolutions(local) == 0 < convolutions(both)
    assert norms(far) == 0 < norms(local) == 3
    assert convolutions(far) == convolutions(both)
    widths = [mine.auxiliary["block1"].head.in_features for mine in (both, local, far)]
    assert widths[0] == widths[1] + widths[2]


def has_local_branch(mine: Learner) -> list[bool]:
    return [network.norm is not None for network in mine.auxiliary.values()]


def test_no_local_branch_where_the_skeleton_can_do_without() -> None:
    assert has_local_branch(learner()) == [False] * 3
    assert has_local_branch(learner(local="always")) == [True] * 3
    assert has_local_branch(learner(use_global=False)) == [True] * 3
    # class tokens, which the skeleton does not read
    assert has_local_branch(learner(vit())) == [True] * 3
    assert has_local_branch(learner(vit(), local="never")) == [False] * 3
    # narrower than 32 classes: 16 channels are, the 32 behind the last cut are not
    many = learner(create_model("cifar_resnet32", num_classes=32), width=0.5)
    assert [network.skeleton.narrowest for network in many.auxiliary.values()] == [16, 16, 32]
    assert has_local_branch(many) == [True, True, False]


def test_the_skeleton_stands_for_the_stages_to_come() -> None:
    mine = learner(width=1.0, depth=1)
    model = mine.model
    depth = []
    for name in mine.auxiliary:
        convs = [m for m in mine.auxiliary[name].modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
        depth.append(len(convs))
    assert depth == sorted(depth, reverse=True)
    assert depth[0] == 2, "from the first stage on: the second and the third"
    assert sum(p.numel() for p in mine.auxiliary.parameters()) < sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("options", [{}, {"coupling": 0.25}, {"coupling": 0.0}])
def test_networks_of_a_stage_are_drawn_together(options: dict[str, float]) -> None:
    mine = learner(blocks=16, **options)
    share = options.get("coupling", 0.1)
    before = copy.deepcopy(mine.auxiliary)
    mine.strategy.rule.before_pass(mine.auxiliary, mine.model)
    stages: dict[str, list[str]] = {}
    for name, network in before.items():
        stages.setdefault(repr(network), []).append(name)
    assert sorted(map(len, stages.values())) == [1, 1, 1, 2, 5, 5]  # the stem, the two that look ahead, and the stages
    for alike in stages.values():
        for key, _ in before[alike[0]].named_parameters():
            mean = torch.stack([before[name].get_parameter(key) for name in alike]).mean(0)
            for name in alike:
                moved = share if len(alike) > 2 else 0.0
                wanted = (1 - moved) * before[name].get_parameter(key) + moved * mean
                torch.testing.assert_close(mine.auxiliary[name].get_parameter(key), wanted)
    changed = [not torch.equal(p, mine.auxiliary.get_parameter(n)) for n, p in before.named_parameters()]
    assert any(changed) == bool(share)


def ends(cuts: list[str], model: nn.Module | None = None, unit_share: float = 9.0, **options: Any) -> Learner:
    """Cut near the end, with a share that allows for copies."""
    options = {"unit_share": unit_share} | options
    return Learner(model or resnet(), sample=BATCH, method="glcan", cuts=cuts, options=options, optimizer=OPTIMIZER)


@pytest.mark.parametrize("step", [True, False])
def test_the_last_blocks_learn_what_they_would_end_to_end(step: bool) -> None:
    mine = ends(["layer2.0", "layer3.3", "layer3.4"])
    assert [isinstance(network, LookAhead) for network in mine.auxiliary.values()] == [False, True, True]
    assert mine.auxiliary["block2"].names == ["layer3.3", "layer3.4"]
    assert [len(list(mine.auxiliary[name].parameters())) for name in ("block2", "block3")] == [0, 0]
    for _ in range(2):  # the copies follow
        if step:
            mine.step(*BATCH)
        else:
            mine.backward(*BATCH)
            with torch.no_grad():
                for parameter in mine.model.parameters():
                    parameter -= 0.1 * parameter.grad
    mine.model.zero_grad()
    plain = copy.deepcopy(mine.model)
    losses = mine.backward(*BATCH)
    whole = nn.functional.cross_entropy(plain(BATCH[0]), BATCH[1])
    whole.backward()
    for name in ("block2", "block3", "block4"):
        torch.testing.assert_close(losses[name], whole.detach())
    wanted = dict(plain.named_parameters())
    for name, parameter in mine.model.named_parameters():
        if name.startswith(("layer2", "layer3", "fc")):
            torch.testing.assert_close(parameter.grad, wanted[name].grad, rtol=1e-4, atol=1e-6)
    assert not torch.allclose(mine.model.conv1.weight.grad, wanted["conv1.weight"].grad, rtol=1e-2)


def test_copies_of_the_end_are_made_where_they_are_cheap() -> None:
    def copied(mine: Learner) -> list[bool]:
        return [isinstance(network, LookAhead) for network in mine.auxiliary.values()]

    last = ["layer3.2", "layer3.3", "layer3.4"]
    assert copied(ends(last)) == [False, True, True]
    assert copied(ends(last, look_ahead=0)) == [False, False, False]
    assert copied(ends(last, look_ahead=3)) == [True, True, True]
    assert copied(ends(last, unit_share=1.2)) == [False, False, True]
    assert copied(ends(last, unit_share=0.6)) == [False, False, False]
    assert copied(ends(last, use_global=False)) == [False, False, False]


def test_a_model_without_a_linear_end_gets_one_of_its_own_behind_the_copies() -> None:
    mine = ends(["blocks.4", "blocks.5"], vit())  # a norm stands before its head
    for network in mine.auxiliary.values():
        assert isinstance(network, LookAhead)
        assert network.classifier is None
        assert len(list(network.parameters())) == 4
    first = mine.step(*BATCH)
    for _ in range(5):
        last = mine.step(*BATCH)
    assert last["block1"] < first["block1"]


def test_copies_are_no_part_of_the_model() -> None:
    mine = ends(["layer3.3", "layer3.4"])
    own = {p.data_ptr() for p in (*mine.model.parameters(), *mine.model.buffers())}
    network = mine.auxiliary["block1"]
    assert not own & {t.data_ptr() for t in (*mine.auxiliary.parameters(), *mine.auxiliary.buffers())}
    for name, unit in zip(network.names, network.units, strict=True):
        for key, value in unit.state_dict().items():
            assert torch.equal(value, mine.model.get_submodule(name).state_dict()[key])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 0}, "glcan.budget is 0"),
        ({"budget": 11.0}, "glcan.budget is 11"),
        ({"budget": True}, "glcan.budget is True; it must be a float"),
        ({"unit_cost": -1.0}, "glcan.unit_cost is -1"),
        ({"memory": 0.0}, "glcan.memory is 0"),
        ({"depth": 0}, "glcan.depth is 0"),
        ({"local": "never", "use_global": False}, "leave at least one branch on"),
        ({"local": True}, "glcan.local is True; it must be one of 'needed', 'always', 'never'"),
        ({"use_global": 1}, "glcan.use_global is 1; it must be a bool"),
        ({"width": 0}, "glcan.width is 0"),
        ({"width": "wide"}, "float or none"),
        ({"unit_share": -1.0}, "unit_share"),
        ({"coupling": 1.5}, "glcan.coupling is 1.5"),
        ({"look_ahead": 17}, "glcan.look_ahead is 17"),
    ],
)
def test_options_that_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        create("glcan", "classification", options)


def test_whole_numbers_will_do_for_floats() -> None:
    assert create("glcan", "classification", {"budget": 1, "width": 1}).config.width == 1


# -- reading maps --------------------------------------------------------------------------------------------------


def test_tokens_become_the_map_that_they_came_from() -> None:
    model = vit()
    mine = learner(model)
    feature = mine.profile.unit("blocks.2").output
    grid = torch.randn(4, 48, 8, 8)
    tokens = torch.cat([torch.full((4, 1, 48), 9.0), grid.flatten(2).mT], 1)
    assert torch.equal(as_map(tokens, feature), grid)
    larger = torch.randn(2, 48, 16, 16)
    tokens = torch.cat([torch.zeros(2, 1, 48), larger.flatten(2).mT], 1)
    assert torch.equal(as_map(tokens, feature), larger)
    with pytest.raises(ConfigError, match="60 tokens are no grid"):
        as_map(torch.zeros(2, 61, 48), feature)


@pytest.mark.parametrize("size", [(8, 8), (9, 13), (4, 4), (3, 4)])
def test_reduction(size: tuple[int, int]) -> None:
    value = torch.randn(2, 3, *size)
    reduced = reduce_to(value, (4, 4))
    assert reduced.shape[-2] <= max(4, 4)
    torch.testing.assert_close(reduce_to(torch.ones(2, 3, *size), (4, 4)).mean(), torch.tensor(1.0))
