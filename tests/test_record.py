"""The files of a run, and that neither kills nor mistakes damage them.

KILLS=20 pytest tests/test_record.py     # kills runs before that many random file operations
"""

import hashlib
import json
import os
import pickle
import platform
import random
import resource
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import (
    FLAGS,
    HOME,
    Hostile,
    act_before,
    checksum,
    edit,
    end,
    error_line,
    printed,
    read_params,
    rows,
    wait_for,
)

import main

KILLS = int(os.environ.get("KILLS", "3"))


@pytest.fixture(scope="module")
def twin(train, tmp_path_factory):
    """The folder of a run of three epochs that was never stopped."""
    log_dir = tmp_path_factory.mktemp("twin")
    train(log_dir)
    return log_dir / "run-1"


@pytest.fixture
def copy(twin, tmp_path):
    """A log dir with a copy of the twin, which a test may change."""
    shutil.copytree(twin, tmp_path / "copy" / "run-1")
    return tmp_path / "copy"


@pytest.fixture(scope="module")
def flags(small_mnist):
    """The flags of the twin, except the log dir."""
    return ("--data-dir", small_mnist, *FLAGS, "--log-dir")


def contents(folder):
    """The bytes of all files in a folder, except locks."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def results(run):
    """The bytes of a run's tables and parameters, and of temporary files, if any are left."""
    suffixes = (".csv", ".pkl", ".tmp")
    return {name: content for name, content in contents(run).items() if name.endswith(suffixes)}


@pytest.fixture
def assert_resumes(go, flags, twin):
    """A function that resumes a stopped run, and asserts that it ends like the twin."""

    def assert_resumes(log_dir):
        is_begun = (log_dir / "run-1" / "checkpoint.pt").exists()
        finished = go("main.py", *flags, log_dir, "--resume")
        assert finished.returncode == 0, finished.stderr
        # A run that was stopped before its first checkpoint is started again.
        assert finished.stderr.startswith("main.py: resuming") == is_begun
        assert results(main.newest_run(log_dir)) == results(twin)

    return assert_resumes


# What it consists of


