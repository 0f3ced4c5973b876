"""Properties of the threshold search (equations 1 and 2)."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np
from hypothesis import strategies as st

from st3core import reference
from st3core.conformance.backend import Backend, as_dtype
from st3core.conformance.cases import Array, Case, Operation, Search, Sequence, bits_dtype, shown
from st3core.conformance.properties import Property, conformance_property
from st3core.conformance.strategies import (
    any_bits,
    arrays,
    distinct,
    knows,
    methods,
    normal,
    searches,
    ties,
    with_scope,
    with_score,
)
from st3core.conformance.violation import require, require_kind, require_same_bits

FLOAT64 = np.dtype(np.float64)

_by_magnitude = with_score("magnitude")
_by_sigma = with_score("magnitude_per_sigma")


def _rank(case: Search) -> int:
    count = sum(weight.values.size for weight in case.weights)
    return int((count - 1) * case.sparsity)


def _require_zeros(case: Search, found: np.ndarray, count: int) -> None:
    require_kind(case, found, FLOAT64, (len(case.weights),))
    zeros = case.zeros(found)
    require(zeros == count, case, f"{zeros} zeros by thresholds {found.tolist()}", f"{count} zeros")


def _unit(magnitude: float, dtype: np.dtype[Any]) -> float:
    """Distance of the next number of the dtype."""
    rounded = dtype.type(magnitude)
    return float(np.nextafter(rounded, dtype.type(np.inf))) - float(rounded)


@conformance_property("2c", searches)
def thresholds_equal_the_reference(backend: Backend, case: Search) -> None:
    """Thresholds are those of the reference, to the bit: float64, one a tensor."""
    require_same_bits(case, case.call(backend).result, case.expected())


@conformance_property("2a", lambda backend: searches(backend, kinds=(distinct,), method=_by_magnitude, mixed=False))
def thresholds_zero_the_rank(backend: Backend, case: Search) -> None:
    """All magnitudes up to the one of rank floor((n - 1) s) become zero, and no other."""
    ordered = case.magnitudes()
    _require_zeros(case, case.call(backend).result, int((ordered <= ordered[_rank(case)]).sum()))


@conformance_property("2b", lambda backend: searches(backend, kinds=(ties,), method=_by_magnitude))
def thresholds_zero_ties_together(backend: Backend, case: Search) -> None:
    """Weights that tie with the one of the rank become zero all together."""
    ordered = case.magnitudes()
    _require_zeros(case, case.call(backend).result, int((ordered <= ordered[_rank(case)]).sum()))


@st.composite
def _neighbours(draw: st.DrawFn, backend: Backend) -> Search:
    """Consecutive numbers of one dtype, and a sparsity that rounds up to the next of them."""
    dtype = as_dtype(draw(st.sampled_from(sorted(backend.dtypes, key=lambda name: name != "float32"))))
    count, start = draw(st.integers(2, 8)), draw(st.integers(0, 1000))
    one = int(np.ones((), dtype).view(bits_dtype(dtype)))
    values = (one + start + np.arange(count)).astype(bits_dtype(dtype)).view(dtype)
    rank, fraction = draw(st.integers(0, count - 2)), draw(st.sampled_from([0.999, 0.75, 0.5, 0.25]))
    return Search((Array(values),), (rank + fraction) / (count - 1), draw(_by_magnitude))


@conformance_property("2c", _neighbours)
def thresholds_separate_neighbours(backend: Backend, case: Search) -> None:
    """Rounded to the dtype of the weights a threshold still separates two neighbouring numbers."""
    _require_zeros(case, case.call(backend).result, _rank(case) + 1)


@conformance_property("2b", lambda backend: searches(backend, kinds=(normal, ties), method=_by_magnitude, mixed=False))
def thresholds_interpolate(backend: Backend, case: Search) -> None:
    """A threshold is NumPy's quantile of all magnitudes, up to two units in the last place of the weights."""
    found, ordered, rank = case.call(backend).result, case.magnitudes(), _rank(case)
    quantile = float(np.quantile(ordered, case.sparsity))
    unit = _unit(float(ordered[min(rank + 1, ordered.size - 1)]), case.weights[0].values.dtype)
    near = np.abs(found - quantile) <= 2 * unit + 1e-15 * quantile
    require(near.all(), case, found.tolist(), f"{quantile} within {2 * unit}")


