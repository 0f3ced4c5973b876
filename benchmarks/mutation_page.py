"""The page about mutants, made from the results and from what is said of the survivors."""

import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks import machine
from benchmarks.grid import Grid

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks/results/mutation.json"
SURVIVORS = ROOT / "benchmarks/mutation_survivors.toml"
PAGE = ROOT / "docs/mutation.md"
