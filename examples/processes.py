"""One process, or several under ``torchrun``: wrapping a model, adding numbers up, saving and loading whole states."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint import state_dict as states
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from examples.networks import ResidualBlock

_WHOLE = states.StateDictOptions(full_state_dict=True, cpu_offload=True)


@dataclass(frozen=True)
class Processes:
    """Which of how many processes this is, and the device that it works on."""

    rank: int
    world: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        """Whether this is the process that prints and writes files."""
        return self.rank == 0

    def total(self, values: torch.Tensor) -> torch.Tensor:
        """Sum over all processes."""
        if self.world > 1:
            dist.all_reduce(values)
        return values


@contextmanager
def started() -> Iterator[Processes]:
    """Join the processes that ``torchrun`` has started; without it, be the only one."""
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if "RANK" not in os.environ:
        yield Processes(0, 1, device)
        return
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield Processes(dist.get_rank(), dist.get_world_size(), device)
    finally:
        dist.destroy_process_group()


def shard(model: nn.Module) -> None:
    """Shard every block, and what is left, over all processes (FSDP2)."""
    for module in model.modules():
        if isinstance(module, ResidualBlock):
            fully_shard(module)
    fully_shard(model)


def data_parallel(model: nn.Module, processes: Processes) -> nn.Module:
    """What to call in training, for a model that every process holds whole."""
    if processes.world == 1:
        return model
    devices = [processes.device] if processes.device.type == "cuda" else None
    known = signature(DistributedDataParallel).parameters
    own = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"  # before PyTorch 2.13
    return DistributedDataParallel(model, device_ids=devices, **{own: False})  # type: ignore[arg-type] # see below


def share_statistics(model: nn.Module, processes: Processes) -> None:
    """Give all processes the mean of their running statistics of batch norm: each has seen its own images."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and processes.world > 1:
            for statistics in (module.running_mean, module.running_var):
                if statistics is not None:
                    processes.total(statistics).div_(processes.world)


def whole_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """States of the model and the optimizer by name, however they are spread; gathered in the first process."""
    weights, momenta = states.get_state_dict(model, optimizer, options=_WHOLE)
    return {"model": weights, "optimizer": momenta}


def load_whole_state(model: nn.Module, optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Load what :func:`whole_state` returned in the first process; every process reads the same file."""
    states.set_state_dict(
        model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"], options=_WHOLE
    )
