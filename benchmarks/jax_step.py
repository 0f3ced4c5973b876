"""The sparse step in JAX beside the core's: warm search and forward weights of ResNet-50's kernels, on the CPU.

Both take turns in one process, see the same sparsity, and must find the same thresholds. Run it from the repository's
root: ``python -m benchmarks.jax_step``.
"""

import argparse
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks import shapes, step
from benchmarks.options import require_one
from benchmarks.timing import alternating
from st3_jax import PolynomialSchedule, Sparsifier

STEPS = 1000


def jax_step(weights: list[np.ndarray], sparsity: float) -> tuple[Callable[[], object], Callable[[], object]]:
    """The search, and search and forward weights: one compiled call each, with a sparsity that moves."""
    params = [jnp.asarray(weight) for weight in weights]
    schedule = PolynomialSchedule(sparsity, begin_step=0, end_step=STEPS, initial_sparsity=0.9 * sparsity)
    sparsifier = Sparsifier(schedule)
    update, apply = jax.jit(sparsifier.update), jax.jit(sparsifier.apply)
    state = sparsifier.init(params)

    def search() -> object:
        nonlocal state
        state = jax.block_until_ready(update(params, state))
        return state

    def whole() -> object:
        search()
        return jax.block_until_ready(apply(params, state))

    for _ in range(8):  # compiles, and lets the forecast settle
        whole()
    return search, whole


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
    options = parser.parse_args()
    require_one(parser, options, ("rounds",))
    return options


def main() -> None:
    """Measure and print."""
    options = parse_arguments()
    weights = shapes.keras_layout(shapes.he_normal(shapes.resnet50()))
    require_same_thresholds(weights, options.sparsity)
    own = step.warm_search(weights, options.sparsity)
    core = step.whole_step(own, step.operator(weights, [np.empty_like(w) for w in weights], channel_axis=-1))
    search, whole = jax_step(weights, options.sparsity)
    candidates = {"core: search": own, "core: step": core, "jax: search": search, "jax: step": whole}
    seconds = alternating(candidates, options.rounds)
    table = Table("", "median, ms", "lowest, ms", title="ResNet-50's kernels, float32")
    for name, values in seconds.items():
        table.add_row(name, f"{1e3 * np.median(values):.1f}", f"{1e3 * min(values):.1f}")
    Console().print(table)
    for part in ("search", "step"):
        low, middle, high = np.quantile(np.divide(seconds[f"jax: {part}"], seconds[f"core: {part}"]), (0.25, 0.5, 0.75))
        print(f"{part} in JAX, in the core's: {middle:.2f} (quartiles {low:.2f} to {high:.2f})")


if __name__ == "__main__":
    main()
