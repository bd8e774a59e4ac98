"""Several processes, as on a machine with several GPUs, but on its CPU.

They are forked, with the variables that torchrun would set for them. test_run_sh.py runs torchrun
itself.
"""

import os
import signal
import socket

import numpy as np
import pytest
from conftest import checksum, edit, end, error_line, output_of, read_params, rows, wait_for


@pytest.fixture
def start_with(start, flags):
    """A function that starts main.py in so many processes, with what torchrun would tell them."""

    def start_with(count, log_dir, *more, program="main.py"):
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = str(free.getsockname()[1])
        environ = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        return [
            start(program, *flags, log_dir, *more, environ=environ | {"RANK": str(rank)})
            for rank in range(count)
        ]

    return start_with


@pytest.fixture
def train_with(start_with):
    """Like `train` of conftest.py, in so many processes. Only the first one may print."""

    def train_with(*arguments, **options):
        first, *others = map(end, start_with(*arguments, **options))
        for process in others:
            assert (process.returncode, process.stdout, process.stderr) == (0, "", "")
        return output_of(first)

    return train_with


def test_three_processes_that_are_stopped_and_resumed(train_with, tmp_path):
    whole = train_with(3, tmp_path / "whole")
    assert float(rows(tmp_path / "whole" / "run-1" / "test.csv")[-1]["accuracy"]) > 50
    train_with(3, tmp_path / "stopped", "--epochs", 1)
    assert checksum(train_with(3, tmp_path / "stopped", "--resume")) == checksum(whole)


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
    assert np.abs(last["m.3.weight"] - first["m.3.weight"]).max() > 1e-3  # It learns.
    for name, array in read_params(two, 2).items():
        np.testing.assert_allclose(array, last[name], rtol=1e-6, atol=1e-9)
    losses = [[float(row["loss"]) for row in rows(run / "train.csv")] for run in (one, two)]
    np.testing.assert_allclose(*losses, rtol=1e-6)


def test_each_process_has_its_own_images_and_dropout(train_with, tmp_path):
    """No image comes twice in an epoch. All processes know the folder of the run."""
    save = "np.savez(record.folder / f'{RANK}-{batch_ix}', data=data, seed=torch.initial_seed())"
    program = edit(tmp_path, ("model.train()", f"{save}; model.train()"))
    train_with(2, tmp_path, "--epochs", 1, program=program)
    files = [np.load(file) for file in tmp_path.glob("run-1/*.npz")]
    assert len({int(file["seed"]) for file in files}) == 2
    assert [len(file["data"]) for file in files] == 2 * 12 * [25]
    assert len({image.tobytes() for file in files for image in file["data"]}) == 600


SAVE = "        record.save(epoch, states)\n"
DATA = '    name = "mnist" if name == "auto" else name\n'
LABELS = "    train.targets = train.targets[torch.randperm(600)]\n"


@pytest.mark.parametrize(
    "old, new, epochs",
    [
        # All processes stop early.
        (SAVE, f"{SAVE}        if accuracy > 1:\n            break\n", [1]),
        # The first one alone loads the data, and draws random numbers.
        (DATA, f"    assert RANK == 0\n{LABELS}{DATA}", [2]),
        # Two runs, as in a loop over the values of a flag.
        ("    main()\n    if", "    main()\n    main()\n    if", [2, 2]),
    ],
)
def test_changes_work_in_two_processes(old, new, epochs, train_with, tmp_path):
    train_with(2, tmp_path, "--epochs", 2, program=edit(tmp_path, (old, new)))
    tables = sorted(tmp_path.glob("run-*/test.csv"))
    assert [len(rows(table)) for table in tables] == epochs


def test_gradients_that_differ_between_processes(start_with, tmp_path):
    step = "        optimizer.step()\n"
    noise = "        for p in model.parameters():\n            p.grad += torch.randn_like(p)\n"
    program = edit(tmp_path, (step, noise + step))
    first, second = map(end, start_with(2, tmp_path, program=program))
    assert first.returncode == second.returncode == 1
    assert "RuntimeError: the processes train different networks" in second.stderr


def test_batch_too_small_for_two_processes(start_with, tmp_path):
    for process in start_with(2, tmp_path / "logs", "--batch-size", 3):
        assert "--batch-size: must be 2 or more for each process" in error_line(end(process), 2)
    assert not (tmp_path / "logs").exists()


def test_one_process_resumes_what_two_began(start_with, go, tmp_path):
    """One of the two is killed, which ends the other."""
    first, second = start_with(2, tmp_path, "--epochs", 100)
    table = tmp_path / "run-1" / "test.csv"
    wait_for(lambda: table.exists() and len(rows(table)) >= 2)
    os.kill(second.pid, signal.SIGKILL)
    assert end(first).returncode == 1
    done = len(rows(table))
    resumed = go("main.py", "--log-dir", tmp_path, "--resume", "--epochs", done + 1)
    assert resumed.returncode == 0 and resumed.stderr.count("\n") == 2
    assert "sums may be rounded differently on this machine" in resumed.stderr
    assert [row["epoch"] for row in rows(table)] == [str(n + 1) for n in range(done + 1)]


@pytest.mark.parametrize(
    "old, new, message",
    [
        (b"LeNet", b"MyNet", "is of another model or optimizer"),
        (b"PK", b"", "is missing or damaged"),  # the first two bytes
    ],
)
def test_a_run_that_cannot_be_resumed(old, new, message, start_with, train, tmp_path):
    """The first process says so in one line, and the other one ends, too."""
    train(tmp_path, "--epochs", 1)
    checkpoint = tmp_path / "run-1" / "checkpoint.pt"
    checkpoint.write_bytes(checkpoint.read_bytes().replace(old, new, 1))
    first, second = map(end, start_with(2, tmp_path, "--resume"))
    assert first.returncode == second.returncode == 1
    line = first.stderr.splitlines()[-1]
    assert line.startswith(f"main.py: error: {checkpoint} {message}")
    assert message not in second.stderr
    assert second.stderr.splitlines()[-1].startswith("RuntimeError: ")  # of the lost connection
