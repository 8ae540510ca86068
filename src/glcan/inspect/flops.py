"""Floating-point operations of each operator: a multiply-add counts as two.

PyTorch's own formulas, but for two. The backward pass of a convolution: PyTorch's formula ignores ``groups`` for the
gradient of the weights (seen up to torch 2.12: torch/utils/flop_counter.py, `conv_backward_flop`), which makes a
depthwise convolution as expensive as a full one; each of the two gradients has as many products as the forward pass.
And the CPU's fused attention, which the registry leaves out.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import conv_flop_count, flop_registry, sdpa_backward_flop_count, sdpa_flop_count

__all__ = ["FLOPS"]


def _attention(query: Tensor, key: Tensor, value: Tensor, *args: Any, out_val: Any = None, **kwargs: Any) -> int:
    return sdpa_flop_count(query.shape, key.shape, value.shape)


def _attention_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *args: Any, out_val: Any = None, **kwargs: Any
) -> int:
    return sdpa_backward_flop_count(grad.shape, query.shape, key.shape, value.shape)


def _convolution_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    transposed: bool,
    output_padding: Any,
    groups: int,
    output_mask: Any,
    *,
    out_val: Any = None,
) -> int:
    forward: int = conv_flop_count(list(x.shape), list(weight.shape), list(grad.shape), transposed=transposed)
    return forward * (bool(output_mask[0]) + bool(output_mask[1]))


def _counts() -> dict[Any, Any]:
    counts = dict(flop_registry)
    aten = torch.ops.aten
    counts[aten.convolution_backward] = _convolution_backward
    counts.setdefault(aten._scaled_dot_product_flash_attention_for_cpu, _attention)
    counts.setdefault(aten._scaled_dot_product_flash_attention_for_cpu_backward, _attention_backward)
    return counts


#: For each operator that is counted: ``count(*args, out_val=result, **kwargs)``.
FLOPS = _counts()
