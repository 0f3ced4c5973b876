"""Asks a backend about a property, and says what it found."""

import inspect
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import hypothesis
import numpy as np
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import FlakyFailure
from hypothesis.strategies import SearchStrategy

from st3core.conformance import forward, gradient, thresholds
from st3core.conformance.backend import Backend
from st3core.conformance.cases import Case
from st3core.conformance.properties import Property
from st3core.conformance.violation import ViolationError

PROPERTIES: tuple[Property, ...] = (*thresholds.PROPERTIES, *forward.PROPERTIES, *gradient.PROPERTIES)
"""All properties, in the order of a report."""


@dataclass(frozen=True)
class Result:
    """What became of one property.

    Args:
        chosen: the property.
        examples: cases that were tried, those of shrinking a failure included.
        seconds: that it took.
        failure: the whole message, if a case broke the property.
        excuse: what the backend has declared, if it was not asked.
    """

    chosen: Property
    examples: int
    seconds: float
    failure: str | None = None
    excuse: str | None = None

    @property
    def outcome(self) -> str:
        """``"passed"``, ``"failed"`` or ``"not asked"``."""
        if self.excuse is not None:
            return "not asked"
        return "passed" if self.failure is None else "failed"


def select(names: Iterable[str] | None) -> tuple[Property, ...]:
    """Properties by name, in the order of a report; all of them for None.

    Raises:
        ValueError: there is no property of that name, or no name at all.
    """
    if names is None:
        return PROPERTIES
    wanted, known = list(names), [p.name for p in PROPERTIES]
    unknown = [name for name in wanted if name not in known]
    if unknown or not wanted:
        raise ValueError(f"conformance: properties must be some of {', '.join(known)}, got {unknown or 'none'}")
    return tuple(p for p in PROPERTIES if p.name in wanted)


def check_property(chosen: Property, backend: Backend, max_examples: int = 200, seed: int | None = None) -> Result:
    """Ask a backend about one property.

    Args:
        chosen: the property.
        backend: that is asked.
        max_examples: cases that Hypothesis draws, 1 or more.
        seed: of the cases; None for the same ones at every call.

    Returns:
        What was found; a backend that fails or raises is a failure of the result, not an error.
    """
    excuse = chosen.excuse(backend)
    if excuse is not None:
        return Result(chosen, 0, 0.0, excuse=excuse)
    counted, start = _Counted(chosen, backend), time.perf_counter()
    failure = None
    try:
        if chosen.cases is not None:
            _search(chosen.cases(backend), counted, max_examples, seed)
        for case in chosen.fixed(backend):
            counted(case)
    except ViolationError as violation:
        failure = describe(chosen, backend, violation)
    return Result(chosen, counted.examples, time.perf_counter() - start, failure)


class _Counted:
    """Checks cases, counts them, and makes a violation of whatever a backend raises."""

    def __init__(self, chosen: Property, backend: Backend) -> None:
        self.chosen, self.backend, self.examples = chosen, backend, 0
        self.last: ViolationError | None = None

    def __call__(self, case: Case) -> None:
        self.examples += 1
        try:
            with np.errstate(all="ignore"):
                self.chosen.check(self.backend, case)
        except ViolationError as violation:
            self.last = violation
            raise
        except Exception as error:
            self.last = ViolationError(case, f"{type(error).__name__}: {error}", "an answer")
            raise self.last from error


def _search(cases: SearchStrategy[Any], check: _Counted, max_examples: int, seed: int | None) -> None:
    """Raise the violation of the smallest case that Hypothesis finds."""

    @settings(
        max_examples=max_examples,
        deadline=None,
        database=None,
        derandomize=seed is None,
        report_multiple_bugs=False,
        print_blob=False,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, Phase.shrink],
    )
    @given(cases)
    def cases_hold(case: Case) -> None:
        check(case)

    test: Callable[[], Any] = cases_hold if seed is None else hypothesis.seed(seed)(cases_hold)
    try:
        test()
    except FlakyFailure:
        if check.last is None:
            raise
        last = check.last
        raise ViolationError(last.case, f"{last.got}, and at another time another answer", last.expected) from None


