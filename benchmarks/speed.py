"""Speed of the threshold search and of the operator, side by side with their alternatives.

Run it from the repository's root: ``python -m benchmarks.speed``. Every round times every candidate once,
in this process; a table's ratios are medians over rounds, with their quartiles, so that other load on the
machine cancels. Milliseconds are of this machine and this hour.
"""

import argparse
import itertools
import json
import math
import os
import platform
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

import st3core
from benchmarks.shapes import he_normal, resnet50
from benchmarks.timing import interleaved, summary
from st3core.counting import ArrayCounter
from st3core.memory import MEMORY_FORMATS
from st3core.operators import apply_units, unit_table
from st3core.search import Forecast, count_thresholds
from st3core.threads import run, thread_count

Call = Callable[[], object]


def in_parts(function: Callable[..., Any], *arrays: np.ndarray) -> list[Any]:
    """``function`` on equal parts of flat arrays, one for each thread that the library would use."""
    parts = [np.array_split(array, thread_count()) for array in arrays]
    return run(function, list(zip(*parts, strict=True)))


def sort_and_interpolate(magnitudes: torch.Tensor, sparsity: float) -> float:
    """The quantile as the definition says it: all magnitudes sorted."""
    ordered = magnitudes.sort().values
    position = (len(ordered) - 1) * sparsity
    rank = math.floor(position)
    lower, upper = float(ordered[rank]), float(ordered[rank + 1])
    return lower + (position - rank) * (upper - lower)


def searches(weights: list[np.ndarray], sparsity: float) -> dict[str, Call]:
    """Ways to find the threshold. The alternatives get all magnitudes in one array, made beforehand."""
    flat = np.concatenate([np.abs(w).ravel() for w in weights])
    tensor, rank, count = torch.from_numpy(flat), math.floor((flat.size - 1) * sparsity), flat.size
    return {
        "read all weights": lambda: in_parts(np.max, flat),
        "st3core.find_thresholds": lambda: st3core.find_thresholds(weights, sparsity),
        "the same, from step to step": warm_search(weights, sparsity),
        "find_thresholds, st3_sigma": lambda: st3core.find_thresholds(weights, sparsity, "st3_sigma"),
        "numpy.partition": lambda: np.partition(flat, rank),
        "numpy.quantile": lambda: np.quantile(flat, sparsity),
        "torch.kthvalue": lambda: torch.kthvalue(tensor, rank + 1),
        "torch.topk": lambda: torch.topk(tensor, count - rank),
        "torch.sort, interpolate": lambda: sort_and_interpolate(tensor, sparsity),
    }


def warm_search(weights: list[np.ndarray], sparsity: float) -> Call:
    """The search as training uses it: made ready once, with a forecast, under a sparsity that moves."""
    dtypes, units = [w.dtype for w in weights], [1.0] * len(weights)
    counter, forecast = ArrayCounter(weights, units, [""] * len(weights)), Forecast()
    steps = itertools.count(1)

    def search() -> NDArray[np.float64]:
        moved = sparsity * (1 - 0.1 * (1 - min(next(steps) / 1000, 1)) ** 3)
        return count_thresholds(counter, moved, units, dtypes, forecast)

    return search


def operators(weights: list[np.ndarray], sparsity: float) -> dict[str, Call]:
    """Ways to apply the threshold to every tensor, into memory that is there already."""
    thresholds = st3core.find_thresholds(weights, sparsity).tolist()
    outputs = [np.empty_like(w) for w in weights]
    plain = st3core.Method("soft, no rescale", rescale="none")
    pairs = list(zip(weights, thresholds, outputs, strict=True))
    flat = np.concatenate([w.ravel() for w in weights])
    copied, memory = np.empty_like(flat), MEMORY_FORMATS["float32"]
    addresses = [(w.ctypes.data, o.ctypes.data) for w, _, o in pairs]
    tables = [unit_table(a, 4, w.shape, (0,), i) for i, (a, w) in enumerate(zip(addresses, weights, strict=True))]
    units, limits = np.concatenate(tables), np.array(thresholds)

    def apply(method: str | st3core.Method, check: bool) -> None:
        for weight, threshold, output in pairs:
            st3core.sparsify(weight, threshold, method, out=output, check_finite=check)

    return {
        "copy all weights": lambda: in_parts(np.copyto, copied, flat),
        "all tensors in one call": lambda: apply_units(units, limits, memory, st3core.get_method("st3")),
        "one call, no rescale": lambda: apply_units(units, limits, memory, plain),
        "st3core.sparsify": lambda: apply("st3", False),
        "the same, checked": lambda: apply("st3", True),
        "sparsify, no rescale": lambda: apply(plain, False),
        "torch, soft only": lambda: [torch.nn.functional.softshrink(torch.from_numpy(w), t) for w, t, _ in pairs],
    }


def extra_memory(call: Call) -> int:
    """Peak of the memory that a call takes, in bytes."""
    call()
    tracemalloc.start()
    call()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return peak


def show(console: Console, title: str, figures: dict[str, dict[str, float]], unit: str) -> None:
    """Print one table."""
    table = Table("", title=title)
    for column in ("median ms", f"ratio to {unit}", "quartiles"):
        table.add_column(column, justify="right")
    for name, row in figures.items():
        quartiles = f"{row['ratio_quartile_1']:.2f} - {row['ratio_quartile_3']:.2f}"
        table.add_row(name, f"{row['milliseconds']:.2f}", f"{row['ratio']:.2f}", quartiles)
    console.print(table)


def processor() -> str:
    """Name of the processor, where the system tells."""
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return names[0].partition(":")[2].strip() if names else platform.processor()


def main() -> None:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--sparsity", type=float, default=0.9, help="share of zeros")
    parser.add_argument("--rounds", type=int, default=9, help="how often every candidate is timed")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/speed.json"), help="JSON to write")
    options = parser.parse_args()
    torch.set_num_threads(thread_count())
    weights = he_normal(resnet50())
    count = sum(w.size for w in weights)
    console = Console(width=100)
    console.print(f"ResNet-50: {count:,} float32 weights in {len(weights)} tensors, sparsity {options.sparsity}")
    console.print(f"{processor()}, {os.cpu_count()} cores, {thread_count()} threads")
    search = summary(interleaved(searches(weights, options.sparsity), options.rounds), "read all weights")
    show(console, "Finding the threshold", search, "read")
    operator = summary(interleaved(operators(weights, options.sparsity), options.rounds), "copy all weights")
    show(console, "Applying it", operator, "copy")
    memory = extra_memory(lambda: st3core.find_thresholds(weights, options.sparsity))
    console.print(f"extra memory of find_thresholds: {memory / 1e6:.2f} MB")
    own = search["st3core.find_thresholds"]["ratio"]
    for name in ("numpy.partition", "torch.sort, interpolate"):
        console.print(f"find_thresholds is {search[name]['ratio'] / own:.0f}x as fast as {name}")
    figures = {
        "machine": {"processor": processor(), "cores": os.cpu_count(), "threads": thread_count()},
        "versions": {"numpy": np.__version__, "torch": torch.__version__, "python": platform.python_version()},
        "weights": count,
        "sparsity": options.sparsity,
        "search": search,
        "operator": operator,
        "extra_memory_bytes": memory,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
