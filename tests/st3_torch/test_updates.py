"""Counting the updates of an optimizer: accumulation, skipped steps, copies."""

import copy
import pickle

import pytest
import torch
from torch import nn

from st3_torch import Sparsifier
from tests.st3_torch.networks import batch, ramp, small_net, train_step


def sgd(model, **options):
    return torch.optim.SGD(model.parameters(), lr=0.1, **options)


def test_following_is_stepping():
    trained = []
    for follow in (False, True):
        model = small_net()
        optimizer, sp = sgd(model, momentum=0.9), Sparsifier(model, ramp())
        if follow:
            assert sp.follow(optimizer) is sp
        for step in range(12):
            train_step(model, optimizer, None if follow else sp, step)
        trained.append((sp.step_count, sp.thresholds, [p.tolist() for p in sp.finalize().parameters()]))
    assert trained[0] == trained[1]
    assert trained[0][0] == 12


def test_accumulated_batches_do_not_count():
    model = small_net()
    optimizer, sp = sgd(model), Sparsifier(model, ramp())
    sp.follow(optimizer)
    for step in range(6):
        images, labels = batch(step)
        nn.functional.cross_entropy(model(images), labels).backward()
        if step % 3 == 2:
            optimizer.step()
            optimizer.zero_grad()
    assert sp.step_count == 2


@pytest.mark.parametrize("fused", [False, True])
def test_steps_that_the_scaler_skips_do_not_count(fused):
    model = small_net()
    optimizer, sp = sgd(model, fused=fused), Sparsifier(model, ramp())
    sp.follow(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    counts = []
    for step in range(4):
        images, labels = batch(step)
        optimizer.zero_grad()
        scaler.scale(nn.functional.cross_entropy(model(images), labels)).backward()
        if step in (1, 2):
            model[6].bias.grad[0] = float("inf")
        before = [p.clone() for p in sp.raw_parameters]
        scaler.step(optimizer)
        scaler.update()
        moved = not all(map(torch.equal, before, sp.raw_parameters))
        assert moved == (step not in (1, 2))
        counts.append(sp.step_count)
    assert counts == [1, 1, 1, 2]


def test_one_optimizer_is_followed_once():
    model = small_net()
    optimizer, other, sp = sgd(model), sgd(model), Sparsifier(model, ramp())
    sp.follow(optimizer).follow(optimizer)
    train_step(model, optimizer)
    assert sp.step_count == 1
    sp.follow(other)
    train_step(model, optimizer)
    assert sp.step_count == 1
    train_step(model, other)
    assert sp.step_count == 2
    sp.unfollow()
    train_step(model, other)
    sp.step()
    assert sp.step_count == 3


def test_while_following_step_is_not_called():
    model = small_net()
    sp = Sparsifier(model, ramp()).follow(sgd(model))
    with pytest.raises(
        RuntimeError, match=r"Sparsifier.step: the updates of an optimizer are counted by follow; leave"
    ):
        sp.step()
    assert sp.step_count == 0


def test_finalize_lets_the_optimizer_go():
    model = small_net()
    optimizer, sp = sgd(model), Sparsifier(model, ramp(0.9, end=0))
    sp.follow(optimizer).finalize()
    train_step(model, optimizer)
    assert sp.step_count == 0


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_copies_are_told_again(copier):
    model = small_net()
    optimizer, sp = sgd(model), Sparsifier(model, ramp())
    sp.follow(optimizer)
    its_model, its_optimizer, its_sp = copier((model, optimizer, sp))
    train_step(its_model, its_optimizer)
    assert (sp.step_count, its_sp.step_count) == (0, 0)
    its_sp.step()  # it follows nobody
    assert its_sp.step_count == 1
    its_sp.follow(its_optimizer)
    train_step(its_model, its_optimizer)
    assert (sp.step_count, its_sp.step_count) == (0, 2)


def test_what_cannot_be_followed():
    model = small_net()
    sp = Sparsifier(model, ramp(0.9, end=0))
    with pytest.raises(
        TypeError, match=r"Sparsifier.follow: optimizer must be a torch.optim.Optimizer, got Sequential"
    ):
        sp.follow(model)
    with pytest.raises(ValueError, match=r"Sparsifier.follow: optimizer must train a sparsified kernel, got one that"):
        sp.follow(sgd(small_net()))
    sp.finalize()
    with pytest.raises(RuntimeError, match=r"Sparsifier.follow: the model has been finalized"):
        sp.follow(sgd(model))
