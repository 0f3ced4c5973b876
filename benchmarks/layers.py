"""The kernels of ResNet-50, float32: each part of a step, and the alternatives."""

from typing import Any

import numpy as np
import torch

import st3core
from benchmarks import alternatives, step
from benchmarks.grid import Grid, number, spread
from benchmarks.shapes import he_normal, in_one_piece, keras_layout, resnet50
from benchmarks.timing import Call, interleaved, summary
from st3core import search
from st3core.counting import ArrayCounter
from st3core.reference import position

SLOW_ROUNDS = 3

READ, COPY = "read all weights", "copy all weights"
COLD, WARM = "search, cold", "search, warm"
OPERATOR, STEP = "operator", "whole step: warm search, operator"
SORT_STEP, PRUNE = "torch: sort, interpolate, mask, apply", "torch.nn.utils.prune.global_unstructured"

_UNITS = {"read": (READ,), "copy": (COPY,), "read + copy": (READ, COPY), COLD: (COLD,), STEP: (STEP,)}
_SEARCHES = (READ, COLD, "search, cold, st3_sigma", WARM)
_OPERATORS = (
    COPY,
    OPERATOR,
    "operator, output channels last",
    "operator, no rescale",
    "sparsify, one tensor a call",
    "the same, checked for NaN",
)


def measure(sparsity: float, rounds: int) -> dict[str, Any]:
    """Everything that the tables of this module show."""
    flat, weights = in_one_piece(he_normal(resnet50()))
    fast = _candidates(flat, weights, sparsity)
    seconds = interleaved(fast, rounds)
    units = dict.fromkeys(_SEARCHES, "read") | dict.fromkeys(_OPERATORS, "copy") | {STEP: "read + copy"}
    slow, resets = _slow_candidates(weights, sparsity)
    beside = {name: fast[name] for name in (COLD, STEP)}
    slow_seconds = interleaved(beside | slow, SLOW_ROUNDS, resets=resets)
    slow_units = {name: STEP if name in (SORT_STEP, PRUNE) else COLD for name in slow}
    return {
        "weights": sum(w.size for w in weights),
        "tensors": len(weights),
        "rounds": rounds,
        "rows": summary(seconds, {name: _UNITS[unit] for name, unit in units.items()}),
        "cold_parts": _cold_parts(flat, weights, sparsity, rounds),
        "slow_rounds": SLOW_ROUNDS,
        "alternatives": summary(slow_seconds, {name: _UNITS[unit] for name, unit in slow_units.items()}),
    }


def grids(figures: dict[str, Any]) -> list[Grid]:
    """Tables of the search, the operator, the whole step and the alternatives."""
    rows, others = figures["rows"], figures["alternatives"]
    whole = [name for name in others if name in (SORT_STEP, PRUNE)]
    return [
        _grid("Finding the threshold", "reads", rows, _SEARCHES),
        *_parts_grid(figures),
        _grid("Applying it", "copies", rows, _OPERATORS),
        _grid("Both together", "reads + copies", rows, (STEP,)),
        _grid("Other ways to find the threshold", "cold searches", others, [x for x in others if x not in whole]),
        _grid("Other ways to make the zeros", "whole steps", others, whole),
    ]


def sort_at_floor(figures: dict[str, Any]) -> float:
    """How many times one read and one copy go into the way by sorting."""
    ratio: float = figures["alternatives"][SORT_STEP]["median"] * figures["rows"][STEP]["median"]
    return ratio


def _grid(title: str, unit: str, rows: dict[str, dict[str, float]], names: Any) -> Grid:
    cells = ((n, number(rows[n]["median"]), spread(rows[n]), number(rows[n]["milliseconds"])) for n in names)
    return Grid(title, ("", f"in {unit}", "quartiles", "ms on this machine"), tuple(cells))


def _cold_parts(flat: np.ndarray, weights: list[np.ndarray], sparsity: float, rounds: int) -> dict[str, dict[str, Any]]:
    """What a cold search of one look does, each part by itself, in reads of the weights."""
    units, names = [1.0] * len(weights), [""] * len(weights)
    counter, (rank, _) = ArrayCounter(weights, units, names), position(flat.size, sparsity)
    low, high, _ = search._guess(counter, rank)
    below, inside, keys = counter.gather(low, high, search.CAPACITY)
    if keys is None:
        raise RuntimeError(f"_cold_parts: one look must be enough, got {inside} keys in the interval of a sample")
    nothing = counter.infinity - 1  # an interval that holds no key
    parts: dict[str, Call] = {
        READ: step.read(flat),
        "the table of chunks": lambda: ArrayCounter(weights, units, names),
        "a sample, and the interval that it leads to": lambda: search._guess(counter, rank),
        "counting all weights": lambda: counter.gather(nothing, nothing + 1, search.CAPACITY),
        f"gathering {inside:,} of them, and counting": lambda: counter.gather(low, high, search.CAPACITY),
        "the two among these": lambda: search._pick(counter, keys.copy(), rank - below, None, search.ALONE),
    }
    return summary(interleaved(parts, rounds), dict.fromkeys(parts, (READ,)))


def _parts_grid(figures: dict[str, Any]) -> list[Grid]:
    parts = figures.get("cold_parts")  # not part of older figures
    return [_grid("What a cold search does", "reads", parts, list(parts)[1:])] if parts else []


def _candidates(flat: np.ndarray, weights: list[np.ndarray], sparsity: float) -> dict[str, Call]:
    (target, outputs), last = in_one_piece(weights), keras_layout(weights)
    thresholds = st3core.find_thresholds(weights, sparsity)
    apply = step.operator(weights, outputs)
    apply_plain = step.operator(weights, outputs, st3core.Method("soft, no rescale", rescale="none"))
    apply_last = step.operator(last, [np.empty_like(w) for w in last], channel_axis=-1)
    calls = (
        step.read(flat),
        step.cold_search(weights, sparsity),
        step.cold_search(weights, sparsity, "st3_sigma"),
        step.warm_search(weights, sparsity),
        step.copy(flat, target),
        lambda: apply(thresholds),
        lambda: apply_last(thresholds),
        lambda: apply_plain(thresholds),
        step.sparsify_each(weights, outputs, thresholds, check_finite=False),
        step.sparsify_each(weights, outputs, thresholds, check_finite=True),
        step.whole_step(step.warm_search(weights, sparsity), apply),
    )
    return dict(zip((*_SEARCHES, *_OPERATORS, STEP), calls, strict=True))


def _slow_candidates(weights: list[np.ndarray], sparsity: float) -> tuple[dict[str, Call], dict[str, Call]]:
    tensors = [torch.from_numpy(w) for w in weights]
    pruning, reset = alternatives.global_pruning(tensors, sparsity)
    calls = alternatives.searches(weights, sparsity)
    calls[SORT_STEP] = lambda: alternatives.sort_mask_apply(tensors, sparsity)
    calls[PRUNE] = pruning
    return calls, {PRUNE: reset}
