"""The page on accuracy, made from what the three studies have written: ``python -m benchmarks.accuracy_page``."""

import json
from pathlib import Path
from typing import Any

from benchmarks import accuracy, machine
from benchmarks.accuracy_keras import ROWS, compare
from benchmarks.grid import Grid
from benchmarks.study.page import draw, section, summary

ROOT = Path(__file__).parent.parent
KERAS_RESULTS = ROOT / "benchmarks/results/accuracy_keras.json"
JAX_RESULTS = ROOT / "benchmarks/results/accuracy_jax.json"
SUMMARY = ROOT / "benchmarks/results/study_summary.json"
PAGE = ROOT / "docs/accuracy.md"
TEST_IMAGES = 450
BACKENDS = {"tensorflow": "TensorFlow", "jax": "JAX", "torch": "PyTorch"}

_PAGE = """# Accuracy

{study}
## Handwritten digits at {zeros} zeros

The network and recipe of `examples/digits.py`, scikit-learn's handwritten digits, {zeros} zeros, {epochs} epochs,
{seeds} seeds for each method. One test image of {images} is {image:.2f} %.

Read it with care: a tiny network on a tiny data set. The recipe is that of ST-3 and was not tuned for its neighbours.
Other seeds, versions and machines give other figures.

### The methods, in PyTorch

{methods}

Mean and standard deviation over the seeds, of networks of the study above.

Trained with {origin}.

### Keras beside the PyTorch adapter

The same network through `examples/digits_keras.py`, on each backend: the same split of the images, the same first
weights, and the same batches in the same order. The last column is the difference from the PyTorch adapter in standard
errors of the difference.

{keras}

Of these {pairs} differences {within} are within one standard error, and {beyond} beyond two. The largest
is {sparse:.2f} standard errors for the sparse networks, and {dense:.2f} for the dense one, in which this library has no
part. {seeds} seeds are too few to see a difference of less than about one percent.

From the same start, rounding alone leads two training runs to other weights, and three habits of the frameworks differ.
Gradients are clipped with the penalty in them in Keras, and before weight decay in PyTorch; the learning rate scales
what is added to the velocity in Keras, and the velocity itself in PyTorch; and the running variances of batch
normalization are unbiased in PyTorch only.

Measured with {keras_origin}.

### JAX beside the PyTorch adapter

The same through `examples/digits_jax.py`, with the same start. Gradients are clipped before weight decay, as in
PyTorch; the running variances of batch normalization are biased, as in Keras.

{jax}

Measured with {jax_origin}.

## How to repeat it

`make study` trains the networks of the study, of which the table of methods at one sparsity is made too, and writes
this page; what the study has trained before it keeps, so that it may be stopped. `make study-quick` trains every method
for a few steps, which says that it works and nothing more. `python -m benchmarks.accuracy_keras` and
`python -m benchmarks.accuracy_jax` train those of the other adapters, and `python -m benchmarks.accuracy_page` writes
the page again. `--help` lists what can be varied. The numbers are in `benchmarks/results/study.jsonl`, `accuracy.json`,
`accuracy_keras.json` and `accuracy_jax.json`.
"""


def page(figures: dict[str, Any], keras: dict[str, Any], jax: dict[str, Any], study: str) -> str:
    """Text of the page."""
    settings, methods = figures["settings"], figures["methods"]
    compared = _compared(methods, keras["backends"], settings["seeds"])
    apart = {pair: abs(row["difference_in_errors"]) for pair, row in compared.items()}
    return _PAGE.format(
        study=study,
        zeros=f"{100 * settings['sparsity']:g} %",
        epochs=settings["epochs"],
        seeds=settings["seeds"],
        images=TEST_IMAGES,
        image=100 / TEST_IMAGES,
        methods=accuracy.grid(methods).markdown(),
        keras=_adapter_grid(
            methods, {m: {f"Keras on {title}": compared[m, b] for b, title in BACKENDS.items()} for m in ROWS}
        ).markdown(),
        pairs=len(apart),
        within=sum(errors <= 1 for errors in apart.values()),
        beyond=sum(errors > 2 for errors in apart.values()) or "none",
        dense=max(errors for (method, _), errors in apart.items() if method == "dense"),
        sparse=max(errors for (method, _), errors in apart.items() if method != "dense"),
        origin=_origin(figures),
        keras_origin=_origin(keras),
        jax=_adapter_grid(
            methods, {m: {"JAX adapter": compare(jax["methods"][m], methods[m], settings["seeds"])} for m in ROWS}
        ).markdown(),
        jax_origin=_origin(jax),
    )


def write() -> None:
    """Write the page from the committed figures."""
    paths = accuracy.RESULTS, KERAS_RESULTS, JAX_RESULTS
    figures, keras, jax = (json.loads(path.read_text(encoding="utf-8")) for path in paths)
    draw()
    PAGE.write_text(page(figures, keras, jax, section()), encoding="utf-8")
    SUMMARY.write_text(json.dumps(summary(), indent=1) + "\n", encoding="utf-8")


def _compared(methods: dict[str, Any], backends: dict[str, Any], seeds: int) -> dict[tuple[str, str], dict[str, Any]]:
    """Figures of each method and backend beside those of the PyTorch adapter."""
    return {(m, b): compare(backends[b][m], methods[m], seeds) for m in ROWS for b in BACKENDS}


def _adapter_grid(methods: dict[str, Any], compared: dict[str, dict[str, dict[str, Any]]]) -> Grid:
    """Rows of each method: the PyTorch adapter, and others beside it by what they are called."""
    rows = []
    for method, others in compared.items():
        rows.append((f"`{method}`", "PyTorch adapter", *_spread(methods[method]), "", ""))
        for title, row in others.items():
            apart = f"{100 * row['difference']:+.2f}", f"{row['difference_in_errors']:+.2f}"
            rows.append((f"`{method}`", title, *_spread(row), *apart))
    columns = ("method", "trained with", "mean (%)", "deviation", "difference", "in its errors")
    return Grid("", columns, tuple(rows))


def _spread(row: dict[str, Any]) -> tuple[str, str]:
    return f"{100 * row['mean']:.2f}", f"{100 * row['standard_deviation']:.2f}"


def _origin(figures: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in figures["versions"].items())
    return f"{machine.measured(figures['origin'])}; {versions}" if "origin" in figures else versions  # of older ones


if __name__ == "__main__":
    write()
