"""Settings: their errors name value, constraint and remedy, and all recipes load."""

import itertools
import math

import pytest
import torch

from glcan.errors import ConfigError, UnknownName
from glcan.training import RunConfig, load_recipe, recipe_names
from glcan.training.config import recipe_folder
from glcan.training.schedule import learning_rate


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"lr": 0}, r"lr = 0: should be greater than 0; set --lr or leave it out \(default 0.1\)"),
        ({"lr": math.nan}, "lr = nan: should be a finite number"),
        ({"epochs": 0}, "epochs = 0: should be greater than or equal to 1; set --epochs"),
        ({"batch": "many"}, "batch = 'many': should be a valid integer"),
        ({"optimizer": "lion"}, "optimizer = 'lion': should be 'sgd', 'adamw' or 'adam'"),
        ({"val": 1.5}, "val = 1.5: a fraction must be below 1"),
        ({"val": -1}, "val = -1: should be greater than or equal to 0"),
        ({"device": "gpu"}, "device = 'gpu': must be auto, cpu, cuda"),
        ({"weightdecay": 1}, r"weightdecay = 1: there is no such setting; did you mean weight_decay\?"),
        ({"zzz": 1}, "there is no such setting; the settings are: model, "),
        ({"options": "share"}, "options = 'share': should be a valid dictionary; set --option "),
        ({"rule": "glcan"}, "rule = 'glcan': there is no such setting"),
        (
            {"task": "poetry"},
            "task = 'poetry': should be 'classification', 'super-resolution' or 'detection'; set TASK",
        ),
        ({"momentum": 0}, "nesterov = true needs momentum above 0; set --momentum 0.9 or --no-nesterov"),
        ({"epochs": 3, "warmup_epochs": 5}, "warmup_epochs = 5 must be less than epochs = 3"),
        ({"method": "glcan:4+finish:0.95"}, r"has finish:0.95; a share of the steps lies in \(0, 0.9\]"),
        ({"method": "e2e+start:0.1"}, "has a start, and 'e2e' trains the whole model all the time"),
        ({"method": "glcan:4+start:0.6+freeze:0.5"}, "starts with 0.6 of the steps, .* only 0.5 .* Lower the start"),
        ({"method": "glcan:4+start:0.6+finish:0.5"}, "starts with 0.6 of the steps"),
        (
            {"method": "glcan+start", "memory": "1GiB"},
            r"method = 'glcan\+start:0.3' has steps that train the whole model",
        ),
        ({"method": "glcan+finish", "memory": "1GiB"}, "steps that train the whole model, and memory = '1GiB'"),
        ({"method": "checkpoint+finish"}, "has a finish, and 'checkpoint' trains the whole model all the time"),
        ({"method": "glcan"}, "method = 'glcan' has no number of blocks; write glcan:4, or set --memory"),
        ({"method": "e2e:4"}, "gives a number to 'e2e', which takes none"),
        ({"method": "e2e+accumulate:9", "batch": 8}, "divides a batch in 9 parts, more than the images of batch = 8"),
        ({"method": "selective", "cuts": ["layer2.0"]}, "cuts and recompute are for the blocks of local learning"),
        ({"method": "e2e", "recompute": True}, "cuts and recompute are for the blocks of local learning"),
        ({"cuda_graph": True, "task": "detection"}, "cuda_graph = true is not for detection"),
        ({"scale": 3}, "scale = 3 is for super-resolution, not for classification; leave --scale out"),
        ({"task": "super-resolution", "image_size": 32}, "image_size = 32 is for classification and detection"),
        ({"task": "super-resolution", "scale": 5}, "scale = 5: should be less than or equal to 4"),
        ({"milestones": [0.5]}, r"milestones = \[0.5\] need schedule = 'halving' or 'tenths'"),
        (
            {"task": "detection", "label_smoothing": 0.1},
            "label_smoothing = 0.1 is for classification, not for detection",
        ),
        ({"schedule": "halving", "milestones": [0.5, 0.4]}, "each larger than the one before; set --milestones"),
        ({"schedule": "halving", "milestones": [1.0]}, "must be fractions between 0 and 1"),
        ({"method": "glcan:4", "cuts": ["a"]}, "'glcan:4' contradicts 1 cuts, which make 2 blocks; write glcan:2"),
    ],
)
def test_wrong_settings(fields, message):
    with pytest.raises(ConfigError, match=message):
        RunConfig(**fields)


def test_one_line_for_each_wrong_setting():
    with pytest.raises(ConfigError) as error:
        RunConfig(lr=-1, epochs=0, batsch=3)
    assert [line.split(" = ")[0] for line in str(error.value).splitlines()] == ["epochs", "lr", "batsch"]


def test_every_field_is_described():
    assert [name for name, field in RunConfig.model_fields.items() if not field.description] == []


def test_val_is_a_count_or_a_fraction():
    values = [RunConfig(val=val).val for val in (0, 0.0, 0.1, 500, 500.0, "500")]
    assert values == [0, 0, 0.1, 500, 500, 500]


def test_differences_leave_out_the_place(tmp_path):
    one, other = RunConfig(), RunConfig(lr=0.2, device="cpu", workers=3, data_root=tmp_path, download=True)
    assert one.differences(other) == {"lr": (0.1, 0.2)}


def test_a_config_survives_json():
    config = RunConfig(options={"width": 0.5}, data_root="/data", val=0.25)
    assert RunConfig(**config.model_dump(mode="json")) == config


