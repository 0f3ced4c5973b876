"""The sparse step in JAX beside the core's: warm search and forward weights of ResNet-50's kernels, on the CPU.

Both take turns in one process, see the same sparsity, and must find the same thresholds. Run it from the repository's
root: ``python -m benchmarks.jax_step``.
"""

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from benchmarks import machine, shapes, step
from benchmarks.grid import Grid, number, with_spread
from benchmarks.marked import replaced
from benchmarks.options import require_one
from benchmarks.timing import alternating, quartiles
from st3_jax import PolynomialSchedule, Sparsifier

RESULTS = Path(__file__).parent / "results/jax_step.json"
PAGE = Path(__file__).parent.parent / "docs/jax.md"
COMMAND = "python -m benchmarks.jax_step"
MARK = f"from {COMMAND}"
STEPS = 1000
PARTS = {"search": "search", "apply": "forward weights", "step": "both"}


def jax_step(weights: list[np.ndarray], sparsity: float) -> dict[str, Callable[[], object]]:
    """The search, the forward weights, and both: compiled calls, with a sparsity that moves."""
    params = [jnp.asarray(weight) for weight in weights]
    schedule = PolynomialSchedule(sparsity, begin_step=0, end_step=STEPS, initial_sparsity=0.9 * sparsity)
    sparsifier = Sparsifier(schedule)
    update, apply = jax.jit(sparsifier.update), jax.jit(sparsifier.apply)
    state = sparsifier.init(params)

    def search() -> object:
        nonlocal state
        state = jax.block_until_ready(update(params, state))
        return state

    def forward() -> object:
        return jax.block_until_ready(apply(params, state))

    def whole() -> object:
        search()
        return forward()

    for _ in range(8):  # compiles, and lets the forecast settle
        whole()
    return {"search": search, "apply": forward, "step": whole}


def require_same_thresholds(weights: list[np.ndarray], sparsity: float) -> None:
    """Raise a RuntimeError unless both find the same thresholds."""
    params, sparsifier = (
        [jnp.asarray(w) for w in weights],
        Sparsifier(PolynomialSchedule(sparsity, begin_step=0, end_step=0)),
    )
    found = list(sparsifier.thresholds(params, sparsifier.init(params)).values())
    expected = step.cold_search(weights, sparsity)().tolist()
    if found != expected:
        raise RuntimeError(f"thresholds differ: {found} and {expected}")


def parse_arguments() -> argparse.Namespace:
    """Options from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--sparsity", type=float, default=0.9, help="share of zeros")
    parser.add_argument("--rounds", type=int, default=30, help="turns of each")
    parser.add_argument("--out", type=Path, default=RESULTS, help="JSON to write")
    options = parser.parse_args()
    require_one(parser, options, ("rounds",))
    return options


def measure(sparsity: float, rounds: int) -> dict[str, Any]:
    """Figures of each part: time in the core's, and milliseconds of both."""
    weights = shapes.keras_layout(shapes.he_normal(shapes.resnet50()))
    require_same_thresholds(weights, sparsity)
    search = step.warm_search(weights, sparsity)
    operator = step.operator(weights, [np.empty_like(w) for w in weights], channel_axis=-1)
    apply, whole = partial(operator, search()), step.whole_step(search, operator)
    calls: dict[str, Callable[[], object]] = {"core search": search, "core apply": apply, "core step": whole}
    calls |= {f"jax {part}": call for part, call in jax_step(weights, sparsity).items()}
    seconds = alternating(calls, rounds)
    return {
        part: {
            "in_core": quartiles(np.divide(seconds[f"jax {part}"], seconds[f"core {part}"])),
            "milliseconds": 1e3 * float(np.median(seconds[f"jax {part}"])),
            "core_milliseconds": 1e3 * float(np.median(seconds[f"core {part}"])),
        }
        for part in PARTS
    }


def table(figures: dict[str, Any]) -> str:
    """The table, and where its figures come from."""
    setting = figures["setting"]
    software = f"{machine.versions(setting)}, JAX {setting['jax']}"
    return f"{grid(figures).markdown()}\n\n{machine.measured(setting)}; {software}; {setting['rounds']} rounds."


def grid(figures: dict[str, Any]) -> Grid:
    """A row for each part of a step."""
    rows = (
        (
            PARTS[part],
            with_spread(own["in_core"]),
            number(own["milliseconds"]),
            number(own["core_milliseconds"]),
        )
        for part, own in figures["parts"].items()
    )
    return Grid("A sparse step in JAX", ("", "JAX, in the core's time", "JAX, ms", "core, ms"), tuple(rows))


def main() -> None:
    """Measure, print and save."""
    options = parse_arguments()
    setting = {**machine.provenance(COMMAND), "jax": jax.__version__, "rounds": options.rounds}
    parts = measure(options.sparsity, options.rounds)
    figures = {"setting": {**setting, "sparsity": options.sparsity}, "parts": parts}
    grid(figures).print(Console())
    options.out.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    if options.out.resolve() == RESULTS.resolve():
        PAGE.write_text(replaced(PAGE.read_text(encoding="utf-8"), MARK, table(figures)), encoding="utf-8")


if __name__ == "__main__":
    main()
