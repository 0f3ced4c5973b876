"""The page, its picture and the README's table, all made from the JSON: ``python -m benchmarks.page``."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import bounds, dtypes, layers, machine, plot, sizes, start, training
from benchmarks.grid import Grid
from benchmarks.marked import replaced

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks/results/speed.json"
PAGE = ROOT / "docs/performance.md"
PICTURE = ROOT / "docs/images/speed.png"
README = ROOT / "README.md"

GRIDS: dict[str, Callable[[dict[str, Any]], list[Grid]]] = {
    "layers": layers.grids,
    "sizes": sizes.grids,
    "dtypes": dtypes.grids,
    "start": start.grids,
    "training": training.grids,
}
"""Parts of the measurements in the order of the page, and what makes their tables."""

_TEXTS = {
    "layers": """## The kernels of ResNet-50

{weights:,} float32 weights in {tensors} tensors. The warm search is that of training: it carries on from the threshold
of the step before, while the sparsity rises. The cold search knows nothing. Both give the same bits. The alternatives
that find a threshold get all magnitudes in one array, made beforehand; those that make the zeros get the weights, as
the library does. All tensors lie one behind the other, in the memory that the read and the copy beside them take. The
operator without rescale and `sparsify` write into memory that is there already. Medians of {rounds} rounds, and of
{slow_rounds} for the alternatives.

A processor whose last cache holds all of these weights reads them in so little time that the searches are further
above a read. A cold search counts in about one read, and spends the rest on the keys near the threshold and on the
sample that says where these are. Sorting is compared with a whole step, of which little is left to save: a step that
reads once and copies once, and does nothing else, would be {sort_at_floor:,.0f} times as fast as sorting.""",
    "sizes": """## Size

One float32 tensor, in output channels of 1000 weights. "Traced" is the peak of what Python and NumPy allocate during
the call; the growth is that of a fresh process's largest size, on top of weights and result. Small tensors stay in the
processor's caches, whose speed the slopes see too: compare them with those of the read and of the copy.""",
    "dtypes": """## Dtype

The kernels of ResNet-50 again. A read or copy is one of as many bytes as the weights take in that dtype.""",
    "start": """## Start

Fresh processes, and a search over a million float32 weights. Numba compiles a kernel once and keeps it on disk.""",
    "training": """## Training in PyTorch

A dense and a sparse model are trained by turns, with momentum: step by step for the ResNet-50, in short blocks of steps
for the small layers. The sparse step has everything in it: the forward weights, their gradient, and the next threshold
from `Sparsifier.step()`. The sparsity rises as in the second half of a ramp over ten thousand steps.

For small layers, the same calls take far less when nothing comes between them (the last two rows): in training, code
and data have left the processor's caches by the time they are needed again, and what this library does drives out some
of what PyTorch needs next. The search is one call into compiled code already; the next idea is to let the optimizer's
own pass over the weights count their keys, so that they are not visited once more.""",
}

_PAGE = """# Performance

Every sparse training step has to look at all weights to find the threshold, and to write all of them to apply it. The
floor is to read the weights once and to copy them once. This page says how far above the floor the library is, and how
far above the library the alternatives are.

Compare ratios: all candidates of a table take turns in one process, and a ratio is formed within each round, so that
other load on the machine cancels. The number is the median over the rounds, with the quartiles beside it. Everywhere,
{zeros} of the weights become zero. Milliseconds are those of one machine at one hour:

- {machine}
- {versions}
- `{command}`, at commit {commits}

![Time against number of weights, and the alternatives as multiples](images/speed.png)

## Bound and measured

{bounds}

A "no" is a bound that this run missed. A slope below the range is time that grows more slowly than the weights do: at
10^6 weights the search's fixed cost (two calls of other threads, and a sample) still shows.

{sections}

## How to repeat it

`make bench` measures everything again and writes this page, its picture, the table in the README and
`benchmarks/results/speed.json`. `python -m benchmarks.speed --help` lists what can be varied: `--only sizes dtypes`
measures those parts alone, `--huge` adds a tensor of 10^9 weights, which takes 8 GB. For a first impression of other
weights, this is enough:

```python
import time

import numpy as np

import st3core

weights = [np.random.default_rng(seed).standard_normal((256, 1024), np.float32) for seed in range(4)]
outputs = [np.empty_like(weight) for weight in weights]


def step():
    thresholds = st3core.find_thresholds(weights, 0.9)
    for weight, threshold, output in zip(weights, thresholds, outputs):
        st3core.sparsify(weight, threshold, out=output, check_finite=False)


step()  # the first call loads the kernels, or compiles them
start = time.perf_counter()
step()
print(f"{{1e3 * (time.perf_counter() - start):.2f}} ms")
```
"""

MARK = "from make bench"


def page(figures: dict[str, Any]) -> str:
    """Text of the page."""
    parts, setting = figures["parts"], figures["setting"]
    return _PAGE.format(
        machine=machine.name(setting),
        versions=machine.versions(setting),
        command=setting["command"],
        commits=", ".join(dict.fromkeys(figures["commits"].values())),
        zeros=f"{100 * setting['sparsity']:g} %",
        bounds=bounds.grid(parts).markdown(),
        sections="\n\n".join(_section(name, parts[name]) for name in GRIDS if name in parts),
    )


def readme_table(figures: dict[str, Any]) -> str:
    """The README's table of ratios."""
    setting = figures["setting"]
    title = f"{machine.name(setting)}, {100 * setting['sparsity']:g} % zeros"
    return bounds.ratio_grid(figures["parts"], title).markdown()


def write(figures: dict[str, Any]) -> None:
    """Write the page, the README's table and, where its parts have been measured, the picture."""
    PAGE.write_text(page(figures), encoding="utf-8")
    readme = replaced(README.read_text(encoding="utf-8"), MARK, readme_table(figures))
    README.write_text(readme, encoding="utf-8")
    if {"sizes", "layers"} <= set(figures["parts"]):
        plot.draw(figures, PICTURE)


def _section(part: str, figures: dict[str, Any]) -> str:
    tables = GRIDS[part](figures)
    derived = {"sort_at_floor": layers.sort_at_floor(figures)} if part == "layers" else {}
    texts = [f"{grid.title}:\n\n{grid.markdown()}" if len(tables) > 1 else grid.markdown() for grid in tables]
    return "\n\n".join([_TEXTS[part].format_map(figures | derived), *texts])


if __name__ == "__main__":
    write(json.loads(RESULTS.read_text(encoding="utf-8")))
