"""What the figures were measured on, and with."""

import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import numba
import numpy as np
import torch

from st3core.threads import thread_count


def describe() -> dict[str, Any]:
    """Processor, cores, threads and versions."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": thread_count(),
        "system": platform.system(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "numba": numba.__version__,
        "torch": str(torch.__version__),
    }


def provenance(command: str) -> dict[str, Any]:
    """Where figures come from: what :func:`describe` says, the commit and the command."""
    return {**describe(), "commit": _commit(), "command": command}


def name(machine: dict[str, Any]) -> str:
    """A line that names the machine."""
    return f"{machine['processor']}, {machine['cores']} cores, {machine['threads']} threads"


def versions(machine: dict[str, Any]) -> str:
    """A line that names the software."""
    return ", ".join(
        [
            machine["system"],
            *(f"{x} {machine[x.lower()]}" for x in ("Python", "NumPy", "Numba")),
            f"PyTorch {machine['torch']}",
        ]
    )


def measured(origin: dict[str, Any]) -> str:
    """A line that says where figures come from; older ones do not know their commit."""
    where = name(origin)
    return f"`{origin['command']}` at commit {origin['commit']}, on {where}" if "commit" in origin else where


def _commit() -> str:
    """What is measured; with a plus sign where files have been changed since."""
    try:
        found = subprocess.run(["git", "describe", "--always", "--dirty=+"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return found.stdout.strip()


def _processor() -> str:
    """Name of the processor, where the system tells."""
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return names[0].partition(":")[2].strip() if names else platform.processor()
