"""Properties of the gradient (equation 6), and of all calls."""

import numpy as np
from hypothesis import strategies as st

from st3core.conformance.backend import Backend
from st3core.conformance.cases import Operation, Search
from st3core.conformance.properties import Property, conformance_property
from st3core.conformance.strategies import gradients, methods, operations, searches
from st3core.conformance.violation import require_equal, require_kind, require_unwritten

_straight = methods(lambda method: method.backward == "straight_through")
_masked = methods(lambda method: method.backward == "masked")


def _require_rule(backend: Backend, case: Operation) -> None:
    assert case.cotangent is not None
    values, cotangent = case.weight.values, case.cotangent.values
    passes = np.ones(values.shape, np.bool_)
    if case.chosen.backward == "masked" and case.limit > 0:
        passes = np.abs(values) > case.limit
    require_equal(case, case.call(backend).result, np.where(passes, cotangent, cotangent.dtype.type(0)))


@conformance_property("6", lambda backend: gradients(backend, method=_straight))
def gradient_passes_straight_through(backend: Backend, case: Operation) -> None:
    """The gradient of the forward weight is that of the raw weight: neither masked nor scaled."""
    _require_rule(backend, case)


@conformance_property("6", lambda backend: gradients(backend, method=_masked))
def gradient_is_masked(backend: Backend, case: Operation) -> None:
    """The gradient is zero where a weight is not kept, unchanged elsewhere, and everywhere without threshold."""
    _require_rule(backend, case)


@conformance_property("6", lambda backend: gradients(backend, special=True))
def gradient_passes_what_is_not_finite(backend: Backend, case: Operation) -> None:
    """NaN and infinity in a gradient stay where they are; where it is masked they become zero."""
    _require_rule(backend, case)


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
    gradient_passes_what_is_not_finite,
    gradient_keeps_dtype_and_shape,
    arguments_are_not_written,
)
