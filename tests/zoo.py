"""Models from other people's libraries that the core is proved on, with small inputs, and small ones of our own."""

from __future__ import annotations

import dataclasses
import warnings
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glcan.inspect.isolation import Isolation
from glcan.inspect.profile import Profile
from glcan.inspect.tensors import tensors_in


def images(batch: int = 2, size: int = 64) -> Tensor:
    return torch.randn(batch, 3, size, size)


def torchvision(name: str, **options: Any) -> nn.Module:
    models = pytest.importorskip("torchvision.models")
    return getattr(models, name)(weights=None, **options)


def retinanet_backbone() -> nn.Module:
    detection = pytest.importorskip("torchvision.models.detection")
    return detection.retinanet_resnet50_fpn(weights=None, weights_backbone=None).backbone


def timm(name: str, **options: Any) -> nn.Module:
    return pytest.importorskip("timm").create_model(name, pretrained=False, **options)


def spandrel(name: str, **options: Any) -> nn.Module:
    pytest.importorskip("spandrel")
    module = pytest.importorskip(f"spandrel.architectures.{name}")
    return getattr(module, name)(**options)


def huggingface(kind: str, **options: Any) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        transformers = pytest.importorskip("transformers")
        config, model = {
            "vit": ("ViTConfig", "ViTForImageClassification"),
            "gpt2": ("GPT2Config", "GPT2LMHeadModel"),
            "llama": ("LlamaConfig", "LlamaForCausalLM"),
        }[kind]
        return getattr(transformers, model)(getattr(transformers, config)(**options))


def hf_vit(**options: Any) -> nn.Module:
    sizes = dict(num_hidden_layers=4, num_attention_heads=2, hidden_size=32, intermediate_size=64)
    return huggingface("vit", **(sizes | dict(image_size=32, patch_size=8, num_labels=10) | options))


def tokens() -> dict[str, Tensor]:
    return {"input_ids": torch.randint(0, 128, (2, 16))}


_WINDOWS = dict(img_size=32, embed_dim=24, window_size=8, upscale=2, upsampler="pixelshuffle", mlp_ratio=2)

ZOO: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any]]] = {
    "torchvision/resnet50": (lambda: torchvision("resnet50"), images),
    "torchvision/vit_b_16": (lambda: torchvision("vit_b_16", image_size=32), lambda: images(2, 32)),
    "torchvision/swin_t": (lambda: torchvision("swin_t"), images),
    "torchvision/convnext_tiny": (lambda: torchvision("convnext_tiny"), images),
    "torchvision/efficientnet_b0": (lambda: torchvision("efficientnet_b0"), images),
    "torchvision/densenet121": (lambda: torchvision("densenet121"), images),
    "torchvision/retinanet_backbone": (retinanet_backbone, images),
    "timm/resnet50": (lambda: timm("resnet50"), images),
    "timm/vit_small_patch16_224": (lambda: timm("vit_small_patch16_224", img_size=64), images),
    "timm/convnextv2_nano": (lambda: timm("convnextv2_nano"), images),
    "timm/swin_tiny": (lambda: timm("swin_tiny_patch4_window7_224"), lambda: images(1, 224)),
    "spandrel/RCAN": (
        lambda: spandrel("RCAN", scale=2, n_resgroups=4, n_resblocks=2, n_feats=16, reduction=4),
        lambda: images(2, 24),
    ),
    "spandrel/SwinIR": (
        lambda: spandrel("SwinIR", depths=[2, 2, 2, 2], num_heads=[2, 2, 2, 2], **_WINDOWS),
        lambda: images(1, 32),
    ),
    "spandrel/HAT": (
        lambda: spandrel("HAT", depths=(2, 2, 2, 2), num_heads=(2, 2, 2, 2), squeeze_factor=4, num_feat=16, **_WINDOWS),
        lambda: images(1, 32),
    ),
    "spandrel/NAFNet": (
        lambda: spandrel("NAFNet", width=8, middle_blk_num=1, enc_blk_nums=[1, 1, 1], dec_blk_nums=[1, 1, 1]),
        lambda: images(2, 32),
    ),
    "transformers/ViT": (hf_vit, lambda: {"pixel_values": images(2, 32)}),
    "transformers/GPT-2": (
        lambda: huggingface("gpt2", n_layer=4, n_head=2, n_embd=32, vocab_size=128, n_positions=64),
        tokens,
    ),
    "transformers/Llama": (
        lambda: huggingface(
            "llama",
            num_hidden_layers=4,
            num_attention_heads=2,
            num_key_value_heads=2,
            hidden_size=32,
            intermediate_size=64,
            vocab_size=128,
        ),
        tokens,
    ),
}


def call(model: nn.Module, batch: Any) -> Any:
    return model(**batch) if isinstance(batch, dict) else model(batch)


def copied(batch: Any) -> Any:
    """Some models write into their input."""
    return {name: value.clone() for name, value in batch.items()} if isinstance(batch, dict) else batch.clone()


