"""The digits network: 23 thousand parameters, 1x32x32 grey images in, ten logits out.

Small, but built like the networks that are shipped to edge devices: Conv-BatchNorm-ReLU, a depthwise separable block,
a residual block, max pooling, global average pooling and a linear classifier.
"""

from __future__ import annotations

from torch import Tensor, nn


def conv_block(inputs: int, outputs: int, kernel: int = 3, groups: int = 1) -> nn.Sequential:
    """Convolution of the same height and width, BatchNorm and ReLU."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    )


def separable_block(inputs: int, outputs: int) -> nn.Sequential:
    """A depthwise 3x3 convolution, which looks at space, then a 1x1 convolution, which mixes channels (MobileNet)."""
    return nn.Sequential(conv_block(inputs, inputs, groups=inputs), conv_block(inputs, outputs, kernel=1))


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions whose result is added to their input (ResNet)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = conv_block(channels, channels)
        self.second = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
        )
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(x + self.second(self.first(x)))


def build() -> nn.Module:
    """The network without its weights; what `source` in recipe.toml names."""
    return nn.Sequential(
        conv_block(1, 16),  # 16 x 32 x 32
        separable_block(16, 32),
        nn.MaxPool2d(2),  # 32 x 16 x 16
        ResidualBlock(32),
        nn.MaxPool2d(2),  # 32 x 8 x 8
        separable_block(32, 64),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, 10),
    )
