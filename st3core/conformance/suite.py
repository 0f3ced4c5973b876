"""The properties as a test class for pytest, one test a property."""

from typing import Any, ClassVar

from st3core.conformance.backend import Backend
from st3core.conformance.properties import Property
from st3core.conformance.run import PROPERTIES, check_backend


class BackendConformance:
    """Derive from it, name a backend, and pytest runs one test for each property.

    Attributes:
        backend: an instance of the backend.
        max_examples: cases that Hypothesis draws for each property.
        seed: of the cases; None for the same ones in every run.

    The options ``--conformance-max-examples`` and ``--conformance-seed`` of the plugin
    ``st3core.conformance.pytest_plugin`` go before these attributes.

    Examples:
        >>> from st3core.conformance import NumpyBackend
        >>> class TestNumpy(BackendConformance):
        ...     backend = NumpyBackend()
    """

    backend: ClassVar[Backend]
    max_examples: ClassVar[int] = 200
    seed: ClassVar[int | None] = None


def _test(chosen: Property) -> Any:
    def test(self: BackendConformance, request: Any) -> None:
        excuse = chosen.excuse(self.backend)
        if excuse is not None:
            _skip(f"{self.backend.name} declares {excuse}")
        option = request.config.getoption
        max_examples, seed = option("--conformance-max-examples", None), option("--conformance-seed", None)
        max_examples = self.max_examples if max_examples is None else max_examples
        check_backend(self.backend, max_examples, properties=[chosen.name], seed=self.seed if seed is None else seed)

    test.__name__ = f"test_{chosen.name}"
    test.__doc__ = f"{chosen.statement} (equation {chosen.equation})"
    return test


def _skip(reason: str) -> None:
    import pytest

    pytest.skip(reason)


for _property in PROPERTIES:
    setattr(BackendConformance, f"test_{_property.name}", _test(_property))
