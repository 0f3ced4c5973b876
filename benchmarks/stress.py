"""Many callers at once, threads and processes: no crash, no hang, no wrong bit.

What a single caller gets is compared with the plain NumPy reference once; everything after is compared with that
byte by byte. Run it from the repository's root: ``python -m benchmarks.stress``. It exits with 1 if anything is
wrong. With ``NUMBA_THREADING_LAYER`` set, only that layer is tried.
"""

import argparse
import faulthandler
import functools
import hashlib
import itertools
import multiprocessing
import os
import random
import subprocess
import sys
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import numba
import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from st3core import PolynomialSchedule, backward, find_thresholds, get_method, reference, sparsify
from st3core.memory import MEMORY_FORMATS
from st3core.threads import SERIAL_BELOW, thread_count

# PyTorch is imported where it is used: a spawned child imports this file, and most of them can do without.

Tally = tuple[Counter[str], list[str]]
"""Calls by name, and what was wrong."""

HANG = 300.0
"""Seconds after which a child, or a call in a thread, counts as hanging."""

AT_ONCE = 4
"""Children that run at the same time."""

LAYERS = ("workqueue", "omp", "tbb")
WIDE = (SERIAL_BELOW // 640 + 1, 640)
SHAPES = {WIDE: 0, (3, 3, 32, SERIAL_BELOW // 288 + 1): 3, (16, 30, 3, 3): 0}
"""Shapes and the axis of their output channels; the first two are large enough for several threads."""

KINDS = (*MEMORY_FORMATS, "ties")
THRESHOLD, SPARSITY = 0.8, 0.9
SCHEDULE = PolynomialSchedule(SPARSITY, begin_step=0, end_step=3)
RATE = 2.0**-10


class Case(NamedTuple):
    """One call: which function, on which weights, by which method."""

    function: str
    kind: str
    shape: tuple[int, ...]
    method: str


CASES = [
    Case(function, kind, shape, method)
    for function, methods in (
        ("find_thresholds", ("st3", "st3_sigma")),
        ("sparsify", ("st3", "hard_ste")),
        ("backward", ("st3", "gmp")),
    )
    for kind, shape, method in itertools.product(KINDS, SHAPES, methods)
]


@functools.cache
def weights(kind: str, shape: tuple[int, ...]) -> NDArray[Any]:
    """Normal weights of one dtype; ``"ties"`` are float32, all of the same magnitude."""
    normal = np.random.default_rng(0).standard_normal(shape)
    if kind == "ties":
        return np.copysign(1.0, normal).astype(np.float32)
    # Multiples of one power of two: float64 sums are exact in any order, so the rescale has one right answer.
    return (np.round(normal * 2.0**20) * 2.0**-20).astype(MEMORY_FORMATS[kind].dtype)


def found(case: Case) -> bytes:
    """What the library says."""
    weight, axis = weights(case.kind, case.shape), SHAPES[case.shape]
    if case.function == "find_thresholds":
        return find_thresholds([weight, weight[:1]], SPARSITY, case.method).tobytes()
    if case.function == "sparsify":
        return sparsify(weight, THRESHOLD, case.method, channel_axis=axis).tobytes()
    return backward(weight, weight, THRESHOLD, case.method, channel_axis=axis).tobytes()


def expected(case: Case) -> bytes:
    """What the reference says."""
    weight, method = weights(case.kind, case.shape), get_method(case.method)
    if case.function == "find_thresholds":
        return reference.find_thresholds([weight, weight[:1]], SPARSITY, method.score).tobytes()
    if case.function == "sparsify":
        parts: dict[str, Any] = {"operator": method.operator, "rescale": method.rescale}
        return reference.sparsify(weight, THRESHOLD, channel_axes=(SHAPES[case.shape],), **parts).tobytes()
    return reference.backward(weight, weight, THRESHOLD, rule=method.backward).tobytes()


def inputs() -> NDArray[np.float32]:
    """A batch of small whole numbers, whose sums and products are exact in float32."""
    return np.random.default_rng(1).integers(-8, 8, (32, WIDE[1])).astype(np.float32)


def trained() -> bytes:
    """Threshold and weight of a linear layer after three sparse steps with PyTorch."""
    import torch

    from st3_torch import Sparsifier

    model = torch.nn.Linear(WIDE[1], WIDE[0], bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.from_numpy(weights("float32", WIDE)))
    sparsifier, batch = Sparsifier(model, SCHEDULE), torch.from_numpy(inputs())
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    for _ in range(SCHEDULE.end_step):
        optimizer.zero_grad()
        model(batch).sum().backward()
        optimizer.step()
        sparsifier.step()
    (threshold,) = sparsifier.thresholds.values()
    sparsifier.finalize()
    return np.float64(threshold).tobytes() + model.weight.detach().numpy().tobytes()


def expected_training() -> bytes:
    """The same by the reference: the gradient is the sum of the batch, exactly."""
    weight = weights("float32", WIDE).copy()
    for _ in range(SCHEDULE.end_step):
        weight -= np.float32(RATE) * inputs().sum(0)
    (threshold,) = reference.find_thresholds([weight], SPARSITY, "magnitude")
    forward = reference.sparsify(weight, threshold, operator="soft", rescale="channel", channel_axes=(0,))
    return np.float64(threshold).tobytes() + forward.tobytes()


def call_until(stop: threading.Event, right: dict[Case, bytes], seed: int) -> Tally:
    """All cases in an order of this thread's own, again and again."""
    calls, wrong = Counter[str](), []
    for case in itertools.cycle(random.Random(seed).sample(CASES, len(CASES))):
        if stop.is_set():
            break
        calls[case.function] += 1
        if found(case) != right[case]:
            wrong.append(f"wrong bits: {case}")
    return calls, wrong


def multiply_until(stop: threading.Event) -> Tally:
    """PyTorch's OpenMP threads at work; whole numbers, so that the product has one right answer."""
    import torch

    matrix = torch.from_numpy(np.random.default_rng(2).integers(-8, 8, (512, 512)).astype(np.float32))
    right, calls, wrong = (matrix.double() @ matrix.double()).float(), 0, 0
    while not stop.is_set():
        calls += 1
        wrong += not torch.equal(matrix @ matrix, right)
    return Counter({"torch.matmul": calls}), ["wrong bits: torch.matmul"] * wrong


def _sum_of_squares(numbers: NDArray[np.int64]) -> int:
    total = 0
    for i in numba.prange(numbers.size):
        total += numbers[i] * numbers[i]
    return total


sum_of_squares: Any = numba.njit(parallel=True)(_sum_of_squares)


def square_until(stop: threading.Event) -> Tally:
    """Numba's threading layer at work, for one caller only: workqueue aborts the process if there are two."""
    numbers = np.arange(100_000)
    right, calls, wrong = int(numbers @ numbers), 0, 0
    while not stop.is_set():
        calls += 1
        wrong += int(sum_of_squares(numbers)) != right
    return Counter({"Numba, parallel=True": calls}), ["wrong bits: Numba, parallel=True"] * wrong


def beside(workers: Sequence[Callable[[threading.Event], Tally]], during: Callable[[], object]) -> Tally:
    """What ``workers`` did, each in a thread of its own, while ``during`` ran."""
    stop = threading.Event()
    with ThreadPoolExecutor(len(workers)) as pool:
        pending = [pool.submit(worker, stop) for worker in workers]
        try:
            during()
        finally:
            stop.set()
            # Callers that wait for each other end with their tracebacks and exit code 1.
            faulthandler.dump_traceback_later(HANG, exit=True)
    faulthandler.cancel_dump_traceback_later()
    tallies = [_tally(future) for future in pending]
    return sum((calls for calls, _ in tallies), Counter()), [error for _, wrong in tallies for error in wrong]


def _tally(future: Future[Tally]) -> Tally:
    try:
        calls, wrong = future.result()
    except Exception as error:
        return Counter(), [f"{type(error).__name__}: {error}".splitlines()[0]]
    return calls, wrong if calls.total() else ["a thread has made no call"]


def agrees(case: Case, answer: bytes) -> bool:
    """Whether a single caller's answer is the reference's."""
    right = expected(case)
    if case.function != "sparsify" or case.kind != "float64":
        return answer == right
    # The rescale of float64 may round differently: two units in the last place are allowed.
    one, other = np.frombuffer(answer), np.frombuffer(right)
    return bool(np.all(np.abs(one - other) <= 2 * np.spacing(np.abs(other))))


def call_alone(answers: dict[Case, bytes]) -> Tally:
    """Every case once, which also compiles all kernels: a child of a thread that compiles would wait for ever."""
    wrong = [f"wrong bits with one caller: {case}" for case in CASES if not agrees(case, answers[case])]
    if trained() != expected_training():
        wrong.append("wrong bits with one caller: training with PyTorch")
    return Counter({"one caller": len(CASES) + 1}), wrong


def callers(threads: int, right: dict[Case, bytes]) -> list[Callable[[threading.Event], Tally]]:
    """Workers that call this library."""
    return [functools.partial(call_until, right=right, seed=seed) for seed in range(threads)]


def digests(results: Sequence[bytes]) -> list[str]:
    """Short enough for a pipe, which then never blocks."""
    return [hashlib.sha256(result).hexdigest() for result in results]


def child(connection: Connection, method: str, with_torch: bool) -> None:
    """Every call once, and training; what a child process does."""
    results = [found(case) for case in CASES]
    if with_torch:
        import torch

        if method == "fork":
            torch.set_num_threads(1)  # PyTorch's OpenMP (libgomp) hangs if the thread that forked has used it
        results.append(trained())
    connection.send(digests(results))


def start_child(method: str, with_torch: bool) -> tuple[Any, Connection]:
    """A running child process, and where its results will come from."""
    context: Any = multiprocessing.get_context(method)
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=child, args=(sender, method, with_torch))
    process.start()
    return process, receiver


def finish_child(process: Any, receiver: Connection, right: list[str]) -> str:
    """What was wrong with a child process, or nothing."""
    process.join(HANG)
    if process.is_alive():
        process.kill()
        process.join()
        return f"no answer after {HANG:g} s"
    if process.exitcode:
        return f"exit code {process.exitcode}"
    results = receiver.recv()
    names = [*map(str, CASES), "training with PyTorch"]
    wrong = [name for name, result, digest in zip(names, results, right, strict=False) if result != digest]
    return f"wrong bits: {', '.join(wrong)}" if wrong else ""


def run_children(children: int, method: str, right: list[str]) -> Tally:
    """Child processes, a few at a time, in this thread: a worker of a ThreadPoolExecutor must not fork."""
    if method not in multiprocessing.get_all_start_methods():
        return Counter(), []
    # A spawned child takes long to import PyTorch.
    with_torch = [method == "fork" or i % 10 == 0 for i in range(children)]
    errors = []
    for first in range(0, children, AT_ONCE):
        started = [start_child(method, choice) for choice in with_torch[first : first + AT_ONCE]]
        errors += [finish_child(*pair, right) for pair in started]
    counts = {f"processes, {method}": children, f"of these with PyTorch, {method}": sum(with_torch)}
    return Counter(counts), [f"{method}: {error}" for error in errors if error]


def run_layers() -> Tally:
    """All of this for a short time under each of Numba's threading layers, with more threads than cores."""
    calls, wrong = Counter[str](), []
    options = ["--seconds", "3", "--children", "2"]
    for layer in LAYERS:
        settings = {"NUMBA_THREADING_LAYER": layer, "NUMBA_NUM_THREADS": str(2 * (os.cpu_count() or 1))}
        if not is_available(layer):
            calls[f"again with Numba's {layer}, which is not installed"] = 0
            continue
        command = [sys.executable, "-m", "benchmarks.stress", *options]
        done = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True)
        calls[f"again with Numba's {layer}"] += 1
        if done.returncode:
            wrong.append(f"{layer}: exit code {done.returncode}\n{done.stdout}{done.stderr}")
    return calls, wrong


def is_available(layer: str) -> bool:
    """Whether Numba can load a threading layer here; in a process of its own, because that leaves traces."""
    module = {"tbb": "tbbpool", "omp": "omppool"}.get(layer, layer)
    command = [sys.executable, "-c", f"import numba.np.ufunc.{module}"]
    return subprocess.run(command, capture_output=True).returncode == 0


def check_setup() -> list[str]:
    """Whether the run has used what it is about: this library's pool, and the layer that was asked for."""
    wrong, layer = [], os.environ.get("NUMBA_THREADING_LAYER")
    if thread_count() > 1 and not any(t.name.startswith("st3core") for t in threading.enumerate()):
        wrong.append("st3core has started no threads")
    if layer and layer_in_use() != layer:
        wrong.append(f"Numba's threading layer is {layer_in_use()}, not {layer}")
    return wrong


def layer_in_use() -> str:
    """Numba's threading layer, which is loaded with the first parallel function."""
    try:
        return str(numba.threading_layer())
    except ValueError:
        return "not loaded"


def measure(options: argparse.Namespace) -> list[Tally]:
    """The whole run."""
    import torch  # noqa: F401  # here, where no thread has to wait for it

    right = {case: found(case) for case in CASES}
    all_right = digests([*right.values(), expected_training()])
    tallies = [call_alone(right)]
    workers = [*callers(options.threads, right), multiply_until, square_until]
    tallies.append(beside(workers, lambda: time.sleep(options.seconds)))
    tallies.append((Counter(), check_setup()))
    # Forked while this library's threads work; no others, whose locks a child might find locked for ever.
    forked: list[Tally] = []
    load, wrong = beside(callers(2, right), lambda: forked.append(run_children(options.children, "fork", all_right)))
    tallies += [*forked, (Counter({"calls while forking": load.total()}), wrong)]
    tallies.append(run_children(options.children, "spawn", all_right))
    if "NUMBA_THREADING_LAYER" not in os.environ:
        tallies.append(run_layers())
    return tallies


def parse_arguments() -> argparse.Namespace:
    """Options from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--seconds", type=float, default=30, help="how long the threads call")
    parser.add_argument("--threads", type=int, default=8, help="threads that call at the same time")
    parser.add_argument("--children", type=int, default=50, help="processes to fork, and as many to spawn")
    options = parser.parse_args()
    for name in ("seconds", "threads", "children"):
        if getattr(options, name) <= 0:
            parser.error(f"--{name} must be positive, got {getattr(options, name)}")
    return options


def main() -> None:
    """Run, print, and exit with 1 if anything was wrong."""
    options = parse_arguments()
    # Python warns of every fork beside threads, which is what this is about.
    warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
    faulthandler.enable()
    calls, wrong = Counter[str](), []
    for counts, errors in measure(options):
        calls.update(counts)
        wrong += errors
    title = f"{options.threads} callers, {thread_count()} threads each; Numba's threading layer: {layer_in_use()}"
    table = Table("", title=title)
    table.add_column("calls", justify="right")
    for name, count in calls.items():
        table.add_row(name, f"{count:,}")
    console = Console(width=100)
    console.print(table)
    console.print(f"{len(wrong)} wrong" if wrong else "nothing wrong")
    for error, count in Counter(wrong).most_common(20):
        console.print(f"{count} x {error}", markup=False)
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
