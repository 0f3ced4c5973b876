"""What a property raises where a backend breaks it."""

from typing import Any

import numpy as np

from st3core.conformance.cases import Case, Outcome, shown


class ViolationError(AssertionError):
    """A backend's answer is not the one that the specification asks for.

    Args:
        case: the call.
        got: the backend's answer, or what it raised.
        expected: what the property asks for.
    """

    def __init__(self, case: Case, got: object, expected: object) -> None:
        super().__init__(f"got {got}, expected {expected}")
        self.case, self.got, self.expected = case, got, expected


def require(condition: Any, case: Case, got: object, expected: object) -> None:
    """Raise a :class:`ViolationError` unless the condition holds."""
    if not bool(condition):
        raise ViolationError(case, got, expected)


def require_kind(case: Case, got: np.ndarray, dtype: np.dtype[Any], shape: tuple[int, ...]) -> None:
    """The answer must have this dtype and shape."""
    is_same = got.dtype == dtype and got.shape == shape
    require(is_same, case, f"{got.dtype.name} of shape {got.shape}", f"{dtype.name} of shape {shape}")


def require_same_bits(case: Case, got: np.ndarray, expected: np.ndarray) -> None:
    """The answer must be these numbers, to the bit."""
    require_kind(case, got, expected.dtype, expected.shape)
    require(got.tobytes() == expected.tobytes(), case, shown(got), shown(expected))


def require_equal(case: Case, got: np.ndarray, expected: np.ndarray) -> None:
    """The answer must be these numbers; zeros of both signs are equal, and so are NaN and NaN."""
    require_kind(case, got, expected.dtype, expected.shape)
    same = (got == expected) | ((got != got) & (expected != expected))
    require(same.all(), case, shown(got), shown(expected))


def require_close(case: Case, got: np.ndarray, expected: np.ndarray, ulp: int) -> None:
    """The answer must be zero where this is, and elsewhere within so many units in the last place."""
    require_kind(case, got, expected.dtype, expected.shape)
    require(((got == 0) == (expected == 0)).all(), case, shown(got), shown(expected))
    distance = ulp_distance(got, expected)
    require(distance <= ulp, case, f"{shown(got)}, {distance} ulp away", f"{shown(expected)}, at most {ulp} ulp away")


def require_unwritten(case: Case, outcome: Outcome) -> None:
    """The arguments must be what they were."""
    written = outcome.written()
    if written is not None:
        raise ViolationError(case, f"an argument changed to {shown(written[0])}", f"unchanged {shown(written[1])}")


def ulp_distance(a: np.ndarray, b: np.ndarray) -> int:
    """Largest distance between elements of ``a`` and ``b``, in units in the last place; NaN only equals NaN."""
    if a.size == 0:
        return 0
    integer = np.dtype(f"i{a.dtype.itemsize}")
    exact = object if a.dtype.itemsize == 8 else np.int64  # the distance of two float64 numbers can exceed int64
    lowest = int(np.iinfo(integer).min)
    bits = [np.ascontiguousarray(x).view(integer).ravel().astype(exact) for x in (a, b)]
    ordered = [np.where(x >= 0, x, lowest - x) for x in bits]
    return int(np.abs(ordered[0] - ordered[1]).max())
