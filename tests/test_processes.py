"""Several processes, as on a machine with several GPUs, but on its CPU.

Most are forked, with the variables that torchrun would set for them. test_run_sh.py has runs of
torchrun that end well, or are stopped.
"""

import os
import re
import signal
import subprocess
import sys

import numpy as np
import pytest
from conftest import (
    FLAGS,
    HOME,
    OFFLINE,
    checksum,
    end,
    error_line,
    read_by_hand,
    read_params,
    rows,
    wait_for,
)


@pytest.fixture
def train_with(start_processes, small_mnist):
    """A function that trains in several processes, asserts success, and returns the output."""

    def train_with(count, log_dir, *flags, **options):
        flags = ("--data-dir", small_mnist, "--log-dir", log_dir, *FLAGS, *flags)
        finished = [end(process) for process in start_processes(count, *flags, **options)]
        for process in finished:
            resuming = "--resume" in flags and process is finished[0]
            assert process.returncode == 0, process.stderr
            assert process.stderr.count("main.py: resuming ") == resuming
            assert process.stderr.count("\n") == resuming
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


def edit(tmp_path, *changes):
    """A copy of main.py with changes in it, and its path."""
    text = (HOME / "main.py").read_text()
    for old, new in changes:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    (tmp_path / "main.py").write_text(text)
    return tmp_path / "main.py"


def test_parameters_are_those_of_one_process(train_with, train, tmp_path):
    """To the precision of float64, where no layer looks at a batch as a whole."""
    program = edit(
        tmp_path,
        ("model.train()", "model.eval()"),
        ("LeNet(args.dropout).to(device)", "LeNet(args.dropout).to(device).double()"),
        ("yield normalise(data)", "yield normalise(data).double()"),
        ("tensors[name].float()", "tensors[name]"),
    )
    flags = ("--epochs", 2, "--lr", 0.01)
    train(tmp_path / "one", *flags, program=program)
    train_with(2, tmp_path / "two", *flags, program=program)
    one, two = (tmp_path / name / "run-1" for name in ("one", "two"))
    first, last = read_params(one, 0), read_params(one, 2)
    assert np.abs(last["m.3.weight"] - first["m.3.weight"]).max() > 1e-3  # it learns
    for name, array in read_params(two, 2).items():
        np.testing.assert_allclose(array, last[name], rtol=1e-6, atol=1e-9)
    losses = [[float(row["loss"]) for row in rows(run / "train.csv")] for run in (one, two)]
    np.testing.assert_allclose(*losses, rtol=1e-6)


def test_each_process_has_its_own_images_and_dropout(start_processes, small_mnist, tmp_path):
    """The images of a step are those of one process, shared out."""
    new = "np.save(f'{RANK}-{epoch}-{batch_ix}', data); print(torch.initial_seed()); model.train()"
    program = edit(
        tmp_path,
        ("model.train()", new),
        ("if RANK > 0 or sys.stdout is None", "if sys.stdout is None"),
    )
    flags = ("--data-dir", small_mnist, "--log-dir", tmp_path, *FLAGS, "--epochs", 1)
    processes = start_processes(2, *flags, program=program, cwd=tmp_path)
    seeds = [set(re.findall(r"^\d+$", end(process).stdout, re.MULTILINE)) for process in processes]
    assert [len(seed) for seed in seeds] == [1, 1] and seeds[0] != seeds[1]
    shares = [np.load(tmp_path / f"{rank}-1-{batch}.npy") for batch in range(12) for rank in (0, 1)]
    assert {len(share) for share in shares} == {25}
    seen = np.concatenate(shares).reshape(600, -1)
    given = read_by_hand(small_mnist, "train")[0].reshape(600, -1).numpy()
    # In another order, each image once.
    assert np.allclose(sorted(seen.tolist()), sorted(given.tolist()), atol=1e-5)


def test_main_three_times_in_a_process(start_processes, small_mnist, tmp_path):
    """A loop over the values of a flag. All processes know the folder of each run."""
    program = edit(
        tmp_path,
        (
            "        train(epoch",
            "        print(record.folder, file=sys.stderr)\n        train(epoch",
        ),
        (
            "    main()\n    if",
            "    for lr in '0.1', '0.2', '0.3':\n        main([*sys.argv[1:], '--lr', lr])\n    if",
        ),
    )
    flags = ("--data-dir", small_mnist, "--log-dir", tmp_path, *FLAGS, "--epochs", 1)
    runs = [tmp_path / f"run-{number}" for number in (1, 2, 3)]
    for process in start_processes(2, *flags, program=program):
        finished = end(process)
        assert (finished.returncode, finished.stderr.split()) == (0, [str(run) for run in runs])
    assert [rows(run / "test.csv")[0]["lr"] for run in runs] == ["0.1", "0.2", "0.3"]


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


def test_a_lost_process_ends_the_other_and_one_goes_on(start_processes, small_mnist, go, tmp_path):
    flags = ("--data-dir", small_mnist, "--log-dir", tmp_path, *FLAGS, "--epochs", 100)
    first, second = start_processes(2, *flags)
    table = tmp_path / "run-1" / "test.csv"
    wait_for(lambda: table.exists() and len(rows(table)) >= 2)
    os.kill(second.pid, signal.SIGKILL)
    assert end(first).returncode == 1
    done = len(rows(table))
    assert done < 100
    resumed = go("main.py", *flags, "--resume", "--epochs", done + 1)
    assert resumed.returncode == 0 and resumed.stderr.count("\n") == 2
    assert "sums may be rounded differently on this machine" in resumed.stderr
    assert [row["epoch"] for row in rows(table)] == [str(n + 1) for n in range(done + 1)]


def test_a_run_of_another_model(start_processes, train, small_mnist, tmp_path):
    """The first process says so, in one line, and the other one ends, too."""
    train(tmp_path, "--epochs", 1)
    checkpoint = tmp_path / "run-1" / "checkpoint.pt"
    checkpoint.write_bytes(checkpoint.read_bytes().replace(b"LeNet", b"MyNet", 1))
    flags = ("--data-dir", small_mnist, "--log-dir", tmp_path, "--resume")
    first, second = map(end, start_processes(2, *flags))
    line = first.stderr.splitlines()[-1]
    assert first.returncode == 1 and line.startswith(f"main.py: error: {checkpoint} is of another")
    assert second.returncode == 1 and "is of another" not in second.stderr
    assert second.stderr.splitlines()[-1].startswith("RuntimeError: ")  # of the lost connection


@pytest.mark.parametrize("reason", ["missing", "broken"])
def test_torchrun_ends_when_the_first_process_cannot_go_on(small_mnist, tmp_path, reason):
    """With one line of ours, and not after the 30 seconds that it gives to other processes."""
    if reason == "broken":
        (tmp_path / "checkpoint.pt").write_text("hello")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--local-addr=127.0.0.1", "--nproc-per-node=2"]
    command += [HOME / "main.py", "--data-dir", small_mnist, "--resume", tmp_path]
    finished = subprocess.run(
        command, env=os.environ | OFFLINE, capture_output=True, check=False, text=True
    )
    assert finished.returncode == 1 and finished.stdout == ""
    lines = re.findall(r"^main\.py: error: .*", finished.stderr, re.MULTILINE)
    assert len(lines) == 1 and str(tmp_path) in lines[0]
    assert "forcefully exiting" not in finished.stderr  # torchrun's words for kill -9
