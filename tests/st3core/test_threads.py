"""How work is dealt out, and what becomes of it when something goes wrong."""

import threading
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from st3core import threads

counts = st.integers(1, 8)


def with_threads(count, call):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(threads, "thread_count", lambda: count)
        return call()


@given(counts, st.integers(0, 40), st.integers(0, 2 * threads.SERIAL_BELOW))
def test_deal_gives_every_row_to_one_thread(count, rows, elements):
    slices = with_threads(count, lambda: threads.deal(rows, elements))
    dealt = [list(range(rows))[piece] for piece in slices]
    assert sorted(row for rows in dealt for row in rows) == list(range(rows))
    assert max(map(len, dealt)) - min(map(len, dealt)) <= 1
    assert len(slices) == (max(min(count, rows), 1) if elements >= threads.SERIAL_BELOW else 1)


@given(counts, st.lists(st.integers(1, 2 * threads.SERIAL_BELOW), min_size=1, max_size=40))
def test_split_gives_every_row_to_one_thread_in_order(count, work):
    slices = with_threads(count, lambda: threads.split(np.array(work)))
    pieces = [work[piece] for piece in slices]
    assert [row for piece in pieces for row in piece] == work
    assert all(pieces)
    serial = sum(work) < threads.SERIAL_BELOW
    assert len(pieces) <= (1 if serial else count)
    # A piece ends with the row that reaches its share, so it exceeds the share by less than its largest row.
    assert serial or max(map(sum, pieces)) < sum(work) / min(count, len(work)) + max(work)


@given(counts, st.integers(1, 6))
def test_split_of_equal_rows_is_even(count, each):
    work = np.full(count * each, threads.SERIAL_BELOW)
    slices = with_threads(count, lambda: threads.split(work))
    assert [len(work[piece]) for piece in slices] == [each] * count


def test_split_of_nothing():
    assert threads.split(np.empty(0, np.int64)) == [slice(0, 0)]
    assert threads.split(np.array([5])) == [slice(0, 1)]


def test_the_first_part_runs_on_the_callers_thread():
    found = threads.run(threading.get_ident, [(), (), ()])
    assert found[0] == threading.get_ident()
    assert threading.get_ident() not in found[1:]


def test_results_stand_in_the_order_of_the_parts():
    def late(seconds, value):
        time.sleep(seconds)
        return value

    assert threads.run(late, [(0.02, "a"), (0.01, "b"), (0.0, "c")]) == ["a", "b", "c"]
    assert threads.run(late, [(0.0, "a")]) == ["a"]


def test_all_parts_run_at_the_same_time():
    together = threading.Barrier(3, timeout=60)
    assert sorted(threads.run(together.wait, [(), (), ()])) == [0, 1, 2]


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_run_ends_when_all_parts_have(failing):
    ended = []

    def part(number):
        if number == failing:
            raise OSError(f"part {number}")
        time.sleep(0.05)
        ended.append(number)

    with pytest.raises(OSError, match=f"part {failing}"):
        threads.run(part, [(0,), (1,), (2,)])
    assert sorted(ended) == [number for number in range(3) if number != failing]


def test_an_interrupted_run_still_waits(monkeypatch):
    """The memory that the parts write to may be gone after the call has returned."""
    ended, waits = [], []

    def wait(pending):
        waits.append(len(pending))
        if len(waits) == 1:
            raise KeyboardInterrupt
        for future in pending:
            future.result()

    def part(number):
        time.sleep(0.05 * number)
        ended.append(number)

    monkeypatch.setattr(threads, "wait", wait)
    with pytest.raises(KeyboardInterrupt):
        threads.run(part, [(0,), (1,), (2,)])
    assert sorted(ended) == [0, 1, 2]
    assert waits == [2, 2]


def test_thread_count_is_the_least_that_anybody_allows(monkeypatch):
    monkeypatch.setattr(threads, "_limits", [])
    monkeypatch.setattr(threads.config, "NUMBA_NUM_THREADS", 6)
    assert threads.thread_count() == 6
    for allowed, expected in ((8, 6), (3, 3), (4, 3)):
        threads.limit_by(lambda allowed=allowed: allowed)
        assert threads.thread_count() == expected


def test_pools_are_used_again(monkeypatch):
    monkeypatch.setattr(threads, "_pools", {})
    for _ in range(3):
        threads.run(threading.get_ident, [(), (), ()])
    assert list(threads._pools) == [2]
    threads._forget_pools()
    assert threads._pools == {}
