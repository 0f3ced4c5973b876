"""Pictures of the study: score against sparsity and against multiply-adds, zeros of each layer, and the way there."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.study.plan import GROUP_METHODS, GROUPS, METHODS, SPARSITIES
from benchmarks.study.results import Found, by_kind, summarize
from benchmarks.study.tasks import TASKS

_COLORS = {
    "st3": "#c44e52",
    "st3_sigma": "#dd8452",
    "hard_ste": "#4c72b0",
    "gmp": "#8c8c8c",
    "feather": "#55a868",
    "sr_ste": "#8172b3",
    "s_ste": "#937860",
}


def draw_task(found: Found, task: str, path: Path) -> None:
    """Score against zeros, and against the multiply-adds that are left, with confidence intervals."""
    figure = Figure(figsize=(12, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for method in (*METHODS, *GROUP_METHODS):
        _draw_scores(left, found, task, method, "zeros", lambda zeros: 1 - zeros)
        _draw_scores(right, found, task, method, "macs", lambda macs: macs)
    dense = [own["score"] for run, own in found if (run.task, run.method) == (task, "dense")]
    for axes, name in ((left, "weights"), (right, "multiply-adds")):
        if dense:
            axes.axhline(summarize(dense).mean, color="black", linestyle=":", label="dense")
        axes.set(xscale="log", xlabel=f"share of {name} left")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.invert_xaxis()
    left.set(ylabel=TASKS[task].score)
    if not TASKS[task].higher_is_better:
        left.set(yscale="log")
        left.yaxis.set_minor_formatter("{x:g}")
    left.legend(fontsize=8)
    figure.suptitle(TASKS[task].title)
    _save(figure, path)


def _draw_scores(axes: Axes, found: Found, task: str, method: str, figure: str, place: Any) -> None:
    shares = [1 - kept / size for kept, size in GROUPS] if method in GROUP_METHODS else SPARSITIES
    scores, places = by_kind(found), by_kind(found, figure)
    kinds = [(task, method, share) for share in shares if (task, method, share) in scores]
    if kinds:
        x, own = [place(places[kind].mean) for kind in kinds], [scores[kind] for kind in kinds]
        means, halves = [s.mean for s in own], [s.half for s in own]
        style: dict[str, Any] = {
            "marker": "s" if method in GROUP_METHODS else "o",
            "markersize": 4,
            "capsize": 2,
            "linewidth": 1.3,
        }
        axes.errorbar(x, means, halves, color=_COLORS[method], label=method, **style)


def draw_way(found: Found, task: str, sparsity: float, path: Path) -> None:
    """Zeros of each layer, and threshold and crossings over time, of the first seed."""
    figure = Figure(figsize=(14, 4.2), layout="constrained")
    layers, threshold, crossings = figure.subplots(1, 3)
    chosen = {r.method: own for r, own in found if (r.task, r.sparsity, r.seed) == (task, sparsity, 0)}
    chosen = {method: chosen[method] for method in METHODS if method in chosen}
    for place, (method, own) in enumerate(chosen.items()):
        names, density = list(own["layers"]), [100 * (1 - zeros) for zeros in own["layers"].values()]
        offset = (place - (len(chosen) - 1) / 2) * 0.8 / len(chosen)
        layers.bar(np.arange(len(names)) + offset, density, 0.8 / len(chosen), color=_COLORS[method], label=method)
        layers.set_xticks(range(len(names)), [name.removesuffix(".weight") for name in names], rotation=90, fontsize=7)
        trace = own["trace"]
        threshold.plot(trace["step"], trace["threshold"], color=_COLORS[method])
        crossings.plot(trace["step"], 100 * np.array(trace["crossings"]), color=_COLORS[method])
    layers.set(title="What each layer keeps", ylabel="weights left (%)", yscale="log")
    threshold.set(title="Threshold (median of the layers)", xlabel="step")
    crossings.set(title="Weights that cross it in a step", xlabel="step", ylabel="of all (%)", yscale="symlog")
    crossings.set_yscale("symlog", linthresh=0.01)
    layers.legend(fontsize=8)
    for axes in (layers, threshold, crossings):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{TASKS[task].title}, {100 * sparsity:g} % zeros, first seed")
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
