"""Reads safetensors, also the compact ones of ``st3_torch.export``."""

import json
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401 # gives NumPy the name "bfloat16"
import numpy as np

from st3_cli.stored import Stored, Unread, refuse_raw

try:
    from safetensors import SafetensorError, safe_open
except ImportError as error:  # pragma: no cover
    raise ImportError(
        "inspect: files of safetensors need safetensors; install it with: pip install 'st3core[cli]'"
    ) from error

_DTYPES = ("F16", "BF16", "F32", "F64")


def read(path: Path) -> Iterator[Stored | Unread]:
    """Tensors of the file.

    Raises:
        ValueError: it is damaged or another one, or holds a model that is still sparsified.
    """
    try:
        with safe_open(path, "np") as file:
            names, metadata = list(file.keys()), file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"inspect: {path} must be a whole safetensors file, got one that is not: {error}") from None
    refuse_raw(names, path)
    return _read_sparse(path, names, metadata) if metadata.get("format") == "st3core-sparse-1" else _read(path, names)


def _read(path: Path, names: list[str]) -> Iterator[Stored | Unread]:
    with safe_open(path, "np") as file:
        for name in names:
            yield _dense(file, name, name)


def _read_sparse(path: Path, names: list[str], metadata: dict[str, str]) -> Iterator[Stored | Unread]:
    """The format is described in :mod:`st3_torch.export`."""
    shapes = json.loads(metadata.get("shapes", "{}"))
    with safe_open(path, "np") as file:
        for name in names:
            kind, _, own = name.partition("/")
            if kind == "dense":
                yield _dense(file, name, own)
            elif own in shapes and kind == "bitmap":
                yield _sparse(file, own, shapes[own])


def _dense(file: Any, key: str, name: str) -> Stored | Unread:
    dtype = file.get_slice(key).get_dtype()
    if dtype not in _DTYPES:
        return Unread(name, dtype)
    array = file.get_tensor(key)
    stored = Stored.of_torch(name, array != 0, array.itemsize)
    is_flax = name.rpartition("/")[2] == "kernel" and array.ndim > 1  # with the output channels last
    return stored._replace(input_axis=array.ndim - 2) if is_flax else stored


def _sparse(file: Any, name: str, shape: list[int]) -> Stored:
    bits, values = file.get_tensor(f"bitmap/{name}"), file.get_tensor(f"values/{name}")
    kept = np.unpackbits(bits, count=prod(shape), bitorder="little").astype(np.bool_)
    kept[kept] = values != 0  # -0 is stored
    return Stored.of_torch(name, kept.reshape(shape), values.itemsize)
