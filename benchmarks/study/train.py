"""One network of the study: trained, scored, and looked at on the way."""

import time
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from benchmarks.study.plan import GROUP_METHODS, Run
from benchmarks.study.tasks import TASKS, Task
from st3_torch import Sparsifier

TRACED_SEED = 0
_TRACES = 60
"""Points of a trace, about."""


def measure(run: Run) -> dict[str, Any]:
    """Train one network and say what became of it."""
    start = time.perf_counter()
    task = TASKS[run.task].make(run.seed, run.length)
    if run.method == "dense":
        _train(task, None, None)
        return {"score": task.score(task.model), "zeros": 0.0, "macs": 1.0, "seconds": time.perf_counter() - start}
    sparsifier = Sparsifier(task.model, run.schedule(task.steps), run.chosen())
    traced = run.seed == TRACED_SEED and run.method not in GROUP_METHODS  # whose groups have thresholds of their own
    trace = Trace(sparsifier, task.steps) if traced else None
    _train(task, sparsifier, trace)
    report = sparsifier.report(task.example)
    if report.sparse_macs is None or report.dense_macs is None:
        raise RuntimeError(f"measure: every kernel of {run.task} must have its multiply-adds counted, got {report}")
    figures = {
        "score": task.score(sparsifier.finalize()),
        "zeros": report.sparsity,
        "macs": report.sparse_macs / report.dense_macs,
        "layers": {layer.name: round(layer.sparsity, 6) for layer in report.layers},
        "seconds": round(time.perf_counter() - start, 2),
    }
    return figures | ({"trace": trace.points} if trace else {})


def _train(task: Task, sparsifier: Sparsifier | None, trace: "Trace | None") -> None:
    for step, (inputs, labels) in enumerate(task.batches, start=1):
        task.optimizer.zero_grad()
        functional.cross_entropy(task.model(inputs), labels).backward()
        nn.utils.clip_grad_norm_(task.model.parameters(), task.clip)
        task.optimizer.step()
        task.schedule.step()
        if sparsifier is not None:
            sparsifier.step()
        if trace is not None:
            trace.look(step)


class Trace:
    """Threshold, zeros, and weights that have crossed the threshold between two steps, in either direction."""

    def __init__(self, sparsifier: Sparsifier, steps: int) -> None:
        self._sparsifier, self._every = sparsifier, max(steps // _TRACES, 1)
        self._last: list[torch.Tensor] = []
        self.points: dict[str, list[float]] = {"step": [], "threshold": [], "sparsity": [], "crossings": []}

    def look(self, step: int) -> None:
        """Note a point at every so manieth step, from this one and the one before."""
        if (step + 1) % self._every and step % self._every:
            return
        thresholds = list(self._sparsifier.thresholds.values())
        pairs = zip(self._sparsifier.raw_parameters, thresholds, strict=True)
        zeros = [weight.detach().abs() <= threshold for weight, threshold in pairs]
        if step % self._every == 0 and self._last:
            moved = sum(int((a != b).sum()) for a, b in zip(zeros, self._last, strict=True))
            size = sum(part.numel() for part in zeros)
            found = step, float(np.median(thresholds)), sum(int(part.sum()) for part in zeros) / size, moved / size
            for name, value in zip(self.points, found, strict=True):
                self.points[name].append(round(float(value), 8))
        self._last = zeros
