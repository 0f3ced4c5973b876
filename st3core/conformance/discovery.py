"""Backends by name: ``package.module:Class``, or what an installed package registers."""

from importlib.metadata import EntryPoint, entry_points

from st3core.conformance.backend import Backend
from st3core.conformance.run import require_backend

GROUP = "st3core.backends"
"""Entry point group in which a package names its backends."""


def list_backends() -> dict[str, str]:
    """Names and places of the backends that installed packages register, in order."""
    return {entry.name: entry.value for entry in sorted(entry_points(group=GROUP), key=lambda entry: entry.name)}


def find_backend(name: str) -> Backend:
    """Make the backend of that name.

    Args:
        name: ``package.module:Class``, or the name under which an installed package registers one.

    Returns:
        An instance; the class is called without arguments.

    Raises:
        ValueError: nothing of that name is registered, or there is no such module or class.
        TypeError: it is not a backend.
    """
    known = list_backends()
    place = name if ":" in name else known.get(name)
    if place is None:
        listed = ", ".join(known) or "none"
        raise ValueError(f"conformance: backend must be package.module:Class or one of {listed}, got {name!r}")
    if not all(place.partition(":")[::2]):
        raise ValueError(f"conformance: backend must be package.module:Class, got {name!r}")
    try:
        kind = EntryPoint(name, place, GROUP).load()
    except (ModuleNotFoundError, AttributeError) as error:
        missing = isinstance(error, ModuleNotFoundError) and not _is_part(error.name, place)
        if missing:
            raise  # the backend is there, but something that it imports is not
        raise ValueError(f"conformance: backend must be package.module:Class, got {name!r}: {error}") from error
    backend: Backend = kind()
    require_backend(backend)
    return backend


def _is_part(module: str | None, place: str) -> bool:
    """Whether a module that was not found is the one that was asked for, or a package around it."""
    wanted = place.partition(":")[0]
    return module is not None and (wanted == module or wanted.startswith(f"{module}."))
