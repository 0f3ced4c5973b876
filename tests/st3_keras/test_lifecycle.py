"""From the first step to the exported model, through three processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

DEPLOYED = Path(__file__).parent / "deployed.py"


def environment(folder) -> dict[str, str]:
    """With JAX nearly all the time goes into compiling; so compile quickly, and not again in the next process."""
    return {
        **os.environ,
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0",
        "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }


def run(*arguments) -> str:
    """Output of a new process; the last argument is the folder that all of them share."""
    command = [sys.executable, *map(str, arguments)]
    finished = subprocess.run(command, env=environment(arguments[-1]), capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


def arrays(path):
    with np.load(path) as file:
        return [file[name] for name in file.files]


@pytest.mark.parametrize("network", ["mobilenet", "transformer"])
def test_from_the_first_step_to_the_exported_model(network, tmp_path):
    for part in ("begin", "resume"):
        run("-m", "tests.st3_keras.lifecycle", network, part, tmp_path)
    whole, resumed = (arrays(tmp_path / name) for name in ("whole.npz", "resumed.npz"))
    assert len(resumed) == len(whole)
    assert [place for place, (a, b) in enumerate(zip(resumed, whole, strict=True)) if a.tobytes() != b.tobytes()] == []
    facts = json.loads(run(DEPLOYED, tmp_path).splitlines()[-1])
    with np.load(tmp_path / "outputs.npz") as file:
        outputs, sparsity = file["outputs"], file["sparsity"]
    assert sparsity == pytest.approx(0.8, abs=0.001)
    np.testing.assert_array_equal(np.float32(facts["loaded"]), outputs)
    assert facts["exported"]
    for exported in facts["exported"].values():
        np.testing.assert_allclose(exported, outputs, rtol=1e-4, atol=1e-5)
    assert facts["dtypes"] == ["int8"]
    assert facts["kept"] == facts["zeros"]
    assert sum(facts["zeros"]) > 0
    np.testing.assert_allclose(facts["quantized"], outputs, atol=0.02)
