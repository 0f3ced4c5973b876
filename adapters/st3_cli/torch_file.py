"""Reads what ``torch.save`` has written: a ``state_dict``, or a checkpoint that holds one."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from st3_cli.stored import Stored, Unread, refuse_raw

try:
    import torch
except ImportError as error:  # pragma: no cover
    raise ImportError(
        "inspect: files of PyTorch need PyTorch; install it with: pip install 'st3core[torch]'"
    ) from error

_ENTRIES = ("state_dict", "model_state_dict", "model")
"""Where checkpoints keep the model's ``state_dict``."""


def read(path: Path) -> Iterator[Stored | Unread]:
    """Tensors of the file's ``state_dict``; nothing else that the file holds is executed or built.

    Raises:
        ValueError: it is no whole file of tensors, it has no ``state_dict``, or that of a model that is still
            sparsified.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # damaged bytes make it raise almost anything
        raise ValueError(
            f"inspect: {path} must be a whole file of tensors, got one that torch.load(weights_only=True) refuses; "
            f"save model.state_dict(), not the model: {error}"
        ) from None
    state = _state_dict(content, path)
    refuse_raw(state, path)
    return (_entry(name, value) for name, value in state.items())


def _entry(name: str, value: object) -> Stored | Unread:
    if not isinstance(value, torch.Tensor):
        return Unread(name, type(value).__name__)
    if not value.is_floating_point():
        return Unread(name, str(value.dtype).removeprefix("torch."))
    if value.layout != torch.strided:
        value = value.to_dense()
    return Stored.of_torch(name, (value.detach() != 0).numpy(), value.itemsize)


def _state_dict(content: object, path: Path) -> Mapping[str, Any]:
    """The ``state_dict`` in what was loaded, which may be the whole of it."""
    if not isinstance(content, Mapping):
        raise ValueError(f"inspect: {path} must hold a state_dict, got {type(content).__name__}")
    for entry in _ENTRIES:
        if isinstance(content.get(entry), Mapping):
            found: Mapping[str, Any] = content[entry]
            return found
    if any(isinstance(value, torch.Tensor) for value in content.values()):
        return content
    raise ValueError(
        f"inspect: {path} must hold a state_dict, by itself or as {', '.join(map(repr, _ENTRIES))}, got entries "
        f"{', '.join(map(repr, content)) or 'none'}"
    )
