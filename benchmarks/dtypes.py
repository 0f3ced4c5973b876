"""The kernels of ResNet-50 in every dtype, against reading and copying the bytes of that dtype."""

from typing import Any

from benchmarks import step
from benchmarks.grid import Grid, number, with_spread
from benchmarks.shapes import he_normal, in_one_piece, resnet50
from benchmarks.timing import interleaved, summary
from st3core.memory import MEMORY_FORMATS

COLD, WARM, OPERATOR, STEP = "cold search", "warm search", "operator", "whole step"
_UNITS = {COLD: ("read",), WARM: ("read",), OPERATOR: ("copy",), STEP: ("read", "copy"), "read": ("read",)}


def measure(sparsity: float, rounds: int) -> dict[str, Any]:
    """Ratios for every dtype."""
    return {"rounds": rounds, "dtypes": {name: _measure_dtype(name, sparsity, rounds) for name in MEMORY_FORMATS}}


def grids(figures: dict[str, Any]) -> list[Grid]:
    """One table, a row a dtype."""
    names = (COLD, WARM, OPERATOR, STEP)
    rows = tuple(
        (f"`{dtype}`", *(with_spread(own[name]) for name in names), number(own[STEP]["milliseconds"]))
        for dtype, own in figures["dtypes"].items()
    )
    units = ("reads", "reads", "copies", "reads + copies")
    columns = (f"{name}, in {unit}" for name, unit in zip(names, units, strict=True))
    return [Grid("Dtype", ("", *columns, "whole step, ms on this machine"), rows)]


def _measure_dtype(dtype: str, sparsity: float, rounds: int) -> dict[str, dict[str, float]]:
    flat, weights = in_one_piece([w.astype(MEMORY_FORMATS[dtype].dtype) for w in he_normal(resnet50())])
    target, outputs = in_one_piece(weights)
    apply, thresholds = step.operator(weights, outputs), step.cold_search(weights, sparsity)()
    candidates = {
        "read": step.read(flat),
        COLD: step.cold_search(weights, sparsity),
        WARM: step.warm_search(weights, sparsity),
        "copy": step.copy(flat, target),
        OPERATOR: lambda: apply(thresholds),
        STEP: step.whole_step(step.warm_search(weights, sparsity), apply),
    }
    return summary(interleaved(candidates, rounds), _UNITS)
