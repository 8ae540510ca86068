"""Profiles: units that a person would name, features read rightly, and a model that is not touched."""

from __future__ import annotations

import copy
import dataclasses
import random
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tests import zoo
from tests.zoo import Residual, Small, assert_equal, gradients
from torch import Tensor, nn

from glcan.errors import ConfigError, CutError, UnknownName
from glcan.inspect.features import Feature, read_feature
from glcan.inspect.meter import LiveMemory
from glcan.inspect.record import profile
from glcan.models import create

# What a person would call the units: how many of each name, the number at its end left out.
UNITS = {
    "torchvision/resnet50": {"conv": 1, "layer1": 3, "layer2": 4, "layer3": 6, "layer4": 3, "fc": 1},
    "torchvision/vit_b_16": {"conv_proj": 1, "encoder.layers.encoder_layer_": 12, "heads": 1},
    "torchvision/swin_t": {"features": 4, "features.1": 2, "features.3": 2, "features.5": 6, "features.7": 2},
    "torchvision/convnext_tiny": {"features": 4, "features.1": 3, "features.3": 3, "features.5": 9, "features.7": 3},
    "torchvision/efficientnet_b0": {"features": 2, "features.1": 1, "features.4": 3, "features.6": 4, "classifier": 1},
    "torchvision/densenet121": {"features.denseblock3.denselayer": 24, "features.transition": 3, "classifier": 1},
    "torchvision/retinanet_backbone": {"body.layer1": 3, "body.layer4": 3, "fpn": 1},
    "timm/resnet50": {"conv": 1, "layer1": 3, "layer3": 6, "fc": 1},
    "timm/vit_small_patch16_224": {"patch_embed": 1, "blocks": 12, "head": 1},
    "timm/convnextv2_nano": {"stem": 1, "stages.2.downsample": 1, "stages.2.blocks": 8, "head": 1},
    "timm/swin_tiny": {"patch_embed": 1, "layers.1.downsample": 1, "layers.2.blocks": 6, "head": 1},
    "spandrel/RCAN": {"head": 1, "body.0.body": 3, "body.3.body": 3, "body": 1, "tail": 2},
    "spandrel/SwinIR": {"conv_first": 1, "layers.0.residual_group.blocks": 2, "layers.3.conv": 1, "upsample": 1},
    "spandrel/HAT": {"layers.0.residual_group.blocks": 2, "layers.0.residual_group.overlap_attn": 1, "conv_last": 1},
    "spandrel/NAFNet": {"intro": 1, "encoders.0": 1, "middle_blks": 1, "decoders.2": 1, "ending": 1},
    "transformers/ViT": {"vit.embeddings.patch_embeddings": 1, "vit.layers": 4, "classifier": 1},
    "transformers/GPT-2": {"transformer.wte": 1, "transformer.h": 4, "lm_head": 1},
    "transformers/Llama": {"model.embed_tokens": 1, "model.layers": 4, "lm_head": 1},
}


@pytest.mark.filterwarnings("ignore")  # of other people's libraries
@pytest.mark.parametrize("name", zoo.ZOO)
def test_units_of_other_peoples_models(name: str) -> None:
    build, sample = zoo.ZOO[name]
    model = build()
    found = profile(model, *zoo.arguments(sample()))
    counted = zoo.histogram(found.names)
    assert {unit: counted.get(unit) for unit in UNITS[name]} == UNITS[name]
    assert len(set(found.names)) == len(found.names)
    assert len(found.cuttable) >= 4
    covered = {id(p) for unit in found.names for p in model.get_submodule(unit).parameters()}
    assert {n for n, p in model.named_parameters() if id(p) not in covered} <= set(found.glue), "every weight is known"


@pytest.mark.parametrize(("depth", "each"), [(20, 3), (32, 5), (56, 9)])
def test_units_and_stages_of_the_cifar_resnets(depth: int, each: int) -> None:
    found = profile(create(f"cifar_resnet{depth}", num_classes=10), (zoo.images(2, 32),))
    blocks = [unit for unit in found.units if unit.weights == 2]
    assert len(blocks) == 3 * each
    assert [unit.output.grid for unit in blocks] == [(32, 32)] * each + [(16, 16)] * each + [(8, 8)] * each
    assert [unit.output.channels for unit in blocks] == [16] * each + [32] * each + [64] * each
    assert [unit.stage for unit in blocks] == [0] * each + [1] * each + [2] * each
    assert [unit.index for unit in found.units] == list(range(len(found.units)))
    assert [unit for stage in found.stages for unit in stage] == list(found.units)
    assert found.calls == tuple(range(len(found.units)))


