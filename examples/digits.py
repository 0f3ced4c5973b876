"""Sparse-train a small convolutional network on handwritten digits, beside its dense twin.

The library's part is in :func:`train_sparse`, and under ``if sparsifier`` in :func:`train`. All options:
``python examples/digits.py --help``.
"""

import argparse
import json
import platform
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn
from rich.table import Table
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional

from st3_torch import PolynomialSchedule, Report, Sparsifier

BATCH_SIZE = 64
LEARNING_RATE = 0.1
MOMENTUM = 0.9
WEIGHT_DECAY = 5e-4
GRADIENT_NORM = 3.0

BLUE, RED, GREY = "#4c72b0", "#c44e52", "#8c8c8c"

Show = Callable[[str], object]
"""Called with a line of text after every step."""


@dataclass(frozen=True)
class Settings:
    """What the command line can change."""

    sparsity: float = 0.99
    method: str = "st3"
    epochs: int = 40
    seed: int = 0
    out: Path = Path("runs/digits")


class Digits(NamedTuple):
    """1,797 images of 8 × 8 pixels and their labels, three quarters of them for training."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


@dataclass
class History:
    """What was seen on the way: loss and sparsity after every step, test accuracy after every epoch."""

    loss: list[float] = field(default_factory=list)
    target_sparsity: list[float] = field(default_factory=list)
    sparsity: list[float] = field(default_factory=list)
    accuracy: list[float] = field(default_factory=list)

    def add_sparsity(self, target: float, measured: float) -> None:
        """Note the share of zeros, asked for and found."""
        self.target_sparsity.append(target)
        self.sparsity.append(measured)

    def latest(self) -> str:
        """The last step in one line."""
        text = f"loss {self.loss[-1]:.4f}"
        if self.sparsity:
            text += f"  target {percent(self.target_sparsity[-1])}  zeros {percent(self.sparsity[-1])}"
        return text


@dataclass
class Run:
    """A trained network, and what was seen on the way."""

    model: nn.Module
    history: History

    @property
    def accuracy(self) -> float:
        """Test accuracy after the last epoch."""
        return self.history.accuracy[-1]


@dataclass
class SparseRun(Run):
    """A run that ended with zeros, and where they are."""

    report: Report


class Network(nn.Module):
    """Three convolutions with batch norm, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(1, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32)
        self.conv2, self.norm2 = nn.Conv2d(32, 64, 3, padding=1, bias=False, stride=2), nn.BatchNorm2d(64)
        self.conv3, self.norm3 = nn.Conv2d(64, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64)
        self.linear = nn.Linear(64, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Scores of the ten digits, shape ``(N, 10)``."""
        x = functional.relu(self.norm1(self.conv1(images)))
        x = functional.relu(self.norm2(self.conv2(x)))
        x = functional.relu(self.norm3(self.conv3(x)))
        scores: Tensor = self.linear(x.mean(dim=(2, 3)))
        return scores


def percent(share: float) -> str:
    """A share as text, such as ``99.00 %``."""
    return f"{100 * share:.2f} %"


def load_data(seed: int) -> Digits:
    """Images scaled to [0, 1], shape ``(N, 1, 8, 8)``, and their labels."""
    pixels, labels = load_digits(return_X_y=True)
    images = (pixels / 16).astype(np.float32).reshape(-1, 1, 8, 8)
    parts = train_test_split(images, labels, test_size=0.25, stratify=labels, random_state=seed)
    train_images, test_images, train_labels, test_labels = (torch.from_numpy(part) for part in parts)
    return Digits(train_images, train_labels, test_images, test_labels)


def batches(data: Digits, shuffle: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """One epoch in a new order; what does not fill a batch is left out."""
    order = torch.randperm(len(data.train_labels), generator=shuffle)
    for rows in order[: steps_per_epoch(data) * BATCH_SIZE].split(BATCH_SIZE):
        yield data.train_images[rows], data.train_labels[rows]


def steps_per_epoch(data: Digits) -> int:
    """Full batches in the training images."""
    return len(data.train_labels) // BATCH_SIZE


def parameter_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Kernels with weight decay; biases and norms without."""
    kernels = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    return [{"params": kernels, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}]


@torch.no_grad()
def evaluate(model: nn.Module, data: Digits) -> float:
    """Share of the test images that are recognised."""
    model.eval()
    hits = model(data.test_images).argmax(dim=1) == data.test_labels
    model.train()
    return float(hits.double().mean())


def train(
    model: nn.Module, data: Digits, settings: Settings, sparsifier: Sparsifier | None = None, show: Show | None = None
) -> History:
    """Train the network: an ordinary loop, with or without a sparsifier."""
    history, shuffle = History(), torch.Generator().manual_seed(settings.seed)
    optimizer = torch.optim.SGD(parameter_groups(model), LEARNING_RATE, MOMENTUM)
    annealing = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.epochs * steps_per_epoch(data))
    for _ in range(settings.epochs):
        for images, labels in batches(data, shuffle):
            optimizer.zero_grad()
            loss = functional.cross_entropy(model(images), labels)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), GRADIENT_NORM)
            optimizer.step()
            annealing.step()
            history.loss.append(loss.item())
            if sparsifier:
                sparsifier.step()
                history.add_sparsity(sparsifier.target_sparsity, sparsifier.sparsity)
            if show:
                show(history.latest())
        history.accuracy.append(evaluate(model, data))
    return history


