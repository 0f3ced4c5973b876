"""Fresh processes: what the import costs, and the first search, with and without kernels on disk."""

import json
import os
import subprocess
import sys
import tempfile
from typing import Any

from benchmarks.grid import Grid, number, spread
from benchmarks.timing import Row, quartiles

IMPORT, WARM, COLD = "`import st3core` after `import numpy`", "first search, kernels on disk", "first search, compiling"
_RUNS, _COLD_RUNS = 7, 3

_CHILD = """
import json, time

begin = time.perf_counter()
import numpy as np
numpy_there = time.perf_counter()
import st3core
core_there = time.perf_counter()
weights = [np.random.default_rng(0).standard_normal((1000, 1000), np.float32)]
ready = time.perf_counter()
st3core.find_thresholds(weights, 0.9)
done = time.perf_counter()
print(json.dumps([numpy_there - begin, core_there - numpy_there, done - ready]))
"""


def measure() -> dict[str, Any]:
    """Seconds in fresh processes, which share a cache that begins empty."""
    cold = []
    for _ in range(_COLD_RUNS):
        with tempfile.TemporaryDirectory() as cache:
            cold.append(_run(cache)[2])
            warm = [_run(cache) for _ in range(_RUNS)] if len(cold) == _COLD_RUNS else []
    numpy_seconds, core_seconds, first = zip(*warm, strict=True)
    rows = {"`import numpy`": numpy_seconds, IMPORT: core_seconds, WARM: first, COLD: cold}
    return {"runs": _RUNS, "cold_runs": _COLD_RUNS, "rows": {name: quartiles(values) for name, values in rows.items()}}


def grids(figures: dict[str, Any]) -> list[Grid]:
    """One table, in seconds."""
    rows: dict[str, Row] = figures["rows"]
    cells = tuple((name, number(row["median"]), spread(row)) for name, row in rows.items())
    return [Grid("Start", ("", "seconds on this machine", "quartiles"), cells)]


def _run(cache: str) -> list[float]:
    """Seconds of the two imports and of the first search in a new process."""
    environment = {**os.environ, "NUMBA_CACHE_DIR": cache}
    command = [sys.executable, "-c", _CHILD]
    output = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
    seconds: list[float] = json.loads(output)
    return seconds