def test_figures_by_hand() -> None:
    model, batch = Small(), zoo.images(4, 16)
    found = profile(model, (batch,))
    assert found.names == ["stem", "a", "b", "c", "d", "head"]
    assert found.cuttable == ["a", "b", "c", "d", "head"]
    assert [u.parameters for u in found.units] == [224, *[2 * 584 + 16] * 4, 90]
    positions = 4 * 16 * 16
    assert [u.flops for u in found.units] == [
        2 * 27 * 8 * positions,
        *[2 * 2 * 72 * 8 * positions] * 4,
        2 * 8 * 10 * 4,
    ]
    feature = 4 * 8 * positions
    # saved by a residual block: its input (already there), the convolution's output, batch norm's two vectors, the
    # ReLU's output; and its own output, which the next one saves
    assert found.unit("b").saved_bytes == 3 * feature + 2 * 8 * 4
    assert found.flops == sum(u.flops for u in found.units)
    assert (found.batch, found.image, found.output, found.writes_input) == (4, (16, 16), ((4, 10),), False)
    with LiveMemory(model, inputs=batch) as memory:
        output = model(batch)
        # all that is alive after the forward pass belongs to some unit; the loss is nobody's
        assert memory.current["activations"] == sum(u.saved_bytes for u in found.units)
        assert memory.flops == found.flops
        del output


@pytest.mark.parametrize("name", ["resnet", "swin"])
def test_figures_of_another_batch(name: str) -> None:
    """Of Swin, several rows of a tensor belong to an image: windows are folded into the first dimension."""
    model = create("cifar_resnet20") if name == "resnet" else zoo.torchvision("swin_t", num_classes=10)
    few, whole = profile(model, (zoo.images(2, 32),)), profile(model, (zoo.images(6, 32),))
    found = few.scaled(6)
    assert (found.batch, found.output, found.flops) == (6, whole.output, whole.flops)
    for mine, theirs in zip(found.units, whole.units, strict=True):
        assert (mine.name, mine.entering, mine.output, mine.flops) == (
            theirs.name,
            theirs.entering,
            theirs.output,
            theirs.flops,
        )
        assert mine.saved_bytes == pytest.approx(theirs.saved_bytes, rel=0.02, abs=2048)  # but for statistics
    assert found.scaled(2) == few
    assert (found.cuttable, found.crossing, found.calls) == (whole.cuttable, whole.crossing, whole.calls)


def test_chained_units() -> None:
    class Skips(Small):
        def body(self, x: Tensor) -> Tensor:
            y = self.a(x)
            z = self.c(self.b(y))
            return self.d(z + y)

    chained = {u.name: u.chained for u in profile(Skips(), (zoo.images(2, 8),)).units}
    assert chained == {"stem": False, "a": True, "b": False, "c": True, "d": False, "head": False}
    assert [u.chained for u in profile(Small(), (zoo.images(2, 8),)).units] == [False, True, True, True, True, False]


def test_glue_parameters_and_repeated_calls() -> None:
    class Glue(Small):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.later = nn.Parameter(torch.ones(8, 1, 1)), nn.Parameter(torch.ones(8, 1, 1))

        def body(self, x: Tensor) -> Tensor:
            x = self.b(self.a(x) * self.first)
            x = self.a(x) * self.later
            return self.d(self.c(x)) + self.later

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x * self.first[0].mean())

    found = profile(Glue(), (zoo.images(2, 8),))
    assert found.names == ["stem", "a", "b", "c", "d", "head"]
    assert [found.units[i].name for i in found.calls] == ["stem", "a", "b", "a", "c", "d", "head"]
    assert found.glue == {"first": {-1, 1}, "later": {3, 5}}
    assert not found.unit("a").chained
    assert found.unit("a").flops == 2 * found.unit("b").flops


# -- finding units -------------------------------------------------------------------------------------------------


def test_units_that_the_user_names() -> None:
    model, batch = create("torchvision/resnet18", num_classes=10), zoo.images(2, 32)
    found = profile(model, (batch,))
    parents = list(dict.fromkeys(name.split(".")[0] for name in found.names))
    coarse = profile(model, (batch,), units=parents)
    assert coarse.names == parents
    assert coarse.flops == found.flops
    assert sum(u.saved_bytes for u in coarse.units) == sum(u.saved_bytes for u in found.units)


def test_errors_of_units_that_the_user_names() -> None:
    class Spare(Small):
        def __init__(self) -> None:
            super().__init__()
            self.never = Residual()

    batch = (zoo.images(2, 8),)
    with pytest.raises(UnknownName, match="'hed'.*'head'"):
        profile(Spare(), batch, units=["stem", "hed"])
    with pytest.raises(CutError, match=r"'a\.norm' lies inside the unit 'a'"):
        profile(Spare(), batch, units=["a", "a.norm"])
    with pytest.raises(CutError, match=r"\['never'\] are never called by Spare"):
        profile(Spare(), batch, units=["a", "never"])
    assert "never" not in profile(Spare(), batch).names