def _forty_tensors(backend: Backend) -> Iterable[Case]:
    """Magnitudes that rise from tensor to tensor."""
    dtype = backend.dtypes[0]
    yield Search(tuple(Array.made(f"np.array([{n}, {n + 0.5}], {dtype!r})") for n in range(1, 41)), 0.9)


@conformance_property("2b", lambda backend: searches(backend, method=_by_magnitude, mixed=False), fixed=_forty_tensors)
def thresholds_are_global(backend: Backend, case: Search) -> None:
    """Many tensors have the threshold that one tensor of all their weights has."""
    together = np.concatenate([weight.values.ravel() for weight in case.weights])
    whole = replace(case, weights=(Array(together),)).expected()
    require_same_bits(case, case.call(backend).result, np.repeat(whole, len(case.weights)))


@conformance_property("2", lambda backend: searches(backend, method=with_scope("layer")), needs="layer")
def thresholds_of_layers_are_their_own(backend: Backend, case: Search) -> None:
    """A threshold for each layer is the global one of that tensor alone, and 0 if it has no weights."""
    plain = replace(case, method=replace(case.chosen, scope="global"))
    alone = [replace(plain, weights=(w,)).expected()[0] if w.values.size else 0.0 for w in case.weights]
    require_same_bits(case, case.call(backend).result, np.array(alone))


@conformance_property("3e", lambda backend: searches(backend, method=with_scope("n:m")), needs="n:m")
def thresholds_of_groups_are_their_largest(backend: Backend, case: Search) -> None:
    """Where groups have thresholds, a tensor has the largest magnitude that they make zero, or 0."""
    expected = []
    for weight in case.weights:
        lines = np.moveaxis(np.atleast_1d(np.abs(weight.values)), 1 if weight.values.ndim > 1 else 0, -1)
        zeroed = _smallest_of_groups(lines.astype(np.float64), *case.chosen.group)
        expected.append(max(zeroed, default=0.0))
    require_same_bits(case, case.call(backend).result, np.array(expected))


def _smallest_of_groups(lines: np.ndarray, kept: int, size: int) -> list[float]:
    """What a group has beside its ``kept`` largest, for all groups of the lines along the last axis."""
    parts = [lines[..., start : start + size] for start in range(0, lines.shape[-1], size)]
    return [m for part in parts for row in part.reshape(-1, part.shape[-1]).tolist() for m in sorted(row)[:-kept]]


@conformance_property("2b", searches)
def thresholds_ignore_order(backend: Backend, case: Search) -> None:
    """The order of the tensors changes nothing but the order of the thresholds."""
    backwards = replace(case, weights=case.weights[::-1])
    require_same_bits(backwards, backwards.call(backend).result, case.call(backend).result[::-1])


def _large_sigmas(backend: Backend) -> Iterable[Case]:
    """Dimensions of a large network."""
    dtype = backend.dtypes[0]
    large = f"(np.arange(1, 1 + 64 * 576) % 2039 / 2048).astype({dtype!r}).reshape(64, 64, 3, 3)"
    yield Search((Array.made(large), Array.made(f"np.array([[0.5, 0.25, 0.75]], {dtype!r})")), 0.9, "st3_sigma")


