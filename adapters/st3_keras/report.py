"""What became of each variable, and which were left alone."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from st3core import report


@dataclass(frozen=True)
class Report(report.Report):
    """All sparsified variables of a model. ``print`` it to see a table.

    Args:
        method: name of the method.
        target_sparsity: share of zeros that the schedule asked for.
        layers: one entry a variable.
        skipped: why each other trainable variable of two dimensions or more stays dense, by its path.
    """

    skipped: Mapping[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Everything as numbers, strings and lists, ready for JSON."""
        return {**super().to_dict(), "skipped": dict(self.skipped)}

    def __str__(self) -> str:
        """Table with a row a variable and a total, and a line for each that was skipped."""
        return "\n".join([super().__str__(), *(f"skipped {name}: {why}" for name, why in self.skipped.items())])
