"""Stop and go on: kill -9, safetensors, distributed checkpoints, and dense weights before or after sparsifying."""

import copy
import os
import pickle
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import nn

from st3_torch import Sparsifier
from st3_torch.checkpoint import load_state, replacing, save_state
from tests.st3_torch.networks import ramp, small_net, train_step
from tests.st3_torch.test_layers import ATTENTION, RECURRENT

ROOT = Path(__file__).parent.parent.parent
STEPS = 16


def adamw(model):
    return torch.optim.AdamW(model.parameters(), lr=0.01)


def trained(steps=8, seed=0, **options):
    model = small_net(seed)
    optimizer, sp = adamw(model), Sparsifier(model, ramp(0.9, end=8), **options)
    for step in range(steps):
        train_step(model, optimizer, sp, step)
    return {"model": model, "optimizer": optimizer, "sparsifier": sp}


def equal(a, b):
    """Whether two states are equal, bit for bit."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def environment():
    """For other processes: they import what is tested here."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "adapters")])}


def run(path, *arguments):
    """Run the program that saves after every step."""
    command = [sys.executable, "-m", "tests.st3_torch.killed", str(path), *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=environment(), check=False, timeout=300).returncode


def test_a_link_stays_a_link(tmp_path):
    real, link = tmp_path / "real.pt", tmp_path / "latest.pt"
    real.write_text("old")
    link.symlink_to(real)
    with replacing(link) as file:
        file.write_text("new")
    assert link.is_symlink()
    assert real.read_text() == "new"


def test_a_killed_run_ends_like_one_that_was_not(tmp_path):
    chance = random.Random(2212)
    assert run(tmp_path / "whole.pt", STEPS) == 0
    killed_at = chance.randrange(2, 8), chance.randrange(9, STEPS) + 0.5  # after a step, and while saving
    for moment in killed_at:
        assert run(tmp_path / "killed.pt", STEPS, moment) == -signal.SIGKILL
        assert torch.load(tmp_path / "killed.pt", weights_only=True)["sparsifier"]["step"] == int(moment) - 1
    assert run(tmp_path / "killed.pt", STEPS) == 0
    whole, resumed = (torch.load(tmp_path / name, weights_only=True) for name in ("whole.pt", "killed.pt"))
    assert whole["sparsifier"]["step"] == STEPS
    assert equal(whole, resumed)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["killed.pt", "whole.pt"]


def fail_halfway(path):
    with replacing(path) as file:
        file.write_text("new")
        raise OSError("the disk is full")


def test_replacing_keeps_the_old_file_if_the_block_fails(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(OSError, match="full"):
        fail_halfway(path)
    assert path.read_text() == "old"
    with replacing(path) as file:
        file.write_text("new")
        assert path.read_text() == "old"
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("file", "new")]


@pytest.mark.parametrize("frozen", [False, True])
def test_a_state_survives_safetensors(tmp_path, frozen):
    sp = trained()["sparsifier"]
    if frozen:
        sp.freeze()
    save_state(sp.state_dict(), tmp_path / "state.safetensors")
    state = load_state(tmp_path / "state.safetensors")
    assert equal(state, sp.state_dict())
    other = trained(0)["sparsifier"]
    other.load_state_dict(state)
    assert equal(other.state_dict(), sp.state_dict())


def test_other_files_are_rejected(tmp_path):
    with pytest.raises(FileNotFoundError):
        load_state(tmp_path / "none")
    save_file({"x": torch.zeros(1)}, tmp_path / "other")
    with pytest.raises(ValueError, match=r"load_state: .*other must be of the format st3core-state-1, got None"):
        load_state(tmp_path / "other")
    save_state(trained()["sparsifier"].state_dict(), tmp_path / "whole")
    (tmp_path / "half").write_bytes((tmp_path / "whole").read_bytes()[:200])
    with pytest.raises(ValueError, match=r"load_state: .*half must be a whole safetensors file"):
        load_state(tmp_path / "half")


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("frozen", [False, True])
def test_a_state_survives_a_distributed_checkpoint(tmp_path, frozen):
    parts = trained()
    if frozen:
        parts["sparsifier"].freeze()
    dcp.save({"model": parts["model"].state_dict(), "sparsifier": parts["sparsifier"]}, checkpoint_id=tmp_path)
    other = trained(8, seed=1)
    if frozen:
        other["sparsifier"].freeze()
    weights = other["model"].state_dict()
    dcp.load({"model": weights, "sparsifier": other["sparsifier"]}, checkpoint_id=tmp_path)
    other["model"].load_state_dict(weights)
    for name in ("model", "sparsifier"):
        assert equal(parts[name].state_dict(), other[name].state_dict())


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_distributed_checkpoint_without_its_masks_is_rejected(tmp_path):
    frozen, other = trained()["sparsifier"], trained()["sparsifier"]
    frozen.freeze()
    dcp.save({"sparsifier": frozen}, checkpoint_id=tmp_path)
    before = other.state_dict()
    with pytest.raises(Exception, match=r"frozen=True and masks of \[\]; .* so freeze it before"):
        dcp.load({"sparsifier": other}, checkpoint_id=tmp_path)
    assert equal(other.state_dict(), before)


