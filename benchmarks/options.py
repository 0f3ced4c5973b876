"""What the options of several programs must satisfy."""

import argparse
from collections.abc import Sequence


def require_one(parser: argparse.ArgumentParser, options: argparse.Namespace, names: Sequence[str]) -> None:
    """Each of these options must be at least 1; else the program ends with a message."""
    for name in names:
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(options, name)}")


def require_share(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """The sparsity must leave some weights and zero some; else the program ends with a message."""
    if not 0 < options.sparsity < 1:
        parser.error(f"--sparsity must be between 0 and 1, got {options.sparsity}")
