"""Side by side in one process, round by round: a noisy machine slows all candidates alike."""

import gc
import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np

Call = Callable[[], object]
Candidates = Mapping[str, Call]
Seconds = dict[str, list[float]]
Row = dict[str, float]


def interleaved(
    candidates: Candidates, rounds: int, *, repeats: int = 1, resets: Mapping[str, Call] | None = None
) -> Seconds:
    """Seconds of one call of every candidate, in every round.

    Each is called once more before it is timed: that call pays for what the candidate before it left
    behind, such as threads that still spin.

    Args:
        candidates: calls by name, in the order of a round.
        rounds: how often every candidate is timed.
        repeats: calls in a row that are timed together, where one is too short for the clock.
        resets: by name, what makes a candidate callable again; called before each call, outside of the time.
    """
    seconds: Seconds = {name: [] for name in candidates}
    gc.collect()
    for _ in range(rounds):
        for name, call in candidates.items():
            reset = (resets or {}).get(name, _nothing)
            reset()
            call()
            reset()
            seconds[name].append(_seconds(call, repeats))
    return seconds


def alternating(candidates: Candidates, rounds: int, *, repeats: int = 1) -> Seconds:
    """Seconds of one call of every candidate, in every round; every other round in reverse.

    For steps of training, which leave each other what the next one finds: no call goes untimed.
    """
    seconds: Seconds = {name: [] for name in candidates}
    gc.collect()
    for round in range(rounds):
        for name in list(candidates)[:: -1 if round % 2 else 1]:
            seconds[name].append(_seconds(candidates[name], repeats))
    return seconds


def quartiles(values: Sequence[float] | np.ndarray) -> Row:
    """Median and quartiles."""
    low, middle, high = np.quantile(values, [0.25, 0.5, 0.75])
    return {"median": float(middle), "quartile_1": float(low), "quartile_3": float(high)}


def ratios(seconds: Mapping[str, Sequence[float]], name: str, units: Sequence[str]) -> Row:
    """How many times as long as ``units`` together, within each round: median and quartiles."""
    return quartiles(np.array(seconds[name]) / np.sum([seconds[unit] for unit in units], axis=0))


def summary(seconds: Mapping[str, Sequence[float]], units: Mapping[str, Sequence[str]]) -> dict[str, Row]:
    """Median milliseconds of every candidate in ``units``, and its :func:`ratios` to what stands there."""
    return {
        name: {"milliseconds": 1e3 * float(np.median(seconds[name])), **ratios(seconds, name, unit)}
        for name, unit in units.items()
    }


def _seconds(call: Call, repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def _nothing() -> None:
    pass
