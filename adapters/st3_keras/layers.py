"""Which variables of a model are sparsified, and where their output channels are."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import keras
from keras import layers

from st3_keras.backend import DTYPES, dtype_name
from st3core.reference import default_input_axis

Rule = str | type[keras.layers.Layer] | Callable[[str, keras.layers.Layer], bool]
"""A layer's or variable's path or glob pattern, a layer type, or ``predicate(path, layer)``."""


@dataclass(frozen=True)
class Kernel:
    """One variable to sparsify.

    Args:
        name: its path in the model.
        variable: the model's own variable.
        channel_axes: axes that number the output channels, sorted and not negative.
        input_axis: axis that groups of N:M weights run along.
        layers: every layer that holds it.
    """

    name: str
    variable: Any
    channel_axes: tuple[int, ...]
    input_axis: int
    layers: list[keras.layers.Layer] = field(default_factory=list, compare=False)


@dataclass(frozen=True)
class _Candidate:
    """A variable that could be sparsified; ``reason`` says why it is not, unless it is asked for."""

    name: str
    variable: Any
    channel_axes: tuple[int, ...]
    layer: keras.layers.Layer
    reason: str | None


# The names that Keras gives to the variables, with the axes of the output channels from the end.
_LAST, _SECOND_TO_LAST, _LAST_TWO = (-1,), (-2,), (-2, -1)
_KINDS: list[tuple[tuple[type, ...], dict[str, tuple[int, ...]]]] = [
    ((layers.SeparableConv1D, layers.SeparableConv2D), {"depthwise_kernel": _LAST_TWO, "pointwise_kernel": _LAST}),
    ((layers.DepthwiseConv1D, layers.DepthwiseConv2D), {"kernel": _LAST_TWO, "depthwise_kernel": _LAST_TWO}),
    ((layers.Conv1DTranspose, layers.Conv2DTranspose, layers.Conv3DTranspose), {"kernel": _SECOND_TO_LAST}),
    ((layers.Dense, layers.Conv1D, layers.Conv2D, layers.Conv3D), {"kernel": _LAST}),
    ((layers.SimpleRNNCell, layers.LSTMCell, layers.GRUCell), {"kernel": _LAST, "recurrent_kernel": _LAST}),
]


def channel_axes(layer: keras.layers.Layer, variable: Any) -> tuple[int, ...] | None:
    """Axes of ``variable`` that number output channels of ``layer``; None where it is not a known kernel.

    A depthwise kernel ``(*kernel, in, multiplier)`` makes an output channel of every pair of the last two axes;
    a transposed convolution stores ``(*kernel, out, in)``; in an ``EinsumDense`` they are the axes that the
    equation carries into the output.
    """
    rank = len(variable.shape)
    if isinstance(layer, layers.EinsumDense):
        return _einsum_axes(layer, rank) if variable.name == "kernel" else None
    if type(layer).__name__ == "ConvLSTMCell" and variable.name in ("kernel", "recurrent_kernel"):
        return (rank - 1,)
    for types, names in _KINDS:
        if isinstance(layer, types):
            axes = names.get(variable.name)
            return None if axes is None else tuple(rank + axis for axis in axes)
    return None


def input_axis(layer: keras.layers.Layer, variable: Any, channels: tuple[int, ...]) -> int:
    """Axis of the input channels: the last of a transposed convolution, else the nearest ahead of the output's."""
    rank = len(variable.shape)
    if isinstance(layer, (layers.Conv1DTranspose, layers.Conv2DTranspose, layers.Conv3DTranspose)):
        return rank - 1
    return default_input_axis(rank, channels)


def _einsum_axes(layer: keras.layers.Layer, rank: int) -> tuple[int, ...]:
    inputs, _, output = layer.equation.replace(" ", "").partition("->")
    letters = inputs.split(",")[1]
    return tuple(axis for axis, letter in enumerate(letters[:rank]) if letter in output)


