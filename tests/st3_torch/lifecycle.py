"""The second half of a training: resume, train, finalize, export. ``python -m tests.st3_torch.lifecycle NAME FOLDER``."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.network import resnet50
from st3_torch import Sparsifier
from st3_torch.checkpoint import replacing
from st3_torch.export import save_sparse
from tests.st3_torch.gpt2 import gpt2, sentences
from tests.st3_torch.networks import ramp

HALF = 5


def seeded_resnet50() -> nn.Module:
    torch.manual_seed(0)
    return resnet50()


def images(step: int) -> torch.Tensor:
    return torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(step))


def classes(model: nn.Module, step: int) -> torch.Tensor:
    return nn.functional.cross_entropy(model(images(step)), torch.tensor([step, step + 1]))


def next_words(model: nn.Module, step: int) -> torch.Tensor:
    words = torch.stack([row["input_ids"] for row in sentences()[4 * step : 4 * step + 4]])
    loss: torch.Tensor = model(words, labels=words).loss
    return loss


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module, int], torch.Tensor]]] = {
    "resnet50": (seeded_resnet50, classes),
    "gpt2": (gpt2, next_words),
}


def start(name: str) -> dict[str, Any]:
    """Model, optimizer and Sparsifier."""
    model = MODELS[name][0]()
    sparsifier = Sparsifier(model, ramp(0.9, end=8))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    return {"model": model, "optimizer": optimizer, "sparsifier": sparsifier}


def train(name: str, model: nn.Module, optimizer: torch.optim.Optimizer, sparsifier: Sparsifier) -> None:
    """Half of the training."""
    torch.manual_seed(sparsifier.step_count)  # dropout
    for _ in range(HALF):
        optimizer.zero_grad()
        MODELS[name][1](model, sparsifier.step_count).backward()
        optimizer.step()
        sparsifier.step()


def save(parts: dict[str, Any], path: Path) -> None:
    """All states in one file."""
    with replacing(path) as file:
        torch.save({name: part.state_dict() for name, part in parts.items()}, file)


def second_half(name: str, folder: Path) -> None:
    """From a checkpoint to a sparse file."""
    parts = start(name)
    states = torch.load(folder / "checkpoint.pt", weights_only=True)
    for part, state in states.items():
        parts[part].load_state_dict(state)
    train(name, **parts)
    save_sparse(parts["sparsifier"].finalize(), folder / "sparse.safetensors")


if __name__ == "__main__":
    torch.set_num_threads(1)
    second_half(sys.argv[1], Path(sys.argv[2]))
