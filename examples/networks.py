"""ResNets for small and large images (He et al., arXiv 1512.03385), as the authors of ST-3 train them.

The linear layer has no bias, and shortcuts that change the shape are 1 × 1 convolutions. All kernels start from normal
numbers with variance 2 / (inputs of an output).
"""

from collections import OrderedDict
from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional


class ResidualBlock(nn.Module):
    """``relu(body(x) + shortcut(x))``."""

    def __init__(self, body: nn.Module, shortcut: nn.Module) -> None:
        super().__init__()
        self.body, self.shortcut = body, shortcut

    def forward(self, images: Tensor) -> Tensor:
        """Feature maps, shape ``(N, C, H, W)``."""
        return functional.relu(self.body(images) + self.shortcut(images))


def conv_norm(inputs: int, outputs: int, size: int, stride: int = 1) -> nn.Sequential:
    """A convolution that keeps the image's size, or divides it by the stride, and batch norm."""
    conv = nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, bias=False)
    return nn.Sequential(OrderedDict(conv=conv, norm=nn.BatchNorm2d(outputs)))


def shortcut(inputs: int, outputs: int, stride: int) -> nn.Module:
    """What brings a block's input to the shape of its output."""
    return nn.Identity() if inputs == outputs and stride == 1 else conv_norm(inputs, outputs, 1, stride)


def basic_block(inputs: int, width: int, stride: int) -> ResidualBlock:
    """Two 3 × 3 convolutions."""
    body = nn.Sequential(conv_norm(inputs, width, 3, stride), nn.ReLU(), conv_norm(width, width, 3))
    return ResidualBlock(body, shortcut(inputs, width, stride))


def bottleneck(inputs: int, width: int, stride: int) -> ResidualBlock:
    """1 × 1, 3 × 3 and 1 × 1, to four times the width; the stride is that of the 3 × 3 convolution (version 1.5)."""
    outputs = 4 * width
    narrow, middle, wide = conv_norm(inputs, width, 1), conv_norm(width, width, 3, stride), conv_norm(width, outputs, 1)
    body = nn.Sequential(narrow, nn.ReLU(), middle, nn.ReLU(), wide)
    return ResidualBlock(body, shortcut(inputs, outputs, stride))


def resnet50(classes: int = 1000, width: int = 64, depths: Sequence[int] = (3, 4, 6, 3)) -> nn.Sequential:
    """ResNet-50 version 1.5 for images of 224 × 224 pixels.

    Args:
        classes: of the last layer.
        width: channels of the first convolution; 64, or less to try things out.
        depths: blocks of each stage.
    """
    layers: dict[str, nn.Module] = {"stem": nn.Sequential(conv_norm(3, width, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1))}
    inputs = width
    for stage, depth in enumerate(depths):
        channels = width * 2**stage
        for block in range(depth):
            layers[f"stage{stage + 1}_{block}"] = bottleneck(inputs, channels, 2 if stage and not block else 1)
            inputs = 4 * channels
    return initialized(layers, inputs, classes)


def cifar_resnet(classes: int = 10, width: int = 16, depth: int = 3) -> nn.Sequential:
    """ResNet of ``6 * depth + 2`` layers for images of 32 × 32 pixels; ResNet-20 by default.

    Args:
        classes: of the last layer.
        width: channels of the first convolution.
        depth: blocks of each of the three stages.
    """
    layers: dict[str, nn.Module] = {"stem": nn.Sequential(conv_norm(3, width, 3), nn.ReLU())}
    inputs = width
    for stage in range(3):
        channels = width * 2**stage
        for block in range(depth):
            layers[f"stage{stage + 1}_{block}"] = basic_block(inputs, channels, 2 if stage and not block else 1)
            inputs = channels
    return initialized(layers, inputs, classes)


def initialized(layers: dict[str, nn.Module], features: int, classes: int) -> nn.Sequential:
    """The network with its head, and first weights from the global random numbers."""
    head = {
        "pool": nn.AdaptiveAvgPool2d(1),
        "flatten": nn.Flatten(),
        "linear": nn.Linear(features, classes, bias=False),
    }
    model = nn.Sequential(OrderedDict(layers | head))
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    return model
