"""Training and testing: the values of a plain loop, and what is printed of them."""

import fcntl
import importlib.util
import os
import pty
import re
import shlex
import struct
import subprocess
import sys
import termios
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (
    HOME,
    one_line,
    plain_with,
    print_seeds,
    read_by_hand,
    rows,
    stored_model,
)
from torch import nn, optim

import main

CPU = torch.device("cpu")


# One epoch of the real MNIST


@pytest.fixture(scope="module")
def full_run(go, full_mnist, tmp_path_factory):
    log_dir = tmp_path_factory.mktemp("full") / "logs"
    finished = go("--data-dir", full_mnist, "--epochs", 1, "--log-dir", log_dir)
    return finished, log_dir


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
        f"   data_dir:  {re.escape(full_mnist)}",
        "   dataset:  mnist",
        "   schedule:  constant",
        "   seed:  1",
        f"   log_dir:  {re.escape(str(log_dir))}",
        "   resume:  False",
        "   no_graph:  False",
        f"   cuda:  {torch.cuda.is_available()}",
        "",
        "",
        *batches,
        r"\[Epoch  1\] Average test loss: \d\.\d{3}, accuracy: \d\d\.\d\d%",
        "",
        rf"Done in \d+\.\d s\b.*{re.escape(str(log_dir))}",
        "",  # after the last line's end
    ]
    lines = finished.stdout.split("\n")
    assert len(lines) == len(expected), finished.stdout
    for line, pattern in zip(lines, expected, strict=True):
        assert re.fullmatch(pattern, line), (line, pattern)


def test_prints_losses_that_fall(full_run):
    finished, log_dir = full_run
    losses = re.findall(r"training loss: (\S+)", finished.stdout)
    assert len(losses) == 4 and all(0 < float(loss) < 0.7 for loss in losses)
    table = rows(log_dir / "train.csv")
    assert len(table) == 469
    assert float(table[0]["loss"]) == pytest.approx(np.log(10), abs=0.6)
    at = [f"{float(table[batch]['loss']):.4f}" for batch in (100, 200, 300, 400)]
    assert losses == at


def test_accuracy_and_loss_are_those_of_a_plain_loop(full_run, full_mnist):
    finished, log_dir = full_run
    printed = re.search(r"test loss: (\S+), accuracy: (\S+)%", finished.stdout)
    plain = stored_model(log_dir, 1).eval()
    images, labels = read_by_hand(full_mnist, "t10k")
    with torch.no_grad():
        outputs = torch.cat([plain(data) for data in images.split(400)])
    loss = nn.functional.cross_entropy(outputs.double(), labels).item()
    correct = (outputs.argmax(1) == labels).sum().item()
    assert len(images) == 10_000 and correct >= 9830
    assert float(printed[1]) == pytest.approx(loss, abs=0.000501)  # three decimals
    assert float(printed[2]) == correct / 100
    (row,) = rows(log_dir / "test.csv")
    assert float(row["loss"]) == pytest.approx(loss, rel=1e-5)
    assert float(row["accuracy"]) == pytest.approx(correct / 100, abs=1e-6)


# Steps


