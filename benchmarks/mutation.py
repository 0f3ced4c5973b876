"""Break the core in many small ways, one at a time, and see whether its tests notice.

Run it from the repository's root: ``make mutation``, in an environment that has the extra ``mutation``. It writes
``benchmarks/results/mutation.json`` and ``docs/mutation.md``, and changes a copy of the project only.
"""

import argparse
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import hypothesis
from rich.console import Console
from rich.progress import track

from benchmarks import machine, mutants, mutation_page
from benchmarks.mutation_page import PAGE, RESULTS
from benchmarks.options import require_one
from tests import conftest as conftest  # for its profiles

ROOT = Path(__file__).parent.parent

MODULES = tuple(sorted(mutation_page.modules()))

FIRST, LAST = ("test_golden.py", "test_vectors.py"), ("test_operators.py", "test_search.py")
"""Tests that see much in little time, and tests that take long."""

LEFT_OUT = "tests/st3core/test_search.py::test_a_good_forecast_settles_the_matter_in_one_look"
"""As long as all others together without compilation; test_counter.py asks the same of a faster counter."""

NEVER = 600
"""Seconds after which a run is ended that does not even come to a test."""

MEMORY = 6 << 30
"""Bytes that a test run may take: a mutant may ask for any number."""

ENVIRONMENT = {
    "NUMBA_DISABLE_JIT": "1",
    "NUMBA_NUM_THREADS": "2",
    "PYTHONHASHSEED": "0",
    "PYTHONDONTWRITEBYTECODE": "1",
}


_CONSOLE = Console(stderr=True)


