"""The command ``st3``: looks at models that are stored in files."""

from st3_cli.inspection import Inspection, inspect

__all__ = ["Inspection", "inspect"]