@conformance_property(
    "1b", lambda backend: searches(backend, kinds=(normal, distinct), method=_by_sigma), fixed=_large_sigmas
)
def thresholds_divide_by_sigma(backend: Backend, case: Search) -> None:
    """Magnitudes are measured in sigma, the inverse root of the *sum* of a tensor's dimensions."""
    found, ordered = case.call(backend).result, case.magnitudes()
    _require_zeros(case, found, int((ordered <= ordered[_rank(case)]).sum()))
    quantile = float(np.quantile(ordered, case.sparsity))
    for weight, own in zip(case.weights, found.tolist(), strict=True):
        expected = quantile / np.sqrt(sum(weight.values.shape) or 1)
        near = abs(own - expected) <= 4 * _unit(expected, weight.values.dtype) + 1e-15 * expected
        require(near, case, found.tolist(), f"{expected} for a tensor of shape {weight.values.shape}")


@conformance_property("2a", lambda backend: searches(backend).map(lambda case: replace(case, sparsity=0.0)))
def thresholds_of_zero_sparsity(backend: Backend, case: Search) -> None:
    """Without sparsity there is no threshold: all are 0."""
    require_same_bits(case, case.call(backend).result, np.zeros(len(case.weights)))


def _many(backend: Backend) -> Iterable[Case]:
    """More weights than small integers count, and more than float32 does."""
    dtype = min(backend.dtypes, key=["float32", "float64", "float16", "bfloat16"].index)
    yield Search((Array.made(f"np.repeat(np.array([0.25, 0.5, 1.0], {dtype!r}), 30_000)"),), 0.5)
    if dtype in ("float32", "float64"):
        rising = "(np.float32(0.5).view(np.uint32) + np.arange(2**24 + 3, dtype=np.uint32)).view(np.float32)"
        # In float32 the rank would be another one.
        yield Search((Array.made(f"{rising}.astype({dtype!r})"),), 1 - 1.5 / (2**24 + 2))


@conformance_property("2a", None, fixed=_many)
def thresholds_count_many_weights(backend: Backend, case: Search) -> None:
    """Counts and ranks are exact beyond what 16-bit integers and float32 can count."""
    values = case.weights[0].values  # in order
    rank, fraction = reference.position(values.size, case.sparsity)
    e1, e2 = float(values[rank]), float(values[rank + 1])
    expected = reference.tensor_threshold(values.dtype, 1.0, e1, e2, e1 + fraction * (e2 - e1))
    require_same_bits(case, case.call(backend).result, np.array([expected]))


@st.composite
def _subnormal(draw: st.DrawFn, backend: Backend) -> Search:
    case = draw(searches(backend, kinds=(any_bits,), method=_by_magnitude, mixed=False))
    return replace(case, weights=tuple(replace(w, values=made_subnormal(w.values)) for w in case.weights))


def made_subnormal(values: np.ndarray) -> np.ndarray:
    """The sign and the fraction of every number, with the exponent of subnormal numbers."""
    bits = bits_dtype(values.dtype).type
    fraction = int(np.array(np.inf, values.dtype).view(bits)) & -int(np.array(np.inf, values.dtype).view(bits))
    sign = 1 << (8 * values.dtype.itemsize - 1)
    return np.asarray(values.view(bits) & bits(sign | (fraction - 1))).view(values.dtype)


@conformance_property("1b", _subnormal, unless=("flushes_subnormals", True))
def thresholds_keep_subnormals(backend: Backend, case: Search) -> None:
    """Subnormal magnitudes order like all others."""
    require_same_bits(case, case.call(backend).result, case.expected())


@st.composite
def _not_finite(draw: st.DrawFn, backend: Backend) -> Search:
    case = draw(searches(backend))
    tensor = draw(st.sampled_from([i for i, w in enumerate(case.weights) if w.values.size]))
    spoilt = draw(with_not_finite(case.weights[tensor]))
    weights = (*case.weights[:tensor], spoilt, *case.weights[tensor + 1 :])
    return replace(case, weights=weights, sparsity=draw(st.sampled_from([case.sparsity, 0.0])))


