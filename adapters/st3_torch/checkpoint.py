"""Checkpoints that are on disk whole or not at all, and the Sparsifier's state as a safetensors file."""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from st3_torch.placements import is_dtensor

FORMAT = "st3core-state-1"

StrPath = str | PathLike[str]


@contextmanager
def replacing(path: StrPath) -> Iterator[Path]:
    """Write a file so that nobody ever sees half of it, even if the process is killed.

    What the block writes goes to a second file in the same folder. If the block ends well, that becomes ``path`` in one
    step; if not, it is removed, and ``path`` is what it was before. A process that is killed in between leaves it
    behind, for the next one to overwrite.

    Args:
        path: of the file to write; by one process at a time.

    Yields:
        Path to write to.

    Raises:
        OSError: the folder does not exist or is not writable.

    Examples:
        >>> path = getfixture("tmp_path") / "checkpoint.pt"
        >>> with replacing(path) as file:
        ...     torch.save({"step": 3}, file)
        >>> torch.load(path, weights_only=True)
        {'step': 3}
    """
    path = Path(path).resolve()  # what a link leads to is written, and the link stays
    partial = path.with_name(f".{path.name}.partial")
    try:
        yield partial
        _flush(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    _flush(path.parent)


def _flush(path: Path) -> None:
    """Have what was written on the disk, not only in the system's memory: a power cut may follow."""
    if path.is_dir() and os.name == "nt":
        return  # folders cannot be opened there
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def save_state(state: Mapping[str, Any], path: StrPath) -> None:
    """Write a Sparsifier's state as a safetensors file, in one step.

    The masks are its tensors; everything else is JSON in its metadata.

    Args:
        state: what ``Sparsifier.state_dict()`` returns.
        path: of the file to write.

    Raises:
        OSError: the folder does not exist or is not writable.
        TypeError: a mask is sharded over processes.
    """
    sharded = [name for name, mask in state["masks"].items() if is_dtensor(mask)]
    if sharded:
        raise TypeError(
            f"save_state: masks must be tensors of this process, got a sharded one of {sharded[0]}; save the "
            "state by torch.distributed.checkpoint, or gather the masks by full_tensor()"
        )
    plain = {name: value for name, value in state.items() if name != "masks"}
    tensors = {name: mask.contiguous() for name, mask in state["masks"].items()}
    with replacing(path) as file:
        save_file(tensors, file, metadata={"format": FORMAT, "state": json.dumps(plain)})


def load_state(path: StrPath) -> dict[str, Any]:
    """Read what :func:`save_state` has written; for ``Sparsifier.load_state_dict``.

    Args:
        path: of the file.

    Returns:
        The state, equal to the one that was saved, bit for bit.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, or it is another one.
    """
    metadata, masks = read_safetensors(path, FORMAT, "load_state")
    try:
        return {**json.loads(metadata["state"]), "masks": masks}
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"load_state: {path} must be a whole file of the format {FORMAT}, but {error!r}") from None


def read_safetensors(path: StrPath, format: str, function: str) -> tuple[dict[str, str], dict[str, torch.Tensor]]:
    """Metadata and tensors of a safetensors file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, or of another kind; the message begins with ``function``.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{function}: {path} must be a whole safetensors file, got one that is not: {error}") from None
    if metadata.get("format") != format:
        saver = function.replace("load", "save")
        raise ValueError(
            f"{function}: {path} must be of the format {format}, got {metadata.get('format')!r}; save it by {saver}"
        )
    return metadata, tensors
