"""Thresholds and sparsities on the way, as rows of a CSV file and as scalars for TensorBoard."""

import csv
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Protocol

from st3core.method import Method

StrPath = str | PathLike[str]


class ScalarWriter(Protocol):
    """What :func:`add_scalars` writes to, such as a ``SummaryWriter`` of PyTorch or tensorboardX."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int, /) -> object:
        """Note one number of one step."""


def threshold_metrics(thresholds: Mapping[str, float], method: Method, *, is_one: bool = True) -> dict[str, float]:
    """Thresholds by the names under which they are logged.

    Args:
        thresholds: of every kernel, by its name.
        method: that they belong to.
        is_one: False if something else than the method gives kernels thresholds of their own.

    Returns:
        ``threshold`` alone where one serves all kernels; otherwise ``threshold/NAME`` of each: where magnitudes are
        scaled, and where each layer or group has its own. That of N:M groups is their largest.

    Examples:
        >>> from st3core import get_method
        >>> threshold_metrics({"conv": 0.5, "linear": 0.5}, get_method("st3"))
        {'threshold': 0.5}
        >>> threshold_metrics({"conv": 0.5, "linear": 0.25}, get_method("st3_sigma"))
        {'threshold/conv': 0.5, 'threshold/linear': 0.25}
    """
    if is_one and method.scope == "global" and method.score == "magnitude":
        return {"threshold": max(thresholds.values())}  # kernels of different dtypes round it differently
    return {f"threshold/{name}": threshold for name, threshold in thresholds.items()}


def append_row(path: StrPath, row: Mapping[str, object]) -> None:
    """Add one line to a CSV file, which begins with a line of names.

    Args:
        path: of the file; made where there is none.
        row: values by name; always the same names.

    Raises:
        OSError: the folder does not exist or is not writable.
        ValueError: the file has other columns.

    Examples:
        >>> path = getfixture("tmp_path") / "log.csv"
        >>> append_row(path, {"step": 1, "sparsity": 0.25})
        >>> append_row(path, {"step": 2, "sparsity": 0.5})
        >>> print(path.read_text(), end="")
        step,sparsity
        1,0.25
        2,0.5
    """
    names, columns = list(row), _columns(path)
    if columns and columns != names:
        raise ValueError(f"append_row: {path} must have the columns {names}, got {columns}; write to another file")
    with open(path, "a", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        if not columns:
            writer.writerow(names)
        writer.writerow(row.values())


def read_rows(path: StrPath) -> list[dict[str, str]]:
    """The rows that :func:`append_row` has written, as text by name; none where there is no file."""
    if not Path(path).exists():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def keep_rows(path: StrPath, column: str, last: float) -> None:
    """Drop the rows of a CSV file that a run wrote after its last checkpoint; call it before the run goes on.

    Args:
        path: of the file; nothing happens where there is none.
        column: that counts, such as ``"step"``.
        last: its value in the checkpoint; rows with larger ones go.

    Raises:
        ValueError: the file has no such column.
    """
    rows, columns = read_rows(path), _columns(path)
    if rows and column not in columns:
        raise ValueError(f"keep_rows: {path} must have the column {column!r}, got {columns}")
    if rows:
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns, lineterminator="\n")
            writer.writeheader()
            writer.writerows(row for row in rows if float(row[column]) <= last)


def add_scalars(writer: ScalarWriter, values: Mapping[str, float], step: int, *, prefix: str = "st3/") -> None:
    """Note numbers of one step for TensorBoard.

    Args:
        writer: a ``SummaryWriter``, or anything with its ``add_scalar``.
        values: numbers by name, such as the adapters' ``metrics`` gives.
        step: that they belong to.
        prefix: of every name, which TensorBoard groups them by.
    """
    for name, value in values.items():
        writer.add_scalar(prefix + name, value, step)


def _columns(path: StrPath) -> list[str]:
    if not Path(path).exists():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        return next(csv.reader(file), [])
