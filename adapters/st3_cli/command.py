"""The command line."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from st3_cli.inspection import inspect


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``st3`` with these arguments, those of the command line by default; the exit status."""
    options = _parser().parse_args(arguments)
    try:
        found = inspect(options.model, show_all=options.all)
        print(json.dumps(found.to_dict(), indent=1) if options.json else found)
        if options.plot is not None:
            found.plot(options.plot)
    except (ImportError, OSError, ValueError) as error:
        print(f"st3: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("st3", description="Looks at sparse models.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    inspection = commands.add_parser(
        "inspect", help="sparsity, N:M patterns, bytes and multiply-adds of every tensor in a file"
    )
    inspection.add_argument("model", type=Path, help="file: .safetensors, .pt, .pth, .ckpt, .bin or .keras")
    inspection.add_argument("--all", action="store_true", help="tensors without zeros, biases and norms too")
    inspection.add_argument("--json", action="store_true", help="print JSON instead of a table")
    inspection.add_argument("--plot", type=Path, metavar="PATH", help="draw it: .png, .svg or .pdf")
    return parser