@pytest.mark.parametrize(
    "dtype, steps, error", [(torch.float64, 20, 1e-9), (torch.float32, 3, 1e-5)]
)
@pytest.mark.parametrize("negative", [False, True])
def test_steps_have_the_losses_of_plain_sgd(digits, negative, dtype, steps, error):
    torch.manual_seed(5)
    model = main.LeNet(dropout=0)
    if negative:  # scales of batch norm, for which pooling cannot go first
        model.m[0][1].weight.data[::3] *= -1
        model.m[1][1].weight.data[::3] *= -1
    plain = plain_with([value.numpy() for value in model.state_dict().values()])
    model = main.prepare(model, CPU).to(dtype).train()
    plain = plain.to(dtype).train()
    pixels, labels = digits
    images = (torch.tensor(pixels).to(dtype).unsqueeze(1) / 255 - 0.1307) / 0.3081
    labels = torch.tensor(labels).long()
    loss_function = nn.CrossEntropyLoss()
    ours = optim.SGD(model.parameters(), lr=0.1, momentum=0.9, fused=True)
    theirs = optim.SGD(plain.parameters(), lr=0.1, momentum=0.9)
    losses = []
    expected = []
    for step in range(steps):
        data = images[128 * step :][:128]
        target = labels[128 * step :][:128]
        losses.append(main.train_step(model, loss_function, ours, data, target).item())
        theirs.zero_grad()
        loss = loss_function(plain(data), target)
        loss.backward()
        theirs.step()
        expected.append(loss.item())
    assert losses == pytest.approx(expected, rel=error)
    assert steps < 20 or losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize(
    "batch_size, steps", [(599, 1), (600, 1), (601, 1), (598, 2), (256, 3), (128, 5)]
)
def test_trains_on_every_image_of_a_short_last_batch(
    small_mnist, go, tmp_path, batch_size, steps
):
    finished = go(
        *("--data", small_mnist, "--log-dir", tmp_path, "--batch-size", batch_size),
        *("--epochs", 1, "--dropout", 0, "--momentum", 0),
    )
    assert finished.returncode == 0 and finished.stderr == ""
    table = rows(tmp_path / "train.csv")
    assert [row["step"] for row in table] == [str(n + 1) for n in range(steps)]
    assert [row["batch"] for row in table] == [str(n) for n in range(steps)]
    if steps == 1:  # on all images: their order makes no difference
        images, labels = read_by_hand(small_mnist, "train")
        plain = stored_model(tmp_path, 0).train()
        loss = nn.functional.cross_entropy(plain(images), labels)
        loss.backward()
        assert float(table[0]["loss"]) == pytest.approx(loss.item(), rel=1e-5)
        after = stored_model(tmp_path, 1).parameters()
        for old, new in zip(plain.parameters(), after, strict=True):
            update = -0.1 * old.grad  # of which some nearly cancels out
            assert (new - old - update).norm() <= 3e-3 * update.norm() + 2e-5


# The test


def test_weighs_every_test_image_alike(digits, capsys):
    """1,200 images, in batches of 500, 500 and 200."""
    torch.manual_seed(2)
    model = main.LeNet()
    pixels, labels = digits
    images = torch.tensor(pixels[:1200]).float().unsqueeze(1) / 255
    labels = torch.tensor(labels[:1200]).long()
    images[1000:] *= 30  # so that the last batch has another loss
    loss, accuracy = main.test(
        3, model, nn.CrossEntropyLoss(), main.Loader(images, labels, 500, CPU)
    )
    plain = plain_with([value.numpy() for value in model.state_dict().values()]).eval()
    with torch.no_grad():
        outputs = plain(images)
    expected = nn.functional.cross_entropy(outputs, labels).item()
    correct = (outputs.argmax(1) == labels).sum().item()
    assert loss == pytest.approx(expected, rel=1e-5)
    assert accuracy == pytest.approx(100 * correct / 1200, rel=1e-9)
    printed = f"[Epoch  3] Average test loss: {expected:.3f}, accuracy: "
    assert capsys.readouterr().out == f"{printed}{100 * correct / 1200:.2f}%\n\n"


# Seeds


def test_same_seed_same_lines(small_mnist, go, tmp_path):
    flags = ("--data-dir", small_mnist, "--batch-size", 5, "--epochs", 2, "--lr", 0.02)
    printed = {}
    for name, seed in (("first", 3), ("again", 3), ("other", 4)):
        finished = go(*flags, "--seed", seed, "--log-dir", tmp_path / name)
        assert finished.returncode == 0, finished.stderr
        lines = finished.stdout.splitlines()
        printed[name] = [line for line in lines if line.startswith("[")]
        assert len(printed[name]) == 4  # batch 100 and the test, twice
    assert printed["first"] == printed["again"]
    assert not set(printed["first"]) & set(printed["other"])
    names = ("train.csv", "test.csv", *(f"params/epoch-0{n}.pkl" for n in range(3)))
    for name in names:
        first = (tmp_path / "first" / name).read_bytes()
        assert first == (tmp_path / "again" / name).read_bytes(), name
        assert first != (tmp_path / "other" / name).read_bytes(), name


