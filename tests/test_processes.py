"""Several processes, as on a machine with several GPUs, but on its CPU.

They are forked, with the variables that torchrun would set for them. test_run_sh.py runs torchrun
itself.
"""

import signal
import socket

import numpy as np
import pytest
from conftest import checksum, edit, end, error_line, output_of, read_params, rows


@pytest.fixture
def go_with(start, flags):
    """A function that runs main.py in so many processes, with what torchrun would tell them."""

    def go_with(count, log_dir, *more, program="main.py"):
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = str(free.getsockname()[1])
        environ = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        processes = [
            start(program, *flags, log_dir, *more, environ=environ | {"RANK": str(rank)})
            for rank in range(count)
        ]
        return [end(process) for process in processes]

    return go_with


@pytest.fixture
def train_with(go_with):
    """Like `train` of conftest.py, in so many processes. Only the first one may print."""

    def train_with(*arguments, **options):
        first, *others = go_with(*arguments, **options)
        for process in others:
            assert (process.returncode, process.stdout, process.stderr) == (0, "", "")
        return output_of(first)

    return train_with


@pytest.mark.parametrize("count", [2, 3])
def test_several_processes_that_are_stopped_and_resumed(count, train_with, tmp_path):
    whole = train_with(count, tmp_path / "whole")
    assert float(rows(tmp_path / "whole" / "run-1" / "test.csv")[-1]["accuracy"]) > 50
    train_with(count, tmp_path / "stopped", "--epochs", 1)
    assert checksum(train_with(count, tmp_path / "stopped", "--resume")) == checksum(whole)
    assert f"processes: {count}\n" in whole


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


def test_each_process_has_its_own_images_and_dropout(train_with, tmp_path):
    """No image comes twice in an epoch, even if `run` shuffles them before. All processes know the
    folder of the run, and begin with the same network."""
    shuffle = "    order = torch.randperm(600)\n"
    shuffle += "    train_set = [part[order] for part in train_set]\n"
    save = "np.savez(record.folder / f'{RANK}-{batch_ix}', data=data, seed=torch.initial_seed(),"
    save += " bias=model.m[3].bias.detach())"
    loader = "    train_loader = Loader("
    changes = (loader, shuffle + loader), ("model.train()", f"{save}; model.train()")
    train_with(2, tmp_path, "--epochs", 1, program=edit(tmp_path, *changes))
    files = [np.load(file) for file in tmp_path.glob("run-1/*.npz")]
    assert len({int(file["seed"]) for file in files}) == 2
    assert [len(file["data"]) for file in files] == 2 * 12 * [25]
    assert len({image.tobytes() for file in files for image in file["data"]}) == 600
    for batch in range(12):
        biases = [np.load(tmp_path / f"run-1/{rank}-{batch}.npz")["bias"] for rank in (0, 1)]
        assert np.array_equal(*biases)


SAVE = "        record.save(epoch)\n"
DATA = '    name = "mnist" if name == "auto" else name\n'
SAME = "        assert test_loss == in_first_process(lambda: test_loss)\n"
LABELS = "    train.targets = train.targets[torch.randperm(600)]\n"
LOOK = "        in_first_process(test, epoch, model, loss_function, train_loader)\n"


@pytest.mark.parametrize(
    "old, new, epochs",
    [
        # All processes have the same results, and stop early.
        (SAVE, f"{SAVE}{SAME}        if accuracy > 1:\n            break\n", [1]),
        # The first one alone loads the data, and draws random numbers.
        (DATA, f"    assert RANK == 0\n{LABELS}{DATA}", [2]),
        # The loss over training images, in the first one.
        (SAVE, LOOK + SAVE, [2]),
        # Two runs, as in a loop over the values of a flag.
        ("    main()\n    if", "    main()\n    main()\n    if", [2, 2]),
    ],
)
def test_changes_work_in_two_processes(old, new, epochs, train_with, tmp_path):
    train_with(2, tmp_path, "--epochs", 2, program=edit(tmp_path, (old, new)))
    tables = sorted(tmp_path.glob("run-*/test.csv"))
    assert [len(rows(table)) for table in tables] == epochs


def test_each_process_ends_with_one_message(go_with, tmp_path):
    for process in go_with(2, tmp_path, "--batch-size", 3):
        assert "--batch-size: must be 2 or more for each process" in error_line(process, 2)


def test_one_process_resumes_what_two_began(go_with, train, tmp_path):
    """The second one is killed after an epoch, which ends the first one, too."""
    kill = "        if epoch == RANK == 1:\n            signal.raise_signal(signal.SIGKILL)\n"
    first, second = go_with(2, tmp_path, program=edit(tmp_path, (SAVE, SAVE + kill)))
    assert (first.returncode, second.returncode) == (1, -signal.SIGKILL)
    assert "processes: 1\n" in train(tmp_path, "--resume")
    epochs = [row["epoch"] for row in rows(tmp_path / "run-1" / "test.csv")]
    assert epochs == ["1", "2", "3"]
