"""Speed of every part of a sparse step, side by side with its alternatives.

Run it from the repository's root: ``python -m benchmarks.speed``. Every round times every candidate once,
in this process; a table's ratios are medians over rounds, with their quartiles, so that other load on the
machine cancels. Milliseconds are of this machine and this hour.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks import bounds, dtypes, layers, machine, page, sizes, start, training
from benchmarks.options import require_one, require_share
from st3core.threads import thread_count

PARTS = tuple(page.GRIDS)


def measurements(options: argparse.Namespace) -> dict[str, Callable[[], dict[str, Any]]]:
    """What measures each part."""
    sparsity, rounds = options.sparsity, options.rounds
    return {
        "layers": lambda: layers.measure(sparsity, rounds),
        "sizes": lambda: sizes.measure(sparsity, rounds, huge=options.huge),
        "dtypes": lambda: dtypes.measure(sparsity, rounds),
        "start": start.measure,
        "training": lambda: training.measure(sparsity, rounds),
    }


def parse_arguments() -> argparse.Namespace:
    """Options from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="parts to measure; others stay")
    parser.add_argument("--huge", action="store_true", help="measure 10^9 weights too; takes 8 GB")
    parser.add_argument("--sparsity", type=float, default=0.9, help="share of zeros")
    parser.add_argument("--rounds", type=int, default=21, help="how often every fast candidate is timed")
    parser.add_argument(
        "--out", type=Path, default=page.RESULTS, help="JSON to write; from this one, page, picture and README are made"
    )
    options = parser.parse_args()
    require_one(parser, options, ("rounds",))
    require_share(parser, options)
    return options


def known_parts(path: Path, setting: dict[str, Any], only: list[str]) -> tuple[dict[str, Any], dict[str, str]]:
    """Parts of an earlier run that stay, and their commits; of the same machine, versions and sparsity."""
    if set(only) == set(PARTS) or not path.exists():
        return {}, {}
    figures = json.loads(path.read_text(encoding="utf-8"))
    if figures.get("setting") != setting:
        raise SystemExit(
            f"{path} has figures of another machine, other versions or another sparsity; measure all parts"
        )
    parts, commits = (
        {part: own for part, own in figures[key].items() if part not in only} for key in ("parts", "commits")
    )
    return parts, commits


def main() -> None:
    """Measure, print and save."""
    options = parse_arguments()
    torch.set_num_threads(thread_count())
    setting = {**machine.provenance("python -m benchmarks.speed"), "sparsity": options.sparsity}
    commit = setting.pop("commit")
    parts, commits = known_parts(options.out, setting, options.only)
    console = Console(width=140)
    console.print(f"{machine.name(setting)}; {machine.versions(setting)}; sparsity {options.sparsity}")
    for part, measure in measurements(options).items():
        if part in options.only:
            parts[part], commits[part] = measure(), commit
            for grid in page.GRIDS[part](parts[part]):
                grid.print(console)
    bounds.grid(parts).print(console)
    figures = {"setting": setting, "commits": commits, "parts": {part: parts[part] for part in PARTS if part in parts}}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    if options.out.resolve() == page.RESULTS.resolve():
        page.write(figures)


if __name__ == "__main__":
    main()