def test_every_epoch_has_its_own_dropout(small_mnist, go, tmp_path):
    flags = ("--data-dir", small_mnist, "--log-dir", tmp_path, "--batch-size", 200)
    finished = go(*flags, "--epochs", 3, prepare=print_seeds)
    seeds = re.findall(r"seed (\d+)", finished.stdout)
    assert len(seeds) == len(set(seeds)) == 3
    finished = go(*flags, "--epochs", 4, "--resume", prepare=print_seeds)
    (fourth,) = re.findall(r"seed (\d+)", finished.stdout)
    assert fourth not in seeds


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
    ours = sgd()
    theirs = sgd()
    schedule = main.Schedule(ours, name, 0.1, epochs)
    expected = reference(name, theirs, epochs)
    tensor = ours.param_groups[0]["lr"]
    for epoch in range(epochs):
        lr = theirs.param_groups[0]["lr"].item()
        assert schedule.lr == pytest.approx(lr, rel=1e-6)
        assert ours.param_groups[0]["lr"] is tensor  # where a CUDA graph reads it
        assert tensor.item() == pytest.approx(schedule.lr, rel=1e-6)
        resumed = main.Schedule(sgd(), name, 0.1, epochs, epochs_done=epoch)
        assert resumed.lr == schedule.lr  # to the bit
        theirs.step()
        expected.step()
        schedule.step()


def test_step_schedule_over_any_number_of_epochs():
    for epochs in range(1, 31):
        schedule = main.Schedule(sgd(), "step", 0.3, epochs)
        for done in range(epochs):
            power = (2 * done >= epochs) + (4 * done >= 3 * epochs)
            assert schedule.lr == pytest.approx(0.3 * 0.1**power, rel=1e-9)
            schedule.step()


# A whole run


@pytest.mark.parametrize(
    "name, epochs, batch_size, lr",
    [("constant", 1, 5, 1e-5), ("step", 4, 200, 0.1), ("cosine", 4, 200, 0.1)],
)
def test_a_run_is_that_of_a_plain_loop(
    go, small_mnist, tmp_path, name, epochs, batch_size, lr
):
    finished = go(
        *("--data-dir", small_mnist, "--log-dir", tmp_path, "--schedule", name),
        *("--epochs", epochs, "--batch-size", batch_size, "--lr", lr),
        *("--dropout", 0, "--momentum", 0.8, "--seed", 6),
    )
    assert finished.returncode == 0, finished.stderr
    images, labels = read_by_hand(small_mnist, "train")
    loader = main.Loader(images, labels, batch_size, CPU, seed=6)
    plain = stored_model(tmp_path, 0).train()
    optimizer = optim.SGD(plain.parameters(), lr=lr, momentum=0.8)
    schedule = reference(name, optimizer, epochs)
    expected = []
    printed = []
    for epoch in range(1, epochs + 1):
        loader.epoch = epoch
        for batch, (data, target) in enumerate(loader):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(plain(data), target)
            loss.backward()
            optimizer.step()
            rate = optimizer.param_groups[0]["lr"]
            expected.append((len(expected) + 1, epoch, batch, rate, loss.item()))
            if batch > 0 and batch % 100 == 0:
                printed.append(loss.item())
        schedule.step()
    table = rows(tmp_path / "train.csv")
    assert list(table[0]) == ["step", "epoch", "batch", "lr", "loss"]
    found = [tuple(float(value) for value in row.values()) for row in table]
    assert [row[:3] for row in found] == [row[:3] for row in expected]
    for column, error in ((3, 1e-6), (4, 1e-2)):
        ours = [row[column] for row in found]
        theirs = [row[column] for row in expected]
        assert ours == pytest.approx(theirs, rel=error)
    lines = re.findall(r"batch 100\] training loss: (\S+)", finished.stdout)
    assert len(lines) == len(printed) == (name == "constant")
    assert [float(line) for line in lines] == pytest.approx(printed, rel=1e-2)


