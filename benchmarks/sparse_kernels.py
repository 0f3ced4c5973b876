"""Does a sparse linear layer run faster on the CPU? ``torch.sparse_csr`` beside the dense product.

``python -m benchmarks.sparse_kernels`` measures, and writes the figures and the table in ``docs/howto/export.md``.

On one thread: with several, each product ends with threads that wait for each other. Where another process has one of
the cores, they wait for the scheduler, and the ratios say how often it looks (every 4 ms), not what is computed.
"""

import json
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from benchmarks import machine
from benchmarks.grid import Grid, with_spread
from benchmarks.marked import replaced
from benchmarks.timing import Call, interleaved, ratios

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks/results/sparse_kernels.json"
PAGE = ROOT / "docs/howto/export.md"

SPARSITIES = (0.5, 0.8, 0.9, 0.95, 0.98, 0.99)
BATCHES = (1, 16, 256)
WIDTH = 2048

_ROUNDS, _SECONDS = 15, 0.01
MARK = "from python -m benchmarks.sparse_kernels"


def products(sparsity: float, batch: int, width: int = WIDTH) -> dict[str, Call]:
    """The same layer of ``width`` inputs and outputs twice, with its zeros stored and without."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(width, width, generator=generator)
    weight[weight.abs() <= weight.abs().flatten().kthvalue(int(sparsity * weight.numel())).values] = 0
    inputs = torch.randn(batch, width, generator=generator)
    sparse, columns = weight.to_sparse_csr(), inputs[0] if batch == 1 else inputs.T.contiguous()
    return {"dense": lambda: functional.linear(inputs, weight), "sparse": lambda: sparse @ columns}


def measure() -> dict[str, Any]:
    """Time of the sparse product in dense ones, by batch and sparsity."""
    torch.set_num_threads(1)
    with torch.inference_mode():
        found = {str(batch): {str(s): _ratio(products(s, batch)) for s in SPARSITIES} for batch in BATCHES}
    _check(found)
    return {
        "machine": {**machine.provenance("python -m benchmarks.sparse_kernels"), "threads": 1},
        "width": WIDTH,
        "rounds": _ROUNDS,
        "ratios": found,
    }


def _ratio(calls: dict[str, Call]) -> dict[str, float]:
    (seconds,) = interleaved({"dense": calls["dense"]}, 1)["dense"]
    repeats = max(1, round(_SECONDS / seconds))
    return ratios(interleaved(calls, _ROUNDS, repeats=repeats), "sparse", ["dense"])


def _check(found: dict[str, dict[str, dict[str, float]]]) -> None:
    """Raise a RuntimeError if the load of the machine was measured: fifty times less work must not take as long."""
    for batch, by_sparsity in found.items():
        most, least = (by_sparsity[str(s)] for s in (SPARSITIES[0], SPARSITIES[-1]))
        if least["quartile_3"] > 0.5 * most["quartile_1"]:
            raise RuntimeError(f"measure: the machine is too busy, got {most} and {least} for a batch of {batch}")


def table(figures: dict[str, Any]) -> str:
    """Rows of sparsity, columns of batch size."""
    columns = ("zeros", *(f"batch {batch}" for batch in figures["ratios"]))
    rows = (
        (f"{100 * s:.0f} %", *(with_spread(by_sparsity[str(s)]) for by_sparsity in figures["ratios"].values()))
        for s in SPARSITIES
    )
    own = figures["machine"]
    software, rounds = machine.versions(own), figures["rounds"]
    origin = f"`{own['command']}` at commit {own['commit']}, on {own['processor']}, one thread"
    where = f"{origin}; {software}; medians of {rounds} rounds, and quartiles"
    return f"{Grid('', columns, tuple(rows)).markdown()}\n\n{where}."


def main() -> None:
    """Measure and write."""
    figures = measure()
    RESULTS.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    PAGE.write_text(replaced(PAGE.read_text(encoding="utf-8"), MARK, table(figures)), encoding="utf-8")
    print(table(figures))


if __name__ == "__main__":
    main()
