"""A whole run against a plain loop, what is printed of it, and the flags."""

import math
import os
import re
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from conftest import (
    FLAGS,
    HOME,
    OFFLINE,
    checksum,
    error_line,
    plain_with,
    read_by_hand,
    read_params,
    rows,
)
from torch import nn, optim

import main

DEFAULTS = {  # as in the guide, and then the flags that it does not have
    "batch_size": 128,
    "epochs": 10,
    "lr": 0.1,
    "dropout": 0.25,
    "momentum": 0.9,
    "data_dir": "./data",
    "dataset": "auto",
    "schedule": "constant",
    "seed": 1,
    "log_dir": "./logs",
    "resume": None,
}


def stored_model(run, epoch):
    """A plain LeNet with the parameters that a run stored after an epoch."""
    return plain_with(read_params(run, epoch).values())


# Flags


def test_defaults():
    assert vars(main.parse_arguments([])) == DEFAULTS
    assert main.parse_arguments(["--data", "D"]).data_dir == "D"  # as in the guide's run.sh


@pytest.mark.parametrize(
    "flag, values, message",
    [
        ("--batch-size", "1 0 -3", "must be 2 or more"),
        ("--epochs", "0 -1", "must be 1 or more"),
        ("--lr", "0 -1 nan inf", "must be above 0, and finite"),
        ("--dropout", "1 -0.1 nan", "must be 0 or more, and below 1"),
        ("--momentum", "1 -1 nan", "must be 0 or more, and below 1"),
        ("--seed", "-1", "must be 0 or more"),
        ("--epochs", "2.5 x", "invalid int value"),
        ("--dataset", "cifar", "invalid choice"),
        ("--schedule", "linear", "invalid choice"),
    ],
)
def test_flags_that_make_no_sense(go, tmp_path, flag, values, message):
    for value in values.split():
        finished = go("main.py", flag, value, cwd=tmp_path)
        line = error_line(finished, 2)
        assert f"argument {flag}: " in line and message in line and finished.stdout == ""
    assert list(tmp_path.iterdir()) == []


def test_the_ends_of_the_ranges_are_taken(train, tmp_path):
    train(tmp_path, "--batch-size", 2, "--epochs", 1, "--lr", 1e-30, "--momentum", 0, "--seed", 0)
    train(tmp_path, "--seed", 10**30, "--dropout", 0.999)


def test_importing_does_nothing(tmp_path):
    finished = subprocess.run(
        [sys.executable, "-c", "import main", "--no-such-flag"],
        cwd=tmp_path,
        env=os.environ | OFFLINE | {"PYTHONPATH": str(HOME)},
        capture_output=True,
        check=False,
    )
    assert (finished.returncode, finished.stdout, finished.stderr) == (0, b"", b"")
    assert list(tmp_path.iterdir()) == []


def test_main_can_be_called_in_a_thread(small_mnist, tmp_path, capsys):
    flags = ["--data-dir", str(small_mnist), "--log-dir", str(tmp_path), *map(str, FLAGS)]
    thread = threading.Thread(target=main.main, args=[flags])
    thread.start()
    thread.join()
    assert checksum(capsys.readouterr().out)


def be_windows():
    """Has this process believe that it runs where there is no C library of Linux."""
    import ctypes

    sys.platform = "win32"
    ctypes.CDLL = None


def test_nothing_needs_linux(train, tmp_path):
    assert checksum(train(tmp_path)) == checksum(train(tmp_path, prepare=be_windows))


# One epoch of the real MNIST


def test_prints_what_the_guide_prints(go, full_mnist, tmp_path):
    finished = go("main.py", "--data-dir", full_mnist, "--epochs", 1, cwd=tmp_path)
    assert (finished.returncode, finished.stderr) == (0, "")  # no progress bar in a log
    table = rows(tmp_path / "logs" / "run-1" / "train.csv")
    assert len(table) == 469 and float(table[0]["loss"]) == pytest.approx(np.log(10), abs=0.6)
    (tested,) = rows(tmp_path / "logs" / "run-1" / "test.csv")
    assert float(tested["accuracy"]) > 98.3  # It learns to read.
    arguments = DEFAULTS | {"data_dir": full_mnist, "epochs": 1, "dataset": "mnist", "cuda": False}
    losses = [f"{float(table[batch]['loss']):.4f}" for batch in (100, 200, 300, 400)]
    test_line = f"[Epoch  1] Average test loss: {float(tested['loss']):.3f}, "
    test_line += f"accuracy: {float(tested['accuracy']):.2f}%"
    expected = [
        "Training LeNet on MNIST",
        *(f"   {name}:  {value}" for name, value in arguments.items()),
        *("", ""),
        *(f"[Epoch  1, batch {n}00] training loss: {loss}" for n, loss in enumerate(losses, 1)),
        test_line,
        "",
    ]
    lines = finished.stdout.split("\n")
    assert lines[:-2] == expected and lines[-1] == ""
    last = r"Done in \d+\.\d s; the record is in logs/run-1 \(sha256 [0-9a-f]{16}\)"
    assert re.fullmatch(last, lines[-2])


# A whole run


