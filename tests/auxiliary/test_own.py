"""A rule of a user's own, by import path: the example in docs/localbench.md, as it stands there."""

import re
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.optim import SGD

from glcan import Learner
from glcan.auxiliary import create as create_rule
from glcan.errors import ConfigError, UnknownName
from glcan.models import create
from glcan.training import RunConfig, train

DOCS = Path(__file__).parents[2] / "docs" / "localbench.md"


@pytest.fixture
def module(tmp_path, monkeypatch):
    (code,) = re.findall(r"```python\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.S)
    (tmp_path / "documented_rules.py").write_text(code + "\nnumber = 3\n")
    monkeypatch.syspath_prepend(tmp_path)
    return "documented_rules"


def test_the_documented_rule_trains(module):
    torch.manual_seed(0)
    images, labels = torch.randn(16, 1, 16, 16), torch.arange(16) % 4
    model = create("cifar_resnet20", num_classes=4, in_channels=1)
    learner = Learner(
        model,
        sample=(images, labels),
        method=f"{module}:Pooled:3",
        cuts=["layer2.1", "layer3.1"],
        options={"grid": 4},
        optimizer=partial(SGD, lr=0.05, momentum=0.9),
    )
    assert [a.linear.in_features for a in learner.auxiliary.values()] == [32 * 16, 64 * 16]
    losses = [learner.step(images, labels) for _ in range(15)]
    assert all(losses[-1][name] < 0.6 * losses[0][name] for name in ("block1", "block2", "block3"))


def test_a_run_takes_it_by_its_import_path(module, tmp_path):
    config = RunConfig(method=f"{module}:Pooled:2", epochs=1, limit=64, batch=32, device="cpu")
    summary = train(config, tmp_path / "run", progress=False)
    assert (summary.blocks, summary.auxiliary_parameters) == (2, 10 * (4 * 16 + 1))


def test_what_is_no_rule_is_refused(module):
    with pytest.raises(ConfigError, match=r"pooled.grid is 0; it must lie in 1 \.\.\. 16"):
        create_rule(f"{module}:Pooled", "classification", {"grid": 0})
    with pytest.raises(ConfigError, match="is no rule. Give a class that is derived from"):
        create_rule(f"{module}:number", "classification")
    with pytest.raises(UnknownName, match=f"Unknown rule '{module}:Poled'. Did you mean '{module}:Pooled'"):
        create_rule(f"{module}:Poled", "classification")
    with pytest.raises(ConfigError, match="no module 'nowhere' for the rule"):
        create_rule("nowhere:Rule", "classification")
