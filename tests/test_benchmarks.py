"""What `make bench` has written agrees with its figures, and what it times computes the same as the library."""

import json

import numpy as np
import pytest
import torch

from benchmarks import (
    accuracy,
    accuracy_page,
    alternatives,
    bounds,
    distributed,
    keras_step,
    marked,
    network,
    page,
    shapes,
    sizes,
    sparse_kernels,
    step,
    timing,
)
from benchmarks.study import page as study
from benchmarks.study import results
from st3core import find_thresholds, sparsify

FIGURES = json.loads(page.RESULTS.read_text(encoding="utf-8"))
WEIGHTS = shapes.he_normal([(8, 3, 3, 3), (16, 8, 3, 3), (10, 16)])


def test_page_is_what_the_figures_make():
    assert page.PAGE.read_text(encoding="utf-8") == page.page(FIGURES)


def accuracies():
    paths = accuracy.RESULTS, accuracy_page.KERAS_RESULTS, accuracy_page.JAX_RESULTS
    return (json.loads(path.read_text(encoding="utf-8")) for path in paths)


def test_the_studys_summary_is_what_its_networks_make():
    summary = json.loads(accuracy_page.SUMMARY.read_text(encoding="utf-8"))
    assert summary == json.loads(json.dumps(study.summary()))
    for kind in summary["kinds"]:
        low, high = kind["score"]["interval"]
        assert low <= kind["score"]["mean"] <= high
        assert kind["score"]["seeds"] == 5


def test_accuracy_page_is_what_the_figures_make():
    assert accuracy_page.PAGE.read_text(encoding="utf-8") == accuracy_page.page(*accuracies(), study.section())


def test_accuracies_are_those_of_the_study():
    figures, *_ = accuracies()
    networks = [result for result, _ in accuracy.trained(results.read(results.PATH))]
    assert figures["methods"] == {method: accuracy.summarize(networks, method) for method in accuracy.METHODS}


def test_accuracies_in_the_readme_are_those_measured():
    figures, *_ = accuracies()
    readme = page.README.read_text(encoding="utf-8")
    assert marked.replaced(readme, accuracy.MARK, accuracy.grid(figures["methods"]).markdown()) == readme


def test_accuracies_are_shares_of_the_test_images():
    figures, keras, jax = accuracies()
    measured = [figures["methods"], *keras["backends"].values(), jax["methods"]]
    found = np.array([a for methods in measured for method in methods.values() for a in method["accuracies"]])
    right = found * accuracy_page.TEST_IMAGES
    np.testing.assert_allclose(right, right.round(), atol=1e-4)  # Keras computes the share in float32


def test_accuracies_were_measured_with_the_same_settings():
    figures, keras, jax = accuracies()
    assert figures["settings"] == keras["settings"] == jax["settings"]


def test_readme_table_is_what_the_figures_make():
    readme = page.README.read_text(encoding="utf-8")
    assert marked.replaced(readme, page.MARK, page.readme_table(FIGURES)) == readme


SHARDED = json.loads(distributed.RESULTS.read_text(encoding="utf-8"))


def test_distributed_page_has_the_table_of_its_figures():
    text = distributed.PAGE.read_text(encoding="utf-8")
    assert marked.replaced(text, distributed.MARK, distributed.table(SHARDED)) == text


def test_sharded_search_takes_less_than_a_megabyte_and_sends_less_than_that_whatever_the_size():
    for row in SHARDED["rows"]:
        assert max(row["resident"], row["traced"], row["first"], *row["later"]) < 2**20
    assert {row["processes"] for row in SHARDED["rows"]} == {2, 4}
    assert len({row["weights"] for row in SHARDED["rows"]}) == 3


def test_a_table_wants_one_place():
    for text in ("# Speed\n", 2 * "<!-- here -->\n\n| a |\n\n<!-- end -->\n"):
        with pytest.raises(ValueError, match=r"must have one place marked 'here', got [02]"):
            marked.replaced(text, "here", "| b |")


def test_keras_page_has_the_table_of_its_figures():
    text, figures = (path.read_text(encoding="utf-8") for path in (keras_step.PAGE, keras_step.RESULTS))
    assert marked.replaced(text, keras_step.MARK, keras_step.table(json.loads(figures))) == text


