"""Compact files, ``torch.export`` and ONNX."""

import json

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from st3_torch import Sparsifier
from st3_torch.export import load_sparse, save_sparse
from tests.st3_torch.networks import ramp, small_net, train_step

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def same(a, b):
    """Whether two tensors have the same dtype, shape and bits."""
    equal = a.dtype == b.dtype and a.shape == b.shape
    return equal and bits(a) == bits(b)


def bits(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8).tolist()


def finalized(sparsity=0.9):
    model = small_net()
    optimizer, sp = torch.optim.SGD(model.parameters(), lr=0.1), Sparsifier(model, ramp(sparsity, end=5))
    for step in range(6):
        train_step(model, optimizer, sp, step)
    return sp.finalize().eval()


SPECIAL = [0.0, -0.0, 1.0, float("nan"), float("inf"), 6e-8]


@pytest.mark.parametrize("dtype", DTYPES)
@given(shape=st.lists(st.integers(0, 5), max_size=4), values=st.data(), zeros=st.floats(0, 1))
def test_every_bit_comes_back(tmp_path_factory, dtype, shape, values, zeros):
    count = int(np.prod(shape))
    flat = torch.tensor(values.draw(st.lists(st.sampled_from(SPECIAL), min_size=count, max_size=count)), dtype=dtype)
    flat[torch.rand(count, generator=torch.Generator().manual_seed(0)) < zeros] = 0
    state = {"x": flat.reshape(shape)}
    path = tmp_path_factory.mktemp("file") / "x"
    save_sparse(state, path)
    assert same(load_sparse(path)["x"], state["x"])


def test_the_file_is_as_documented(tmp_path):
    weight = torch.zeros(3, 7)
    weight[0, 3], weight[1, 1], weight[2, 6] = 1.5, -0.0, float("inf")
    save_sparse({"w": weight, "b": torch.ones(3)}, tmp_path / "x")
    parts = load_file(tmp_path / "x")
    assert set(parts) == {"dense/b", "bitmap/w", "values/w"}
    assert parts["bitmap/w"].tolist() == [1 << 3, 1 << 0, 1 << 4]  # elements 3, 8 and 20
    assert same(parts["values/w"], torch.tensor([1.5, -0.0, float("inf")]))


def test_tensors_that_would_not_shrink_stay_dense(tmp_path):
    state = {"full": torch.ones(100), "counts": torch.zeros(100, dtype=torch.int64), "scalar": torch.tensor(0.0)}
    save_sparse(state, tmp_path / "x")
    assert set(load_file(tmp_path / "x")) == {"dense/full", "dense/counts", "bitmap/scalar", "values/scalar"}
    assert all(same(load_sparse(tmp_path / "x")[name], state[name]) for name in state)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_model_comes_back(tmp_path, dtype):
    model = finalized().to(dtype)
    save_sparse(model, tmp_path / "x")
    found = load_sparse(tmp_path / "x")
    assert set(found) == set(model.state_dict())
    assert all(same(found[name], value) for name, value in model.state_dict().items())
    other = small_net(seed=1).to(dtype).eval()
    other.load_state_dict(found)
    images = torch.randn(2, 1, 6, 6, dtype=dtype)
    assert torch.equal(other(images), model(images))


def test_tied_tensors_and_other_memory_orders(tmp_path):
    model = nn.ModuleDict({"a": nn.Linear(64, 64), "b": nn.Linear(64, 64), "c": nn.Conv2d(3, 4, 3)})
    model["b"].weight = model["a"].weight
    model = model.to(memory_format=torch.channels_last)
    save_sparse(model, tmp_path / "x")
    assert (tmp_path / "x").stat().st_size < 1.3 * 64 * 64 * 4
    found = load_sparse(tmp_path / "x")
    assert list(found["b.weight"].shape) == [64, 64]
    assert all(torch.equal(found[name], value) for name, value in model.state_dict().items())


def test_views_of_one_memory_that_are_not_the_same(tmp_path):
    whole = torch.arange(8.0)
    state = {"whole": whole, "half": whole[:4], "empty": whole[:0], "none": torch.empty(0)}
    save_sparse(state, tmp_path / "x")
    assert all(torch.equal(load_sparse(tmp_path / "x")[name], state[name]) for name in state)