def test_all_differing_entries_are_named():
    sp, other = trained()["sparsifier"], Sparsifier(small_net(), ramp(0.8, end=9), "gmp")
    message = (
        r"method.operator='soft'.*; method.backward='straight_through'.*; schedule.target_sparsity=0.9.*; .*end_st"
    )
    with pytest.raises(ValueError, match=message):
        other.load_state_dict(sp.state_dict())
    narrow = Sparsifier(nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 4)), ramp(0.9, end=8))
    wide = Sparsifier(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 5)), ramp(0.9, end=8))
    with pytest.raises(ValueError, match=r"0.weight of shape \[3, 2\], .* has \[3, 3\]; 1.weight of shape \[4, 3\]"):
        wide.load_state_dict(narrow.state_dict())
    with pytest.raises(ValueError, match=r"kernels in only one of them: \['1.weight', '3.weight', '6.weight'\]"):
        sp.load_state_dict(narrow.state_dict())


LAYERS = {**RECURRENT, **ATTENTION, "convolution": lambda: nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3))}


@pytest.mark.parametrize(
    "copier",
    [lambda x: x, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))],
    ids=["itself", "deepcopy", "pickle"],
)
@pytest.mark.parametrize("name", list(LAYERS))
def test_dense_weights_load_into_a_sparsified_model(name, copier):
    torch.manual_seed(0)
    pretrained, early, late = LAYERS[name]().state_dict(), LAYERS[name](), LAYERS[name]()
    before = dict(pretrained)
    early.load_state_dict(pretrained)
    Sparsifier(early, ramp())
    Sparsifier(late, ramp())
    late = copier(late)
    assert not equal(early.state_dict(), late.state_dict())
    late.load_state_dict(pretrained)
    assert equal(early.state_dict(), late.state_dict())
    assert equal(pretrained, before)


def test_keys_that_are_missing_or_unknown_are_named_as_ever():
    model = small_net()
    state = model.state_dict()
    sp = Sparsifier(model, ramp(0.9, end=0))
    sparsified = model.state_dict()
    assert list(model.load_state_dict({**sparsified, "0.weight": state["0.weight"]}, strict=False))[1] == ["0.weight"]
    del state["0.weight"]
    with pytest.raises(RuntimeError, match=r"Missing key\(s\) in state_dict: \"0.parametrizations.weight.original\"."):
        model.load_state_dict(state)
    with pytest.raises(
        RuntimeError, match=r"Unexpected key\(s\) in state_dict: \"0.parametrizations.weight.original\""
    ):
        sp.finalize().load_state_dict({**state, "0.parametrizations.weight.original": sparsified["6.bias"]})


def test_dense_weights_reach_tied_kernels_and_wrapped_models():
    def tied():
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        model[1].weight = model[0].weight
        return model

    pretrained, model = tied().state_dict(), tied()
    Sparsifier(model, ramp())
    nn.ModuleDict({"inner": model}).load_state_dict({f"inner.{key}": value for key, value in pretrained.items()})
    raw = [layer.parametrizations.weight.original for layer in model]
    assert raw[0] is raw[1]
    assert torch.equal(raw[0], pretrained["1.weight"])


def test_dense_weights_load_beside_another_parametrization():
    model, pretrained = nn.Linear(4, 4), nn.Linear(4, 4)
    model.extra = nn.Parameter(torch.eye(4))
    nn.utils.parametrizations.orthogonal(model, "extra")
    sp = Sparsifier(model, ramp(0.5, end=0))
    model.load_state_dict(pretrained.state_dict(), strict=False)
    assert torch.equal(model.parametrizations.weight.original, pretrained.weight)
    sp.finalize()
    assert type(model)._load_from_state_dict is nn.Linear._load_from_state_dict
