"""How a function of the host takes part in a step of each backend, on the memory of the weights where it is."""

import sys
from collections import Counter
from collections.abc import Callable, Sequence
from math import prod
from threading import Lock
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from st3_keras.backend import dtype_name

State = tuple[np.ndarray, np.ndarray, np.ndarray]
OnHost = Callable[[bool, int, State, NDArray[np.int64]], State]
"""From whether weights are frozen, the step, the state and the addresses of sources and targets, to the new state.

Addresses are int64 of shape ``(2, n)``: read from the first row, write to the second; C-contiguous memory."""

_PACKED_BELOW = 1 << 14
"""Elements below which a tensor is packed with others."""

_STACKED_FROM = 4
"""Tensors with equal rows from which on they get a pack of their own, which has its price too."""

_ALIGNMENT = 64
"""Bytes; TensorFlow takes over memory that starts at a multiple of it, and copies any other."""


def on_arrays(call: Callable[[NDArray[np.int64]], object], sources: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Targets that ``call`` has written, new arrays."""
    sources = [np.ascontiguousarray(source).reshape(source.shape) for source in sources]
    targets = [np.empty(source.shape, source.dtype) for source in sources]
    call(addresses(sources, targets))
    return targets


def on_torch_tensors(
    call: Callable[[NDArray[np.int64]], object], sources: Sequence[Any], targets: Sequence[Any]
) -> None:
    """Let ``call`` write the targets in place."""
    import torch

    for target in targets:  # a graph that still needs the old ones must notice
        torch.autograd.graph.increment_version(target)
    read, written = [source.contiguous() for source in sources], [target.contiguous() for target in targets]
    call(np.array([[tensor.data_ptr() for tensor in row] for row in (read, written)], np.int64))
    for target, result in zip(targets, written, strict=True):
        if result is not target:
            target.copy_(result)


def in_tensorflow_graph(
    on_host: OnHost, frozen: bool, step: Any, state: Sequence[Any], sources: Sequence[Any]
) -> tuple[list[Any], list[Any]]:
    """New state and targets, within a graph; large tensors without a copy."""
    import tensorflow as tf

    sources = [tf.convert_to_tensor(source) for source in sources]
    packs = _Packs.of(sources)
    room = _Room()

    def call(step: Any, *rest: np.ndarray) -> list[np.ndarray]:
        old, read = rest[:3], rest[3:]
        written = [room.take(pack.shape, pack.dtype) for pack in read]
        return [*on_host(frozen, int(step), old, packs.places(read, written)), *written]  # type: ignore[arg-type]

    def packed(pack: list[int], rows: tuple[int, ...]) -> Any:
        parts = [sources[kernel] for kernel in pack]
        return tf.concat([part if part.shape[1:] == rows else tf.reshape(part, [-1, *rows]) for part in parts], 0)

    joined = [packed(pack, rows) for pack, rows in zip(packs.members, packs.rows, strict=True)]
    types = [tf.as_dtype(x.dtype) for x in (*state, *joined)]
    results = tf.numpy_function(call, [step, *state, *joined], types)
    targets: list[Any] = [None] * len(sources)
    for pack, whole, result in zip(packs.members, joined, results[3:], strict=True):
        lengths = [prod(sources[kernel].shape) // prod(whole.shape[1:]) for kernel in pack]
        for kernel, part in zip(pack, tf.split(tf.ensure_shape(result, whole.shape), lengths), strict=True):
            shape = sources[kernel].shape
            targets[kernel] = part if part.shape == shape else tf.reshape(part, shape)
    return [tf.ensure_shape(x, old.shape) for x, old in zip(results[:3], state, strict=True)], targets


class _Packs(NamedTuple):
    """Which tensors travel together: the small ones of a dtype, since handing over each costs more than a copy.

    Attributes:
        members: indices of the tensors, by pack; a large one is alone in its own.
        rows: shape of what a pack is a stack of: where it is that of the tensors' rows, they need no new shape.
        offsets: bytes from the start of its pack, for each tensor.
        pack_of: index of its pack, for each tensor.
    """

    members: list[list[int]]
    rows: list[tuple[int, ...]]
    offsets: NDArray[np.int64]
    pack_of: NDArray[np.int64]

    @classmethod
    def of(cls, tensors: Sequence[Any]) -> "_Packs":
        dtypes, shapes = [dtype_name(tensor) for tensor in tensors], [tuple(tensor.shape) for tensor in tensors]
        rows = Counter((dtype, shape[1:]) for dtype, shape in zip(dtypes, shapes, strict=True))
        packs: dict[Any, list[int]] = {}
        for index, (dtype, shape) in enumerate(zip(dtypes, shapes, strict=True)):
            own = shape[1:] if rows[dtype, shape[1:]] >= _STACKED_FROM and prod(shape[1:]) else ()
            key = (dtype, own, None) if prod(shape) < _PACKED_BELOW else (dtype, shape[1:], index)
            packs.setdefault(key, []).append(index)
        offsets, pack_of = np.empty((2, len(tensors)), np.int64)
        for pack, indices in enumerate(packs.values()):
            own_bytes = [prod(shapes[index]) * np.dtype(dtypes[index]).itemsize for index in indices]
            offsets[indices], pack_of[indices] = np.cumsum([0, *own_bytes[:-1]]), pack
        return cls(list(packs.values()), [key[1] for key in packs], offsets, pack_of)

    def places(self, read: Sequence[np.ndarray], written: Sequence[np.ndarray]) -> NDArray[np.int64]:
        """Addresses of all sources and targets in these packs."""
        return addresses(read, written)[:, self.pack_of] + self.offsets


class _Room:
    """Memory that is used again once nobody refers to it; TensorFlow takes over results as they are."""

    def __init__(self) -> None:
        self._buffers: list[np.ndarray] = []
        self._lock = Lock()

    def take(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
        """An uninitialised array, aligned."""
        needed = prod(shape) * dtype.itemsize
        with self._lock:
            for index in range(len(self._buffers)):
                free = _references(self._buffers, index) == _UNUSED
                if free and self._buffers[index].nbytes == needed + _ALIGNMENT:
                    break
            else:
                index = len(self._buffers)
                self._buffers.append(np.empty(needed + _ALIGNMENT, np.uint8))
            start = -_address(self._buffers[index]) % _ALIGNMENT
            return self._buffers[index][start : start + needed].view(dtype).reshape(shape)


def _references(buffers: list[np.ndarray], index: int) -> int:
    return sys.getrefcount(buffers[index])


_UNUSED = _references([np.empty(0, np.uint8)], 0)


def addresses(sources: Sequence[np.ndarray], targets: Sequence[np.ndarray]) -> NDArray[np.int64]:
    """Where two rows of arrays lie, shape ``(2, n)``."""
    return np.array([[_address(array) for array in row] for row in (sources, targets)], np.int64)


def _address(array: np.ndarray) -> int:
    return int(array.__array_interface__["data"][0])