def test_a_model_without_sub_modules() -> None:
    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3, 2))

        def forward(self, x: Tensor) -> Tensor:
            return x.mean((2, 3)) @ self.weight

    with pytest.raises(ConfigError, match="Bare calls no sub-module"):
        profile(Bare(), (zoo.images(2, 8),))


def test_a_batch_that_the_model_does_not_take() -> None:
    with pytest.raises(ConfigError, match=r"Small cannot be run on a batch of shapes \[\(2, 5, 8, 8\)\]"):
        profile(Small(), (torch.randn(2, 5, 8, 8),))


def test_a_wrapped_model_is_opened() -> None:
    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Identity(), create("cifar_resnet20", num_classes=10))

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"logits": self.net(x), "double": self.net[0](x)}

    names = profile(Wrapper(), (zoo.images(2, 32),)).names
    assert len([n for n in names if n.startswith("net.1.")]) > 9


# -- reading features ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "image", "layout", "channels", "grid", "prefix"),
    [
        ((2, 64, 8, 8), (32, 32), "BCHW", 64, (8, 8), 0),
        ((2, 8, 8, 64), (32, 32), "BHWC", 64, (8, 8), 0),
        ((2, 7, 7, 96), (224, 224), "BHWC", 96, (7, 7), 0),
        ((2, 96, 7, 7), (224, 224), "BCHW", 96, (7, 7), 0),
        ((2, 64, 4, 12), (32, 96), "BCHW", 64, (4, 12), 0),
        ((2, 4, 12, 64), (32, 96), "BHWC", 64, (4, 12), 0),
        ((2, 3, 64, 64), (32, 32), "BCHW", 3, (64, 64), 0),
        ((2, 64, 9, 13), (70, 100), "BCHW", 64, (9, 13), 0),
        ((2, 197, 768), (224, 224), "BNC", 768, (14, 14), 1),
        ((2, 196, 768), (224, 224), "BNC", 768, (14, 14), 0),
        ((2, 201, 384), (224, 224), "BNC", 384, (14, 14), 5),
        ((2, 198, 384), (224, 224), "BNC", 384, (14, 14), 2),
        ((2, 49, 384), (112, 448), "BC?", 384, (1, 1), 0),
        ((2, 64 + 1, 32), (64, 256), "BNC", 32, (4, 16), 1),
        ((2, 10), (32, 32), "BC", 10, (1, 1), 0),
        ((2, 16, 32), None, "?", 32, (1, 1), 0),
        ((5, 16, 32), (32, 32), "?", 32, (1, 1), 0),
    ],
)
def test_features_are_read(shape: Any, image: Any, layout: str, channels: int, grid: Any, prefix: int) -> None:
    found = read_feature(shape, 2, image)
    if layout == "BC?":  # no grid of the image's shape
        assert found.prefix or found.layout == "?"
        return
    assert found == Feature(shape, layout, channels, grid, prefix)


@pytest.mark.parametrize(
    ("name", "unit", "layout", "grid", "prefix"),
    [
        ("timm/vit_small_patch16_224", "blocks.3", "BNC", (4, 4), 1),
        ("timm/swin_tiny", "layers.2.blocks.1", "BHWC", (14, 14), 0),
        ("torchvision/swin_t", "features.3.0", "BHWC", (8, 8), 0),
        ("torchvision/vit_b_16", "encoder.layers.encoder_layer_3", "BNC", (2, 2), 1),
        ("transformers/ViT", "vit.layers.1", "BNC", (4, 4), 1),
        ("torchvision/convnext_tiny", "features.3.0", "BCHW", (8, 8), 0),
    ],
)
def test_features_of_models(name: str, unit: str, layout: str, grid: Any, prefix: int) -> None:
    build, sample = zoo.ZOO[name]
    found = profile(build(), *zoo.arguments(sample())).unit(unit)
    assert (found.output.layout, found.output.grid, found.output.prefix) == (layout, grid, prefix)
    assert found.entering[0].layout == layout


def test_images_that_are_not_square() -> None:
    model = zoo.timm("vit_tiny_patch16_224", img_size=(32, 64), patch_size=8, depth=2, reg_tokens=4, num_classes=10)
    found = profile(model, (torch.randn(2, 3, 32, 64),)).unit("blocks.1")
    assert found.output == Feature((2, 37, 192), "BNC", 192, (4, 8), 5)
    found = profile(create("cifar_resnet20", num_classes=10), (torch.randn(2, 3, 32, 48),))
    assert [u.output.grid for u in found.units if u.weights == 2][-1] == (8, 12)


