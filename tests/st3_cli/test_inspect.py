"""``st3 inspect`` on every kind of file, against what was put into it."""

import json

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import save_file
from torch import nn

from st3_cli.command import main
from st3_cli.inspection import inspect
from st3_torch import PolynomialSchedule, Sparsifier
from st3_torch.export import save_sparse

SHAPES = {"conv.weight": (4, 8, 3, 3), "linear.weight": (3, 10), "full.weight": (2, 4), "norm.weight": (4,)}


def model_state(dtype=torch.float32):
    """A kernel that is 2:4, one that is 3:4, a dense one, a vector, and a counter."""
    state = {name: torch.full(shape, -0.5, dtype=dtype) for name, shape in SHAPES.items()}
    state["conv.weight"][:, torch.arange(8) % 4 < 2] = 0
    state["linear.weight"][:, ::4] = -0.0
    state["norm.weight"][0] = 0
    return state | {"norm.count": torch.tensor(3)}


def save(state, path):
    if path.suffix == ".safetensors":
        (save_sparse if "compact" in path.name else save_file)(state, path)
    else:
        torch.save({"epoch": 3, "state_dict": state} if path.suffix == ".ckpt" else state, path)


def inspected(path, capsys, *options):
    assert main(["inspect", str(path), *options]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", ["m.safetensors", "compact.safetensors", "m.pt", "m.pth", "m.bin", "m.ckpt"])
def test_every_format_tells_the_same(tmp_path, capsys, name, dtype):
    save(model_state(dtype), tmp_path / name)
    found = json.loads(inspected(tmp_path / name, capsys, "--json"))
    size = dtype.itemsize
    conv = {"name": "conv.weight", "shape": [4, 8, 3, 3], "weights": 288, "zeros": 144, "sparsity": 0.5}
    conv |= {"dense_macs": None, "sparse_macs": None, "dense_bytes": 288 * size, "sparse_bytes": 36 + 144 * size}
    linear = {"name": "linear.weight", "shape": [3, 10], "weights": 30, "zeros": 9, "sparsity": 0.3}
    linear |= {"dense_macs": 30, "sparse_macs": 21.0, "dense_bytes": 30 * size, "sparse_bytes": 4 + 21 * size}
    layers = sorted(found.pop("layers"), key=lambda layer: layer["name"])
    assert layers[0] == conv | {"smallest_n_of_4": 2, "is_2_of_4": True}
    assert layers[1] == linear | {"smallest_n_of_4": 3, "is_2_of_4": False}
    assert len(layers) == 2
    assert (found["file"], found["hidden"], found["zeros"]) == (name, 2, 153)
    assert found["skipped"] == {"norm.count": "I64" if name.endswith("safetensors") else "int64"}


def test_all_shows_dense_tensors_and_vectors(tmp_path, capsys):
    save(model_state(), tmp_path / "m.pt")
    found = json.loads(inspected(tmp_path / "m.pt", capsys, "--json", "--all"))
    assert {layer["name"]: layer["smallest_n_of_4"] for layer in found["layers"]} == {
        "conv.weight": 2, "linear.weight": 3, "full.weight": 4, "norm.weight": None
    }  # fmt: skip
    assert found["hidden"] == 0


def test_the_table_and_the_plot(tmp_path, capsys):
    save(model_state(), tmp_path / "m.pt")
    table = inspected(tmp_path / "m.pt", capsys, "--plot", str(tmp_path / "m.svg"))
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in table.splitlines() if "│" in line]
    assert rows == [
        ["conv.weight", "4×8×3×3", "288", "50.00 %", "2:4", "yes", "1,152", "612", "", ""],
        ["linear.weight", "3×10", "30", "30.00 %", "3:4", "no", "120", "88", "30", "21"],
        ["total", "", "318", "48.11 %", "3:4", "no", "1,272", "700", "", ""],
    ]
    assert table.splitlines()[-2:] == [
        "2 tensors without zeros, or with less than two dimensions: --all shows them",
        "1 of int64 not read",
    ]
    assert (tmp_path / "m.svg").read_text().startswith("<?xml")


def test_a_file_without_zeros_has_an_empty_table(tmp_path, capsys):
    save(nn.Linear(2, 2).state_dict(), tmp_path / "m.pt")
    assert "total" in inspected(tmp_path / "m.pt", capsys, "--plot", str(tmp_path / "m.png"))


def sparsified():
    model = nn.Linear(4, 4)
    Sparsifier(model, PolynomialSchedule(0.5, begin_step=0, end_step=1))
    return model


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.pt", None, "none.pt must be a file, and there is none"),
        ("m.onnx", b"", "m.onnx must have one of the suffixes .safetensors, .pt"),
        ("half.safetensors", b"\x10\0\0\0", "half.safetensors must be a whole safetensors file"),
        ("half.pt", b"PK\x03\x04", "half.pt must be a whole file of tensors"),
        ("half.keras", b"PK\x03\x04", "half.keras must be a whole .keras file"),
        ("whole.pt", nn.Linear(2, 2), "whole.pt must be a whole file of tensors, got one that torch.load"),
        ("list.pt", [1, 2], "list.pt must hold a state_dict, got list"),
        ("other.pt", {"epoch": 3}, "must hold a state_dict, by itself or as 'state_dict', 'model_state_dict', 'model'"),
        ("raw.pt", sparsified().state_dict(), "raw.pt holds raw weights of a model that is still sparsified"),
        ("raw.safetensors", sparsified().state_dict(), "such as parametrizations.weight.original; save the model that"),
    ],
    ids=lambda value: value if isinstance(value, str) and "." in value and " " not in value else "",
)
def test_other_files_are_named(tmp_path, capsys, name, content, message):
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        save_file(content, path) if path.suffix == ".safetensors" else torch.save(content, path)
    assert main(["inspect", str(path)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("st3: inspect: ")
    assert message in error


def test_negative_zeros_and_nan(tmp_path, capsys):
    save({"w": torch.tensor([[-0.0, np.nan, 1.0] + [0.0] * 9])}, tmp_path / "compact.safetensors")
    found = json.loads(inspected(tmp_path / "compact.safetensors", capsys, "--json"))
    assert found["zeros"] == 10


def test_a_tensor_beside_a_state_dict_does_not_hide_it(tmp_path):
    model = torch.nn.Linear(8, 4)
    with torch.no_grad():
        model.weight[:, ::2] = 0
    path = tmp_path / "checkpoint.pth"
    torch.save({"state_dict": model.state_dict(), "epoch": 3, "best": torch.tensor(76.1)}, path)
    assert [layer["name"] for layer in inspect(path).to_dict()["layers"]] == ["weight"]


def test_kernels_of_flax_have_their_inputs_ahead_of_their_outputs(tmp_path):
    kernel = np.ones((8, 4), np.float32)
    kernel[::2] = 0
    path = tmp_path / "flax.safetensors"
    save_arrays({"params/Dense_0/kernel": kernel}, path)
    assert inspect(path).smallest_n == {"params/Dense_0/kernel": 2}


@pytest.mark.parametrize("content", [b".", b"G"])
def test_damaged_files_are_named_whatever_reading_them_raises(tmp_path, content):
    path = tmp_path / "damaged.bin"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"damaged.bin must be a whole file of tensors"):
        inspect(path)
