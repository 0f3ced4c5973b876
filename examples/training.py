"""Sparse training of an image classifier from the first step to a file of sparse weights; stopped at will.

The library's part is three lines: where the Sparsifier is made, its ``step()``, and ``finalize()``.

Every random number is drawn anew from the seed, the epoch and the image, so a run that goes on from a checkpoint sees
what it would have seen, and there is no state of random numbers to save.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from math import cos, pi
from pathlib import Path
from typing import Any, Protocol

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from examples.processes import Processes, data_parallel, load_whole_state, shard, share_statistics, whole_state
from st3_torch import PolynomialSchedule, Sparsifier
from st3_torch.checkpoint import replacing
from st3_torch.metrics import metrics
from st3core.logs import append_row, keep_rows, read_rows

GRADIENT_NORM = 3.0

Batch = tuple[Tensor, Tensor]
"""Images ready for the network, shape ``(N, 3, H, W)``, and their labels."""


class Data(Protocol):
    """What to train on: this process's share of it."""

    steps: int
    """Full batches of an epoch."""

    def training_batches(self, epoch: int) -> Iterator[Batch]:
        """One epoch, in an order of its own."""

    def test_batches(self) -> Iterator[Batch]:
        """All test images; a label of -1 marks one that only fills a batch."""


@dataclass(frozen=True)
class Recipe:
    """Hyper-parameters.

    Args:
        learning_rate: at its highest.
        rate_at: factor of it, by the epochs that are over and all of them.
        momentum: of SGD.
        weight_decay: of kernels; biases and norms have none.
        label_smoothing: share of the target that all classes have in common.
        ramp: shares of the steps between which the zeros spread.
    """

    learning_rate: float
    rate_at: Callable[[int, int], float]
    momentum: float
    weight_decay: float
    label_smoothing: float
    ramp: tuple[float, float]


@dataclass(frozen=True)
class Settings:
    """What the command lines of both examples can change."""

    data: Path
    out: Path
    epochs: int
    batch_size: int
    sparsity: float
    method: str
    seed: int
    resume: bool
    stop_after: int | None
    fsdp: bool = False
    amp: bool = False


@dataclass
class Training:
    """What a run consists of."""

    model: nn.Module
    network: nn.Module
    optimizer: torch.optim.SGD
    sparsifier: Sparsifier
    recipe: Recipe
    settings: Settings
    processes: Processes
    epoch: int = 0

    @property
    def checkpoint(self) -> Path:
        """File that the run goes on from."""
        return self.settings.out / "checkpoint.pt"

    @property
    def log(self) -> Path:
        """File with a row an epoch."""
        return self.settings.out / "log.csv"


def cosine_after_warmup(epoch: int, epochs: int) -> float:
    """Factor of the learning rate: a line for the first twentieth of the epochs, then half a wave of cosine."""
    warmup = round(epochs / 20)
    if epoch < warmup:
        return (epoch + 1) / warmup
    return (1 + cos(pi * (epoch - warmup) / (epochs - warmup))) / 2


def tenth_at_half_and_three_quarters(epoch: int, epochs: int) -> float:
    """Factor of the learning rate: 1, a tenth, a hundredth."""
    return 1.0 if 2 * epoch < epochs else 0.1 if 4 * epoch < 3 * epochs else 0.01


def run(model: nn.Module, data: Data, recipe: Recipe, settings: Settings, processes: Processes) -> None:
    """Train the model, from a checkpoint if asked to; write one every epoch, and the sparse weights at the end."""
    training = prepare(model, data.steps, recipe, settings, processes)
    settings.out.mkdir(parents=True, exist_ok=True)
    if settings.resume and training.checkpoint.exists():
        load(training)
    elif processes.is_first:
        training.log.unlink(missing_ok=True)  # of another run, or of one that ended before its first checkpoint
    last = min(settings.epochs, settings.stop_after or settings.epochs)
    for _ in range(training.epoch, last):
        loss = train_epoch(training, data)
        accuracy = evaluate(training.model, data, processes)
        report_epoch(training, loss, accuracy)
        save(training)
    if training.epoch == settings.epochs:
        finish(training, data)


def prepare(model: nn.Module, steps: int, recipe: Recipe, settings: Settings, processes: Processes) -> Training:
    """Sparsify the model, then make its optimizer; spread both over the processes."""
    model.to(processes.device)
    if settings.fsdp:
        shard(model)
    total = settings.epochs * steps
    begin, end = (round(share * total) for share in recipe.ramp)
    schedule = PolynomialSchedule(settings.sparsity, begin_step=begin, end_step=end)
    sparsifier = Sparsifier(model, schedule, settings.method)
    optimizer = torch.optim.SGD(parameter_groups(model, recipe), recipe.learning_rate, recipe.momentum)
    network = model if settings.fsdp else data_parallel(model, processes)
    return Training(model, network, optimizer, sparsifier, recipe, settings, processes)


