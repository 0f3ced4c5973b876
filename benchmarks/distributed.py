"""What a sharded threshold search sends and how much memory it takes, by weights and processes.

Run it from the repository's root: ``python -m benchmarks.distributed``. It writes
``benchmarks/results/distributed.json`` and the table of ``docs/distributed.md``. Linux only, for the memory.
"""

import argparse
import json
import re
import tempfile
import tracemalloc
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.multiprocessing.spawn import spawn

from benchmarks import machine
from benchmarks.grid import Grid, number
from benchmarks.marked import replaced
from benchmarks.options import require_one
from st3_torch import PolynomialSchedule, Sparsifier
from st3core.search import Forecast

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks/results/distributed.json"
PAGE = ROOT / "docs/distributed.md"
COMMAND = "python -m benchmarks.distributed"

WIDTH = 1000
RAMP = 10_000
"""Steps of the schedule; those in the middle are measured, as in the second half of a long training."""

MARK = f"from {COMMAND}"


def measure(rank: int, world: int, layers: int, steps: int, folder: str) -> None:
    """Of one process: a model of ``layers`` million weights, sharded over all, and its searches."""
    torch.set_num_threads(1)
    address, patience = f"file://{folder}/store", timedelta(minutes=5)
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=world, timeout=patience)
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(layers)))
    for layer in model:
        fully_shard(layer)
    fully_shard(model)
    sparsifier = Sparsifier(model, PolynomialSchedule(0.9, begin_step=0, end_step=RAMP))
    sparsifier.load_state_dict({**sparsifier.state_dict(), "step": RAMP // 2})
    sent = count_bytes()
    move = mover(model, rank)
    steps_sent = [sum(step(sparsifier, move, sent)) for _ in range(steps)]
    figures = {
        "weights": layers * WIDTH**2,
        "processes": world,
        "first": steps_sent[0],
        "later": sorted(steps_sent[1:]),
        "collectives": len(step(sparsifier, move, sent)),
        **memory(sparsifier, move),
    }
    every: list[Any] = [None] * world
    dist.all_gather_object(every, figures)
    if rank == 0:
        most = {key: max(own[key] for own in every) for key in ("resident", "traced")}
        Path(f"{folder}/figures.json").write_text(json.dumps(figures | most), encoding="utf-8")
    dist.barrier()  # nobody leaves while another one still needs it
    dist.destroy_process_group()


def count_bytes() -> list[int]:
    """Bytes that this process gives to each collective from now on; grows by itself."""
    sent: list[int] = []
    all_reduce = dist.all_reduce

    def counting(tensor: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        sent.append(tensor.numel() * tensor.element_size())
        return all_reduce(tensor, *arguments, **options)

    dist.all_reduce = counting
    return sent


def mover(model: nn.Module, rank: int) -> Callable[[], None]:
    """Moves the weights a little, as an optimizer does: about a thousandth of their size, in a lasting direction."""
    generator = torch.Generator().manual_seed(rank)
    parts = [parameter.detach().to_local() for parameter in model.parameters()]  # type: ignore[attr-defined]
    changes = [1e-3 * part.abs().mean() * torch.randn(part.shape, generator=generator) for part in parts]

    def move() -> None:
        for part, change in zip(parts, changes, strict=True):
            part += change

    return move


def step(sparsifier: Sparsifier, move: Callable[[], None], sent: list[int]) -> list[int]:
    """What each collective of one step is given."""
    move()
    sent.clear()
    sparsifier.step()
    return list(sent)


def memory(sparsifier: Sparsifier, move: Callable[[], None]) -> dict[str, int]:
    """Peak bytes of a first search beyond what was there: of the process, and of what Python and NumPy allocate."""
    move()
    sparsifier._forecast = Forecast()  # a search that knows nothing looks at most
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = _kibibytes("VmRSS")
    sparsifier.step()
    resident = 1024 * max(_kibibytes("VmHWM") - before, 0)
    sparsifier._forecast = Forecast()
    tracemalloc.start()
    sparsifier.step()
    traced = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return {"resident": resident, "traced": traced}


def _kibibytes(name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1])


def run(worlds: list[int], layers: list[int], steps: int) -> dict[str, Any]:
    """Figures of every number of processes and weights."""
    rows = []
    for world in worlds:
        for count in layers:
            with tempfile.TemporaryDirectory() as folder:
                spawn(measure, (world, count, steps, folder), nprocs=world)
                rows.append(json.loads(Path(f"{folder}/figures.json").read_text(encoding="utf-8")))
    return {"setting": {**machine.provenance(COMMAND), "steps": steps}, "rows": rows}


def grid(figures: dict[str, Any]) -> Grid:
    """A row for each number of processes and weights; KiB."""
    columns = (
        "weights, processes", "first search", "later: median", "later: most", "collectives", "a gather of the weights",
        "memory of the process", "memory of arrays",
    )  # fmt: skip
    rows = []
    for row in figures["rows"]:
        later = row["later"]
        sizes = row["first"], later[len(later) // 2], later[-1]
        kib = [number(size / 1024) for size in (*sizes, 4 * row["weights"], row["resident"], row["traced"])]
        name = f"{row['weights'] // 10**6} million, {row['processes']}"
        rows.append((name, *kib[:3], str(row["collectives"]), *kib[3:]))
    return Grid("KiB a process and search", columns, tuple(rows))


def table(figures: dict[str, Any]) -> str:
    """The table, and where its figures come from."""
    setting = figures["setting"]
    return f"{grid(figures).markdown()}\n\n{machine.measured(setting)}; {machine.versions(setting)}."


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--millions", type=int, nargs="+", default=[1, 4, 16], help="of weights")
    parser.add_argument("--steps", type=int, default=40, help="measured, after the first search")
    options = parser.parse_args()
    require_one(parser, options, ["steps"])
    figures = run(options.processes, options.millions, options.steps)
    grid(figures).print(Console())
    RESULTS.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    if PAGE.exists():
        PAGE.write_text(replaced(PAGE.read_text(encoding="utf-8"), MARK, table(figures)), encoding="utf-8")


if __name__ == "__main__":
    main()
