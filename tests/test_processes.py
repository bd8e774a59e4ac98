"""Two processes, as on a machine with two GPUs, but on its CPU.

Most are forked, with the variables that torchrun would set for them. test_run_sh.py has
runs of torchrun that end well, or are killed.
"""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from functools import partial

import numpy as np
import pytest
from conftest import (
    HOME,
    OFFLINE,
    act_before,
    end,
    is_stopped,
    one_line,
    print_seeds,
    read_params,
    rows,
    wait_for,
)
from torch import nn

import main


@pytest.fixture
def start_two(start):
    """A function that starts main in two processes, as `start` does, and returns them.

    `prepare_first` is called in the first process, and `prepare` in the second or both.
    """

    def start_two(*arguments, prepare=None, prepare_first=None):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        environ = {
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        first = start(
            *arguments,
            environ=environ | {"RANK": "0", "LOCAL_RANK": "0"},
            prepare=prepare_first or prepare,
        )
        second = start(
            *arguments,
            environ=environ | {"RANK": "1", "LOCAL_RANK": "1"},
            prepare=prepare,
        )
        return first, second

    return start_two


def end_well(first, second):
    """Waits for the end of two processes; returns what the first one printed."""
    for process in (second, first):
        finished = end(process)
        assert (finished.returncode, finished.stderr) == (0, "")
        if process is second:
            assert finished.stdout == ""
    return finished.stdout


def assert_whole(log_dir, epochs, batches):
    """Asserts that a record has each row once and in order, and all parameters."""
    expected = [
        (step + 1, step // batches + 1, step % batches)
        for step in range(epochs * batches)
    ]
    train = rows(log_dir / "train.csv")
    places = [tuple(int(row[k]) for k in ("step", "epoch", "batch")) for row in train]
    assert places == expected
    table = [(int(r["epoch"]), int(r["step"])) for r in rows(log_dir / "test.csv")]
    assert table == [(epoch, epoch * batches) for epoch in range(1, epochs + 1)]
    for epoch in range(epochs + 1):
        assert list(read_params(log_dir, epoch)) == list(main.LeNet().state_dict())
    assert len(list((log_dir / "params").iterdir())) == epochs + 1
    assert (log_dir / "checkpoint.pt").exists()


# What they compute


def test_one_output_and_one_record(start_two, go, small_mnist, tmp_path):
    flags = ("--data-dir", small_mnist, "--batch-size", 50, "--epochs", 3, "--log-dir")
    output = end_well(*start_two(*flags, tmp_path / "two"))
    assert go(*flags, tmp_path / "one").returncode == 0
    lines = output.splitlines()
    assert lines.count("Training LeNet on MNIST") == 1
    assert lines.count("   processes:  2") == 1
    starts = [line[:10] for line in lines if line.startswith("[Epoch")]
    assert starts == ["[Epoch  1]", "[Epoch  2]", "[Epoch  3]"]
    assert sum(line.startswith("Done in ") for line in lines) == 1
    assert_whole(tmp_path / "two", 3, 12)
    one = float(rows(tmp_path / "one" / "test.csv")[-1]["accuracy"])
    two = float(rows(tmp_path / "two" / "test.csv")[-1]["accuracy"])
    assert two > 60 and two == pytest.approx(one, abs=10)  # 20 images


def without_batch_statistics():
    """Has LeNet normalise by the running statistics, in training, too."""

    def train(self, mode=True):
        return nn.Module.train(self, False)

    main.LeNet.train = train


def test_losses_are_those_of_one_process(start_two, go, small_mnist, tmp_path):
    """Where no layer looks at a batch as a whole; shares of 3 images."""
    flags = ("--data-dir", small_mnist, "--batch-size", 6, "--epochs", 1)
    flags += ("--lr", 0.01, "--momentum", 0.5, "--log-dir")
    prepare = without_batch_statistics
    end_well(*start_two(*flags, tmp_path / "two", prepare=prepare))
    assert go(*flags, tmp_path / "one", prepare=prepare).returncode == 0
    one = [float(row["loss"]) for row in rows(tmp_path / "one" / "train.csv")]
    two = [float(row["loss"]) for row in rows(tmp_path / "two" / "train.csv")]
    assert len(one) == len(two) == 100
    assert np.mean(one[:20]) > 1.3 * np.mean(one[-20:])  # it learns
    # 6e-7 was seen; at a higher --lr, rounding grows until nothing is alike.
    np.testing.assert_allclose(two, one, rtol=1e-5)


def test_each_process_has_its_own_dropout(start_two, small_mnist, tmp_path):
    flags = ("--data-dir", small_mnist, "--log-dir", tmp_path, "--batch-size", 200)
    processes = start_two(*flags, "--epochs", 2, prepare=print_seeds)
    outputs = [end(process).stdout for process in processes]
    seeds = re.findall(r"seed (\d+)", "".join(outputs))
    assert len(seeds) == len(set(seeds)) == 4


def fail_to_download():
    """Has the download fail at once, without the import of torchvision."""

    def download_mnist(raw, missing):
        raise OSError("no network")

    main.download_mnist = download_mnist


def test_one_warning_without_network(start_two, tmp_path):
    flags = ("--data-dir", tmp_path / "data", "--log-dir", tmp_path / "logs")
    first, second = start_two(
        *flags, "--batch-size", 2000, "--epochs", 1, prepare=fail_to_download
    )
    finished = end(first)
    assert finished.stderr.count("TRAINING ON MNIST-5K INSTEAD") == 1
    assert "   dataset:  mnist-5k\n" in finished.stdout
    assert (end(second).returncode, end(second).stderr) == (0, "")


# How they end


def test_the_second_waits_for_the_record_of_the_first(start_two, small_mnist, tmp_path):
    flags = ("--data-dir", small_mnist, "--log-dir", tmp_path, "--batch-size", 200)
    stop = partial(act_before, tmp_path, "epoch-01.tmp", signal.SIGSTOP)
    first, second = start_two(*flags, "--epochs", 1, prepare_first=stop)
    wait_for(lambda: is_stopped(first))
    time.sleep(1)  # in which a process that does not wait would leave
    assert second.is_alive()
    os.kill(first.pid, signal.SIGCONT)
    end_well(first, second)
    assert_whole(tmp_path, 1, 3)


def test_the_second_can_be_ended_while_it_waits(start_two, small_mnist, tmp_path):
    """It has no handler: inside PyTorch's waiting, none would run."""
    flags = ("--data-dir", small_mnist, "--log-dir", tmp_path)
    stop = partial(act_before, tmp_path, "train.csv", signal.SIGSTOP)
    first, second = start_two(*flags, prepare_first=stop)
    wait_for(lambda: is_stopped(first))
    second.terminate()
    assert end(second).returncode == -signal.SIGTERM
    first.kill()


def test_a_killed_process_ends_the_other_and_one_resumes(
    start_two, go, small_mnist, tmp_path
):
    flags = ("--data-dir", small_mnist, "--log-dir", tmp_path, "--batch-size", 50)
    flags += ("--epochs", 16)
    first, second = start_two(*flags)
    table = tmp_path / "test.csv"
    wait_for(lambda: table.exists() and len(rows(table)) >= 2)
    second.kill()
    line = one_line(end(first), 1)
    assert "another process has stopped" in line
    assert len(rows(table)) < 16
    finished = go(*flags, "--resume")
    assert finished.returncode == 0, finished.stderr
    assert "[Epoch  1]" not in finished.stdout
    assert_whole(tmp_path, 16, 12)


def test_batch_too_small_for_two_processes(start_two, small_mnist, tmp_path):
    flags = ("--data-dir", small_mnist, "--log-dir", tmp_path / "logs")
    first, second = start_two(*flags, "--batch-size", 3)
    line = one_line(end(first), 1)
    assert "--batch-size: must be 4 or more" in line
    second.kill()
    assert not (tmp_path / "logs").exists()


def test_torchrun_ends_when_the_first_process_cannot_go_on(go, small_mnist, tmp_path):
    """The second one waits for it, and would be killed only after 30 seconds."""
    flags = ("--data-dir", small_mnist, "--log-dir", tmp_path, "--batch-size", 200)
    assert go(*flags, "--epochs", 1).returncode == 0
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [HOME / "main.py", *flags, "--epochs", 1, "--resume", "--lr", 0.3]
    finished = subprocess.run(
        [sys.executable, *map(str, command)],
        env=os.environ | OFFLINE,
        capture_output=True,
        check=False,
        text=True,
        timeout=240,
    )
    assert finished.returncode == 1
    lines = re.findall(r"^main\.py: error: .*", finished.stderr, re.MULTILINE)
    reasons = [line for line in lines if "another process has stopped" not in line]
    assert len(reasons) == 1 and "--lr 0.1" in reasons[0]
    assert "forcefully exiting" not in finished.stderr  # torchrun's words for kill -9
    assert 'main.py", line' not in finished.stderr  # no traceback but torchrun's own
    assert finished.stdout == ""
