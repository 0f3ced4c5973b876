"""Sparse-train a small convolutional network on handwritten digits with JAX, Flax and Optax, beside its dense twin.

The library's part is in :func:`train_sparse`, and wherever :func:`train` has a sparsifier. An epoch is one call of a
compiled ``lax.scan``; the threshold moves within it. All options: ``python examples/digits_jax.py --help``.
"""

import argparse
import json
import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import lax
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn
from rich.table import Table
from safetensors.numpy import load_file, save_file
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from st3_jax import PolynomialSchedule, Report, Sparsifier, State, find_state, sparsified

BATCH_SIZE = 64
LEARNING_RATE = 0.1
MOMENTUM = 0.9
WEIGHT_DECAY = 5e-4
GRADIENT_NORM = 3.0

Tree = Any
"""A pytree of arrays."""
Show = Callable[[str], object]
"""Called with a line of text after every epoch."""


@dataclass(frozen=True)
class Settings:
    """What the command line can change."""

    sparsity: float = 0.99
    method: str = "st3"
    epochs: int = 40
    seed: int = 0
    out: Path = Path("runs/digits_jax")


class Digits(NamedTuple):
    """1,797 images of 8 × 8 pixels and their labels, three quarters of them for training."""

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray


class Start(NamedTuple):
    """What a run begins with: first variables of the network, and the order of the images in each epoch."""

    variables: Tree
    orders: np.ndarray


class Training(NamedTuple):
    """All that a step of training changes."""

    params: Tree
    statistics: Tree
    opt_state: Tree


@dataclass
class Run:
    """A trained network, and what was seen on the way, step by step or epoch by epoch."""

    variables: Tree
    loss: list[float]
    sparsity: list[float]
    accuracies: list[float]

    @property
    def accuracy(self) -> float:
        """Test accuracy after the last epoch."""
        return self.accuracies[-1]


@dataclass
class SparseRun(Run):
    """A run that ended with zeros, and where they are."""

    report: Report


class Network(nn.Module):
    """Three convolutions with batch norm, and a linear layer, with the first weights of PyTorch."""

    @nn.compact
    def __call__(self, images: jax.Array, training: bool = False) -> jax.Array:
        """Scores of the ten digits, shape ``(N, 10)``."""
        scaling = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
        x = images
        for name, channels, stride in (("conv1", 32, 1), ("conv2", 64, 2), ("conv3", 64, 1)):
            x = nn.Conv(channels, (3, 3), stride, padding=1, use_bias=False, kernel_init=scaling, name=name)(x)
            x = nn.relu(nn.BatchNorm(not training, momentum=0.9, epsilon=1e-5, name=f"norm{name[-1]}")(x))
        scores: jax.Array = nn.Dense(10, kernel_init=scaling, bias_init=_first_bias, name="linear")(x.mean(axis=(1, 2)))
        return scores


