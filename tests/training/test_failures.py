"""What cannot work is said before training starts; what goes wrong later leaves the last good checkpoint."""

import math
import re

import pytest
import torch

from glcan.errors import ConfigError, CutError, DataError, GlcanError, NonFiniteLoss, UnknownName
from glcan.training import train


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"model": "cifar_resnet21"}, UnknownName, "Did you mean .*'cifar_resnet20'"),
        ({"data": "digit"}, UnknownName, "Did you mean 'digits'"),
        ({"method": "glcann:2"}, UnknownName, "Did you mean 'glcan'"),
        ({"model": "tiny_model:colour_only"}, ConfigError, r"refuses images of 'digits' with .* \(1, 16, 16\)"),
        ({"model": "tiny_model:wrong_classes"}, ConfigError, r"gives \(2, 7\) .* needs scores of shape \(2, 10\)"),
        ({"method": "glcan:99"}, CutError, "99"),
        ({"cuts": ["9.conv"]}, GlcanError, "9.conv"),
        ({"device": "cuda:77"}, ConfigError, "cuda:77"),
        ({"val": 5000}, GlcanError, "5000"),
    ],
)
def test_nothing_is_written_before_the_settings_work(tiny, tmp_path, fields, error, message):
    with pytest.raises(error, match=message):
        train(tiny(**fields), tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def test_a_loss_that_is_not_finite(tiny, tmp_path, before_step):
    def poison(learner):
        next(learner.model.parameters()).data.fill_(math.nan)

    before_step(5, poison)
    with pytest.raises(NonFiniteLoss, match=r"The loss of block1 became nan at step 5 \(epoch 2, lr 0.05\)") as failure:
        train(tiny(), tmp_path, progress=False)
    assert re.search(r"stays in .* set --clip-norm 1, lower --lr, or raise --warmup-epochs", str(failure.value))
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert state["progress"]["step"] == 3
    assert all(torch.isfinite(tensor).all() for tensor in state["learner"]["model"].values())


def test_a_learning_rate_that_is_too_high(tiny, tmp_path):
    with pytest.raises(NonFiniteLoss, match="Start again with another --out"):
        train(tiny(lr=1e30, warmup_epochs=0), tmp_path, progress=False)


def test_a_weight_that_is_not_finite_is_not_saved(tiny, tmp_path, before_step):
    def poison(learner):
        step = learner.optimizers[-1].step

        def stepped(*args, **kwargs):
            step(*args, **kwargs)
            learner.optimizers[-1].param_groups[0]["params"][0].data.fill_(math.inf)

        learner.optimizers[-1].step = stepped

    before_step(6, poison)  # the last of the second epoch
    with pytest.raises(NonFiniteLoss, match=r"became NaN or infinite by step 6|loss became nan after step 6"):
        train(tiny(), tmp_path, progress=False)
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["progress"]["step"] == 3


def test_data_that_changed_under_a_run(tiny, tmp_path, monkeypatch):
    from glcan.training import trainer

    train(tiny(epochs=1), tmp_path, progress=False)
    (tmp_path / "summary.json").unlink()
    smaller = trainer.load_data(tiny(limit=64))
    monkeypatch.setattr(trainer, "load_data", lambda config: smaller)
    with pytest.raises(DataError, match="has another size now"):
        train(tiny(epochs=1), tmp_path, resume=True, progress=False)
