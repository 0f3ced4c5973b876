"""Sparse-train a ResNet-50 on ImageNet, with the hyper-parameters of the authors of ST-3.

``--data`` is a folder of ``train/CLASS/*.JPEG`` and ``val/CLASS/*.JPEG``, as usual. Run it from the root of the
repository, in one process or in several; ``python -m examples.tiny_data runs/tiny`` writes some images to try it on::

    python -m examples.imagenet --data imagenet --amp
    torchrun --nproc-per-node=8 -m examples.imagenet --data imagenet --amp           # data parallel
    torchrun --nproc-per-node=8 -m examples.imagenet --data imagenet --amp --fsdp    # fully sharded
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import exp, log
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from examples import networks, options, training
from examples.processes import Processes, started

MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of red, green and blue, as the authors have them."""

AREA, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)
"""Of a crop: its share of the image, and its width by its height."""

RECIPE = training.Recipe(
    learning_rate=0.2,
    rate_at=training.cosine_after_warmup,
    momentum=0.875,
    weight_decay=5e-5,
    label_smoothing=0.1,
    ramp=(5 / 100, 50 / 100),
)
"""As in the authors' configs/imagenet.toml: 100 epochs of batches of 512, and zeros from epoch 5 to epoch 50."""

Box = tuple[float, float, float, float]
"""Left, upper, right and lower edge."""


class Folder(Dataset[tuple[Tensor, int]]):
    """Images in one folder a class; classes are numbered by their names.

    Args:
        folder: of the classes.
        size: of the squares that images are cut to, in pixels.
        seed: of crops and flips.
    """

    def __init__(self, folder: Path, size: int, seed: int) -> None:
        self.classes = sorted(path.name for path in folder.glob("*") if path.is_dir())
        self.files = [(path, i) for i, name in enumerate(self.classes) for path in sorted((folder / name).iterdir())]
        if not self.files:
            raise ValueError(f"--data must hold train/CLASS/*.JPEG and val/CLASS/*.JPEG, got no image in {folder}")
        self._size, self._seed = size, seed

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, key: tuple[int | None, int]) -> tuple[Tensor, int]:
        """The image of this number, uint8, shape ``(3, size, size)``, as this epoch sees it; and its label.

        Epoch None is the test: the middle of the image. A number beyond the last gives label -1.
        """
        epoch, number = key
        path, label = self.files[number % len(self.files)]
        with Image.open(path) as file:
            image = file.convert("RGB")
        if epoch is None:
            image = middle(image, self._size)
        else:
            image = random_part(image, self._size, np.random.default_rng((self._seed, epoch, number)))
        return torch.from_numpy(np.array(image)).permute(2, 0, 1), label if number < len(self.files) else -1


def middle(image: Image.Image, size: int) -> Image.Image:
    """The middle square of seven eighths of the shorter side."""
    width, height = image.size
    side = min(width, height) * 7 / 8
    left, upper = (width - side) / 2, (height - side) / 2
    return image.resize((size, size), Image.Resampling.BILINEAR, (left, upper, left + side, upper + side))


def random_part(image: Image.Image, size: int, chance: np.random.Generator) -> Image.Image:
    """A random rectangle of the image made a square, and flipped or not."""
    part = image.resize((size, size), Image.Resampling.BILINEAR, random_box(*image.size, chance))
    return part.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if chance.random() < 0.5 else part


def random_box(width: int, height: int, chance: np.random.Generator) -> Box:
    """A rectangle whose area and shape are random; the largest in the middle if ten of them do not fit."""
    for _ in range(10):
        area = width * height * chance.uniform(*AREA)
        ratio = exp(chance.uniform(log(RATIO[0]), log(RATIO[1])))
        w, h = round((area * ratio) ** 0.5), round((area / ratio) ** 0.5)
        if 0 < w <= width and 0 < h <= height:
            left, upper = chance.integers(width - w + 1), chance.integers(height - h + 1)
            return float(left), float(upper), float(left + w), float(upper + h)
    w, h = min(width, height * RATIO[1]), min(height, width / RATIO[0])
    return (width - w) / 2, (height - h) / 2, (width + w) / 2, (height + h) / 2


@dataclass
class ImageNet:
    """This process's share of the images.

    Args:
        train: images to train on.
        test: images to test on.
        batch_size: of all processes together.
        seed: of the order.
        workers: processes that read images; 0 reads them in this one.
        processes: among which the images are dealt out.
    """

    train: Folder
    test: Folder
    batch_size: int
    seed: int
    workers: int
    processes: Processes

    def __post_init__(self) -> None:
        if self.batch_size % self.processes.world or self.batch_size > len(self.train):
            raise ValueError(
                f"--batch-size must be a multiple of {self.processes.world}, the processes, and at most "
                f"{len(self.train)}, the training images, got {self.batch_size}"
            )
        if self.test.classes != self.train.classes:
            raise ValueError("--data must hold the same classes in train and val, got others in val")
        self.steps = len(self.train) // self.batch_size

    def training_batches(self, epoch: int) -> Iterator[training.Batch]:
        """One epoch in an order of its own, cropped and flipped; what does not fill a batch is left out."""
        order = np.random.default_rng((self.seed, epoch)).permutation(len(self.train))
        return self._batches(self.train, epoch, order[: self.steps * self.batch_size])

    def test_batches(self) -> Iterator[training.Batch]:
        """All test images; the last batch is filled, so that every process gets as many batches of one size."""
        return self._batches(self.test, None, np.arange(-(-len(self.test) // self.batch_size) * self.batch_size))

    def _batches(self, folder: Folder, epoch: int | None, order: np.ndarray) -> Iterator[training.Batch]:
        keys = [(epoch, int(number)) for number in order[self.processes.rank :: self.processes.world]]
        own, device = self.batch_size // self.processes.world, self.processes.device
        batches = [keys[start : start + own] for start in range(0, len(keys), own)]
        pinned = device.type == "cuda"
        for images, labels in DataLoader(folder, batch_sampler=batches, num_workers=self.workers, pin_memory=pinned):
            yield normalized(images.to(device, non_blocking=True)), labels.to(device, non_blocking=True)


def normalized(images: Tensor) -> Tensor:
    """float32 with mean 0 and deviation 1 in every color."""
    mean, deviation = (torch.tensor(values, device=images.device)[:, None, None] for values in (MEAN, DEVIATION))
    return (images / 255 - mean) / deviation


def main(arguments: Sequence[str] | None = None) -> None:
    """Train from the command line."""
    parser = options.parser("Sparse-train a ResNet-50 on ImageNet.", out="runs/imagenet", epochs=100, batch_size=512)
    parser.add_argument("--fsdp", action="store_true", help="shard the network over the processes of torchrun")
    parser.add_argument("--amp", action="store_true", help="compute in bfloat16 where autocast does")
    parser.add_argument("--workers", type=int, default=8, help="processes that read images, for each that trains")
    parser.add_argument("--width", type=options.at_least_one, default=64, help="channels of the first layer")
    parser.add_argument("--size", type=options.at_least_one, default=224, help="pixels of a side")
    found = vars(parser.parse_args(arguments))
    workers, width, size = (found.pop(name) for name in ("workers", "width", "size"))
    settings = training.Settings(**found)
    with started() as processes:
        train, test = (Folder(settings.data / part, size, settings.seed) for part in ("train", "val"))
        data = ImageNet(train, test, settings.batch_size, settings.seed, workers, processes)
        torch.manual_seed(settings.seed)
        training.run(networks.resnet50(len(train.classes), width), data, RECIPE, settings, processes)


if __name__ == "__main__":
    main()
