"""The page about mutants, made from the results and from what is said of the survivors."""

import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import machine
from benchmarks.grid import Grid

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks/results/mutation.json"
SURVIVORS = ROOT / "benchmarks/mutation_survivors.toml"
PAGE = ROOT / "docs/mutation.md"

Row = dict[str, Any]

_PAGE = """# Mutation testing

Tests are worth what they notice. Here, one small change at a time is made to the core, a `<` that becomes a `<=`, a `+`
that becomes a `-`, a 1 that becomes a 2, a loop that is never entered, and its tests run: they should fail. A changed
program is a *mutant*, and a failing test kills it.

```python
def kept(weights, threshold):
    return [w for w in weights if abs(w) > threshold]


def mutant(weights, threshold):
    return [w for w in weights if abs(w) >= threshold]


assert kept([0.5, -1.0], 0.7) == mutant([0.5, -1.0], 0.7)  # a test with this threshold lets the mutant live
assert kept([0.5, -1.0], 0.5) != mutant([0.5, -1.0], 0.5)  # a tie kills it
```

Of {drawn} mutants, the tests kill {killed}: **{share} %**. The other {survived} are listed below, each with the reason
why it may live.

{modules}

A *place* is an expression or a statement that [Cosmic Ray](https://cosmic-ray.readthedocs.io) can change, mostly in
several ways. The sample takes at most one mutant of each place, and of each module in proportion to its places, but at
least {least}. Hashes of the changed lines decide which, so the sample is the same for everybody and stays the same
where the code does. What no test of uncompiled code can see is not mutated: annotations, and the decorators and
intrinsics that Numba's compiler alone reads. A mutant counts only if it compiles, and to another program.

## What kills

The tests of the core without compilation, doctests among them, until the first one fails, with up to {examples} cases a
property; the one that takes longest, `{left_out}`, is left out.
Undisturbed they take {seconds} seconds together. A single test that takes {patience:g} ends the mutant too: its loop
does not end, or as good as. {timeouts}

## Survivors

{survivors}

## All mutants

{mutants}

## How to repeat it

`make mutation` draws the sample from the code as it is, tests it, and writes this page and
`benchmarks/results/mutation.json`; that takes about {minutes} minutes of a core's time. It changes temporary copies of
the project only. Reasons stand in `benchmarks/mutation_survivors.toml`. `python -m benchmarks.mutation --survivors`
tests again what survived the last time, and what is new, and `--page-only` writes the page anew.

These results: the core of commit {commit}; {machine}; {versions}; Cosmic Ray {tool}. {newer}
"""


def reasons() -> dict[tuple[str, str, str], str]:
    """Why survivors may live, by module and by the line before and after the change."""
    rows = tomllib.loads(SURVIVORS.read_text(encoding="utf-8"))["survivor"]
    return {(row["module"], row["before"], row["after"]): row["why"] for row in rows}


def change(row: Row) -> tuple[str, str, str]:
    """What :func:`reasons` are found by."""
    return row["module"], row["before"], row["after"]


def survivors(figures: dict[str, Any]) -> list[Row]:
    """Mutants that no test notices."""
    return [row for row in figures["mutants"] if row["outcome"] == "survived"]


def unexplained(figures: dict[str, Any]) -> list[Row]:
    """Survivors without a reason."""
    known = reasons()
    return [row for row in survivors(figures) if not known.get(change(row))]


def share_killed(figures: dict[str, Any]) -> float:
    """Share of the mutants that do not survive."""
    return 1 - len(survivors(figures)) / len(figures["mutants"])


def module_grid(figures: dict[str, Any]) -> Grid:
    """A row a module, and one for all of them."""
    places, rows = figures["setting"]["places"], figures["mutants"]
    lines = [_line(f"`{name}`", count, [r for r in rows if r["module"] == name]) for name, count in places.items()]
    columns = ("module", "places", "mutants", "killed by a test", "killed by the clock", "survived")
    return Grid("Mutants", columns, (*lines, _line("all", sum(places.values()), rows)))


def modules() -> set[str]:
    """Modules of the core as it is."""
    return {path.stem for path in (ROOT / "st3core").glob("*.py")} - {"__init__"}


def _newer(figures: dict[str, Any]) -> str:
    found = sorted(modules() - figures["setting"]["places"].keys())
    named = ", ".join(f"`{name}`" for name in found)
    return f"Modules that are newer, and not in the sample yet: {named}." if found else "They take in every module."


def page(figures: dict[str, Any]) -> str:
    """Text of the page."""
    setting, rows = figures["setting"], figures["mutants"]
    left = survivors(figures)
    return _PAGE.format(
        drawn=len(rows),
        killed=len(rows) - len(left),
        share=f"{100 * share_killed(figures):.1f}",
        survived=len(left),
        newer=_newer(figures),
        modules=module_grid(figures).markdown(),
        timeouts=_timeouts(rows),
        survivors=_reasons(left) or "None.",
        mutants=_mutant_grid(rows).markdown(),
        minutes=f"{sum(row['seconds'] for row in rows) / 60:.0f}",
        machine=machine.name(setting),
        versions=machine.versions(setting),
        **{key: setting[key] for key in ("least", "examples", "left_out", "patience", "commit", "tool")},
        seconds=f"{setting['seconds']:.0f}",
    )


def _line(name: str, places: int, rows: Sequence[Row]) -> tuple[str, ...]:
    outcomes = [row["outcome"] for row in rows]
    counts = (outcomes.count(kind) for kind in ("killed", "timeout", "survived"))
    return name, str(places), str(len(rows)), *(str(count) for count in counts)


def _timeouts(rows: Sequence[Row]) -> str:
    late = [f"`{_place(row)}`" for row in rows if row["outcome"] == "timeout"]
    return f"So ended {len(late)}: {', '.join(late)}." if late else "That happened to none."


def _reasons(left: Sequence[Row]) -> str:
    known = reasons()
    return "\n\n".join(f"**{_place(row)}**: {known.get(change(row), '')}\n\n{_difference(row)}" for row in left)


def _difference(row: Row) -> str:
    return "\n".join(["```diff", f"- {row['before']}", f"+ {row['after']}", "```"])


def _mutant_grid(rows: Sequence[Row]) -> Grid:
    columns = ("place", "change", "outcome", "first test that failed")
    return Grid("Mutants", columns, tuple((_place(r), _short(r["operator"]), r["outcome"], _test(r)) for r in rows))


def _place(row: Row) -> str:
    return f"{row['module']}.py:{row['line']}"


def _short(operator: str) -> str:
    return operator.partition("/")[2].removeprefix("Replace").replace("_", " ")


def _test(row: Row) -> str:
    return f"`{row['by'].rpartition('/')[2].partition('[')[0]}`" if row["by"] else ""