def test_files_of_a_run(twin):
    params = [f"params/epoch-0{epoch}.pkl" for epoch in range(4)]
    names = ["checkpoint.pt", "machine.json", "main-00.py", *params]
    names += ["settings.json", "test.csv", "train.csv"]
    assert sorted(contents(twin)) == names
    train, test = rows(twin / "train.csv"), rows(twin / "test.csv")
    assert [(int(row["step"]), int(row["epoch"]), int(row["batch"])) for row in train] == [
        (i + 1, i // 12 + 1, i % 12) for i in range(36)
    ]
    assert len({row["loss"] for row in train}) > 30  # Each row has a loss of its own.
    assert (twin / "test.csv").read_text().startswith("epoch,step,lr,loss,accuracy\n1,12,0.1,")
    assert [(row["epoch"], row["step"]) for row in test] == [("1", "12"), ("2", "24"), ("3", "36")]
    assert 60 < float(test[-1]["accuracy"]) <= 100


def test_the_program_and_the_machine(train, tmp_path):
    program = edit(tmp_path)
    train(tmp_path, "--epochs", 1, program=program)
    edit(tmp_path, ("INTERVAL = 100", "INTERVAL = 10"))
    train(tmp_path, "--resume", program=program)
    run = tmp_path / "run-1"
    assert (run / "main-00.py").read_text() == (HOME / "main.py").read_text()
    assert (run / "main-01.py").read_text() == program.read_text()
    machine = json.loads((run / "machine.json").read_text())
    assert (machine["python"], machine["torch"]) == (platform.python_version(), torch.__version__)
    assert (machine["threads"], machine["processes"]) == (1, 1)


def test_settings_are_the_flags(twin, small_mnist):
    settings = json.loads((twin / "settings.json").read_text())
    given = {"data_dir": str(small_mnist), "batch_size": 50, "epochs": 3}
    given |= {"log_dir": str(twin.parent), "dataset": "mnist"}
    assert settings == vars(main.parse_arguments([])) | given


def test_parameters_are_float32_arrays_under_the_models_names(twin):
    initial = main.LeNet().state_dict()
    for epoch in range(4):
        arrays = read_params(twin, epoch)
        assert type(arrays) is dict and list(arrays) == list(initial)
        for name, array in arrays.items():
            assert type(array) is np.ndarray and array.dtype == np.float32, name
            assert array.shape == initial[name].shape
        assert arrays["m.4.num_batches_tracked"] == epoch * 12


# Kills and signals

# The file, the operation on it, and the signal before it. A checkpoint is opened and then renamed,
# so the fourth operation is the renaming of the second checkpoint, that of epoch 1.
MOMENTS = [("epoch-00.tmp", 1), ("test.csv", 5), ("checkpoint.tmp", 4)]
MOMENTS += [("*", count) for count in random.Random(KILLS).sample(range(1, 45), KILLS)]
SIGNALS = [(*moment, signal.SIGKILL) for moment in MOMENTS]
SIGNALS += [("train.csv", 3, signal.SIGTERM), ("epoch-02.tmp", 1, signal.SIGINT)]


@pytest.mark.parametrize("name, count, number", SIGNALS)
def test_stopped_and_resumed(name, count, number, go, flags, assert_resumes, tmp_path):
    prepare = partial(act_before, tmp_path, name, count, signal.raise_signal, number)
    finished = go("main.py", *flags, tmp_path, prepare=prepare)
    line = "main.py: interrupted; --resume continues after the last finished epoch\n"
    expected = (-number, "") if number == signal.SIGKILL else (130, line)
    assert (finished.returncode, finished.stderr) == expected
    assert_resumes(tmp_path)


# The disk


def watch_the_disk(folder):
    """Makes the program fail if it renames what is not on the disk.

    Before a checkpoint takes its place, the tables have to be on the disk, too.
    """
    synced = {}
    fsync = os.fsync

    def watched_fsync(descriptor):
        fsync(descriptor)
        status = os.fstat(descriptor)
        synced[status.st_ino] = status.st_size

    def hook(event, details):
        if event == "os.rename":
            files = [details[0]]
            if Path(details[0]).name == "checkpoint.tmp":
                files += folder.glob("run-*/*.csv")
            for status in map(os.stat, files):
                if synced.get(status.st_ino, 0) != status.st_size:
                    raise RuntimeError(f"{details[0]} is renamed too early")

    os.fsync = watched_fsync
    sys.addaudithook(hook)


def test_order_of_what_is_done_on_the_disk(train, twin, tmp_path):
    prepare = partial(watch_the_disk, tmp_path)
    train(tmp_path, "--epochs", 1, prepare=prepare)
    train(tmp_path, "--resume", prepare=prepare)
    assert results(tmp_path / "run-1") == results(twin)


def test_rows_are_written_with_each_printed_loss(go, flags, tmp_path):
    # The table is opened twice at the start, then at batch 100 and at the end of the epoch.
    prepare = partial(act_before, tmp_path, "train.csv", 4, signal.raise_signal, signal.SIGKILL)
    killed = go("main.py", *flags, tmp_path, "--batch-size", 4, prepare=prepare)
    assert "[Epoch  1, batch 100]" in killed.stdout and "Average" in killed.stdout
    table = rows(tmp_path / "run-1" / "train.csv")
    assert [int(row["step"]) for row in table] == [*range(1, 102)]


def limit_files():
    """Makes writing fail, as on a full disk, at the second checkpoint, which has the momentum."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (800_000, 800_000))  # bytes in a file


def test_disk_full(go, flags, assert_resumes, tmp_path):
    finished = go("main.py", *flags, tmp_path, prepare=limit_files)
    assert error_line(finished) == "main.py: error: --log-dir: File too large"
    assert_resumes(tmp_path)


def test_a_log_dir_that_is_a_file(go, flags, tmp_path):
    (tmp_path / "file").write_text("mine")
    line = error_line(go("main.py", *flags, tmp_path / "file"))
    assert line == f"main.py: error: {tmp_path}/file/run-1: Not a directory"
    assert (tmp_path / "file").read_text() == "mine"


# --resume


def test_given_flags_win_then_recorded_ones_then_defaults(go, copy, tmp_path):
    run = copy / "run-1"
    other = ("--epochs", 4, "--lr", 0.05, "--momentum", 0, "--log-dir", tmp_path / "elsewhere")
    finished = go("main.py", "--resume", run, *other)
    assert finished.returncode == 0, finished.stderr
    settings = json.loads((run / "settings.json").read_text())
    assert (settings["epochs"], settings["lr"], settings["batch_size"]) == (4, 0.05, 50)
    assert settings["dropout"] == 0.25
    assert [row["lr"] for row in rows(run / "test.csv")] == 3 * ["0.1"] + ["0.05"]
    assert not (tmp_path / "elsewhere").exists()
    checkpoint = torch.load(run / "checkpoint.pt", weights_only=True)
    assert checkpoint["states"]["optimizer"]["param_groups"][0]["momentum"] == 0


def test_the_newest_run_that_has_a_checkpoint(go, copy, train):
    for number in (2, 9, 10):
        shutil.copytree(copy / "run-1", copy / f"run-{number}")
    (copy / "run-11").mkdir()
    (copy / "run-old").mkdir()
    finished = go("main.py", "--log-dir", copy, "--resume", "--epochs", 4)
    reason = "later runs were stopped before their first checkpoint"
    assert finished.stderr == f"main.py: resuming {copy}/run-10 after epoch 3: {reason}\n"
    assert f"the record is in {copy}/run-10 (" in finished.stdout
    assert "run-12" in train(copy)


def test_a_finished_run_stays_as_it_is(copy, train):
    def files():
        return {path: path.stat().st_mtime_ns for path in copy.rglob("*") if path.name != ".lock"}

    before = contents(copy), files()
    output = train(copy, "--resume", "--lr", 0.01)
    assert (contents(copy), files()) == before
    names = ["train.csv", "test.csv", *(f"params/epoch-0{epoch}.pkl" for epoch in range(4))]
    content = b"".join((copy / "run-1" / name).read_bytes() for name in names)
    assert checksum(output) == hashlib.sha256(content).hexdigest()[:16]


# What becomes of a file's content.
SPOILT = {
    "settings.json": lambda content: content[1:],
    "train.csv": lambda content: content.replace(b",0.1,", b",0.2,"),
    "checkpoint.pt": lambda content: pickle.dumps(Hostile(Path("touched")), protocol=2),
}


@pytest.mark.parametrize("name", SPOILT)
def test_damaged_runs_are_not_resumed(name, go, copy, tmp_path):
    file = copy / "run-1" / name
    file.write_bytes(SPOILT[name](file.read_bytes()))
    before = contents(copy)
    finished = go("main.py", "--log-dir", copy, "--resume", "--epochs", 4, cwd=tmp_path)
    advice = "restore it, or start a new run without --resume"
    assert f"error: {file} is missing or damaged: {advice} (" in error_line(finished)
    assert contents(copy) == before and not (tmp_path / "touched").exists()


# Two runs at once


def test_a_run_that_is_still_going_on_cannot_be_resumed(start, go, flags, twin, tmp_path):
    pause = (signal.raise_signal, signal.SIGSTOP)
    prepare = partial(act_before, tmp_path, "epoch-02.tmp", 1, *pause)
    first = start("main.py", *flags, tmp_path, prepare=prepare)
    table = tmp_path / "run-1" / "test.csv"
    wait_for(lambda: table.exists() and len(rows(table)) == 2)
    assert "[Epoch  2] Average" in printed(first)  # Each line is there at once.
    (tmp_path / "run-1" / "checkpoint.pt").write_text("nothing to be read without the lock")
    before = contents(tmp_path)
    line = error_line(go("main.py", *flags, tmp_path, "--resume"))
    assert f"{tmp_path}/run-1/.lock is locked" in line
    assert contents(tmp_path) == before
    os.kill(first.pid, signal.SIGCONT)
    assert end(first).returncode == 0
    assert results(tmp_path / "run-1") == results(twin)


def test_two_starts_at_once_get_two_folders(train, tmp_path):
    """The folder is there right before this run would make it."""
    folder = tmp_path / "run-1"
    prepare = partial(act_before, tmp_path, "run-1", 1, folder.mkdir)
    output = train(tmp_path, "--epochs", 1, prepare=prepare)
    assert f"the record is in {tmp_path}/run-2 (" in output
    assert list(folder.iterdir()) == []


def test_main_leaves_no_lock_behind(small_mnist, tmp_path, monkeypatch):
    """After an interruption or an error, for example in a notebook, where the process goes on."""
    flags = ["--data-dir", str(small_mnist), "--log-dir", str(tmp_path), *map(str, FLAGS)]
    with monkeypatch.context() as patch:
        patch.setattr(main, "test", lambda *arguments: signal.default_int_handler(2, None))
        with pytest.raises(SystemExit, match="130"):
            main.main(flags)
    checkpoint = tmp_path / "run-1" / "checkpoint.pt"
    content = checkpoint.read_bytes()
    checkpoint.write_bytes(content[:1000])
    with pytest.raises(SystemExit, match="missing or damaged") as damaged:
        main.main([*flags, "--resume"])
    assert damaged.tb is not None  # It keeps all objects alive, as a notebook does.
    checkpoint.write_bytes(content)
    main.main([*flags, "--resume"])


# Standard output


def close_output():
    os.close(1)
    sys.stdout = None


def be_a_notebook():
    """Its output has no `reconfigure`."""
    sys.stdout = SimpleNamespace(write=lambda text: os.write(1, text.encode()), flush=int)


@pytest.mark.parametrize(
    "options", [{"prepare": close_output}, {"prepare": be_a_notebook}, {"environ": {"RANK": "1"}}]
)
def test_unusual_surroundings(options, train, twin, tmp_path):
    output = train(tmp_path, **options)
    assert results(tmp_path / "run-1") == results(twin)
    assert ("Done in" in output) == (options.get("prepare") != close_output)


def test_output_into_a_pipe_that_is_closed(flags, tmp_path):
    command = f'"{sys.executable}" "$@" | head -n 3; echo ${{PIPESTATUS[0]}}'
    arguments = [str(argument) for argument in (HOME / "main.py", *flags, tmp_path)]
    shell = ["bash", "-c", command, "bash", *arguments]
    finished = subprocess.run(shell, capture_output=True, check=False, text=True)
    *lines, status = finished.stdout.splitlines()
    assert lines[0] == "Training LeNet on MNIST" and len(lines) == 3
    assert (status, finished.stderr) == ("1", "")
