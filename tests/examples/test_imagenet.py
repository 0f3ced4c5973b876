"""The ImageNet example on generated images: from JPEG files to sparse weights, in one process and in two."""

import socket

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file

from examples import imagenet, networks
from examples.processes import Processes
from examples.tiny_data import write_imagenet
from st3core.logs import read_rows
from tests.examples import spread

SIDES = st.integers(1, 600)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_imagenet(tmp_path_factory.mktemp("data"), 3)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def zeros_in(weights):
    kernels = [tensor for tensor in weights.values() if tensor.ndim > 1]
    return sum(int((kernel == 0).sum()) for kernel in kernels) / sum(kernel.numel() for kernel in kernels)


def test_from_images_to_sparse_weights(images, tmp_path, capsys):
    command = ["--data", str(images), "--out", str(tmp_path), "--batch-size", "15", "--width", "4", "--size", "32"]
    command += ["--epochs", "2", "--workers", "0", "--amp"]
    imagenet.main([*command, "--stop-after", "1"])
    imagenet.main([*command, "--resume"])
    weights = load_file(tmp_path / "model.safetensors")
    networks.resnet50(10, 4).load_state_dict(weights)
    assert [int(row["epoch"]) for row in read_rows(tmp_path / "log.csv")] == [1, 2]
    assert zeros_in(weights) == pytest.approx(0.9, abs=1e-3)
    assert "multiply-adds" in capsys.readouterr().out


def test_processes_go_on_where_they_were_stopped(images, tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    mp.spawn(spread.run, (2, port, str(images), str(tmp_path)), nprocs=2)
    whole, stopped = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "stopped"))
    assert whole == stopped
    sharded, parallel = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "parallel"))
    assert sharded.keys() == parallel.keys()
    assert zeros_in(sharded) == zeros_in(parallel) == pytest.approx(0.8, abs=1e-3)


@given(SIDES, SIDES, st.integers(0, 2**32))
def test_boxes_lie_in_the_image(width, height, seed):
    left, upper, right, lower = imagenet.random_box(width, height, np.random.default_rng(seed))
    assert 0 <= left < right <= width
    assert 0 <= upper < lower <= height
    slack = 1.5 * (1 / (right - left) + 1 / (lower - upper))  # sides are rounded to pixels
    assert 3 / 4 * (1 - slack) <= (right - left) / (lower - upper) <= 4 / 3 * (1 + slack)


def test_an_image_depends_on_its_epoch_and_number_alone(images):
    one, other = (imagenet.Folder(images / "train", 24, 5) for _ in range(2))
    _ = one[3, 0]
    assert torch.equal(one[1, 4][0], other[1, 4][0])
    assert not torch.equal(one[1, 4][0], one[2, 4][0])
    assert one[1, 4][0].shape == (3, 24, 24)
    assert torch.equal(one[None, 0][0][0], one[None, 0][0][1])  # grey
    assert [one[None, number][1] for number in (0, 3, 29, 30)] == [0, 1, 9, -1]


def test_the_middle_of_an_image_is_cut_out():
    pixels = np.zeros((64, 128, 3), np.uint8)
    pixels[4:60, 36:92] = 255  # seven eighths of 64
    assert np.array(imagenet.middle(Image.fromarray(pixels), 56)).min() == 255
    pixels[59, 91] = 0
    assert np.array(imagenet.middle(Image.fromarray(pixels), 56)).min() == 0


@pytest.mark.parametrize("world", [1, 2, 4])
def test_processes_share_all_images(images, world):
    train, test = (imagenet.Folder(images / part, 8, 0) for part in ("train", "val"))
    parts = [
        imagenet.ImageNet(train, test, 8, 0, 0, Processes(rank, world, torch.device("cpu"))) for rank in range(world)
    ]
    seen = [[labels.tolist() for _, labels in part.test_batches()] for part in parts]
    assert all(list(map(len, batches)) == [8 // world] * 4 for batches in seen)
    labels = sorted(label for batches in seen for batch in batches for label in batch)
    assert labels == [-1, -1, *sorted(list(range(10)) * 3)]
    rounds = [torch.cat([labels for _, labels in part.training_batches(7)]) for part in parts]
    alone = imagenet.ImageNet(train, test, 8, 0, 0, Processes(0, 1, torch.device("cpu")))
    expected = torch.cat([labels for _, labels in alone.training_batches(7)])
    assert torch.stack(rounds, dim=1).flatten().tolist() == expected.tolist()
    assert len(expected) == 24


def test_bad_settings_are_named(images, tmp_path):
    train, test = (imagenet.Folder(images / part, 8, 0) for part in ("train", "val"))
    with pytest.raises(
        ValueError, match="--batch-size must be a multiple of 3, the processes, and at most 30, the train"
    ):
        imagenet.ImageNet(train, test, 8, 0, 0, Processes(0, 3, torch.device("cpu")))
    with pytest.raises(
        ValueError, match=r"--data must hold train/CLASS/\*.JPEG and val/CLASS/\*.JPEG, got no image in"
    ):
        imagenet.Folder(tmp_path, 8, 0)
    test.classes = ["other"]
    with pytest.raises(ValueError, match="--data must hold the same classes in train and val"):
        imagenet.ImageNet(train, test, 8, 0, 0, Processes(0, 1, torch.device("cpu")))