def test_ninety_percent_sparse_is_less_than_a_quarter(tmp_path):
    model = nn.Sequential(nn.Conv2d(16, 64, 3), nn.Linear(512, 256), nn.Linear(256, 100))
    sp = Sparsifier(model, ramp(0.9, end=0))
    report = sp.report()
    sp.finalize()
    save_file(model.state_dict(), tmp_path / "dense")
    save_sparse(model, tmp_path / "sparse")
    dense, sparse = ((tmp_path / name).stat().st_size for name in ("dense", "sparse"))
    assert sparse < 0.25 * dense
    biases, header = 4 * (64 + 256 + 100), 2000
    assert 0 <= sparse - report.sparse_bytes - biases < header
    assert 0 <= dense - report.dense_bytes - biases < header


def test_what_cannot_be_saved(tmp_path):
    model = small_net()
    Sparsifier(model, ramp())
    with pytest.raises(ValueError, match=r"save_sparse: model must be finalized, got one that is sparsified"):
        save_sparse(model, tmp_path / "x")
    with pytest.raises(TypeError, match=r"save_sparse: step must be a tensor, got 3"):
        save_sparse({"step": 3}, tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


def test_files_that_cannot_be_read(tmp_path):
    path = tmp_path / "x"
    with pytest.raises(FileNotFoundError):
        load_sparse(path)
    for content in (b"", b"text", torch.ones(9).numpy().tobytes()):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"load_sparse: .*x must be a whole safetensors file"):
            load_sparse(path)
    save_sparse(finalized(), path)
    whole = path.read_bytes()
    for length in (4, 100, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"load_sparse: .*x must be a whole safetensors file"):
            load_sparse(path)
    save_file({"x": torch.ones(3)}, path)
    with pytest.raises(ValueError, match=r"must be of the format st3core-sparse-1, got None; save it by save_sparse"):
        load_sparse(path)


BITMAP, VALUES = torch.tensor([3], dtype=torch.uint8), torch.ones(2)


@pytest.mark.parametrize(
    ("message", "parts", "metadata"),
    [
        ("it has no 'bitmap/w'", {"values/w": VALUES}, {}),
        ("w has \\[2\\] values, and a bitmap that marks 1", {"bitmap/w": BITMAP - 1, "values/w": VALUES}, {}),
        ("the bitmap of w has the wrong", {"bitmap/w": BITMAP.short(), "values/w": VALUES}, {}),
        ("the bitmap of w has the wrong", {"bitmap/w": BITMAP.repeat(2), "values/w": VALUES}, {}),
        ("'list' object has no", {"bitmap/w": BITMAP, "values/w": VALUES}, {"shapes": "[]"}),
        ("Expecting value", {"bitmap/w": BITMAP, "values/w": VALUES}, {"shapes": "?"}),
        ("it has no 'v'", {"bitmap/w": BITMAP, "values/w": VALUES}, {"tied": '{"u": "v"}'}),
    ],
)
def test_files_that_contradict_themselves(tmp_path, message, parts, metadata):
    plain = {"format": "st3core-sparse-1", "shapes": json.dumps({"w": [2, 4]}), "tied": "{}"}
    save_file(parts, tmp_path / "x", {**plain, **metadata})
    with pytest.raises(ValueError, match=f"load_sparse: .*x must be a whole file of the format .*, but {message}"):
        load_sparse(tmp_path / "x")


def test_torch_export_of_a_finalized_model():
    model, images = finalized(), torch.randn(2, 1, 6, 6)
    program = torch.export.export(model, (images,))
    assert torch.equal(program.module()(images), model(images))
    assert set(program.state_dict) == set(model.state_dict())


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # within PyTorch
def test_onnx_of_a_finalized_model(tmp_path):
    model, images = finalized(), torch.randn(2, 1, 6, 6)
    torch.onnx.export(model, (images,), tmp_path / "model.onnx", dynamo=True, verbose=False)
    stored = onnx.load(tmp_path / "model.onnx")
    weights = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in stored.graph.initializer}
    for name in ("0.weight", "3.weight", "6.weight"):
        assert ((weights[name] == 0) == (model.state_dict()[name].numpy() == 0)).all()
    assert (weights["6.weight"] == model[6].weight.detach().numpy()).all()  # the others are scaled by the norm
    (name,) = [value.name for value in stored.graph.input]
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {name: images.numpy()})
    # Two programs sum in different orders: at most 150 float32 products of order 1.
    np.testing.assert_allclose(found, model(images).detach().numpy(), rtol=1e-5, atol=1e-5)
