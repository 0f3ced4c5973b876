"""The conformance kit on every backend of this project, and on backends that are broken on purpose.

Run it from the repository's root: ``make conformance``. It writes ``benchmarks/results/conformance.json`` and the
tables of ``docs/conformance.md``.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.progress import track

from benchmarks import machine
from benchmarks.grid import Grid, number
from benchmarks.marked import replaced
from benchmarks.options import require_one
from st3core.conformance import PROPERTIES, NumpyBackend, check
from st3core.conformance.run import check_property, select
from tests.conformance.broken import BROKEN

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks/results/conformance.json"
PAGE = ROOT / "docs/conformance.md"
PARTS = ("backends", "broken")


class Run(NamedTuple):
    """A registered backend, the backend of Keras if that matters, and cases a property."""

    backend: str
    keras: str = ""
    max_examples: int = 200


RUNS = (
    Run("numpy"),
    Run("torch"),
    Run("torch-device", max_examples=100),  # one operation at a time
    Run("keras", "tensorflow", 50),
    Run("keras", "torch", 50),
    Run("keras", "jax", 25),  # compiles anew for almost every case
    Run("jax", max_examples=25),  # likewise
)


def run(chosen: Run) -> dict[str, Any]:
    """Results of one backend, from a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "results.json"
        command = [sys.executable, "-m", "st3core.conformance", chosen.backend]
        command += ["--max-examples", str(chosen.max_examples), "--json", str(out)]
        environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"} | (
            {"KERAS_BACKEND": chosen.keras} if chosen.keras else {}
        )
        finished = subprocess.run(command, env=environment, capture_output=True, text=True)
        if not out.exists():
            raise RuntimeError(f"{' '.join(command)}: {finished.stdout}{finished.stderr}")
        found: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
    return {"max_examples": chosen.max_examples, **found}


def catches(max_examples: int) -> dict[str, dict[str, Any]]:
    """For each broken backend its defect, the property that it ought to violate, and all that it did violate."""
    kinds = list(BROKEN)
    with ProcessPoolExecutor() as pool:
        caught = pool.map(partial(violated, max_examples), kinds)
        found = list(track(caught, "Broken backends", len(kinds), console=Console(stderr=True)))
    return {
        kind.__name__: {"defect": str(kind.__doc__), "ought_to_violate": BROKEN[kind], "violated": names}
        for kind, names in zip(kinds, found, strict=True)
    }


def violated(max_examples: int, kind: type[NumpyBackend]) -> list[str]:
    """Properties that a broken backend violates; the one that it ought to is asked with as many cases as users ask."""
    (ought,) = select([BROKEN[kind]])
    results = [*check(kind(), max_examples=max_examples), check_property(ought, kind())]
    failed = {result.chosen.name for result in results if result.failure is not None}
    return [p.name for p in PROPERTIES if p.name in failed]


def backend_grid(figures: dict[str, Any]) -> Grid:
    """A row a backend."""
    columns = ("backend", "passed", "failed", "not asked", "cases a property", "cases", "seconds")
    rows = []
    for run in figures["backends"]:
        outcomes = [row["outcome"] for row in run["results"]]
        counts = (str(outcomes.count(kind)) for kind in ("passed", "failed", "not asked"))
        cases, seconds = (sum(row[key] for row in run["results"]) for key in ("examples", "seconds"))
        rows.append((run["backend"], *counts, str(run["max_examples"]), f"{cases:,}", number(seconds)))
    return Grid("Backends", columns, tuple(rows))


def broken_grid(figures: dict[str, Any]) -> Grid:
    """A row a broken backend."""
    columns = ("defect", "ought to violate", "and violated too")
    rows = []
    for own in figures["broken"].values():
        ought = own["ought_to_violate"]
        others = [name for name in own["violated"] if name != ought]
        rows.append((own["defect"], f"`{ought}`", ", ".join(f"`{name}`" for name in others) or "—"))
    return Grid("Broken backends", columns, tuple(rows))


def property_grid() -> Grid:
    """A row a property."""
    rows = (
        (f"`{p.name}`", f"[{p.equation}](spec/{p.page}.md)", p.statement.replace("|w|", r"\|w\|")) for p in PROPERTIES
    )
    return Grid("Properties", ("property", "equation", "statement"), tuple(rows))


def as_prose(grid: Grid) -> str:
    """The table with its words at the left."""
    return grid.markdown().replace("---:", "---")


def page(text: str, figures: dict[str, Any]) -> str:
    """The page with the tables of these figures between its marks."""
    setting = figures["setting"]
    scale = (
        f"{len(figures['broken'])} backends, {figures['broken_max_examples']} cases a property, 200 where it matters"
    )
    tables = {
        "properties": as_prose(property_grid()),
        "backends": f"{machine.measured(setting)}; {machine.versions(setting)}:\n\n{backend_grid(figures).markdown()}",
        "broken": f"{scale}:\n\n{as_prose(broken_grid(figures))}",
    }
    for name, table in tables.items():
        text = replaced(text, f"{name}: from make conformance", table)
    return text


def parse_arguments() -> argparse.Namespace:
    """Options from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--broken-max-examples", type=int, default=20, help="cases a property for broken backends")
    parser.add_argument("--only", nargs="*", choices=PARTS, default=PARTS, help="parts to run; none: write the page")
    options = parser.parse_args()
    require_one(parser, options, ("broken_max_examples",))
    return options


def save(figures: dict[str, Any]) -> None:
    """Write the results."""
    RESULTS.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    """Run, save, and write the page."""
    options = parse_arguments()
    figures = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    if "backends" in options.only:
        figures["setting"] = machine.provenance("python -m benchmarks.conformance")
        figures["backends"] = [run(chosen) for chosen in track(RUNS, "Backends", console=Console(stderr=True))]
        save(figures)
    if "broken" in options.only:
        figures["broken_max_examples"] = options.broken_max_examples
        figures["broken"] = catches(options.broken_max_examples)
        save(figures)
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8"), figures), encoding="utf-8")
    backend_grid(figures).print(Console(width=140))


if __name__ == "__main__":
    main()
