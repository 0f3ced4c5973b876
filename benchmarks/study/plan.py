"""What is trained: every network of the study, and of the ablations, as one line of settings."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from fractions import Fraction

from benchmarks.study.tasks import TASKS
from st3core import Method, PolynomialSchedule, get_method

METHODS = ("st3", "st3_sigma", "hard_ste", "gmp", "feather")
GROUP_METHODS = ("sr_ste", "s_ste")
SPARSITIES = (0.8, 0.9, 0.95, 0.98, 0.99)
GROUPS = ((2, 4), (1, 4), (1, 8))
ABLATED_AT = (0.98, 0.99)

VARIANTS = {
    "no rescale": {"rescale": "none"},
    "hard threshold": {"operator": "hard"},
    "masked gradient": {"backward": "masked"},
    "least-squares scale": {"rescale": "least_squares"},
}
"""ST-3 with one part replaced."""

RAMPS = {"linear ramp": 1.0, "all at once": 0.0}
"""ST-3 with another schedule: its power; 0 stands for one step in the middle of the ramp."""


@dataclass(frozen=True)
class Run:
    """One network.

    Args:
        task: a key of :data:`~benchmarks.study.tasks.TASKS`.
        method: ``"dense"``, a preset, or a key of :data:`VARIANTS` or :data:`RAMPS`.
        sparsity: share of zeros at the end.
        seed: of the split, the first weights and the batches.
        length: of the training, in usual ones.
    """

    task: str
    method: str
    sparsity: float
    seed: int
    length: float = 1.0

    def chosen(self) -> Method:
        """The method; for groups, that of the sparsity."""
        if self.method in GROUP_METHODS:
            return replace(get_method(self.method), group=group_of(self.sparsity))
        if self.method in VARIANTS:
            return replace(get_method("st3"), **VARIANTS[self.method])  # type: ignore[arg-type]
        return get_method("st3" if self.method in RAMPS else self.method)

    def schedule(self, steps: int) -> PolynomialSchedule:
        """Sparsity that rises from 5 % to 50 % of the steps; groups are there from the first of these on."""
        begin, end, power = steps // 20, steps // 2, RAMPS.get(self.method, 3.0)
        if self.method in GROUP_METHODS:
            end = begin
        if power == 0:
            begin = end = (begin + end) // 2
        return PolynomialSchedule(self.sparsity, begin_step=begin, end_step=end, power=power or 3.0)


def group_of(sparsity: float) -> tuple[int, int]:
    """``(N, M)`` with this share of zeros."""
    return next(group for group in GROUPS if 1 - Fraction(*group) == Fraction(sparsity))


def every_run(seeds: int, tasks: tuple[str, ...] = tuple(TASKS), length: float = 1.0) -> Iterator[Run]:
    """All networks; seed by seed, so that a study that was stopped has all methods of the first seeds."""
    for seed in range(seeds):
        for task in tasks:
            yield Run(task, "dense", 0.0, seed, length)
            for sparsity in SPARSITIES:
                yield from (Run(task, method, sparsity, seed, length) for method in METHODS)
            for kept, size in GROUPS:
                yield from (Run(task, method, 1 - kept / size, seed, length) for method in GROUP_METHODS)
            if task != "table":
                variants = (*VARIANTS, *RAMPS)
                yield from (Run(task, name, sparsity, seed, length) for sparsity in ABLATED_AT for name in variants)


def quick_runs() -> Iterator[Run]:
    """A few steps of every method on every task: whether the study works, not what it says."""
    for task in TASKS:
        yield Run(task, "dense", 0.0, 0, 0.02)
        yield from (Run(task, method, 0.9, 0, 0.02) for method in METHODS)
        yield from (Run(task, method, 0.5, 0, 0.02) for method in GROUP_METHODS)
    yield from (Run("digits", name, 0.9, 0, 0.02) for name in (*VARIANTS, *RAMPS))
