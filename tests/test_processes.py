"""Several processes, as on a machine with several GPUs, but on its CPU.

Most are forked, with the variables that torchrun would set for them. test_run_sh.py has runs of
torchrun that end well, or are stopped.
"""

import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import FLAGS, HOME, OFFLINE, checksum, end, error_line, rows, wait_for


@pytest.fixture
def train_with(start_processes, small_mnist):
    """A function that trains in several processes, asserts success, and returns the output."""

    def train_with(count, log_dir, *flags, **options):
        flags = ("--data-dir", small_mnist, "--log-dir", log_dir, *FLAGS, *flags)
        finished = [end(process) for process in start_processes(count, *flags, **options)]
        assert [(process.returncode, process.stderr) for process in finished] == [(0, "")] * count
        assert [process.stdout for process in finished[1:]] == [""] * (count - 1)
        return finished[0].stdout

    return train_with


@pytest.mark.parametrize("count", [2, 3])
def test_stopped_and_resumed_they_end_in_the_same_bits(train_with, tmp_path, count):
    whole = train_with(count, tmp_path / "whole")
    assert whole.count("Training LeNet on MNIST") == 1
    assert len(re.findall(r"^\[Epoch  \d\] Average", whole, re.MULTILINE)) == 3
    accuracy = float(rows(tmp_path / "whole" / "run-1" / "test.csv")[-1]["accuracy"])
    assert accuracy > 50
    train_with(count, tmp_path / "stopped", "--epochs", 1)
    resumed = train_with(count, tmp_path / "stopped", "--resume")
    assert checksum(resumed) == checksum(whole)


def test_losses_are_those_of_one_process(train_with, train, tmp_path):
    """Where no layer looks at a batch as a whole; shares of 3 images."""
    text = (HOME / "main.py").read_text()
    assert text.count("model.train()") == 1
    (tmp_path / "main.py").write_text(text.replace("model.train()", "model.eval()"))
    flags = ("--batch-size", 6, "--epochs", 1, "--lr", 0.01, "--momentum", 0.5)
    train_with(2, tmp_path / "two", *flags, program=tmp_path / "main.py")
    train(tmp_path / "one", *flags, program=tmp_path / "main.py")
    tables = [rows(tmp_path / name / "run-1" / "train.csv") for name in ("one", "two")]
    one, two = ([float(row["loss"]) for row in table] for table in tables)
    assert len(one) == len(two) == 100
    assert np.mean(one[:20]) > 1.3 * np.mean(one[-20:])  # it learns
    # At a higher --lr, rounding grows until nothing is alike.
    np.testing.assert_allclose(two, one, rtol=1e-5)


def test_each_process_has_its_own_dropout(start_processes, small_mnist, tmp_path):
    text = (HOME / "main.py").read_text()
    new = "print(torch.initial_seed(), file=sys.stderr); model.train()"
    (tmp_path / "main.py").write_text(text.replace("model.train()", new))
    flags = ("--data-dir", small_mnist, "--log-dir", tmp_path, *FLAGS)
    processes = start_processes(2, *flags, program=tmp_path / "main.py")
    seeds = "".join(end(process).stderr for process in processes).split()
    assert all(seed.isdecimal() for seed in seeds)
    assert len(seeds) == len(set(seeds)) == 6


def test_one_warning_without_network(start_processes, tmp_path):
    flags = ("--data-dir", tmp_path / "data", "--log-dir", tmp_path, "--batch-size", 2000)
    first, second = start_processes(2, *flags, "--epochs", 1)
    finished = end(first)
    assert finished.stderr.count("TRAINING ON MNIST-5K INSTEAD") == 1
    assert "   dataset:  mnist-5k\n" in finished.stdout
    assert (end(second).returncode, end(second).stderr) == (0, "")


def test_batch_too_small_for_two_processes(start_processes, tmp_path):
    for process in start_processes(2, "--log-dir", tmp_path / "logs", "--batch-size", 3):
        assert "--batch-size: must be 2 or more for each process" in error_line(end(process), 2)
    assert not (tmp_path / "logs").exists()


def test_a_lost_process_ends_the_other_and_one_goes_on(
    start_processes, small_mnist, train, tmp_path
):
    flags = ("--data-dir", small_mnist, "--log-dir", tmp_path, *FLAGS, "--epochs", 100)
    first, second = start_processes(2, *flags)
    table = tmp_path / "run-1" / "test.csv"
    wait_for(lambda: table.exists() and len(rows(table)) >= 2)
    os.kill(second.pid, signal.SIGKILL)
    assert end(first).returncode == 1
    done = len(rows(table))
    assert done < 100
    train(tmp_path, "--resume", "--epochs", done + 1)
    assert [row["epoch"] for row in rows(table)] == [str(n + 1) for n in range(done + 1)]


@pytest.mark.parametrize("reason", ["missing", "broken"])
def test_torchrun_ends_when_the_first_process_cannot_go_on(small_mnist, tmp_path, reason):
    """With one line of ours, and not after the 30 seconds that it gives to other processes."""
    if reason == "broken":
        (tmp_path / "checkpoint.pt").write_text("hello")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [HOME / "main.py", "--data-dir", small_mnist, "--resume", tmp_path]
    started = time.monotonic()
    finished = subprocess.run(
        command, env=os.environ | OFFLINE, capture_output=True, check=False, text=True
    )
    assert finished.returncode == 1 and finished.stdout == ""
    assert time.monotonic() - started < 60
    lines = re.findall(r"^main\.py: error: .*", finished.stderr, re.MULTILINE)
    assert len(lines) == 1 and str(tmp_path) in lines[0]
    assert "forcefully exiting" not in finished.stderr  # torchrun's words for kill -9
