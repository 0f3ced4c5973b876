"""The specification as properties that any backend can be held to; see ``docs/conformance.md``."""

try:
    import hypothesis as _hypothesis  # noqa: F401
except ImportError as error:  # pragma: no cover
    raise ImportError(
        "st3core.conformance needs Hypothesis; install it with: pip install 'st3core[conformance]'"
    ) from error

from st3core.conformance.backend import Backend, NumpyBackend
from st3core.conformance.cases import from_bits, laid_out
from st3core.conformance.discovery import find_backend, list_backends
from st3core.conformance.run import PROPERTIES, Result, check, check_backend
from st3core.conformance.suite import BackendConformance

__all__ = [
    "PROPERTIES",
    "Backend",
    "BackendConformance",
    "NumpyBackend",
    "Result",
    "check",
    "check_backend",
    "find_backend",
    "from_bits",
    "laid_out",
    "list_backends",
]