@pytest.mark.parametrize("batch_size", [4, 128])
def test_a_loss_that_is_not_finite(go, small_mnist, tmp_path, batch_size):
    flags = ("--data-dir", small_mnist, "--log-dir", tmp_path, "--lr", "1e30")
    finished = go(*flags, "--batch-size", batch_size)
    line = one_line(finished, 1)
    named = re.search(r"\b(nan|inf)\b.*\bepoch (\d+), batch (\d+)\b.*--lr\b", line)
    assert named, line
    losses = [float(row["loss"]) for row in rows(tmp_path / "train.csv")]
    assert named[2] == "1"
    assert np.isfinite(losses[: int(named[3])]).all()
    assert not np.isfinite(losses[int(named[3])])
    assert "Average test loss" not in finished.stdout


def test_a_test_loss_that_is_not_finite(go, small_mnist, tmp_path):
    """The last step of an epoch spoils the network: only the test can tell."""
    flags = ("--data-dir", small_mnist, "--log-dir", tmp_path, "--lr", "1e38")
    finished = go(*flags, "--batch-size", 600, "--epochs", 1)
    line = one_line(finished, 1)
    assert re.search(r"test loss (nan|inf) in epoch 1\b.*--lr\b", line), line
    assert np.isfinite([float(row["loss"]) for row in rows(tmp_path / "train.csv")])
    assert rows(tmp_path / "test.csv") == []


def edit(path, old, new):
    """Has this process run an edited copy of main.py, in the file `path`."""
    source = Path(HOME, "main.py").read_text()
    assert source.count(old) == 1
    path.write_text(source.replace(old, new))
    spec = importlib.util.spec_from_file_location("edited", path)
    edited = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(edited)
    main.main = edited.main


def test_a_students_mistake_keeps_its_traceback(go, small_mnist, tmp_path):
    mistake = "nn.Linear(50 * 3 * 3, 500)"
    copy = tmp_path / "main.py"
    finished = go(
        *("--data-dir", small_mnist, "--log-dir", tmp_path / "logs"),
        prepare=partial(edit, copy, "nn.Linear(50 * 2 * 2, 500)", mistake),
    )
    assert finished.returncode == 1 and mistake in copy.read_text()
    assert "main.py: error" not in finished.stderr
    assert re.search(rf'File "{copy}", line \d+, in forward', finished.stderr)
    error = r"^RuntimeError: .*mat1 and mat2 shapes cannot be multiplied"
    assert re.search(error, finished.stderr, re.MULTILINE)


def test_matrix_products_do_not_round_to_tf32():
    """Even where TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=1 has turned it on, as here."""
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    main.select_device()
    assert not torch.backends.cuda.matmul.allow_tf32
    assert not torch.backends.cudnn.allow_tf32


# Where the output goes


def use_terminal(name):
    """Makes a terminal the standard error of this process."""
    os.dup2(os.open(name, os.O_WRONLY | os.O_NOCTTY), 2)


def test_shows_a_progress_bar_on_a_terminal(go, small_mnist, tmp_path):
    terminal, side = pty.openpty()
    size = struct.pack("HHHH", 24, 80, 0, 0)  # tqdm hides in a terminal of no size
    fcntl.ioctl(side, termios.TIOCSWINSZ, size)
    flags = ("--data-dir", small_mnist, "--log-dir", tmp_path, "--epochs", 1)
    prepare = partial(use_terminal, os.ttyname(side))
    finished = go(*flags, "--batch-size", 5, prepare=prepare)
    shown = os.read(terminal, 2**16)
    os.close(terminal)
    os.close(side)
    assert finished.returncode == 0
    assert b"Epoch 1" in shown and b"/120" in shown
    assert "/120" not in finished.stdout and "\r" not in finished.stdout
    assert "[Epoch  1, batch 100] training loss: " in finished.stdout


def test_an_output_that_ends_is_named(small_mnist, tmp_path):
    """In processes of their own, for what Python itself says when it exits."""
    program = shlex.join([sys.executable, str(HOME / "main.py")])
    runs = {}
    for number, output in enumerate(("| head -1", "> /dev/full")):
        paths = f"--data-dir '{small_mnist}' --log-dir '{tmp_path}/{number}'"
        line = f"set -o pipefail; {program} {paths} {output}"
        runs[output] = subprocess.Popen(
            ["bash", "-c", line],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
    for output, process in runs.items():
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 1, (output, errors)
        (line,) = errors.splitlines()
        assert line.startswith("main.py: error: standard output"), (output, line)
