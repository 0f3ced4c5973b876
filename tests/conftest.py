from pathlib import Path

import hypothesis
import pytest

# No deadline: the first call of a kernel compiles it. Derandomised: a red run is red again.
hypothesis.settings.register_profile("default", deadline=None, derandomize=True, max_examples=100, database=None)
hypothesis.settings.load_profile("default")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    core = Path(__file__).parent / "st3core"
    for item in items:
        if core in item.path.parents:
            item.add_marker(pytest.mark.core)