def describe(chosen: Property, backend: Backend, violation: ViolationError) -> str:
    """The message for people: property, counterexample, got and expected, equation, and code that repeats it."""
    lines = (
        f"{backend.name} violates {chosen.name}: {chosen.statement}",
        f"  equation {chosen.equation}: docs/spec/{chosen.page}.md",
        f"  smallest counterexample: {violation.case}",
        f"  got:      {violation.got}",
        f"  expected: {violation.expected}",
        "  to repeat it:",
    )
    return "\n".join([*lines, *(f"    {line}" for line in snippet(backend, violation.case).splitlines())])


def snippet(backend: Backend, case: Case) -> str:
    """Program that makes the call of a case and prints the answer."""
    kind = type(backend)
    importable = "<locals>" not in kind.__qualname__ and kind.__module__ != "__main__" and _needs_no_arguments(kind)
    made = f"{kind.__module__}.{kind.__qualname__}()" if importable else f"...  # a {kind.__qualname__}"
    lines = [
        "import numpy as np",
        f"import {kind.__module__}" if importable else "",
        "from st3core import Method, get_method",
        "from st3core.conformance.cases import from_bits, laid_out",
        f"backend = {made}",
        case.code(),
    ]
    return "\n".join(line for line in lines if line)


def _needs_no_arguments(kind: type) -> bool:
    try:
        inspect.signature(kind).bind()
    except (TypeError, ValueError):
        return False
    return True


def check(
    backend: Backend,
    *,
    properties: Sequence[str] | None = None,
    max_examples: int = 200,
    seed: int | None = None,
    report: Callable[[Result], object] = lambda _: None,
) -> list[Result]:
    """Ask a backend about properties, one after the other.

    Args:
        backend: that is asked.
        properties: names; None for all.
        max_examples: cases that Hypothesis draws for each property, 1 or more.
        seed: of the cases; None for the same ones at every call.
        report: is called with every result as soon as it is there.

    Returns:
        A result for each property.

    Raises:
        TypeError: ``backend`` lacks a member of the protocol.
        ValueError: an argument is not valid.
    """
    require_backend(backend)
    require_examples(max_examples)
    results = []
    for chosen in select(properties):
        results.append(check_property(chosen, backend, max_examples, seed))
        report(results[-1])
    return results


def check_backend(
    backend: Backend,
    max_examples: int = 200,
    *,
    properties: Sequence[str] | None = None,
    seed: int | None = None,
) -> None:
    """Assert that a backend satisfies the specification; stop at the first property that it violates.

    Args:
        backend: that is asked.
        max_examples: cases that Hypothesis draws for each property, 1 or more.
        properties: names; None for all.
        seed: of the cases; None for the same ones at every call.

    Raises:
        AssertionError: the backend violates a property; the message has the property, the smallest
            counterexample, got and expected, the equation's number, and code that repeats it.
        TypeError: ``backend`` lacks a member of the protocol.
        ValueError: an argument is not valid.

    Examples:
        >>> from st3core.conformance import NumpyBackend
        >>> check_backend(NumpyBackend(), max_examples=5, properties=["forward_is_zero_up_to_the_threshold"])
    """

    def stop_at_failure(result: Result) -> None:
        if result.failure is not None:
            raise AssertionError(result.failure)

    check(backend, properties=properties, max_examples=max_examples, seed=seed, report=stop_at_failure)


def require_examples(value: object) -> None:
    """Raise a ValueError unless this is a number of examples."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"conformance: max_examples must be an integer of 1 or more, got {value!r}")


def require_backend(backend: object) -> None:
    """Raise a TypeError unless the object has the members of :class:`~st3core.conformance.Backend`."""
    members = ("name", "dtypes", "from_numpy", "to_numpy", "find_thresholds", "sparsify", "vjp")
    missing = [member for member in members if not hasattr(backend, member)]
    if isinstance(backend, type) or missing:
        hint = "; make an instance of it" if isinstance(backend, type) else f"; it lacks {', '.join(missing)}"
        raise TypeError(f"conformance: backend must be a Backend, got {backend!r}{hint}")
    known = ("float16", "bfloat16", "float32", "float64")
    dtypes = getattr(backend, "dtypes")  # noqa: B009  # of an object that only now is known to have it
    if not dtypes or any(name not in known for name in dtypes):
        raise ValueError(f"conformance: backend.dtypes must be some of {', '.join(known)}, got {dtypes!r}")
