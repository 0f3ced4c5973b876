"""Several threads, forked and spawned processes: no crash, no wrong bit. Compiled only, for enough work."""

import importlib
import multiprocessing
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from numba import config

from st3core import find_thresholds, reference, sparsify, threads

WEIGHTS = [np.random.default_rng(seed).standard_normal((300, 1000)).astype(np.float32) for seed in range(2)]


def outcome(sparsity: float) -> tuple[list[float], bytes]:
    thresholds = find_thresholds(WEIGHTS, sparsity)
    return thresholds.tolist(), sparsify(WEIGHTS[0], thresholds[0]).tobytes()


def put_outcome(queue, sparsity):
    queue.put(outcome(sparsity))


@pytest.fixture(autouse=True)
def several_threads(monkeypatch):
    monkeypatch.setattr(threads, "thread_count", lambda: 4)


@pytest.mark.filterwarnings("ignore:os.fork:RuntimeWarning")  # from JAX, where its tests came before; no child uses it
@pytest.mark.parametrize("method", sorted({"fork", "spawn"} & set(multiprocessing.get_all_start_methods())))
def test_child_processes(method):
    expected = outcome(0.9)  # and the parent's threads are running when it forks
    assert expected[0] == reference.find_thresholds(WEIGHTS, 0.9, "magnitude").tolist()
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    children = [context.Process(target=put_outcome, args=(queue, 0.9)) for _ in range(3)]
    for child in children:
        child.start()
    found = [queue.get(timeout=120) for _ in children]
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0, 0, 0]
    assert all(result == expected for result in found)


def test_many_callers_at_once():
    shares = [0.1, 0.5, 0.9, 0.99] * 20
    expected = {share: outcome(share) for share in set(shares)}
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(outcome, shares))
    assert found == [expected[share] for share in shares]


def test_torch_limits_the_threads(monkeypatch):
    monkeypatch.undo()
    torch, before = pytest.importorskip("torch"), threads.thread_count()
    importlib.import_module("st3_torch")
    allowed = torch.get_num_threads()
    monkeypatch.setattr(config, "NUMBA_NUM_THREADS", 8)
    try:
        for count in (1, 2, 64):
            torch.set_num_threads(count)
            assert threads.thread_count() == min(count, 8)
    finally:
        torch.set_num_threads(allowed)
    monkeypatch.undo()
    assert threads.thread_count() == min(before, allowed)
