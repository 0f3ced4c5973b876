"""Checks of arguments that several public functions share, and their messages."""

import math
from collections.abc import Sequence
from numbers import Real
from typing import Any

import numpy as np

from st3core.memory import MEMORY_FORMATS
from st3core.reference import default_input_axis


def as_number(value: Any, function: str, argument: str) -> float:
    """``value`` as a float, or a TypeError."""
    if isinstance(value, np.ndarray) and value.ndim == 0:
        value = value[()]
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (Real, np.floating)):
        raise TypeError(f"{function}: {argument} must be a real number, got {value!r}")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{function}: {argument} must be a real number of ordinary size, got {value!r}") from None


def as_sparsity(value: Any, function: str, argument: str = "sparsity") -> float:
    """``value`` as a share of zeros in [0, 1)."""
    number = as_number(value, function, argument)
    if not 0 <= number < 1:
        raise ValueError(f"{function}: {argument} must be in [0, 1), got {number}")
    return number


def as_threshold(value: Any, function: str) -> float:
    """``value`` as a finite threshold of 0 or more."""
    number = as_number(value, function, "threshold")
    if not (math.isfinite(number) and number >= 0):
        raise ValueError(f"{function}: threshold must be finite and 0 or more, got {number}")
    return number


def as_weights(value: Any, function: str, argument: str) -> np.ndarray:
    """``value`` as a NumPy array of a supported dtype; NumPy's scalars are 0-d arrays."""
    if isinstance(value, np.generic):
        value = np.asarray(value)
    if not isinstance(value, np.ndarray) or isinstance(value, np.ma.MaskedArray):
        kind = f"{type(value).__module__}.{type(value).__qualname__}"
        raise TypeError(f"{function}: {argument} must be a NumPy array, got {kind}; convert it first")
    if value.dtype.newbyteorder("=").name not in MEMORY_FORMATS:
        supported = ", ".join(MEMORY_FORMATS)
        raise TypeError(
            f"{function}: {argument} must be of one of the dtypes {supported}, got {value.dtype}; "
            f"use {argument}.astype('float32')"
        )
    return value


def as_channel_axes(value: int | Sequence[int], ndim: int, function: str) -> tuple[int, ...]:
    """Sorted, non-negative axes; a 0-d array is one channel and takes axis 0 or -1."""
    given = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    axes = set()
    for axis in given:
        if isinstance(axis, (bool, np.bool_)) or not isinstance(axis, (int, np.integer)):
            raise TypeError(f"{function}: channel_axis must be an integer or a tuple of them, got {value!r}")
        if not -max(ndim, 1) <= axis < max(ndim, 1):
            raise ValueError(
                f"{function}: channel_axis must be in [{-max(ndim, 1)}, {max(ndim, 1)}) "
                f"for a weight of {ndim} dimensions, got {value!r}"
            )
        axes.add(int(axis) % max(ndim, 1))
    if len(axes) != len(given):
        raise ValueError(f"{function}: channel_axis must not repeat an axis, got {value!r}")
    return tuple(sorted(axes)) if ndim else ()


def as_input_axis(value: int | None, channel_axes: tuple[int, ...], ndim: int, function: str) -> int:
    """A non-negative axis for groups to run along; None is the one that goes with the channel axes."""
    if value is None:
        return default_input_axis(ndim, channel_axes)
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{function}: input_axis must be an integer or None, got {value!r}")
    if not -max(ndim, 1) <= value < max(ndim, 1):
        raise ValueError(
            f"{function}: input_axis must be in [{-max(ndim, 1)}, {max(ndim, 1)}) "
            f"for a weight of {ndim} dimensions, got {value!r}"
        )
    return int(value) % max(ndim, 1)


def as_scale(value: Any, rescale: str, function: str) -> float | None:
    """``value`` as a finite factor above 0, or None."""
    if value is None:
        return None
    if rescale != "least_squares":
        raise ValueError(f"{function}: scale must be None for a method with rescale {rescale!r}, got {value!r}")
    number = as_number(value, function, "scale")
    if not (math.isfinite(number) and number > 0):
        raise ValueError(f"{function}: scale must be finite and above 0, got {number}")
    return number


def describe_non_finite(array: np.ndarray, function: str, argument: str) -> str:
    """Message that names the first NaN or infinity of ``array`` and where it stands."""
    index = np.unravel_index(int(np.argmin(np.isfinite(array))), array.shape)
    place = f" at index {tuple(int(i) for i in index)}" if array.ndim else ""
    return (
        f"{function}: {argument} must be finite, got {float(array[index])}{place}; "
        "find out where training diverged, or exclude this tensor"
    )
