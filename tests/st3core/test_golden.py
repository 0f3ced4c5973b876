"""The authors' own program, its operators: inputs and outputs recorded once."""

from pathlib import Path

import numpy as np
import pytest

from st3core import Method, backward, find_thresholds, get_method, sparsify
from tests.tolerances import GOLDEN_THRESHOLD, GOLDEN_VALUE_ABSOLUTE, GOLDEN_VALUE_RELATIVE

GOLDEN = np.load(Path(__file__).parent.parent / "golden" / "operators.npz")
WEIGHTS = [GOLDEN[f"weight/{i}"] for i in range(4)]
MODES = {"st3": "st3", "st3sigma": "st3_sigma"}
VARIANTS = {
    "soft": Method("soft", rescale="none"),
    "soft_rescale": get_method("st3"),
    "hard": get_method("hard_ste"),
    "hard_rescale": Method("hard_rescale", operator="hard"),
}

everything = pytest.mark.parametrize(
    ("mode", "ratio"), [(mode, ratio) for mode in MODES for ratio in ("0.3", "0.5", "0.9", "0.98")]
)


@everything
def test_thresholds(mode, ratio):
    found = find_thresholds(WEIGHTS, float(ratio), MODES[mode])
    for key in ("threshold", "threshold_float64"):
        np.testing.assert_allclose(found, GOLDEN[f"{mode}/{ratio}/{key}"], rtol=GOLDEN_THRESHOLD)


@everything
@pytest.mark.parametrize("variant", VARIANTS)
def test_forward_weights(mode, ratio, variant):
    for index, weight in enumerate(WEIGHTS):
        expected = GOLDEN[f"{mode}/{ratio}/{variant}/{index}/effective"]
        found = sparsify(weight, GOLDEN[f"{mode}/{ratio}/threshold"][index], VARIANTS[variant])
        assert ((found == 0) == (expected == 0)).all()
        np.testing.assert_allclose(found, expected, rtol=GOLDEN_VALUE_RELATIVE, atol=GOLDEN_VALUE_ABSOLUTE)


@everything
def test_zero_patterns_of_the_whole_chain(mode, ratio):
    thresholds = find_thresholds(WEIGHTS, float(ratio), MODES[mode])
    for index, (weight, threshold) in enumerate(zip(WEIGHTS, thresholds, strict=True)):
        expected = GOLDEN[f"{mode}/{ratio}/soft_rescale/{index}/effective"]
        assert ((sparsify(weight, threshold) == 0) == (expected == 0)).all()


@everything
@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients(mode, ratio, variant):
    for index, weight in enumerate(WEIGHTS):
        key = f"{mode}/{ratio}/{variant}/{index}"
        threshold = GOLDEN[f"{mode}/{ratio}/threshold"][index]
        assert (
            backward(GOLDEN[f"{key}/grad_out"], weight, threshold, VARIANTS[variant]) == GOLDEN[f"{key}/grad_weight"]
        ).all()
