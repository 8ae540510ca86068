"""Gradients that cross a cut although they should not."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import Tensor, nn

__all__ = ["leaked_parameters"]


def leaked_parameters(loss: Tensor, allowed: Collection[nn.Parameter]) -> list[Tensor]:
    """The leaves that ``loss`` would send a gradient to although they are not in ``allowed``.

    Walks the autograd graph without running it, so nothing is computed or freed.

    Args:
        loss: scalar, with a graph.
        allowed: the parameters of the block (and of its auxiliary network) that the loss belongs to.
    """
    permitted = {id(p) for p in allowed}
    found: dict[int, Tensor] = {}
    seen: set[Any] = set()
    todo: list[Any] = [loss.grad_fn]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)  # AccumulateGrad
        if leaf is not None and id(leaf) not in permitted:
            found[id(leaf)] = leaf
        todo.extend(parent for parent, _ in node.next_functions)
    return list(found.values())
