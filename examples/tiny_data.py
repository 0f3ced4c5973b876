"""Write a few images in the formats of CIFAR-10 and ImageNet, to try the full-size examples on.

``python -m examples.tiny_data runs/tiny`` writes ``runs/tiny/cifar-10-batches-bin`` and ``runs/tiny/imagenet``. Every
class has a color of its own, so that there is something to learn.
"""

import argparse
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

CLASSES = 10

Pixels = NDArray[np.uint8]


def image(label: int, height: int, width: int, chance: np.random.Generator) -> Pixels:
    """Noise around the color of a class, shape ``(height, width, 3)``."""
    color = np.random.default_rng(label).integers(40, 216, 3)
    return np.clip(color + chance.normal(0, 30, (height, width, 3)), 0, 255).astype(np.uint8)


def write_cifar(folder: Path, count: int, seed: int = 0) -> Path:
    """Files of ``count`` images each, as in CIFAR-10's binary version; the folder that they are in."""
    folder, chance = folder / "cifar-10-batches-bin", np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        labels = np.arange(count) % CLASSES
        pixels = [image(label, 32, 32, chance).transpose(2, 0, 1).ravel() for label in labels.tolist()]
        rows = np.column_stack([labels.astype(np.uint8), np.stack(pixels)])
        rows.tofile(folder / f"{name}.bin")
    return folder


def write_imagenet(folder: Path, count: int, classes: int = CLASSES, seed: int = 0) -> Path:
    """JPEG files of many sizes, ``count`` a class and one of them grey; the folder of ``train`` and ``val``."""
    folder, chance = folder / "imagenet", np.random.default_rng(seed)
    for part in ("train", "val"):
        for label in range(classes):
            home = folder / part / f"n{label:08}"
            home.mkdir(parents=True, exist_ok=True)
            for i in range(count):
                height, width = chance.integers(40, 100, 2)
                picture = Image.fromarray(image(label, height, width, chance))
                (picture.convert("L") if i == 0 else picture).save(home / f"{part}_{i}.JPEG", quality=90)
    return folder


def main() -> None:
    """Write both data sets."""
    parser = argparse.ArgumentParser(description="Write a few images in the formats of CIFAR-10 and ImageNet.")
    parser.add_argument("folder", type=Path, help="where to")
    parser.add_argument(
        "--count", type=int, default=50, help="images of a file of CIFAR-10, and of a class of ImageNet"
    )
    arguments = parser.parse_args()
    print(write_cifar(arguments.folder, arguments.count))
    print(write_imagenet(arguments.folder, arguments.count))


if __name__ == "__main__":
    main()
