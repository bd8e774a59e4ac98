"""A whole run against a plain loop, what is printed of it, and the flags."""

import copy
import ctypes
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import HOME, checksum, error_line, plain_lenet, plain_with, read_params, rows
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


def test_defaults_and_home(go, monkeypatch, tmp_path):
    assert vars(main.parse_arguments([])) == DEFAULTS
    monkeypatch.setenv("HOME", str(tmp_path))
    args = main.parse_arguments(["--data=~/D", "--log-dir=~/L"])  # --data is in the guide's run.sh
    assert (args.data_dir, args.log_dir) == (f"{tmp_path}/D", f"{tmp_path}/L")
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
        ("--resume", ["nowhere"]),
    ],
)
def test_flags_that_make_no_sense(go, tmp_path, flag, values):
    for value in values:
        finished = go("main.py", flag, value, cwd=tmp_path)
        assert f"argument {flag}: " in error_line(finished, 2) and finished.stdout == ""
    assert list(tmp_path.iterdir()) == []


def test_prints_what_the_guide_prints(small_mnist, tmp_path):
    """And nothing on standard error, even when Python exits: so it is not forked."""
    flags = f"--log-dir logs --batch-size 2 --lr 1e-30 --epochs 1 --data-dir {small_mnist}"
    command = [sys.executable, HOME / "main.py", *flags.split()]
    pipes = {"capture_output": True, "text": True}
    finished = subprocess.run(command, check=False, cwd=tmp_path, **pipes)
    assert (finished.returncode, finished.stderr) == (0, "")
    run = tmp_path / "logs" / "run-1"
    table, (tested,) = rows(run / "train.csv"), rows(run / "test.csv")
    flags = DEFAULTS | {"batch_size": 2, "epochs": 1, "lr": 1e-30, "data_dir": str(small_mnist)}
    flags |= {"dataset": "mnist", "log_dir": "logs", "cuda": False}
    processor = torch.backends.cpu.get_cpu_capability()
    counts = f"threads: {torch.get_num_threads()}, processes: 1"
    flags["machine"] = f"PyTorch {torch.__version__}, {processor}, {counts}"
    loss, accuracy = float(tested["loss"]), float(tested["accuracy"])
    *lines, last, end = finished.stdout.split("\n")
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
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.BatchNorm2d, "forward", None)  # The faster blocks are the ones compared.
        main.main([*flags.split(), "--data-dir", str(small_mnist), "--log-dir", str(tmp_path)])

    main.seed_everything(6)
    plain = plain_lenet().double()
    optimizer = optim.SGD(plain.parameters(), lr=0.1, momentum=0.8)
    schedule = optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=3)
    _, train_set, test_set = main.load_dataset("mnist", small_mnist)
    loader = main.Loader(*train_set, 200, shuffle=True)
    images, digits = next(iter(main.Loader(*test_set, 300)))
    trained, tested = [], []
    for epoch in (1, 2, 3):
        main.seed_everything(6, epoch)
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


SPY = """
import os, runpy, sys
def spy(event, details):
    if event == "import" and details[0] == "torch":
        print(os.environ.get("GOMP_SPINCOUNT"), flush=True)
        os._exit(0)
sys.addaudithook(spy)
runpy.run_path(sys.argv[1])
"""


@pytest.mark.parametrize("program", ["main.py", "gradients.py", "predict.py"])
def test_threads_wait_only_for_a_short_time(program):
    """PyTorch reads the variable when it is imported."""
    environ = {name: os.environ[name] for name in os.environ if name != "GOMP_SPINCOUNT"}
    command = [sys.executable, "-c", SPY, program]
    assert subprocess.check_output(command, cwd=HOME, env=environ) == b"10000\n"


def test_schedules():
    """On two groups of parameters with rates of their own; and when a run is stretched."""
    groups = [{"params": [nn.Parameter(torch.zeros(1))], "lr": lr} for lr in (0.1, 0.02)]
    optimizer = optim.SGD(groups)
    schedule = main.Schedule(optimizer, "step", 4)
    for factor in (1, 1, 0.1, 0.01):
        rates = [group["lr"] for group in optimizer.param_groups]
        assert rates == pytest.approx([0.1 * factor, 0.02 * factor])
        schedule.step()
    for name, factor in (("constant", 1), ("step", 0.1), ("cosine", 0.5)):
        stretched = copy.deepcopy(optimizer)
        for group, lr in zip(stretched.param_groups, (0.1, 0.02), strict=True):
            group["lr"] = lr
        longer = main.Schedule(stretched, name, 8)
        stretched.load_state_dict(optimizer.state_dict())
        longer.load_state_dict(schedule.state_dict())
        rates = [group["lr"] for group in stretched.param_groups]
        assert rates == pytest.approx([0.1 * factor, 0.02 * factor]), name


def test_without_the_c_library_of_linux(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(ctypes, "CDLL", None)
    main.select_device()


@pytest.mark.parametrize("batch_size, name", [(50, "train.csv"), (600, "test.csv")])
def test_a_loss_that_is_not_finite(go, flags, tmp_path, batch_size, name):
    """In training, or only in the test after the last step of an epoch."""
    more = ("--lr", 1e38, "--momentum", 0, "--batch-size", batch_size)
    line = error_line(go("main.py", *flags, tmp_path, *more))
    assert line == f"main.py: error: {name} has a loss that is not finite: lower --lr"
    assert re.search("nan|inf", (tmp_path / "run-1" / name).read_text())


def test_devices_are_not_mixed(monkeypatch):
    """On a GPU that does not exist: its tensors have shapes and devices, but no values."""
    monkeypatch.setattr(torch.Tensor, "item", lambda tensor: 1.0)
    monkeypatch.setattr(torch.Tensor, "numpy", lambda tensor: np.ones(tensor.shape, np.int64))
    # The real one looks for the GPU.
    monkeypatch.setattr(torch.Tensor, "backward", lambda loss: None)
    losses = []
    record = SimpleNamespace(step=0, add=lambda name, loss, **values: losses.append(loss))
    with FakeTensorMode():
        digits = torch.zeros(600, 28, 28, dtype=torch.uint8), torch.zeros(600, dtype=torch.int64)
        with torch.device("cuda"):
            model, loss_function = main.LeNet(), nn.CrossEntropyLoss()
        optimizer = optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        loader = main.Loader(*digits, 300, "cuda", shuffle=True)
        main.train(1, model, loss_function, optimizer, loader, record)
        assert [loss.device.type for loss in losses] == ["cuda"] * 2
        main.test(1, model, loss_function, main.Loader(*digits, 250, "cuda"))


def test_an_epoch_on_a_gpu_and_its_resumption(train, gpu, tmp_path):
    whole = train(tmp_path / "whole", environ=gpu)
    train(tmp_path / "stopped", "--epochs", 1, environ=gpu)
    assert checksum(train(tmp_path / "stopped", "--resume", environ=gpu)) == checksum(whole)
    assert "   cuda:  True" in whole
