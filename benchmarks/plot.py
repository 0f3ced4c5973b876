"""The picture on the page: time against size, and the alternatives as multiples."""

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks import layers, machine, sizes
from benchmarks.grid import number

_STYLES = {
    "read": ("#8c8c8c", "--"),
    "copy": ("#8c8c8c", ":"),
    sizes.COLD: ("#4c72b0", "-"),
    sizes.WARM: ("#55a868", "-"),
    sizes.OPERATOR: ("#dd8452", "-"),
    sizes.STEP: ("#c44e52", "-"),
}
_MARKERS = "osD^vPX"


def draw(figures: dict[str, Any], path: Path) -> None:
    """Write the picture; needs the parts ``sizes`` and ``layers``."""
    figure = Figure(figsize=(11, 5), layout="constrained")
    left, right = figure.subplots(1, 2)
    _draw_sizes(left, figures["parts"]["sizes"]["sizes"], figures["parts"]["layers"])
    _draw_ratios(right, figures["parts"]["layers"])
    figure.suptitle(f"float32, {100 * figures['setting']['sparsity']:g} % zeros, {machine.name(figures['setting'])}")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def _draw_sizes(axes: Axes, measured: list[dict[str, Any]], network: dict[str, Any]) -> None:
    counts = [size["weights"] for size in measured]
    for name, (color, line) in _STYLES.items():
        times = [size["rows"][name]["milliseconds"] for size in measured]
        axes.loglog(counts, times, line, color=color, label=name)
    for marker, (name, row) in zip(_MARKERS, network["alternatives"].items(), strict=True):
        axes.plot(network["weights"], row["milliseconds"], marker, color="black", markersize=5, label=_short(name))
    axes.set(xlabel="weights", ylabel="milliseconds on this machine", title="Time")
    axes.legend(fontsize=8, loc="upper left")
    axes.grid(alpha=0.3)


def _draw_ratios(axes: Axes, network: dict[str, Any]) -> None:
    rows = network["alternatives"]
    labels = [_short(name) for name in rows][::-1]
    ratios = [row["median"] for row in rows.values()][::-1]
    colors = ["#c44e52" if name in (layers.SORT_STEP, layers.PRUNE) else "#4c72b0" for name in rows][::-1]
    bars = axes.barh(labels, ratios, color=colors)
    axes.bar_label(bars, [f"{number(ratio)}×" for ratio in ratios], padding=3)
    axes.set(xscale="log", xlim=(1, 4 * max(ratios)), xlabel="red: in whole steps; blue: in cold searches")
    axes.set_title(f"Alternatives, {network['weights'] / 1e6:.1f} million weights of ResNet-50")
    axes.spines[["top", "right"]].set_visible(False)


def _short(name: str) -> str:
    return name.removeprefix("torch.nn.utils.").replace("torch: sort, ", "torch: sort,\n")
