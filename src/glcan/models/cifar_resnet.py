"""ResNets for small images.

Source: K. He, X. Zhang, S. Ren, J. Sun, "Deep Residual Learning for Image Recognition", CVPR 2016, arXiv 1512.03385,
section 4.2: a 3x3 convolution, three stages of n residual blocks with 16, 32 and 64 channels at full, half and quarter
resolution (6n+2 layers with weights), global average pooling, a linear classifier. Shortcuts are option A of the paper:
identity, subsampled and padded with zero channels where the shape changes, so they have no parameters.

Parameters with 3 input channels and 10 classes, as in the paper's table 6:

| model | n | parameters | paper |
|---|---|---|---|
| ResNet-20 | 3 | 269,722 | 0.27M |
| ResNet-32 | 5 | 464,154 | 0.46M |
| ResNet-56 | 9 | 853,018 | 0.85M |
| ResNet-110 | 18 | 1,727,962 | 1.7M |

The paper trains ResNet-110 with a warm-up (learning rate 0.01 for the first 400 steps, then 0.1).

Shapes: B batch, C channels, H height, W width.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from glcan.errors import ConfigError

DEPTHS = (20, 32, 56, 110)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with BatchNorm and a parameter-free shortcut (option A).

    Everything that need not be kept for backward is overwritten: kept are the outputs of the two convolutions and of
    the two ReLUs, no sum and no normalised map. The input is never written to.
    """

    def __init__(self, in_channels: int, channels: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.stride = stride
        self.new_channels = channels - in_channels

    def forward(self, x: Tensor) -> Tensor:
        """Maps [B, C, H, W] to [B, channels, ceil(H / stride), ceil(W / stride)]."""
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = self.bn2(self.conv2(out))
        if self.stride != 1 or self.new_channels:
            before = self.new_channels // 2
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, before, self.new_channels - before))
        out += x
        return F.relu(out, inplace=True)


class CifarResNet(nn.Module):
    """A ResNet of 6n+2 layers for images of about 16 to 64 pixels.

    Args:
        depth: layers with weights, 6n+2 with n >= 1; the paper's are 20, 32, 56, 110.
        num_classes: outputs.
        in_channels: channels of the images (1 for Fashion-MNIST).
        width: channels of the first stage (16 in the paper); the others have 2 and 4 times as many.
        zero_init_residual: begin with every residual block as the identity (its last BatchNorm's weight at 0; Goyal et
            al. 2017, arXiv 1706.02677, section 5.1). Not in the paper.

    Raises:
        ConfigError: a depth that is not 6n+2, or a width below 1.
    """

    def __init__(
        self, depth: int, num_classes: int = 10, in_channels: int = 3, width: int = 16, zero_init_residual: bool = False
    ) -> None:
        super().__init__()
        blocks, rest = divmod(depth - 2, 6)
        if blocks < 1 or rest:
            raise ConfigError(f"depth={depth} of a CIFAR ResNet: it must be 6n+2 with n >= 1, for example 20 or 32.")
        if width < 1:
            raise ConfigError(f"width={width} of a CIFAR ResNet: it must be at least 1.")
        self.conv1 = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = self._stage(width, width, blocks, stride=1)
        self.layer2 = self._stage(width, 2 * width, blocks, stride=2)
        self.layer3 = self._stage(2 * width, 4 * width, blocks, stride=2)
        self.fc = nn.Linear(4 * width, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, BasicBlock) and zero_init_residual:
                nn.init.zeros_(module.bn2.weight)
        nn.init.zeros_(self.fc.bias)

    @staticmethod
    def _stage(in_channels: int, channels: int, blocks: int, stride: int) -> nn.Sequential:
        rest = (BasicBlock(channels, channels) for _ in range(blocks - 1))
        return nn.Sequential(BasicBlock(in_channels, channels, stride), *rest)

    def forward(self, x: Tensor) -> Tensor:
        """Maps images [B, in_channels, H, W] to logits [B, num_classes]."""
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        for stage in (self.layer1, self.layer2, self.layer3):
            for block in stage:  # not stage(x): its frames would keep the stage's input alive until it ends
                x = block(x)
        return self.fc(x.mean((2, 3)))