def parameter_groups(model: nn.Module, recipe: Recipe) -> list[dict[str, Any]]:
    """Kernels with weight decay; biases and norms without."""
    kernels = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    return [{"params": kernels, "weight_decay": recipe.weight_decay}, {"params": others, "weight_decay": 0.0}]


def train_epoch(training: Training, data: Data) -> float:
    """One pass over the training images; the mean loss."""
    recipe, processes = training.recipe, training.processes
    for group in training.optimizer.param_groups:
        group["lr"] = recipe.learning_rate * recipe.rate_at(training.epoch, training.settings.epochs)
    training.network.train()
    total = torch.zeros((), dtype=torch.float64, device=processes.device)
    for images, labels in with_progress(data.training_batches(training.epoch), data.steps, training):
        training.optimizer.zero_grad()
        with precision(training):
            loss = functional.cross_entropy(training.network(images), labels, label_smoothing=recipe.label_smoothing)
        loss.backward()
        nn.utils.clip_grad_norm_(training.model.parameters(), GRADIENT_NORM)
        training.optimizer.step()
        training.sparsifier.step()
        total += loss.detach()  # read at the end: a GPU need not wait
    share_statistics(training.model, processes)
    training.epoch += 1
    return float(processes.total(total)) / (data.steps * processes.world)


def precision(training: Training) -> AbstractContextManager[object]:
    """Whether the network computes in bfloat16; its weights stay in float32."""
    device = training.processes.device.type
    return torch.autocast(device, torch.bfloat16) if training.settings.amp else nullcontext()


@torch.no_grad()
def evaluate(model: nn.Module, data: Data, processes: Processes) -> float:
    """Share of the test images that are recognised."""
    model.eval()
    counts = torch.zeros(2, dtype=torch.float64, device=processes.device)
    for images, labels in data.test_batches():
        hits = (model(images).argmax(dim=1) == labels).sum()
        counts += torch.stack([hits, (labels >= 0).sum()])
    hits, images = processes.total(counts).tolist()
    return float(hits / images)


def with_progress(batches: Iterator[Batch], steps: int, training: Training) -> Iterator[Batch]:
    """The same batches, with a progress bar in the first process."""
    columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, disable=not training.processes.is_first, transient=True) as progress:
        yield from progress.track(batches, steps, description=f"epoch {training.epoch + 1}")


def report_epoch(training: Training, loss: float, accuracy: float) -> None:
    """Add a row to the log and print it."""
    figures = metrics(training.sparsifier)  # of a sharded model, every process has to ask
    rate, step = training.optimizer.param_groups[0]["lr"], training.sparsifier.step_count
    row = {"epoch": training.epoch, "step": step, "learning_rate": rate, "loss": loss, "accuracy": accuracy, **figures}
    if training.processes.is_first:
        append_row(training.log, row)
        Console().print(epoch_table([{name: str(value) for name, value in row.items()}]))


def epoch_table(rows: list[dict[str, str]]) -> Table:
    """A row for each of these epochs."""
    table = Table()
    for name in ("epoch", "step", "rate", "loss", "test accuracy", "zeros", "target"):
        table.add_column(name, justify="right")
    for row in rows:
        shares = [f"{100 * float(row[name]):.2f} %" for name in ("accuracy", "sparsity", "target_sparsity")]
        table.add_row(
            row["epoch"], row["step"], f"{float(row['learning_rate']):.4g}", f"{float(row['loss']):.4f}", *shares
        )
    return table


def save(training: Training) -> None:
    """Write the checkpoint, whole or not at all."""
    state = whole_state(training.model, training.optimizer)
    state |= {"sparsifier": training.sparsifier.state_dict(), "epoch": training.epoch}
    if training.processes.is_first:
        with replacing(training.checkpoint) as file:
            torch.save(state, file)


def load(training: Training) -> None:
    """Go on from the checkpoint, and drop what the log says of later epochs."""
    state = torch.load(training.checkpoint, map_location="cpu", weights_only=True)
    load_whole_state(training.model, training.optimizer, state)
    training.sparsifier.load_state_dict(state["sparsifier"])
    training.epoch = state["epoch"]
    if training.processes.is_first:
        keep_rows(training.log, "epoch", training.epoch)


def finish(training: Training, data: Data) -> None:
    """Make it an ordinary model; print what became of it, and write its weights."""
    model, processes = training.sparsifier.finalize(), training.processes
    images, _ = next(data.test_batches())
    report, accuracy = training.sparsifier.report(images[:1]), evaluate(model, data, processes)
    weights = whole_state(model, training.optimizer)["model"]
    if processes.is_first:
        path = training.settings.out / "model.safetensors"
        with replacing(path) as file:
            save_file({name: tensor.contiguous() for name, tensor in weights.items()}, file)
        Console().print(epoch_table(read_rows(training.log)))
        print(report)
        print(f"Test accuracy of the finalized model: {100 * accuracy:.2f} %. Wrote {path}")
