"""Which leaves of a pytree are sparsified, what they are called, and where their output channels are."""

from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec

from st3core._validation import as_channel_axes
from st3core.memory import MEMORY_FORMATS
from st3core.reference import default_input_axis

Rule = str | Callable[[str, Any], bool]
"""Name of a leaf or of what holds it, glob pattern, or ``predicate(name, leaf) -> bool``."""

Axes = int | tuple[int, ...]
Specs = Mapping[str, PartitionSpec]
MeshAxes = tuple[tuple[str, ...], ...]
"""For each axis of an array the mesh axes that it is spread over, within ``shard_map``."""

Value = TypeVar("Value")


class Layout(NamedTuple):
    """What the axes of an array are."""

    channel_axes: tuple[int, ...]
    """Those that number the output channels."""
    input_axis: int
    """The one that groups run along."""
    mesh_axes: MeshAxes
    """How each is spread over devices, within ``shard_map``."""


def whole_layout(ndim: int, channel_axes: tuple[int, ...], input_axis: int | None = None) -> Layout:
    """Layout of an array that is not spread; groups run along the axis that goes with its channels (equation 3e)."""
    along = default_input_axis(ndim, channel_axes) if input_axis is None else input_axis
    return Layout(channel_axes, along, ((),) * ndim)


class Leaf(NamedTuple):
    """One sparsified leaf."""

    name: str
    """Its path, with ``/`` between the parts."""
    position: int
    """Its number among all leaves."""
    array: Any
    layout: Layout

    @property
    def cut_length(self) -> int:
        """Length of this shard along the input axis, if that is spread; otherwise 0."""
        along = self.layout.input_axis
        return int(self.array.shape[along]) if any(self.layout.mesh_axes[along : along + 1]) else 0


_NEVER = {"bias", "scale"}
"""Parts of the paths of what is no kernel, whatever its dimensions."""


class Selection(NamedTuple):
    """The sparsified leaves, and why each other one of two dimensions or more stays dense."""

    leaves: tuple[Leaf, ...]
    skipped: dict[str, str]


def named_leaves(params: Any) -> list[tuple[str, Any]]:
    """Every leaf with its path; parts of the path have ``/`` between them."""
    found = jax.tree_util.tree_flatten_with_path(params)[0]
    return [(jax.tree_util.keystr(path, simple=True, separator="/"), leaf) for path, leaf in found]


def select(
    params: Any,
    include: tuple[Rule, ...] | None,
    exclude: tuple[Rule, ...],
    channel_axis: Axes | Mapping[str, Axes],
    sharded: Specs,
) -> Selection:
    """The leaves to sparsify.

    Args:
        params: pytree of arrays; leaves that are none are left alone.
        include: rules for what to sparsify; None for arrays of two dimensions or more that are no embeddings.
        exclude: rules for what stays dense.
        channel_axis: for all leaves, or by name or pattern; the last match counts, and without one the last axis.
        sharded: how each leaf is spread, likewise; without a match every device has all of it.

    Raises:
        TypeError: a leaf that a rule names is no floating-point array.
        ValueError: a rule matches no leaf, or no leaf is left.
    """
    named = named_leaves(params)
    patterns = [*(include or ()), *exclude, *sharded, *(channel_axis if isinstance(channel_axis, Mapping) else ())]
    _check_rules([rule for rule in patterns if isinstance(rule, str)], [name for name, _ in named])
    leaves, skipped = [], {}
    for position, (name, leaf) in enumerate(named):
        reason = _reason_to_skip(name, leaf, include, exclude)
        if reason is None:
            leaves.append(_leaf(name, position, leaf, channel_axis, sharded))
        elif np.ndim(leaf) >= 2:
            skipped[name] = reason
    if not leaves:
        names = ", ".join(name for name, _ in named) or "no leaf at all"
        raise ValueError(f"Sparsifier: params must have a leaf to sparsify, got none of {names}")
    return Selection(tuple(leaves), skipped)


def matches(rule: Rule, name: str, leaf: Any) -> bool:
    """Whether a rule means this leaf."""
    if callable(rule):
        return bool(rule(name, leaf))
    return fnmatchcase(name, rule) or fnmatchcase(name.rpartition("/")[0], rule)


def _reason_to_skip(name: str, leaf: Any, include: tuple[Rule, ...] | None, exclude: tuple[Rule, ...]) -> str | None:
    is_weight = getattr(getattr(leaf, "dtype", None), "name", None) in MEMORY_FORMATS  # keys have dtypes of their own
    if any(matches(rule, name, leaf) for rule in exclude):
        return "excluded"
    if include is not None:
        if not any(matches(rule, name, leaf) for rule in include):
            return "not included"
        if not is_weight:
            raise TypeError(
                f"Sparsifier: include must name leaves of one of the dtypes {', '.join(MEMORY_FORMATS)}, "
                f"got {name!r} of {getattr(leaf, 'dtype', type(leaf).__name__)}"
            )
        return None
    if not is_weight:
        return "no floating-point array"
    if np.ndim(leaf) < 2:
        return "fewer than two dimensions"
    if _NEVER & set(name.split("/")):
        return "bias or scale"  # of attention, of a convolution, or of layers stacked for a scan
    return "embedding" if "embed" in name.lower() else None


def _leaf(name: str, position: int, array: Any, channel_axis: Axes | Mapping[str, Axes], sharded: Specs) -> Leaf:
    axes = last_match(channel_axis, name, -1) if isinstance(channel_axis, Mapping) else channel_axis
    spec = tuple(last_match(sharded, name, PartitionSpec()))
    spread = [(part,) if isinstance(part, str) else tuple(part or ()) for part in spec]
    mesh_axes = (*spread, *[()] * (array.ndim - len(spread)))
    layout = whole_layout(array.ndim, as_channel_axes(axes, array.ndim, "Sparsifier"))
    return Leaf(name, position, array, layout._replace(mesh_axes=mesh_axes))


def last_match(rules: Mapping[str, Value], name: str, otherwise: Value) -> Value:
    """Value of the last pattern that matches."""
    found = [value for pattern, value in rules.items() if matches(pattern, name, None)]
    return found[-1] if found else otherwise


def _check_rules(patterns: Sequence[str], names: Sequence[str]) -> None:
    for pattern in patterns:
        if not any(matches(pattern, name, None) for name in names):
            raise ValueError(
                f"Sparsifier: rules must match a leaf of params, got {pattern!r}; there are {', '.join(names)}"
            )


def over_shards(count: jax.Array, leaf: Leaf) -> jax.Array:
    """Sum of a count over the devices that a leaf is spread over, within ``shard_map``."""
    names = tuple(name for own in leaf.layout.mesh_axes for name in own)
    return lax.psum(count, names) if names else count


def replaced(params: Any, leaves: Sequence[Leaf], arrays: Sequence[Any]) -> Any:
    """``params`` with other arrays in place of the sparsified leaves."""
    values, structure = jax.tree.flatten(params)
    for leaf, array in zip(leaves, arrays, strict=True):
        values[leaf.position] = array
    return jax.tree.unflatten(structure, values)
