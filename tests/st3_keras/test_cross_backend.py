import json
import os
import subprocess
import sys

import pytest

from tests.st3_keras.cross_backend import STEPS


def train(backend) -> dict:
    environment = {**os.environ, "KERAS_BACKEND": backend}
    command = [sys.executable, "-m", "tests.st3_keras.cross_backend"]
    finished = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    return json.loads(finished.stdout.splitlines()[-1])


@pytest.mark.backends("torch")  # it trains on all three by itself: once is enough
def test_backends_agree_after_fifty_steps():
    first, *others = (train(backend) for backend in ("torch", "tensorflow", "jax"))
    assert len(first["zeros"]) == first["steps"] == STEPS
    assert first["thresholds"][0] > 0
    for other in others:
        assert other["targets"] == first["targets"]
        assert other["zeros"] == first["zeros"]
        assert other["thresholds"] == pytest.approx(first["thresholds"], rel=1e-4)
