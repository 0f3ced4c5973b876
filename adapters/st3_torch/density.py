"""The share of its weights that every kernel keeps at least."""

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from numbers import Real

from st3core.bounded import most_zeros
from st3core.reference import position


def least_densities(
    min_density: float | Mapping[str, float], sizes: Mapping[str, int], sparsity: float
) -> Sequence[float]:
    """Least density of every kernel; none at all if no kernel has one.

    Args:
        min_density: one number for all, or numbers by name of a kernel or layer, or by glob pattern; the last that
            matches counts, and a kernel that none matches may lose everything.
        sizes: number of weights of each kernel.
        sparsity: the largest that is going to be asked for.

    Raises:
        TypeError: ``min_density`` is of the wrong type.
        ValueError: a density is outside [0, 1], a pattern matches no kernel, or too few weights are left to remove.
    """
    rules = min_density if isinstance(min_density, Mapping) else {"*": min_density}
    for pattern, density in rules.items():
        _check(pattern, density, sizes)
    matching = ([float(d) for pattern, d in rules.items() if _matches(pattern, name)] for name in sizes)
    densities = [found[-1] if found else 0.0 for found in matching]
    if not any(densities):
        return ()
    total, room = sum(sizes.values()), sum(most_zeros(list(sizes.values()), densities))
    if sparsity and position(total, sparsity)[0] >= room:
        raise ValueError(
            f"Sparsifier: min_density must leave room for the schedule's sparsity {sparsity!r} of {total} weights, got "
            f"{min_density!r}, which lets {room} of them go; lower it or the sparsity"
        )
    return densities


def _check(pattern: str, density: object, sizes: Mapping[str, int]) -> None:
    if isinstance(density, bool) or not isinstance(density, Real):
        raise TypeError(
            f"Sparsifier: min_density must be a number, or numbers by name, got {density!r} for {pattern!r}"
        )
    if not 0 <= float(density) <= 1:
        raise ValueError(f"Sparsifier: min_density must be in [0, 1], got {density!r} for {pattern!r}")
    if not any(_matches(pattern, name) for name in sizes):
        raise ValueError(
            f"Sparsifier: min_density must name sparsified kernels, got {pattern!r}; there are {', '.join(sizes)}"
        )


def _matches(pattern: str, name: str) -> bool:
    return fnmatchcase(name, pattern) or fnmatchcase(name.rpartition(".")[0], pattern)
