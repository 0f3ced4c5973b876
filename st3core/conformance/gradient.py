"""Properties of the gradient (equation 6), and of all calls."""

from collections.abc import Iterable
from dataclasses import replace

import numpy as np
from hypothesis import strategies as st

from st3core import reference
from st3core.conformance.backend import Backend
from st3core.conformance.cases import Array, Case, Operation, Search, Sequence, shown
from st3core.conformance.forward import LARGE, large
from st3core.conformance.properties import Property, conformance_property
from st3core.conformance.strategies import gradients, methods, operations, searches
from st3core.conformance.violation import require, require_equal, require_kind, require_unwritten

_straight = methods(lambda method: method.backward == "straight_through")
_masked = methods(lambda method: method.backward == "masked")
_scaled = methods(lambda method: method.backward == "scaled")
_decay = methods(lambda method: method.backward == "decay")


def _require_rule(backend: Backend, case: Operation) -> None:
    assert case.cotangent is not None
    values, cotangent, method = case.weight.values, case.cotangent.values, case.chosen
    passes = np.abs(values) > case.limits if case.limit > 0 else np.ones(values.shape, np.bool_)
    compute = reference.compute_dtype(values.dtype)
    wide, other, pull = cotangent.astype(compute), np.zeros(values.shape, compute), np.zeros(values.shape, compute)
    if method.backward == "straight_through":
        other = wide
    if method.backward == "scaled":
        other = compute.type(1 if method.theta is None else method.theta) * wide
    if method.backward == "decay":
        pull = compute.type(method.decay) * values.astype(compute)
        other = wide + pull
    expected, found = np.where(passes, cotangent, other.astype(values.dtype)), case.call(backend).result
    if method.backward == "decay":
        _require_sum(case, found, expected, passes, np.maximum(np.abs(wide), np.abs(pull)).astype(values.dtype))
    else:
        require_equal(case, found, expected)


def _require_sum(
    case: Operation, found: np.ndarray, expected: np.ndarray, passes: np.ndarray, larger: np.ndarray
) -> None:
    """Equal where the gradient passes; elsewhere a unit in the last place of the larger summand off, as if fused."""
    require_kind(case, found, expected.dtype, expected.shape)
    same = (found == expected) | ((found != found) & (expected != expected))
    with np.errstate(all="ignore"):
        unit = np.nextafter(larger, larger.dtype.type(np.inf)) - larger
        near = np.abs(found - expected) <= unit
    require((same | (~passes & near)).all(), case, shown(found), shown(expected))


@conformance_property("6", lambda backend: gradients(backend, method=_straight))
def gradient_passes_straight_through(backend: Backend, case: Operation) -> None:
    """The gradient of the forward weight is that of the raw weight: neither masked nor scaled."""
    _require_rule(backend, case)


def _large(backend: Backend) -> Iterable[Case]:
    rising = f"np.arange({2 * LARGE}).clip(max=9).astype({backend.dtypes[0]!r}).reshape(2, -1)"
    yield replace(large(backend, "gmp"), cotangent=Array.made(rising))


@conformance_property("6", lambda backend: gradients(backend, method=_masked), fixed=_large)
def gradient_is_masked(backend: Backend, case: Operation) -> None:
    """The gradient is zero where a weight is not kept, unchanged elsewhere, and everywhere without threshold."""
    _require_rule(backend, case)


@conformance_property("6b", lambda backend: gradients(backend, method=_scaled), needs="scaled")
def gradient_is_scaled(backend: Backend, case: Operation) -> None:
    """Where a weight is not kept the gradient is theta times what it was, rounded once in the compute dtype."""
    _require_rule(backend, case)


@conformance_property("6c", lambda backend: gradients(backend, method=_decay), needs="decay")
def gradient_decays(backend: Backend, case: Operation) -> None:
    """Where a weight is not kept the gradient has decay times the raw weight added to it."""
    _require_rule(backend, case)


@conformance_property("6", lambda backend: gradients(backend, special=True))
def gradient_passes_what_is_not_finite(backend: Backend, case: Operation) -> None:
    """NaN and infinity in a gradient stay where they are; where it is masked they become zero, scaled a product."""
    _require_rule(backend, case)


@st.composite
def _in_succession(draw: st.DrawFn, backend: Backend) -> Sequence[Operation]:
    first = draw(gradients(backend, method=_masked))
    weight, cotangent = first.arrays
    turned = replace(weight, values=np.flip(weight.values).copy()), replace(cotangent, values=-cotangent.values)
    second = replace(first, weight=turned[0], cotangent=turned[1])
    return Sequence(first, replace(second, threshold=first.threshold / draw(st.sampled_from([1, 4]))))


@conformance_property("6", _in_succession)
def gradient_depends_on_its_arguments_alone(backend: Backend, case: Sequence[Operation]) -> None:
    """No mask of an earlier call is left, also where the same memory holds other weights by now."""
    first, second = case.first, case.second
    memory = [array.make() for array in first.arrays]
    first.call_with(backend, memory)
    for array, other in zip(memory, second.arrays, strict=True):
        array[...] = other.values
    require_equal(case, second.call_with(backend, memory).result, second.expected())


@conformance_property("6", gradients)
def gradient_keeps_dtype_and_shape(backend: Backend, case: Operation) -> None:
    """A gradient has the dtype and the shape of its weight."""
    values = case.weight.values
    require_kind(case, case.call(backend).result, values.dtype, values.shape)


@conformance_property("5", lambda backend: st.one_of(searches(backend), operations(backend), gradients(backend)))
def arguments_are_not_written(backend: Backend, case: Search | Operation) -> None:
    """No call changes its arguments."""
    require_unwritten(case, case.call(backend))


PROPERTIES: tuple[Property, ...] = (
    gradient_passes_straight_through,
    gradient_is_masked,
    gradient_is_scaled,
    gradient_decays,
    gradient_passes_what_is_not_finite,
    gradient_depends_on_its_arguments_alone,
    gradient_keeps_dtype_and_shape,
    arguments_are_not_written,
)
