"""How a function of the host takes part in a step of each backend, on the memory of the weights where it is."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from st3_keras.foreign import OnHost


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
    on_host: OnHost, frozen: bool, step: Any, state: Sequence[Any], raw: Sequence[Any]
) -> tuple[list[Any], list[Any]]:
    """New state and forward weights, within a graph, by Python; where :mod:`st3_keras.tf_step` is not available."""
    import tensorflow as tf

    def call(step: Any, *rest: np.ndarray) -> list[np.ndarray]:
        old, read = rest[:3], rest[3:]
        written = [np.empty_like(source) for source in read]
        return [*on_host(frozen, int(step), old, addresses(read, written)), *written]  # type: ignore[arg-type]

    old = [tf.convert_to_tensor(tensor) for tensor in (*state, *raw)]
    new = tf.numpy_function(call, [step, *old], [tensor.dtype for tensor in old])
    for result, like in zip(new, old, strict=True):
        result.set_shape(like.shape)
    return new[:3], new[3:]


def addresses(sources: Sequence[np.ndarray], targets: Sequence[np.ndarray]) -> NDArray[np.int64]:
    """Where two rows of arrays lie, shape ``(2, n)``."""
    return np.array([[_address(array) for array in row] for row in (sources, targets)], np.int64)


def _address(array: np.ndarray) -> int:
    return int(array.__array_interface__["data"][0])
