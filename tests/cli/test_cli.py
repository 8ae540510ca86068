"""The command line: its help, its settings, its mistakes, and the small commands."""

import importlib
import inspect
import json
import sys
from importlib import metadata

import pytest

from glcan import strategies
from glcan.cli.options import SETTINGS, configure
from glcan.errors import ConfigError, RunError
from glcan.training import RunConfig
from glcan.training.config import flag


def test_version(glcan):
    result = glcan("--version")
    assert (result.exit_code, result.output) == (0, f"glcan {metadata.version('glcan')}\n")


@pytest.mark.parametrize("command", ["plan", "train", "compare", "evaluate", "predict", "data", "methods"])
def test_help(glcan, command):
    result = glcan(command, "--help")
    assert result.exit_code == 0
    assert command in result.output


def test_every_setting_has_an_option(glcan):
    assert set(SETTINGS) == set(RunConfig.model_fields) - {"task"}
    text = glcan("train", "--help").output
    assert [name for name in SETTINGS if flag(name) not in text] == []


@pytest.mark.parametrize(("command", "defaults"), [("plan", 9), ("train", 2), ("compare", 5)])
def test_help_tells_the_defaults(glcan, command, defaults):
    """None is taken for markup."""
    text = glcan(command, "--help").output
    assert text.count("[default: ") >= defaults
    if command != "plan":
        assert "[default: the recipe's, or" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "glcann:4"], "Unknown method 'glcann'. Did you mean 'glcan'"),
        (["--model", "cifar_resnet2"], "Unknown model 'cifar_resnet2'. Did you mean"),
        (["--data", "digit"], "Unknown data set 'digit'. Did you mean 'digits'"),
        (["--lr", "-1", "--epochs", "0"], "lr = -1.0: should be greater than 0; set --lr"),
        (["poetry"], "task = 'poetry': should be 'classification', 'super-resolution' or 'detection'; set TASK"),
        (["--method", "glcan:1000"], "1000"),
        (["--cuts", "layer3.0,layer2.0"], "order"),
        (["--cuts", "layer9"], "layer9"),
        (["--method", "glcan:4", "--cuts", "layer2.0"], "contradicts 1 cuts, which make 2 blocks; write glcan:2"),
        (["--option", "width"], "--option 'width' is not of the form KEY=VALUE"),
        (["--option", "colour=blue"], "colour"),
        (["--recipe", "cifar10-resnet31"], "Unknown recipe 'cifar10-resnet31'. Did you mean 'cifar10-resnet32'"),
        (["--resume"], "Name it with --out"),
        (["--data", "imagefolder"], "--data-root"),
        (["--method", "e2e:4"], "Write 'e2e' alone"),
        (["--method", "e2e", "--option", "share=1"], "'e2e' has no options"),
        (["--method", "glcan:4+finnish"], "has '+finnish'"),
    ],
)
def test_mistakes_end_with_one_message_and_code_2(glcan, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    result = glcan("train", *arguments)
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ")
    assert message in result.stderr
    assert "Traceback" not in result.output
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments",
    [["train", "--colour"], ["train", "--epochs", "many"], ["train", "--schedule", "linear"], ["fly"], ["predict"]],
)
def test_wrong_usage_ends_with_code_2(glcan, arguments):
    assert glcan(*arguments).exit_code == 2


def test_given_over_recipe_over_defaults():
    config = configure("classification", {"epochs": 5, "warmup_epochs": 1}, "cifar10-resnet32")
    assert (config.epochs, config.lr, config.method, config.seed) == (5, 0.8, "glcan:16", 0)
    assert configure("classification", {"method": "glcan:8"}, "cifar10-resnet32").method == "glcan:8"
    assert configure("classification", {"method": "e2e"}, "cifar10-resnet32").method == "e2e"
    for given in ({"cuts": ["layer2.0"]}, {"memory": "1GiB"}):  # decide the number of blocks
        assert configure("classification", given, "cifar10-resnet32").method == "glcan"
        assert configure("classification", given).method == "glcan"
    with pytest.raises(ConfigError, match="warmup_epochs = 10 must be less than epochs = 5"):
        configure("classification", {"epochs": 5}, "cifar10-resnet32")


def test_the_task_is_the_recipes():
    config = configure(None, {}, "photographs-edsr-small-x2")
    assert (config.task, config.data) == ("super-resolution", "photofolder")
    assert configure("super-resolution", {}, "photographs-edsr-small-x2") == config
    with pytest.raises(ConfigError, match="is for super-resolution, not for classification"):
        configure("classification", {}, "photographs-edsr-small-x2")
    assert configure(None, {}).task == "classification"


def test_a_rule_that_a_run_names_needs_trust(tmp_path):
    stored = RunConfig(method="os:system:2")
    (tmp_path / "config.json").write_text(json.dumps({"config": stored.model_dump(mode="json")}))
    with pytest.raises(RunError, match="names method = 'os:system:2'"):
        configure(None, {}, run=tmp_path)
    assert configure(None, {"method": "os:system:2"}, run=tmp_path) == stored
    assert configure(None, {}, run=tmp_path, trust=True) == stored


def test_options_of_a_recipe_are_kept_with_its_method_alone(tmp_path):
    path = tmp_path / "own.toml"
    path.write_text('cuts = ["layer2.0"]\nmethod = "glcan"\n[options]\nbudget = 0.2\nuse_global = false\n')
    config = configure("classification", {"options": {"use_global": True}}, str(path))
    assert (config.options, config.cuts) == ({"budget": 0.2, "use_global": True}, ["layer2.0"])
    config = configure("classification", {"method": "selective"}, str(path))
    assert (config.options, config.cuts) == ({}, None)
    config = configure("classification", {"memory": "1GiB"}, str(path))
    assert (config.memory, config.cuts) == ("1GiB", None)


def test_data(glcan):
    result = glcan("data")
    assert result.exit_code == 0
    assert "digits" in result.output
    assert "imagefolder" in result.output
    values = {info["name"]: info for info in json.loads(glcan("data", "--json").stdout)}
    assert values["digits"]["found"]


@pytest.mark.parametrize(
    "name",
    ["glcan.report.comparison", "glcan.report.costs", "glcan.training.trainer", "glcan.training.run"]
    + [f"glcan.cli.{command}" for command in ("plan", "train", "compare", "evaluate", "predict", "data", "methods")],
)
def test_no_function_stands_before_a_module(name):
    importlib.import_module(name)
    package, _, last = name.rpartition(".")
    assert inspect.ismodule(getattr(sys.modules[package], last))


def test_methods(glcan):
    result = glcan("methods")
    assert result.exit_code == 0
    rows = [line.split("│") for line in result.output.splitlines() if line.startswith("│")]
    shown = {cells[1].strip(): cells[2].strip() for cells in rows}
    families = {name: strategies.family_of(name) for name in strategies.names()}
    assert shown == {f"{n}:BLOCKS" if family == "local" else n: family for n, family in families.items()}
    assert {"e2e": "exact", "selective": "sampled", "glcan": "local"}.items() <= families.items()
    assert "+accumulate:PARTS" in result.output
