"""Accuracy on handwritten digits through Keras, on each of its backends, beside the PyTorch adapter.

The network and the recipe are those of ``examples/digits_keras.py``, each run in a process of its own, which chooses
the backend. The PyTorch adapter's figures are those that ``python -m benchmarks.accuracy`` has written. Both sides have
the same split of the images, the same first weights, layouts transposed, and the same batches in the same order. Run it
from the repository's root: ``python -m benchmarks.accuracy_keras``.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from importlib.metadata import version
from math import inf, sqrt
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks import machine
from benchmarks.accuracy import Result, summarize
from benchmarks.keras_step import BACKENDS, backend_versions
from benchmarks.options import require_one
from examples.digits import Network, load_data

ROWS = ("dense", "st3", "st3_sigma")
PYTORCH = Path("benchmarks/results/accuracy.json")
ONE_THREAD = {"OMP_NUM_THREADS": "1", "TF_NUM_INTRAOP_THREADS": "1", "TF_NUM_INTEROP_THREADS": "1"}


class Job(NamedTuple):
    """One network, trained in a process of its own."""

    backend: str
    method: str
    seed: int


def write_start(path: Path, seed: int, epochs: int) -> None:
    """Write what a run of ``examples/digits.py`` begins with: its first weights, and the order of each epoch.

    Args:
        path: of the file for :mod:`benchmarks.keras_twin`; weights have the layout of Keras.
        seed: of the run.
        epochs: passes over the training images.
    """
    images = len(load_data(seed).train_labels)
    torch.manual_seed(seed)
    first = [as_channels_last(parameter.detach().numpy()) for parameter in Network().parameters()]
    shuffle = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(images, generator=shuffle).numpy() for _ in range(epochs)]
    np.savez(path, orders, *first)


def as_channels_last(weight: np.ndarray) -> np.ndarray:
    """A weight of PyTorch in the layout of Keras and Flax."""
    return weight.transpose({4: (2, 3, 1, 0), 2: (1, 0)}.get(weight.ndim, (0,)))


def measure(job: Job, settings: dict[str, Any], start: Path) -> Result:
    """Train one network."""
    own = json.dumps({"method": job.method, "seed": job.seed, **settings})
    command = [sys.executable, "-m", "benchmarks.keras_twin", str(start), own]
    environment = {**os.environ, **ONE_THREAD, "KERAS_BACKEND": job.backend}
    finished = subprocess.run(command, env=environment, capture_output=True, text=True)
    if finished.returncode:
        raise RuntimeError(f"{' '.join(command)} on {job.backend} failed:\n{finished.stderr}")
    return Result(job.method, job.seed, *json.loads(finished.stdout.splitlines()[-1]))


def measure_all(jobs: list[Job], settings: dict[str, Any], workers: int) -> Iterator[tuple[str, Result]]:
    """Backend and result of each job, as they come."""
    with TemporaryDirectory() as folder, ThreadPoolExecutor(workers) as pool:
        starts = {seed: Path(folder) / f"{seed}.npz" for seed in {job.seed for job in jobs}}
        for seed, path in starts.items():
            write_start(path, seed, settings["epochs"])
        pending = {pool.submit(measure, job, settings, starts[job.seed]): job.backend for job in jobs}
        for future in as_completed(pending):
            yield pending[future], future.result()


def pytorch_figures(settings: dict[str, Any], path: Path = PYTORCH) -> dict[str, dict[str, Any]]:
    """The PyTorch adapter's figures of each method.

    Raises:
        ValueError: they were measured with other settings.
    """
    figures = json.loads(path.read_text())
    if figures["settings"] != settings:
        raise ValueError(f"{path} must have the settings {settings}, got {figures['settings']}; measure it again")
    methods: dict[str, dict[str, Any]] = figures["methods"]
    return methods


def compare(own: dict[str, Any], other: dict[str, Any], seeds: int) -> dict[str, Any]:
    """Figures with their standard error, and how far they are from the others."""
    difference = own["mean"] - other["mean"]
    error = sqrt((own["standard_deviation"] ** 2 + other["standard_deviation"] ** 2) / seeds)
    apart = difference / error if error else 0.0 if difference == 0 else inf
    standard_error = own["standard_deviation"] / sqrt(seeds)
    return {**own, "standard_error": standard_error, "difference": difference, "difference_in_errors": apart}


def print_table(backends: dict[str, dict[str, dict[str, Any]]], title: str) -> None:
    """A row a method and backend, in the notation of the documents."""
    table = Table("method", "trained with", title=title)
    for column in ("mean (%)", "deviation", "standard error", "difference", "in its standard errors"):
        table.add_column(column, justify="right")
    for method in ROWS:
        for backend, methods in backends.items():
            keys = ("mean", "standard_deviation", "standard_error", "difference")
            cells = [f"{100 * methods[method][key]:.2f}" if key in methods[method] else "" for key in keys]
            apart = methods[method].get("difference_in_errors")
            table.add_row(method, backend, *cells, "" if apart is None else f"{apart:+.2f}")
    Console().print(table)


def parse_arguments() -> argparse.Namespace:
    """Options from the command line."""
    parser = argparse.ArgumentParser(
        description="Accuracy on handwritten digits through Keras, on each backend, beside the PyTorch adapter.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--sparsity", type=float, default=0.99, help="share of zeros at the end")
    parser.add_argument("--epochs", type=int, default=40, help="passes over the training images")
    parser.add_argument("--seeds", type=int, default=5, help="networks to train with each method on each backend")
    parser.add_argument("--workers", type=int, default=2, help="processes at the same time")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/accuracy_keras.json"), help="file")
    options = parser.parse_args()
    require_one(parser, options, ("epochs", "seeds", "workers"))
    return options


def main() -> None:
    """Train every method on every backend with every seed, print and write the figures."""
    options = parse_arguments()
    settings = {"sparsity": options.sparsity, "epochs": options.epochs}
    with_seeds = {**settings, "seeds": options.seeds}
    pytorch = pytorch_figures(with_seeds)
    jobs = [Job(b, m, seed) for m in ROWS for seed in range(options.seeds) for b in BACKENDS]
    results: dict[str, list[Result]] = {backend: [] for backend in BACKENDS}
    for backend, found in track(measure_all(jobs, settings, options.workers), "training", total=len(jobs)):
        results[backend].append(found)
    keras = {
        backend: {m: compare(summarize(results[backend], m), pytorch[m], options.seeds) for m in ROWS}
        for backend in BACKENDS
    }
    own = {m: {**pytorch[m], "standard_error": pytorch[m]["standard_deviation"] / sqrt(options.seeds)} for m in ROWS}
    title = f"Handwritten digits, {100 * options.sparsity:g} % zeros, {options.seeds} seeds"
    print_table({"st3_torch": own, **{f"Keras, {backend}": keras[backend] for backend in BACKENDS}}, title)
    versions = {"st3core": version("st3core"), **backend_versions()}
    origin = machine.provenance("python -m benchmarks.accuracy_keras")
    figures = {"settings": with_seeds, "origin": origin, "versions": versions, "backends": keras}
    options.out.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