def _first_bias(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
    """Uniform up to one over the root of 64 inputs."""
    return jax.random.uniform(key, shape, dtype, -1 / 8, 1 / 8)


def percent(share: float) -> str:
    """A share as text, such as ``99.00 %``."""
    return f"{100 * share:.2f} %"


def load_data(seed: int) -> Digits:
    """Images scaled to [0, 1], shape ``(N, 8, 8, 1)``, and their labels."""
    pixels, labels = load_digits(return_X_y=True)
    images = (pixels / 16).astype(np.float32).reshape(-1, 8, 8, 1)
    train_images, test_images, train_labels, test_labels = train_test_split(
        images, labels, test_size=0.25, stratify=labels, random_state=seed
    )
    return Digits(train_images, train_labels, test_images, test_labels)


def first_start(data: Digits, settings: Settings) -> Start:
    """The start that belongs to a seed."""
    variables = Network().init(jax.random.key(settings.seed), data.train_images[:1])
    generator = np.random.default_rng(settings.seed)
    orders = [generator.permutation(len(data.train_labels)) for _ in range(settings.epochs)]
    return Start(variables, np.stack(orders))


def steps_per_epoch(data: Digits) -> int:
    """Full batches in the training images; what does not fill one is left out."""
    return len(data.train_labels) // BATCH_SIZE


def make_optimizer(steps: int) -> optax.GradientTransformation:
    """Momentum with cosine annealing; gradients clipped, and weight decay for kernels alone."""
    decay = optax.add_decayed_weights(WEIGHT_DECAY, mask=lambda params: jax.tree.map(lambda p: p.ndim > 1, params))
    rate = optax.cosine_decay_schedule(LEARNING_RATE, steps)
    return optax.chain(optax.clip_by_global_norm(GRADIENT_NORM), decay, optax.sgd(rate, MOMENTUM))


def train(
    data: Digits, start: Start, optimizer: optax.GradientTransformation, sparsifier: Sparsifier | None, show: Show
) -> tuple[Training, Run]:
    """Train the network: a compiled loop, with or without a sparsifier.

    Returns:
        Raw parameters, statistics and the optimizer's state; and what was seen on the way. The variables of the
        latter are the ones to use.
    """

    def forward_params(params: Tree, opt_state: Tree) -> Tree:
        return sparsifier.apply(params, find_state(opt_state)) if sparsifier else params

    def step(training: Training, rows: jax.Array) -> tuple[Training, tuple[jax.Array, jax.Array]]:
        def loss_of(raw: Tree) -> tuple[jax.Array, Tree]:
            variables = {"params": forward_params(raw, training.opt_state), "batch_stats": training.statistics}
            scores, changed = Network().apply(variables, images[rows], True, mutable="batch_stats")
            losses = optax.softmax_cross_entropy_with_integer_labels(scores, labels[rows])
            return losses.mean(), changed["batch_stats"]

        (loss, statistics), gradient = jax.value_and_grad(loss_of, has_aux=True)(training.params)
        updates, opt_state = optimizer.update(gradient, training.opt_state, training.params)
        params = optax.apply_updates(training.params, updates)
        measured = sparsifier.sparsity(params, find_state(opt_state)) if sparsifier else jnp.zeros(())
        return Training(params, statistics, opt_state), (loss, measured)

    @partial(jax.jit, donate_argnums=0)
    def epoch(training: Training, rows: jax.Array) -> tuple[Training, tuple[jax.Array, jax.Array], Tree, jax.Array]:
        training, seen = lax.scan(step, training, rows)
        variables = {
            "params": forward_params(training.params, training.opt_state),
            "batch_stats": training.statistics,
        }
        hits = Network().apply(variables, data.test_images).argmax(axis=1) == data.test_labels
        return training, seen, variables, hits.mean()

    images, labels = jnp.asarray(data.train_images), jnp.asarray(data.train_labels)
    params, statistics = jax.tree.map(jnp.array, (start.variables["params"], start.variables["batch_stats"]))
    training, run = Training(params, statistics, optimizer.init(params)), Run({}, [], [], [])
    for order in start.orders:
        rows = order[: steps_per_epoch(data) * BATCH_SIZE].reshape(-1, BATCH_SIZE)
        training, (losses, measured), run.variables, accuracy = epoch(training, jnp.asarray(rows))
        run.loss += losses.tolist()
        run.sparsity += measured.tolist()
        run.accuracies.append(float(accuracy))
        show(f"loss {run.loss[-1]:.4f}" + (f"  zeros {percent(run.sparsity[-1])}" if sparsifier else ""))
    return training, run


def make_sparsifier(data: Digits, settings: Settings) -> Sparsifier:
    """Zeros that spread from 5 % to 50 % of the steps."""
    steps = settings.epochs * steps_per_epoch(data)
    schedule = PolynomialSchedule(settings.sparsity, begin_step=steps // 20, end_step=steps // 2)
    return Sparsifier(schedule, settings.method)


def train_sparse(
    data: Digits, settings: Settings, start: Start | None = None, show: Show = lambda text: None
) -> SparseRun:
    """Train with zeros; the variables returned are those of an ordinary network."""
    sparsifier = make_sparsifier(data, settings)
    optimizer = sparsified(make_optimizer(settings.epochs * steps_per_epoch(data)), sparsifier)
    training, run = train(data, start or first_start(data, settings), optimizer, sparsifier, show)
    state: State = find_state(training.opt_state)
    final = {**run.variables, "params": sparsifier.finalize(training.params, state)}
    return SparseRun(final, run.loss, run.sparsity, run.accuracies, sparsifier.report(training.params, state))


def train_dense(data: Digits, settings: Settings, start: Start | None = None, show: Show = lambda text: None) -> Run:
    """Train the twin: same first weights, same batches, same recipe."""
    optimizer = make_optimizer(settings.epochs * steps_per_epoch(data))
    return train(data, start or first_start(data, settings), optimizer, None, show)[1]


def train_both(data: Digits, settings: Settings) -> tuple[SparseRun, Run]:
    """Train the sparse network and its dense twin, with a progress bar for each."""
    columns = ("{task.description}", BarColumn(12), MofNCompleteColumn(), "{task.fields[text]}", TimeElapsedColumn())
    with Progress(*columns) as progress:

        def add_bar(name: str) -> Show:
            bar = progress.add_task(name, total=settings.epochs, text="")
            return lambda text: progress.update(bar, advance=1, text=text)

        return train_sparse(data, settings, show=add_bar("sparse")), train_dense(data, settings, show=add_bar("dense"))


def save_and_reload(variables: Tree, data: Digits, path: Path) -> None:
    """Save the network; the one loaded from the file must give the same scores."""
    save_file({name: np.asarray(array) for name, array in flatten_dict(variables, sep="/").items()}, path)
    loaded = unflatten_dict(load_file(path), sep="/")
    saved, again = (np.asarray(Network().apply(chosen, data.test_images)) for chosen in (variables, loaded))
    if not np.array_equal(saved, again):
        raise RuntimeError(f"the network loaded from {path} gives other scores than the one that was saved")


def plot(sparse: SparseRun, dense: Run, path: Path) -> None:
    """Draw accuracy and sparsity on the way, and the zeros of each layer at the end."""
    figure = Figure(figsize=(14, 4.2), layout="constrained")
    accuracy, sparsity, kernels = figure.subplots(1, 3)
    for name, run in (("dense", dense), ("sparse", sparse)):
        values = 100 * np.array(run.accuracies)
        accuracy.plot(np.arange(1, len(values) + 1), values, label=f"{name}: {percent(run.accuracy)}")
    sparsity.plot(np.arange(1, len(sparse.sparsity) + 1), 100 * np.array(sparse.sparsity), label="measured")
    for axes, title, unit in ((accuracy, "Test accuracy (%)", "epoch"), (sparsity, "Zeros of all kernels (%)", "step")):
        axes.set(title=title, xlabel=unit, ylim=(-2, 103))
        axes.grid(alpha=0.3)
        axes.legend(loc="lower right")
    sparse.report.draw(kernels)
    figure.savefig(path, dpi=150)


def versions() -> dict[str, str]:
    """Versions that the figures may depend on."""
    packages = ("st3core", "jax", "flax", "optax", "numpy", "scikit-learn")
    return {"python": platform.python_version(), **{package: version(package) for package in packages}}


def write_figures(settings: Settings, sparse: SparseRun, dense: Run, path: Path) -> None:
    """Write everything that was measured as JSON."""
    figures = {
        "settings": {**asdict(settings), "out": str(settings.out)},
        "versions": versions(),
        "accuracy": {"dense": dense.accuracy, "sparse": sparse.accuracy},
        "report": sparse.report.to_dict(),
        "history": {
            name: {"loss": run.loss, "sparsity": run.sparsity, "accuracy": run.accuracies}
            for name, run in (("dense", dense), ("sparse", sparse))
        },
    }
    path.write_text(json.dumps(figures, indent=1) + "\n")


def accuracy_table(sparse: SparseRun, dense: Run) -> Table:
    """Both networks, a row each."""
    table = Table("network", title="Handwritten digits")
    table.add_column("test accuracy", justify="right")
    table.add_column("kernel weights not zero", justify="right")
    report = sparse.report
    table.add_row("dense", percent(dense.accuracy), f"{report.weights:,}")
    table.add_row("sparse", percent(sparse.accuracy), f"{report.weights - report.zeros:,}")
    return table


def parse_arguments() -> Settings:
    """Settings from the command line."""
    parser = argparse.ArgumentParser(
        description="Sparse-train a small convolutional network on handwritten digits, beside its dense twin.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--sparsity", type=float, default=Settings.sparsity, help="share of zeros at the end")
    parser.add_argument("--method", default=Settings.method, help="preset of st3core")
    parser.add_argument("--epochs", type=int, default=Settings.epochs, help="passes over the training images")
    parser.add_argument("--seed", type=int, default=Settings.seed, help="of the split, the weights and the batches")
    parser.add_argument("--out", type=Path, default=Settings.out, help="folder for the results")
    settings = Settings(**vars(parser.parse_args()))
    if settings.epochs < 1:
        parser.error(f"--epochs must be at least 1, got {settings.epochs}")
    return settings


def main() -> None:
    """Train both networks, print and save the results."""
    settings = parse_arguments()
    settings.out.mkdir(parents=True, exist_ok=True)
    data = load_data(settings.seed)
    sparse, dense = train_both(data, settings)
    save_and_reload(sparse.variables, data, settings.out / "digits.safetensors")
    plot(sparse, dense, settings.out / "digits.png")
    write_figures(settings, sparse, dense, settings.out / "digits.json")
    Console().print(accuracy_table(sparse, dense))
    print(sparse.report)
    print(f"Wrote digits.png, digits.safetensors (reloads with equal scores) and digits.json to {settings.out}")


if __name__ == "__main__":
    main()
