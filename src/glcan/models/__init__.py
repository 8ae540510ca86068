"""Models by name: glcan's own, torchvision's, timm's, and the user's.

| name | model |
|---|---|
| `cifar_resnet20`, `32`, `56`, `110` | ResNets for small images (He et al. 2016), see `glcan.models.cifar_resnet` |
| `torchvision/NAME` | `torchvision.models.get_model(NAME)`, random weights |
| `timm/NAME` | `timm.create_model(NAME)`, random weights |
| `edsr_baseline`, `edsr` | super-resolution (Lim et al. 2017), see `glcan.models.edsr` |
| `spandrel/NAME` | super-resolution: RCAN, SwinIR, HAT and others, random weights, see `glcan.models.spandrel` |
| `torchvision/retinanet_...`, `retinanet_resnet18_fpn`, `fcos_small`, ... | detectors, see `glcan.models.detection` |
| `package.module:factory` | what the user's `factory(...)` returns |

Nothing is ever downloaded. torchvision, timm and spandrel are imported only when one of their models is asked for.
"""

from __future__ import annotations

import inspect
import math
from typing import Any

import torch
from torch import nn

from glcan.errors import ConfigError, UnknownName
from glcan.importing import import_path
from glcan.models import spandrel
from glcan.models.cifar_resnet import DEPTHS, CifarResNet
from glcan.models.detection import create_detector, detector_names, is_detector
from glcan.models.edsr import EDSR

__all__ = ["create", "detector_names", "is_detector", "names"]

_CIFAR = {f"cifar_resnet{depth}": depth for depth in DEPTHS}
_EDSR: dict[str, dict[str, Any]] = {
    "edsr_baseline": {"blocks": 16, "channels": 64},
    "edsr": {"blocks": 32, "channels": 256, "res_scale": 0.1},
}


def create(
    name: str,
    *,
    num_classes: int | None = None,
    in_channels: int = 3,
    image_size: int | None = None,
    scale: int | None = None,
    **options: Any,
) -> nn.Module:
    """Creates a model with random weights, drawn from torch's global random generator.

    Args:
        name: a name as in `names()`, or `package.module:factory` for a model of the user's own. The module is imported
            with the current directory importable. The factory is called with those of `num_classes`, `in_channels`,
            `image_size` and `scale` that its signature names (a `**kwargs` gets `num_classes` and `scale`, and
            `in_channels` when it is not 3) and with all `options`.
        num_classes: outputs of the classifier, of a detector the background included; None leaves the model's own
            default.
        in_channels: channels C of the images [B, C, H, W]. torchvision's models are made for 3: for another number the
            first convolution is replaced by one whose outputs have the same variance.
        image_size: H = W in pixels, for models that need to know it (ViT, Swin, MaxViT, ...); others ignore it.
        scale: factor of the super-resolution, 2, 3 or 4, for models that do it (by default 2); they ignore
            `num_classes`.
        options: passed on to the model's constructor.

    Raises:
        UnknownName: no such model (near matches are listed), or no such factory in its module.
        ConfigError: an option that the model does not take, a module that cannot be imported, a factory that does not
            return an `nn.Module`, a `scale` for a classifier.
    """
    numbers = {"num_classes": num_classes, "in_channels": in_channels, "image_size": image_size, "scale": scale}
    for label, value in numbers.items():
        if value is not None and value < 1:
            raise ConfigError(f"{label}={value} for the model {name!r}: it must be at least 1.")
    if ":" in name:
        return _own(name, numbers, options)
    if name in _EDSR or name.startswith(spandrel.PREFIX):
        return _super_resolution(name, in_channels, scale or 2, options)
    if scale is not None and (name in _CIFAR or name.startswith(("torchvision/", "timm/"))):
        raise ConfigError(
            f"The model {name!r} classifies images; super-resolution (scale={scale}) needs a model such as "
            "'edsr_baseline' or 'spandrel/SwinIR-light'."
        )
    if is_detector(name):
        return create_detector(name, num_classes=num_classes, in_channels=in_channels, image_size=image_size, **options)
    if name.startswith("torchvision/"):
        return _torchvision(name, num_classes, in_channels, image_size, options)
    if name.startswith("timm/"):
        return _timm(name, num_classes, in_channels, image_size, options)
    if name not in _CIFAR:
        known = [*names(), *detector_names()]
        same = [full for full in known if full.endswith(f"/{name}")]
        hint = f"Write {' or '.join(same)}." if same else "For a model of your own write package.module:factory."
        raise UnknownName("model", name, same or known, hint)
    try:
        return CifarResNet(_CIFAR[name], num_classes=num_classes or 10, in_channels=in_channels, **options)
    except TypeError as error:
        raise _bad_options(name, options, error) from error


def names() -> list[str]:
    """Names of all models; imports torchvision and timm to ask them."""
    import timm

    upscalers = (*_EDSR, *spandrel.names())
    return [*_CIFAR, *upscalers, *_torchvision_names(), *(f"timm/{name}" for name in timm.list_models())]


def _torchvision_names() -> list[str]:
    from torchvision import models

    return [f"torchvision/{name}" for name in models.list_models(module=models)]


def _bad_options(name: str, options: dict[str, Any], error: Exception) -> ConfigError:
    return ConfigError(f"The model {name!r} does not take the options {options}: {error}. Leave out what it lacks.")


def _super_resolution(name: str, in_channels: int, scale: int, options: dict[str, Any]) -> nn.Module:
    if in_channels != 3:
        raise ConfigError(f"The model {name!r} takes RGB images, in_channels=3, not {in_channels}.")
    if name not in _EDSR:
        return spandrel.create(name, scale=scale, **options)
    try:
        return EDSR(scale=scale, **(_EDSR[name] | options))
    except TypeError as error:
        raise _bad_options(name, options, error) from error


