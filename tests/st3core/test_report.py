"""The report's arithmetic, and what its table and its plot show of it."""

import dataclasses
import json
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure

from st3core.report import LayerReport, Report

DENSE = LayerReport("dense", (2, 3), 3, 600)
CONV = LayerReport("conv", (4, 1, 3, 3), 27, 7200)
EMPTY = LayerReport("empty", (0, 5), 0, 0)
REPORT = Report("st3", 0.75, (DENSE, CONV, EMPTY))


MACS = st.integers(0, 10**12)


@st.composite
def layers(draw, macs=MACS):
    shape = tuple(draw(st.lists(st.integers(0, 6), max_size=4)))
    layer = LayerReport("layer", shape, 0, draw(macs))
    return dataclasses.replace(layer, zeros=draw(st.integers(0, layer.weights)))


@given(layers(MACS | st.none()), st.integers(1, 5))
def test_a_report_of_equal_layers_is_a_layer_many_times(layer, count):
    report = Report("st3", 0.5, (layer,) * count)
    assert (report.weights, report.zeros) == (count * layer.weights, count * layer.zeros)
    assert report.sparsity == pytest.approx(layer.sparsity)
    if layer.dense_macs is None:
        assert (report.dense_macs, report.sparse_macs) == (None, None)
    else:
        assert report.dense_macs == count * layer.dense_macs
        assert report.sparse_macs == pytest.approx(count * layer.sparse_macs)


@given(layers())
def test_multiply_adds_fall_with_the_zeros(layer):
    kept = layer.weights - layer.zeros
    assert layer.sparse_macs * max(layer.weights, 1) == pytest.approx(layer.dense_macs * (kept or not layer.weights))


@pytest.mark.parametrize("itemsize", [2, 4, 8])
def test_bytes_are_those_of_a_bitmap_and_of_what_is_not_zero(itemsize):
    layer = LayerReport("layer", (10, 10), 90, itemsize=itemsize)
    assert (layer.dense_bytes, layer.sparse_bytes) == (100 * itemsize, 13 + 10 * itemsize)
    full = dataclasses.replace(layer, zeros=0)
    assert full.sparse_bytes == full.dense_bytes
    report = Report("st3", 0.9, (layer, full))
    assert (report.dense_bytes, report.sparse_bytes) == (200 * itemsize, 13 + 110 * itemsize)
    assert f"bytes: {200 * itemsize:,} dense, {13 + 110 * itemsize:,} stored sparse" in str(report)


def test_one_layer_that_is_not_counted_leaves_the_sum_open():
    report = Report("st3", 0.5, (DENSE, dataclasses.replace(CONV, dense_macs=None)))
    assert (report.dense_macs, report.sparse_macs) == (None, None)
    assert report.weights == 42


def test_to_dict_is_ready_for_json():
    found = json.loads(json.dumps(REPORT.to_dict()))
    figures = {"weights": 42, "zeros": 30, "sparsity": 30 / 42, "dense_macs": 7800, "sparse_macs": 300.0 + 1800.0}
    figures |= {"dense_bytes": 24 + 144, "sparse_bytes": 13 + 41}
    conv = {"name": "conv", "shape": [4, 1, 3, 3]}
    conv |= {"weights": 36, "zeros": 27, "sparsity": 0.75, "dense_macs": 7200, "sparse_macs": 1800.0}
    conv |= {"dense_bytes": 36 * 4, "sparse_bytes": 5 + 9 * 4}
    assert found["layers"][1] == conv
    assert {key: value for key, value in found.items() if key != "layers"} == {
        "method": "st3", "target_sparsity": 0.75, **figures, "skipped": {}
    }  # fmt: skip


def cells(table: str) -> list[list[str]]:
    """Texts of every row that has some."""
    rows = [[cell.strip() for cell in line.strip("│┃").replace("┃", "│").split("│")] for line in table.splitlines()]
    return [row for row in rows if len(row) > 1]


