"""A training run that saves after every step and goes on from what it finds; a test kills it.

``python -m tests.st3_torch.killed CHECKPOINT STEPS [KILLED_AT]``
"""

import os
import signal
import sys
from pathlib import Path

import torch
from torch import nn

from st3_torch import Sparsifier
from st3_torch.checkpoint import replacing
from tests.st3_torch.networks import batch, ramp, small_net


def run(path: Path, steps: int, killed_at: float = float("inf")) -> None:
    """Train to ``steps``; at step ``killed_at`` there is a kill -9, in the middle of saving if it ends in .5."""
    model = small_net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    parts = {"model": model, "optimizer": optimizer, "sparsifier": Sparsifier(model, ramp(0.9, end=12))}
    if path.exists():
        states = torch.load(path, weights_only=True)
        torch.set_rng_state(states["rng"])
        for name, part in parts.items():
            part.load_state_dict(states[name])
    while parts["sparsifier"].step_count < steps:
        one_step(**parts)
        step = parts["sparsifier"].step_count
        if step == killed_at:
            os.kill(os.getpid(), signal.SIGKILL)
        with replacing(path) as file:
            torch.save({name: part.state_dict() for name, part in parts.items()} | {"rng": torch.get_rng_state()}, file)
            if step + 0.5 == killed_at:
                os.truncate(file, file.stat().st_size // 2)
                os.kill(os.getpid(), signal.SIGKILL)


def one_step(model: nn.Module, optimizer: torch.optim.Optimizer, sparsifier: Sparsifier) -> None:
    """A step with random numbers in it."""
    images, labels = batch(sparsifier.step_count)
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(images + 0.1 * torch.randn_like(images)), labels).backward()
    optimizer.step()
    sparsifier.step()


if __name__ == "__main__":
    run(Path(sys.argv[1]), int(sys.argv[2]), *map(float, sys.argv[3:]))
