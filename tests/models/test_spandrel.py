import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from glcan.errors import ConfigError, UnknownName
from glcan.inspect.dryrun import fake_copy
from glcan.models import create, names, spandrel

# As published, for x2 (SwinIR: 11.75M and 0.91M; RCAN: 15.4M; HAT: 20.6M).
PARAMETERS = {
    "SwinIR": 11_752_487,
    "SwinIR-light": 910_152,
    "RCAN": 15_444_667,
    "HAT": 20_624_795,
}
SMALL = {"SwinIR": {"depths": (1, 1), "num_heads": (2, 2), "embed_dim": 8}, "RCAN": {"n_resgroups": 1, "n_feats": 16}}


def check(name, scale):
    model = create(name, scale=scale)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    twin, images = fake_copy(model.train(), torch.rand(2, 3, 32, 32), mode)
    with mode:
        output = twin(images)
        output.sum().backward()
    assert output.shape == (2, 3, 32 * scale, 32 * scale)
    assert all(p.grad is not None for p in twin.parameters() if p.requires_grad)
    if scale == 2 and name.removeprefix("spandrel/") in PARAMETERS:
        assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name.removeprefix("spandrel/")]


@pytest.mark.parametrize("name", ["spandrel/RCAN", "spandrel/SwinIR-light", "spandrel/SAFMN"])
def test_network_upscales_and_trains_every_weight(name):
    check(name, 2)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning:spandrel")
@pytest.mark.parametrize("scale", [2, 3, 4])
@pytest.mark.parametrize("name", spandrel.names())
def test_every_network_upscales_and_trains_every_weight(name, scale):
    check(name, scale)


@pytest.mark.parametrize("name", SMALL)
def test_options_replace_the_published_ones(name):
    model = create(f"spandrel/{name}", scale=3, **SMALL[name])
    assert model.eval()(torch.rand(1, 3, 16, 16)).shape == (1, 3, 48, 48)


def test_every_name_is_listed():
    assert set(spandrel.names()) < set(names())


def test_importing_models_does_not_load_spandrel():
    code = "import sys, glcan.models; sys.exit('spandrel' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("name", "near"),
    [("spandrel/SwinIR-lite", "SwinIR-light"), ("RCAN", "spandrel/RCAN"), ("edsr_base", "edsr_baseline")],
)
def test_unknown_network_lists_near_names(name, near):
    with pytest.raises(UnknownName, match=near):
        create(name)


@pytest.mark.parametrize("options", [{"scale": 8}, {"colour": "blue"}, {"depths": 3}])
def test_impossible_options_are_a_config_error(options):
    with pytest.raises(ConfigError, match="spandrel/SwinIR"):
        create("spandrel/SwinIR", **options)


def test_classifiers_refuse_a_scale():
    for name in ("cifar_resnet20", "torchvision/resnet18", "timm/resnet18"):
        with pytest.raises(ConfigError, match=r"super-resolution.*edsr_baseline"):
            create(name, scale=2)


def test_own_factory_gets_the_scale_if_it_names_it(tmp_path, monkeypatch):
    (tmp_path / "own_upscalers.py").write_text(
        "from torch import nn\n"
        "def net(scale, width=3):\n    return nn.Sequential(nn.Conv2d(3, 3 * scale**2, 1), nn.PixelShuffle(scale))\n"
        "def fixed():\n    return nn.Upsample(scale_factor=2)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    assert create("own_upscalers:net", scale=3)(torch.rand(1, 3, 2, 2)).shape == (1, 3, 6, 6)
    assert create("own_upscalers:fixed", scale=2)(torch.rand(1, 3, 2, 2)).shape == (1, 3, 4, 4)
