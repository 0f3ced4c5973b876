"""Sparse weights as a compact file that needs nothing of this library to be understood.

The format, ``st3core-sparse-1``, is a safetensors file with two kinds of tensors:

- ``dense/NAME``: a tensor as it is.
- ``bitmap/NAME`` and ``values/NAME``: a sparse one. Its elements are numbered from 0 in C order (the last axis runs
  fastest). Bit ``i % 8`` of byte ``i // 8`` of the bitmap (uint8; the lowest bit is number 0) says whether element
  ``i`` is stored; the values are those that are, in this order and in the tensor's dtype. All others are zero, with all
  bits zero: -0 is stored.

A tensor is sparse in the file where that takes fewer bytes. The metadata are ``format``, and as JSON ``shapes``: the
shape of every sparse tensor, and ``tied``: for every name of a tensor that has another one too, that other name.
"""

import json
from collections.abc import Mapping
from math import prod
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn

from st3_torch.checkpoint import StrPath, read_safetensors, replacing
from st3_torch.memory import NUMPY_DTYPES
from st3_torch.parametrization import SparseWeight
from st3_torch.placements import is_dtensor

FORMAT = "st3core-sparse-1"

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def save_sparse(model: nn.Module | Mapping[str, torch.Tensor], path: StrPath) -> None:
    """Write a model's ``state_dict`` without its zeros, in one step.

    Every bit comes back: dtypes, buffers and tied tensors are kept, and tensors with few zeros stay dense.

    Args:
        model: a finalized model, or any other; or its ``state_dict``.
        path: of the file to write.

    Raises:
        TypeError: the ``state_dict`` holds something that is not a tensor.
        ValueError: the model is still sparsified; its own weights are dense.
        OSError: the folder does not exist or is not writable.

    Examples:
        >>> model = torch.nn.Linear(100, 10)
        >>> _ = torch.nn.init.zeros_(model.weight)
        >>> path = getfixture("tmp_path") / "sparse.safetensors"
        >>> save_sparse(model, path)
        >>> model.load_state_dict(load_sparse(path))
        <All keys matched successfully>
    """
    if isinstance(model, nn.Module) and any(isinstance(module, SparseWeight) for module in model.modules()):
        raise ValueError("save_sparse: model must be finalized, got one that is sparsified; call Sparsifier.finalize()")
    tensors, tied = _distinct(model.state_dict() if isinstance(model, nn.Module) else model)
    parts: dict[str, torch.Tensor] = {}
    shapes = {}
    for name, tensor in tensors.items():
        packed = _pack(tensor)
        if packed is None:
            parts[f"dense/{name}"] = tensor.clone(memory_format=torch.contiguous_format)
        else:
            parts[f"bitmap/{name}"], parts[f"values/{name}"] = packed
            shapes[name] = list(tensor.shape)
    metadata = {"format": FORMAT, "shapes": json.dumps(shapes), "tied": json.dumps(tied)}
    with replacing(path) as file:
        save_file(parts, file, metadata)


def load_sparse(path: StrPath) -> dict[str, torch.Tensor]:
    """Read what :func:`save_sparse` has written; for the ``load_state_dict`` of an ordinary model.

    Args:
        path: of the file.

    Returns:
        Dense CPU tensors by name, equal to those that were saved, bit for bit.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, or it is another one.
    """
    metadata, parts = read_safetensors(path, FORMAT, "load_sparse")
    rule = f"load_sparse: {path} must be a whole file of the format {FORMAT}"
    try:
        return _unpack_all(metadata, parts)
    except KeyError as error:
        raise ValueError(f"{rule}, but it has no {error}") from None
    except (AttributeError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{rule}, but {error}") from None


def _distinct(state: Mapping[str, Any]) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors on the CPU, each once, by their first names; and the first name for every other."""
    tensors: dict[str, torch.Tensor] = {}
    tied: dict[str, str] = {}
    first: dict[object, str] = {}
    for name, tensor in state.items():
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"save_sparse: {name} must be a tensor, got {tensor!r}; leave it out of the state_dict")
        if is_dtensor(tensor):
            raise TypeError(
                f"save_sparse: {name} must be a tensor of this process, got one that is sharded; gather it by "
                "full_tensor() first"
            )
        memory = tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()
        other = first.setdefault(memory, name) if tensor.numel() else name
        if other == name:
            tensors[name] = tensor.detach().cpu()
        else:
            tied[name] = other
    return tensors, tied


def _pack(tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Bitmap and values of a tensor, or None if these take no less than the tensor itself."""
    if tensor.dtype not in NUMPY_DTYPES:
        return None
    flat = tensor.reshape(-1)
    stored = flat.view(_INTEGERS[tensor.itemsize]) != 0
    bitmap = torch.from_numpy(np.packbits(stored.numpy(), bitorder="little"))
    values = flat[stored]
    return (bitmap, values) if bitmap.nbytes + values.nbytes < tensor.nbytes else None


def _unpack_all(metadata: Mapping[str, str], parts: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    shapes, tied = json.loads(metadata["shapes"]), json.loads(metadata["tied"])
    tensors = {name.removeprefix("dense/"): part for name, part in parts.items() if name.startswith("dense/")}
    for name, shape in shapes.items():
        tensors[name] = _unpack(parts[f"bitmap/{name}"], parts[f"values/{name}"], shape, name)
    return tensors | {name: tensors[other] for name, other in tied.items()}


def _unpack(bitmap: torch.Tensor, values: torch.Tensor, shape: list[int], name: str) -> torch.Tensor:
    count = prod(shape)
    if bitmap.dtype != torch.uint8 or bitmap.shape != ((count + 7) // 8,):
        raise ValueError(f"the bitmap of {name} has the wrong dtype or shape for a tensor of shape {shape}")
    stored = torch.from_numpy(np.unpackbits(bitmap.numpy(), count=count, bitorder="little")).bool()
    if values.shape != (int(stored.sum()),):
        raise ValueError(f"{name} has {list(values.shape)} values, and a bitmap that marks {int(stored.sum())}")
    tensor = torch.zeros(count, dtype=values.dtype)
    tensor[stored] = values
    return tensor.reshape(shape)
