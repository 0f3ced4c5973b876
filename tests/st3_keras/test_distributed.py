import json
import subprocess
import sys

import pytest

from tests.st3_keras.networks import BACKEND

KINDS = {
    "tensorflow": ["mirrored", "mirrored_average"],
    "jax": ["data_parallel", "model_parallel"],
    "torch": ["data_parallel_torch"],
}[BACKEND]


@pytest.mark.parametrize("kind", KINDS)
def test_two_devices_train_like_one(kind):
    command = [sys.executable, "-m", "tests.st3_keras.distributed", kind]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0, finished.stderr
    one, two = json.loads(finished.stdout.splitlines()[-1])
    assert two["sparsity"] == one["sparsity"] > 0.79
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)
    assert two["thresholds"] == pytest.approx(one["thresholds"], rel=1e-5)
    assert len(set(two.get("digests", ["one process"]))) == 1
