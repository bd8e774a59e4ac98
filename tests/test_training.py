"""A whole run against a plain loop, what is printed of it, and the flags."""

import copy
import ctypes
import math
import os
import re
import sys
from contextlib import ExitStack

import numpy as np
import pytest
import torch
from conftest import checksum, error_line, plain_lenet, read_params, rows
from torch import nn, optim
from torch._subclasses.fake_tensor import FakeTensorMode
from torchvision import datasets

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


def test_defaults(go):
    assert vars(main.parse_arguments([])) == DEFAULTS
    assert main.parse_arguments(["--data", "D"]).data_dir == "D"  # as in the guide's run.sh
    text = go("main.py", "--help").stdout
    for name, default in DEFAULTS.items():
        flag = name.replace("_", "-")
        assert default is None or re.search(rf"--{flag}\b[^()]*\(default:\s+{default}\)", text)


@pytest.mark.parametrize(
    "flag, values, message",
    [
        ("--batch-size", "1", "must be 2 or more"),
        ("--epochs", "0", "must be 1 or more"),
        ("--lr", "0 nan inf", "must be above 0, and finite"),
        ("--dropout", "1 -0.1 nan", "must be 0 or more, and below 1"),
        ("--momentum", "1 -0.1 nan", "must be 0 or more, and below 1"),
        ("--seed", "-1", "must be 0 or more"),
    ],
)
def test_flags_that_make_no_sense(go, tmp_path, flag, values, message):
    for value in values.split():
        finished = go("main.py", flag, value, cwd=tmp_path)
        line = error_line(finished, 2)
        assert f"argument {flag}: " in line and message in line and finished.stdout == ""
    assert list(tmp_path.iterdir()) == []


# A whole run


def test_prints_what_the_guide_prints(train, small_mnist, tmp_path):
    output = train("logs", "--batch-size", 2, "--lr", 1e-30, "--epochs", 1, cwd=tmp_path)
    run = tmp_path / "logs" / "run-1"
    table, (tested,) = rows(run / "train.csv"), rows(run / "test.csv")
    changed = {"batch_size": 2, "epochs": 1, "lr": 1e-30}
    places = {"data_dir": str(small_mnist), "dataset": "mnist", "log_dir": "logs"}
    flags = DEFAULTS | changed | places
    loss, accuracy = float(tested["loss"]), float(tested["accuracy"])
    *lines, last, end = output.split("\n")
    assert lines == [
        "Training LeNet on MNIST",
        *(f"   {name}:  {value}" for name, value in (flags | {"cuda": False}).items()),
        *("", ""),
        f"[Epoch  1, batch 100] training loss: {float(table[100]['loss']):.4f}",
        f"[Epoch  1, batch 200] training loss: {float(table[200]['loss']):.4f}",
        f"[Epoch  1] Average test loss: {loss:.3f}, accuracy: {accuracy:.2f}%",
        "",
    ]
    expected = r"Done in \d+\.\d s; the record is in logs/run-1 \(sha256 [0-9a-f]{16}\)"
    assert re.fullmatch(expected, last) and end == ""
    for row in table:  # Nine digits, which tell any two float32 numbers apart.
        assert row["loss"] == f"{np.float32(row['loss']):.9g}"


@pytest.mark.skipif("MNIST_DIR" not in os.environ, reason="it is the data dir of the real MNIST")
def test_learns_to_read(go, tmp_path):
    finished = go("main.py", "--data-dir", os.environ["MNIST_DIR"], "--epochs", 1, cwd=tmp_path)
    assert (finished.returncode, finished.stderr) == (0, "")  # no progress bar in a log
    (tested,) = rows(tmp_path / "logs" / "run-1" / "test.csv")
    assert int(tested["step"]) == 469 and float(tested["accuracy"]) > 98.3


def test_a_run_is_that_of_a_plain_loop(small_mnist, tmp_path, monkeypatch):
    """In float64, where what is rounded otherwise does not show."""
    lenet = main.LeNet
    monkeypatch.setattr(main, "LeNet", lambda dropout: lenet(dropout).double())
    monkeypatch.setattr(main, "normalise", lambda pixels: (pixels / 255 - 0.1307).double() / 0.3081)
    flags = "--epochs 3 --batch-size 200 --dropout 0 --momentum 0.8 --seed 6 --schedule cosine"
    main.main([*flags.split(), "--data-dir", str(small_mnist), "--log-dir", str(tmp_path)])

    main.seed_everything(6)
    plain = plain_lenet().double()
    optimizer = optim.SGD(plain.parameters(), lr=0.1, momentum=0.8)
    schedule = optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=3)
    digits = datasets.MNIST(small_mnist)
    loader = main.Loader(digits.data, digits.targets, 200, seed=6)
    digits = datasets.MNIST(small_mnist, train=False)
    trained, tested = [], []
    for epoch in (1, 2, 3):
        loader.epoch = epoch
        plain.train()
        rate = optimizer.param_groups[0]["lr"]
        for batch, (data, target) in enumerate(loader):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(plain(data), target)
            loss.backward()
            optimizer.step()
            trained.append((len(trained) + 1, epoch, batch, rate, loss.item()))
        output = plain.eval()(main.normalise(digits.data)[:, None])
        loss = nn.functional.cross_entropy(output, digits.targets).item()
        accuracy = 100 * (output.argmax(1) == digits.targets).double().mean().item()
        tested.append((epoch, len(trained), rate, loss, accuracy))
        schedule.step()
    for name, expected in (("train.csv", trained), ("test.csv", tested)):
        found = np.loadtxt(tmp_path / "run-1" / name, delimiter=",", skiprows=1)
        assert found == pytest.approx(np.array(expected), rel=1e-6)
    stored = read_params(tmp_path / "run-1", 3).values()
    for ours, theirs in zip(stored, plain.state_dict().values(), strict=True):
        torch.testing.assert_close(torch.tensor(ours), theirs.float())