@st.composite
def with_not_finite(draw: st.DrawFn, array: Array) -> Array:
    """The array with NaN or infinity in one place."""
    values = array.values.copy()
    place = draw(st.integers(0, values.size - 1))
    values.reshape(-1)[place] = draw(st.sampled_from([np.nan, np.inf, -np.inf]))
    return replace(array, values=values)


def require_rejected(backend: Backend, case: Search | Operation) -> None:
    """The call must raise a ValueError; its arrays alone must not."""
    for array in case.arrays:
        backend.from_numpy(array.make())
    try:
        found = case.call(backend).result
    except ValueError:
        return
    require(False, case, shown(found), "ValueError")


def _overflowing(backend: Backend) -> Iterable[Case]:
    """Finite weights whose magnitudes are not: divided by a sigma below 1."""
    for dtype, largest in (("float32", 3e38), ("bfloat16", 3e38), ("float64", 1.7e308)):
        if dtype in backend.dtypes:
            yield Search((Array.made(f"np.array([[{largest}, 1.0, 2.0]], {dtype!r})"),), 0.5, "st3_sigma")


@conformance_property("1b", _not_finite, fixed=_overflowing)
def thresholds_reject_what_is_not_finite(backend: Backend, case: Search) -> None:
    """NaN and infinity among the weights, or among their magnitudes, are a ValueError, for every sparsity."""
    require_rejected(backend, case)


@st.composite
def _with_bad_sparsity(draw: st.DrawFn, backend: Backend) -> Search:
    bad = st.sampled_from([1.0, -0.25, 1.5, float("nan"), float("inf")])
    return replace(draw(searches(backend)), sparsity=draw(bad))


@conformance_property("2a", _with_bad_sparsity)
def thresholds_reject_bad_sparsity(backend: Backend, case: Search) -> None:
    """A sparsity outside [0, 1) is a ValueError."""
    require_rejected(backend, case)


@st.composite
def _no_weights(draw: st.DrawFn, backend: Backend) -> Search:
    empty = arrays(backend, shapes=((0,), (2, 0)))
    plain = methods(lambda method: knows(backend, method))
    return Search(tuple(draw(st.lists(empty, max_size=2))), draw(st.sampled_from([0.5, 0.0])), draw(plain))


@conformance_property("2a", _no_weights)
def thresholds_reject_no_weights(backend: Backend, case: Search) -> None:
    """No tensor, or none that is not empty, is a ValueError."""
    require_rejected(backend, case)


@st.composite
def _in_succession(draw: st.DrawFn, backend: Backend) -> Sequence[Search]:
    first = draw(searches(backend))
    turned = tuple(replace(w, values=(-w.values / 2).astype(w.values.dtype)) for w in first.weights)
    return Sequence(first, replace(first, weights=turned, sparsity=draw(st.sampled_from([first.sparsity, 0.5]))))


@conformance_property("2b", _in_succession)
def thresholds_depend_on_their_arguments_alone(backend: Backend, case: Sequence[Search]) -> None:
    """A search does not remember the one before, also where the same memory holds other weights by now."""
    first, second = case.first, case.second
    memory = [weight.make() for weight in first.weights]
    first.call_with(backend, memory)
    for array, weight in zip(memory, second.weights, strict=True):
        array[...] = weight.values
    require_same_bits(case, second.call_with(backend, memory).result, second.expected())


PROPERTIES: tuple[Property, ...] = (
    thresholds_equal_the_reference,
    thresholds_zero_the_rank,
    thresholds_zero_ties_together,
    thresholds_separate_neighbours,
    thresholds_interpolate,
    thresholds_are_global,
    thresholds_of_layers_are_their_own,
    thresholds_of_groups_are_their_largest,
    thresholds_ignore_order,
    thresholds_divide_by_sigma,
    thresholds_of_zero_sparsity,
    thresholds_count_many_weights,
    thresholds_keep_subnormals,
    thresholds_reject_what_is_not_finite,
    thresholds_reject_bad_sparsity,
    thresholds_reject_no_weights,
    thresholds_depend_on_their_arguments_alone,
)
