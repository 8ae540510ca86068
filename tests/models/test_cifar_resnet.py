import pytest
import torch

from glcan.errors import ConfigError
from glcan.models.cifar_resnet import DEPTHS, BasicBlock, CifarResNet

PARAMETERS = {20: 269_722, 32: 464_154, 56: 853_018, 110: 1_727_962}


def test_every_published_depth_has_its_parameter_count():
    assert tuple(PARAMETERS) == DEPTHS


@pytest.mark.parametrize(("depth", "parameters"), PARAMETERS.items())
def test_parameter_count_is_the_papers(depth, parameters):
    assert sum(p.numel() for p in CifarResNet(depth).parameters()) == parameters


@pytest.mark.parametrize(("channels", "size"), [(3, 32), (1, 28), (1, 8), (3, 33)])
def test_output_shape(channels, size):
    model = CifarResNet(20, num_classes=7, in_channels=channels)
    assert model(torch.rand(2, channels, size, size)).shape == (2, 7)


def test_units_are_named_by_stage_and_block():
    children = dict(CifarResNet(20).named_modules())
    assert {"conv1", "bn1", "layer1.0", "layer2.2", "layer3.0", "fc"} <= children.keys()
    assert list(dict(CifarResNet(20).named_children())) == ["conv1", "bn1", "layer1", "layer2", "layer3", "fc"]


def test_shortcut_of_option_a_subsamples_and_pads_channels_with_zeros():
    block = BasicBlock(2, 4, stride=2).eval()
    torch.nn.init.zeros_(block.bn2.weight)
    x = torch.rand(1, 2, 6, 6)
    out = block(x)
    assert torch.equal(out[:, 1:3], x[:, :, ::2, ::2])
    assert not out[:, [0, 3]].any()


def test_block_does_not_write_to_its_input():
    x = torch.randn(2, 16, 8, 8)
    before = x.clone()
    BasicBlock(16, 16)(x)
    assert torch.equal(x, before)


def test_block_keeps_two_convolution_outputs_and_two_relu_outputs():
    block = BasicBlock(16, 16)
    x = torch.randn(4, 16, 8, 8, requires_grad=True)
    storages = {}

    def remember(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
        out = block(x)
    full = [pointer for pointer, numel in storages.items() if numel == x.numel()]
    assert len(set(full) - {x.untyped_storage().data_ptr()}) == 4
    assert out.untyped_storage().data_ptr() in full


def test_channels_last_is_kept():
    model = CifarResNet(20).to(memory_format=torch.channels_last)
    x = torch.rand(2, 16, 16, 16).contiguous(memory_format=torch.channels_last)
    assert model.layer3(model.layer2(x)).is_contiguous(memory_format=torch.channels_last)


def test_gradients_reach_every_parameter():
    model = CifarResNet(20)
    model(torch.rand(4, 3, 16, 16)).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("options", [{"depth": 21}, {"depth": 2}, {"depth": 20, "width": 0}])
def test_impossible_sizes_are_refused(options):
    with pytest.raises(ConfigError, match="must be"):
        CifarResNet(**options)


def test_zero_init_residual_begins_as_the_identity():
    model = CifarResNet(20, zero_init_residual=True).eval()
    x = torch.rand(2, 16, 8, 8)  # not negative, as what a block gets from the one before
    assert torch.equal(model.layer1(x), x)
    assert not torch.equal(CifarResNet(20).eval().layer1(x), x)
