"""Options that the full-size examples have in common."""

import argparse
from pathlib import Path


def at_least_one(text: str) -> int:
    """A count from the command line."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


def parser(
    description: str, *, out: str, epochs: int, batch_size: int, sparsity: float = 0.9
) -> argparse.ArgumentParser:
    """A parser with the options of :class:`examples.training.Settings`."""
    found = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    found.add_argument("--data", type=Path, required=True, help="folder of the data set")
    found.add_argument("--out", type=Path, default=Path(out), help="folder for checkpoint, log and weights")
    found.add_argument("--epochs", type=at_least_one, default=epochs, help="passes over the training images")
    found.add_argument(
        "--batch-size", type=at_least_one, default=batch_size, help="images of a step, in all processes together"
    )
    found.add_argument("--sparsity", type=float, default=sparsity, help="share of zeros at the end; 0 trains dense")
    found.add_argument("--method", default="st3", help="preset of st3core")
    found.add_argument("--seed", type=int, default=0, help="of first weights, order and augmentation")
    found.add_argument("--resume", action="store_true", help="go on from the checkpoint, if there is one")
    found.add_argument(
        "--stop-after", type=at_least_one, metavar="EPOCH", help="leave after this epoch; --resume goes on"
    )
    return found
