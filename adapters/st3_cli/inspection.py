"""What a file's zeros are like: a table, a dictionary, a plot."""

from collections import Counter
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from st3_cli.stored import Stored, Unread, read
from st3core.patterns import smallest_n
from st3core.report import LayerReport, Report

if TYPE_CHECKING:
    from matplotlib.axes import Axes

GROUP = 4
"""M of the patterns that are looked for: sparse matrix units of GPUs take 2:4."""

_COLUMNS = ("shape", "weights", "sparsity", "N:4", "2:4", "bytes", "sparse bytes", "multiply-adds", "left")


@dataclass(frozen=True)
class Inspection:
    """The tensors of a file. ``print`` it to see a table.

    Args:
        name: of the file.
        report: a layer for every tensor that is shown.
        smallest_n: of every one of them that has an input dimension, the smallest N for which it is N:4.
        hidden: tensors that are not shown because they have no zeros, or are no kernels.
    """

    name: str
    report: Report
    smallest_n: dict[str, int]
    hidden: int

    def to_dict(self) -> dict[str, Any]:
        """Everything as numbers, strings and lists, ready for JSON."""
        figures = self.report.to_dict()
        for layer in figures["layers"]:
            n = self.smallest_n.get(layer["name"])
            layer |= {"smallest_n_of_4": n, "is_2_of_4": None if n is None else n <= 2}
        left = {key: value for key, value in figures.items() if key not in ("method", "target_sparsity")}
        return {"file": self.name, **left, "hidden": self.hidden}

    def __str__(self) -> str:
        """Table with a row a tensor and a total, and a line about what is not in it."""
        try:
            from rich.console import Console
            from rich.table import Table
        except ImportError as error:
            raise ImportError("st3 inspect needs rich; install it with: pip install 'st3core[cli]'") from error
        table = Table("tensor", title=self.name)
        for name in _COLUMNS if self._is_counted else _COLUMNS[:-2]:
            table.add_column(name, justify="right")
        for layer in self.report.layers:
            shape = "×".join(map(str, layer.shape))
            table.add_row(layer.name, shape, *self._cells(layer, self.smallest_n.get(layer.name)))
        table.add_section()
        table.add_row("total", "", *self._cells(self.report, max(self.smallest_n.values(), default=None)))
        console = Console(width=140)
        with console.capture() as capture:
            console.print(table)
        return "\n".join([capture.get().rstrip(), *self._notes()])

    @property
    def _is_counted(self) -> bool:
        """Whether multiply-adds of any tensor are known."""
        return any(layer.dense_macs is not None for layer in self.report.layers)

    def _cells(self, part: LayerReport | Report, n: int | None) -> list[str]:
        pattern = ["", ""] if n is None else [f"{n}:{GROUP}", "yes" if n <= 2 else "no"]
        cells = [f"{part.weights:,}", f"{100 * part.sparsity:.2f} %", *pattern]
        cells += [f"{part.dense_bytes:,}", f"{part.sparse_bytes:,}"]
        if self._is_counted and part.dense_macs is not None and part.sparse_macs is not None:
            cells += [f"{part.dense_macs:,}", f"{part.sparse_macs:,.0f}"]
        return cells

    def _notes(self) -> list[str]:
        hidden = [f"{self.hidden} tensors without zeros, or with less than two dimensions: --all shows them"]
        kinds = Counter(self.report.skipped.values())
        unread = [f"{count} of {kind} not read" for kind, count in kinds.items()]
        return hidden * (self.hidden > 0) + unread

    def plot(self, path: str | PathLike[str]) -> None:
        """Draw the sparsity of every tensor, and the bytes that are left of it.

        Args:
            path: of the file to write; the suffix decides the format (``.png``, ``.svg``, ``.pdf``).
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError(
                "st3 inspect --plot needs Matplotlib; install it with: pip install 'st3core[cli]'"
            ) from error
        figure = Figure(figsize=(12, 1.5 + 0.3 * len(self.report.layers)), layout="constrained")
        sparsity, size = figure.subplots(1, 2, sharey=True)
        self.report.draw(sparsity)
        self._draw_bytes(size)
        figure.savefig(path, dpi=150)

    def _draw_bytes(self, axes: "Axes") -> None:
        layers = self.report.layers[::-1]
        names = [layer.name for layer in layers]
        axes.barh(names, [layer.dense_bytes / 1e6 for layer in layers], color="#d0d0d0", label="dense")
        axes.barh(names, [layer.sparse_bytes / 1e6 for layer in layers], color="#4c72b0", label="stored sparse")
        axes.set(xlabel="megabytes", title="Bytes per tensor")
        axes.legend(loc="lower right")
        axes.spines[["top", "right"]].set_visible(False)


def inspect(path: str | PathLike[str], *, show_all: bool = False) -> Inspection:
    """Look at a model's file, one tensor at a time.

    Args:
        path: of a file of safetensors (``.safetensors``), of PyTorch (``.pt``, ``.pth``, ``.ckpt``, ``.bin``) or of
            Keras (``.keras``). Nothing in it is executed.
        show_all: also tensors without zeros, and those of less than two dimensions.

    Returns:
        What is in it; prints as a table.

    Raises:
        FileNotFoundError: there is no such file.
        ImportError: what reads it is not installed.
        ValueError: it is of an unknown kind, or damaged, or holds a model that is still sparsified.
    """
    layers, patterns, unread, hidden = [], {}, {}, 0
    for entry in read(Path(path)):
        if isinstance(entry, Unread):
            unread[entry.name] = entry.kind
        elif show_all or (entry.kept.ndim > 1 and not entry.kept.all()):
            layers.append(_layer(entry))
            if entry.input_axis is not None:
                patterns[entry.name] = smallest_n(entry.kept, GROUP, axis=entry.input_axis)
        else:
            hidden += 1
    name = Path(path).name
    report = Report(name, 0.0, tuple(layers), unread)
    return Inspection(name, report, patterns, hidden)


def _layer(entry: Stored) -> LayerReport:
    zeros = entry.kept.size - int(entry.kept.sum())
    return LayerReport(entry.name, entry.kept.shape, zeros, entry.dense_macs, entry.itemsize)
