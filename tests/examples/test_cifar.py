"""The CIFAR-10 example on generated images: from files to files, stopped and gone on, and what it reads and crops."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from examples import cifar, networks, training
from examples.tiny_data import write_cifar
from st3core.logs import read_rows


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_cifar(tmp_path_factory.mktemp("data"), 24)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # sums depend on their number
    yield
    torch.set_num_threads(before)


def train(data, out, *options):
    common = ["--epochs", "4", "--batch-size", "40", "--width", "4"]
    cifar.main(["--data", str(data), "--out", str(out), *common, *options])


def test_a_run_that_was_stopped_ends_like_one_that_was_not(data, tmp_path, capsys):
    train(data, tmp_path / "whole")
    assert "Test accuracy of the finalized model" in capsys.readouterr().out
    train(data, tmp_path / "stopped", "--stop-after", "3")
    with (tmp_path / "stopped/log.csv").open("a") as log:
        log.write("4,12,0,0,0,0,0,0\n")  # as if it had been killed before its last checkpoint
    assert not (tmp_path / "stopped/model.safetensors").exists()
    train(data, tmp_path / "stopped", "--resume")
    for name in ("log.csv", "model.safetensors"):
        assert (tmp_path / "stopped" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    rows = read_rows(tmp_path / "whole/log.csv")
    assert [int(row["step"]) for row in rows] == [3, 6, 9, 12]
    assert float(rows[-1]["sparsity"]) == pytest.approx(0.9, abs=1e-3)
    weights = load_file(tmp_path / "whole/model.safetensors")
    networks.cifar_resnet(width=4).load_state_dict(weights)
    kernels = [tensor for tensor in weights.values() if tensor.ndim > 1]
    zeros = sum(int((kernel == 0).sum()) for kernel in kernels) / sum(kernel.numel() for kernel in kernels)
    assert zeros == pytest.approx(float(rows[-1]["sparsity"]))


def test_rows_are_read_as_they_were_written(tmp_path):
    pixels = np.arange(2 * 3072).reshape(2, 3, 32, 32).astype(np.uint8)
    np.column_stack([np.array([7, 2], np.uint8), pixels.reshape(2, -1)]).tofile(tmp_path / "x.bin")
    images, labels = cifar.read_rows(tmp_path / "x.bin")
    assert images.numpy().tolist() == pixels.tolist()
    assert labels.tolist() == [7, 2]


@pytest.mark.parametrize("content", [b"", bytes(3072), bytes([10]) + bytes(3072)])
def test_other_files_are_rejected(tmp_path, content):
    (tmp_path / "x.bin").write_bytes(content)
    with pytest.raises(ValueError, match=r"x\.bin must hold rows of a label from 0 to 9 and 3,072 bytes"):
        cifar.read_rows(tmp_path / "x.bin")


def test_other_folders_and_batches_are_rejected(data, tmp_path):
    with pytest.raises(ValueError, match="--data must be the folder of CIFAR-10's binary version, got"):
        train(tmp_path, tmp_path)
    with pytest.raises(ValueError, match="--batch-size must be at most 120, the training images, got 121"):
        train(data, tmp_path, "--batch-size", "121")


def test_crops_are_windows_of_the_image_with_its_edges_repeated():
    images = torch.from_numpy(np.random.default_rng(1).integers(0, 256, (16, 3, 32, 32), np.uint8))
    found = cifar.augmented(images, np.random.default_rng(0))
    seen = set()
    for image, crop in zip(images.numpy(), found.numpy(), strict=True):
        padded = np.pad(image, ((0, 0), (4, 4), (4, 4)), mode="edge")
        windows = {(y, x): padded[:, y : y + 32, x : x + 32] for y in range(9) for x in range(9)}
        places = [
            (place, flip)
            for place, window in windows.items()
            for flip in (1, -1)
            if (window[..., ::flip] == crop).all()
        ]
        assert len(places) == 1
        seen.update(places)
    assert len({flip for _, flip in seen}) == 2
    assert len(seen) > 8


def test_images_are_normalized_by_color():
    pixels = torch.tensor([0, 255], dtype=torch.uint8).reshape(1, 1, 1, 2).expand(1, 3, 1, 2)
    found = cifar.normalized(pixels)[0, :, 0]
    for color in range(3):
        expected = [-cifar.MEAN[color] / cifar.DEVIATION[color], (1 - cifar.MEAN[color]) / cifar.DEVIATION[color]]
        assert found[color].tolist() == pytest.approx(expected, rel=1e-5)


def test_learning_rates_of_the_recipes():
    steps = [training.tenth_at_half_and_three_quarters(epoch, 160) for epoch in (0, 79, 80, 119, 120, 159)]
    assert steps == [1, 1, 0.1, 0.1, 0.01, 0.01]
    waves = [training.cosine_after_warmup(epoch, 100) for epoch in (0, 4, 5, 99)]
    assert waves == pytest.approx([0.2, 1, 1, 0.5 * (1 + np.cos(np.pi * 94 / 95))])
    assert training.cosine_after_warmup(0, 3) == 1


def test_networks_have_the_published_sizes():
    """Less the biases of the linear layers."""
    sizes = [sum(p.numel() for p in model.parameters()) for model in (networks.resnet50(), networks.cifar_resnet())]
    assert sizes == [25_557_032 - 1000, 272_474 - 10]


@pytest.mark.parametrize("option", ["--epochs", "--batch-size", "--stop-after", "--width"])
def test_counts_are_at_least_one(option, capsys):
    with pytest.raises(SystemExit):
        cifar.main(["--data", "there", option, "0"])
    assert f"argument {option}: must be at least 1, got 0" in capsys.readouterr().err
