import dataclasses
import math
import pickle

import numpy as np
import pytest

from st3core import Method, get_method
from st3core.method import METHODS

PRESETS = {
    "st3": ("magnitude", "global", "soft", "channel", "straight_through"),
    "st3_sigma": ("magnitude_per_sigma", "global", "soft", "channel", "straight_through"),
    "hard_ste": ("magnitude", "global", "hard", "none", "straight_through"),
    "gmp": ("magnitude", "global", "hard", "none", "masked"),
    "feather": ("magnitude", "global", "power", "none", "scaled"),
    "sr_ste": ("magnitude", "n:m", "hard", "none", "decay"),
    "s_ste": ("magnitude", "n:m", "soft", "least_squares", "straight_through"),
}


def test_presets():
    found = {name: (m.score, m.scope, m.operator, m.rescale, m.backward) for name, m in METHODS.items()}
    assert found == PRESETS
    assert {(m.power, m.theta, m.decay, m.group) for m in METHODS.values()} == {(3.0, None, 2e-4, (2, 4))}


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


@pytest.mark.parametrize("part", ["score", "operator", "rescale", "backward", "scope"])
def test_method_rejects_unknown_parts(part):
    with pytest.raises(ValueError, match=f"Method: {part} must be one of .*, got 'nonsense'"):
        dataclasses.replace(get_method("st3"), **{part: "nonsense"})


@pytest.mark.parametrize(
    ("part", "value", "error", "message"),
    [
        ("power", 0.5, ValueError, "power must be finite and 1 or more, got 0.5"),
        ("power", math.inf, ValueError, "power must be finite and 1 or more, got inf"),
        ("power", "3", TypeError, "power must be a real number, got '3' of type str"),
        ("theta", 1.5, ValueError, r"theta must be in \[0, 1\], or None, got 1.5"),
        ("theta", math.nan, ValueError, "theta must be .*, got nan"),
        ("theta", True, TypeError, "theta must be a real number, got True"),
        ("decay", -1e-4, ValueError, "decay must be finite and 0 or more, got -0.0001"),
        ("decay", None, TypeError, "decay must be a real number, got None"),
        ("group", (5, 4), ValueError, r"group must be \(N, M\) with 0 < N <= M, got \(5, 4\)"),
        ("group", (0, 4), ValueError, "group must be .*, got"),
        ("group", [2, 4], TypeError, r"group must be a tuple \(N, M\) of two integers, got \[2, 4\]"),
        ("group", (2.0, 4), TypeError, "group must be a tuple"),
        ("group", (1, 2, 3), TypeError, "group must be a tuple"),
    ],
)
def test_method_rejects_numbers(part, value, error, message):
    with pytest.raises(error, match=f"Method: {message}"):
        dataclasses.replace(get_method("st3"), **{part: value})


@pytest.mark.parametrize(("sparsity", "theta"), [(0.95, 1.0), (float(np.nextafter(0.95, 1)), 0.5), (0.0, 1.0)])
def test_theta_follows_the_final_sparsity(sparsity, theta):
    aimed = get_method("feather").aimed_at(sparsity)
    assert aimed == dataclasses.replace(get_method("feather"), theta=theta)
    own = dataclasses.replace(get_method("feather"), theta=0.25)
    assert own.aimed_at(sparsity) is own
    assert get_method("st3").aimed_at(sparsity) is get_method("st3")


def test_groups_aim_at_one_sparsity():
    assert get_method("sr_ste").aimed_at(0.5) is get_method("sr_ste")
    third = dataclasses.replace(get_method("s_ste"), group=(1, 3))
    assert third.aimed_at(0.6666666667) is third
    message = r"target_sparsity must be 1 - N/M = 0.5 for groups of 2:4, got 0.75; change the schedule, or"
    with pytest.raises(ValueError, match=message):
        get_method("sr_ste").aimed_at(0.75)


def test_get_method_rejects():
    with pytest.raises(ValueError, match=r"method must be one of 'st3', .*, 's_ste', got 'st4'"):
        get_method("st4")
    with pytest.raises(TypeError, match="method must be a name or a Method, got 3 of type int"):
        get_method(3)
    assert Method("mine").name == "mine"
