"""Tables that read the same on the terminal and on the page."""

from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from benchmarks.timing import Row


@dataclass(frozen=True)
class Grid:
    """Text in rows and columns; the first column is the row's name."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def print(self, console: Console) -> None:
        """Show it on the terminal."""
        table = Table(self.columns[0], title=self.title, title_justify="left")
        for column in self.columns[1:]:
            table.add_column(column, justify="right")
        for row in self.rows:
            table.add_row(*row)
        console.print(table)

    def markdown(self) -> str:
        """The table without its title."""
        lines = [self.columns, ("---", *("---:" for _ in self.columns[1:])), *self.rows]
        return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def number(value: float) -> str:
    """Three digits, all of them before the point where there are more."""
    if value != 0 and abs(value) < 0.0995:
        return f"{value:.2g}"
    digits = next((d for d, limit in ((2, 9.995), (1, 99.95)) if abs(value) < limit), 0)
    return f"{value:,.{digits}f}"


def spread(row: Row) -> str:
    """Both quartiles."""
    return f"{number(row['quartile_1'])} – {number(row['quartile_3'])}"


def with_spread(row: Row) -> str:
    """Median, and the quartiles behind it."""
    return f"{number(row['median'])} ({spread(row)})"