def find_kernels(
    model: keras.Model, include: Sequence[Rule] | Rule | None, exclude: Sequence[Rule] | Rule | None
) -> tuple[list[Kernel], dict[str, str]]:
    """Kernels to sparsify, and why each other trainable variable of two dimensions or more is not.

    Raises:
        TypeError: a rule is of an unknown kind, or a chosen kernel of an unknown dtype.
        ValueError: a path or pattern matches nothing, a variable is chosen in one layer and not in another that
            shares it, one is chosen that the layer itself writes, or nothing is left.
    """
    candidates = list(_candidates(model))
    included, excluded = _as_rules(include, "include"), _as_rules(exclude, "exclude")
    for argument, rules in (("include", included), ("exclude", excluded)):
        for rule in rules:
            if isinstance(rule, str) and not any(_matches(rule, c) for c in candidates):
                known = ", ".join(c.name for c in candidates if c.reason is None) or "none"
                raise ValueError(
                    f"Sparsifier: {argument} has {rule!r}, which matches no kernel of the model ({known}); "
                    "what does not train does not count"
                )
    kernels: dict[int, Kernel] = {}
    skipped: dict[str, str] = {}
    decided: dict[int, tuple[str, bool]] = {}
    for candidate in candidates:
        reason = _reason(candidate, include, included, excluded)
        key = id(candidate.variable)
        first, chosen = decided.setdefault(key, (candidate.name, reason is None))
        if chosen != (reason is None):
            raise ValueError(
                f"Sparsifier: include and exclude must treat all layers that share {first} alike, because it is one "
                f"variable, got include={include!r}, exclude={exclude!r}"
            )
        if reason is not None:
            skipped[first] = reason
            continue
        _check_dtype(candidate)
        axes = candidate.channel_axes
        along = input_axis(candidate.layer, candidate.variable, axes)
        kernel = kernels.setdefault(key, Kernel(first, candidate.variable, axes, along))
        kernel.layers.append(candidate.layer)
        if isinstance(candidate.layer, layers.SpectralNormalization):
            raise ValueError(
                f"Sparsifier: {first} must not be included, because SpectralNormalization ({candidate.layer.name!r}) "
                "writes the kernel in its forward pass, where the thresholded one must be; leave it dense"
            )
    if not kernels:
        raise ValueError(
            "Sparsifier: model has no linear or convolution kernel that include and exclude leave, "
            f"got {type(model).__name__}, include={include!r}, exclude={exclude!r}"
        )
    return list(kernels.values()), skipped


def _candidates(model: keras.Model) -> Iterator[_Candidate]:
    """Every trainable variable of two dimensions or more, each layer that holds it, under a name of its own."""
    trained = {id(v) for v in model.trainable_variables}
    held = [(layer, v) for layer in model._flatten_layers() for v in _own_variables(layer) if id(v) in trained]
    held = [(layer, v) for layer, v in held if len(v.shape) > 1]
    reasons = _reasons(held)
    names: dict[int, str] = {}
    for layer, variable in held:
        if id(variable) not in names:
            names[id(variable)] = _unique(variable.path, set(names.values()))
        if variable.name == "bias":
            continue  # those of attention and GRU have two dimensions
        axes = channel_axes(layer, variable) or (len(variable.shape) - 1,)
        yield _Candidate(names[id(variable)], variable, axes, layer, reasons.get(id(variable)))


def _reasons(held: Sequence[tuple[keras.layers.Layer, Any]]) -> dict[int, str]:
    """Why variables are not sparsified unless that is asked for: one layer that holds it decides for all of them."""
    reasons = {}
    for layer, variable in held:
        if isinstance(layer, layers.Embedding):
            reasons[id(variable)] = "embedding: sparsified only if include asks for it"
        elif channel_axes(layer, variable) is None:
            reason = f"not a kernel of a known layer ({type(layer).__name__}): sparsified only if include asks for it"
            reasons.setdefault(id(variable), reason)
    return reasons


def _own_variables(layer: keras.layers.Layer) -> list[Any]:
    return list(layer._trainable_variables)


def _unique(name: str, taken: set[str]) -> str:
    number, unique = 1, name
    while unique in taken:
        number, unique = number + 1, f"{name}#{number + 1}"
    return unique


def _reason(candidate: _Candidate, include: Any, included: list[Rule], excluded: list[Rule]) -> str | None:
    if any(_matches(rule, candidate) for rule in excluded):
        return "excluded"
    if include is None:
        return candidate.reason
    if not any(_matches(rule, candidate) for rule in included):
        return "not included"
    return None


def _check_dtype(candidate: _Candidate) -> None:
    dtype = dtype_name(candidate.variable)
    if dtype not in DTYPES:
        raise TypeError(f"Sparsifier: {candidate.name} must be of one of {', '.join(DTYPES)}, got {dtype}; exclude it")


def _as_rules(rules: Sequence[Rule] | Rule | None, argument: str) -> list[Rule]:
    if rules is None:
        return []
    listed: list[Any] = list(rules) if isinstance(rules, (list, tuple, set)) else [rules]
    for rule in listed:
        if isinstance(rule, keras.layers.Layer) or not (isinstance(rule, str) or callable(rule)):
            raise TypeError(
                f"Sparsifier: {argument} takes paths, glob patterns, layer types and predicates, got {rule!r}"
            )
    return listed


def _matches(rule: Rule, candidate: _Candidate) -> bool:
    if isinstance(rule, str):
        return fnmatchcase(candidate.name, rule) or fnmatchcase(candidate.name.rpartition("/")[0], rule)
    if isinstance(rule, type):
        return isinstance(candidate.layer, rule)
    return bool(rule(candidate.name, candidate.layer))
