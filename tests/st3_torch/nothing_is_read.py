"""A check that whatever runs on a device is never waited for."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class ReadError(AssertionError):
    """Something on the host wanted to know a value."""


class NothingIsRead(TorchDispatchMode):
    """Refuses every operation that a device would have to be waited for."""

    READING = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "bincount", "equal", "is_nonzero")

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        boolean_index = name == "index" and any(i is not None and i.dtype == torch.bool for i in args[1])
        if name in self.READING or boolean_index:
            raise ReadError(name)
        return function(*args, **(kwargs or {}))