def train_sparse(data: Digits, settings: Settings, show: Show | None = None) -> SparseRun:
    """Train with zeros that spread from 5 % to 50 % of the steps; the model returned is an ordinary one."""
    torch.manual_seed(settings.seed)
    model, steps = Network(), settings.epochs * steps_per_epoch(data)
    schedule = PolynomialSchedule(settings.sparsity, begin_step=steps // 20, end_step=steps // 2)
    sparsifier = Sparsifier(model, schedule, settings.method)
    history = train(model, data, settings, sparsifier, show)
    return SparseRun(sparsifier.finalize(), history, sparsifier.report(data.test_images[:1]))


def train_dense(data: Digits, settings: Settings, show: Show | None = None) -> Run:
    """Train the twin: same first weights, same batches, same recipe."""
    torch.manual_seed(settings.seed)
    model = Network()
    return Run(model, train(model, data, settings, show=show))


def train_both(data: Digits, settings: Settings) -> tuple[SparseRun, Run]:
    """Train the sparse network and its dense twin, with a progress bar for each."""
    columns = ("{task.description}", BarColumn(12), MofNCompleteColumn(), "{task.fields[text]}", TimeElapsedColumn())
    with Progress(*columns) as progress:

        def add_bar(name: str) -> Show:
            bar = progress.add_task(name, total=settings.epochs * steps_per_epoch(data), text="")
            return lambda text: progress.update(bar, advance=1, text=text)

        return train_sparse(data, settings, add_bar("sparse")), train_dense(data, settings, add_bar("dense"))


def save_and_reload(model: nn.Module, data: Digits, path: Path) -> None:
    """Save the network; a new one that loads the file must give the same scores."""
    save_file(model.state_dict(), path)
    loaded = Network()
    loaded.load_state_dict(load_file(path), strict=True)
    with torch.no_grad():
        same = torch.equal(loaded.eval()(data.test_images), model.eval()(data.test_images))
    if not same:
        raise RuntimeError(f"the network loaded from {path} gives other scores than the one that was saved")


def plot(sparse: SparseRun, dense: Run, path: Path) -> None:
    """Draw accuracy and sparsity on the way, and the zeros of each layer at the end."""
    figure = Figure(figsize=(14, 4.2))
    figure.set_layout_engine("constrained", wspace=0.06)
    accuracy, sparsity, layers = figure.subplots(1, 3)
    draw_accuracy(accuracy, sparse, dense)
    draw_sparsity(sparsity, sparse.history)
    sparse.report.draw(layers)
    figure.savefig(path, dpi=150)


def draw_accuracy(axes: Axes, sparse: Run, dense: Run) -> None:
    """Test accuracy of both networks against the step.

    The sparse curve dips while the last zeros are made, mostly because the running statistics of batch
    norm lag behind; with the statistics of the test images themselves it stays above 70 %.
    """
    for name, run, color in (("dense", dense, GREY), ("sparse", sparse, BLUE)):
        epochs = len(run.history.accuracy)
        steps = np.arange(1, epochs + 1) * (len(run.history.loss) // epochs)
        axes.plot(steps, 100 * np.array(run.history.accuracy), color=color, label=f"{name}: {percent(run.accuracy)}")
    finish(axes, "Test accuracy", "correct (%)")


def draw_sparsity(axes: Axes, history: History) -> None:
    """Sparsity that was asked for, and that was measured, against the step."""
    steps = np.arange(1, len(history.sparsity) + 1)
    axes.plot(steps, 100 * np.array(history.sparsity), color=BLUE, linewidth=5, alpha=0.4, label="measured")
    axes.plot(steps, 100 * np.array(history.target_sparsity), color=RED, linestyle="--", label="target")
    finish(axes, "Sparsity of all kernels together", "zeros (%)")


def finish(axes: Axes, title: str, quantity: str) -> None:
    """Give both curves the same look."""
    axes.set(title=title, xlabel="optimizer step", ylabel=quantity, ylim=(-2, 103))
    axes.set_yticks(range(0, 101, 20))
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    axes.spines[["top", "right"]].set_visible(False)


def write_figures(settings: Settings, sparse: SparseRun, dense: Run, path: Path) -> None:
    """Write everything that was measured as JSON."""
    figures = {
        "settings": {**asdict(settings), "out": str(settings.out)},
        "versions": versions(),
        "accuracy": {"dense": dense.accuracy, "sparse": sparse.accuracy},
        "report": sparse.report.to_dict(),
        "history": {"dense": asdict(dense.history), "sparse": asdict(sparse.history)},
    }
    path.write_text(json.dumps(figures, indent=1) + "\n")


def versions() -> dict[str, str]:
    """Versions that the figures may depend on."""
    packages = ("st3core", "torch", "numpy", "numba", "scikit-learn")
    return {"python": platform.python_version(), **{package: version(package) for package in packages}}


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
    torch.set_num_threads(1)  # a network this small gains little from more, and sums depend on their number
    settings.out.mkdir(parents=True, exist_ok=True)
    data = load_data(settings.seed)
    sparse, dense = train_both(data, settings)
    save_and_reload(sparse.model, data, settings.out / "digits.safetensors")
    plot(sparse, dense, settings.out / "digits.png")
    write_figures(settings, sparse, dense, settings.out / "digits.json")
    Console().print(accuracy_table(sparse, dense))
    print(sparse.report)
    print(f"Wrote digits.png, digits.safetensors (reloads with equal scores) and digits.json to {settings.out}")


if __name__ == "__main__":
    main()
