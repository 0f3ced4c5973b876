"""Sparse-train a ResNet-20 on CIFAR-10, with the hyper-parameters of the authors of ST-3.

``--data`` is the folder of the data set's *binary version*, which holds ``data_batch_1.bin`` and so on: one byte of
label and 3,072 of image a row. (The version for Python is made of pickles, and a pickle can run any program.) Run it
from the root of the repository; ``python -m examples.tiny_data runs/tiny`` writes some images to try it on::

    python -m examples.cifar --data cifar-10-batches-bin --sparsity 0.9
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from examples import networks, options, training
from examples.processes import Processes, started

PIXELS, PADDING = 32, 4
ROW = 1 + 3 * PIXELS * PIXELS

MEAN, DEVIATION = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
"""Of red, green and blue in the training images, as the authors have them."""

RECIPE = training.Recipe(
    learning_rate=0.1,
    rate_at=training.tenth_at_half_and_three_quarters,
    momentum=0.9,
    weight_decay=1e-4,
    label_smoothing=0.0,
    ramp=(5 / 160, 80 / 160),
)
"""As in the authors' configs/cifar10.toml: 160 epochs of batches of 128, and zeros from epoch 5 to epoch 80."""


class Cifar:
    """All images in memory, on the device.

    Args:
        folder: with the files of the binary version.
        batch_size: of training.
        seed: of the order and the augmentation.
        device: that the network is on.
    """

    def __init__(self, folder: Path, batch_size: int, seed: int, device: torch.device) -> None:
        files = sorted(folder.glob("data_batch_*.bin"))
        if not files:
            raise ValueError(
                f"--data must be the folder of CIFAR-10's binary version, got {folder} without data_batch_1.bin"
            )
        images, labels = zip(*map(read_rows, files), strict=True)
        self._images, self._labels = torch.cat(images).to(device), torch.cat(labels).to(device)
        self._test = [part.to(device) for part in read_rows(folder / "test_batch.bin")]
        self._batch_size, self._seed = batch_size, seed
        self.steps = len(self._labels) // batch_size
        if self.steps == 0:
            raise ValueError(f"--batch-size must be at most {len(self._labels)}, the training images, got {batch_size}")

    def training_batches(self, epoch: int) -> Iterator[training.Batch]:
        """One epoch in an order of its own, cropped and flipped; what does not fill a batch is left out."""
        chance = np.random.default_rng((self._seed, epoch))
        order = torch.from_numpy(chance.permutation(len(self._labels))).to(self._labels.device)
        for rows in order[: self.steps * self._batch_size].split(self._batch_size):
            yield normalized(augmented(self._images[rows], chance)), self._labels[rows]

    def test_batches(self) -> Iterator[training.Batch]:
        """All test images."""
        for images, labels in zip(*(part.split(self._batch_size) for part in self._test), strict=True):
            yield normalized(images), labels


def read_rows(path: Path) -> tuple[Tensor, Tensor]:
    """Images of a file, uint8, shape ``(N, 3, 32, 32)``, and their labels.

    Raises:
        OSError: there is no such file.
        ValueError: it is not one of CIFAR-10's binary version.
    """
    content = np.fromfile(path, np.uint8)
    if content.size == 0 or content.size % ROW or content[::ROW].max() > 9:
        raise ValueError(
            f"{path} must hold rows of a label from 0 to 9 and 3,072 bytes, got another file; fetch it anew"
        )
    rows = torch.from_numpy(content.reshape(-1, ROW))
    return rows[:, 1:].reshape(-1, 3, PIXELS, PIXELS), rows[:, 0].long()


def augmented(images: Tensor, chance: np.random.Generator) -> Tensor:
    """Every image moved by up to four pixels, its edges repeated, and flipped or not."""
    count, device = len(images), images.device
    padded = functional.pad(images.float(), (PADDING,) * 4, mode="replicate").to(images.dtype)
    offsets = torch.from_numpy(chance.integers(2 * PADDING + 1, size=(2, count, 1))).to(device)
    across = torch.arange(PIXELS, device=device).repeat(count, 1)
    flips = torch.from_numpy(chance.random((count, 1)) < 0.5).to(device)
    rows, columns = across + offsets[0], torch.where(flips, PIXELS - 1 - across, across) + offsets[1]
    batch, colors = (
        torch.arange(count, device=device)[:, None, None, None],
        torch.arange(3, device=device)[:, None, None],
    )
    return padded[batch, colors, rows[:, None, :, None], columns[:, None, None, :]]


def normalized(images: Tensor) -> Tensor:
    """float32 with mean 0 and deviation 1 in every color."""
    mean, deviation = (torch.tensor(values, device=images.device)[:, None, None] for values in (MEAN, DEVIATION))
    return (images / 255 - mean) / deviation


def main(arguments: Sequence[str] | None = None) -> None:
    """Train from the command line."""
    parser = options.parser("Sparse-train a ResNet-20 on CIFAR-10.", out="runs/cifar", epochs=160, batch_size=128)
    parser.add_argument("--width", type=options.at_least_one, default=16, help="channels of the first layer")
    found = vars(parser.parse_args(arguments))
    width, settings = found.pop("width"), training.Settings(**found)
    with started() as processes:
        train(width, settings, processes)


def train(width: int, settings: training.Settings, processes: Processes) -> None:
    """Train in one process: the network is too small for more."""
    if processes.world > 1:
        raise ValueError("examples.cifar takes one process, got more; start it without torchrun")
    data = Cifar(settings.data, settings.batch_size, settings.seed, processes.device)
    torch.manual_seed(settings.seed)
    training.run(networks.cifar_resnet(width=width), data, RECIPE, settings, processes)


if __name__ == "__main__":
    main()
