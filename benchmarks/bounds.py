"""What the library aims at, beside what was measured."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from operator import getitem
from typing import Any

from benchmarks import layers, sizes, start, training
from benchmarks.grid import Grid, number, spread
from benchmarks.timing import Row

Parts = dict[str, Any]


@dataclass(frozen=True)
class Bound:
    """One quantity, the range that it should be in, and where it is found among the figures.

    Args:
        what: the quantity and its unit.
        part: of the measurements.
        find: the quantity in that part's figures; a row where it has quartiles.
        low: least value, or None.
        high: greatest value, or None.
        is_ratio: whether it means the same on every machine.
    """

    what: str
    part: str
    find: Callable[[Parts], Row | float]
    low: float | None = None
    high: float | None = None
    is_ratio: bool = True

    def range(self) -> str:
        """The bound as text."""
        if self.low is None:
            return f"at most {self.high:g}"
        return f"at least {self.low:g}" if self.high is None else f"{self.low:g} to {self.high:g}"

    def measured(self, parts: Parts) -> tuple[float, str]:
        """The value, or its median, and the quartiles as text."""
        found = self.find(parts[self.part])
        return (found["median"], spread(found)) if isinstance(found, dict) else (found, "")

    def is_met(self, parts: Parts) -> bool:
        """Whether the value, or its median, is in the range."""
        value, _ = self.measured(parts)
        return (self.low is None or value >= self.low) and (self.high is None or value <= self.high)


def _find(*keys: str) -> Callable[[Parts], Any]:
    return lambda part: reduce(getitem, keys, part)


def _most_memory(part: Parts) -> float:
    return max(float(size["memory"][kind]) for size in part["sizes"] for kind in size["memory"]) / 1e6


BOUNDS = (
    Bound("warm search, in reads of the weights", "layers", _find("rows", layers.WARM), high=1.3),
    Bound("cold search, in reads of the weights", "layers", _find("rows", layers.COLD), high=3),
    Bound("operator with rescale, in copies of the weights", "layers", _find("rows", layers.OPERATOR), high=1.2),
    Bound("whole step with warm search, in reads + copies", "layers", _find("rows", layers.STEP), high=1.25),
    Bound(
        "sort, interpolate, mask and apply in PyTorch, in whole steps",
        "layers",
        _find("alternatives", layers.SORT_STEP),
        300,
    ),
    Bound(
        "`torch.nn.utils.prune.global_unstructured`, in whole steps", "layers", _find("alternatives", layers.PRUNE), 10
    ),
    Bound(
        "log-log slope of the cold search's time from 10^6 weights up", "sizes", _find("slopes", sizes.COLD), 0.95, 1.05
    ),
    Bound(
        "log-log slope of the whole step's time from 10^6 weights up", "sizes", _find("slopes", sizes.STEP), 0.95, 1.05
    ),
    Bound("training step of a ResNet-50, in dense steps", "training", _find(training.RESNET, "ratio"), high=1.03),
    Bound("largest extra memory at any size, MB", "sizes", _most_memory, high=4, is_ratio=False),
    Bound(
        "added to a training step of 20 small layers, µs",
        "training",
        _find(training.SMALL, "added_microseconds"),
        high=150,
        is_ratio=False,
    ),
    Bound("`import st3core` after `import numpy`, s", "start", _find("rows", start.IMPORT), high=0.7, is_ratio=False),
    Bound("first search with kernels on disk, s", "start", _find("rows", start.WARM), high=0.5, is_ratio=False),
    Bound("first search that compiles, s", "start", _find("rows", start.COLD), high=10, is_ratio=False),
)


def grid(parts: Parts) -> Grid:
    """Bounds of the parts that have been measured."""
    rows = []
    for bound in BOUNDS:
        if bound.part in parts:
            value, quartiles = bound.measured(parts)
            met = "yes" if bound.is_met(parts) else "no"
            rows.append((bound.what, bound.range(), number(value), quartiles, met))
    return Grid("Bound and measured", ("", "bound", "measured", "quartiles", "met"), tuple(rows))


def ratio_grid(parts: Parts, title: str) -> Grid:
    """Only what means the same on every machine, without the bounds."""
    chosen = [bound for bound in BOUNDS if bound.is_ratio and bound.part in parts]
    rows = [(bound.what, *_cells(bound.measured(parts))) for bound in chosen]
    return Grid(title, (title, "measured", "quartiles"), tuple(rows))


def _cells(measured: tuple[float, str]) -> tuple[str, str]:
    return number(measured[0]), measured[1]
