"""Every way in which a saved state may not fit is told before anything changes."""

import copy
import dataclasses
import json
import re

import pytest

from st3core import PolynomialSchedule, get_method
from st3core._state import check_kernels, check_settings, check_steps, method_of, method_state, schedule_state

SCHEDULE = PolynomialSchedule(0.9, begin_step=2, end_step=10, power=2, update_frequency=3, initial_sparsity=0.1)
OWN = {
    "method": {"name": "st3", "score": "magnitude", "rescale": "channel"},
    "schedule": schedule_state(SCHEDULE),
    "shapes": {"a": [2, 3], "b": [4]},
    "thresholds": {"a": 0.5, "b": 0.25},
    "step": 7,
}


def changed(*path, value):
    """The state with another value at a place."""
    state = copy.deepcopy(OWN)
    place = state
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return state


def without(*path):
    state = copy.deepcopy(OWN)
    place = state
    for key in path[:-1]:
        place = place[key]
    del place[path[-1]]
    return state


def check(state):
    check_settings(OWN, state, ("method", "schedule", "shapes"))
    check_kernels(OWN, state, ("shapes", "thresholds"))
    check_steps(state, "step")


def assert_rejected(state, message):
    with pytest.raises(ValueError, match=re.escape(f"Sparsifier.load_state_dict: state {message}")):
        check(state)


def test_a_schedule_comes_back_from_its_state():
    state = json.loads(json.dumps(schedule_state(SCHEDULE)))
    assert PolynomialSchedule(**state) == SCHEDULE
    assert set(state) == {
        "target_sparsity", "begin_step", "end_step", "power", "update_frequency", "initial_sparsity"
    }  # fmt: skip


def test_its_own_state_is_accepted():
    check(json.loads(json.dumps(OWN)))


def test_more_than_there_must_be_is_accepted():
    check({**OWN, "comment": "from yesterday"})


def test_the_methods_name_may_differ():
    check(changed("method", "name", value="mine"))


@pytest.mark.parametrize("state", [None, 3, ["method"]])
def test_a_state_that_is_no_dictionary(state):
    assert_rejected(state, f"must have the entries {sorted(OWN)}, got {state!r}")


@pytest.mark.parametrize("entry", OWN)
def test_a_missing_entry(entry):
    assert_rejected(without(entry), f"must have the entries {sorted(OWN)}, got {sorted(set(OWN) - {entry})}")


@pytest.mark.parametrize("entry", ["method", "schedule", "shapes"])
def test_an_entry_that_is_no_dictionary(entry):
    assert_rejected(changed(entry, value=[1]), f"must have a dictionary in {entry!r}, got [1]")


@pytest.mark.parametrize(
    ("part", "field"), [(part, field) for part in ("method", "schedule") for field in OWN[part] if field != "name"]
)
def test_another_method_or_schedule(part, field):
    own = OWN[part][field]
    assert_rejected(changed(part, field, value=-1), f"has {part}.{field}=-1, but this Sparsifier has {own!r}")
    assert_rejected(without(part, field), f"has {part}.{field}=None, but this Sparsifier has {own!r}")


def test_the_schedule_has_a_name_of_its_own():
    own = {**OWN, "schedule": {"name": "linear"}}
    with pytest.raises(ValueError, match=re.escape("state has schedule.name=None, but this Sparsifier has 'linear'")):
        check_settings(own, {**OWN, "schedule": {}}, ())


@pytest.mark.parametrize("part", ["shapes", "thresholds"])
def test_kernels_of_another_model(part):
    assert_rejected(without(part, "b"), "belongs to another model; kernels in only one of them: ['b']")
    other = changed(part, "c", value=[1])
    assert_rejected(other, "belongs to another model; kernels in only one of them: ['c']")


def test_kernels_of_another_shape():
    assert_rejected(changed("shapes", "a", value=[3, 2]), "has a of shape [3, 2], but the model has [2, 3]")
    check(changed("shapes", "a", value=(2, 3)))


@pytest.mark.parametrize("value", [-1, True, 1.0, "3", None])
def test_steps_that_are_no_number_of_steps(value):
    assert_rejected(changed("step", value=value), f"must have a step of 0 or more, got {value!r}")


@pytest.mark.parametrize("value", [0, 1, 10**12])
def test_steps(value):
    check(changed("step", value=value))


def test_a_state_from_before_there_were_scopes():
    own = {**OWN, "method": method_state(get_method("gmp"))}
    old = {"name": "gmp", "score": "magnitude", "operator": "hard", "rescale": "none", "backward": "masked"}
    check_settings(own, {**OWN, "method": old}, ("method", "schedule", "shapes"))
    assert method_of(old) == get_method("gmp")
    own["method"]["group"] = [1, 4]
    with pytest.raises(ValueError, match=r"method.group=\[2, 4\], but this Sparsifier has \[1, 4\]"):
        check_settings(own, {**OWN, "method": old}, ("method", "schedule", "shapes"))


def test_a_method_comes_back_from_json():
    method = dataclasses.replace(get_method("feather"), theta=0.25, group=(1, 8))
    assert method_of(json.loads(json.dumps(method_state(method)))) == method
