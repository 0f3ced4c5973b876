"""These tests run once per backend, in a process of its own: ``KERAS_BACKEND=jax pytest tests/st3_keras``."""

import os

import pytest

BACKEND = os.environ.get("KERAS_BACKEND")

# Without a choice of backend there is nothing to collect: importing Keras would choose one.
PROGRAMS = ["deployed.py", "distributed.py"]  # they look at the command line, or at what is imported, first
collect_ignore_glob = PROGRAMS if BACKEND else ["*.py"]


def pytest_collection_modifyitems(config, items):
    """Leave out what ``@pytest.mark.backends("jax", ...)`` says is a matter of other backends only."""
    markers = {item: item.get_closest_marker("backends") for item in items}
    others = [item for item, marker in markers.items() if marker and BACKEND not in marker.args]
    config.hook.pytest_deselected(items=others)
    items[:] = [item for item in items if item not in others]
    for item in items:
        if "st3_keras" in str(item.path):  # the frameworks below Keras warn of each other
            item.add_marker(pytest.mark.filterwarnings("default"))
