"""Sparse-train a small convolutional network on handwritten digits with Keras, beside its dense twin.

The library's part is in :func:`train_sparse`. The backend is that of ``KERAS_BACKEND``. All options:
``python examples/digits_keras.py --help``.
"""

import argparse
import json
import platform
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import keras
import numpy as np
from keras import layers
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from st3_keras import PolynomialSchedule, Report, Sparsifier

BATCH_SIZE = 64
LEARNING_RATE = 0.1
MOMENTUM = 0.9
WEIGHT_DECAY = 5e-4
GRADIENT_NORM = 3.0


@dataclass(frozen=True)
class Settings:
    """What the command line can change."""

    sparsity: float = 0.99
    method: str = "st3"
    epochs: int = 40
    seed: int = 0
    out: Path = Path("runs/digits_keras")


class Digits(NamedTuple):
    """1,797 images of 8 × 8 pixels and their labels, three quarters of them for training."""

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray


class Batches(keras.utils.PyDataset):
    """Full batches, in a new order at each epoch."""

    def __init__(self, data: Digits, seed: int) -> None:
        super().__init__()
        self.data, self.generator = data, np.random.default_rng(seed)
        self.on_epoch_end()

    def __len__(self) -> int:
        """Batches in an epoch; what does not fill one is left out."""
        return len(self.data.train_labels) // BATCH_SIZE

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Images and labels of one batch."""
        rows = self.order[index * BATCH_SIZE : (index + 1) * BATCH_SIZE]
        return self.data.train_images[rows], self.data.train_labels[rows]

    def on_epoch_end(self) -> None:
        """Shuffle."""
        self.order = self.generator.permutation(len(self.data.train_labels))


@dataclass
class Run:
    """A trained network, and what ``fit`` has logged."""

    model: keras.Model
    history: dict[str, list[float]]

    @property
    def accuracy(self) -> float:
        """Test accuracy after the last epoch."""
        return self.history["val_accuracy"][-1]


@dataclass
class SparseRun(Run):
    """A run that ended with zeros, and where they are."""

    report: Report


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


def make_network(seed: int) -> keras.Model:
    """Three convolutions with batch norm, and a linear layer, with the first weights and habits of PyTorch."""
    keras.utils.set_random_seed(seed)

    def options() -> dict[str, Any]:
        scaling = keras.initializers.VarianceScaling(1 / 3, "fan_in", "uniform")
        return {"kernel_initializer": scaling, "kernel_regularizer": keras.regularizers.L2(WEIGHT_DECAY / 2)}

    def block(filters: int, name: str, strides: int = 1) -> list[keras.layers.Layer]:
        return [
            layers.ZeroPadding2D(1),
            layers.Conv2D(filters, 3, strides, use_bias=False, name=name, **options()),
            layers.BatchNormalization(momentum=0.9, epsilon=1e-5),
            layers.ReLU(),
        ]

    blocks = [*block(32, "conv1"), *block(64, "conv2", strides=2), *block(64, "conv3")]
    bias = keras.initializers.RandomUniform(-1 / 8, 1 / 8)  # 64 inputs: one over their square root
    last = [layers.GlobalAveragePooling2D(), layers.Dense(10, name="linear", bias_initializer=bias, **options())]
    return keras.Sequential([keras.Input((8, 8, 1)), *blocks, *last], name="digits")


def train(
    model: keras.Model, batches: Batches, settings: Settings, name: str, *callbacks: Any
) -> dict[str, list[float]]:
    """Train the network by ``fit``, with or without a sparsifier among the callbacks."""
    show = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: print(
            f"\r{name} {epoch + 1}/{settings.epochs}  "
            + "  ".join(f"{key} {logs[key]:.4f}" for key in ("loss", "val_accuracy", "sparsity") if key in logs),
            end="" if epoch + 1 < settings.epochs else "\n",
            flush=True,
        )
    )
    test, epochs = (batches.data.test_images, batches.data.test_labels), settings.epochs
    history = model.fit(
        batches, epochs=epochs, validation_data=test, callbacks=[*callbacks, show], shuffle=False, verbose=0
    ).history
    return {key: [float(value) for value in values] for key, values in history.items()}


def compiled(model: keras.Model, steps: int) -> keras.Model:
    """The network with its recipe for so many steps: momentum, cosine annealing, gradients clipped."""
    rate = keras.optimizers.schedules.CosineDecay(LEARNING_RATE, steps)
    optimizer = keras.optimizers.SGD(rate, MOMENTUM, global_clipnorm=GRADIENT_NORM)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss, metrics=["accuracy"])
    return model


def train_sparse(data: Digits, settings: Settings) -> SparseRun:
    """Train with zeros that spread from 5 % to 50 % of the steps; the model returned is an ordinary one."""
    model, batches = make_network(settings.seed), Batches(data, settings.seed)
    steps = settings.epochs * len(batches)
    schedule = PolynomialSchedule(settings.sparsity, begin_step=steps // 20, end_step=steps // 2)
    sparsifier = Sparsifier(compiled(model, steps), schedule, settings.method)
    history = train(model, batches, settings, "sparse", sparsifier)
    report = sparsifier.report(data.test_images[:1])
    return SparseRun(sparsifier.finalize(), history, report)


def train_dense(data: Digits, settings: Settings) -> Run:
    """Train the twin: same first weights, same batches, same recipe."""
    batches = Batches(data, settings.seed)
    model = compiled(make_network(settings.seed), settings.epochs * len(batches))
    return Run(model, train(model, batches, settings, "dense"))


def save_and_reload(model: keras.Model, data: Digits, path: Path) -> None:
    """Save the network; the one loaded from the file must give the same scores."""
    model.save(path)
    loaded = keras.models.load_model(path)
    scores = [m.predict(data.test_images, verbose=0) for m in (model, loaded)]
    if not np.array_equal(*scores):
        raise RuntimeError(f"the network loaded from {path} gives other scores than the one that was saved")


def plot(sparse: SparseRun, dense: Run, path: Path) -> None:
    """Draw accuracy and sparsity on the way, and the zeros of each layer at the end."""
    figure = Figure(figsize=(14, 4.2), layout="constrained")
    accuracy, sparsity, kernels = figure.subplots(1, 3)
    for name, run in (("dense", dense), ("sparse", sparse)):
        values = 100 * np.array(run.history["val_accuracy"])
        accuracy.plot(np.arange(1, len(values) + 1), values, label=f"{name}: {percent(run.accuracy)}")
    for key in ("sparsity", "target_sparsity"):
        values = 100 * np.array(sparse.history[key])
        sparsity.plot(np.arange(1, len(values) + 1), values, label=key.replace("_", " "))
    for axes, title in ((accuracy, "Test accuracy (%)"), (sparsity, "Zeros of all kernels (%)")):
        axes.set(title=title, xlabel="epoch", ylim=(-2, 103))
        axes.grid(alpha=0.3)
        axes.legend(loc="lower right")
    sparse.report.draw(kernels)
    figure.savefig(path, dpi=150)


def write_figures(settings: Settings, sparse: SparseRun, dense: Run, path: Path) -> None:
    """Write everything that was measured as JSON."""
    packages = ("st3core", "keras", "numpy", "numba", "scikit-learn")
    figures = {
        "settings": {**asdict(settings), "out": str(settings.out)},
        "backend": keras.backend.backend(),
        "versions": {"python": platform.python_version(), **{package: version(package) for package in packages}},
        "accuracy": {"dense": dense.accuracy, "sparse": sparse.accuracy},
        "report": sparse.report.to_dict(),
        "history": {"dense": dense.history, "sparse": sparse.history},
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
    sparse, dense = train_sparse(data, settings), train_dense(data, settings)
    save_and_reload(sparse.model, data, settings.out / "digits.keras")
    plot(sparse, dense, settings.out / "digits.png")
    write_figures(settings, sparse, dense, settings.out / "digits.json")
    Console().print(accuracy_table(sparse, dense))
    print(sparse.report)
    print(f"Wrote digits.png, digits.keras (reloads with equal scores) and digits.json to {settings.out}")


if __name__ == "__main__":
    main()
