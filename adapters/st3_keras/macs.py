"""Multiply-adds of a model's kernels for one call."""

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import keras
from keras import layers

from st3_keras.layers import Kernel

_TRANSPOSED = (layers.Conv1DTranspose, layers.Conv2DTranspose, layers.Conv3DTranspose)


def multiply_adds(model: keras.Model, kernels: Sequence[Kernel], inputs: Sequence[Any]) -> dict[str, int]:
    """Multiply-adds of every kernel whose layers say how often a weight takes part; others are left out.

    Args:
        model: is called once with ``inputs``, in inference mode.
        kernels: to be counted.
        inputs: of the model, with the batch axis.
    """
    uses: dict[int, int] = {}
    watched = {id(layer): layer for kernel in kernels for layer in kernel.layers}
    for layer in model._flatten_layers():
        if isinstance(layer, layers.RNN) and id(layer.cell) in watched:
            watched[id(layer)] = layer
    originals = {key: layer.call for key, layer in watched.items()}
    for key, layer in watched.items():
        object.__setattr__(layer, "call", _counting(layer, originals[key], uses))
    try:
        model(*inputs, training=False)
    finally:
        for layer in watched.values():
            object.__delattr__(layer, "call")
    return {k.name: n for k in kernels if (n := _of_kernel(k, uses)) is not None}


def _of_kernel(kernel: Kernel, uses: dict[int, int]) -> int | None:
    counts = [uses.get(id(layer)) for layer in kernel.layers]
    places = [count for count in counts if count is not None]
    return None if len(places) < len(counts) else sum(places) * prod(kernel.variable.shape)


def _counting(layer: Any, call: Callable[..., Any], uses: dict[int, int]) -> Callable[..., Any]:
    def counted(*args: Any, **kwargs: Any) -> Any:
        outputs = call(*args, **kwargs)
        if isinstance(layer, layers.RNN):
            shape = args[0].shape
            uses[id(layer.cell)] = uses.get(id(layer.cell), 0) + shape[0] * shape[1]
        elif not isinstance(layer, (layers.SimpleRNNCell, layers.LSTMCell, layers.GRUCell)):
            uses[id(layer)] = uses.get(id(layer), 0) + _places(layer, args[0], outputs)
        return outputs

    return counted


def _places(layer: Any, inputs: Any, outputs: Any) -> int:
    """How often each weight of the layer takes part in a call."""
    if isinstance(layer, _TRANSPOSED):
        channel = 1 if layer.data_format == "channels_first" else len(inputs.shape) - 1
        return prod(n for axis, n in enumerate(inputs.shape) if axis != channel)
    if isinstance(layer, layers.EinsumDense):
        sources, _, target = layer.equation.replace(" ", "").partition("->")
        letters = [letter for letter in sources.split(",")[1] if letter in target]
        shape = dict(zip(sources.split(",")[1], layer._kernel.shape, strict=True))
        return int(prod(outputs.shape)) // int(prod(shape[letter] for letter in letters))
    channel = 1 if getattr(layer, "data_format", None) == "channels_first" else len(outputs.shape) - 1
    return prod(n for axis, n in enumerate(outputs.shape) if axis != channel)
