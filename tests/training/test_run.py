"""What a run leaves behind, and that it says what it did."""

import itertools
import json
import os

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from glcan.errors import CheckpointError, DataError
from glcan.training import (
    Summary,
    build,
    checkpoint,
    environment,
    evaluate,
    load_data,
    load_model,
    load_weights,
    read_metrics,
    train,
)
from glcan.training.schedule import learning_rate


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return tmp_path_factory.mktemp("run")


@pytest.fixture
def summary(tiny, out) -> Summary:
    """The summary of one run, trained once for this module."""
    return train(tiny(), out, resume=True, progress=False)


def test_files(summary, out):
    names = {"config.json", "metrics.jsonl", "tensorboard", "checkpoint.pt", "model.safetensors", "summary.json"}
    assert {path.name for path in out.iterdir()} - {".lock"} == names


def test_summary(summary, out, tiny):
    written = json.loads((out / "summary.json").read_text())
    assert written == summary.model_dump(mode="json")
    assert summary.config == tiny()
    assert (summary.metric.name, summary.metric.unit) == ("accuracy", "fraction")
    assert [metric.name for metric in summary.metrics] == ["accuracy", "accuracy_top5", "loss"]
    assert 0 <= summary.metric.value <= summary.metrics[1].value <= 1
    assert len(summary.val_metrics) == 3
    assert (summary.method, summary.blocks, len(summary.cuts)) == ("glcan:2", 2, 1)
    assert (summary.steps, summary.seed) == (9, 0)
    assert summary.parameters == sum(p.numel() for p in load_model(out, trust=True).parameters())
    assert summary.auxiliary_parameters > 0
    assert summary.classes == [str(digit) for digit in range(10)]
    assert summary.peak_bytes is None  # no CUDA
    assert 0 < summary.train_seconds < summary.wall_seconds
    assert summary.environment["versions"]["torch"] == torch.__version__


def test_metrics(summary, out):
    records = read_metrics(out)
    assert [record["epoch"] for record in records] == [1, 2, 3]
    assert [record["step"] for record in records] == [3, 6, 9]
    assert all(record["train_loss"].keys() == {"block1", "block2"} for record in records)
    assert all("val_accuracy" in record for record in records)
    assert ["test_accuracy" in record for record in records] == [False, False, True]  # test data is used once
    assert records[-1]["test_accuracy"] == summary.metric.value


def test_tensorboard(summary, out):
    events = EventAccumulator(str(out / "tensorboard")).Reload()
    records = read_metrics(out)
    for tag, values in (
        ("val_accuracy", [record["val_accuracy"] for record in records]),
        ("train_loss/block1", [record["train_loss"]["block1"] for record in records]),
    ):
        assert [event.step for event in events.Scalars(tag)] == [1, 2, 3]
        assert [event.value for event in events.Scalars(tag)] == pytest.approx(values)


def test_evaluation_of_the_saved_weights_equals_the_summary(summary, out):
    model = load_model(out, trust=True)
    assert not model.training
    metrics = evaluate(model, load_data(summary.config), batch=summary.config.batch)
    assert metrics == {metric.name: metric.value for metric in summary.metrics}


def test_the_weights_are_the_learners(summary, out):
    state = torch.load(out / "checkpoint.pt", weights_only=True)["learner"]["model"]
    weights = load_model(out, trust=True).state_dict()
    assert state.keys() == weights.keys()
    assert all(torch.equal(state[name], weights[name]) for name in weights)


def test_build_begins_with_the_weights_of_the_seed_for_every_method(tiny):
    data = load_data(tiny())
    methods = ("glcan:2", "e2e", "checkpoint", "selective")
    states = [build(tiny(method=method), data).model.state_dict() for method in methods]
    other = build(tiny(seed=1), data).model.state_dict()
    for name, tensor in states[0].items():
        assert all(torch.equal(tensor, state[name]) for state in states[1:])
    assert any(not torch.equal(tensor, other[name]) for name, tensor in states[0].items())


