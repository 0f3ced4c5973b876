"""What is learned: the data, the network and the recipe of each task, the same for every method."""

import math
import sys
import sysconfig
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from sklearn.datasets import load_breast_cancer
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional

from examples import digits

Batch = tuple[Tensor, Tensor]


class Task(NamedTuple):
    """Everything that training needs, for one seed.

    Attributes:
        model: with the first weights of the seed.
        optimizer: over its parameters.
        schedule: of the learning rate; a step of it after each of the optimizer's.
        batches: inputs and labels, one pair a step.
        steps: how many steps there are.
        clip: largest norm of the gradient.
        score: of the trained model on the data held out.
        example: an input, for multiply-adds.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    batches: Iterator[Batch]
    steps: int
    clip: float
    score: Callable[[nn.Module], float]
    example: Tensor


class Kind(NamedTuple):
    """A task for any seed, and what its score is called."""

    title: str
    score: str
    higher_is_better: bool
    make: Callable[[int, float], Task]


def _two_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Kernels with weight decay; biases and norms without."""
    kernels = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    return [{"params": kernels, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def _accuracy(model: nn.Module, inputs: Tensor, labels: Tensor) -> float:
    model.eval()
    with torch.no_grad():
        hits = model(inputs).argmax(dim=1) == labels
    model.train()
    return 100 * float(hits.double().mean())


def make_digits(seed: int, length: float = 1.0) -> Task:
    """Network and recipe of ``examples/digits.py``."""
    data = digits.load_data(seed)
    torch.manual_seed(seed)
    model, epochs = digits.Network(), max(round(digits.Settings.epochs * length), 1)
    steps = epochs * digits.steps_per_epoch(data)
    optimizer = torch.optim.SGD(digits.parameter_groups(model), digits.LEARNING_RATE, digits.MOMENTUM)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    shuffle = torch.Generator().manual_seed(seed)
    batches = (batch for _ in range(epochs) for batch in digits.batches(data, shuffle))
    score = _scored(data.test_images, data.test_labels)
    return Task(model, optimizer, schedule, batches, steps, digits.GRADIENT_NORM, score, data.test_images[:1])


def _scored(inputs: Tensor, labels: Tensor) -> Callable[[nn.Module], float]:
    return lambda model: _accuracy(model, inputs, labels)


TABLE_EPOCHS, TABLE_BATCH = 60, 32


def make_table(seed: int, length: float = 1.0) -> Task:
    """Thirty measurements of a tumour, malignant or benign: a network of two hidden layers of 256 units."""
    values, labels = load_breast_cancer(return_X_y=True)
    parts = train_test_split(values, labels, test_size=0.25, stratify=labels, random_state=seed)
    center, width = parts[0].mean(axis=0), parts[0].std(axis=0)
    train, test = (torch.from_numpy(((part - center) / width).astype(np.float32)) for part in parts[:2])
    train_labels, test_labels = (torch.from_numpy(part) for part in parts[2:])
    torch.manual_seed(seed)
    layers = [nn.Linear(30, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 2)]
    model, epochs = nn.Sequential(*layers), max(round(TABLE_EPOCHS * length), 1)
    per_epoch = len(train) // TABLE_BATCH
    optimizer = torch.optim.SGD(_two_groups(model, 5e-4), 0.05, 0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * per_epoch)
    shuffle = torch.Generator().manual_seed(seed)

    def batches() -> Iterator[Batch]:
        for _ in range(epochs):
            order = torch.randperm(len(train), generator=shuffle)[: per_epoch * TABLE_BATCH]
            for rows in order.split(TABLE_BATCH):
                yield train[rows], train_labels[rows]

    score = _scored(test, test_labels)
    return Task(model, optimizer, schedule, batches(), epochs * per_epoch, 3.0, score, test[:1])


TEXT_STEPS, TEXT_BATCH, CONTEXT, CHARACTERS = 300, 16, 64, 128
_TEXT_BYTES = 4_000_000


class Block(nn.Module):
    """Causal attention and a network of one hidden layer, each behind a norm and beside a shortcut."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm, self.norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention, self.project = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.expand, self.contract = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Vectors of shape ``(N, context, width)``."""
        batch, length, width = x.shape
        parts = self.attention(self.attention_norm(x)).reshape(batch, length, 3, self.heads, -1)
        query, key, value = parts.permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.project(mixed.transpose(1, 2).reshape(batch, length, width))
        result: Tensor = x + self.contract(functional.gelu(self.expand(self.norm(x))))
        return result


class LanguageModel(nn.Module):
    """A transformer over characters: 983,040 weights in its blocks, 16,384 in its head."""

    def __init__(self, width: int = 128, heads: int = 4, depth: int = 5) -> None:
        super().__init__()
        self.characters, self.places = nn.Embedding(CHARACTERS, width), nn.Embedding(CONTEXT, width)
        self.blocks = nn.Sequential(*[Block(width, heads) for _ in range(depth)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, CHARACTERS)

    def forward(self, text: Tensor) -> Tensor:
        """Scores of the next character, shape ``(N, characters, context)``."""
        x = self.characters(text) + self.places.weight[: text.shape[1]]
        scores: Tensor = self.head(self.norm(self.blocks(x))).transpose(1, 2)
        return scores


@cache
def library_text() -> tuple[Tensor, Tensor]:
    """Source of Python's standard library as ASCII: for training, and every tenth file for the score."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    paths = sorted(path for path in folder.glob("*.py") if path.is_file())
    parts: tuple[list[bytes], list[bytes]] = [], []
    for index, path in enumerate(paths):
        parts[index % 10 == 9].append(path.read_bytes())
    texts = [np.frombuffer(b"".join(part)[:_TEXT_BYTES], np.uint8) % CHARACTERS for part in parts]
    if min(len(text) for text in texts) < 100 * CONTEXT:
        raise RuntimeError(f"library_text: {folder} must hold the standard library's source, for {sys.executable}")
    train, held_out = (torch.from_numpy(text.astype(np.int64)) for text in texts)
    return train, held_out


def make_text(seed: int, length: float = 1.0) -> Task:
    """The next character of Python's standard library."""
    train, held_out = library_text()
    torch.manual_seed(seed)
    model, steps = LanguageModel(), max(round(TEXT_STEPS * length), 2)
    optimizer = torch.optim.AdamW(_two_groups(model, 0.01), 3e-3, betas=(0.9, 0.98))

    def rate(step: int) -> float:
        return min((step + 1) / 20, 1.0) * 0.5 * (1 + math.cos(math.pi * min(step / steps, 1.0)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    draw = torch.Generator().manual_seed(seed)

    def batches() -> Iterator[Batch]:
        window = torch.arange(CONTEXT + 1)
        for _ in range(steps):
            starts = torch.randint(len(train) - CONTEXT, (TEXT_BATCH,), generator=draw)
            rows = train[starts[:, None] + window]
            yield rows[:, :-1], rows[:, 1:]

    return Task(model, optimizer, schedule, batches(), steps, 3.0, _perplexity(held_out), train[None, :CONTEXT])


def _perplexity(text: Tensor) -> Callable[[nn.Module], float]:
    rows = text[: 512 * (CONTEXT + 1)].reshape(512, CONTEXT + 1)

    def score(model: nn.Module) -> float:
        model.eval()
        with torch.no_grad():
            losses = [functional.cross_entropy(model(part[:, :-1]), part[:, 1:]) for part in rows.split(64)]
        model.train()
        return math.exp(float(torch.stack(losses).mean()))

    return score


TASKS = {
    "digits": Kind("Handwritten digits", "test accuracy (%)", True, make_digits),
    "text": Kind("Python's source, character by character", "perplexity", False, make_text),
    "table": Kind("Breast cancer, a table of 30 columns", "test accuracy (%)", True, make_table),
}
