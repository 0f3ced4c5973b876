"""What became of each layer: a table, a dictionary, a plot."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from os import PathLike
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class LayerReport:
    """One sparsified tensor.

    Args:
        name: of the tensor in the dense model.
        shape: of the tensor.
        zeros: weights that are exactly zero.
        dense_macs: multiply-adds of the layer for one call of the dense model; None if not counted.
        itemsize: bytes of one weight.
    """

    name: str
    shape: tuple[int, ...]
    zeros: int
    dense_macs: int | None = None
    itemsize: int = 4

    @property
    def weights(self) -> int:
        """Number of weights."""
        return prod(self.shape)

    @property
    def sparsity(self) -> float:
        """Share of zeros."""
        return self.zeros / self.weights if self.weights else 0.0

    @property
    def sparse_macs(self) -> float | None:
        """Multiply-adds with a weight that is not zero; every weight takes part equally often."""
        return None if self.dense_macs is None else self.dense_macs * (1 - self.sparsity)

    @property
    def dense_bytes(self) -> int:
        """Bytes of all weights."""
        return self.weights * self.itemsize

    @property
    def sparse_bytes(self) -> int:
        """Bytes of a bitmap with one bit a weight and of the weights that are not zero; dense where that is less."""
        bitmap = (self.weights + 7) // 8
        return min(bitmap + (self.weights - self.zeros) * self.itemsize, self.dense_bytes)


@dataclass(frozen=True)
class Report:
    """All sparsified tensors of a model. ``print`` it to see a table.

    Args:
        method: name of the method.
        target_sparsity: share of zeros that the schedule asked for.
        layers: one entry a tensor.
        skipped: why each other tensor of two dimensions or more stays dense, by its name.
    """

    method: str
    target_sparsity: float
    layers: tuple[LayerReport, ...]
    skipped: Mapping[str, str] = field(default_factory=dict)

    @property
    def weights(self) -> int:
        """Number of sparsified weights."""
        return sum(layer.weights for layer in self.layers)

    @property
    def zeros(self) -> int:
        """Number of weights that are exactly zero."""
        return sum(layer.zeros for layer in self.layers)

    @property
    def sparsity(self) -> float:
        """Share of zeros."""
        return self.zeros / self.weights if self.weights else 0.0

    @property
    def dense_macs(self) -> int | None:
        """Multiply-adds of the sparsified layers in the dense model; None if not counted."""
        counts = [layer.dense_macs for layer in self.layers]
        return None if None in counts else sum(count for count in counts if count is not None)

    @property
    def sparse_macs(self) -> float | None:
        """Multiply-adds of the sparsified layers with a weight that is not zero."""
        counts = [layer.sparse_macs for layer in self.layers]
        return None if None in counts else sum(count for count in counts if count is not None)

    @property
    def dense_bytes(self) -> int:
        """Bytes of the sparsified tensors with all their weights."""
        return sum(layer.dense_bytes for layer in self.layers)

    @property
    def sparse_bytes(self) -> int:
        """Bytes of the sparsified tensors, each stored as ``LayerReport.sparse_bytes`` says."""
        return sum(layer.sparse_bytes for layer in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """Everything as numbers, strings and lists, ready for JSON."""
        return {
            "method": self.method,
            "target_sparsity": self.target_sparsity,
            **_figures(self),
            "layers": [{"name": x.name, "shape": list(x.shape), **_figures(x)} for x in self.layers],
            "skipped": dict(self.skipped),
        }

    def __str__(self) -> str:
        """Table with a row a tensor and a total, a line of bytes, and one for each tensor that was skipped."""
        console_module, table_module = _rich()
        table = table_module.Table(title=f"{self.method}: target sparsity {self.target_sparsity:.4g}")
        table.add_column("tensor", overflow="fold")
        for column in ("shape", "weights", "zeros", "sparsity"):
            table.add_column(column, justify="right")
        if any(layer.dense_macs is not None for layer in self.layers):
            table.add_column("multiply-adds", justify="right")
            table.add_column("of dense", justify="right")
        for layer in self.layers:
            table.add_row(layer.name, "×".join(map(str, layer.shape)), *_cells(layer))
        table.add_section()
        table.add_row("total", "", *_cells(self))
        console = console_module.Console(width=120)
        with console.capture() as capture:
            console.print(table)
        stored = f"bytes: {self.dense_bytes:,} dense, {self.sparse_bytes:,} stored sparse"
        skipped = [f"skipped {name}: {why}" for name, why in self.skipped.items()]
        return "\n".join([str(capture.get()).rstrip(), stored, *skipped])

    def plot(self, path: str | PathLike[str] | None = None) -> "Figure":
        """Draw a bar chart of every tensor's sparsity.

        Args:
            path: of the file to write; the suffix decides the format (``.png``, ``.svg``, ``.pdf``). None: write none.

        Returns:
            The figure; a notebook shows it if it is what a cell ends with.

        Raises:
            ImportError: Matplotlib is not installed.
        """
        try:
            import matplotlib.pyplot  # noqa: F401 # lets notebooks show figures
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError(
                "plotting a report needs Matplotlib; install it with: pip install 'st3core[report]'"
            ) from error
        figure = Figure(figsize=(7, 1.5 + 0.3 * len(self.layers)), layout="constrained")
        self.draw(figure.subplots())
        if path is not None:
            figure.savefig(path, dpi=150)
        return figure

    def draw(self, axes: "Axes") -> None:
        """Draw the bar chart of :meth:`plot` into existing Matplotlib axes."""
        names = [layer.name for layer in self.layers][::-1]
        bars = axes.barh(names, [100 * layer.sparsity for layer in self.layers][::-1], color="#4c72b0")
        axes.bar_label(bars, fmt="%.1f", padding=3)
        axes.axvline(100 * self.sparsity, color="#c44e52", linestyle="--", label=f"all: {100 * self.sparsity:.2f} %")
        # Room for the legend below the bars.
        axes.set(
            xlabel="zeros (%)",
            xlim=(0, 112),
            ylim=(-1.3, len(names) - 0.4),
            title=f"Sparsity per tensor, {self.method}",
        )
        axes.set_xticks(range(0, 101, 20))
        axes.legend(loc="lower left")
        axes.spines[["top", "right"]].set_visible(False)


def _figures(part: LayerReport | Report) -> dict[str, Any]:
    fields = ("weights", "zeros", "sparsity", "dense_macs", "sparse_macs", "dense_bytes", "sparse_bytes")
    return {field: getattr(part, field) for field in fields}


def _cells(part: LayerReport | Report) -> list[str]:
    cells = [f"{part.weights:,}", f"{part.zeros:,}", f"{100 * part.sparsity:.2f} %"]
    if part.dense_macs is not None and part.sparse_macs is not None:
        share = part.sparse_macs / part.dense_macs if part.dense_macs else 0.0
        cells += [f"{part.dense_macs:,}", f"{100 * share:.2f} %"]
    return cells


def _rich() -> tuple[Any, Any]:
    try:
        import rich.console
        import rich.table
    except ImportError as error:
        raise ImportError("printing a report needs rich; install it with: pip install 'st3core[report]'") from error
    return rich.console, rich.table
