"""Networks to train: ResNet-50 in plain PyTorch, and one of many small layers."""

import torch
from torch import nn


class Bottleneck(nn.Module):
    """Three convolutions beside a shortcut."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        out = 4 * width
        self.body = nn.Sequential(
            *_convolution(channels, width, 1),
            nn.ReLU(inplace=True),
            *_convolution(width, width, 3, stride),
            nn.ReLU(inplace=True),
            *_convolution(width, out, 1),
        )
        plain = stride == 1 and channels == out
        self.shortcut = nn.Identity() if plain else nn.Sequential(*_convolution(channels, out, 1, stride))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Sum of both paths."""
        result: torch.Tensor = torch.relu_(self.body(inputs) + self.shortcut(inputs))
        return result


def resnet50() -> nn.Sequential:
    """The usual network: 1000 classes, kernels of the shapes in :func:`benchmarks.shapes.resnet50`."""
    layers: list[nn.Module] = [*_convolution(3, 64, 7, 2), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)]
    channels = 64
    for width, blocks, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
        for block in range(blocks):
            layers.append(Bottleneck(channels, width, stride if block == 0 else 1))
            channels = 4 * width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 1000))


def small_layers() -> nn.Sequential:
    """20 linear layers of 50 × 50: 50,000 weights in kernels."""
    return nn.Sequential(*(nn.Linear(50, 50) for _ in range(20)))


def _convolution(channels: int, out: int, size: int, stride: int = 1) -> list[nn.Module]:
    return [nn.Conv2d(channels, out, size, stride, size // 2, bias=False), nn.BatchNorm2d(out)]
