"""Ways to train that PyTorch's users have: under each, the schedule counts updates and the sparsity is the exact one."""

import math

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

from st3_torch import Sparsifier, device
from tests.st3_torch.networks import batch, ramp, small_net

STEPS = 12


def plain(model, optimizer, sp):
    for step in range(STEPS):
        loss_of(model, step).backward()
        update(optimizer, sp)
        yield


def clipped(model, optimizer, sp):
    for step in range(STEPS):
        loss_of(model, step).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        update(optimizer, sp)
        yield


def accumulated(model, optimizer, sp):
    for step in range(STEPS):
        for part in range(3):
            (loss_of(model, 3 * step + part) / 3).backward()
        update(optimizer, sp)
        yield


def checkpointed(model, optimizer, sp):
    for step in range(STEPS):
        images, labels = batch(step)
        nn.functional.cross_entropy(checkpoint(model, images, use_reentrant=False), labels).backward()
        update(optimizer, sp)
        yield


def functional(model, optimizer, sp):
    for step in range(STEPS):
        images, labels = batch(step)
        outputs = torch.func.functional_call(model, dict(model.named_parameters()), (images,))
        nn.functional.cross_entropy(outputs, labels).backward()
        update(optimizer, sp)
        yield


def autocast(model, optimizer, sp):
    for step in range(STEPS):
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(model, step)
        loss.backward()
        update(optimizer, sp)
        yield


def scaled(model, optimizer, sp):
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    sp.follow(optimizer)
    for step in range(STEPS + 2):
        optimizer.zero_grad()
        scaler.scale(loss_of(model, step)).backward()
        if step in (3, 7):
            next(model.parameters()).grad.fill_(float("inf"))
        before = sp.step_count
        scaler.step(optimizer)
        scaler.update()
        assert sp.step_count == before + (step not in (3, 7))
        yield


def averaged(model, optimizer, sp):
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    for step in range(STEPS):
        loss_of(model, step).backward()
        update(optimizer, sp)
        average.update_parameters(model)
        yield
    copied = average.module[0]
    limit = copied.parametrizations.weight[0].threshold
    raw = copied.parametrizations.weight.original
    assert limit > 0
    assert torch.equal(copied.weight == 0, raw.abs() <= limit)


def compiled(model, optimizer, sp):
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    forward = torch.compile(model, fullgraph=True, backend=count)
    for step in range(STEPS):
        images, labels = batch(step)
        nn.functional.cross_entropy(forward(images), labels).backward()
        update(optimizer, sp)
        yield
    assert len(graphs) == 1


def loss_of(model, step):
    images, labels = batch(step)
    dtype = next(model.parameters()).dtype
    return nn.functional.cross_entropy(model(images.to(dtype)), labels)


def update(optimizer, sp):
    optimizer.step()
    optimizer.zero_grad()
    sp.step()


def sgd(model, **options):
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3, **options)


def adamw(model, **options):
    return torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1, **options)


WAYS = [plain, clipped, accumulated, checkpointed, functional, autocast, scaled, averaged, compiled]
KINDS = [{"foreach": False}, {"foreach": True}, {"fused": True}]


@pytest.fixture(params=["cpu", "device"])
def path(request, monkeypatch):
    """Both paths, on the CPU."""
    if request.param == "device":
        for module in ("operator._on_cpu", "counting.on_cpu", "plan.on_cpu"):
            monkeypatch.setattr(f"st3_torch.{module}", lambda tensor: False)
        monkeypatch.setattr(device, "suits", lambda weights: True)


def is_exact(sp):
    """Whether so many weights are zero as the schedule asks for: all up to the rank, and ties only beyond."""
    total = sum(raw.numel() for raw in sp.raw_parameters)
    expected = math.floor((total - 1) * sp.target_sparsity) + 1 if sp.target_sparsity else 0
    return expected <= round(sp.sparsity * total) <= expected + 1


@pytest.mark.filterwarnings("ignore:Found a non-finite norm:UserWarning")
@pytest.mark.parametrize("way", WAYS)
def test_ways_to_train(way, path):
    model = small_net()
    sp = Sparsifier(model, ramp())
    done = 0
    for _ in way(model, sgd(model), sp):
        assert is_exact(sp)
        done += 1
    assert sp.step_count == STEPS
    assert done >= STEPS
    zeros = {name: kernel == 0 for name, kernel in kernels(sp.finalize()).items()}
    assert sum(int(zero.sum()) for zero in zeros.values()) >= 0.89 * sum(zero.numel() for zero in zeros.values())


@pytest.mark.parametrize("options", KINDS)
@pytest.mark.parametrize("make", [sgd, adamw])
def test_kinds_of_optimizers(make, options, path):
    model = small_net()
    sp = Sparsifier(model, ramp())
    optimizer = make(model, **options)
    for _ in plain(model, optimizer, sp):
        assert is_exact(sp)
    sp.freeze()
    zeros = {name: kernel == 0 for name, kernel in kernels(model).items()}
    for _ in plain(model, optimizer, sp):
        pass
    for name, kernel in kernels(sp.finalize()).items():
        assert torch.equal(kernel == 0, zeros[name])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_parameters_of_other_dtypes(dtype, path):
    model = small_net().to(dtype)
    sp = Sparsifier(model, ramp())
    for _ in plain(model, sgd(model), sp):
        pass
    assert {kernel.dtype for kernel in kernels(model).values()} == {dtype}
    assert 0.89 < sp.sparsity < 0.93  # half precision has many ties


def test_channels_last(path):
    losses = []
    for memory in (torch.contiguous_format, torch.channels_last):
        model = small_net().to(memory_format=memory)
        sp = Sparsifier(model, ramp())
        for _ in plain(model, sgd(model), sp):
            assert is_exact(sp)
        losses.append(float(loss_of(model, 0).detach()))
        assert model[0].weight.is_contiguous(memory_format=memory)
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def kernels(model):
    """Forward weight of every kernel, by name."""
    kinds = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, kinds)}
    return {name: layer.weight.detach().clone() for name, layer in layers.items()}
