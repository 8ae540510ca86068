"""Auxiliary networks of the same structure drawn together."""

from __future__ import annotations

import weakref
from collections.abc import Iterable

import torch
from torch import nn

__all__ = ["draw_together"]

_STRUCTURES: weakref.WeakKeyDictionary[nn.Module, str] = weakref.WeakKeyDictionary()


@torch.no_grad()
def draw_together(networks: Iterable[nn.Module], share: float) -> None:
    """Three or more networks of the same structure move this share of the way to their mean, their buffers do not.

    Elastic averaging (Zhang, Choromanska & LeCun 2015, arXiv 1412.6651), among networks that learn from different
    blocks instead of different data.
    """
    alike: dict[str, list[nn.Module]] = {}
    for network in networks:
        if network not in _STRUCTURES:
            shapes = [(name, tuple(parameter.shape)) for name, parameter in network.named_parameters()]
            _STRUCTURES[network] = f"{network!r} {shapes}"
        alike.setdefault(_STRUCTURES[network], []).append(network)
    for group in alike.values():
        for together in zip(*(network.parameters() for network in group), strict=True) if len(group) > 2 else ():
            mean = sum(together[1:], start=together[0].detach()) / len(together)
            for parameter in together:
                parameter.lerp_(mean, share)