def test_frozen_blocks_keep_their_weights(tiny, tmp_path):
    """Blocks that ran through their schedule in one of two epochs, 3 steps each, stay as they are."""
    whole = train(tiny(epochs=2, method="glcan:2+freeze:0.5"), tmp_path / "two", progress=False)
    train(tiny(epochs=1), tmp_path / "one", progress=False)
    losses = [record["train_loss"] for record in read_metrics(tmp_path / "two")]
    assert [list(each) for each in losses] == [["block1", "block2"], ["block2"]]
    one, two = (load_model(tmp_path / name, trust=True) for name in ("one", "two"))
    cut = whole.cuts[0]
    names = [name for name, _ in two.named_parameters()]
    first = names[: next(i for i, name in enumerate(names) if name.startswith(cut))]
    warm = learning_rate(tiny(epochs=1), 0, 3) == learning_rate(tiny(epochs=2), 0, 3)
    assert warm  # so that both runs are the same up to there
    assert all(torch.equal(one.get_parameter(name), two.get_parameter(name)) for name in first)
    assert any(not torch.equal(one.get_parameter(name), two.get_parameter(name)) for name in names[len(first) :])


def test_the_start_trains_the_whole_model_and_the_auxiliary_networks_beside_it(tiny, tmp_path):
    """Its steps are those of end-to-end training; then the blocks go on, with the same optimizers."""
    whole = tiny(method="glcan:2+start:0.34", warmup_epochs=0)  # 3 of 9 steps
    train(whole, tmp_path / "start", progress=False)
    train(tiny(method="e2e", warmup_epochs=0), tmp_path / "e2e", progress=False)
    start, plain = (read_metrics(tmp_path / name) for name in ("start", "e2e"))
    assert [list(record["train_loss"]) for record in start] == [["block1", "block2"]] * 3
    assert start[0]["train_loss"]["block2"] == plain[0]["train_loss"]["block1"]
    assert start[0]["val_accuracy"] == plain[0]["val_accuracy"]
    assert start[1]["train_loss"]["block2"] != plain[1]["train_loss"]["block1"]
    rates = [record["lr"] for record in start]
    assert rates == [record["lr"] for record in plain]  # one schedule over the whole run


