"""Accuracy on handwritten digits at one sparsity: ST-3 against its neighbours and the dense network.

The networks are those of the study at 99 % zeros, whose recipe is that of ``examples/digits.py``, the same for every
method. Run it from the repository's root once ``python -m benchmarks.study --tasks digits`` has trained them:
``python -m benchmarks.accuracy``; ``python -m benchmarks.accuracy_page`` then writes the page.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from rich.console import Console

from benchmarks.grid import Grid
from benchmarks.marked import replaced
from benchmarks.study import results
from benchmarks.study.plan import Run
from examples.digits import Settings

METHODS = ("dense", "st3", "st3_sigma", "hard_ste", "gmp")
SPARSITY, SEEDS = 0.99, 5
RESULTS = Path(__file__).parent / "results/accuracy.json"
README = Path(__file__).parent.parent / "README.md"
MARK = "from python -m benchmarks.accuracy"
_MACHINE = ("processor", "cores", "threads", "system", "commit", "command")


@dataclass(frozen=True)
class Result:
    """One trained network."""

    method: str
    seed: int
    accuracy: float
    sparsity: float


def trained(found: results.Found) -> list[tuple[Result, dict[str, Any]]]:
    """The study's networks of this table, and what each was trained on and with.

    Raises:
        RuntimeError: some are missing.
    """
    known = dict(found)
    runs = [Run("digits", m, 0.0 if m == "dense" else SPARSITY, seed) for m in METHODS for seed in range(SEEDS)]
    missing = [run for run in runs if run not in known]
    if missing:
        raise RuntimeError(f"trained: train them by python -m benchmarks.study --tasks digits, got no {missing[0]}")
    return [
        (Result(run.method, run.seed, known[run]["score"] / 100, known[run]["zeros"]), known[run]["setting"])
        for run in runs
    ]


def summarize(results: list[Result], method: str) -> dict[str, Any]:
    """Figures of one method over all seeds; the deviation is that of a sample."""
    own = sorted((r for r in results if r.method == method), key=lambda r: r.seed)
    accuracies = [r.accuracy for r in own]
    return {
        "mean": mean(accuracies),
        "standard_deviation": stdev(accuracies) if len(accuracies) > 1 else 0.0,
        "lowest": min(accuracies),
        "sparsity": mean(r.sparsity for r in own),
        "accuracies": accuracies,
    }


def grid(summaries: dict[str, dict[str, Any]]) -> Grid:
    """A row a method: mean and deviation over the seeds."""
    names = "mean", "standard_deviation", "lowest", "sparsity"
    shares = {method: [100 * figures[name] for name in names] for method, figures in summaries.items()}
    rows = ((f"`{m}`", f"{x:.1f} ± {y:.1f}", f"{low:.1f}", f"{zeros:.2f}") for m, (x, y, low, zeros) in shares.items())
    title = f"Handwritten digits, {100 * SPARSITY:g} % zeros, {SEEDS} seeds"
    return Grid(title, ("method", "test accuracy (%)", "lowest", "zeros (%)"), tuple(rows))


def main() -> None:
    """Print and write the figures."""
    networks = trained(results.read(results.PATH))
    summaries = {method: summarize([result for result, _ in networks], method) for method in METHODS}
    grid(summaries).print(Console())
    setting, commits = networks[0][1], ", ".join(dict.fromkeys(own["commit"] for _, own in networks))
    figures = {
        "settings": {"sparsity": SPARSITY, "epochs": Settings.epochs, "seeds": SEEDS},
        "origin": {name: setting[name] for name in _MACHINE} | {"commit": commits},
        "versions": {name: version for name, version in setting.items() if name not in _MACHINE},
        "methods": summaries,
    }
    RESULTS.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    readme = replaced(README.read_text(encoding="utf-8"), MARK, grid(summaries).markdown())
    README.write_text(readme, encoding="utf-8")


if __name__ == "__main__":
    main()