def _torchvision(
    name: str, num_classes: int | None, in_channels: int, image_size: int | None, options: dict[str, Any]
) -> nn.Module:
    from torchvision import models

    short = name.removeprefix("torchvision/")
    if f"torchvision/{short}" not in _torchvision_names():
        known = [*_torchvision_names(), *detector_names()]
        raise UnknownName("model", name, known, "Only torchvision's classifiers and box detectors.")
    given: dict[str, Any] = {} if num_classes is None else {"num_classes": num_classes}
    if image_size is not None and short.startswith("vit_"):
        given["image_size"] = image_size
    elif image_size is not None and short.startswith("maxvit"):
        given["input_size"] = (image_size, image_size)
    if short in ("googlenet", "inception_v3"):  # one output, as every other classifier; weights drawn as published
        given |= {"aux_logits": False, "init_weights": True}
    try:
        model: nn.Module = models.get_model(short, weights=None, **(given | options))
    except TypeError as error:
        if options:
            raise _bad_options(name, options, error) from error
        raise
    except (AssertionError, ValueError) as error:
        raise ConfigError(f"The model {name!r} cannot be made with {given | options}: {error}") from error
    if in_channels != 3:
        _replace_first_conv(model, name, in_channels)
    return model


def _replace_first_conv(model: nn.Module, name: str, in_channels: int) -> None:
    """Gives `model` a first convolution for `in_channels` channels, with the variance of its outputs kept."""
    path, conv = next(((p, m) for p, m in model.named_modules() if isinstance(m, nn.Conv2d)), ("", None))
    if conv is None or conv.in_channels != 3 or conv.groups != 1:
        raise ConfigError(
            f"The model {name!r} cannot take in_channels={in_channels}: its first convolution ({path or 'none'}) does "
            "not read the 3 channels of the image. Use a timm/ model, or in_channels=3."
        )
    new = nn.Conv2d(
        in_channels,
        conv.out_channels,
        conv.kernel_size,  # type: ignore[arg-type]
        stride=conv.stride,  # type: ignore[arg-type]
        padding=conv.padding,  # type: ignore[arg-type]
        dilation=conv.dilation,  # type: ignore[arg-type]
        bias=conv.bias is not None,
        padding_mode=conv.padding_mode,
    )
    with torch.no_grad():  # all of it on tensors, so that it works on the meta device too
        new.weight.normal_().mul_(conv.weight.std() * math.sqrt(3 / in_channels))
        if conv.bias is not None and new.bias is not None:
            new.bias.copy_(conv.bias)
    parent, _, attribute = path.rpartition(".")
    setattr(model.get_submodule(parent), attribute, new)


def _timm(
    name: str, num_classes: int | None, in_channels: int, image_size: int | None, options: dict[str, Any]
) -> nn.Module:
    import timm

    short = name.removeprefix("timm/")
    if not timm.is_model(short):
        raise UnknownName("model", name, (f"timm/{known}" for known in timm.list_models()))
    given: dict[str, Any] = {"in_chans": in_channels} | ({} if num_classes is None else {"num_classes": num_classes})
    published = timm.get_pretrained_cfg(short)
    fixed = published.input_size[-1] if published is not None and published.fixed_input_size else None
    if image_size is not None and fixed not in (None, image_size):
        given["img_size"] = image_size
    try:
        model: nn.Module = timm.create_model(short, pretrained=False, **(given | options))
    except TypeError as error:
        if options:
            raise _bad_options(name, options, error) from error
        if "img_size" in given:
            raise ConfigError(f"The model {name!r} takes images of {fixed} pixels only, not {image_size}.") from error
        raise
    except (AssertionError, ValueError) as error:
        raise ConfigError(f"The model {name!r} cannot be made with {given | options}: {error}") from error
    return model


def _own(name: str, numbers: dict[str, int | None], options: dict[str, Any]) -> nn.Module:
    """The user's own model."""
    factory = import_path(name, "model", "my.models:small_net")
    if isinstance(factory, nn.Module) or not callable(factory):
        raise ConfigError(
            f"{name!r} is {'an' if isinstance(factory, nn.Module) else 'no function but an'} object of type "
            f"{type(factory).__name__}. Give a function or class that makes a new nn.Module."
        )
    model = factory(**_accepted(name, factory, numbers, options))
    if not isinstance(model, nn.Module):
        raise ConfigError(f"The factory {name!r} returned {type(model).__name__}; it must return an nn.Module.")
    return model


def _accepted(name: str, factory: Any, numbers: dict[str, int | None], options: dict[str, Any]) -> dict[str, Any]:
    """What of the arguments to pass to the user's factory; ConfigError when they do not fit its signature."""
    try:
        signature = inspect.signature(factory)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"The factory {name!r} cannot be used: {error}. Wrap it in a function of your own."
        ) from error
    named = {
        key
        for key, parameter in signature.parameters.items()
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    }
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in signature.parameters.values()):
        named |= {"num_classes", "scale"} | ({"in_channels"} if numbers["in_channels"] != 3 else set())
    given = {key: value for key, value in numbers.items() if key in named and value is not None} | options
    try:
        signature.bind(**given)
    except TypeError as error:
        raise ConfigError(
            f"The factory {name!r} has the signature {signature} and cannot be called with {given}: {error}. "
            "Give what is missing as model options, leave out what it lacks."
        ) from error
    return given