def arguments(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return ((), batch) if isinstance(batch, dict) else ((batch,), {})


def loss_of(value: Any) -> Tensor:
    """Some scalar that every differentiable tensor in ``value`` has a part in, each another one."""
    terms = [(t.float() ** 2).mean() * (1 + i) for i, t in enumerate(tensors_in(value)) if t.requires_grad]
    return sum(terms, torch.zeros(()))


def evenly(names: list[str], blocks: int) -> list[str]:
    return [names[i * len(names) // blocks] for i in range(1, blocks)]


# -- the reference: one full graph, and autograd.grad for each block -----------------------------------------------


@dataclasses.dataclass
class Reference:
    output: Any
    losses: list[Tensor]
    gradients: dict[str, Tensor]


def reference(
    model: nn.Module, batch: Any, profile: Profile, cuts: list[str], entering: list[tuple[Tensor, ...]] | None = None
) -> Reference:
    """Local losses on the tensors that enter each cut, all on one graph, and each parameter's gradient.

    ``entering``: the values of those that belong to the ending block; none where all of them do.

    A block's graph ends at the tensors of older blocks. A parameter that several blocks use has the sum of the blocks'
    gradients, each through the block's own part of the graph: so the uses are told apart by giving each block its own
    alias of the parameter.
    """
    losses: list[Tensor] = []
    named = dict(model.named_parameters())
    aliases: list[dict[str, Tensor]] = [dict() for _ in range(len(cuts) + 1)]
    handles = []
    block = 0
    order = iter(cuts)
    following = next(order, None)
    again = [profile.units[i].name for i in set(profile.calls) if profile.calls.count(i) > 1]
    starts = [profile.calls.index(profile.unit(cut).index) for cut in cuts]
    glue = {n: {sum(start <= i for start in starts) for i in at} for n, at in profile.glue.items()}
    tied = {
        name: p
        for name, p in named.items()
        if len(_homes(model, p)) > 1
        or len(glue.get(name, ())) > 1
        or any(name.startswith(f"{unit}.") for unit in again)
    }

    def use_aliases() -> None:
        for name, p in tied.items():
            aliases[block][name] = alias = p.detach().requires_grad_(p.requires_grad)
            for module, attribute in _homes(model, p):
                module.__dict__[attribute] = alias  # before _parameters in the look-up of attributes

    def at_cut(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            nonlocal block, following
            if name == following:
                own = list({id(t): t for t in tensors_in((args, kwargs)) if t.requires_grad}.values())
                if entering is not None:
                    own = [next(t for t in own if torch.equal(t, value)) for value in entering[block]]
                losses.append(loss_of([t.clone() for t in own]))  # cloned: the unit may change them in place
                block += 1
                following = next(order, None)
                use_aliases()

        return hook

    for cut in cuts:
        handles.append(model.get_submodule(cut).register_forward_pre_hook(at_cut(cut), with_kwargs=True))
    try:
        use_aliases()
        output = call(model, copied(batch))
    finally:
        for handle in handles:
            handle.remove()
        for parameter in tied.values():
            for module, attribute in _homes(model, parameter):
                del module.__dict__[attribute]
    losses.append(loss_of(output))
    block_of: dict[str, int] = {}
    block = 0
    for unit in profile.units:
        block += block < len(cuts) and unit.name == cuts[block]
        for name, _ in model.get_submodule(unit.name).named_parameters(prefix=unit.name):
            block_of[name] = block
    owned = {k: {n: p for n, p in named.items() if block_of.get(n) == k and n not in tied} for k in range(len(losses))}
    for name, blocks in glue.items():
        if name not in tied:
            owned[next(iter(blocks))][name] = named[name]
    gradients: dict[str, Tensor] = {}
    for k, loss in enumerate(losses):
        own = {n: p for n, p in (owned[k] | aliases[k]).items() if p.requires_grad}
        if loss.requires_grad and own:
            found = torch.autograd.grad(loss, list(own.values()), retain_graph=True, allow_unused=True)
            for name, gradient in zip(own, found, strict=True):
                if gradient is not None:
                    gradients[name] = gradients[name] + gradient if name in gradients else gradient
    return Reference(output, losses, gradients)


def _homes(model: nn.Module, parameter: nn.Parameter) -> list[tuple[nn.Module, str]]:
    return [(m, a) for m in model.modules() for a, p in m._parameters.items() if p is parameter]


# -- small models of our own ---------------------------------------------------------------------------------------


class Residual(nn.Module):
    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.a = nn.Conv2d(channels, channels, 3, 1, 1)
        self.norm = nn.BatchNorm2d(channels)
        self.b = nn.Conv2d(channels, channels, 3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.b(F.relu(self.norm(self.a(x))))


class Small(nn.Module):
    """A stem, residual blocks a ... d and a head; derive from it and write another ``body``."""

    unit: type[nn.Module] = Residual
    units = ("stem", "a", "b", "c", "d", "head")

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 1, 1)
        self.a, self.b, self.c, self.d = (self.unit() for _ in range(4))
        self.head = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Any:
        return self.head(self.body(self.stem(x)).mean((2, 3)))

    def body(self, x: Tensor) -> Tensor:
        return self.d(self.c(self.b(self.a(x))))


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_equal(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """The same names, and bit-equal tensors."""
    assert found.keys() == wanted.keys()
    different = [name for name in wanted if not torch.equal(found[name], wanted[name])]
    assert not different, f"{len(different)} of {len(wanted)} differ: {different[:5]}"


def histogram(names: list[str]) -> dict[str, int]:
    counts: dict[str, int] = defaultdict(int)
    for name in names:
        counts[name.rstrip("0123456789").rstrip(".")] += 1
    return dict(counts)


def watched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of all operations that an `Isolation` will have looked at, as a list that grows."""
    seen: list[str] = []
    look = Isolation.__torch_function__

    def watch(self: Isolation, func: Any, *arguments: Any) -> Any:
        seen.append(func.__name__)
        return look(self, func, *arguments)

    monkeypatch.setattr(Isolation, "__torch_function__", watch)
    return seen
