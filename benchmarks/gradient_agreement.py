"""How much a block's local gradient has to do with the gradient of the model's own loss, which it stands in for.

A model is trained in blocks by auxiliary networks. Then, for groups of a few training images each, the gradient of
every block but the last one is taken twice, from its local loss and by plain back-propagation of the model's loss, and
over the groups their correlation is computed (of all of the block's weights together, each gradient less its mean over
the groups). Its square is the share of the true gradient's variance that the local one could explain. The cosine of the
two means says whether they agree on where to go on average.

    python benchmarks/gradient_agreement.py                       # the three tasks; a quarter of an hour on one core
    python benchmarks/gradient_agreement.py --tasks detection --groups 20
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from glcan import Learner
from glcan.training import RunConfig, build, environment, load_data, train
from glcan.training.building import to_device
from glcan.training.checkpoint import load
from glcan.training.run import write_json

OUT = Path(__file__).parent / "results" / "gradient_agreement.json"


@dataclasses.dataclass(frozen=True)
class Case:
    """What is trained, and how many images a group has."""

    settings: dict[str, Any]
    group: int


CASES = {
    "classification": Case(
        {
            "model": "cifar_resnet32",
            "data": "fashion-mnist",
            "limit": 20000,
            "epochs": 2,
            "batch": 128,
            "lr": 0.2,
            "channels_last": True,
            "precision": "bf16",
        },
        32,
    ),
    "super-resolution": Case({"task": "super-resolution"}, 2),
    "detection": Case({"task": "detection", "epochs": 8}, 4),
}


def measure(case: Case, method: str, groups: int, folder: Path) -> dict[str, Any]:
    """Train, and compare the gradients of each block but the last one."""
    config = RunConfig(**case.settings, method=method)
    summary = train(config, folder, resume=True)
    data = load_data(config)
    learner = build(config, data)
    learner.load_state_dict(load(folder / "checkpoint.pt")["learner"])
    learner.train()
    device = next(learner.model.parameters()).device
    layout = torch.channels_last if config.channels_last else torch.contiguous_format
    loader = data.loader("train", case.group, epoch=config.epochs)
    batches = [to_device(batch, device, layout) for batch in itertools.islice(loader, groups)]
    whole = Learner(learner.model, learner.task, batches[0], method="e2e", autocast=learner.autocast).train()
    local: list[list[Tensor]] = []
    true: list[list[Tensor]] = []
    for batch in batches:
        learner.backward(*batch)
        local.append(_taken(learner))
        whole.backward(*batch)
        true.append(_taken(learner))
    blocks = []
    for name, ours, theirs in zip(learner.plan.names, zip(*local, strict=True), zip(*true, strict=True), strict=True):
        if name in learner.auxiliary:
            blocks.append({"block": name} | _compared(torch.stack(ours), torch.stack(theirs)))
    return {
        "method": method,
        "group": case.group,
        "groups": len(local),
        "train_loss": summary.train_loss,
        summary.metric.name: summary.metric.value,
        "blocks": blocks,
        "config": config.model_dump(mode="json", exclude={"data_root"}),
    }


def _taken(learner: Learner) -> list[Tensor]:
    """The gradient of each block's weights of the model, as one vector; none is left."""
    found = []
    for unit in learner.plan.units:
        parameters = [p for u in unit for p in learner.model.get_submodule(u.name).parameters() if p.requires_grad]
        found.append(torch.cat([_flat(p) for p in parameters]) if parameters else torch.zeros(1))
    learner.model.zero_grad()
    learner.auxiliary.zero_grad()
    return found


def _flat(parameter: nn.Parameter) -> Tensor:
    gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    return gradient.detach().flatten().double().cpu()


def _compared(local: Tensor, true: Tensor) -> dict[str, float]:
    """Of gradients [groups, weights]."""
    mean, other = local.mean(0), true.mean(0)
    a, b = local - mean, true - other
    return {
        "correlation": float((a * b).sum() / (a.square().sum() * b.square().sum()).sqrt()),
        "cosine_of_means": float(torch.cosine_similarity(mean, other, dim=0)),
        "norm_of_means_true_over_local": float(other.norm() / mean.norm()),
        "variance_true_over_local": float(b.square().sum() / a.square().sum()),
    }


def main() -> None:
    """Measure, and write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--method", default="glcan:4", help="of local learning (default: %(default)s)")
    parser.add_argument("--groups", type=int, default=60, help="of images (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=OUT, help="default: %(default)s")
    options = parser.parse_args()
    results = json.loads(options.out.read_text(encoding="utf-8")) if options.out.exists() else {}
    for name in options.tasks:
        with tempfile.TemporaryDirectory() as folder:
            results[name] = measure(CASES[name], options.method, options.groups, Path(folder))
        for block in results[name]["blocks"]:
            print(name, block)
        results["environment"] = environment()
        write_json(options.out, results)


if __name__ == "__main__":
    main()
