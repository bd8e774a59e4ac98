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
from conftest import checksum, error_line, plain_lenet, plain_with, read_params, rows
from torch import nn, optim
from torch._subclasses.fake_tensor import FakeTensorMode

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
    "flag, values",
    [
        ("--batch-size", ["1"]),
        ("--epochs", ["0"]),
        ("--lr", ["0", "nan", "inf"]),
        ("--dropout", ["1", "-0.1", "nan"]),
        ("--momentum", ["1", "-0.1", "nan"]),
        ("--seed", ["-1"]),
    ],
)
def test_flags_that_make_no_sense(go, tmp_path, flag, values):
    for value in values:
        finished = go("main.py", flag, value, cwd=tmp_path)
        assert f"argument {flag}: must be " in error_line(finished, 2) and finished.stdout == ""
    assert list(tmp_path.iterdir()) == []


def test_prints_what_the_guide_prints(train, small_mnist, tmp_path):
    output = train("logs", "--batch-size", 2, "--lr", 1e-30, "--epochs", 1, cwd=tmp_path)
    run = tmp_path / "logs" / "run-1"
    table, (tested,) = rows(run / "train.csv"), rows(run / "test.csv")
    flags = DEFAULTS | {"batch_size": 2, "epochs": 1, "lr": 1e-30, "cuda": False}
    flags |= {"data_dir": str(small_mnist), "dataset": "mnist", "log_dir": "logs"}
    loss, accuracy = float(tested["loss"]), float(tested["accuracy"])
    *lines, last, end = output.split("\n")
    assert lines == [
        "Training LeNet on MNIST",
        *(f"   {name}:  {value}" for name, value in flags.items()),
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
def test_learns_to_read(train, tmp_path):
    train(tmp_path, "--data-dir", os.environ["MNIST_DIR"], "--batch-size", 128, "--epochs", 1)
    (tested,) = rows(tmp_path / "run-1" / "test.csv")
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
    _, train_set, test_set = main.load_dataset("mnist", small_mnist)
    loader = main.Loader(*train_set, 200, seed=6)
    images, digits = next(iter(main.Loader(*test_set, 300)))
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
        output = plain.eval()(images)
        loss = nn.functional.cross_entropy(output, digits).item()
        accuracy = 100 * (output.argmax(1) == digits).double().mean().item()
        tested.append((epoch, len(trained), rate, loss, accuracy))
        schedule.step()
    for name, expected in (("train.csv", trained), ("test.csv", tested)):
        found = np.loadtxt(tmp_path / "run-1" / name, delimiter=",", skiprows=1)
        assert found == pytest.approx(np.array(expected), rel=1e-6)
    stored = plain_with(read_params(tmp_path / "run-1", 3).values())
    torch.testing.assert_close(stored.state_dict(), plain.float().state_dict())


def test_the_step_schedule():
    """On two groups of parameters with rates of their own, and also when it is resumed."""
    groups = [{"params": [nn.Parameter(torch.zeros(1))], "lr": lr} for lr in (0.1, 0.02)]
    optimizers = [optim.SGD(copy.deepcopy(groups)) for _ in range(2)]
    schedule, resumed = (main.Schedule(optimizer, "step", 4) for optimizer in optimizers)
    for factor in (1, 1, 0.1, 0.01):
        resumed.load_state_dict(schedule.state_dict())
        for optimizer in optimizers:
            rates = [group["lr"] for group in optimizer.param_groups]
            assert rates == pytest.approx([0.1 * factor, 0.02 * factor])
        schedule.step()


def test_without_the_c_library_of_linux(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(ctypes, "CDLL", None)
    main.select_device()


@pytest.mark.parametrize("batch_size, step", [(50, 2), (600, 1)])
def test_a_loss_that_is_not_finite(go, flags, tmp_path, batch_size, step):
    """In training, or only in the test after the last step of an epoch."""
    more = ("--lr", 1e38, "--momentum", 0, "--batch-size", batch_size)
    line = error_line(go("main.py", *flags, tmp_path, *more))
    assert re.search(rf"loss (nan|inf) in step {step}, epoch 1: lower --lr", line), line


def test_devices_are_not_mixed(tmp_path, monkeypatch):
    """On a GPU that does not exist: its tensors have shapes and devices, but no values."""
    monkeypatch.setattr(torch.Tensor, "item", lambda tensor: 1.0)
    monkeypatch.setattr(torch.Tensor, "numpy", lambda tensor: np.ones(tensor.shape, np.int64))
    # The real one looks for the GPU.
    monkeypatch.setattr(torch.Tensor, "backward", lambda loss: None)
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
