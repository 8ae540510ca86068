"""What each possible block of a model would need, estimated from a few dry runs: what cuts are chosen by.

A block from unit i to unit j holds, at its peak, the tensors that enter it, what its units save, and either its
auxiliary network or what the backward pass of its last unit needs on top; further back in the block, less is saved and
the gradients of the weights behind have come. The planner checks the outcome with the learner's real step.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Mapping, Sequence

from glcan.cost.cuts import BlockCost, chains, cut_places
from glcan.inspect.profile import Profile

__all__ = ["AuxiliaryCost", "Estimate", "Piece"]


@dataclasses.dataclass(frozen=True)
class AuxiliaryCost:
    """What an auxiliary network needs for its own forward and backward pass.

    Attributes:
        activation_bytes: its peak, the gradient of the boundary included.
        flops: forward and backward.
        parameters: number of elements.
    """

    activation_bytes: int
    flops: int
    parameters: int


@dataclasses.dataclass(frozen=True)
class Piece:
    """What a piece of the model between two places to cut needs when it is trained by itself.

    Attributes:
        backward_bytes: peak beyond what enters the piece and what it saves.
        cut_flops: FLOPs that are saved when a block begins here, because nobody wants the gradient of what enters.
    """

    backward_bytes: int
    cut_flops: int


class Estimate:
    """Bytes and FLOPs of every block that a model could be cut into.

    Args:
        profile: of the model.
        pieces: what `glcan.strategies.pieces` measured; a piece that is missing there needs twice its output.
        auxiliary: what auxiliary networks need, likewise; empty for none.
        gradients: whether those of the weights count, too.
    """

    def __init__(
        self,
        profile: Profile,
        pieces: Mapping[str, Piece] | None = None,
        auxiliary: Mapping[str, AuxiliaryCost] | None = None,
        gradients: bool = True,
    ) -> None:
        self.profile = profile
        self.auxiliary = auxiliary or {}
        self._places = cut_places(profile)
        runs = [profile.units[a:b] for a, b in itertools.pairwise(self._places)]
        self._saved = [profile.saved_bytes(a, b) for a, b in itertools.pairwise(self._places)]
        self._output = [run[-1].output.bytes if run[-1].output else 0 for run in runs]
        self._gradients = [4 * sum(u.parameters for u in run) if gradients else 0 for run in runs]
        self._flops = [sum(u.flops for u in run) for run in runs]
        self._entering = [sum(f.bytes for f in run[0].entering) if i else 0 for i, run in enumerate(runs)]
        known = [(pieces or {}).get(run[0].name) for run in runs]
        self._backward = [p.backward_bytes if p else 2 * out for p, out in zip(known, self._output, strict=True)]
        self._cut_flops = [p.cut_flops if p else 0 for p in known]
        self._joins = [all(unit.chained for unit in run) for run in runs]  # can be recomputed with what is before it
        self.block_bytes: BlockCost = functools.cache(self._block_bytes)
        self.recomputed_bytes: BlockCost = functools.cache(self._recomputed_bytes)

    def _after(self, j: int) -> int:
        """Bytes of the auxiliary network of a block that ends at place j."""
        cost = self.auxiliary.get(self.profile.units[self._places[j]].name) if j < len(self._saved) else None
        return cost.activation_bytes if cost else 0

    def _block_bytes(self, i: int, j: int) -> int:
        """Peak of the activations and gradients of the block from place i to place j."""
        return self._peak(i, j, [])

    def _recomputed_bytes(self, i: int, j: int) -> int:
        """The same where all units' activations are recomputed."""
        return self._peak(i, j, [(k, k + 1) for k in range(i, j)])

    def end(self, i: int, stop: int, bound: float) -> tuple[int, list[tuple[int, int]]]:
        """The same of the last block, from place i, where what comes before place ``stop`` is recomputed, and how.

        It is recomputed in segments, each as long as the bound on the block's bytes allows: the longer, the fewer
        tensors are kept. That costs nothing where the block begins, since all behind is freed by the time when a
        segment is computed again.

        Returns:
            The bytes, and the places where each segment begins and ends.
        """
        segments: list[tuple[int, int]] = []
        for k in range(i, stop):
            longer = [*segments[:-1], (segments[-1][0], k + 1)] if segments and self._joins[k] else []
            fits = longer and self._entering[i] + self._inside(i, k + 1, longer)[1] <= bound
            segments = longer if fits else [*segments, (k, k + 1)]
        return self._peak(i, len(self._saved), segments), segments

    def _peak(self, i: int, j: int, segments: Sequence[tuple[int, int]]) -> int:
        """Peak of the block from place i to place j. Of segments that are recomputed, only what enters them is kept."""
        kept, inside = self._inside(i, j, segments)
        return self._entering[i] + max(inside, kept + self._after(j))

    def _inside(self, i: int, j: int, segments: Sequence[tuple[int, int]]) -> tuple[int, int]:
        """What is kept where the block's forward pass ends, and the most that the backward pass needs before that.

        What the block hands on is alive all the time; a unit that saves it otherwise makes it a second time here.
        """
        last = bool(segments) and segments[-1][1] == j < len(self._saved)
        kept, inside, k = self._output[j - 1] if last else 0, 0, i
        ends = dict(segments)
        while k < j:
            end = ends.get(k, k + 1)
            now, most = 0, 0
            for n in range(k, end):
                now += self._saved[n]
                most = max(most + self._gradients[n], now + self._backward[n])
            if k in ends:
                kept += self._entering[k] if k > i else 0
                inside = max(inside + sum(self._gradients[k:end]), kept + most)
            else:
                inside = max(inside + self._gradients[k], kept + most)
                kept += now
            k = end
        return kept, inside

    def least(self) -> tuple[int, list[list[str]]]:
        """What to recompute for the fewest bytes where the whole model is one block, and these bytes.

        Chains of units, each as long as the bytes allow. What is at the model's end is not recomputed where its
        activations hold no more than the other chains need in any case: that would only cost FLOPs.
        """
        count = len(self._saved)
        runs = [self.profile.units[a:b] for a, b in itertools.pairwise(self._places)]
        parted = (k for k, run in enumerate(runs) if any(unit.name in self.profile.parted for unit in run))
        most = next(parted, count)
        low, high = 0, self._peak(0, count, [])
        while high - low > max(1, high // 256):
            middle = (low + high) // 2
            if self.end(0, most, middle)[0] <= middle:
                high = middle
            else:
                low = middle
        options = [(self.end(0, most, high)[0], most, high), (self.recomputed_bytes(0, most), most, 0)]
        options += [(self.end(0, most, bound)[0], most, bound) for bound in (high // 2, high * 3 // 4)]
        peak, stop, bound = min(options)
        while stop and self.end(0, stop - 1, bound)[0] <= peak:
            stop -= 1
        return peak, [chain for a, b in self.end(0, stop, bound)[1] for chain in chains(runs[a:b])]

    def extra_flops(self, i: int, j: int) -> int:
        """FLOPs of the block from place i to place j beyond its share of end-to-end training; may be negative."""
        cost = self.auxiliary.get(self.profile.units[self._places[j]].name) if j < len(self._saved) else None
        return (cost.flops if cost else 0) - self._cut_flops[i]

    def forward_flops(self, i: int, j: int) -> int:
        """Forward FLOPs of the block's units: what recomputing them costs."""
        return sum(self._flops[i:j])