@pytest.mark.parametrize("name", recipe_names())
def test_recipes(name):
    config = load_recipe(name)
    text = (recipe_folder() / f"{name}.toml").read_text()
    assert "Source" in text
    assert all("#" in line for line in text.splitlines() if line.startswith(("epochs", "batch", "lr", "warmup")))
    assert config.parsed.base == "glcan"
    assert config.parsed.number > 1
    assert load_recipe(name, epochs=200).epochs == 200


def test_the_recipes_that_the_field_compares_on():
    expected = {f"{data}-resnet{depth}" for data in ("cifar10", "svhn", "stl10") for depth in (32, 110)}
    expected |= {"div2k-edsr-baseline-x2", "div2k-swinir-light-x2", "photographs-edsr-small-x2"}
    expected |= {f"imagenet-resnet{depth}" for depth in (50, 101, 152)} | {"fashion-mnist-resnet32", "digits-resnet20"}
    expected |= {"coco-retinanet-r50"}
    assert expected == set(recipe_names())
    cifar, stl = load_recipe("cifar10-resnet32"), load_recipe("stl10-resnet110")
    assert (cifar.lr, cifar.batch, cifar.weight_decay, cifar.epochs, cifar.nesterov) == (0.8, 1024, 1e-4, 400, True)
    assert (stl.lr, stl.batch) == (0.1, 128)
    assert (cifar.method, stl.method) == ("glcan:16", "glcan:55")


def test_the_recipe_of_edsr_is_the_papers():
    config = load_recipe("div2k-edsr-baseline-x2")
    assert (config.optimizer, config.lr, config.batch, config.patch, config.criterion) == ("adam", 1e-4, 16, 48, "l1")
    steps = config.crops * 800 // config.batch
    assert config.epochs * steps == 300_000
    assert learning_rate(config, 199_999, steps) == 1e-4
    assert learning_rate(config, 200_000, steps) == 5e-5
    light = load_recipe("div2k-swinir-light-x2")
    assert light.epochs * light.crops * 800 // light.batch == 500_000


def test_a_recipe_of_ones_own(tmp_path):
    path = tmp_path / "own.toml"
    path.write_text("lr = 0.3\n")
    assert load_recipe(path).lr == 0.3
    path.write_text("lr = -0.3\n")
    with pytest.raises(ConfigError, match=r"(?s)own.toml:\nlr = -0.3"):
        load_recipe(path)
    path.write_text("lr = \n")
    with pytest.raises(ConfigError, match="not valid TOML"):
        load_recipe(path)


def test_an_unknown_recipe():
    with pytest.raises(UnknownName, match="Did you mean 'cifar10-resnet32'"):
        load_recipe("cifar10-resnet3")


def rates(**fields):
    config = RunConfig(**({"epochs": 10, "lr": 0.4} | fields))
    return [learning_rate(config, step, 7) for step in range(70)]


def test_cosine_with_linear_warmup():
    values = rates(warmup_epochs=2)
    assert values[:14] == pytest.approx([0.4 * (step + 1) / 15 for step in range(14)])
    assert values[14] == 0.4
    assert values[42] == pytest.approx(0.2)  # half of the way after the warm-up
    assert all(a > b for a, b in itertools.pairwise(values[14:]))
    assert 0 < values[-1] < 0.001


def test_cosine_is_torchs():
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.4)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 70)
    expected = []
    for _ in range(70):
        expected.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    assert rates(warmup_epochs=0) == pytest.approx(expected)


def test_onecycle_is_torchs():
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.4, momentum=0.9)
    # torch reaches the peak and the end one step earlier: its phases are counted in steps less one.
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.4, total_steps=71, pct_start=22 / 71)
    expected = []
    for _ in range(70):
        expected.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    assert rates(schedule="onecycle") == pytest.approx(expected)


def test_halving_at_the_milestones():
    values = rates(schedule="halving", milestones=[0.5, 0.8])
    assert values == [0.4] * 35 + [0.2] * 21 + [0.1] * 14
    assert rates(schedule="halving") == [0.4] * 47 + [0.2] * 23
    assert rates(schedule="halving", warmup_epochs=1)[:8] == pytest.approx([0.4 * i / 8 for i in range(1, 8)] + [0.4])


def test_super_resolution_has_defaults_of_its_own():
    config = RunConfig(task="super-resolution")
    assert (config.model, config.model_options) == ("edsr_baseline", {"blocks": 8, "channels": 32})
    assert (config.data, config.optimizer, config.lr, config.weight_decay) == ("photographs", "adam", 1e-3, 0)
    other = RunConfig(task="super-resolution", model="spandrel/RCAN", lr=1e-4)
    assert (other.model_options, other.lr, other.optimizer) == ({}, 1e-4, "adam")
    assert RunConfig(**config.model_dump(mode="json")) == config


def test_default_warmup():
    assert RunConfig(epochs=1).warmup == 0.1
    assert RunConfig(epochs=50).warmup == 1
    assert RunConfig(epochs=50, schedule="onecycle").warmup == 15
    assert RunConfig(epochs=50, schedule="halving").warmup == 0
    assert RunConfig(epochs=50, warmup_epochs=0).warmup == 0


def test_a_budget_of_memory_decides_the_blocks() -> None:
    assert RunConfig(memory="2GiB").memory == "2GiB"
    with pytest.raises(ConfigError, match="no unit"):
        RunConfig(memory="2")
    assert RunConfig(memory="2GiB").method == RunConfig(cuts=["layer2.0"]).method == "glcan"
    assert RunConfig(memory="2GiB", method="glcan:8").parsed.number == 8
    for other in ({"cuts": ["layer2.0", "layer3.0", "layer3.1"]}, {"recompute": True}):
        with pytest.raises(ConfigError, match="give one of the two"):
            RunConfig(memory="2GiB", **other)
