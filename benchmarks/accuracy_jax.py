"""Accuracy on handwritten digits through JAX, beside the PyTorch adapter.

The network and the recipe are those of ``examples/digits_jax.py``. The PyTorch adapter's figures are those that
``python -m benchmarks.accuracy`` has written. Both sides have the same split of the images, the same first weights,
layouts transposed, and the same batches in the same order. Run it from the repository's root:
``python -m benchmarks.accuracy_jax``.
"""

import argparse
import json
from math import sqrt
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import track

from benchmarks import machine
from benchmarks.accuracy import Result, summarize
from benchmarks.accuracy_keras import ROWS, as_channels_last, compare, print_table, pytorch_figures
from benchmarks.options import require_one
from examples import digits, digits_jax

OUT = Path("benchmarks/results/accuracy_jax.json")


def start(seed: int, epochs: int) -> digits_jax.Start:
    """What a run of ``examples/digits.py`` begins with, as JAX's: its first weights, and the order of each epoch."""
    images = len(digits.load_data(seed).train_labels)
    torch.manual_seed(seed)
    first = dict(digits.Network().named_parameters())
    params: dict[str, dict[str, np.ndarray]] = {}
    for name, parameter in first.items():
        layer, kind = name.split(".")
        own = {"weight": "scale" if layer.startswith("norm") else "kernel"}.get(kind, kind)
        params.setdefault(layer, {})[own] = as_channels_last(parameter.detach().numpy())
    sizes = {layer: own["scale"].size for layer, own in params.items() if "scale" in own}
    statistics = {layer: {"mean": np.zeros(n, np.float32), "var": np.ones(n, np.float32)} for layer, n in sizes.items()}
    shuffle = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(images, generator=shuffle).numpy() for _ in range(epochs)]
    return digits_jax.Start({"params": params, "batch_stats": statistics}, np.stack(orders))


def measure(settings: digits_jax.Settings) -> Result:
    """Train one network; the method ``"dense"`` has no zeros."""
    data, first = digits_jax.load_data(settings.seed), start(settings.seed, settings.epochs)
    if settings.method == "dense":
        return Result("dense", settings.seed, digits_jax.train_dense(data, settings, first).accuracy, 0.0)
    run = digits_jax.train_sparse(data, settings, first)
    return Result(settings.method, settings.seed, run.accuracy, run.report.sparsity)


def parse_arguments() -> argparse.Namespace:
    """Options from the command line."""
    parser = argparse.ArgumentParser(
        description="Accuracy on handwritten digits through JAX, beside the PyTorch adapter.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--sparsity", type=float, default=0.99, help="share of zeros at the end")
    parser.add_argument("--epochs", type=int, default=40, help="passes over the training images")
    parser.add_argument("--seeds", type=int, default=5, help="networks to train with each method")
    parser.add_argument("--out", type=Path, default=OUT, help="file to write")
    options = parser.parse_args()
    require_one(parser, options, ("epochs", "seeds"))
    return options


def main() -> None:
    """Train with every method and seed, print and write the figures."""
    options = parse_arguments()
    settings = {"sparsity": options.sparsity, "epochs": options.epochs}
    with_seeds = {**settings, "seeds": options.seeds}
    pytorch = pytorch_figures(with_seeds)
    jobs = [digits_jax.Settings(method=m, seed=seed, **settings) for m in ROWS for seed in range(options.seeds)]
    results = [measure(job) for job in track(jobs, "training", console=Console(stderr=True))]
    methods = {m: compare(summarize(results, m), pytorch[m], options.seeds) for m in ROWS}
    own = {m: {**pytorch[m], "standard_error": pytorch[m]["standard_deviation"] / sqrt(options.seeds)} for m in ROWS}
    title = f"Handwritten digits, {100 * options.sparsity:g} % zeros, {options.seeds} seeds"
    print_table({"st3_torch": own, "st3_jax": methods}, title)
    origin, versions = machine.provenance("python -m benchmarks.accuracy_jax"), digits_jax.versions()
    figures = {"settings": with_seeds, "origin": origin, "versions": versions, "methods": methods}
    options.out.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
