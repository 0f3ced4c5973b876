import tracemalloc
from collections.abc import Callable
from pathlib import Path

import hypothesis
import pytest
from numba import config

# No deadline: the first call of a kernel compiles it. Derandomised: a red run is red again.
hypothesis.settings.register_profile("default", deadline=None, derandomize=True, max_examples=50, database=None)
# For `make mutation`: fewer cases, and a failure need not be small.
hypothesis.settings.register_profile(
    "mutation",
    hypothesis.settings.get_profile("default"),
    max_examples=30,
    phases=(hypothesis.Phase.explicit, hypothesis.Phase.generate),
)
# The same code once more, and slower: fewer cases.
hypothesis.settings.register_profile("uncompiled", hypothesis.settings.get_profile("default"), max_examples=20)
hypothesis.settings.load_profile("uncompiled" if config.DISABLE_JIT else "default")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    core = Path(__file__).parent / "st3core"
    for item in items:
        if core in item.path.parents:
            item.add_marker(pytest.mark.core)


@pytest.fixture
def peak_memory() -> Callable[[Callable[[], object]], int]:
    """Measures the bytes that a call takes at its peak; the first call, which may compile, does not count."""

    def measure(call: Callable[[], object]) -> int:
        call()
        tracemalloc.start()
        try:
            call()
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    return measure