def test_table():
    assert cells(str(REPORT)) == [
        ["tensor", "shape", "weights", "zeros", "sparsity", "multiply-adds", "of dense"],
        ["dense", "2×3", "6", "3", "50.00 %", "600", "50.00 %"],
        ["conv", "4×1×3×3", "36", "27", "75.00 %", "7,200", "25.00 %"],
        ["empty", "0×5", "0", "0", "0.00 %", "0", "0.00 %"],
        ["total", "", "42", "30", "71.43 %", "7,800", "26.92 %"],
    ]
    assert "st3: target sparsity 0.75" in str(REPORT)


def test_table_without_multiply_adds():
    uncounted = [dataclasses.replace(layer, dense_macs=None) for layer in REPORT.layers]
    table = cells(str(Report("gmp", 0.5, tuple(uncounted))))
    assert table[0] == ["tensor", "shape", "weights", "zeros", "sparsity"]
    assert table[1] == ["dense", "2×3", "6", "3", "50.00 %"]
    assert table[-1] == ["total", "", "42", "30", "71.43 %"]


def test_table_where_some_tensors_are_not_counted():
    table = cells(str(Report("gmp", 0.5, (dataclasses.replace(DENSE, dense_macs=None), CONV))))
    assert table[0][-2:] == ["multiply-adds", "of dense"]
    assert [row[-2:] for row in table[1:]] == [["", ""], ["7,200", "25.00 %"], ["", ""]]


def test_nothing_in_the_table_is_cut_off():
    name = "encoder.layers.11.self_attention.output_projection.weight"
    table = cells(str(Report("st3", 0.5, (LayerReport(name, (4096, 4096), 10**7, 10**12),))))
    assert "".join(row[0] for row in table[1:-1]) == name


def test_plot_shows_each_tensor_and_all_of_them():
    axes = Figure().subplots()
    REPORT.draw(axes)
    assert [label.get_text() for label in axes.get_yticklabels()] == ["empty", "conv", "dense"]
    assert [bar.get_width() for bar in axes.patches[:3]] == [0.0, 75.0, 50.0]
    assert [text.get_text() for text in axes.texts] == ["0.0", "75.0", "50.0"]
    (line,) = axes.lines
    assert list(line.get_xdata()) == pytest.approx([100 * 30 / 42] * 2)
    assert axes.get_legend().get_texts()[0].get_text() == "all: 71.43 %"
    assert list(axes.get_xticks()) == [0, 20, 40, 60, 80, 100]
    assert axes.get_title() == "Sparsity per tensor, st3"


@pytest.mark.parametrize("count", [1, 3, 40])
def test_plot_has_room_for_every_bar_and_the_legend_below(count):
    axes = Figure().subplots()
    names = [dataclasses.replace(DENSE, name=str(i), zeros=6) for i in range(count)]
    Report("st3", 0.75, tuple(names)).draw(axes)
    bottom, top = axes.get_ylim()
    assert bottom <= -1 < count - 0.6 <= top <= count  # a bar is 0.8 wide
    assert axes.get_xlim()[0] == 0
    assert axes.get_xlim()[1] > 105  # a full bar and its label


def test_plot_grows_with_the_tensors(tmp_path, monkeypatch):
    sizes = []
    monkeypatch.setattr(Figure, "savefig", lambda self, path, **_: sizes.append(self.get_size_inches().tolist()))
    for count in (1, 11):
        Report("st3", 0.75, (DENSE,) * count).plot(tmp_path / "sparsity.png")
    (width, low), (same_width, high) = sizes
    assert width == same_width
    assert high - low == pytest.approx(10 * 0.3)
    assert 1.5 < low < width


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_plot_writes_what_the_suffix_says(tmp_path, suffix):
    REPORT.plot(tmp_path / f"sparsity.{suffix}")
    start = (tmp_path / f"sparsity.{suffix}").read_bytes()[:5]
    assert start == {"png": b"\x89PNG\r", "svg": b"<?xml", "pdf": b"%PDF-"}[suffix]


def test_plot_without_a_path_is_a_figure():
    figure = REPORT.plot()
    assert isinstance(figure, Figure)
    assert [axes.get_title() for axes in figure.axes] == ["Sparsity per tensor, st3"]


def test_plot_without_matplotlib_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'st3core\[report\]'"):
        REPORT.plot()


def test_reports_are_frozen():
    for part in (DENSE, REPORT):
        with pytest.raises(dataclasses.FrozenInstanceError):
            part.zeros = 1
