"""The record of a run: its form, and that neither kills nor mistakes damage it.

KILLS=20 pytest tests/test_record.py     # kills that many runs at random moments
"""

import json
import os
import random
import re
import resource
import shutil
import signal
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (
    Hostile,
    act_before,
    end,
    is_stopped,
    one_line,
    read_params,
    rows,
    wait_for,
)

import main

KILLS = int(os.environ.get("KILLS", "3"))
EPOCHS = 4
NAMES = ("train.csv", "test.csv", "params", "checkpoint.pt")


@pytest.fixture(scope="module")
def begin(start, small_mnist):
    """A function that starts `python main.py` on the small data, as Popen would.

    `before` and `action`: see act_before; kill -9 if no other action is given.
    """

    def begin(log_dir, *flags, before=None, action=signal.SIGKILL, prepare=None):
        if before is not None:
            prepare = partial(act_before, log_dir, before, action)
        return start(*small_flags(small_mnist, log_dir, *flags), prepare=prepare)

    return begin


@pytest.fixture(scope="module")
def go(begin):
    """A function that runs `python main.py` on the small data to its end."""

    def go(*arguments, **options):
        return end(begin(*arguments, **options))

    return go


def small_flags(data_dir, log_dir, *flags):
    small = ("--data-dir", data_dir, "--batch-size", 50, "--epochs", EPOCHS)
    return *small, "--log-dir", log_dir, *flags


def record(log_dir, names=NAMES[:3]):
    """The bytes of all files of a record; by default but for the checkpoint's."""
    contents = {}
    for name in names:
        path = log_dir / name
        files = path.iterdir() if path.is_dir() else [path]
        for file in files:
            if file.is_file():
                contents[str(file.relative_to(log_dir))] = file.read_bytes()
    return contents


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
def half(begin, twin, tmp_path_factory):
    """A log dir whose run was killed after the third epoch, before its checkpoint."""
    log_dir = tmp_path_factory.mktemp("half") / "logs"
    assert end(begin(log_dir, before="epoch-03.tmp")).returncode == -signal.SIGKILL
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
    assert len({row["loss"] for row in train}) > 40  # one of its own in each row

    lines = (twin / "test.csv").read_text().split("\n")
    assert lines[0] == "epoch,step,lr,loss,accuracy" and lines[-1] == ""
    assert len(lines) == EPOCHS + 2
    tests = rows(twin / "test.csv")
    for epoch, row in enumerate(tests, 1):
        assert (int(row["epoch"]), int(row["step"])) == (epoch, epoch * 12)
        assert float(row["lr"]) == 0.1 and 0 < float(row["loss"]) < 10
        assert float(row["accuracy"]) * 2 == int(float(row["accuracy"]) * 2)  # of 200
    assert 60 < float(tests[-1]["accuracy"]) <= 100


def test_log_dir_holds_the_four_names_and_nothing_else(twin):
    assert sorted(path.name for path in twin.glob("[!.]*")) == sorted(NAMES)
    expected = [f"epoch-{epoch:02}.pkl" for epoch in range(EPOCHS + 1)]
    assert sorted(path.name for path in (twin / "params").iterdir()) == expected


def test_parameters_are_float32_arrays_under_the_models_names(twin):
    torch.manual_seed(1)
    initial = main.LeNet().state_dict()
    for epoch in range(EPOCHS + 1):
        arrays = read_params(twin, epoch)
        assert type(arrays) is dict and list(arrays) == list(initial)
        for name, array in arrays.items():
            assert type(array) is np.ndarray and array.dtype == np.float32, name
            assert array.shape == initial[name].shape
            if name.endswith("num_batches_tracked"):
                assert array == epoch * 12
            if epoch > 0 and name in ("m.0.0.bias", "m.1.0.bias"):
                continue  # Batch norm takes them away again: they need not change.
            is_initial = np.array_equal(array, initial[name].numpy())
            assert is_initial == (epoch == 0), name


def test_checkpoint_is_read_without_running_code(twin):
    checkpoint = torch.load(twin / "checkpoint.pt", weights_only=True)
    assert isinstance(checkpoint, dict)


# Kills


def test_killed_at_random_moments_and_resumed(begin, go, twin, tmp_path):
    started = time.monotonic()
    assert go(tmp_path / "again").returncode == 0
    seconds = time.monotonic() - started
    assert_same(tmp_path / "again", twin)
    moments = random.Random(KILLS)
    killed = 0
    for number in range(KILLS):
        process = begin(tmp_path / f"{number}")
        process.join(moments.uniform(0, seconds))
        process.kill()
        killed += end(process).returncode == -signal.SIGKILL
        finish(go, tmp_path / f"{number}", twin)
    assert killed > 0


