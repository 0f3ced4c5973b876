"""Reads ``.keras`` files without Keras: a zip of the model's configuration and its weights as HDF5."""

import io
import json
from collections.abc import Iterator, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, ZipFile

import ml_dtypes  # noqa: F401 # gives NumPy the name "bfloat16"
import numpy as np
from numpy.typing import NDArray

from st3_cli.stored import Stored, Unread
from st3core.reference import default_input_axis

try:
    import h5py
except ImportError as error:  # pragma: no cover
    raise ImportError("inspect: files of Keras need h5py; install it with: pip install 'st3core[cli]'") from error

Config = Mapping[str, Any]

_LAST, _LAST_TWO = (-1,), (-2, -1)
_KERNELS: dict[str, dict[str, Sequence[int]]] = {
    "Dense": {"kernel": _LAST},
    **{f"Conv{n}D": {"kernel": _LAST} for n in (1, 2, 3)},
    **{f"Conv{n}DTranspose": {"kernel": (-2,)} for n in (1, 2, 3)},
    **{f"DepthwiseConv{n}D": {"kernel": _LAST_TWO} for n in (1, 2)},
    **{f"SeparableConv{n}D": {"depthwise_kernel": _LAST_TWO, "pointwise_kernel": _LAST} for n in (1, 2)},
}
"""The kernels of each class, in the order in which it makes them, with the axes of the output channels."""


def read(path: Path) -> Iterator[Stored | Unread]:
    """Variables of the model, without those of its optimizer.

    Raises:
        ValueError: the file is damaged or another one.
    """
    try:
        with ZipFile(path) as archive:
            config, weights = json.loads(archive.read("config.json")), archive.read("model.weights.h5")
    except (BadZipFile, KeyError, ValueError) as error:
        raise ValueError(f"inspect: {path} must be a whole .keras file, got one that is not: {error}") from None
    layers = _layers(config)
    with h5py.File(io.BytesIO(weights)) as file:
        for group in _groups(file):
            yield from _variables(file, group, layers)


def _layers(config: object) -> dict[str, Config]:
    """Configuration of every layer by its name, wherever it is nested; none where two have one name."""
    found: dict[str, Config] = {}
    twice: set[str] = set()
    for layer in _walk(config):
        name = layer["config"]["name"]
        if name in found:
            twice.add(name)
        found[name] = layer
    return {name: layer for name, layer in found.items() if name not in twice}


def _walk(config: object) -> Iterator[Config]:
    if isinstance(config, Mapping):
        if "class_name" in config and "name" in (config.get("config") or {}):
            yield config
        config = list(config.values())
    if isinstance(config, list):
        for part in config:
            yield from _walk(part)


def _groups(file: h5py.Group) -> list[str]:
    """Paths of all groups of variables that are the model's."""
    found: list[str] = []
    file.visit(lambda path: found.append(path) if path.split("/")[-1] == "vars" else None)
    return [path for path in found if path.split("/")[0] != "optimizer"]


def _variables(file: h5py.File, group: str, layers: Mapping[str, Config]) -> Iterator[Stored | Unread]:
    """The variables of one layer, in the order in which it made them."""
    layer = layers.get(file[group].attrs.get("name", ""), {})
    kernels = list(_KERNELS.get(layer.get("class_name", ""), {}))
    for index in sorted(file[group], key=lambda own: (not own.isdigit(), own.zfill(9))):  # a layer may name its own
        own = kernels[int(index)] if index.isdigit() and int(index) < len(kernels) else index
        name = "/".join([*_names(file, group), own])
        yield _entry(name, own, file[group][index], layer)


def _names(file: h5py.File, group: str) -> list[str]:
    """Names of the layers that the group is in; the file's own where it has none."""
    parts = group.split("/")[:-1]
    names = []
    for end, part in enumerate(parts, 1):
        own = file.get("/".join([*parts[:end], "vars"]))
        if own is not None:
            names.append(own.attrs.get("name", part))
        elif part != "layers":
            names.append(part)
    return names


def _entry(name: str, own: str, stored: h5py.Dataset, layer: Config) -> Stored | Unread:
    values: NDArray[Any] = stored[()]
    if "dtype" in stored.attrs:  # HDF5 has no bfloat16
        values = np.asarray(values).view(stored.attrs["dtype"])
    if values.dtype.kind != "f" and values.dtype.name != "bfloat16":
        return Unread(name, values.dtype.name)
    kind = layer.get("class_name", "")
    axes = [values.ndim + axis for axis in _KERNELS.get(kind, {}).get(own, _LAST)]
    is_known = own in _KERNELS.get(kind, {}) or values.ndim == 2
    along = default_input_axis(values.ndim, tuple(axes)) if is_known and values.ndim > 1 else None
    if kind.endswith("Transpose") and own == "kernel":
        along = values.ndim - 1
    places = _places(layer) if own in _KERNELS.get(kind, {}) else None
    return Stored(name, values != 0, values.itemsize, along, None if places is None else places * values.size)


def _places(layer: Config) -> int | None:
    """How often each weight takes part in one call with one input, if the shapes of the configuration tell."""
    shape = (layer.get("build_config") or {}).get("input_shape")
    if not isinstance(shape, list) or not all(isinstance(side, int) for side in shape[1:]):
        return None
    config = layer["config"]
    if layer["class_name"] == "Dense":
        return prod(shape[1:-1])
    sides = shape[2:] if config["data_format"] == "channels_first" else shape[1:-1]
    if layer["class_name"].endswith("Transpose"):
        return prod(sides)
    windows = zip(sides, config["kernel_size"], config["strides"], config["dilation_rate"], strict=True)
    return prod(_output_side(*window, config["padding"]) for window in windows)


def _output_side(side: int, kernel: int, stride: int, dilation: int, padding: str) -> int:
    covered = dilation * (kernel - 1) if padding == "valid" else 0
    return -((covered - side) // stride)
