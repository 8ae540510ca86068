"""Which images of a batch are back-propagated: those whose gradient is large.

Source: importance sampling by the gradient at the network's end, Katharopoulos & Fleuret 2018 (arXiv 1803.00942,
section 3.2). Deviations: images of one batch, without replacement, and nothing that a shuffled loader did not draw.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["choose", "fraction", "sizes_of"]

# A gradient at the outputs says only about how large those before it are, so no image's probability is much smaller
# than the others': this share of the mean size is added to each.
_FLOOR = 0.1
# Rounds in which probabilities above 1 are cut off there, and the others raised instead.
_ROUNDS = 8
_BITS = 0xFFFFFFFF


def fraction(count: Tensor) -> Tensor:
    """A number in [0, 1) for each count (int64): a hash, the finalizer of MurmurHash3 (Appleby 2008).

    Nothing is drawn and nothing read from the device, so that a CUDA graph can be replayed and a run resumed.
    """
    hashed = count * 0x9E3779B9 & _BITS
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        hashed = (hashed ^ hashed >> shift) * factor & _BITS
    return (hashed ^ hashed >> 16).to(_widest(count)) / 2**32


def choose(sizes: Tensor, count: int, start: Tensor) -> tuple[Tensor, Tensor]:
    """Some images, with probabilities in proportion to their gradients' sizes.

    One is taken wherever the running sum of the probabilities passes a whole number plus ``start`` (systematic
    sampling; Madow 1949).

    Args:
        sizes: [B], norms of the gradients; what is not finite counts as 0.
        count: how many, from 1 to B.
        start: scalar in [0, 1), of `fraction`.

    Returns:
        Their places [count], int64, ascending, and the weights [count] of their gradients: one by the probability.
    """
    sizes = sizes.to(_widest(sizes)).nan_to_num(0.0, 0.0, 0.0)
    tiny = torch.finfo(torch.float32).tiny
    sizes = sizes + _FLOOR * sizes.mean() + tiny  # with all of them 0, every image is as good as another
    certain = torch.zeros_like(sizes, dtype=torch.bool)
    probabilities = sizes
    for _ in range(_ROUNDS):
        others = sizes.masked_fill(certain, 0.0)
        share = (count - certain.sum()) / others.sum().clamp_min(tiny)
        probabilities = torch.where(certain, torch.ones_like(sizes), others * share)
        certain = probabilities >= 1
    probabilities = probabilities.clamp(max=1.0)
    sums = probabilities.cumsum(0)
    sums = sums * (count / sums[-1])
    steps = torch.arange(count, device=sums.device, dtype=sums.dtype) + start.to(sums)
    places = torch.searchsorted(sums, steps, right=True).clamp(max=len(sizes) - 1)
    return places, 1 / probabilities[places]


def sizes_of(gradients: Sequence[Tensor]) -> Tensor:
    """The norm of each image's gradient [B], over all tensors [B, ...]."""
    wide = [torch.promote_types(g.dtype, torch.float32) for g in gradients]
    norms = [
        torch.linalg.vector_norm(g.flatten(1), dim=1, dtype=dtype) for g, dtype in zip(gradients, wide, strict=True)
    ]
    return torch.stack(norms).norm(dim=0)


def _widest(like: Tensor) -> torch.dtype:
    """Running sums of thousands of images need more digits than float32 has; Apple's GPUs have no more."""
    return torch.float32 if like.device.type == "mps" else torch.float64
