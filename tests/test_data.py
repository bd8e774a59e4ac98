"""The data: where the digits come from, what is refused, and how batches are made."""

import gzip
import os
import shutil
import socket
import threading
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import OFFLINE, mnist_data, read_by_hand
from torchvision import datasets, transforms

import main

FILES = [Path(packed).stem for packed, _ in datasets.MNIST.resources]


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """No network, and no time limit left from another test."""
    for name, value in OFFLINE.items():
        monkeypatch.setenv(name, value)
    socket.setdefaulttimeout(None)


@pytest.fixture
def raw(small_mnist, tmp_path):
    """The folder of MNIST's files in a data dir to spoil, tmp_path."""
    return shutil.copytree(small_mnist / "MNIST" / "raw", tmp_path / "MNIST" / "raw")


def refused(data_dir, name="auto"):
    """Loads a dataset that cannot be had; returns the line of error."""
    with pytest.raises(SystemExit) as stop:
        main.load_dataset(name, data_dir)
    assert stop.value.code.startswith("main.py: error: ") and "\n" not in stop.value.code
    return stop.value.code


def test_images_are_those_of_the_files(small_mnist):
    name, *parts = main.load_dataset("auto", small_mnist)
    assert name == "mnist"
    for (pixels, labels), part in zip(parts, ("train", "t10k"), strict=True):
        images, digits = read_by_hand(small_mnist, part)
        assert pixels.dtype == torch.uint8 and torch.equal(labels, digits)
        for given in (pixels, pixels / 255):
            torch.testing.assert_close(main.normalise(given)[:, None], images)


@pytest.mark.parametrize("name, folder", [("fashion-mnist", "FashionMNIST"), ("kmnist", "KMNIST")])
def test_other_datasets_have_their_own_folders(train, raw, tmp_path, name, folder):
    assert f"{tmp_path / folder / 'raw'} cannot be read or downloaded" in refused(tmp_path, name)
    raw.rename(tmp_path / folder / "raw")
    output = train(tmp_path, "--data-dir", tmp_path, "--dataset", name, "--epochs", 1)
    assert output.startswith(f"Training LeNet on {name.upper()}\n")


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


def test_files_that_somebody_put_there_are_used_and_never_replaced(raw, tmp_path, monkeypatch):
    """Neither packed files of another origin, nor extracted ones beside which another is missing."""
    download = mock.Mock()
    monkeypatch.setattr(datasets.mnist, "download_and_extract_archive", download)
    for name in FILES[1:]:
        (raw / f"{name}.gz").write_bytes(gzip.compress((raw / name).read_bytes()))
        (raw / f"._{name}.gz").write_text("from a Mac")
        (raw / name).unlink()
    before = {path.name: path.read_bytes() for path in raw.iterdir()}
    assert len(main.load_dataset("auto", tmp_path)[1][1]) == 600
    for name in FILES[2:]:
        (raw / name).unlink()
        (raw / f"{name}.gz").unlink()
    for name in ("auto", "mnist"):
        assert f"{raw} cannot be read or downloaded" in refused(tmp_path, name)
    assert not download.called
    assert all((raw / name).read_bytes() == before[name] for name in (FILES[0], f"{FILES[1]}.gz"))


def test_packed_files_beside_other_extracted_ones_are_refused(raw, tmp_path):
    """Whatever their dates, which a copy may keep. After a download, both are the same."""
    file = raw / FILES[0]
    packed = raw / f"{file.name}.gz"
    packed.write_bytes(gzip.compress(file.read_bytes()))
    assert main.load_dataset("auto", tmp_path)[0] == "mnist"
    packed.write_bytes(gzip.compress(file.read_bytes()[:-1] + b"?"))
    for year in (1990, 2050):
        os.utime(packed, 2 * ((year - 1970) * 3e7,))
        assert f": error: {packed} and {file} do not hold the same: " in refused(tmp_path)


def test_missing_files_are_downloaded(small_mnist, tmp_path, monkeypatch):
    def copy(url, download_root, filename, md5):
        shutil.copy(small_mnist / "MNIST" / "raw" / Path(filename).stem, download_root)

    monkeypatch.setattr(datasets.mnist, "download_and_extract_archive", copy)
    name, (_, labels), _ = main.load_dataset("auto", tmp_path)
    assert (name, len(labels)) == ("mnist", 600)


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
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name in (f"._{FILES[0]}.gz", ".DS_Store"):
        (raw / name).write_text("from a Mac")
    for _ in range(2):  # What the first of them leaves is not taken for MNIST.
        assert main.load_dataset("auto", tmp_path)[0] == "mnist-5k"
        output, errors = capfd.readouterr()
        assert output == "" and errors.count("\n") == 1 and "Connection refused" in errors
        assert errors.startswith("main.py: warning: TRAINING ON MNIST-5K INSTEAD, since ")
    assert f"{raw} cannot be read or downloaded" in refused(tmp_path, "mnist")