# -- the model is not touched --------------------------------------------------------------------------------------


class _Decides(Small):
    """Control flow that depends on data: fake tensors cannot run it."""

    calls = 0

    def body(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().body(x) if self.head.weight.detach().abs().mean().item() < 1e9 else x


class _Drops(Small):
    def body(self, x: Tensor) -> Tensor:
        if random.random() > 2 or np.random.rand() > 2:
            return x
        return F.dropout(super().body(x))


@pytest.mark.parametrize("build", [Small, _Decides, _Drops, lambda: create("cifar_resnet20", num_classes=10)])
def test_profiling_leaves_the_model_as_it_was(build: Any) -> None:
    model, batch = build(), zoo.images(2, 32)
    list(model.children())[1].eval()
    first = next(model.parameters())
    first.grad = torch.ones_like(first)
    model_before = copy.deepcopy(model.state_dict())
    attributes = {name: set(module.__dict__) for name, module in model.named_modules()}
    training = [module.training for module in model.modules()]
    batch_before, rng = batch.clone(), torch.get_rng_state()
    python, numpy = random.getstate(), np.random.get_state()[1].copy()
    profile(model, (batch,))
    assert_equal(dict(model.state_dict()), dict(model_before))
    assert {name: set(module.__dict__) for name, module in model.named_modules()} == attributes or build is _Decides
    assert [module.training for module in model.modules()] == training
    assert torch.equal(first.grad, torch.ones_like(first))
    assert len(gradients(model)) == 1
    assert torch.equal(batch, batch_before)
    assert torch.equal(torch.get_rng_state(), rng)
    assert random.getstate() == python
    assert (np.random.get_state()[1] == numpy).all()
    assert not torch.nn.modules.module._global_forward_hooks
    assert not torch.nn.modules.module._global_forward_pre_hooks


def test_a_compiled_model_is_refused() -> None:
    images = torch.rand(2, 3, 8, 8)
    with pytest.raises(ConfigError, match="the model is compiled, and cannot be cut. Give the module"):
        profile(torch.compile(Small()), (images,))
    part, whole = Small(), Small()
    part.b = torch.compile(part.b)
    with pytest.raises(ConfigError, match=r"Small: its sub-module 'b' is compiled"):
        profile(part, (images,))
    whole.compile()
    with pytest.raises(ConfigError, match=r"the model is compiled.* Leave out its \.compile\(\)"):
        profile(whole, (images,))


def test_data_dependent_control_flow_falls_back_to_the_real_model() -> None:
    decides, plain = _Decides(), Small()
    found = profile(decides, (batch := zoo.images(2, 8),))
    assert decides.calls > 0
    wanted = profile(plain, (batch,))
    # looking at the weight is an operation of the glue, so the unit behind it is not chained
    assert [dataclasses.replace(u, chained=False) for u in found.units] == [
        dataclasses.replace(u, chained=False) for u in wanted.units
    ]
    assert found.crossing == wanted.crossing


def test_fake_profiling_runs_nothing_of_the_real_model() -> None:
    class Counts(Small):
        calls: ClassVar[list[bool]] = []

        def body(self, x: Tensor) -> Tensor:
            self.calls.append(type(x) is Tensor)
            return super().body(x)

    profile(Counts(), (zoo.images(2, 8),))
    assert Counts.calls
    assert not any(Counts.calls)


def test_a_model_that_writes_into_its_input() -> None:
    class Writes(Small):
        def forward(self, x: Tensor) -> Tensor:
            x *= 2
            return super().forward(x)

    batch = zoo.images(2, 8)
    before = batch.clone()
    assert profile(Writes(), (batch,)).writes_input
    assert profile(Writes(), (batch,), units=Small.units).writes_input
    assert torch.equal(batch, before)
    assert not profile(Small(), (batch,)).writes_input


def test_a_forward_that_was_overridden_on_the_instance() -> None:
    model, batch = Small(), zoo.images(2, 8)
    mine = model.b.forward
    model.b.forward = lambda x: mine(x) * 2
    before = copy.deepcopy({k: v for k, v in model.state_dict().items()})
    found = profile(model, (batch,))
    assert found.names == ["stem", "a", "b", "c", "d", "head"]
    assert found.unit("b").flops == found.unit("c").flops
    assert_equal(dict(model.state_dict()), before)


def test_frozen_first_units_are_not_cuttable() -> None:
    model = Small()
    for module in (model.stem, model.a):
        module.requires_grad_(False)
    found = profile(model, (zoo.images(2, 8),))
    assert found.cuttable == ["c", "d", "head"]
    with torch.no_grad():
        assert profile(model, (zoo.images(2, 8),)).cuttable == ["c", "d", "head"], "whatever the caller's mode is"
