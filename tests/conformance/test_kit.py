"""The kit against backends that are right, and against backends that are wrong in one place each."""

import pytest

from st3core.conformance import PROPERTIES, NumpyBackend, check, check_backend
from st3core.conformance.run import check_property, select
from tests.conformance.broken import BROKEN
from tests.conformance.textbook import Textbook


@pytest.mark.parametrize("kind", BROKEN, ids=lambda kind: kind.__name__)
def test_a_broken_backend_violates_its_property(kind):
    (chosen,) = select([BROKEN[kind]])
    result = check_property(chosen, kind())
    assert result.outcome == "failed"
    with pytest.raises(AssertionError, match=chosen.name):
        check_backend(kind(), properties=[chosen.name])


def test_every_property_is_violated_by_a_broken_backend():
    assert {p.name for p in PROPERTIES} == set(BROKEN.values())
    assert len(BROKEN) >= 25


@pytest.mark.parametrize("kind", [NumpyBackend, Textbook], ids=lambda kind: kind.name)
def test_a_correct_backend_is_accepted(kind):
    assert [r.failure for r in check(kind()) if r.failure] == []
