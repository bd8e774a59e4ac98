"""The record of a run: its form, and that neither kills nor mistakes damage it.

KILLS=20 pytest tests/test_record.py     # kills that many runs at random moments
"""

import errno
import fcntl
import hashlib
import json
import os
import platform
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (
    FLAGS,
    HOME,
    Hostile,
    checksum,
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
    """The log dir of a run of three epochs that was never stopped, and its checksum."""
    log_dir = tmp_path_factory.mktemp("twin")
    return log_dir, checksum(train(log_dir))


@pytest.fixture
def copy(twin, tmp_path):
    """A copy of the twin's log dir, to be spoilt."""
    return Path(shutil.copytree(twin[0], tmp_path / "copy"))


@pytest.fixture(scope="module")
def flags(small_mnist):
    """The flags of the twin, but for the log dir."""
    return ("--data-dir", small_mnist, *FLAGS, "--log-dir")


def act_before(folder, name, count, action):
    """Has this process send a signal, `action`, to itself before a file operation in a folder.

    It is the operation with this count, from 1, of those on files of this name (`*`: of any).
    For `prepare`.
    """
    seen = []

    def hook(event, details):
        if event not in ("open", "os.rename", "os.mkdir", "os.truncate"):
            return
        if not isinstance(details[0], (str, os.PathLike)):
            return
        path = Path(details[0])
        if path.is_relative_to(folder) and path.name != ".lock" and name in (path.name, "*"):
            seen.append(path)
            if len(seen) == count:
                os.kill(os.getpid(), action)

    sys.addaudithook(hook)


def contents(folder):
    """The bytes of all files in a folder, but for the lock."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def assert_same(log_dir, twin):
    """Asserts that two runs have written the same tables and parameters, byte for byte."""
    ours, theirs = contents(log_dir / "run-1"), contents(twin[0] / "run-1")
    results = {name for name in theirs if name.endswith((".csv", ".pkl"))}
    assert results == {name for name in ours if name.endswith((".csv", ".pkl", ".tmp"))}
    assert all(ours[name] == theirs[name] for name in results)


# Its form


def test_files_of_a_run(twin):
    run = twin[0] / "run-1"
    params = [f"params/epoch-0{epoch}.pkl" for epoch in range(4)]
    names = ["checkpoint.pt", "machine.json", "main-00.py", *params]
    names += ["settings.json", "test.csv", "train.csv"]
    assert sorted(contents(run)) == names
    train, test = rows(run / "train.csv"), rows(run / "test.csv")
    assert [(int(row["step"]), int(row["epoch"]), int(row["batch"])) for row in train] == [
        (i + 1, i // 12 + 1, i % 12) for i in range(36)
    ]
    assert len({row["loss"] for row in train}) > 30  # one of its own in each row
    assert (run / "test.csv").read_text().startswith("epoch,step,lr,loss,accuracy\n1,12,0.1,")
    assert [(row["epoch"], row["step"]) for row in test] == [("1", "12"), ("2", "24"), ("3", "36")]
    assert 60 < float(test[-1]["accuracy"]) <= 100
    content = b"".join((run / name).read_bytes() for name in ["train.csv", "test.csv", *params])
    assert twin[1] == hashlib.sha256(content).hexdigest()[:16]


def test_the_program_and_the_machine(train, tmp_path):
    edited = tmp_path / "main.py"
    text = (HOME / "main.py").read_text()
    edited.write_text(text)
    train(tmp_path, "--epochs", 1, program=edited)
    edited.write_text(text + "# changed\n")
    train(tmp_path, "--resume", program=edited)
    run = tmp_path / "run-1"
    assert sorted(path.name for path in run.glob("main-*")) == ["main-00.py", "main-01.py"]
    assert (run / "main-00.py").read_text() == text
    assert (run / "main-01.py").read_text() == text + "# changed\n"
    machine = json.loads((run / "machine.json").read_text())
    assert (machine["python"], machine["torch"]) == (platform.python_version(), torch.__version__)
    assert (machine["threads"], machine["processes"]) == (1, 1)


def test_settings_are_the_flags(twin, small_mnist):
    settings = json.loads((twin[0] / "run-1" / "settings.json").read_text())
    given = {"data_dir": str(small_mnist), "batch_size": 50, "epochs": 3, "log_dir": str(twin[0])}
    assert settings == vars(main.parse_arguments([])) | given | {"dataset": "mnist"}


def test_parameters_are_float32_arrays_under_the_models_names(twin):
    initial = main.LeNet().state_dict()
    for epoch in range(4):
        arrays = read_params(twin[0] / "run-1", epoch)
        assert type(arrays) is dict and list(arrays) == list(initial)
        for name, array in arrays.items():
            assert type(array) is np.ndarray and array.dtype == np.float32, name
            assert array.shape == initial[name].shape
            if name.endswith("num_batches_tracked"):
                assert array == epoch * 12
    last = torch.load(twin[0] / "run-1" / "checkpoint.pt", weights_only=True)
    assert np.array_equal(last["states"]["model"]["m.3.weight"].numpy(), arrays["m.3.weight"])


# Kills


def test_killed_at_random_moments_and_resumed(start, train, flags, twin, tmp_path):
    started = time.monotonic()
    assert checksum(train(tmp_path / "again")) == twin[1]
    seconds = time.monotonic() - started
    moments = random.Random(KILLS)
    killed = 0
    for number in range(KILLS):
        process = start("main.py", *flags, tmp_path / f"{number}")
        process.join(moments.uniform(0, seconds))
        process.kill()
        killed += end(process).returncode == -signal.SIGKILL
        resume_to_the_end(train, tmp_path / f"{number}", twin)
    assert killed > 0


def resume_to_the_end(train, log_dir, twin):
    """Resumes a run, or starts one where the kill came too early for it to be found."""
    begun = main.newest_run(log_dir) is not None
    if begun:
        assert checksum(train(log_dir, "--resume")) == twin[1]
        assert_same(log_dir, twin)
    return begun


MOMENTS = [("epoch-00.tmp", 1), ("train.csv", 3), ("test.csv", 5), ("epoch-02.tmp", 1)]
MOMENTS += [("epoch-02.tmp", 2), ("checkpoint.tmp", 4), ("checkpoint.tmp", 6)]
MOMENTS += [("*", count) for count in random.Random(KILLS).sample(range(1, 45), KILLS)]


@pytest.mark.parametrize("name, count", MOMENTS)
def test_killed_before_a_file_operation(name, count, go, flags, train, twin, tmp_path):
    prepare = partial(act_before, tmp_path, name, count, signal.SIGKILL)
    assert go("main.py", *flags, tmp_path, prepare=prepare).returncode == -signal.SIGKILL
    assert resume_to_the_end(train, tmp_path, twin) or name in ("epoch-00.tmp", "*")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("moment", ["while it trains", "while it saves"])
def test_a_signal_stops_the_run_with_one_line(number, moment, start, flags, train, twin, tmp_path):
    prepare = None
    if moment == "while it saves":
        prepare = partial(act_before, tmp_path, "epoch-02.tmp", 1, number)
    process = start("main.py", *flags, tmp_path, prepare=prepare)
    if moment == "while it trains":
        wait_for(lambda: "[Epoch  1]" in printed(process))
        os.kill(process.pid, number)
    finished = end(process)
    assert finished.returncode == 130
    assert finished.stderr.startswith("main.py: interrupted; --resume continues")
    assert finished.stderr.count("\n") == 1
    assert resume_to_the_end(train, tmp_path, twin)


# The disk


def watch_the_disk(folder):
    """Has the program fail if it renames what is not on the disk, or reads what is not locked.

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
        if event == "open" and str(details[0]).endswith("checkpoint.pt"):
            with open(folder / "run-1" / ".lock") as lock, suppress(BlockingIOError):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                raise RuntimeError("the checkpoint is read without the lock")

    os.fsync = watched_fsync
    sys.addaudithook(hook)


def test_order_of_what_is_done_on_the_disk(train, twin, tmp_path):
    prepare = partial(watch_the_disk, tmp_path)
    train(tmp_path, "--epochs", 1, prepare=prepare)
    assert checksum(train(tmp_path, "--resume", prepare=prepare)) == twin[1]


def test_rows_are_written_within_an_epoch(go, train, flags, tmp_path):
    """With each loss that is printed."""
    # The table is opened twice at the start, then at batch 100 and at the end of the epoch.
    prepare = partial(act_before, tmp_path, "train.csv", 4, signal.SIGKILL)
    killed = go("main.py", *flags, tmp_path, "--batch-size", 4, prepare=prepare)
    assert "[Epoch  1, batch 100]" in killed.stdout and "Average" in killed.stdout
    table = tmp_path / "run-1" / "train.csv"
    assert [int(row["step"]) for row in rows(table)] == [*range(1, 102)]
    train(tmp_path, "--resume", "--epochs", 1, "--batch-size", 4)
    assert [int(row["step"]) for row in rows(table)] == [*range(1, 151)]


def limit_files(size):
    """Has writing fail, as on a full disk, at so many bytes in a file."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


@pytest.mark.parametrize("limit", [800_000, 100_000])
def test_disk_full(limit, go, flags, train, twin, tmp_path):
    """Full at the second checkpoint, which has the momentum, or at the first params."""
    finished = go("main.py", *flags, tmp_path, prepare=partial(limit_files, limit))
    assert error_line(finished) == "main.py: error: --log-dir: File too large"
    assert resume_to_the_end(train, tmp_path, twin) == (limit == 800_000)


def have_no_locks():
    """As a file system without locks answers."""

    def flock(file, operation):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    fcntl.flock = flock


@pytest.mark.parametrize("place", ["file", "file/below", "/proc/nowhere", "no locks"])
def test_log_dirs_that_will_not_do(place, go, flags, tmp_path):
    (tmp_path / "file").write_text("mine")
    prepare = have_no_locks if place == "no locks" else None
    line = error_line(go("main.py", *flags, tmp_path / place, prepare=prepare))
    named = "--log-dir: No locks available" if place == "no locks" else place
    assert named in line
    assert (tmp_path / "file").read_text() == "mine"


# --resume


def test_resume_starts_a_run_where_there_is_none(go, flags, twin, tmp_path):
    finished = go("main.py", *flags, tmp_path, "--resume")
    assert finished.stderr == f"main.py: no run to resume in {tmp_path}: starting one\n"
    assert checksum(finished.stdout) == twin[1]


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
    assert "   lr:  0.05\n" in go("main.py", "--resume", run).stdout


def test_the_newest_run_that_has_a_checkpoint(go, copy, train):
    for number in (2, 9, 10):
        shutil.copytree(copy / "run-1", copy / f"run-{number}")
    finished = go("main.py", "--log-dir", copy, "--resume")
    assert finished.stderr == f"main.py: resuming {copy}/run-10 after epoch 3\n"
    (copy / "run-11").mkdir()
    (copy / "run-old").mkdir()
    finished = go("main.py", "--log-dir", copy, "--resume", "--epochs", 4)
    reason = "since run-11 was stopped before its first checkpoint"
    assert finished.stderr == f"main.py: resuming {copy}/run-10 after epoch 3, {reason}\n"
    assert f"the record is in {copy}/run-10 (" in finished.stdout
    assert "run-12" in train(copy)


def test_a_finished_run_stays_as_it_is(copy, train, twin):
    def files():
        return {path: path.stat().st_mtime_ns for path in copy.rglob("*") if path.name != ".lock"}

    before = contents(copy), files()
    assert checksum(train(copy, "--resume", "--lr", 0.01)) == twin[1]
    assert (contents(copy), files()) == before


@pytest.mark.parametrize("schedule, epochs", [("cosine", 1), ("step", 2)])
def test_resume_under_a_schedule(schedule, epochs, train, go, flags, tmp_path):
    expected = checksum(train(tmp_path / "whole", "--schedule", schedule))
    prepare = partial(act_before, tmp_path, f"epoch-0{epochs + 1}.tmp", 1, signal.SIGKILL)
    go("main.py", *flags, tmp_path / "stopped", "--schedule", schedule, prepare=prepare)
    assert checksum(train(tmp_path / "stopped", "--resume")) == expected


def change(name, old, new):
    """A function that changes bytes of a file in a run."""

    def change(run):
        content = (run / name).read_bytes()
        assert old in content
        (run / name).write_bytes(content.replace(old, new, 1))

    return change


DAMAGED = "is missing or damaged: restore it, or start a new run without --resume"
OTHER = "is of another model or optimizer: start a new run without --resume"
# By what is wrong: how it comes about (some as spreadsheets save a table), the file that the line
# names, and its message.
SPOILT = {
    "broken settings": (change("settings.json", b"{", b""), "settings.json", DAMAGED),
    "hostile checkpoint": (
        lambda run: torch.save({"tables": Hostile(Path("touched"))}, run / "checkpoint.pt"),
        "checkpoint.pt",
        DAMAGED,
    ),
    "a row lost": (change("train.csv", b"2,1,1,0.1,", b"1,0.1,"), "train.csv", DAMAGED),
    "other ends of lines": (change("test.csv", b"\n", b"\r\n"), "test.csv", DAMAGED),
    "a byte order mark": (change("train.csv", b"step", b"\xef\xbb\xbfstep"), "train.csv", DAMAGED),
    "other numbers": (change("train.csv", b"0.1,", b"0.10000,"), "train.csv", DAMAGED),
    "another model": (change("checkpoint.pt", b"LeNet", b"MyNet"), "checkpoint.pt", OTHER),
}


@pytest.mark.parametrize("how", SPOILT)
def test_runs_that_cannot_be_resumed(how, go, copy, tmp_path):
    run = copy / "run-1"
    spoil, name, message = SPOILT[how]
    spoil(run)
    before = contents(copy)
    finished = go("main.py", "--log-dir", copy, "--resume", run, "--epochs", 4, cwd=tmp_path)
    line = finished.stderr.splitlines()[-1]
    assert finished.returncode == 1 and line.startswith(f"main.py: error: {run / name} {message}")
    # What fits no model is found later.
    assert len(finished.stderr.splitlines()) == (2 if message == OTHER else 1)
    assert contents(copy) == before and not (tmp_path / "touched").exists()


# Two runs at once


def test_a_run_that_goes_on_cannot_be_resumed(start, go, flags, twin, tmp_path):
    prepare = partial(act_before, tmp_path, "epoch-02.tmp", 1, signal.SIGSTOP)
    first = start("main.py", *flags, tmp_path, prepare=prepare)
    table = tmp_path / "run-1" / "test.csv"
    wait_for(lambda: table.exists() and len(rows(table)) == 2)
    assert "[Epoch  2] Average" in printed(first)  # Each line is there at once.
    before = contents(tmp_path)
    line = error_line(go("main.py", *flags, tmp_path, "--resume"))
    assert f"{tmp_path}/run-1/.lock is locked" in line
    assert contents(tmp_path) == before
    os.kill(first.pid, signal.SIGCONT)
    assert checksum(end(first).stdout) == twin[1]


def be_overtaken(folder):
    """Has another start make the folder of a run just before this one does."""

    def hook(event, details):
        if event == "os.mkdir" and details[0] == str(folder) and not folder.exists():
            overtaken.append(folder)
            folder.mkdir()

    overtaken = []
    sys.addaudithook(lambda *event: None if overtaken else hook(*event))


def test_two_starts_at_once_get_two_folders(train, tmp_path):
    output = train(tmp_path, "--epochs", 1, prepare=partial(be_overtaken, tmp_path / "run-1"))
    assert f"the record is in {tmp_path}/run-2 (" in output
    assert list((tmp_path / "run-1").iterdir()) == []


def test_main_leaves_no_lock_behind(small_mnist, tmp_path, capsys, monkeypatch):
    """After an interruption or an error in a notebook, say, where the process goes on."""
    flags = ["--data-dir", str(small_mnist), "--log-dir", str(tmp_path), *map(str, FLAGS)]
    with monkeypatch.context() as patch:
        patch.setattr(main, "test", lambda *arguments: signal.default_int_handler(2, None))
        with pytest.raises(SystemExit) as interrupted:
            main.main(flags)
    assert interrupted.value.code == 130
    checkpoint = tmp_path / "run-1" / "checkpoint.pt"
    content = checkpoint.read_bytes()
    checkpoint.write_bytes(content[:1000])
    with pytest.raises(SystemExit, match="missing or damaged") as damaged:
        main.main([*flags, "--resume"])
    assert damaged.tb is not None  # It keeps all objects alive, as a notebook does.
    checkpoint.write_bytes(content)
    main.main([*flags, "--resume"])
    assert "Done in" in capsys.readouterr().out


# Standard output


def close_output():
    os.close(1)
    sys.stdout = None


class NotebooksOutput:
    """It has no `reconfigure`."""

    def write(self, text):
        os.write(1, text.encode())

    def flush(self):
        pass


def be_a_notebook():
    sys.stdout = NotebooksOutput()


@pytest.mark.parametrize(
    "options", [{"prepare": close_output}, {"prepare": be_a_notebook}, {"environ": {"RANK": "1"}}]
)
def test_unusual_surroundings(options, train, twin, tmp_path):
    output = train(tmp_path, **options)
    assert_same(tmp_path, twin)
    assert options.get("prepare") == close_output or checksum(output) == twin[1]


def test_output_into_a_pipe_that_is_closed(flags, tmp_path):
    command = f'"{sys.executable}" "$@" | head -n 3; echo ${{PIPESTATUS[0]}}'
    arguments = [str(argument) for argument in (HOME / "main.py", *flags, tmp_path)]
    shell = ["bash", "-c", command, "bash", *arguments]
    finished = subprocess.run(shell, capture_output=True, check=False, text=True)
    *lines, status = finished.stdout.splitlines()
    assert lines[0] == "Training LeNet on MNIST" and len(lines) == 3
    assert (status, finished.stderr) == ("1", "")
