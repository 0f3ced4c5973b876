import dataclasses
import pickle

import pytest

from st3core import Method, get_method
from st3core.method import METHODS

PRESETS = {
    "st3": ("magnitude", "soft", "channel", "straight_through"),
    "st3_sigma": ("magnitude_per_sigma", "soft", "channel", "straight_through"),
    "hard_ste": ("magnitude", "hard", "none", "straight_through"),
    "gmp": ("magnitude", "hard", "none", "masked"),
}


def test_presets():
    found = {name: (m.score, m.operator, m.rescale, m.backward) for name, m in METHODS.items()}
    assert found == PRESETS


@pytest.mark.parametrize("name", PRESETS)
def test_get_method_by_name_or_as_it_is(name):
    method = get_method(name)
    assert method.name == name
    assert get_method(method) is method
    assert pickle.loads(pickle.dumps(method)) == method


def test_parts_combine_freely():
    for donor in METHODS.values():
        for method in METHODS.values():
            mixed = dataclasses.replace(method, operator=donor.operator, rescale=donor.rescale, backward=donor.backward)
            assert get_method(mixed) is mixed


def test_methods_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        get_method("st3").operator = "hard"


@pytest.mark.parametrize("part", ["score", "operator", "rescale", "backward"])
def test_method_rejects_unknown_parts(part):
    with pytest.raises(ValueError, match=f"Method: {part} must be one of .*, got 'nonsense'"):
        dataclasses.replace(get_method("st3"), **{part: "nonsense"})


def test_get_method_rejects():
    with pytest.raises(ValueError, match="method must be one of 'st3', 'st3_sigma', 'hard_ste', 'gmp', got 'st4'"):
        get_method("st4")
    with pytest.raises(TypeError, match="method must be a name or a Method, got 3 of type int"):
        get_method(3)
    assert Method("mine").name == "mine"
