"""The adapters of this project, held to the specification."""

import numpy as np
import pytest

from st3_torch.conformance import Backend, DeviceBackend
from st3core.conformance import BackendConformance


class TestTorch(BackendConformance):
    backend = Backend()
    max_examples = 15


class TestTorchDevicePath(BackendConformance):
    backend = DeviceBackend()
    max_examples = 15


@pytest.mark.parametrize("kind", [Backend, DeviceBackend], ids=lambda kind: kind.name)
def test_memory_is_shared_with_numpy(kind):
    array = np.arange(6.0).reshape(2, 3)[:, ::2]
    tensor = kind().from_numpy(array)
    array[0, 0] = 7
    assert tensor[0, 0] == 7
    assert tensor.stride() == (3, 2)
