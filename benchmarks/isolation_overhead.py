"""What the interception of operations costs in itself: a ResNet-50 training step under `Isolation`, and without it.

Three variants of the same step (forward, loss, backward, SGD) take turns, so that drift of the machine meets all alike:

- plain: the model as it is;
- isolated, no cuts: every wrapper and the mode are active, and the computation is exactly the plain one. The ratio of
  this one to plain, within each round, is the cost asked for; at most 1.03 is accepted;
- isolated, three cuts: four blocks, each sent a fixed gradient at its boundary. It does plain's work except for the
  gradients of three block inputs, and is there to show that twins and boundaries add nothing.

A ratio of two noisy times cannot show microseconds, so the interception is also timed alone: the same model with every
unit replaced by a stored output, which leaves the glue, the wrappers and the mode.

    python benchmarks/isolation_overhead.py            # about three minutes on two cores
    python benchmarks/isolation_overhead.py --device cuda --rounds 100
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

from glcan.cost.cuts import make_plan
from glcan.inspect.isolation import Boundary, Isolation
from glcan.inspect.record import profile
from glcan.inspect.tensors import overridden
from glcan.training import environment

RESULTS = Path(__file__).parent / "results"
ACCEPTED_RATIO = 1.03
BLOCKS = 4


def main() -> None:
    """Measure, write the JSON file and say what came out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--image-size", type=int, default=224, help="pixels (default: 224)")
    parser.add_argument("--rounds", type=int, default=20, help="steps of each variant (default: 20)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads (default: torch's)")
    parser.add_argument("--out", type=Path, default=RESULTS / "isolation_overhead.json")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)

    torch.manual_seed(0)
    model = torchvision.models.resnet50().to(options.device)
    images = torch.randn(options.batch, 3, options.image_size, options.image_size, device=options.device)
    labels = torch.randint(0, 1000, (options.batch,), device=options.device)
    found = profile(model, (images[:2],))
    units, cuts = found.names, make_plan(found, blocks=BLOCKS).cuts

    variants = {
        "plain": Step(model, images, labels, None),
        "isolated_no_cuts": Step(model, images, labels, Isolation(model, units)),
        "isolated_three_cuts": Step(model, images, labels, Isolation(model, units, cuts)),
    }
    seconds = interleave(variants, options.rounds, options.device)
    glue = time_glue(model, images, units, options.device)

    plain = statistics.median(seconds["plain"])
    ratios = {
        name: statistics.median(a / b for a, b in zip(values, seconds["plain"], strict=True))
        for name, values in seconds.items()
        if name != "plain"
    }
    fastest = {name: min(values) / min(seconds["plain"]) for name, values in seconds.items() if name != "plain"}
    overhead = glue["isolated"] - glue["plain"]
    result = {
        "benchmark": "isolation_overhead",
        "command": " ".join(["python", "benchmarks/isolation_overhead.py", *sys.argv[1:]]),
        "model": "torchvision/resnet50",
        "units": len(units),
        "cuts": cuts,
        "batch": options.batch,
        "image_size_px": options.image_size,
        "rounds": options.rounds,
        "threads": torch.get_num_threads(),
        "step_seconds": {name: {"median": statistics.median(v), "values": v} for name, v in seconds.items()},
        "ratio_to_plain": ratios,
        "ratio_to_plain_of_the_fastest_steps": fastest,
        "interception_alone": {
            "plain_microseconds": 1e6 * glue["plain"],
            "isolated_microseconds": 1e6 * glue["isolated"],
            "overhead_microseconds_per_step": 1e6 * overhead,
            "overhead_share_of_plain_step": overhead / plain,
        },
        "accepted_ratio": ACCEPTED_RATIO,
        "environment": environment(),
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=2) + "\n")

    print(f"plain step: {plain:.3f} s (median of {options.rounds})")
    for name, ratio in ratios.items():
        print(f"{name}: {ratio:.4f} x plain (fastest steps: {fastest[name]:.4f})")
    print(f"interception alone: {1e6 * overhead:.0f} us a step, {100 * overhead / plain:.3f} % of a plain step")
    verdict = "within" if ratios["isolated_no_cuts"] <= ACCEPTED_RATIO else "ABOVE"
    print(f"{verdict} the accepted {ACCEPTED_RATIO} x; written to {options.out}")


class Step:
    """One training step of one variant; all variants share the model and the batch."""

    def __init__(self, model: nn.Module, images: Tensor, labels: Tensor, isolation: Isolation | None) -> None:
        self.model, self.images, self.labels, self.isolation = model, images, labels, isolation
        self.optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
        self.gradients: dict[int, tuple[Tensor, ...]] = {}
        if isolation is not None:
            isolation.on_boundary = self.backward

    def __call__(self) -> None:
        """Forward, loss, backward and update."""
        self.optimizer.zero_grad(set_to_none=True)
        if self.isolation is None:
            F.cross_entropy(self.model(self.images), self.labels).backward()
        else:
            with self.isolation as isolation:
                loss = F.cross_entropy(self.model(self.images), self.labels)
                with isolation.replay():
                    loss.backward()
        self.optimizer.step()

    def backward(self, boundary: Boundary) -> None:
        """Send the finished block a gradient that was made once and costs nothing in the timed steps."""
        if boundary.block not in self.gradients:
            self.gradients[boundary.block] = tuple(torch.full_like(t, 1e-6) for t in boundary.entering)
        torch.autograd.backward(boundary.entering, self.gradients[boundary.block])


def interleave(variants: dict[str, Step], rounds: int, device: str) -> dict[str, list[float]]:
    """Time every variant once in each round, two unmeasured rounds first; every other round runs backwards."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for i in range(-2, rounds):
        for name in list(variants) if i % 2 else reversed(variants):
            duration = time_once(variants[name], device)
            if i >= 0:
                seconds[name].append(duration)
    return seconds


def time_once(call: Callable[[], object], device: str) -> float:
    """Wall-clock seconds of one call, the device's own work included."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter() - start


def time_glue(model: nn.Module, images: Tensor, units: list[str], device: str, calls: int = 500) -> dict[str, float]:
    """Median seconds of a forward whose units return stored outputs, plain and under isolation without cuts."""
    isolation = Isolation(model, units)

    def isolated() -> None:
        with isolation:
            model(images)

    with stored_outputs(model, images, units):
        seconds: dict[str, list[float]] = {"plain": [], "isolated": []}
        for i in range(-20, calls):
            plain, under = time_once(functools.partial(model, images), device), time_once(isolated, device)
            if i >= 0:
                seconds["plain"].append(plain)
                seconds["isolated"].append(under)
    return {name: statistics.median(values) for name, values in seconds.items()}


@contextmanager
def stored_outputs(model: nn.Module, images: Tensor, units: list[str]) -> Iterator[None]:
    """Inside, each unit returns at once what it returned for these images."""
    outputs: dict[str, Tensor] = {}

    def store(name: str, _module: nn.Module, _args: Any, output: Tensor) -> None:
        outputs[name] = output.detach().requires_grad_()

    modules = {name: model.get_submodule(name) for name in units}
    hooks = [module.register_forward_hook(functools.partial(store, name)) for name, module in modules.items()]
    with torch.no_grad():
        model(images)
    for hook in hooks:
        hook.remove()
    with overridden((module, lambda *_args, output=outputs[name]: output) for name, module in modules.items()):
        yield


if __name__ == "__main__":
    main()
