"""Options for :class:`~st3core.conformance.BackendConformance`: ``pytest -p st3core.conformance.pytest_plugin``."""

from typing import Any


def pytest_addoption(parser: Any) -> None:
    """Add the options."""
    group = parser.getgroup("st3core conformance")
    group.addoption("--conformance-max-examples", type=int, help="cases that Hypothesis draws for each property")
    group.addoption("--conformance-seed", type=int, help="seed of the cases; without it they are always the same")
