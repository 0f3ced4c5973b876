"""Steps of training by Keras' ``fit``, dense and sparse by turns, on each backend.

Run it from the repository's root: ``python -m benchmarks.keras_step``. Each backend gets a process of its own, which
trains a dense and a sparse model by turns: one epoch of either is a round. Beside them, in the same process, the
core's own step over the same kernels: the search from a forecast, and the operator.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import packages_distributions, version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console

from benchmarks import machine
from benchmarks.grid import Grid, number, with_spread
from benchmarks.marked import replaced
from benchmarks.options import require_one, require_share
from benchmarks.step import operator, warm_search, whole_step
from benchmarks.timing import alternating, quartiles

BACKENDS = ("tensorflow", "jax", "torch")
RESULTS = Path(__file__).parent / "results/keras_step.json"
PAGE = Path(__file__).parent.parent / "docs/keras.md"
COMMAND = "python -m benchmarks.keras_step"
MARK = f"from {COMMAND}"
NETWORKS = {"100 variables": ([32] * 49 + [10], 64), "5 million weights": ([2048, 1408, 10], 1024)}
"""Units of each linear layer, and features of an input."""

_BATCH, _RAMP = 64, 100_000
_STEPS = {"100 variables": 100, "5 million weights": 12}
"""Steps of an epoch."""


class Epoch(NamedTuple):
    """Seconds of a step, and of what comes before the first and after the last one."""

    step: float
    around: float


def epochs(units: list[int], features: int, steps: int, sparsity: float) -> dict[str, Callable[[], Epoch]]:
    """An epoch of dense, and one of sparse training."""
    import keras

    from st3_keras import PolynomialSchedule, Sparsifier

    generator = np.random.default_rng(0)
    x = generator.standard_normal((_BATCH * steps, features), np.float32)
    y = generator.integers(units[-1], size=len(x))

    def epoch(sparse: bool) -> Callable[[], Epoch]:
        keras.utils.set_random_seed(0)
        layers = [keras.layers.Dense(n, activation="relu") for n in units[:-1]]
        model = keras.Sequential([keras.Input((features,)), *layers, keras.layers.Dense(units[-1])])
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(keras.optimizers.SGD(0.001, momentum=0.9), loss)
        schedule = PolynomialSchedule(sparsity, begin_step=0, end_step=_RAMP, initial_sparsity=0.875 * sparsity)
        times: dict[str, float] = {}

        class First(keras.callbacks.Callback):
            def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
                times.setdefault("first", time.perf_counter())

        class Last(keras.callbacks.Callback):
            def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
                times["last"] = time.perf_counter()

        # What the Sparsifier does once in an epoch is before the first, and behind the last.
        callbacks = [Last(), *([Sparsifier(model, schedule)] if sparse else []), First()]

        def run() -> Epoch:
            times.clear()
            start = time.perf_counter()
            model.fit(x, y, batch_size=_BATCH, shuffle=False, verbose=0, callbacks=callbacks)
            training = times["last"] - times["first"]
            return Epoch(training / steps, time.perf_counter() - start - training)

        return run

    return {"dense": epoch(False), "sparse": epoch(True)}


def core_step(units: list[int], features: int, sparsity: float) -> Callable[[], object]:
    """The core's own step over kernels of the same shapes."""
    generator, shapes = np.random.default_rng(0), zip([features, *units[:-1]], units, strict=True)
    weights = [generator.standard_normal(shape, np.float32) for shape in shapes]
    outputs = [np.empty_like(weight) for weight in weights]
    return whole_step(warm_search(weights, sparsity), operator(weights, outputs, channel_axis=-1))


