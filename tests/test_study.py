"""The study: its plan, what it makes of its figures, and that every method trains on every task."""

import json
import subprocess
import sys
from dataclasses import asdict

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.study import __main__ as study_main
from benchmarks.study import results
from benchmarks.study.__main__ import train_all
from benchmarks.study.plan import GROUP_METHODS, METHODS, RAMPS, VARIANTS, Run, every_run, group_of, quick_runs
from benchmarks.study.tasks import TASKS
from benchmarks.study.train import measure
from st3core import get_method


def found(scores, method="st3", task="digits", sparsity=0.9):
    return [(Run(task, method, sparsity, seed), {"score": score}) for seed, score in enumerate(scores)]


def test_a_plan_has_every_network_once_and_the_first_seed_first():
    runs = list(every_run(5))
    assert len(set(runs)) == len(runs)
    assert [run.seed for run in runs] == sorted(run.seed for run in runs)
    assert {run.task for run in runs} == set(TASKS)
    kinds = {(run.method, run.sparsity) for run in runs if run.task == "text" and run.seed == 4}
    assert {(method, sparsity) for method in METHODS for sparsity in (0.8, 0.9, 0.95, 0.98, 0.99)} < kinds


@pytest.mark.parametrize("name", [*VARIANTS, *RAMPS])
def test_a_variant_differs_from_st3_in_one_part(name):
    run = Run("digits", name, 0.9, 0)
    parts, own = asdict(get_method("st3")), asdict(run.chosen())
    changed = [part for part in parts if parts[part] != own[part]]
    assert len(changed) == (name in VARIANTS)
    assert (run.schedule(1000) == Run("digits", "st3", 0.9, 0).schedule(1000)) == (name in VARIANTS)
    assert run.schedule(1000)(500) == 0.9


def test_groups_have_the_share_of_zeros_that_is_asked_for():
    assert [group_of(share) for share in (0.5, 0.75, 0.875)] == [(2, 4), (1, 4), (1, 8)]
    assert Run("digits", "s_ste", 0.75, 0).chosen().group == (1, 4)


@given(st.lists(st.floats(-100, 100), min_size=2, max_size=9))
def test_an_interval_of_five_has_students_quantile(values):
    own = results.summarize(values)
    assert own.mean == pytest.approx(np.mean(values))
    assert own.deviation == pytest.approx(np.std(values, ddof=1))
    known = {2: 12.706, 5: 2.776, 9: 2.306}.get(len(values))
    if known is not None:
        assert own.half == pytest.approx(known * own.deviation / np.sqrt(len(values)), rel=1e-3, abs=1e-12)


@pytest.mark.parametrize(
    ("change", "higher", "expected"),
    [(1.0, True, "better"), (-1.0, True, "worse"), (1.0, False, "worse"), (-1.0, False, "better"), (0.01, True, "un")],
)
def test_only_an_interval_without_zero_says_anything(change, higher, expected):
    base, noise = np.array([90.0, 92.0, 91.0, 95.0]), np.array([0.1, -0.1, 0.05, 0.0])
    both = found(base) + found(base + change + noise, "gmp")
    difference = results.differences(both, "digits", "gmp", "st3", 0.9)
    assert difference.mean == pytest.approx(change, abs=0.05)
    assert results.verdict(difference, higher).startswith(expected)
    assert results.verdict(results.summarize([change]), higher) == "undecided"


def test_lines_are_read_back_and_half_a_line_is_not(tmp_path):
    path = tmp_path / "study.jsonl"
    lines = [json.dumps({**asdict(run), **own}) for run, own in found([1.0, 2.0])]
    path.write_text(lines[0] + "\n" + lines[1][:20])
    assert [(run, own["score"]) for run, own in results.read(path)] == [(Run("digits", "st3", 0.9, 0), 1.0)]
    assert results.read(tmp_path / "none.jsonl") == []
    results.cut_half_line(path)
    with path.open("a") as file:
        file.write(lines[1] + "\n")
    assert len(results.read(path)) == 2


@pytest.mark.parametrize("task", TASKS)
def test_a_network_is_trained_and_looked_at(task):
    for method, share in (("feather", 0.9), ("s_ste", 0.75))[: 1 if task == "text" else 2]:  # whose score takes long
        own = measure(Run(task, method, share, 0, 0.02))
        assert own["zeros"] == pytest.approx(share, abs=0.05 if method in GROUP_METHODS else 1e-3)
        assert ("trace" in own) == (method not in GROUP_METHODS)
        assert "trace" not in own or all(len(values) > 0 for values in own["trace"].values())
        assert 0 < own["macs"] < 1


def test_a_dense_network_keeps_all_its_multiply_adds():
    dense = measure(Run("table", "dense", 0.0, 0, 0.02))
    assert dense["macs"] == 1
    assert np.isfinite(dense["score"])


def test_a_study_that_goes_on_trains_nothing_twice(tmp_path, monkeypatch):
    path, runs = tmp_path / "study.jsonl", [Run("table", "st3", 0.9, 0, 0.02), Run("table", "s_ste", 0.75, 0, 0.02)]
    train_all(runs, 1, path)
    assert [run for run, _ in results.read(path)] == runs
    monkeypatch.setattr(study_main, "measure", None)
    train_all(runs, 1, path)
    assert len(results.read(path)) == 2


def test_the_same_seed_gives_the_same_network():
    first, again = (measure(Run("table", "st3", 0.9, 1, 0.05)) for _ in range(2))
    assert {**first, "seconds": 0} == {**again, "seconds": 0}


def test_the_quick_study_trains_each_kind_of_network(tmp_path):
    command = [sys.executable, "-m", "benchmarks.study", "--quick", "--out", str(tmp_path / "quick.jsonl")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert {run for run, _ in results.read(tmp_path / "quick.jsonl")} == set(quick_runs())
