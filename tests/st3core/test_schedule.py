import math
import pickle
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from st3core import PolynomialSchedule


@st.composite
def schedules(draw, initial=False):
    low, high = sorted(draw(st.tuples(*[st.floats(0, 0.999)] * 2)))
    begin = draw(st.integers(0, 50))
    return PolynomialSchedule(
        high,
        begin_step=begin,
        end_step=begin + draw(st.integers(0, 60)),
        power=draw(st.sampled_from([1, 2, 3, 0.5])),
        update_frequency=draw(st.integers(1, 70)),
        initial_sparsity=low if initial else 0.0,
    )


@given(schedules(), st.integers(0, 200))
def test_schedule_is_the_formula_of_the_design(schedule, step):
    updates = (schedule.end_step - schedule.begin_step) // schedule.update_frequency
    if step < schedule.begin_step:
        expected = 0.0
    elif step >= schedule.end_step:
        expected = schedule.target_sparsity
    elif updates == 0:
        expected = 0.0
    else:
        progress = np.clip(((step - schedule.begin_step) // schedule.update_frequency) / updates, 0, 1)
        expected = schedule.target_sparsity * (1 - (1 - progress) ** schedule.power)
    assert schedule(step) == expected


@given(schedules(initial=True))
def test_schedule_rises_and_stays_within_its_bounds(schedule):
    values = [schedule(step) for step in range(schedule.begin_step, schedule.end_step + 100)]
    assert all(a <= b for a, b in pairwise(values))
    assert all(schedule.initial_sparsity <= value <= schedule.target_sparsity for value in values)
    assert values[-1] == schedule.target_sparsity


@given(schedules(initial=True), st.integers(0, 200))
def test_schedule_changes_at_update_steps_only(schedule, step):
    if step > 0 and schedule(step) != schedule(step - 1):
        assert schedule.is_update_step(step) or step == schedule.end_step


@given(schedules(), st.integers(0, 200))
def test_is_update_step_counts_from_the_beginning_and_never_ends(schedule, step):
    expected = step in range(schedule.begin_step, 201, schedule.update_frequency)
    assert schedule.is_update_step(step) is expected


@given(schedules(initial=True))
def test_schedule_survives_pickle(schedule):
    assert pickle.loads(pickle.dumps(schedule)) == schedule


def test_schedule_never_rounds_past_its_target():
    target = 0.9152276080232461
    schedule = PolynomialSchedule(
        target, begin_step=0, end_step=5, update_frequency=2, initial_sparsity=0.3887714414209608
    )
    assert schedule(4) == target


def test_initial_sparsity_starts_at_begin_step():
    schedule = PolynomialSchedule(0.75, begin_step=10, end_step=20, power=1, initial_sparsity=0.25)
    assert [schedule(step) for step in (9, 10, 15, 20)] == [0.0, 0.25, 0.5, 0.75]


def test_schedule_of_no_length_jumps():
    schedule = PolynomialSchedule(0.5, begin_step=3, end_step=3)
    assert [schedule(step) for step in (2, 3, 4)] == [0.0, 0.5, 0.5]


def test_steps_may_be_numpy_integers():
    assert PolynomialSchedule(0.5, begin_step=np.int64(0), end_step=np.int32(2), power=1)(np.int64(1)) == 0.25


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"target_sparsity": 1.0}, ValueError, r"target_sparsity must be in \[0, 1\), got 1.0"),
        ({"target_sparsity": -0.1}, ValueError, r"target_sparsity must be in \[0, 1\), got -0.1"),
        ({"target_sparsity": math.nan}, ValueError, r"target_sparsity must be in \[0, 1\), got nan"),
        ({"target_sparsity": "0.5"}, TypeError, "target_sparsity must be a real number, got '0.5'"),
        ({"initial_sparsity": 0.95}, ValueError, "initial_sparsity must not exceed target_sparsity, got 0.95 and 0.9"),
        ({"begin_step": -1}, ValueError, "begin_step must be at least 0, got -1"),
        ({"begin_step": 1.0}, TypeError, "begin_step must be an integer, got 1.0"),
        ({"begin_step": 9, "end_step": 8}, ValueError, "end_step must not come before begin_step, got end_step=8"),
        ({"update_frequency": 0}, ValueError, "update_frequency must be at least 1, got 0"),
        ({"update_frequency": True}, TypeError, "update_frequency must be an integer, got True"),
        ({"power": 0}, ValueError, "power must be positive and finite, got 0.0"),
        ({"power": math.inf}, ValueError, "power must be positive and finite, got inf"),
        ({"power": "3"}, TypeError, "power must be a real number, got '3'"),
    ],
)
def test_schedule_rejects(arguments, error, message):
    complete = {"target_sparsity": 0.9, "begin_step": 0, "end_step": 10, **arguments}
    with pytest.raises(error, match=message):
        PolynomialSchedule(complete.pop("target_sparsity"), **complete)


@pytest.mark.parametrize(("step", "error"), [(-1, ValueError), (1.5, TypeError), ("1", TypeError)])
def test_step_is_checked(step, error):
    schedule = PolynomialSchedule(0.9, begin_step=0, end_step=10)
    for function in (schedule, schedule.is_update_step):
        with pytest.raises(error, match=r"PolynomialSchedule: step must be .*, got"):
            function(step)


def test_options_are_keyword_only():
    with pytest.raises(TypeError):
        PolynomialSchedule(0.9, 0, 10)