@pytest.mark.parametrize(
    "path",
    sorted(page.RESULTS.parent.glob("*.json*")),
    ids=lambda path: path.name,
)
def test_figures_name_where_they_come_from(path):
    for line in path.read_text(encoding="utf-8").splitlines() if path.suffix == ".jsonl" else [path.read_text()]:
        text = json.dumps(json.loads(line))
        assert all(f'"{name}": ' in text for name in ("command", "processor", "python"))
        assert '"commit": ' in text or '"commits": ' in text


def test_every_part_has_been_measured():
    assert list(FIGURES["parts"]) == list(page.GRIDS)
    assert len(bounds.grid(FIGURES["parts"]).rows) == len(bounds.BOUNDS)


def test_network_has_the_kernels_that_are_timed():
    with torch.device("meta"):
        model = network.resnet50()
    found = [tuple(p.shape) for p in model.parameters() if p.ndim > 1]
    assert sorted(found) == sorted(shapes.resnet50())


def test_alternatives_compute_the_same():
    threshold = float(find_thresholds(WEIGHTS, 0.9)[0])
    tensors = [torch.from_numpy(w) for w in WEIGHTS]
    for weight, found in zip(WEIGHTS, alternatives.sort_mask_apply(tensors, 0.9), strict=True):
        expected = sparsify(weight, threshold)
        assert ((found.numpy() == 0) == (expected == 0)).all()
        np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4)  # means of at most 144 weights in float32


def test_global_pruning_can_be_repeated():
    tensors = [torch.from_numpy(w) for w in WEIGHTS]
    before = [w.copy() for w in WEIGHTS]
    prune, reset = alternatives.global_pruning(tensors, 0.9)
    for _ in range(2):
        reset()
        prune()
    assert all((w == b).all() for w, b in zip(WEIGHTS, before, strict=True))


@pytest.mark.parametrize("channels_last", [False, True])
def test_operator_computes_the_same(channels_last):
    weights = shapes.keras_layout(WEIGHTS) if channels_last else WEIGHTS
    axis, outputs = -1 if channels_last else 0, [np.full_like(w, np.nan) for w in weights]
    thresholds = step.cold_search(weights, 0.9)()
    step.operator(weights, outputs, channel_axis=axis)(thresholds)
    for weight, threshold, output in zip(weights, thresholds.tolist(), outputs, strict=True):
        assert (output == sparsify(weight, threshold, channel_axis=axis)).all()


def test_warm_search_ends_where_the_cold_one_is():
    search = step.warm_search(WEIGHTS, 0.9)
    for _ in range(1000):
        found = search()
    assert found.tolist() == step.cold_search(WEIGHTS, 0.9)().tolist()


def test_interleaved_times_each_call_after_an_untimed_one():
    calls = []
    candidates = {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}
    seconds = timing.interleaved(candidates, 2, repeats=3, resets={"b": lambda: calls.append("reset")})
    assert calls == [*"aaaa", "reset", "b", "reset", *"bbb"] * 2
    assert {name: len(values) for name, values in seconds.items()} == {"a": 2, "b": 2}


def test_alternating_turns_the_order_around():
    calls = []
    timing.alternating({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 3)
    assert calls == [*"ab", *"ba", *"ab"]


def test_ratios_are_formed_within_a_round():
    seconds = {"x": [2.0, 40.0, 6.0], "a": [1.0, 10.0, 1.0], "b": [1.0, 10.0, 1.0]}
    assert timing.ratios(seconds, "x", ["a", "b"]) == {"median": 2.0, "quartile_1": 1.5, "quartile_3": 2.5}


def test_traced_peak_sees_what_a_call_allocates():
    assert sizes.traced_peak(lambda: np.ones(10**6)) > 8 * 10**6


def test_export_page_has_the_table_that_the_figures_make():
    text = sparse_kernels.PAGE.read_text(encoding="utf-8")
    figures = json.loads(sparse_kernels.RESULTS.read_text(encoding="utf-8"))
    assert marked.replaced(text, sparse_kernels.MARK, sparse_kernels.table(figures)) == text


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")
@pytest.mark.parametrize("batch", [1, 5])
def test_sparse_products_compute_the_same(batch):
    calls = sparse_kernels.products(0.9, batch, width=64)
    found, expected = calls["sparse"](), calls["dense"]()
    torch.testing.assert_close(found.reshape(64, -1).T, expected)


def test_a_busy_machine_is_noticed():
    row = {"median": 2.0, "quartile_1": 1.9, "quartile_3": 2.1}
    with pytest.raises(RuntimeError, match="the machine is too busy"):
        sparse_kernels._check({"1": {str(s): row for s in sparse_kernels.SPARSITIES}})