def measure(network: str, sparsity: float, rounds: int) -> dict[str, Any]:
    """Figures of one network on the backend of this process."""
    units, features = NETWORKS[network]
    runs, core = epochs(units, features, _STEPS[network], sparsity), core_step(units, features, sparsity)
    for run in runs.values():
        run()
    seen: dict[str, list[Epoch]] = {name: [] for name in runs}
    own = []
    for turn in range(rounds):
        for name in list(runs)[:: -1 if turn % 2 else 1]:
            seen[name].append(runs[name]())
        own += alternating({"core": core}, 1, repeats=_STEPS[network])["core"]
    dense, sparse = (np.array(seen[name]) for name in ("dense", "sparse"))
    added = sparse - dense
    return {
        "rounds": rounds,
        "steps_a_round": _STEPS[network],
        "ratio": quartiles(sparse[:, 0] / dense[:, 0]),
        "added_in_core_steps": quartiles(added[:, 0] / own),
        "added_milliseconds": quartiles(1e3 * added[:, 0]),
        "added_milliseconds_around_an_epoch": quartiles(1e3 * added[:, 1]),
        "dense_milliseconds": 1e3 * float(np.median(dense[:, 0])),
        "core_milliseconds": 1e3 * float(np.median(own)),
    }


def in_process(backend: str, sparsity: float, rounds: int) -> dict[str, Any]:
    """Figures of one backend, from a process of its own."""
    command = [sys.executable, "-m", "benchmarks.keras_step", "--here"]
    command += ["--sparsity", str(sparsity), "--rounds", str(rounds)]
    environment = {**os.environ, "KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "3"}
    finished = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    figures: dict[str, Any] = json.loads(finished.stdout.splitlines()[-1])
    return figures


def backend_versions() -> dict[str, str]:
    """Of Keras and its backends."""
    installed = packages_distributions()
    return {name: version(installed[name][0]) for name in ("keras", *BACKENDS)}


def grid(figures: dict[str, dict[str, Any]]) -> Grid:
    """A row for each network on each backend."""
    columns = (
        "",
        "sparse step, in dense steps",
        "added to a step, in core steps",
        "added to a step, ms",
        "added to an epoch, ms",
        "dense step, ms",
    )
    rows = [
        (
            f"{network}, {backend}",
            with_spread(own["ratio"]),
            with_spread(own["added_in_core_steps"]),
            number(own["added_milliseconds"]["median"]),
            number(own["added_milliseconds_around_an_epoch"]["median"]),
            number(own["dense_milliseconds"]),
        )
        for backend, networks in figures.items()
        for network, own in networks.items()
    ]
    return Grid("A training step in Keras", columns, tuple(rows))


def table(figures: dict[str, Any]) -> str:
    """The table, and where its figures come from."""
    setting = figures["setting"]
    backends = ", ".join(f"{name} {found}" for name, found in setting["versions"].items())
    measured = f"{machine.measured(setting)}; {machine.versions(setting)}; {backends}."
    return f"{grid(figures['backends']).markdown()}\n\n{measured}"


def parse_arguments() -> argparse.Namespace:
    """Options from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, default=BACKENDS, help="backends to measure")
    parser.add_argument("--sparsity", type=float, default=0.9, help="share of zeros")
    parser.add_argument("--rounds", type=int, default=15, help="epochs of each model")
    parser.add_argument("--out", type=Path, default=RESULTS, help="JSON to write")
    parser.add_argument("--here", action="store_true", help="measure in this process, by KERAS_BACKEND; print JSON")
    options = parser.parse_args()
    require_one(parser, options, ("rounds",))
    require_share(parser, options)
    return options


def main() -> None:
    """Measure, print and save."""
    options = parse_arguments()
    if options.here:
        print(json.dumps({network: measure(network, options.sparsity, options.rounds) for network in NETWORKS}))
        return
    figures = {backend: in_process(backend, options.sparsity, options.rounds) for backend in options.backends}
    setting = {**machine.provenance(COMMAND), "sparsity": options.sparsity, "versions": backend_versions()}
    console = Console(width=140)
    console.print(f"{machine.name(setting)}; {machine.versions(setting)}")
    grid(figures).print(console)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    written = {"setting": setting, "backends": figures}
    options.out.write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")
    if options.out.resolve() == RESULTS.resolve():
        PAGE.write_text(replaced(PAGE.read_text(encoding="utf-8"), MARK, table(written)), encoding="utf-8")


if __name__ == "__main__":
    main()
