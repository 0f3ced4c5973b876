"""Accuracy on handwritten digits at one sparsity: ST-3 against its neighbours and the dense network.

The network and the recipe are those of ``examples/digits.py``, the same for every method. Run it from
the repository's root: ``python -m benchmarks.accuracy``; ``python -m benchmarks.accuracy_page`` then writes the page.
"""

import argparse
import json
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks import machine
from benchmarks.options import require_one
from examples.digits import Settings, load_data, train_dense, train_sparse, versions

METHODS = ("dense", "st3", "st3_sigma", "hard_ste", "gmp")


@dataclass(frozen=True)
class Result:
    """One trained network."""

    method: str
    seed: int
    accuracy: float
    sparsity: float


def measure(settings: Settings) -> Result:
    """Train one network; the method ``"dense"`` has no zeros."""
    data = load_data(settings.seed)
    if settings.method == "dense":
        return Result("dense", settings.seed, train_dense(data, settings).accuracy, 0.0)
    run = train_sparse(data, settings)
    return Result(settings.method, settings.seed, run.accuracy, run.report.sparsity)


def measure_all(jobs: list[Settings], workers: int) -> Iterator[Result]:
    """Results as they come, from processes of one thread each."""
    with ProcessPoolExecutor(workers, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        pending = [pool.submit(measure, job) for job in jobs]
        for future in as_completed(pending):
            yield future.result()


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


def print_table(summaries: dict[str, dict[str, Any]], title: str) -> None:
    """A row a method."""
    table = Table("method", title=title)
    for column in ("test accuracy (%)", "lowest", "zeros (%)"):
        table.add_column(column, justify="right")
    for method, figures in summaries.items():
        spread = f"{100 * figures['mean']:.1f} ± {100 * figures['standard_deviation']:.1f}"
        table.add_row(method, spread, f"{100 * figures['lowest']:.1f}", f"{100 * figures['sparsity']:.2f}")
    Console().print(table)


def parse_arguments() -> argparse.Namespace:
    """Options from the command line."""
    parser = argparse.ArgumentParser(
        description="Accuracy on handwritten digits: ST-3, its neighbours and the dense network.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--sparsity", type=float, default=Settings.sparsity, help="share of zeros at the end")
    parser.add_argument("--epochs", type=int, default=Settings.epochs, help="passes over the training images")
    parser.add_argument("--seeds", type=int, default=5, help="networks to train with each method")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="networks to train at the same time")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/accuracy.json"), help="file to write")
    options = parser.parse_args()
    require_one(parser, options, ("epochs", "seeds", "workers"))
    return options


def main() -> None:
    """Train every method with every seed, print and write the figures."""
    options = parse_arguments()
    jobs = [
        Settings(sparsity=options.sparsity, method=method, epochs=options.epochs, seed=seed)
        for seed in range(options.seeds)
        for method in METHODS
    ]
    results = list(track(measure_all(jobs, options.workers), "training", total=len(jobs)))
    summaries = {method: summarize(results, method) for method in METHODS}
    print_table(summaries, f"Handwritten digits, {100 * options.sparsity:g} % zeros, {options.seeds} seeds")
    settings = {"sparsity": options.sparsity, "epochs": options.epochs, "seeds": options.seeds}
    origin = machine.provenance("python -m benchmarks.accuracy")
    figures = {"settings": settings, "origin": origin, "versions": versions(), "methods": summaries}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
