"""All properties in the order of a report, and what a property is."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from hypothesis.strategies import SearchStrategy

from st3core.conformance.backend import Backend
from st3core.conformance.cases import Case

_PAGES = {"1": "magnitude", "2": "threshold", "3": "operator", "4": "rescale", "5": "forward", "6": "gradient"}

Check = Callable[[Backend, Any], None]


@dataclass(frozen=True)
class Property:
    """One statement of the specification that can be checked by calling a backend.

    Args:
        name: of the function that checks it.
        equation: number in ``docs/spec``.
        statement: what has to hold, in one sentence.
        cases: what Hypothesis draws for a backend; None if there are fixed cases alone.
        check: raises a :class:`~st3core.conformance.violation.ViolationError` where a case breaks the property.
        fixed: cases that are asked in any case.
        unless: attributes of a backend that excuse it, and the values that do.
        needs: choice of a Method's part that it is about; a backend that lacks it is excused.
    """

    name: str
    equation: str
    statement: str
    cases: Callable[[Backend], SearchStrategy[Any]] | None
    check: Check
    fixed: Callable[[Backend], Iterable[Case]] = lambda _: ()
    unless: tuple[str, bool] | None = None
    needs: str | None = None

    @property
    def page(self) -> str:
        """Name of the equation's page in ``docs/spec``."""
        return _PAGES[self.equation[0]]

    def excuse(self, backend: Backend) -> str | None:
        """Why this backend is not asked, or None."""
        if self.needs in getattr(backend, "lacks", ()):
            return f"that it lacks {self.needs}"
        if self.unless is None:
            return None
        attribute, excusing = self.unless
        is_excused = getattr(backend, attribute, not excusing) == excusing
        return f"{attribute}={excusing}" if is_excused else None


def conformance_property(
    equation: str,
    cases: Callable[[Backend], SearchStrategy[Any]] | None,
    *,
    fixed: Callable[[Backend], Iterable[Case]] = lambda _: (),
    unless: tuple[str, bool] | None = None,
    needs: str | None = None,
) -> Callable[[Check], Property]:
    """Make a :class:`Property` of the function that checks it; its docstring is the statement."""

    def make(check: Check) -> Property:
        statement = (check.__doc__ or "").strip()
        return Property(check.__name__, equation, statement, cases, check, fixed, unless, needs)

    return make