def test_one_run_killed_three_times(begin, go, twin, tmp_path):
    moments = random.Random(3)
    for name in ("train.csv", "test.csv", "params/epoch-03.pkl"):
        process = begin(tmp_path, "--resume")
        wait_for((tmp_path / name).exists)
        time.sleep(moments.uniform(0, 0.2))
        process.kill()
        assert end(process).returncode == -signal.SIGKILL
    finish(go, tmp_path, twin)


def test_killed_before_any_file_operation(go, twin, tmp_path):
    """Kills before some of the first 24, other ones for each value of KILLS."""
    for operation in random.Random(KILLS).sample(range(1, 25), min(KILLS, 24)):
        log_dir = tmp_path / f"{operation}"
        assert go(log_dir, before=operation).returncode == -signal.SIGKILL
        finish(go, log_dir, twin)


@pytest.mark.parametrize("name", ["epoch-00.tmp", "epoch-03.tmp", "checkpoint.tmp"])
def test_killed_before_a_certain_file(name, go, twin, tmp_path):
    killed = go(tmp_path, before=name).returncode
    assert killed == -signal.SIGKILL
    finish(go, tmp_path, twin)


def test_remains_of_a_kill_do_no_harm(go, stopped, twin):
    """Half a checkpoint and half a params file; half a row; rows of the next epoch."""
    assert len(rows(stopped / "train.csv")) == 36  # of three epochs; checkpoint: two
    with open(stopped / "train.csv", "a") as table:
        table.write("37,4,0,0.1,9\n38,4,1,0.1,9\n39,4")
    with open(stopped / "test.csv", "a") as table:
        table.write("4,48,0.1,9")
    content = (twin / "params" / "epoch-03.pkl").read_bytes()
    (stopped / "params" / "epoch-03.pkl").write_bytes(content[: len(content) // 2])
    content = (stopped / "checkpoint.pt").read_bytes()
    (stopped / "checkpoint.tmp").write_bytes(content[: len(content) // 2])
    finished = finish(go, stopped, twin)
    assert "[Epoch  2]" not in finished.stdout and "[Epoch  3]" in finished.stdout


def test_kill_before_any_operation_of_a_move_loses_nothing(go, copy, twin):
    original = record(twin, NAMES)
    for operation in range(1, 99):
        finished = go(copy, "--epochs", 1, before=operation)
        assert finished.returncode == -signal.SIGKILL
        moved = [record(folder, NAMES) for folder in copy.glob("run-*")]
        assert_found(original, [record(copy, NAMES), *moved])
        if not any((copy / name).exists() for name in ("checkpoint.pt", "params")):
            break
    assert_found(original, moved)
    assert sum(len(part) > 0 for part in moved) > 1  # killed in the middle, really
    assert go(copy, "--epochs", 1, "--resume").returncode == 0
    assert_found(original, [record(folder, NAMES) for folder in copy.glob("run-*")])
    assert len(rows(copy / "train.csv")) == 12


def assert_found(original, parts):
    """Asserts that every file of a record is in one of the parts of it."""
    for name, content in original.items():
        assert content in [part.get(name) for part in parts], name


# Signals


@pytest.mark.parametrize(
    "number, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130)]
)
def test_signal_stops_the_run_with_one_line(number, status, begin, go, twin, tmp_path):
    process = begin(tmp_path)
    wait_for(lambda: "[Epoch  1]" in Path(process.output + ".out").read_text())
    os.kill(process.pid, number)
    finished = end(process)
    assert finished.returncode == status
    line = r"main\.py: interrupted; (\d) of 4 epochs are stored\b.* --resume .*\n"
    stored = re.fullmatch(line, finished.stderr)
    assert stored, finished.stderr
    # Stopped after the checkpoint but before the next test, or before the checkpoint.
    tests = finished.stdout.count("Average test loss")
    assert int(stored[1]) in (tests - 1, tests)
    finish(go, tmp_path, twin)


@pytest.mark.parametrize(
    "number, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130)]
)
def test_signal_while_a_checkpoint_is_written(number, status, go, twin, tmp_path):
    finished = go(tmp_path, before="epoch-02.tmp", action=number)
    assert finished.returncode == status
    assert re.fullmatch(
        r"main\.py: interrupted; 1 of 4 epochs are stored\b.* --resume .*\n",
        finished.stderr,
    )
    finish(go, tmp_path, twin)


def test_signal_before_anything_is_stored(go, tmp_path):
    finished = go(tmp_path, before="train.csv", action=signal.SIGTERM)
    assert finished.returncode == 143
    line = "main.py: interrupted before the run began; what was stored is kept\n"
    assert finished.stderr == line


# The disk


def limit_files(size):
    """Has writing fail, as on a full disk, at so many bytes in a file."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


@pytest.mark.parametrize("limit", [800_000, 300_000])
def test_disk_full(limit, go, twin, tmp_path):
    """Full at the second checkpoint, which has the momentum, or at the first params."""
    finished = go(tmp_path, prepare=partial(limit_files, limit))
    assert str(tmp_path) in one_line(finished, 1)
    if limit == 800_000:
        checkpoint = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
        assert checkpoint["epoch"] == 0  # the last one that was whole
    finish(go, tmp_path, twin)


def note_flushes(notes):
    """Notes each flush to the disk, with the size of the file then, and each rename."""
    fsync = os.fsync

    def note(*words):
        with open(notes, "a") as file:
            print(*words, file=file)

    def noted_fsync(descriptor):
        fsync(descriptor)
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        note("flushed", Path(path).name, os.fstat(descriptor).st_size)

    def hook(event, details):
        if event == "os.rename" and str(details[0]).endswith(".tmp"):
            renamed = Path(details[0])
            tables = [*renamed.parent.glob("*.csv"), renamed]
            sizes = {path.name: path.stat().st_size for path in tables}
            note("renamed", renamed.name, json.dumps(sizes))

    os.fsync = noted_fsync
    sys.addaudithook(hook)


def test_a_checkpoint_counts_on_nothing_that_a_power_failure_takes(go, tmp_path):
    """All is flushed when the new checkpoint takes the place of the old one."""
    notes = tmp_path / "notes"
    finished = go(
        tmp_path / "logs", "--epochs", 2, prepare=partial(note_flushes, notes)
    )
    assert finished.returncode == 0
    flushed = {}  # the sizes of files, and what folders are safe
    renamed = []
    for line in notes.read_text().splitlines():
        event, name, rest = line.split(maxsplit=2)
        if event == "flushed":
            flushed[name] = int(rest)
            continue
        sizes = json.loads(rest)
        assert {file: flushed.get(file) for file in sizes} == sizes
        renamed.append(name)
        if name == "checkpoint.tmp":
            assert "params" in flushed  # which has the renamed parameters
            flushed = {}
        else:
            assert len(renamed) == 1 or "logs" in flushed  # the checkpoint before
            flushed.pop("params", None)
    epochs = ["epoch-00.tmp", "epoch-01.tmp", "epoch-02.tmp"]
    assert renamed[0::2] == epochs and renamed[1::2] == 3 * ["checkpoint.tmp"]
    assert "logs" in flushed


@pytest.mark.parametrize("below", ["", "below", "further/below"])
def test_log_dir_that_is_a_file(go, tmp_path, below):
    file = tmp_path / "file"
    file.write_text("mine")
    assert str(file) in one_line(go(file / below), 1)
    assert file.read_text() == "mine"


def test_log_dir_that_goes_away(go, twin, tmp_path):
    finished = go(tmp_path / "logs", before="epoch-02.tmp", action="rmtree")
    assert str(tmp_path / "logs") in one_line(finished, 1)
    assert "[Epoch  2]" in finished.stdout and "[Epoch  3]" not in finished.stdout


# --resume


def test_resume_starts_where_there_is_nothing(go, twin, tmp_path):
    finish(go, tmp_path / "deep" / "logs", twin)


def test_resume_with_other_flags_names_them(go, stopped):
    before = record(stopped, NAMES)
    other = {"--batch-size": 60, "--epochs": 3, "--lr": 0.05, "--dropout": 0.5}
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
    assert go(longer, "--epochs", 6).returncode == 0
    finished = finish(go, copy, longer, "--epochs", 6)
    assert "[Epoch  4]" not in finished.stdout and "[Epoch  5]" in finished.stdout
    line = one_line(go(copy, "--resume", "--epochs", 5), 1)  # now it has 6
    assert "--epochs" in line


@pytest.mark.parametrize("name", ["cosine", "step"])
def test_resume_under_a_schedule(name, go, tmp_path):
    flags = ("--schedule", name, "--epochs", 4)
    assert go(tmp_path / "twin", *flags).returncode == 0
    rates = [float(row["lr"]) for row in rows(tmp_path / "twin" / "test.csv")]
    expected = {"step": [1, 1, 0.1, 0.01], "cosine": [1, 0.8535534, 0.5, 0.1464466]}
    assert rates == pytest.approx([0.1 * factor for factor in expected[name]], 1e-6)
    for kill in ("epoch-02.tmp", "epoch-04.tmp"):
        killed = go(tmp_path / "logs", *flags, "--resume", before=kill)
        assert killed.returncode == -signal.SIGKILL
    line = one_line(go(tmp_path / "logs", "--resume", *flags[:2], "--epochs", 5), 1)
    assert "--epochs" in line
    finish(go, tmp_path / "logs", tmp_path / "twin", *flags)


def turned_around(tensor):
    """The same values, in the other order in memory if there are four dimensions."""
    if tensor.dim() < 4:
        return tensor
    is_contiguous = tensor.is_contiguous()
    other = torch.channels_last if is_contiguous else torch.contiguous_format
    return tensor.contiguous(memory_format=other)


def test_resume_of_what_another_device_stored(go, stopped, twin):
    """A CPU and a GPU keep the values of a tensor in another order in memory."""
    path = stopped / "checkpoint.pt"
    checkpoint = torch.load(path, weights_only=True)
    model = checkpoint["model"]
    strides = model["m.1.0.weight"].stride()
    checkpoint["model"] = {name: turned_around(model[name]) for name in model}
    for state in checkpoint["optimizer"]["state"].values():
        state["momentum_buffer"] = turned_around(state["momentum_buffer"])
    assert checkpoint["model"]["m.1.0.weight"].stride() != strides
    torch.save(checkpoint, path)
    finish(go, stopped, twin)


def test_resume_of_a_run_of_an_older_main(go, stopped, twin):
    """Its learning rate was a number, and its model lay in memory as channels_last."""
    path = stopped / "checkpoint.pt"
    checkpoint = torch.load(path, weights_only=True)
    assert list(checkpoint) == ["epoch", "step", "settings", "model", "optimizer"]
    for name, tensor in checkpoint["model"].items():
        if tensor.dim() == 4:
            tensor = tensor.contiguous(memory_format=torch.channels_last)
        checkpoint["model"][name] = tensor
    (group,) = checkpoint["optimizer"]["param_groups"]
    group["lr"] = 0.1
    torch.save(checkpoint, path)
    finish(go, stopped, twin)


def test_resume_without_momentum(go, tmp_path):
    flags = ("--momentum", 0, "--epochs", 2)
    assert go(tmp_path / "twin", *flags).returncode == 0
    killed = go(tmp_path / "logs", *flags, before="epoch-02.tmp")
    assert killed.returncode == -signal.SIGKILL
    finish(go, tmp_path / "logs", tmp_path / "twin", *flags)


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
@pytest.mark.parametrize("lost", ["a row", "half a row", "all"])
def test_resume_with_a_table_that_lost_what_was_in_it(name, lost, go, copy):
    lines = (copy / name).read_text().splitlines(keepends=True)
    lines[-1] = "" if lost == "a row" else lines[-1][:-3]
    (copy / name).write_text("".join(lines))
    if lost == "all":
        (copy / name).unlink()
    before = record(copy, NAMES)
    assert str(copy / name) in one_line(go(copy, "--resume"), 1)
    assert record(copy, NAMES) == before


# The record before


def test_old_records_are_moved_aside_whole(go, copy, twin):
    kept = {"log.out": "being written\n", "notes.txt": "mine\n"}
    pictures = ("curves.png", "gradients.csv", "gradients.png")
    for name, text in kept.items():
        (copy / name).write_text(text)
    for number in (1, 2):
        for name in pictures:
            (copy / name).write_text(f"of run {number}")
        old = record(copy, NAMES + pictures)
        finished = go(copy, "--epochs", 1, "--seed", number + 1)
        assert finished.returncode == 0, finished.stderr
        assert str(copy / f"run-{number}") in finished.stderr
        assert finished.stderr.count("\n") == 1
        folder = copy / f"run-{number}"
        assert record(folder, NAMES + pictures) == old
        assert len(list(folder.iterdir())) == len(NAMES + pictures)
        assert len(rows(copy / "train.csv")) == 12
        assert len(list((copy / "params").iterdir())) == 2
        assert not any((copy / name).exists() for name in pictures)
    assert record(copy / "run-1", NAMES) == record(twin, NAMES)
    assert record(copy, kept) == {name: kept[name].encode() for name in kept}

    second = record(copy / "run-2", NAMES)
    third = record(copy, NAMES)
    shutil.rmtree(copy / "run-1")  # by its user; the others stay what they are
    assert go(copy, "--epochs", 1).returncode == 0
    assert record(copy / "run-2", NAMES) == second
    assert record(copy / "run-1", NAMES) == third


# Two runs at once


def test_second_run_on_a_log_dir_is_refused(begin, go, twin, tmp_path):
    first = begin(tmp_path, before="epoch-02.tmp", action=signal.SIGSTOP)
    wait_for(lambda: is_stopped(first))
    try:
        before = record(tmp_path, NAMES)
        for flags in ((), ("--resume",)):
            finished = go(tmp_path, *flags)
            line = one_line(finished, 1)
            assert "another run is using" in line and str(tmp_path) in line
            assert finished.stdout == ""  # no settings of a run that does not start
        assert record(tmp_path, NAMES) == before
    finally:
        os.kill(first.pid, signal.SIGCONT)
    assert end(first).returncode == 0
    assert_same(tmp_path, twin)
