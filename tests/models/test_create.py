import subprocess
import sys

import pytest
import torch
from torch import nn

from glcan import models
from glcan.errors import ConfigError, UnknownName


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A module of the user's own in the current directory; returns the name of a fresh one for some source text."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    count = 0

    def write(text):
        nonlocal count
        count += 1
        name = f"own_models_{tmp_path.name.replace('-', '_')}_{count}"
        (tmp_path / f"{name}.py").write_text("from torch import nn\n" + text)
        return name

    return write


def first_conv(model):
    return next(module for module in model.modules() if isinstance(module, nn.Conv2d))


def test_names_hold_every_namespace():
    names = models.names()
    assert {"cifar_resnet20", "cifar_resnet110", "torchvision/resnet50", "timm/vit_small_patch16_224"} <= set(names)
    assert "torchvision/retinanet_resnet50_fpn" not in names
    assert len(names) == len(set(names))


def test_importing_models_loads_neither_torchvision_nor_timm():
    code = "import sys, glcan.models; sys.exit(bool({'torchvision', 'timm'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_weights_come_from_the_global_generator():
    weights = []
    for _ in range(2):
        torch.manual_seed(3)
        weights.append(models.create("cifar_resnet20").state_dict())
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("cifar_resnet20", 28),
        ("torchvision/resnet18", 64),
        ("torchvision/squeezenet1_1", 64),
        ("torchvision/vit_b_16", 32),
        ("timm/resnet18", 64),
        ("timm/vit_tiny_patch16_224", 32),
    ],
)
def test_classes_channels_and_size_are_taken(name, size):
    with torch.device("meta") if name == "torchvision/vit_b_16" else torch.device("cpu"):
        model = models.create(name, num_classes=7, in_channels=2, image_size=size).eval()
        assert model(torch.rand(1, 2, size, size)).shape == (1, 7)


def test_default_number_of_classes_is_the_models_own():
    assert models.create("torchvision/resnet18").fc.out_features == 1000
    assert models.create("cifar_resnet20").fc.out_features == 10


def test_googlenet_has_one_output_in_training():
    assert models.create("torchvision/googlenet", num_classes=3)(torch.rand(2, 3, 64, 64)).shape == (2, 3)


def test_replaced_first_convolution_keeps_settings_and_output_variance():
    torch.manual_seed(0)
    model, original = models.create("torchvision/resnet18", in_channels=1), models.create("torchvision/resnet18")
    conv, before = first_conv(model), first_conv(original)
    for setting in ("kernel_size", "stride", "padding", "bias"):
        assert getattr(conv, setting) == getattr(before, setting)
    assert conv.weight.detach().std().item() == pytest.approx(before.weight.detach().std().item() * 3**0.5, rel=0.05)


def test_torchvision_model_without_a_convolution_on_the_image_names_the_reason():
    model = nn.Sequential(nn.Linear(3, 3))
    with pytest.raises(ConfigError, match=r"in_channels=1.*timm/"):
        models._replace_first_conv(model, "torchvision/none", 1)


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("cifar_resnet33", "cifar_resnet32"),
        ("resnet50", "torchvision/resnet50 or timm/resnet50"),
        ("torchvision/resnet5", "torchvision/resnet50"),
        ("torchvison/resnet50", "torchvision/resnet50"),
        ("timm/vit_smal_patch16_224", "timm/vit_small_patch16_224"),
        ("torchvision/maskrcnn_resnet50_fpn", "classifiers and box detectors"),
    ],
)
def test_unknown_model_lists_near_names(name, near):
    with pytest.raises(UnknownName, match=near):
        models.create(name)


@pytest.mark.parametrize("name", ["cifar_resnet20", "torchvision/resnet18", "timm/resnet18"])
def test_unknown_option_is_named(name):
    with pytest.raises(ConfigError, match="colour"):
        models.create(name, colour="blue")


@pytest.mark.parametrize("bad", [{"num_classes": 0}, {"in_channels": 0}, {"image_size": -1}])
def test_numbers_below_one_are_refused(bad):
    with pytest.raises(ConfigError, match="at least 1"):
        models.create("cifar_resnet20", **bad)


@pytest.mark.parametrize("name", ["torchvision/vit_b_16", "timm/vit_tiny_patch16_224"])
def test_bad_options_of_a_library_are_a_config_error(name):
    options = {"image_size": 100} if name.startswith("torchvision") else {"global_pool": "nonsense"}
    with pytest.raises(ConfigError, match=name):
        models.create(name, **options)


def test_own_factory_gets_what_its_signature_names(own):
    module = own("def net(num_classes, hidden=2):\n    return nn.Linear(hidden, num_classes)\n")
    model = models.create(f"{module}:net", num_classes=5, in_channels=1, image_size=8, hidden=3)
    assert (model.in_features, model.out_features) == (3, 5)


def test_own_factory_with_kwargs_gets_the_classes(own):
    module = own("def net(**given):\n    model = nn.Identity()\n    model.given = given\n    return model\n")
    assert models.create(f"{module}:net", num_classes=5, image_size=8).given == {"num_classes": 5}
    assert models.create(f"{module}:net", num_classes=5, in_channels=1).given == {"num_classes": 5, "in_channels": 1}


def test_own_class_and_nested_attribute(own):
    module = own("class Zoo:\n    class Net(nn.Module):\n        pass\n")
    assert type(models.create(f"{module}:Zoo.Net")).__name__ == "Net"


def test_missing_module_is_named():
    with pytest.raises(ConfigError, match="no module 'no_such_package'"):
        models.create("no_such_package.models:net")


def test_missing_import_of_an_own_module_is_named(own):
    module = own("import no_such_dependency\n")
    with pytest.raises(ConfigError, match="no_such_dependency"):
        models.create(f"{module}:net")


def test_missing_factory_lists_near_ones(own):
    module = own("def small_net():\n    return nn.Identity()\n")
    with pytest.raises(UnknownName, match="small_net"):
        models.create(f"{module}:smal_net")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("def net():\n    return 3\n", "returned int"),
        ("net = 3\n", "type int"),
        ("net = nn.Linear(1, 1)\n", "type Linear"),
        ("def net(depth):\n    return nn.Identity()\n", "depth"),
        ("net = dict\n", "Wrap it"),
    ],
)
def test_factory_that_cannot_work_is_refused(own, text, reason):
    with pytest.raises(ConfigError, match=reason):
        models.create(f"{own(text)}:net")


def test_option_that_an_own_factory_lacks_is_named(own):
    module = own("def net():\n    return nn.Identity()\n")
    with pytest.raises(ConfigError, match="colour"):
        models.create(f"{module}:net", colour="blue")


@pytest.mark.parametrize("name", [":net", "module:", "folder/file.py:net"])
def test_path_that_is_no_import_path_is_refused(name):
    with pytest.raises(ConfigError, match=r"package\.module:NAME"):
        models.create(name)
