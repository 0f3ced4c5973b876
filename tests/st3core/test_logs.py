"""Rows of a CSV file, scalars of a writer, and names of thresholds."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from st3core import get_method
from st3core.logs import add_scalars, append_row, keep_rows, read_rows, threshold_metrics

NUMBERS = st.floats(allow_nan=False) | st.integers()


@given(st.lists(st.tuples(NUMBERS, NUMBERS), max_size=8), st.integers(-5, 5))
def test_rows_come_back_and_later_ones_go(tmp_path_factory, rows, last):
    path = tmp_path_factory.mktemp("logs") / "log.csv"
    for step, (loss, sparsity) in enumerate(rows):
        append_row(path, {"step": step, "loss, total": loss, "sparsity": sparsity})
    found = [(float(row["loss, total"]), float(row["sparsity"])) for row in read_rows(path)]
    assert found == [(float(loss), float(sparsity)) for loss, sparsity in rows]
    keep_rows(path, "step", last)
    assert [int(row["step"]) for row in read_rows(path)] == list(range(max(0, min(last + 1, len(rows)))))
    append_row(path, {"step": 99, "loss, total": 0, "sparsity": 0})
    assert int(read_rows(path)[-1]["step"]) == 99


def test_other_columns_are_an_error(tmp_path):
    append_row(tmp_path / "log.csv", {"step": 1})
    with pytest.raises(
        ValueError, match=r"append_row: .*log.csv must have the columns \['step', 'loss'\], got \['step'"
    ):
        append_row(tmp_path / "log.csv", {"step": 1, "loss": 2})
    with pytest.raises(ValueError, match=r"keep_rows: .*log.csv must have the column 'epoch', got \['step'\]"):
        keep_rows(tmp_path / "log.csv", "epoch", 1)


def test_scalars_are_grouped_by_their_prefix():
    class Writer:
        def __init__(self):
            self.calls = []

        def add_scalar(self, tag, scalar_value, global_step):
            self.calls.append((tag, scalar_value, global_step))

    writer = Writer()
    add_scalars(writer, {"sparsity": 0.5, "threshold/conv": 0.25}, 7)
    add_scalars(writer, {"sparsity": 0.75}, 8, prefix="")
    assert writer.calls == [("st3/sparsity", 0.5, 7), ("st3/threshold/conv", 0.25, 7), ("sparsity", 0.75, 8)]


@pytest.mark.parametrize("name", ["st3", "hard_ste", "gmp", "feather"])
def test_one_threshold_has_one_name(name):
    method, thresholds = get_method(name), {"a": 0.25, "b": 0.5}
    assert threshold_metrics(thresholds, method) == {"threshold": 0.5}
    several = {"threshold/a": 0.25, "threshold/b": 0.5}
    assert threshold_metrics(thresholds, method, is_one=False) == several
    assert threshold_metrics(thresholds, dataclasses.replace(method, scope="layer")) == several


@pytest.mark.parametrize("name", ["st3_sigma", "sr_ste", "s_ste"])
def test_several_thresholds_have_names(name):
    assert list(threshold_metrics({"a": 0.25, "b": 0.5}, get_method(name))) == ["threshold/a", "threshold/b"]