@pytest.mark.parametrize("epochs", [1, 2, 3, 4, 10])
@pytest.mark.parametrize("name", ["constant", "step", "cosine"])
def test_schedules_are_pytorchs(name, epochs):
    """On two groups of parameters with rates of their own, and also when they are resumed."""
    groups = [{"params": [nn.Parameter(torch.zeros(1))], "lr": lr} for lr in (0.1, 0.02)]
    optimizers = ours, resumed, theirs = [optim.SGD(copy.deepcopy(groups)) for _ in range(3)]
    schedule, again = (main.Schedule(optimizer, name, epochs) for optimizer in (ours, resumed))
    milestones = [math.ceil(epochs / 2), math.ceil(3 * epochs / 4)] if name == "step" else []
    expected = optim.lr_scheduler.MultiStepLR(theirs, milestones, gamma=0.1)
    if name == "cosine":
        expected = optim.lr_scheduler.CosineAnnealingLR(theirs, T_max=epochs)
    theirs.step()
    for _ in range(epochs):
        again.load_state_dict(schedule.state_dict())
        rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
        assert rates[0] == rates[1] == pytest.approx(rates[2], rel=1e-6)
        schedule.step()
        expected.step()


def be_macos():
    """Has this process believe that it runs where there is no C library of Linux."""
    sys.platform = "darwin"
    ctypes.CDLL = None


def test_a_seed_decides_on_all_random_numbers(train, tmp_path):
    first, again, other = (
        checksum(train(tmp_path, "--seed", seed, prepare=prepare))
        for seed, prepare in ((0, None), (0, be_macos), (10**30, None))
    )
    assert first == again != other
    initial = [read_params(tmp_path / f"run-{run}", 0)["m.0.0.weight"] for run in (1, 3)]
    assert not np.array_equal(*initial)


@pytest.mark.parametrize("batch_size, step", [(50, 2), (600, 1)])
def test_a_loss_that_is_not_finite(go, small_mnist, tmp_path, batch_size, step):
    """In training, or only in the test after the last step of an epoch."""
    flags = ("--lr", 1e38, "--momentum", 0, "--epochs", 2, "--batch-size", batch_size)
    line = error_line(go("main.py", *flags, "--data-dir", small_mnist, "--log-dir", tmp_path))
    assert re.search(rf"loss (nan|inf) in step {step}, epoch 1: lower --lr", line), line
    losses = [float(row["loss"]) for row in rows(tmp_path / "run-1" / "train.csv")]
    assert np.isfinite(losses[0]) and len(losses) == 600 // batch_size


def test_devices_are_not_mixed(tmp_path, monkeypatch):
    """On a GPU that does not exist: its tensors have shapes and devices, but no values."""

    def backward(loss):
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)

    monkeypatch.setattr(torch.Tensor, "item", lambda tensor: 1.0)
    monkeypatch.setattr(torch.Tensor, "numpy", lambda tensor: np.ones(tensor.shape, np.int64))
    monkeypatch.setattr(torch.Tensor, "backward", backward)  # The real one looks for the GPU.
    with FakeTensorMode():
        digits = torch.zeros(600, 28, 28, dtype=torch.uint8), torch.zeros(600, dtype=torch.int64)
        with torch.device("cuda"):
            model, loss_function = main.LeNet(), nn.CrossEntropyLoss()
        main.make_faster(model)
        optimizer = optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        record = main.Record(None, tmp_path, ExitStack())
        loader = main.Loader(*digits, 300, "cuda", seed=1)
        main.train(1, model, loss_function, optimizer, loader, record)
        assert [row["loss"].device.type for row in record.rows["train.csv"]] == ["cuda"] * 2
        main.test(1, model, loss_function, main.Loader(*digits, 250, "cuda"))


def test_an_epoch_on_a_gpu_and_its_resumption(train, gpu, tmp_path):
    whole = train(tmp_path / "whole", environ=gpu)
    train(tmp_path / "stopped", "--epochs", 1, environ=gpu)
    assert checksum(train(tmp_path / "stopped", "--resume", environ=gpu)) == checksum(whole)
    assert "   cuda:  True" in whole


def test_a_row_is_what_a_step_has_found(tmp_path):
    record = main.Record(None, tmp_path, ExitStack())
    record.folder = tmp_path
    weights = nn.Parameter(torch.ones(3))
    record.add("train.csv", step=7, epoch=2, weight=weights[0], loss=math.inf)
    assert not record.rows["train.csv"][0]["weight"].requires_grad  # It would keep the graph.
    weights.data.zero_()
    with pytest.raises(SystemExit, match="loss inf in step 7, epoch 2: lower --lr"):
        record.write("train.csv")
    assert (tmp_path / "train.csv").read_text() == "step,epoch,weight,loss\n7,2,1,inf\n"
