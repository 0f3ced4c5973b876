"""Steps of training in PyTorch, dense and sparse by turns."""

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.grid import Grid, number, with_spread
from benchmarks.network import resnet50, small_layers
from benchmarks.shapes import he_normal
from benchmarks.shapes import resnet50 as shapes
from benchmarks.step import copy, read
from benchmarks.timing import Call, Row, Seconds, alternating, quartiles, ratios
from st3_torch import PolynomialSchedule, Sparsifier
from st3core import kernels

RESNET, SMALL = "ResNet-50, batch 8 of 96 × 96", "20 linear layers of 50 × 50, batch 8"
_PAIRS, _BLOCKS, _BLOCK = 30, 40, 50
_WARM_UP = 3


def measure(sparsity: float, rounds: int) -> dict[str, Any]:
    """Ratio and difference of a sparse and a dense step; ``rounds`` below the usual ones make it shorter."""
    images, labels = torch.randn(8, 3, 96, 96), torch.randint(1000, (8,))
    pairs, blocks = min(_PAIRS, 2 * rounds), min(_BLOCKS, 4 * rounds)
    large = alternating(_steps(resnet50, images, labels, sparsity), pairs)
    vectors, classes = torch.randn(8, 50), torch.randint(50, (8,))
    small_steps = _steps(small_layers, vectors, classes, sparsity)
    small = alternating(small_steps, blocks, repeats=_BLOCK)
    return {
        RESNET: {"rounds": pairs, "calls_a_round": 1, **_figures(large), "floor": _floor(pairs)},
        SMALL: {
            "rounds": blocks,
            "calls_a_round": _BLOCK,
            **_figures(small),
            "phases": _phases(sparsity, vectors, classes, blocks),
            "parts": _parts(sparsity, blocks * 10),
        },
    }


def grids(figures: dict[str, Any]) -> list[Grid]:
    """One table, a row a network."""
    columns = ("", "sparse step, in dense steps", "added, µs on this machine", "dense step, ms on this machine")
    rows = (
        (name, with_spread(own["ratio"]), with_spread(own["added_microseconds"]), number(own["dense_milliseconds"]))
        for name, own in figures.items()
    )
    large, own, heads = figures[RESNET], figures[SMALL], ("", "median, µs on this machine")
    floor = large.get("floor", {})  # not part of older figures, and neither are the phases
    shares = ((n, number(ms), f"{100 * ms / large['dense_milliseconds']:.1f} %") for n, ms in floor.items())
    tables = {
        "Where the added time of the small layers goes": own.get("phases", {}),
        "What this library does there": own["parts"],
    }
    found = [
        Grid("A training step in PyTorch", columns, tuple(rows)),
        Grid("The floor of the ResNet-50's step", ("", "ms on this machine", "of its dense step"), tuple(shares)),
        *(
            Grid(title, heads, tuple((name, number(value)) for name, value in table.items()))
            for title, table in tables.items()
        ),
    ]
    return [grid for grid in found if grid.rows]


def _steps(make: Any, inputs: torch.Tensor, labels: torch.Tensor, sparsity: float) -> dict[str, Call]:
    """A step without and one with a Sparsifier."""
    schedule = _late_ramp(sparsity)
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


def _late_ramp(sparsity: float) -> PolynomialSchedule:
    """The last part of a ramp over ten thousand steps."""
    return PolynomialSchedule(sparsity, begin_step=0, end_step=5_000, initial_sparsity=0.875 * sparsity)


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


def _floor(rounds: int) -> dict[str, float]:
    """Median milliseconds of the two passes over the kernels that no sparse step can do without."""
    flat = np.concatenate([weight.ravel() for weight in he_normal(shapes())])
    calls = {"reading all kernels once": read(flat), "copying them once": copy(flat, np.empty_like(flat))}
    return {name: 1e3 * float(np.median(seconds)) for name, seconds in alternating(calls, rounds).items()}