@pytest.mark.parametrize("error", [NameError, AttributeError, TypeError])
def test_a_students_mistake_keeps_its_traceback(tmp_path, monkeypatch, error):
    monkeypatch.setattr(datasets.MNIST, "__init__", mock.Mock(side_effect=error))
    with pytest.raises(error):
        main.load_dataset("auto", tmp_path)


@pytest.mark.parametrize("part", ["train", "t10k"])
def test_broken_files_are_no_reason_for_other_data(raw, tmp_path, part):
    file = raw / f"{part}-images-idx3-ubyte"
    whole = file.read_bytes()
    for content in (b"", whole[:-1], b"<html>\n404 Not Found</html>\n" * 99):
        file.write_bytes(content)
        assert f"{raw} cannot be read" in refused(tmp_path)
    packed = gzip.compress(whole)
    for content in (packed[:-9], packed[:99] + b"damage" + packed[105:]):
        file.unlink()
        (raw / f"{file.name}.gz").write_bytes(content)
        assert f"{raw} cannot be read" in refused(tmp_path)


def make_loader(count, *arguments, **options):
    """A loader of images of one pixel, whose labels are their numbers."""
    numbers = torch.arange(count)
    return main.Loader(numbers.view(-1, 1, 1).byte(), numbers, *arguments, **options)


@pytest.mark.parametrize(
    "count, batch_size, sizes",
    [
        (600, 250, [[250, 250, 100]]),
        (600, 598, [[598, 2]]),
        (600, 599, [[599]]),  # Batch norm needs two images in each process.
        (605, 200, [[67, 67, 67], [67, 67, 67], [66, 66, 66]]),
        (606, 200, [[67, 67, 67, 2], [67, 67, 67, 2], [66, 66, 66, 2]]),
    ],
)
def test_batches_hold_every_image_once(count, batch_size, sizes, monkeypatch):
    """`sizes` are those of the batches in each process. Batches for testing are not shared."""
    monkeypatch.setattr(main, "WORLD_SIZE", len(sizes))
    tested = [target for _, target in make_loader(count, batch_size)]
    assert len(make_loader(count, batch_size)) == len(tested)
    orders = [torch.cat(tested).tolist()]
    assert orders == [list(range(count))]
    loader = make_loader(count, batch_size, shuffle=True)
    for seed in (1, 2):
        order = []
        for rank, expected in enumerate(sizes):
            monkeypatch.setattr(main, "RANK", rank)
            np.random.seed(seed)  # which is all that decides
            batches = list(loader)
            assert [len(target) for _, target in batches] == expected
            assert len(loader) == len(expected)
            for data, target in batches:
                assert torch.equal(data, main.normalise(target.byte().view(-1, 1, 1, 1)))
                order += target.tolist()
        assert len({*order}) == len(order) == sum(map(sum, sizes)) and order not in orders
        orders.append(order)
    assert sum(len(target) for _, target in loader) == sum(sizes[-1])
    assert [target.tolist() for _, target in loader] != [target.tolist() for _, target in loader]


NORMALISE = transforms.Normalize((0.1307,), (0.3081,))
PIXELS = torch.randint(256, (5, 28, 28)).byte()


@pytest.mark.parametrize(
    "pixels, count, transform",
    [
        (PIXELS, 4, None),
        (PIXELS.long(), 5, None),
        (PIXELS / 255, 5, None),
        (PIXELS, 5, lambda image: NORMALISE(image / 255)),
        (PIXELS, 5, lambda image: image.float()),
        (PIXELS, 5, lambda image: image.long()),
    ],
)
def test_pixels_that_would_train_badly_are_refused(pixels, count, transform):
    with pytest.raises(ValueError, match="uint8"):
        next(iter(main.Loader(pixels, torch.zeros(count), 2, transform=transform)))


@pytest.mark.parametrize("transform", [transforms.ToTensor(), NORMALISE])
def test_transforms_of_the_guide_fail_where_it_says_to_leave_them_out(transform):
    loader = main.Loader(PIXELS, torch.zeros(5), 2, transform=transform)
    with pytest.raises(TypeError) as error:
        next(iter(loader))
    assert "# no ToTensor, no Normalize" in str(error.getrepr())


@pytest.mark.parametrize(
    "factor, steps",
    [
        (1, [transforms.ToPILImage(), transforms.Pad(0), transforms.PILToTensor()]),
        (1, [transforms.ToPILImage(), transforms.ToTensor()]),
        # It may round to more than 1.
        (1.01, [transforms.ConvertImageDtype(torch.float32), lambda image: image * 1.01]),
    ],
)
def test_a_transform_returns_uint8_or_floats(factor, steps):
    transform = transforms.Compose(steps)
    ((data, _),) = main.Loader(PIXELS, torch.zeros(5), 5, transform=transform)
    torch.testing.assert_close(data[:, 0], (PIXELS / 255 * factor - 0.1307) / 0.3081)
