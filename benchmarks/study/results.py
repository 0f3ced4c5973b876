"""What the study has found: lines of JSON, and tables with confidence intervals."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import fields
from itertools import groupby
from math import sqrt
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

from scipy import stats

from benchmarks.grid import Grid, number
from benchmarks.study.plan import ABLATED_AT, GROUP_METHODS, GROUPS, METHODS, SPARSITIES, VARIANTS, Run
from benchmarks.study.tasks import TASKS

PATH = Path(__file__).parent.parent / "results/study.jsonl"
CONFIDENCE = 0.95

Found = Sequence[tuple[Run, dict[str, Any]]]


def cut_half_line(path: Path) -> None:
    """Take off a last line that was not written to its end, so that another may follow."""
    if path.exists():
        whole = path.read_bytes()
        path.write_bytes(whole[: whole.rfind(b"\n") + 1])


def read(path: Path) -> Found:
    """Networks and their figures; a last line that was cut off is left out."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    entries = [json.loads(line) for line in lines if line.endswith("\n")]
    names = [field.name for field in fields(Run)]
    return [(Run(**{name: entry[name] for name in names}), entry) for entry in entries]


class Summary(NamedTuple):
    """One figure over several seeds."""

    mean: float
    deviation: float
    """Of a sample."""
    half: float
    """Half of the confidence interval of the mean, from Student's distribution."""
    seeds: int


def summarize(values: Sequence[float]) -> Summary:
    """Mean, deviation and confidence interval; zeros for what one value cannot say."""
    count = len(values)
    if count < 2:
        return Summary(values[0], 0.0, 0.0, count)
    deviation = stdev(values)
    quantile = float(stats.t.ppf(0.5 + CONFIDENCE / 2, count - 1))
    return Summary(mean(values), deviation, quantile * deviation / sqrt(count), count)


def by_kind(found: Found, figure: str = "score") -> dict[tuple[str, str, float], Summary]:
    """Over the seeds: by task, method and sparsity."""

    def key(entry: tuple[Run, dict[str, Any]]) -> tuple[str, str, float]:
        return entry[0].task, entry[0].method, entry[0].sparsity

    ordered = sorted(found, key=key)
    return {kind: summarize([own[figure] for _, own in group]) for kind, group in groupby(ordered, key)}


def differences(found: Found, task: str, method: str, base: str, sparsity: float) -> Summary | None:
    """How much higher ``method`` scores than ``base``, seed by seed; None if no seed has both."""
    scores = {
        (run.method, run.seed): own["score"] for run, own in found if (run.task, run.sparsity) == (task, sparsity)
    }
    seeds = sorted({seed for _, seed in scores})
    pairs = [(scores.get((method, seed)), scores.get((base, seed))) for seed in seeds]
    known = [one - other for one, other in pairs if one is not None and other is not None]
    return summarize(known) if known else None


def verdict(difference: Summary, higher_is_better: bool) -> str:
    """What an interval says, taken by itself: only one without zero says anything."""
    if difference.seeds < 2 or abs(difference.mean) <= difference.half:
        return "undecided"
    return "better" if (difference.mean > 0) == higher_is_better else "worse"


def grids(found: Found) -> list[Grid]:
    """All tables, task by task."""
    scores, zeros = by_kind(found), by_kind(found, "zeros")
    tables = []
    for task in dict.fromkeys(run.task for run, _ in found):
        tables += [methods_grid(scores, task), groups_grid(scores, zeros, task), ablation_grid(found, task)]
    return [table for table in tables if table.rows]


def methods_grid(scores: dict[tuple[str, str, float], Summary], task: str) -> Grid:
    """Score against sparsity, a row a method."""
    columns = ("method", *(f"{100 * sparsity:g} % zeros" for sparsity in SPARSITIES))
    rows = [("dense", *[_cell(scores.get((task, "dense", 0.0)))] * len(SPARSITIES))]
    rows += [(f"`{m}`", *(_cell(scores.get((task, m, s))) for s in SPARSITIES)) for m in METHODS]
    return _grid(f"{TASKS[task].title}: {TASKS[task].score}", columns, rows)


def groups_grid(
    scores: dict[tuple[str, str, float], Summary], zeros: dict[tuple[str, str, float], Summary], task: str
) -> Grid:
    """Score of N:M groups, and what is zero in all: a layer with fewer inputs than a group keeps more."""
    columns = ["method"]
    for kept, size in GROUPS:
        columns += [f"{kept}:{size}", "zeros (%)"]
    rows = []
    for method in GROUP_METHODS:
        row = [f"`{method}`"]
        for kept, size in GROUPS:
            kind = task, method, 1 - kept / size
            row += [_cell(scores.get(kind)), f"{100 * zeros[kind].mean:.1f}" if kind in zeros else ""]
        rows.append(tuple(row))
    return _grid(f"{TASKS[task].title}: N:M groups, {TASKS[task].score}", tuple(columns), rows)


PARTS = {
    "no rescale": "no rescale",
    "least-squares scale": "least-squares scale",
    "hard threshold": "hard threshold, rescale kept",
    "hard_ste": "hard threshold, no rescale (`hard_ste`)",
    "masked gradient": "masked gradient",
    "gmp": "hard threshold, no rescale, masked gradient (`gmp`)",
    "linear ramp": "linear ramp",
    "all at once": "all zeros at once",
}
"""What stands in the place of parts of ST-3, by method."""


def ablation_grid(found: Found, task: str) -> Grid:
    """ST-3 with one part replaced, and by how much that changes the score."""
    columns = ["ST-3 with"]
    for sparsity in ABLATED_AT:
        columns += [f"change at {100 * sparsity:g} % zeros", "so it is"]
    rows = []
    for method, name in PARTS.items():
        row = [name]
        for sparsity in ABLATED_AT:
            change = differences(found, task, method, "st3", sparsity)
            if change is None:
                row += ["", ""]
            else:
                row += [f"{change.mean:+.2f} ± {change.half:.2f}", verdict(change, TASKS[task].higher_is_better)]
        rows.append(tuple(row))
    has_variants = any(run.task == task and run.method in VARIANTS for run, _ in found)
    return _grid(
        f"{TASKS[task].title}: parts of ST-3, {TASKS[task].score}", tuple(columns), rows if has_variants else []
    )


def _grid(title: str, columns: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> Grid:
    return Grid(title, columns, tuple(row for row in rows if any(row[1:])))


def _cell(own: Summary | None) -> str:
    return "" if own is None else f"{number(own.mean)} ± {number(own.half)}"
