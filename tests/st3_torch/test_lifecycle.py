"""ResNet-50 and GPT-2 from the first step to the exported file, over two processes; and what an import costs."""

import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_model

from st3_torch.export import load_sparse
from tests.st3_torch import lifecycle
from tests.st3_torch.test_checkpoint import ROOT, environment


def python(*arguments):
    """What another process prints."""
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, env=environment(), check=True, timeout=300, capture_output=True, text=True)
    return done.stdout


@pytest.fixture
def one_thread():
    """Several would wait for each other: tests beside this one have the other cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", ["resnet50", "gpt2"])
def test_from_the_first_step_to_the_file(name, tmp_path):
    parts = lifecycle.start(name)
    sp, count = parts["sparsifier"], parts["sparsifier"].report().weights
    lifecycle.train(name, **parts)
    lifecycle.save(parts, tmp_path / "checkpoint.pt")
    lifecycle.train(name, **parts)
    assert sp.step_count == 2 * lifecycle.HALF
    assert sp.report().zeros == int((count - 1) * 0.9) + 1
    report, model = sp.report(), sp.finalize()

    python("-m", "tests.st3_torch.lifecycle", name, tmp_path)
    state, found = model.state_dict(), load_sparse(tmp_path / "sparse.safetensors")
    assert state.keys() == found.keys()
    assert all(value.dtype == found[key].dtype and torch.equal(value, found[key]) for key, value in state.items())

    reloaded = lifecycle.MODELS[name][0]()
    reloaded.load_state_dict(found)
    loss = lifecycle.MODELS[name][1]
    with torch.no_grad():
        assert torch.equal(loss(reloaded.eval(), 0), loss(model.eval(), 0))
    save_model(model, tmp_path / "dense.safetensors")
    dense, sparse = ((tmp_path / f"{kind}.safetensors").stat().st_size for kind in ("dense", "sparse"))
    assert dense - sparse == pytest.approx(report.dense_bytes - report.sparse_bytes, rel=0.1)
    if name == "resnet50":
        assert sparse < 0.25 * dense


def test_importing_the_adapter_imports_no_trainer():
    code = "import st3_torch, sys; print({'accelerate', 'lightning', 'safetensors', 'transformers'} & set(sys.modules))"
    assert python("-c", code) == "set()\n"
