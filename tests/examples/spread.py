"""One of several processes that train a small ResNet on generated images; test_imagenet.py starts them."""

import os
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from examples import imagenet, networks, training
from examples.processes import share_statistics, started


def run(rank, world, port, images, out):
    """Train sharded: once without a stop, once stopped after the first epoch; then data parallel."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    with started() as processes:
        norm = nn.BatchNorm2d(2)
        norm.running_var.fill_(rank + 0.5)
        share_statistics(norm, processes)
        assert norm.running_var.tolist() == [world / 2, world / 2]
        train(processes, images, Path(out) / "whole", fsdp=True)
        train(processes, images, Path(out) / "stopped", fsdp=True, stop_after=1)
        train(processes, images, Path(out) / "stopped", fsdp=True, resume=True)
        train(processes, images, Path(out) / "parallel")


def train(processes, images, out, *, fsdp=False, resume=False, stop_after=None):
    settings = training.Settings(Path(images), out, 2, 30, 0.8, "st3", 0, resume, stop_after, fsdp)
    parts = (imagenet.Folder(settings.data / part, 32, 0) for part in ("train", "val"))
    torch.manual_seed(0)
    model = networks.resnet50(10, 4, (1, 1, 1, 1))
    norm = model.stem[0].norm
    training.run(model, imagenet.ImageNet(*parts, 30, 0, 0, processes), imagenet.RECIPE, settings, processes)
    statistics = [None] * processes.world
    dist.all_gather_object(statistics, norm.running_mean.tolist())
    assert all(values == statistics[0] for values in statistics)
