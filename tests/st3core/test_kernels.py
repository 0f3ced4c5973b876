"""What no result shows: that kernels keep to the memory that is theirs."""

import subprocess
import sys

CODE = """
import numpy as np
from st3core import kernels, sparsify
from st3core.memory import MEMORY_FORMATS

seen, plain = [], kernels.array_at


def array_at(address, size, like):
    seen.append((int(address), int(address) + int(size) * like.dtype.itemsize))
    return plain(address, size, like)


def span(array):
    start = array.__array_interface__["data"][0]
    return start, start + array.nbytes


kernels.array_at = array_at
for memory in MEMORY_FORMATS.values():
    for axis in (0, 1):
        seen.clear()
        weight = np.linspace(-1, 1, 60).reshape(5, 12).astype(memory.dtype)
        out = np.empty_like(weight)
        sparsify(weight, 0.5, channel_axis=axis, out=out, check_finite=False)
        given = {span(weight), span(out)}
        assert given <= set(seen)
        own = sorted(set(seen) - given)
        assert len(own) == 4 + 3 + 1
        assert all(end <= start for (_, end), (start, _) in zip(own, own[1:])), own
        assert own[-1][1] - own[0][0] <= 8 * (4 * kernels.WIDE + kernels.LANES + 4 * kernels.BLOCK)
print("kept")
"""


def test_the_operators_buffers_do_not_overlap():
    """Asked of uncompiled kernels, which address the same memory."""
    code = "import os\nos.environ['NUMBA_DISABLE_JIT'] = '1'\n" + CODE
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("kept\n", "")
