"""Steps of training in PyTorch, dense and sparse by turns."""

from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.grid import Grid, number, with_spread
from benchmarks.network import resnet50, small_layers
from benchmarks.timing import Call, Row, Seconds, alternating, quartiles, ratios
from st3_torch import PolynomialSchedule, Sparsifier

RESNET, SMALL = "ResNet-50, batch 8 of 96 × 96", "20 linear layers of 50 × 50, batch 8"
_PAIRS, _BLOCKS, _BLOCK = 30, 40, 50
_WARM_UP = 3


def measure(sparsity: float, rounds: int) -> dict[str, Any]:
    """Ratio and difference of a sparse and a dense step; ``rounds`` below the usual ones make it shorter."""
    images, labels = torch.randn(8, 3, 96, 96), torch.randint(1000, (8,))
    pairs, blocks = min(_PAIRS, 2 * rounds), min(_BLOCKS, 4 * rounds)
    large = alternating(_steps(resnet50, images, labels, sparsity, pairs), pairs)
    vectors, classes = torch.randn(8, 50), torch.randint(50, (8,))
    small_steps = _steps(small_layers, vectors, classes, sparsity, blocks * _BLOCK)
    small = alternating(small_steps, blocks, repeats=_BLOCK)
    return {
        RESNET: {"rounds": pairs, "calls_a_round": 1, **_figures(large)},
        SMALL: {"rounds": blocks, "calls_a_round": _BLOCK, **_figures(small)},
    }


def grids(figures: dict[str, Any]) -> list[Grid]:
    """One table, a row a network."""
    columns = ("", "sparse step, in dense steps", "added, µs on this machine", "dense step, ms on this machine")
    rows = (
        (name, with_spread(own["ratio"]), with_spread(own["added_microseconds"]), number(own["dense_milliseconds"]))
        for name, own in figures.items()
    )
    return [Grid("A training step in PyTorch", columns, tuple(rows))]


def _steps(make: Any, inputs: torch.Tensor, labels: torch.Tensor, sparsity: float, count: int) -> dict[str, Call]:
    """A step without and one with a Sparsifier, whose schedule rises over all ``count`` steps."""
    schedule = PolynomialSchedule(sparsity, begin_step=0, end_step=count)
    models: dict[str, nn.Module] = {}
    for name in ("dense", "sparse"):
        torch.manual_seed(0)
        models[name] = make()
    sparsifier = Sparsifier(models["sparse"], schedule)
    steps = {
        "dense": _step(models["dense"], None, inputs, labels),
        "sparse": _step(models["sparse"], sparsifier, inputs, labels),
    }
    for step in [*steps.values()] * _WARM_UP:
        step()
    return steps


def _step(model: nn.Module, sparsifier: Sparsifier | None, inputs: torch.Tensor, labels: torch.Tensor) -> Call:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), labels).backward()
        optimizer.step()
        if sparsifier is not None:
            sparsifier.step()

    return step


def _figures(seconds: Seconds) -> dict[str, float | Row]:
    added = np.array(seconds["sparse"]) - np.array(seconds["dense"])
    return {
        "ratio": ratios(seconds, "sparse", ["dense"]),
        "added_microseconds": quartiles(1e6 * added),
        "dense_milliseconds": 1e3 * float(np.median(seconds["dense"])),
    }
