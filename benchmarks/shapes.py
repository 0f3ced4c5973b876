"""Shapes of real networks' kernels, and weights that look like theirs."""

import math

import numpy as np

Shape = tuple[int, ...]

_CHUNK = 1 << 22


def resnet50() -> list[Shape]:
    """Convolution and linear kernels of ResNet-50 in PyTorch's layout: 54 tensors, 25.5 million weights."""
    shapes: list[Shape] = [(64, 3, 7, 7)]
    channels = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            shapes += [(width, channels, 1, 1), (width, width, 3, 3), (4 * width, width, 1, 1)]
            if block == 0:
                shapes.append((4 * width, channels, 1, 1))
            channels = 4 * width
    return [*shapes, (1000, 2048)]


def he_normal(shapes: list[Shape], seed: int = 0) -> list[np.ndarray]:
    """float32 weights of the usual initialisation: standard deviation sqrt(2 / inputs)."""
    generator = np.random.default_rng(seed)
    return [
        (generator.standard_normal(s, np.float32) * math.sqrt(2 / math.prod(s[1:]))).astype(np.float32) for s in shapes
    ]


def in_one_piece(arrays: list[np.ndarray]) -> tuple[np.ndarray, list[np.ndarray]]:
    """Copies that lie one behind the other: all of their memory, and a view of it for each array.

    What reads or copies the whole then meets the same pages of memory as what walks the arrays.
    """
    flat = np.concatenate([array.ravel() for array in arrays])
    pieces = np.split(flat, np.cumsum([array.size for array in arrays])[:-1])
    return flat, [piece.reshape(array.shape) for piece, array in zip(pieces, arrays, strict=True)]


def keras_layout(weights: list[np.ndarray]) -> list[np.ndarray]:
    """The same kernels as Keras keeps them: output channels last, ``(*kernel, in, out)``."""
    return [np.ascontiguousarray(w.transpose(*range(2, w.ndim), 1, 0)) for w in weights]


def normal(count: int, seed: int = 0) -> np.ndarray:
    """float32, shape ``(count / 1000, 1000)``, standard normal; made in place, chunk by chunk."""
    generator, flat = np.random.default_rng(seed), np.empty(count, np.float32)
    for start in range(0, count, _CHUNK):
        generator.standard_normal(dtype=np.float32, out=flat[start : start + _CHUNK])
    return flat.reshape(-1, 1000)
