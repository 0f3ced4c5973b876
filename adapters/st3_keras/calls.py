"""How a function of the host takes part in a step of each backend, on the memory of the weights where it is."""

import sys
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
        written = [room.take(pack.size, pack.dtype) for pack in read]
        return [*on_host(frozen, int(step), old, packs.places(read, written)), *written]  # type: ignore[arg-type]

    flat = [tf.concat([tf.reshape(sources[kernel], [-1]) for kernel in pack], 0) for pack in packs.members]
    types = [tf.as_dtype(x.dtype) for x in (*state, *flat)]
    results = tf.numpy_function(call, [step, *state, *flat], types)
    targets: list[Any] = [None] * len(sources)
    for pack, own, result in zip(packs.members, packs.sizes, results[3:], strict=True):
        for kernel, part in zip(pack, tf.split(tf.ensure_shape(result, [sum(own)]), own), strict=True):
            targets[kernel] = tf.reshape(part, sources[kernel].shape)
    return [tf.ensure_shape(x, old.shape) for x, old in zip(results[:3], state, strict=True)], targets


class _Packs(NamedTuple):
    """Which tensors travel together: the small ones of a dtype, since handing over each costs more than a copy.

    Attributes:
        members: indices of the tensors, by pack; a large one is alone in its own.
        sizes: elements of each, by pack.
        offsets: bytes from the start of its pack, for each tensor.
        pack_of: index of its pack, for each tensor.
    """

    members: list[list[int]]
    sizes: list[list[int]]
    offsets: NDArray[np.int64]
    pack_of: NDArray[np.int64]

    @classmethod
    def of(cls, tensors: Sequence[Any]) -> "_Packs":
        sizes, small, large = [prod(tensor.shape) for tensor in tensors], dict[str, list[int]](), []
        for index, tensor in enumerate(tensors):
            if sizes[index] < _PACKED_BELOW:
                small.setdefault(dtype_name(tensor), []).append(index)
            else:
                large.append([index])
        members = [*small.values(), *large]
        offsets, pack_of = np.empty((2, len(tensors)), np.int64)
        for pack, indices in enumerate(members):
            own = [sizes[index] * np.dtype(dtype_name(tensors[index])).itemsize for index in indices]
            offsets[indices], pack_of[indices] = np.cumsum([0, *own[:-1]]), pack
        return cls(members, [[sizes[index] for index in indices] for indices in members], offsets, pack_of)

    def places(self, read: Sequence[np.ndarray], written: Sequence[np.ndarray]) -> NDArray[np.int64]:
        """Addresses of all sources and targets in these packs."""
        return addresses(read, written)[:, self.pack_of] + self.offsets

    def memory(self, arrays: Sequence[np.ndarray], room: "_Room") -> list[np.ndarray]:
        """A flat array for each pack: new memory, or the array itself where it is alone."""
        return [
            arrays[pack[0]].reshape(-1) if len(pack) == 1 else room.take(sum(sizes), arrays[pack[0]].dtype)
            for pack, sizes in zip(self.members, self.sizes, strict=True)
        ]

    def together(self, arrays: Sequence[np.ndarray], packed: Sequence[np.ndarray]) -> None:
        """Copy arrays into packs."""
        for pack, flat in zip(self.members, packed, strict=True):
            if len(pack) > 1:
                np.concatenate([arrays[index].reshape(-1) for index in pack], out=flat)

    def apart(self, packed: Sequence[np.ndarray], targets: Sequence[np.ndarray]) -> None:
        """Copy packs back to the arrays that they are made of."""
        for pack, sizes, flat in zip(self.members, self.sizes, packed, strict=True):
            if len(pack) > 1:
                for index, part in zip(pack, np.split(flat, np.cumsum(sizes[:-1])), strict=True):
                    np.copyto(targets[index], part.reshape(targets[index].shape))


class _Room:
    """Memory that is used again once nobody refers to it; TensorFlow takes over results as they are."""

    def __init__(self) -> None:
        self._buffers: list[np.ndarray] = []
        self._lock = Lock()

    def take(self, size: int, dtype: np.dtype[Any]) -> np.ndarray:
        """An uninitialised array, aligned."""
        needed = size * dtype.itemsize
        with self._lock:
            for index in range(len(self._buffers)):
                free = _references(self._buffers, index) == _UNUSED
                if free and self._buffers[index].nbytes == needed + _ALIGNMENT:
                    break
            else:
                index = len(self._buffers)
                self._buffers.append(np.empty(needed + _ALIGNMENT, np.uint8))
            start = -_address(self._buffers[index]) % _ALIGNMENT
            return self._buffers[index][start : start + needed].view(dtype)


def _references(buffers: list[np.ndarray], index: int) -> int:
    return sys.getrefcount(buffers[index])


_UNUSED = _references([np.empty(0, np.uint8)], 0)


def addresses(sources: Sequence[np.ndarray], targets: Sequence[np.ndarray]) -> NDArray[np.int64]:
    """Where two rows of arrays lie, shape ``(2, n)``."""
    return np.array([[_address(array) for array in row] for row in (sources, targets)], np.int64)


def _address(array: np.ndarray) -> int:
    return int(array.__array_interface__["data"][0])
