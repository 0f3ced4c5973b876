"""``python -m st3core.conformance package.module:Class``: a line a property, a summary, and an exit code."""

import argparse
import json
import sys
from pathlib import Path

from st3core.conformance.discovery import find_backend, list_backends
from st3core.conformance.run import PROPERTIES, Result, check, require_examples, select


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Options from the command line."""
    parser = argparse.ArgumentParser(prog="python -m st3core.conformance", description=__doc__)
    parser.add_argument("backend", nargs="?", help="package.module:Class, or a registered name (see --list)")
    parser.add_argument("--list", action="store_true", help="list registered backends and all properties, then end")
    parser.add_argument("--properties", metavar="NAMES", help="ask about these alone, with commas between them")
    parser.add_argument("--max-examples", type=int, default=200, metavar="N", help="cases a property (default: 200)")
    parser.add_argument("--seed", type=int, metavar="N", help="of the cases; without it they are always the same")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there too")
    options = parser.parse_args(arguments)
    if options.backend is None and not options.list:
        parser.error("the following argument is required: backend")
    if options.json is not None and not options.json.parent.is_dir():
        parser.error(f"argument --json: there is no folder {options.json.parent}")
    return options


def print_list() -> None:
    """What can be asked, and about what."""
    for name, place in list_backends().items():
        print(f"{name:<16} {place}")
    for chosen in PROPERTIES:
        print(f"{chosen.name:<46} equation {chosen.equation:<2}  {chosen.statement}")


def print_result(result: Result) -> None:
    """One line, and the message of a failure below it."""
    print(f"{result.outcome:<9} {result.chosen.name:<46} equation {result.chosen.equation:<2} {_details(result)}")
    if result.failure is not None:
        print(result.failure)
    sys.stdout.flush()


def _details(result: Result) -> str:
    if result.excuse is not None:
        return f"backend declares {result.excuse}"
    return f"{result.examples:>5} examples, {result.seconds:.1f} s"


def print_summary(name: str, results: list[Result]) -> None:
    """Totals of all properties."""
    outcomes = [result.outcome for result in results]
    examples, seconds = sum(r.examples for r in results), sum(r.seconds for r in results)
    counts = ", ".join(f"{outcomes.count(kind)} {kind}" for kind in ("passed", "failed", "not asked"))
    print(f"{name}: {counts}; {examples:,} examples in {seconds:.0f} s")


def save(path: Path, name: str, results: list[Result]) -> None:
    """Results as JSON."""
    rows = [
        {
            "property": r.chosen.name,
            "equation": r.chosen.equation,
            "outcome": r.outcome,
            "examples": r.examples,
            "seconds": round(r.seconds, 3),
            "excuse": r.excuse,
            "failure": r.failure,
        }
        for r in results
    ]
    path.write_text(json.dumps({"backend": name, "results": rows}, indent=1) + "\n", encoding="utf-8")


def main(arguments: list[str] | None = None) -> int:
    """Run the kit; 0 if the backend conforms, 1 if it does not, 2 if it could not be asked."""
    options = parse_arguments(arguments)
    if options.list:
        print_list()
        return 0
    names = None if options.properties is None else [name.strip() for name in options.properties.split(",")]
    try:
        backend = find_backend(options.backend)
        select(names)
        require_examples(options.max_examples)
    except Exception as error:  # whatever a backend raises while it is made
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    results = check(
        backend, properties=names, max_examples=options.max_examples, seed=options.seed, report=print_result
    )
    print_summary(backend.name, results)
    if options.json is not None:
        save(options.json, backend.name, results)
    return int(any(result.failure is not None for result in results))


if __name__ == "__main__":
    sys.exit(main())
