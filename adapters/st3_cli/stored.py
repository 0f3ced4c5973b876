"""What a file holds, one tensor after the other."""

from collections.abc import Callable, Iterable, Iterator
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Stored(NamedTuple):
    """One tensor of a file.

    Args:
        name: of the tensor in the model.
        kept: boolean, of the tensor's shape: where it is not zero.
        itemsize: bytes of one weight.
        input_axis: axis of the input dimension, which N:M groups run along; None where there is none.
        dense_macs: multiply-adds for one input, where the file tells.
    """

    name: str
    kept: NDArray[np.bool_]
    itemsize: int
    input_axis: int | None = None
    dense_macs: int | None = None

    @classmethod
    def of_torch(cls, name: str, kept: NDArray[np.bool_], itemsize: int) -> "Stored":
        """A tensor of PyTorch: kernels are ``(out, in, *kernel)``, and a matrix takes a vector."""
        macs = kept.size if kept.ndim == 2 else None
        return cls(name, kept, itemsize, 1 if kept.ndim > 1 else None, macs)


class Unread(NamedTuple):
    """One entry of a file whose zeros are not counted: it is no tensor, or none of floating-point numbers.

    Args:
        name: of the entry.
        kind: its dtype, or its type.
    """

    name: str
    kind: str


Reader = Callable[[Path], Iterator[Stored | Unread]]

_READERS = {
    ".safetensors": "st3_cli.safetensors_file",
    ".pt": "st3_cli.torch_file",
    ".pth": "st3_cli.torch_file",
    ".ckpt": "st3_cli.torch_file",
    ".bin": "st3_cli.torch_file",
    ".keras": "st3_cli.keras_file",
}
"""Modules that read files of each suffix, by a function ``read``; imported only when they are needed."""


def read(path: Path) -> Iterator[Stored | Unread]:
    """Tensors of a file, in the order in which it lists them.

    Raises:
        FileNotFoundError: there is no such file.
        ImportError: what reads it is not installed.
        ValueError: the suffix is unknown, or the file is damaged or another one.
    """
    if path.suffix not in _READERS:
        known = ", ".join(_READERS)
        raise ValueError(f"inspect: {path} must have one of the suffixes {known}; save the model as one of them")
    if not path.is_file():
        raise FileNotFoundError(f"inspect: {path} must be a file, and there is none")
    reader: Reader = import_module(_READERS[path.suffix]).read
    return reader(path)


def refuse_raw(names: Iterable[str], path: Path) -> None:
    """Raise a ValueError if these are the names of a PyTorch model that is still sparsified: its weights are dense."""
    for name in names:
        if ".parametrizations." in f".{name}" and name.endswith(".original"):
            raise ValueError(
                f"inspect: {path} holds raw weights of a model that is still sparsified, such as {name}; save the "
                "model that Sparsifier.finalize() returns"
            )