def test_a_finish_trains_the_whole_model_and_goes_on_with_its_optimizers(tiny, tmp_path):
    """The last of three epochs is plain back-propagation from where local learning stood, with the same momentum."""
    config = tiny(method="glcan:2+finish:0.34", warmup_epochs=0)  # 3 of 9 steps
    summary = train(config, tmp_path / "finish", progress=False)
    records = read_metrics(tmp_path / "finish")
    assert [list(record["train_loss"]) for record in records] == [["block1", "block2"]] * 2 + [["finish"]]
    assert (summary.method, summary.blocks, len(summary.cuts)) == ("glcan:2+finish:0.34", 2, 1)
    assert summary.auxiliary_parameters > 0

    data = load_data(config)
    learner = build(config, data)
    checkpoint.seed_all(config.seed)
    rates = [learning_rate(config, step, 3) for step in range(9)]
    batches = itertools.chain.from_iterable(data.loader("train", config.batch, epoch=epoch) for epoch in range(2))
    for rate, batch in zip(rates, batches, strict=False):
        set_rate(learner.optimizers, rate)
        learner.step(*batch)
    optimizer = torch.optim.SGD(learner.model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-4)
    for one in learner.optimizers:
        optimizer.state.update({p: state for p, state in one.state.items() if p in set(learner.model.parameters())})
    for rate, (images, labels) in zip(rates[6:], data.loader("train", config.batch, epoch=2), strict=True):
        set_rate([optimizer], rate)
        torch.nn.functional.cross_entropy(learner.model(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    finished = load_model(tmp_path / "finish", trust=True).state_dict()
    for name, tensor in learner.model.state_dict().items():
        torch.testing.assert_close(finished[name], tensor, rtol=1e-4, atol=1e-5)


def set_rate(optimizers, rate):
    for settings in itertools.chain.from_iterable(optimizer.param_groups for optimizer in optimizers):
        settings["lr"] = rate


@pytest.mark.parametrize("optimizer", [{"optimizer": "sgd"}, {"optimizer": "adamw", "lr": 1e-3}])
def test_a_finish_goes_on_with_schedule_and_momentum(tiny, tmp_path, optimizer):
    """One block learns as the whole model does, so that its finish is nothing new."""
    train(tiny(method="glcan:1", **optimizer), tmp_path / "plain", progress=False)
    summary = train(tiny(method="glcan:1+finish:0.44", **optimizer), tmp_path / "finish", progress=False)
    assert summary.train_loss.keys() == {"finish"}
    records = [read_metrics(tmp_path / name) for name in ("plain", "finish")]
    compared = [[(record["lr"], record["val_loss"]) for record in run] for run in records]
    assert compared[0] == compared[1]
    plain, finish = (load_model(tmp_path / name, trust=True).state_dict() for name in ("plain", "finish"))
    assert all(torch.equal(tensor, finish[name]) for name, tensor in plain.items())


def test_an_epoch_in_which_the_finish_begins_has_the_losses_of_both(tiny, tmp_path):
    train(tiny(epochs=1, method="glcan:2+finish:0.34"), tmp_path, progress=False)
    losses = read_metrics(tmp_path)[0]["train_loss"]
    assert list(losses) == ["block1", "block2", "finish"]
    assert all(0.5 < loss < 4 for loss in losses.values())  # means, of ten classes


def test_label_smoothing_reaches_the_loss(tiny):
    data = load_data(tiny())
    images, labels = next(iter(data.loader("train", 32)))
    plain, smooth = (build(tiny(method="e2e", label_smoothing=s, seed=3), data) for s in (0.0, 0.5))
    torch.manual_seed(0)
    first = plain.backward(images, labels)
    torch.manual_seed(0)
    assert not torch.equal(first["block1"], smooth.backward(images, labels)["block1"])


def test_evaluate_agrees_with_counting_and_leaves_no_trace(tiny):
    data = load_data(tiny())
    model = build(tiny(method="e2e"), data).model.train()
    before, rng = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    metrics = evaluate(model, data, "test", batch=100)
    assert model.training
    assert torch.equal(torch.get_rng_state(), rng)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    model.eval()
    with torch.no_grad():
        batches = [(model(images), labels) for images, labels in data.loader("test", 359)]
    scores, labels = batches[0]
    ranks = (scores > scores.gather(1, labels[:, None])).sum(1)
    assert metrics["accuracy"] == pytest.approx(float((ranks < 1).float().mean()))
    assert metrics["accuracy_top5"] == pytest.approx(float((ranks < 5).float().mean()))
    assert metrics["loss"] == pytest.approx(float(torch.nn.functional.cross_entropy(scores, labels)), rel=1e-5)


def test_evaluate_on_an_empty_split(tiny):
    config = tiny(val=0)
    data = load_data(config)
    with pytest.raises(DataError, match="no images in its 'val' split"):
        evaluate(build(config, data).model, data, "val")


def test_without_validation_images(tiny, tmp_path):
    summary = train(tiny(val=0, epochs=1), tmp_path, progress=False)
    assert summary.val_metrics == []
    assert not any(name.startswith("val") for name in read_metrics(tmp_path)[0])


def test_deterministic_is_put_back(tiny, tmp_path, monkeypatch):
    monkeypatch.setitem(os.environ, "CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    train(tiny(epochs=1, deterministic=True), tmp_path, progress=False)
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_weights_of_another_model(tiny, tmp_path, suffix):
    from safetensors.torch import save_model

    data = load_data(tiny())
    models = ("tiny_model:tiny", "cifar_resnet20")
    model, other = (build(tiny(method="e2e", model=name), data).model for name in models)
    path = tmp_path / f"weights.{suffix}"
    if suffix == "pt":
        torch.save(other.state_dict(), path)
    else:
        save_model(other, str(path))
    with pytest.raises(CheckpointError, match="do not fit the model Sequential"):
        load_weights(model, path)
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(CheckpointError, match="damaged"):
        load_weights(model, path)
    with pytest.raises(CheckpointError, match="no weights at"):
        load_weights(model, tmp_path / "missing.safetensors")


def test_lines_of_progress(tiny, tmp_path, capsys):
    summary = train(tiny(), tmp_path / "shown")
    train(tiny(epochs=1), tmp_path / "silent", progress=False)
    captured = capsys.readouterr()
    first, *lines = captured.err.splitlines()
    assert first.startswith("glcan:2 (local) of Sequential: ")
    assert f" {summary.auxiliary_parameters:,} " in first
    assert len(lines) == 3
    assert lines[0].startswith("epoch 1/3  lr 0.04")
    assert "val accuracy" in lines[0]
    assert "ETA" in lines[0]
    assert "test accuracy" in lines[2]
    assert captured.out == ""


def test_environment():
    values = environment()
    json.dumps(values)
    assert values["versions"]["glcan"]
    assert values["cpu"]
