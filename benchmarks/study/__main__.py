"""Train every network of the study: ``python -m benchmarks.study``; what has been trained before is kept.

Results are lines of JSON, each of them a network with its settings, what it was trained on and with. A study that was
stopped goes on where it was. ``python -m benchmarks.accuracy_page`` writes the page from them.
"""

import argparse
import json
import os
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn

from benchmarks import machine
from benchmarks.options import require_one
from benchmarks.study import results
from benchmarks.study.plan import Run, every_run, quick_runs
from benchmarks.study.tasks import TASKS
from benchmarks.study.train import measure
from examples.digits import versions


def train_all(runs: Iterable[Run], workers: int, path: Path) -> None:
    """Train what the file does not have yet, and add it line by line."""
    results.cut_half_line(path)
    known = {run for run, _ in results.read(path)}
    missing = [run for run in runs if run not in known]
    setting = {**machine.provenance("python -m benchmarks.study"), **versions()}
    columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    path.parent.mkdir(parents=True, exist_ok=True)
    with (
        Progress(*columns, console=Console(stderr=True)) as progress,
        path.open("a", encoding="utf-8") as file,
        ProcessPoolExecutor(workers, get_context("spawn"), torch.set_num_threads, (1,)) as pool,
    ):
        bar = progress.add_task(f"training ({len(known)} known)", total=len(missing))
        pending = {pool.submit(measure, run): run for run in missing}
        for future in as_completed(pending):
            line: dict[str, Any] = {**asdict(pending[future]), **future.result(), "setting": setting}
            file.write(json.dumps(line) + "\n")
            file.flush()
            progress.update(bar, advance=1)


def parse_arguments() -> argparse.Namespace:
    """Options from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=tuple(TASKS), help="what is to be learned")
    parser.add_argument("--seeds", type=int, default=5, help="networks of each kind")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="networks to train at the same time")
    parser.add_argument("--quick", action="store_true", help="a few steps of each method: whether it works")
    parser.add_argument("--out", type=Path, default=results.PATH, help="lines to read and to add to")
    options = parser.parse_args()
    require_one(parser, options, ("seeds", "workers"))
    if options.quick and options.out == results.PATH:
        parser.error(f"--quick must have an --out of its own: the page is made from {results.PATH}")
    return options


def main() -> None:
    """Train, and print the tables."""
    options = parse_arguments()
    runs = list(quick_runs() if options.quick else every_run(options.seeds, tuple(options.tasks)))
    train_all(runs, options.workers, options.out)
    found = [(run, figures) for run, figures in results.read(options.out) if run in set(runs)]
    for grid in results.grids(found):
        grid.print(Console())


if __name__ == "__main__":
    main()
