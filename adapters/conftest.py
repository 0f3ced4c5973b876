"""Keras decides on a backend when it is imported, so its adapter is looked at only where one was asked for."""

import os

import pytest

collect_ignore_glob = [] if os.environ.get("KERAS_BACKEND") else ["st3_keras/*"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let Keras and what is below it warn of each other."""
    for item in items:
        if "st3_keras" in item.path.parts:
            item.add_marker(pytest.mark.filterwarnings("default"))
