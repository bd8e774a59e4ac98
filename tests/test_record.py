"""The record of a run: its form, and that neither kills nor mistakes damage it.

Most runs here are forked from a process that has done the imports: that saves four
seconds a start, and lets a process stop itself at an exact file operation.
KILLS=20 pytest tests/test_record.py     # kills that many runs at random moments
"""

import csv
import multiprocessing
import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import HOME, one_line

import main

KILLS = int(os.environ.get("KILLS", "5"))
EPOCHS = 6
NAMES = ("train.csv", "test.csv", "params", "checkpoint.pt")


def forked(arguments, output, before, action, limit):
    """Is `python main.py ...` in a forked process, which does `action` to itself.

    `before` says when: as the file operation with that number (from 1) in the log dir
    is about to happen, or that on the file with that name. limit: bytes in a file.
    """
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(output + name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    if limit:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    log_dir, count = arguments[arguments.index("--log-dir") + 1], 0
    operations = ("open", "os.rename", "os.mkdir", "os.truncate")

    def hook(event, details):
        nonlocal count, before
        if event not in operations or not isinstance(details[0], (str, os.PathLike)):
            return
        path = os.fspath(details[0])
        if not path.startswith(log_dir) or os.path.basename(path).startswith(".lock"):
            return
        count += 1
        if before in (count, os.path.basename(path)):
            before = None
            if action == "rmtree":
                shutil.rmtree(log_dir)
            else:
                os.kill(os.getpid(), action)

    if before:
        sys.addaudithook(hook)
    main.main(arguments)


@pytest.fixture(scope="module")
def start(small_mnist, tmp_path_factory):
    """A function that starts `python main.py` on the small data, as Popen would."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["test_record"])
    output, number = tmp_path_factory.mktemp("output"), 0

    def start(log_dir, *flags, before=None, action=signal.SIGKILL, limit=None):
        nonlocal number
        number += 1
        arguments = [*map(str, small_flags(small_mnist, log_dir, *flags))]
        where = f"{output}/{number}."
        for name in ("out", "err"):  # it may be killed before it opens them
            Path(where + name).touch()
        options = (arguments, where, before, action, limit)
        with pytest.MonkeyPatch.context() as patch:  # for the fork server's own start
            patch.setenv("PYTHONPATH", str(HOME / "tests"))
            process = context.Process(target=forked, args=options)
            process.start()
        process.where = where
        return process

    return start


@pytest.fixture(scope="module")
def go(start):
    """A function that runs `python main.py` on the small data to its end."""

    def go(*arguments, **options):
        return end(start(*arguments, **options))

    return go


def end(process):
    process.join(100)
    if process.is_alive():
        process.kill()
        pytest.fail("the run does not end")
    texts = {f"std{k}": Path(process.where + k).read_text() for k in ("out", "err")}
    return SimpleNamespace(returncode=process.exitcode, **texts)


def small_flags(data_dir, log_dir, *flags):
    small = ("--data-dir", data_dir, "--batch-size", 50, "--epochs", EPOCHS)
    return *small, "--log-dir", log_dir, *flags


def record(log_dir, names=NAMES[:3]):
    """The bytes of all files of a record; by default but for the checkpoint's."""
    paths = [path for name in names for path in (log_dir / name, *log_dir.glob("*/*"))]
    paths = [path for path in paths if path.is_file()]
    paths = [path for path in paths if path.relative_to(log_dir).parts[0] in names]
    return {str(path.relative_to(log_dir)): path.read_bytes() for path in paths}


def assert_same(log_dir, twin):
    """Asserts that two records are equal byte for byte, and says which file is not."""
    ours, theirs = record(log_dir), record(twin)
    assert sorted(ours) == sorted(theirs)
    assert [name for name in ours if ours[name] != theirs[name]] == []


def finish(go, log_dir, twin, *flags):
    """Resumes a run to its end; asserts that its record is that of the twin."""
    finished = go(log_dir, "--resume", *flags)
    assert finished.returncode == 0, finished.stderr
    assert_same(log_dir, twin)
    return finished


def rows(file):
    with open(file, newline="") as lines:
        return list(csv.DictReader(lines))


def wait_for(condition):
    for _ in range(6000):
        if condition():
            return
        time.sleep(0.01)
    pytest.fail("it never happened")


@pytest.fixture(scope="module")
def twin(go, tmp_path_factory):
    """The log dir of a run that was never stopped."""
    log_dir = tmp_path_factory.mktemp("twin") / "logs"
    finished = go(log_dir)
    assert (finished.returncode, finished.stderr) == (0, "")
    return log_dir


@pytest.fixture
def copy(twin, tmp_path):
    """A copy of the twin's log dir, to be spoilt."""
    return Path(shutil.copytree(twin, tmp_path / "copy"))


@pytest.fixture(scope="module")
def half(start, twin, tmp_path_factory):
    """A log dir whose run was killed after the third epoch, before its checkpoint."""
    log_dir = tmp_path_factory.mktemp("half") / "logs"
    assert end(start(log_dir, before="epoch-03.pkl")).returncode == -signal.SIGKILL
    return log_dir


@pytest.fixture
def stopped(half, tmp_path):
    """A copy of `half`."""
    return Path(shutil.copytree(half, tmp_path / "stopped"))


# Its form


def test_tables_have_their_columns_and_all_rows(twin):
    lines = (twin / "train.csv").read_text().split("\n")
    assert lines[0] == "step,epoch,batch,lr,loss" and lines[-1] == ""
    train = rows(twin / "train.csv")
    assert len(lines) == len(train) + 2 == EPOCHS * 12 + 2
    for i, row in enumerate(train):
        place = (int(row["step"]), int(row["epoch"]), int(row["batch"]))
        assert place == (i + 1, i // 12 + 1, i % 12)
        assert float(row["lr"]) == 0.1 and 0 < float(row["loss"]) < 10
    assert len({row["loss"] for row in train}) > 60  # one of its own in each row

    lines = (twin / "test.csv").read_text().split("\n")
    assert lines[0] == "epoch,step,lr,loss,accuracy" and lines[-1] == ""
    assert len(lines) == EPOCHS + 2
    for epoch, row in enumerate(rows(twin / "test.csv"), 1):
        assert (int(row["epoch"]), int(row["step"])) == (epoch, epoch * 12)
        assert float(row["lr"]) == 0.1 and 0 < float(row["loss"]) < 10
        assert float(row["accuracy"]) * 2 == int(float(row["accuracy"]) * 2)  # of 200
    assert 60 < float(row["accuracy"]) <= 100


def test_log_dir_holds_the_four_names_and_nothing_else(twin):
    assert sorted(path.name for path in twin.glob("[!.]*")) == sorted(NAMES)
    expected = [f"epoch-{epoch:02}.pkl" for epoch in range(EPOCHS + 1)]
    assert sorted(path.name for path in (twin / "params").iterdir()) == expected


def test_parameters_are_float32_arrays_under_the_models_names(twin):
    torch.manual_seed(1)
    initial = main.LeNet().state_dict()
    for epoch in range(EPOCHS + 1):
        content = (twin / "params" / f"epoch-{epoch:02}.pkl").read_bytes()
        arrays = pickle.loads(content)
        assert type(arrays) is dict and list(arrays) == list(initial)
        for name, array in arrays.items():
            assert type(array) is np.ndarray and array.dtype == np.float32, name
            assert array.shape == initial[name].shape
            if name.endswith("num_batches_tracked"):
                assert array == epoch * 12
            equal = np.array_equal(array, initial[name].numpy())
            assert equal == (epoch == 0) or name == "m.0.0.bias" or name == "m.1.0.bias"
    assert equal is False  # the last layer's bias, after training


def test_checkpoint_is_read_without_running_code(twin):
    checkpoint = torch.load(twin / "checkpoint.pt", weights_only=True)
    assert isinstance(checkpoint, dict)


# Kills


def test_killed_at_random_moments_and_resumed(start, go, twin, tmp_path):
    seconds = time.monotonic()
    assert go(tmp_path / "again").returncode == 0
    seconds = time.monotonic() - seconds
    assert_same(tmp_path / "again", twin)
    moments, killed = random.Random(KILLS), 0
    for number in range(KILLS):
        process = start(tmp_path / f"{number}")
        process.join(moments.uniform(0, seconds))
        process.kill()
        killed += end(process).returncode == -signal.SIGKILL
        finish(go, tmp_path / f"{number}", twin)
    assert killed > 0


def test_one_run_killed_three_times(start, go, twin, tmp_path):
    moments = random.Random(3)
    for name in ("train.csv", "test.csv", "params/epoch-03.pkl"):
        process = start(tmp_path, "--resume")
        wait_for((tmp_path / name).exists)
        time.sleep(moments.uniform(0, 0.2))
        process.kill()
        assert end(process).returncode == -signal.SIGKILL
    finish(go, tmp_path, twin)


def test_killed_before_any_file_operation(go, twin, tmp_path):
    """Kills before a few, other ones for each value of KILLS, of all that there are."""
    killed, first = 0, random.Random(KILLS).randrange(1, 5)
    for operation in range(first, 24, max(1, 30 // KILLS)):
        log_dir = tmp_path / f"{operation}"
        killed += go(log_dir, before=operation).returncode == -signal.SIGKILL
        assert killed, "the first one is there in any program that writes a record"
        finish(go, log_dir, twin)


@pytest.mark.parametrize("name", ["epoch-00.pkl", "epoch-03.pkl", "checkpoint.tmp"])
def test_killed_before_a_certain_file(name, go, twin, tmp_path):
    killed = go(tmp_path, before=name).returncode
    assert killed == -signal.SIGKILL
    finish(go, tmp_path, twin)


def test_remains_of_a_kill_do_no_harm(go, stopped, twin):
    """Half a checkpoint and half a params file; half a row; rows of the next epoch."""
    assert len(rows(stopped / "train.csv")) == 36  # of three epochs; checkpoint: two
    with (
        open(stopped / "train.csv", "a") as train,
        open(stopped / "test.csv", "a") as t,
    ):
        train.write("37,4,0,0.1,9\n38,4,1,0.1,9\n39,4")
        t.write("4,48,0.1,9")
    content = (twin / "params" / "epoch-03.pkl").read_bytes()
    (stopped / "params" / "epoch-03.pkl").write_bytes(content[: len(content) // 2])
    content = (stopped / "checkpoint.pt").read_bytes()
    (stopped / "checkpoint.tmp").write_bytes(content[: len(content) // 2])
    finished = finish(go, stopped, twin)
    assert "[Epoch  2]" not in finished.stdout and "[Epoch  3]" in finished.stdout


@pytest.mark.parametrize("flags", [(), ("--resume",)])
@pytest.mark.parametrize("moved", [0, 2, 4])
def test_killed_while_an_old_record_was_moved_aside(flags, moved, go, copy, twin):
    """The next start completes the move, into one folder."""
    (copy / "moving").mkdir()
    for name in NAMES[:moved]:
        (copy / name).rename(copy / "moving" / name)
    finished = go(copy, "--seed", 2, "--epochs", 1, *flags)
    assert finished.returncode == 0, finished.stderr
    assert record(copy / "run-1", NAMES) == record(twin, NAMES)
    assert [path.name for path in copy.glob("run-*")] == ["run-1"]
    assert not (copy / "moving").exists()
    assert len(rows(copy / "train.csv")) == 12


def test_kill_before_any_operation_of_a_move_loses_nothing(go, copy, twin):
    original = record(twin, NAMES)
    for operation in range(1, 99):
        killed = go(copy, "--epochs", 1, before=operation).returncode
        assert killed == -signal.SIGKILL
        folders = [copy, copy / "moving", *copy.glob("run-*")]
        found = [record(folder, NAMES) for folder in folders]
        together = found[0] | found[1]
        if (copy / "run-1").exists():
            break
        assert together == original
    assert found[2] == original
    assert go(copy, "--epochs", 1, "--resume").returncode == 0
    assert record(copy / "run-1", NAMES) == original


# Signals


def test_signal_stops_the_run_with_one_line(small_mnist, go, twin, tmp_path):
    """Runs started as users do it, all at once to save time."""
    runs, status = {}, {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGKILL: -9}
    pipes = {name: subprocess.PIPE for name in ("stdout", "stderr")}
    for number in status:
        flags = small_flags(small_mnist, tmp_path / number.name)
        command = [sys.executable, HOME / "main.py", *map(str, flags)]
        runs[number] = subprocess.Popen(command, text=True, **pipes)
        threading.Thread(target=signal_in_epoch_2, args=(runs[number], number)).start()
    lines = [
        f"main.py: interrupted with {n} of 6 epochs stored: --resume goes on\n"
        for n in range(1, 7)
    ]
    for number, process in runs.items():
        assert process.wait(100) == status[number]
        errors = process.stderr.read()
        assert errors == "" if number == signal.SIGKILL else errors in lines
        finish(go, tmp_path / number.name, twin)


def signal_in_epoch_2(process, number):
    for line in process.stdout:
        if line.startswith("[Epoch  1]"):
            process.send_signal(number)


@pytest.mark.parametrize(
    "number, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130)]
)
def test_signal_while_a_checkpoint_is_written(number, status, go, twin, tmp_path):
    finished = go(tmp_path, before="epoch-02.pkl", action=number)
    assert finished.returncode == status
    line = "main.py: interrupted with 1 of 6 epochs stored: --resume goes on\n"
    assert finished.stderr == line
    finish(go, tmp_path, twin)


# The disk


@pytest.mark.parametrize("limit", [800_000, 300_000])
def test_disk_full(limit, go, twin, tmp_path):
    """Full at the second checkpoint, which has the momentum, or at the first params."""
    finished = go(tmp_path, limit=limit)
    assert str(tmp_path) in one_line(finished, 1)
    if limit == 800_000:
        checkpoint = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
        assert checkpoint["epoch"] == 0  # the last one that was whole
    finish(go, tmp_path, twin)


def test_log_dir_that_goes_away(go, twin, tmp_path):
    finished = go(tmp_path / "logs", before="epoch-02.pkl", action="rmtree")
    assert str(tmp_path / "logs") in one_line(finished, 1)
    assert "[Epoch  2]" in finished.stdout and "[Epoch  3]" not in finished.stdout


# --resume


def test_resume_starts_where_there_is_nothing(go, twin, tmp_path):
    finish(go, tmp_path / "deep" / "logs", twin)


def test_resume_with_other_flags_names_them(go, stopped):
    before = record(stopped, NAMES)
    other = {"--batch-size": 60, "--epochs": 5, "--lr": 0.05, "--dropout": 0.5}
    other |= {"--momentum": 0.5, "--seed": 2, "--schedule": "step"}
    other |= {"--dataset": "mnist-5k"}
    flags = [word for pair in other.items() for word in pair]
    line = one_line(go(stopped, "--resume", *flags), 1)
    assert [flag for flag in other if flag not in line] == []
    line = one_line(go(stopped, "--resume", "--lr", 0.05), 1)
    assert [flag for flag in other if flag in line] == ["--lr"]
    assert record(stopped, NAMES) == before


def test_resume_of_a_finished_run_says_so(go, copy, twin):
    """Elsewhere than it ran: paths may change."""
    finished = go(copy, "--resume")
    assert (finished.returncode, finished.stderr) == (0, "")
    assert "[Epoch" not in finished.stdout
    assert finished.stdout.splitlines()[-1].startswith("Done in ")
    assert record(copy, NAMES) == record(twin, NAMES)


def test_resume_with_more_epochs(go, copy, tmp_path):
    longer = tmp_path / "longer"
    assert go(longer, "--epochs", 8).returncode == 0
    finished = finish(go, copy, longer, "--epochs", 8)
    assert "[Epoch  6]" not in finished.stdout and "[Epoch  7]" in finished.stdout
    line = one_line(go(copy, "--resume", "--epochs", 7), 1)  # now it has 8
    assert "--epochs" in line


@pytest.mark.parametrize("name", ["cosine", "step"])
def test_resume_under_a_schedule(name, go, tmp_path):
    flags = ("--schedule", name, "--epochs", 4)
    assert go(tmp_path / "twin", *flags).returncode == 0
    rates = [float(row["lr"]) for row in rows(tmp_path / "twin" / "test.csv")]
    expected = {"step": [1, 1, 0.1, 0.01], "cosine": [1, 0.8535534, 0.5, 0.1464466]}
    assert rates == pytest.approx([0.1 * factor for factor in expected[name]], 1e-6)
    for kill in ("epoch-02.pkl", "epoch-04.pkl"):
        killed = go(tmp_path / "logs", *flags, "--resume", before=kill)
        assert killed.returncode == -signal.SIGKILL
    line = one_line(go(tmp_path / "logs", "--resume", *flags[:2], "--epochs", 5), 1)
    assert "--epochs" in line
    finish(go, tmp_path / "logs", tmp_path / "twin", *flags)


class Hostile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize(
    "damage", ["empty", "cut", "text", "hostile", "foreign", "settings"]
)
def test_resume_with_a_damaged_checkpoint(damage, go, copy, tmp_path):
    path = copy / "checkpoint.pt"
    if damage == "hostile":
        torch.save({"settings": Hostile(tmp_path / "touched")}, path)
    elif damage == "foreign":
        torch.save({"model": torch.zeros(3)}, path)
    elif damage == "settings":
        torch.save({"settings": [1, 2]}, path)
    else:
        whole = path.read_bytes()
        content = {"empty": b"", "cut": whole[: len(whole) // 2], "text": b"hello\n"}
        path.write_bytes(content[damage])
    before = record(copy, NAMES)
    assert str(path) in one_line(go(copy, "--resume"), 1)
    assert record(copy, NAMES) == before
    assert not (tmp_path / "touched").exists()


@pytest.mark.parametrize("name", ["train.csv", "test.csv"])
@pytest.mark.parametrize("cut", ["a row", "half a row"])
def test_resume_with_a_table_cut_short(name, cut, go, copy):
    """A table that lost what its checkpoint counts on."""
    lines = (copy / name).read_text().splitlines(keepends=True)
    lines[-1] = "" if cut == "a row" else lines[-1][:-3]
    (copy / name).write_text("".join(lines))
    before = record(copy, NAMES)
    assert str(copy / name) in one_line(go(copy, "--resume"), 1)
    assert record(copy, NAMES) == before


# The record before


def test_old_records_are_moved_aside_whole(go, copy, twin):
    (copy / "log.out").write_text("being written\n")
    (copy / "notes").mkdir()
    for number in (1, 2):
        old = record(copy, NAMES)
        finished = go(copy, "--epochs", 1, "--seed", number + 1)
        assert finished.returncode == 0, finished.stderr
        assert str(copy / f"run-{number}") in finished.stderr
        assert finished.stderr.count("\n") == 1
        assert record(copy / f"run-{number}", NAMES) == old
        moved = {path.name for path in (copy / f"run-{number}").iterdir()}
        assert moved == set(NAMES)
        assert sorted(record(copy)) == [
            "params/epoch-00.pkl",
            "params/epoch-01.pkl",
            "test.csv",
            "train.csv",
        ]
    assert record(copy / "run-1", NAMES) == record(twin, NAMES)
    assert (copy / "log.out").read_text() == "being written\n"
    assert (copy / "notes").is_dir()

    second, third = record(copy / "run-2", NAMES), record(copy, NAMES)
    shutil.rmtree(copy / "run-1")  # by its user; the others stay what they are
    finished = go(copy, "--epochs", 1)
    assert finished.returncode == 0, finished.stderr
    assert record(copy / "run-2", NAMES) == second
    (other,) = (path for path in copy.glob("run-*") if path.name != "run-2")
    assert record(other, NAMES) == third


# Two runs at once


def test_second_run_on_a_log_dir_is_refused(start, go, twin, tmp_path):
    first = start(tmp_path, before="epoch-02.pkl", action=signal.SIGSTOP)
    state = Path(f"/proc/{first.pid}/stat")
    wait_for(lambda: state.read_text().rsplit(")")[1].split()[0] == "T")
    try:
        before = record(tmp_path, NAMES)
        for flags in ((), ("--resume",)):
            assert str(tmp_path) in one_line(go(tmp_path, *flags), 1)
        assert record(tmp_path, NAMES) == before
    finally:
        os.kill(first.pid, signal.SIGCONT)
    assert end(first).returncode == 0
    assert_same(tmp_path, twin)