def _phases(sparsity: float, inputs: torch.Tensor, labels: torch.Tensor, rounds: int) -> dict[str, float]:
    """Median microseconds that the sparse model's step takes longer than the dense one's, phase by phase."""
    names = ("`zero_grad`", "forward pass", "backward pass", "optimizer's step", "`Sparsifier.step()`")
    spent: dict[str, list[list[float]]] = {"dense": [], "sparse": []}
    models = {name: small_layers() for name in spent}
    sparsifiers = {"dense": None, "sparse": Sparsifier(models["sparse"], _late_ramp(sparsity))}
    optimizers = {name: torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9) for name, model in models.items()}
    for _ in range(rounds):
        for name, model in models.items():
            for _ in range(_BLOCK):
                spent[name].append(_phase_seconds(model, optimizers[name], sparsifiers[name], inputs, labels))
    added = np.median(spent["sparse"], axis=0) - np.median(spent["dense"], axis=0)
    return dict(zip(names, (1e6 * added).tolist(), strict=True))


def _phase_seconds(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    sparsifier: Sparsifier | None,
    inputs: torch.Tensor,
    labels: torch.Tensor,
) -> list[float]:
    clock = [time.perf_counter()]
    optimizer.zero_grad()
    clock.append(time.perf_counter())
    loss = nn.functional.cross_entropy(model(inputs), labels)
    clock.append(time.perf_counter())
    loss.backward()
    clock.append(time.perf_counter())
    optimizer.step()
    clock.append(time.perf_counter())
    if sparsifier is not None:
        sparsifier.step()
    clock.append(time.perf_counter())
    return np.diff(clock).tolist()


def _parts(sparsity: float, count: int) -> dict[str, float]:
    """Median microseconds of what a sparse step of the small layers adds."""
    torch.manual_seed(0)
    model, spent = small_layers(), _Spent()
    sparsifier = Sparsifier(model, _late_ramp(sparsity))
    step = _step(model, None, torch.randn(8, 50), torch.randint(50, (8,)))
    apply_all, search_all = kernels.apply, kernels.search
    kernels.apply, kernels.search = spent.counting(apply_all), spent.counting(search_all)
    model.register_forward_pre_hook(lambda *_: spent.start(), prepend=True)
    model.register_forward_pre_hook(lambda *_: spent.stop("hook"))
    try:
        for _ in range(count):
            step()
            spent.start()
            sparsifier.step()
            spent.stop("step")
    finally:
        kernels.apply, kernels.search = apply_all, search_all
    hook, search, apply, look = (
        np.array([entry[place] for entry in spent.seconds[name]])[-count // 2 :]
        for place in (0, 1)
        for name in ("hook", "step")
    )
    named = {
        "before the forward pass: compiled kernel": apply,
        "before the forward pass: Python": hook - apply,
        "`Sparsifier.step()`: compiled kernel": look,
        "`Sparsifier.step()`: Python": search - look,
        "all before the forward pass, nothing in between": _alone(lambda: sparsifier._before_forward(model, ()), count),
        "`Sparsifier.step()`, nothing in between": _alone(sparsifier.step, count),
    }
    return {name: 1e6 * float(np.median(seconds)) for name, seconds in named.items()}


def _alone(run: Call, count: int) -> list[float]:
    """Seconds of every call, one right after the other."""
    return alternating({"alone": run}, count)["alone"]


class _Spent:
    """Seconds by name, an entry a call: all of them, and those in compiled kernels."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[tuple[float, float]]] = {"hook": [], "step": []}
        self._started, self._kernels = 0.0, 0.0

    def start(self) -> None:
        self._kernels, self._started = 0.0, time.perf_counter()

    def stop(self, name: str) -> None:
        self.seconds[name].append((time.perf_counter() - self._started, self._kernels))

    def counting(self, run: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any) -> Any:
            start = time.perf_counter()
            result = run(*arguments)
            self._kernels += time.perf_counter() - start
            return result

        return timed
