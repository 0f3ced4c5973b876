"""Side by side in one process, round by round: a noisy machine slows all candidates alike."""

import gc
import time
from collections.abc import Callable, Mapping

import numpy as np

Candidates = Mapping[str, Callable[[], object]]


def interleaved(candidates: Candidates, rounds: int) -> dict[str, list[float]]:
    """Seconds of every candidate in every round.

    Each is called twice in a row, and the second call counts: the first pays for what the candidate
    before it left behind, such as threads that still spin.
    """
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    gc.collect()
    for _ in range(rounds):
        for name, call in candidates.items():
            call()
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def summary(seconds: Mapping[str, list[float]], unit: str) -> dict[str, dict[str, float]]:
    """Median milliseconds, and the median and quartiles of the ratio to ``unit`` within each round."""
    result = {}
    for name, values in seconds.items():
        ratios = np.array(values) / np.array(seconds[unit])
        low, middle, high = np.quantile(ratios, [0.25, 0.5, 0.75])
        result[name] = {
            "milliseconds": 1e3 * float(np.median(values)),
            "ratio": float(middle),
            "ratio_quartile_1": float(low),
            "ratio_quartile_3": float(high),
        }
    return result
