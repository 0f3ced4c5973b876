import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent


def test_four_devices_find_what_one_finds_without_gathering():
    # In a process of its own, since devices are counted once.
    path = os.pathsep.join([str(ROOT), str(ROOT / "adapters")])
    command = [
        sys.executable,
        "-m",
        "tests.st3_jax.sharded",
        "st3",
        "st3_sigma",
        "layer",
        "sr_ste",
        "s_ste",
        "shortlist",
    ]
    finished = subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
