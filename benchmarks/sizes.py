"""One float32 tensor of 10^4 to 10^9 weights: how time and memory grow."""

import json
import subprocess
import sys
import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import st3core
from benchmarks import step
from benchmarks.grid import Grid, number, with_spread
from benchmarks.shapes import normal
from benchmarks.timing import Call, Row, interleaved, summary

SIZES = tuple(10**exponent for exponent in range(4, 9))
HUGE = 10**9
LINEAR_FROM = 10**6

COLD, WARM, OPERATOR, STEP = "cold search", "warm search", "operator", "whole step"
_UNITS = {
    "read": ("read",),
    "copy": ("copy",),
    COLD: ("read",),
    WARM: ("read",),
    OPERATOR: ("copy",),
    STEP: ("read", "copy"),
}
_AT_ONCE = 10**6
_HUGE_ROUNDS = 5
_STATUS = Path("/proc/self/status")


def measure(sparsity: float, rounds: int, *, huge: bool) -> dict[str, Any]:
    """Time and memory of every size, and the slopes of time."""
    sizes = [_measure_size(count, sparsity, rounds) for count in (*SIZES, *([HUGE] if huge else []))]
    return {"sizes": sizes, "slopes": {name: _slope(sizes, name) for name in _UNITS}}


def grids(figures: dict[str, Any]) -> list[Grid]:
    """Tables of ratios, of milliseconds and of memory."""
    sizes, names = figures["sizes"], (COLD, WARM, OPERATOR, STEP)
    units = ("reads", "reads", "copies", "reads + copies")
    ratios = tuple((_power(s), *(with_spread(s["rows"][name]) for name in names)) for s in sizes)
    times = [(_power(s), *(number(s["rows"][name]["milliseconds"]) for name in _UNITS)) for s in sizes]
    slopes = ("slope from 10^6 up", *(f"{figures['slopes'][name]:.2f}" for name in _UNITS))
    kinds = [kind for kind in _MEMORY if kind in sizes[0]["memory"]]
    memory = tuple((_power(s), *(f"{s['memory'][kind] / 1e6:.2f}" for kind in kinds)) for s in sizes)
    columns = tuple(f"{name}, in {unit}" for name, unit in zip(names, units, strict=True))
    return [
        Grid("Size: ratios", ("weights", *columns), ratios),
        Grid("Size: milliseconds on this machine", ("weights", *_UNITS), (*times, slopes)),
        Grid("Size: extra memory in MB", ("weights", *(_MEMORY[kind] for kind in kinds)), memory),
    ]


_MEMORY = {
    "search": "`find_thresholds`, traced",
    "operator": "`sparsify(..., out=...)`, traced",
    "process": "growth of the process, both",
}


def _measure_size(count: int, sparsity: float, rounds: int) -> dict[str, Any]:
    figures = _measure_here(count, sparsity, min(rounds, _HUGE_ROUNDS) if count >= HUGE else rounds)
    if _STATUS.exists():
        figures["memory"]["process"] = process_growth(count, sparsity)  # this process has let go of its weights
    return figures


def _measure_here(count: int, sparsity: float, rounds: int) -> dict[str, Any]:
    weights = normal(count)
    output = np.empty_like(weights)
    repeats = max(_AT_ONCE // count, 1)
    seconds = interleaved(_candidates(weights, output, sparsity), rounds, repeats=repeats)
    threshold = float(st3core.find_thresholds([weights], sparsity)[0])
    traced = {
        "search": traced_peak(step.cold_search([weights], sparsity)),
        "operator": traced_peak(lambda: st3core.sparsify(weights, threshold, out=output)),
    }
    rows = summary(seconds, _UNITS)
    return {"weights": count, "rounds": rounds, "calls_a_round": repeats, "rows": rows, "memory": traced}


def _candidates(weights: np.ndarray, output: np.ndarray, sparsity: float) -> dict[str, Call]:
    apply = step.operator([weights], [output])
    thresholds = st3core.find_thresholds([weights], sparsity)
    return {
        "read": step.read(weights.ravel()),
        COLD: step.cold_search([weights], sparsity),
        WARM: step.warm_search([weights], sparsity),
        "copy": step.copy(weights.ravel(), output.ravel()),
        OPERATOR: lambda: apply(thresholds),
        STEP: step.whole_step(step.warm_search([weights], sparsity), apply),
    }


def traced_peak(call: Call) -> int:
    """Peak of the memory that Python and NumPy allocate in a call, in bytes."""
    call()
    tracemalloc.start()
    call()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return peak


_GROWTH = """
import json, sys
import numpy as np
import st3core
from benchmarks.shapes import normal
from benchmarks.sizes import peak_bytes

count, sparsity = json.loads(sys.argv[1])

def whole(weights, output):
    st3core.sparsify(weights, float(st3core.find_thresholds([weights], sparsity)[0]), out=output)

small = normal(10**6)
whole(small, np.ones_like(small))  # loads the kernels, starts the threads
weights = normal(count)
output = np.ones_like(weights)
before = peak_bytes()
whole(weights, output)
print(peak_bytes() - before)
"""


def process_growth(count: int, sparsity: float) -> int:
    """Growth of the largest size of a fresh process by a search and the operator, in bytes."""
    command = [sys.executable, "-c", _GROWTH, json.dumps([count, sparsity])]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def peak_bytes() -> int:
    """Largest size of this process so far; on Linux only."""
    # getrusage's figure would be that of the parent, where it was larger.
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM"))
    return 1024 * int(line.split()[1])


def _slope(sizes: Sequence[dict[str, Any]], name: str) -> float:
    """Of log time over log size; 1 is linear."""
    points: list[tuple[int, Row]] = [(s["weights"], s["rows"][name]) for s in sizes if s["weights"] >= LINEAR_FROM]
    counts, times = [count for count, _ in points], [row["milliseconds"] for _, row in points]
    return float(np.polyfit(np.log(counts), np.log(times), 1)[0])


def _power(size: dict[str, Any]) -> str:
    return f"10^{round(np.log10(size['weights']))}"
