"""Small models that cover the layers, and a way to train them."""

import torch
from torch import nn

from st3core import PolynomialSchedule


def every_layer() -> nn.ModuleDict:
    """One layer of each kind that is sparsified, with groups where there are any."""
    return nn.ModuleDict(
        {
            "linear": nn.Linear(6, 5),
            "conv1": nn.Conv1d(4, 6, 3),
            "conv2": nn.Conv2d(4, 6, 3, groups=2),
            "depthwise": nn.Conv2d(4, 8, 3, groups=4),
            "conv3": nn.Conv3d(2, 3, 2),
            "transposed1": nn.ConvTranspose1d(4, 6, 3),
            "transposed2": nn.ConvTranspose2d(4, 6, 3, groups=2),
            "transposed3": nn.ConvTranspose3d(2, 3, 2),
        }
    )


def small_net(seed: int = 0) -> nn.Sequential:
    """Convolution, transposed convolution, norm and linear layer; input (batch, 1, 6, 6)."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.ConvTranspose2d(4, 6, 2, groups=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(150, 3),
    )


def batch(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(8, 1, 6, 6, generator=generator), torch.randint(3, (8,), generator=generator)


def train_step(model, optimizer, sparsifier=None, seed=0):
    images, labels = batch(seed)
    optimizer.zero_grad()
    loss = nn.functional.cross_entropy(model(images), labels)
    loss.backward()
    optimizer.step()
    if sparsifier is not None:
        sparsifier.step()
    return float(loss.detach())


def ramp(sparsity: float = 0.9, end: int = 10, **options) -> PolynomialSchedule:
    return PolynomialSchedule(sparsity, begin_step=0, end_step=end, **options)