def pytorchs_schedule(name, optimizer, epochs):
    """PyTorch's own schedule."""
    if name == "step":
        milestones = [math.ceil(epochs / 2), math.ceil(3 * epochs / 4)]
        return optim.lr_scheduler.MultiStepLR(optimizer, milestones, gamma=0.1)
    if name == "cosine":
        return optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=epochs)
    return optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)


@pytest.mark.parametrize(
    "name, epochs, batch_size, lr",
    [("constant", 1, 5, 1e-5), ("step", 4, 200, 0.1), ("cosine", 4, 200, 0.1)],
)
def test_a_run_is_that_of_a_plain_loop(train, small_mnist, tmp_path, name, epochs, batch_size, lr):
    flags = ("--schedule", name, "--epochs", epochs, "--batch-size", batch_size, "--lr", lr)
    output = train(tmp_path, *flags, "--dropout", 0, "--momentum", 0.8, "--seed", 6)
    images, labels = read_by_hand(small_mnist, "train")
    loader = main.Loader(images, labels, batch_size, seed=6)
    run = tmp_path / "run-1"
    plain = stored_model(run, 0).train()
    optimizer = optim.SGD(plain.parameters(), lr=lr, momentum=0.8)
    schedule = pytorchs_schedule(name, optimizer, epochs)
    expected = []
    for epoch in range(1, epochs + 1):
        loader.epoch = epoch
        for batch, (data, target) in enumerate(loader):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(plain(data), target)
            loss.backward()
            optimizer.step()
            rate = optimizer.param_groups[0]["lr"]
            expected.append((len(expected) + 1, epoch, batch, rate, loss.item()))
        schedule.step()
    assert len(expected) == epochs * 600 // batch_size
    table = rows(run / "train.csv")
    assert list(table[0]) == ["step", "epoch", "batch", "lr", "loss"]
    found = [tuple(float(value) for value in row.values()) for row in table]
    assert [row[:3] for row in found] == [row[:3] for row in expected]
    assert [row[3] for row in found] == pytest.approx([row[3] for row in expected], rel=1e-6)
    assert [row[4] for row in found] == pytest.approx([row[4] for row in expected], rel=1e-2)
    for old, new in zip(plain.parameters(), stored_model(run, epochs).parameters(), strict=True):
        assert (new - old).norm() < 0.02 * old.norm()
    # The test has batches of 250 and 50 images.
    images, labels = read_by_hand(small_mnist, "t10k")
    with torch.no_grad():
        outputs = stored_model(run, epochs).eval()(images)
    tested = {name: float(value) for name, value in rows(run / "test.csv")[-1].items()}
    loss = nn.functional.cross_entropy(outputs, labels)
    assert tested["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert tested["accuracy"] == pytest.approx(100 * (outputs.argmax(1) == labels).sum() / 300)
    printed = re.findall(r"batch 100\] training loss: (\S+)", output)
    assert printed == [f"{float(row['loss']):.4f}" for row in table if row["batch"] == "100"]


@pytest.mark.parametrize("epochs", [1, 2, 3, 4, 5, 10, 30])
@pytest.mark.parametrize("name", ["constant", "step", "cosine"])
def test_schedules_are_pytorchs(name, epochs):
    """On two groups of parameters with rates of their own."""
    groups = [{"params": [nn.Parameter(torch.zeros(1))], "lr": lr} for lr in (0.1, 0.02)]
    ours, theirs = optim.SGD(groups), optim.SGD(groups)
    schedule = main.Schedule(ours, name, epochs)
    expected = pytorchs_schedule(name, theirs, epochs)
    theirs.step()
    for _ in range(epochs):
        rates = [group["lr"] for group in theirs.param_groups]
        assert [group["lr"] for group in ours.param_groups] == pytest.approx(rates, rel=1e-6)
        schedule.step()
        expected.step()


def test_a_seed_decides_on_all_random_numbers(train, tmp_path):
    first, again, other = (checksum(train(tmp_path, "--seed", seed)) for seed in (3, 3, 4))
    assert first == again != other
    initial = [read_params(tmp_path / f"run-{run}", 0)["m.0.0.weight"] for run in (1, 3)]
    assert not np.array_equal(*initial)


@pytest.mark.parametrize("batch_size, step", [(50, 2), (600, 1)])
def test_a_loss_that_is_not_finite(go, small_mnist, tmp_path, batch_size, step):
    """In training, or only in the test after the last step of an epoch."""
    flags = ("--data-dir", small_mnist, "--log-dir", tmp_path, "--batch-size", batch_size)
    finished = go("main.py", *flags, "--lr", 1e38, "--epochs", 2)
    line = error_line(finished)
    assert re.search(rf"loss (nan|inf) in step {step}, epoch 1: lower --lr", line), line
    losses = [float(row["loss"]) for row in rows(tmp_path / "run-1" / "train.csv")]
    assert np.isfinite(losses[0]) and len(losses) == 600 // batch_size


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_an_epoch_on_cuda_and_its_resumption(train, tmp_path):
    whole = train(tmp_path / "whole")
    train(tmp_path / "stopped", "--epochs", 1)
    assert checksum(train(tmp_path / "stopped", "--resume")) == checksum(whole)
    assert "   cuda:  True" in whole
