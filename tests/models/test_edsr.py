import pytest
import torch

from glcan.errors import ConfigError
from glcan.models import create
from glcan.models.edsr import EDSR, MeanShift, ResBlock

# The baseline's counts as the authors' code has them; table 1 of the paper gives 1.5M and 43M for x4.
PARAMETERS = {
    ("edsr_baseline", 2): 1_369_859,
    ("edsr_baseline", 3): 1_554_499,
    ("edsr_baseline", 4): 1_517_571,
    ("edsr", 2): 40_729_603,
    ("edsr", 3): 43_680_003,
    ("edsr", 4): 43_089_923,
}


def conv(inputs, outputs):
    return 9 * inputs * outputs + outputs


@pytest.mark.parametrize(("model", "parameters"), PARAMETERS.items(), ids=str)
def test_parameter_counts_are_the_papers(model, parameters):
    name, scale = model
    blocks, channels = (16, 64) if name == "edsr_baseline" else (32, 256)
    steps = {2: conv(channels, 4 * channels), 3: conv(channels, 9 * channels), 4: 2 * conv(channels, 4 * channels)}
    by_hand = conv(3, channels) + (2 * blocks + 1) * conv(channels, channels) + steps[scale] + conv(channels, 3)
    with torch.device("meta"):
        made = create(name, scale=scale)
    assert sum(p.numel() for p in made.parameters()) == by_hand == parameters


def test_the_full_model_scales_its_residuals():
    with torch.device("meta"):
        assert {m.res_scale for m in create("edsr").modules() if isinstance(m, ResBlock)} == {0.1}
        assert {m.res_scale for m in create("edsr_baseline").modules() if isinstance(m, ResBlock)} == {1.0}


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_output_shape(scale):
    model = EDSR(blocks=1, channels=4, scale=scale)
    assert model(torch.rand(2, 3, 5, 7)).shape == (2, 3, 5 * scale, 7 * scale)


def test_names_are_those_of_the_authors_code():
    names = set(EDSR(blocks=2, channels=4, scale=4).state_dict())
    assert {
        "sub_mean.weight",
        "add_mean.bias",
        "head.0.weight",
        "body.0.body.0.weight",
        "body.1.body.2.bias",
        "body.2.weight",
        "tail.0.0.weight",
        "tail.0.2.weight",
        "tail.1.bias",
    } <= names
    assert len(names) == 4 + 2 + 2 * 4 + 2 + 4 + 2


def test_mean_shift_adds_the_mean_and_does_not_write_to_its_input():
    x = torch.rand(1, 3, 2, 2)
    before = x.clone()
    shifted = MeanShift((0.5, 0.25, 0.125), 2, -1)(x)
    assert torch.allclose(shifted, before - torch.tensor([1, 0.5, 0.25])[:, None, None])
    assert torch.equal(x, before)


def test_input_is_not_written_to_and_every_parameter_gets_a_gradient():
    model = EDSR(blocks=2, channels=4, res_scale=0.1)
    x = torch.rand(1, 3, 6, 6)
    before = x.clone()
    model(x).abs().mean().backward()
    assert torch.equal(x, before)
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


def test_forward_is_the_papers_equation():
    model = EDSR(blocks=1, channels=4, res_scale=0.5)
    x = torch.rand(1, 3, 6, 6)
    mean = 255 * torch.tensor([0.4488, 0.4371, 0.4040])[:, None, None]
    head = model.head(x * 255 - mean)
    block = model.body[0].body
    body = model.body[1](head + 0.5 * block[2](block[0](head).relu()))
    expected = (model.tail(body + head) + mean) / 255
    assert torch.allclose(model(x), expected, atol=1e-6)


@pytest.mark.parametrize("options", [{"scale": 5}, {"blocks": 0}, {"channels": 0}])
def test_impossible_options_are_refused(options):
    with pytest.raises(ConfigError, match="must be"):
        EDSR(**options)