@contextmanager
def working_copy() -> Iterator[Path]:
    """A copy of the project that is gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="mutation-") as folder:
        ignored = shutil.ignore_patterns(".git", ".venv", ".*_cache", ".hypothesis", "__pycache__", "_build", "runs")
        yield Path(shutil.copytree(ROOT, Path(folder) / "copy", ignore=ignored))


def arguments(module: str, copy: Path, patience: float) -> list[str]:
    """Of pytest: the tests named after the module, then all others of the core."""
    own = f"test_{module.lstrip('_')}.py"
    names = [path.name for path in (copy / "tests/st3core").glob("test_*.py")]
    names.sort(key=lambda name: (name != own, name not in FIRST, name in LAST, name))
    examples = (f"st3core/{name}.py" for name in sorted(MODULES, key=lambda name: name != module))
    paths = [*examples, *(f"tests/st3core/{name}" for name in names)]
    options = ["-x", "-q", "--no-header", "-p", "no:cacheprovider", "--hypothesis-profile", "mutation"]
    clock = ["-o", f"faulthandler_timeout={patience}", "-o", "faulthandler_exit_on_timeout=true"]
    return [*options, *clock, "--deselect", LEFT_OUT, *paths]


def test(module: str, copy: Path, patience: float) -> dict[str, Any]:
    """Outcome of the tests as they find the copy: ``survived``, ``killed`` or ``timeout``, and what failed first."""
    command = [sys.executable, "-m", "pytest", *arguments(module, copy, patience)]
    start = time.perf_counter()
    code, output = _finished(command, copy)
    late = code is None or re.search(r"Timeout \(\d+:\d\d:\d\d\)!", output)
    outcome = "timeout" if late else "killed" if code else "survived"
    by = _first_failure(output) if outcome == "killed" else ""
    return {"outcome": outcome, "by": by, "seconds": round(time.perf_counter() - start, 1)}


def _finished(command: list[str], copy: Path) -> tuple[int | None, str]:
    """Exit code, None if it never ended, and output; nothing that it has started goes on."""
    path = os.pathsep.join([str(copy), str(copy / "adapters")])
    environment = {**os.environ, **ENVIRONMENT, "PYTHONPATH": path}
    with tempfile.TemporaryFile("w+") as log:
        run = subprocess.Popen(command, cwd=copy, env=environment, stdout=log, stderr=log, start_new_session=True)
        try:
            code = run.wait(NEVER)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            with suppress(ProcessLookupError):
                os.killpg(run.pid, signal.SIGKILL)
            run.wait()
        log.seek(0)
        return code, log.read()


def _first_failure(output: str) -> str:
    found = re.search(r"^(?:FAILED|ERROR) (\S+)", output, re.MULTILINE)
    return found[1] if found else "the interpreter"  # which it took along


def verdict(mutant: mutants.Mutant, copy: Path, patience: float) -> dict[str, Any]:
    """The mutant and what became of it."""
    file = copy / f"st3core/{mutant.module}.py"
    source = file.read_text(encoding="utf-8")
    try:
        file.write_text(mutant.apply(source), encoding="utf-8")
        return {**mutant._asdict(), **test(mutant.module, copy, patience)}
    finally:
        file.write_text(source, encoding="utf-8")


def known() -> dict[str, dict[str, Any]]:
    """Mutants that the last run killed."""
    if not RESULTS.exists():
        return {}
    rows = json.loads(RESULTS.read_text(encoding="utf-8"))["mutants"]
    return {_name(row): row for row in rows if row["outcome"] != "survived"}


def _name(row: dict[str, Any]) -> str:
    return json.dumps([row[field] for field in ("module", "operator", "line", "before", "after")])


def run(options: argparse.Namespace) -> None:
    """Draw the sample, test every mutant, and save after each."""
    done = known() if options.survivors else {}
    with ExitStack() as stack:
        copies = [stack.enter_context(working_copy()) for _ in range(options.jobs)]
        paths = {module: copies[0] / f"st3core/{module}.py" for module in MODULES}
        drawn, places = mutants.sample(paths, options.sample, options.least)
        whole = test("", copies[0], options.patience)
        if whole["outcome"] != "survived":
            raise RuntimeError(f"run: the tests must pass without a mutant, but {whole['by']} fails")
        figures: dict[str, Any] = {"setting": {**_describe(options), "seconds": whole["seconds"], "places": places}}
        figures["mutants"] = []
        for row in track(_verdicts(drawn, done, copies, options.patience), "Mutants", len(drawn), console=_CONSOLE):
            figures["mutants"].append(row)
            options.out.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


def _verdicts(
    drawn: list[mutants.Mutant], done: dict[str, dict[str, Any]], copies: list[Path], patience: float
) -> Iterator[dict[str, Any]]:
    """In order; as many mutants at a time as there are copies."""
    free = list(copies)

    def one(mutant: mutants.Mutant) -> dict[str, Any]:
        if known_row := done.get(_name(mutant._asdict())):
            return known_row
        copy = free.pop()
        try:
            return verdict(mutant, copy, patience)
        finally:
            free.append(copy)

    with ThreadPoolExecutor(len(copies)) as pool:
        try:
            yield from pool.map(one, drawn)
        finally:
            pool.shutdown(cancel_futures=True)


def _describe(options: argparse.Namespace) -> dict[str, Any]:
    """What the results depend on; the commit is the last one that changed the core."""
    asked = ["git", "-C", str(ROOT), "log", "-1", "--format=%h", "--", "st3core"]
    commit = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
    return {
        **machine.provenance("python -m benchmarks.mutation"),
        "tool": version("cosmic-ray"),
        "commit": commit,
        "least": options.least,
        "patience": options.patience,
        "examples": hypothesis.settings.get_profile("mutation").max_examples,
        "left_out": LEFT_OUT.rpartition("::")[2],
    }


def parse_arguments() -> argparse.Namespace:
    """Options from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--sample", type=int, default=150, help="mutants, of all modules in proportion to their places")
    parser.add_argument("--least", type=int, default=4, help="mutants of each module at least")
    parser.add_argument("--patience", type=float, default=30, help="seconds that a single test may take")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="mutants that are tested side by side")
    parser.add_argument("--survivors", action="store_true", help="only those that the last run did not kill")
    parser.add_argument("--page-only", action="store_true", help="make the page anew from the results that are there")
    parser.add_argument("--out", type=Path, default=RESULTS, help="file to write the results to")
    options = parser.parse_args()
    require_one(parser, options, ("sample", "least", "patience", "jobs"))
    return options


def main() -> None:
    """Run, save, and write the page."""
    options = parse_arguments()
    if not options.page_only:
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        run(options)
    figures = json.loads(options.out.read_text(encoding="utf-8"))
    PAGE.write_text(mutation_page.page(figures), encoding="utf-8")
    mutation_page.module_grid(figures).print(Console(width=120))


if __name__ == "__main__":
    main()
