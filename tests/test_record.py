"""The files of a run, and that neither kills nor mistakes damage them."""

import hashlib
import json
import os
import pickle
import re
import shutil
import signal
import sys
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import (
    HOME,
    Hostile,
    act_before,
    before_operations,
    checksum,
    edit,
    end,
    error_line,
    read_params,
    rows,
    wait_for,
)

import main

PARAMS = [f"params/epoch-0{epoch}.pkl" for epoch in range(4)]


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


def contents(folder):
    """The bytes of all files in a folder, except locks."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def results(run):
    """The bytes of a run's tables and parameters, and of temporary files, if any are left."""
    suffixes = (".csv", ".pkl", ".tmp")
    return {name: content for name, content in contents(run).items() if name.endswith(suffixes)}


def test_files_of_a_run(twin, small_mnist):
    names = ["checkpoint.pt", "main-00.py", *PARAMS, "settings.json", "test.csv", "train.csv"]
    assert sorted(contents(twin)) == names
    assert (twin / "train.csv").read_text().startswith("step,epoch,batch,lr,loss\n1,1,0,0.1,")
    assert (twin / "test.csv").read_text().startswith("epoch,step,lr,loss,accuracy\n1,12,0.1,")
    given = {"data_dir": str(small_mnist), "batch_size": 50, "epochs": 3}
    given |= {"log_dir": str(twin.parent), "dataset": "mnist", "cuda": False}
    settings = json.loads((twin / "settings.json").read_text())
    assert settings.pop("machine").startswith(f"PyTorch {torch.__version__}, ")
    assert settings == vars(main.parse_arguments([])) | given


def test_parameters_are_float32_arrays_under_the_models_names(twin):
    shapes = {name: tensor.shape for name, tensor in main.LeNet().state_dict().items()}
    for epoch in range(4):
        arrays = read_params(twin, epoch)
        assert {name: array.shape for name, array in arrays.items()} == shapes
        assert all(array.dtype == np.float32 for array in arrays.values())
        assert arrays["m.4.num_batches_tracked"] == epoch * 12


def test_the_program_is_kept(train, tmp_path):
    train(tmp_path, "--epochs", 1)
    program = edit(tmp_path, ("INTERVAL = 100", "INTERVAL = 10"))
    assert "[Epoch  2, batch  10]" in train(tmp_path, "--resume", program=program)
    assert (tmp_path / "run-1" / "main-00.py").read_text() == (HOME / "main.py").read_text()
    assert (tmp_path / "run-1" / "main-01.py").read_text() == program.read_text()


def copy_before_operations(folder, copies):
    """Copies a folder as it is right before each operation on its files, unless it was so before."""
    seen = []

    def copy(_):
        if folder.exists() and contents(folder) not in seen:
            seen.append(contents(folder))
            shutil.copytree(folder, copies / str(len(seen)))

    before_operations(folder, copy)


def test_killed_before_any_operation_on_its_files(go, flags, tmp_path, capsys):
    """What kill -9 would leave behind, in a new run and in a resumed one, is resumed."""
    flags = (*flags[:-1], "--epochs", 2, "--batch-size", 200, "--log-dir")
    whole = go("main.py", *flags, tmp_path / "whole")
    new, resumed = tmp_path / "new", tmp_path / "resumed"
    prepare = partial(copy_before_operations, tmp_path / "run", new)
    go("main.py", *flags, tmp_path / "run", prepare=prepare)
    half = next(path for path in new.iterdir() if (path / "run-1/params/epoch-02.pkl").exists())
    shutil.copytree(half, tmp_path / "half")
    prepare = partial(copy_before_operations, tmp_path / "half", resumed)
    assert checksum(go("main.py", *flags, tmp_path / "half", "--resume", prepare=prepare).stdout)
    copies = [*new.iterdir(), *resumed.iterdir()]
    begun = [path for path in copies if (path / "run-1/checkpoint.pt").exists()]
    assert len(begun) > 15 and len(copies) > len(begun)
    for log_dir in copies:
        main.main([*map(str, (*flags, log_dir)), "--resume"])
        assert checksum(capsys.readouterr().out) == checksum(whole.stdout), log_dir
        assert not (log_dir in begun and (log_dir / "run-2").exists())


INTERRUPTED = "main.py: interrupted; --resume continues after the last finished epoch\n"


@pytest.mark.parametrize(
    "number, status, line",
    [
        (signal.SIGKILL, -signal.SIGKILL, ""),
        (signal.SIGTERM, 130, INTERRUPTED),
        (signal.SIGINT, 130, INTERRUPTED),
    ],
)
def test_stopped_and_resumed(number, status, line, go, train, flags, twin, tmp_path):
    prepare = partial(act_before, tmp_path, "epoch-02.tmp", signal.raise_signal, number)
    finished = go("main.py", *flags, tmp_path, prepare=prepare)
    assert (finished.returncode, finished.stderr) == (status, line)
    assert "[Epoch  1]" not in train(tmp_path, "--resume")
    assert results(tmp_path / "run-1") == results(twin)


def test_tables_are_whole_again(train, copy, twin):
    (copy / "run-1" / "test.csv").unlink()
    (copy / "run-1" / "train.csv").write_text("somebody's" * 10_000)
    train(copy, "--resume", "--epochs", 4)
    for name in ("train.csv", "test.csv"):
        assert (copy / "run-1" / name).read_bytes().startswith((twin / name).read_bytes())


def checksum_of(run):
    """What the last line of a run must show."""
    files = [run / "train.csv", run / "test.csv", *sorted(run.glob("params/*"))]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]


def watch_the_disk(folder):
    """Makes the program fail if a checkpoint takes its place before it is on the disk."""
    synced = {}
    fsync = os.fsync

    def watched_fsync(descriptor):
        fsync(descriptor)
        status = os.fstat(descriptor)
        synced[status.st_ino] = status.st_size

    def check(path):
        if path.name == "checkpoint.tmp" and path.exists():
            for file in (path, *folder.rglob("*.pkl"), *folder.rglob("*.json")):
                status = file.stat()
                if synced.get(status.st_ino, 0) != status.st_size:
                    raise RuntimeError(f"{file} is not on the disk")

    os.fsync = watched_fsync
    before_operations(folder, check)


def test_a_checkpoint_comes_last(train, tmp_path):
    train(tmp_path, "--epochs", 1, prepare=partial(watch_the_disk, tmp_path))


def test_rows_are_written_with_each_printed_loss(go, flags, tmp_path):
    kill = "        signal.raise_signal(signal.SIGKILL)\n"
    test = "        test_loss, accuracy = in_first"
    killed = go(edit(tmp_path, (test, kill + test)), *flags, tmp_path, "--batch-size", 4)
    assert killed.stdout.endswith(re.findall(r"\[Epoch  1, batch 100\].*\n", killed.stdout)[0])
    table = rows(tmp_path / "run-1" / "train.csv")
    assert [int(row["step"]) for row in table] == [*range(1, 102)]


def test_given_flags_win_then_recorded_ones_then_defaults(train, copy, tmp_path):
    run = copy / "run-1"
    other = ("--epochs", 4, "--lr", 0.05, "--momentum", 0, "--batch-size", 200)
    train(tmp_path, "--resume", run, *other, "--log-dir", tmp_path / "elsewhere")
    settings = json.loads((run / "settings.json").read_text())
    names = ("epochs", "lr", "batch_size", "dropout")
    assert [settings[name] for name in names] == [4, 0.05, 200, 0.25]
    assert [row["lr"] for row in rows(run / "test.csv")] == 3 * ["0.1"] + ["0.05"]
    assert [row["step"] for row in rows(run / "test.csv")] == ["12", "24", "36", "39"]
    assert [int(row["step"]) for row in rows(run / "train.csv")] == [*range(1, 40)]
    assert not (tmp_path / "elsewhere").exists()
    checkpoint = torch.load(run / "checkpoint.pt", weights_only=True)
    assert checkpoint["states"]["optimizer"]["param_groups"][0]["momentum"] == 0


def test_the_newest_run_that_has_a_checkpoint(train, copy):
    for number in (2, 9, 10):
        shutil.copytree(copy / "run-1", copy / f"run-{number}")
    (copy / "run-11").mkdir()
    shutil.copytree(copy / "run-1", copy / "run-1-old")
    assert f"the record is in {copy}/run-10 (" in train(copy, "--resume", "--epochs", 4)
    assert f"the record is in {copy}/run-12 (" in train(copy)


def test_a_resumption_that_trains_nothing_changes_nothing(go, copy, twin, tmp_path):
    """The run is finished, or its states do not fit the program."""
    finished = go("main.py", "--log-dir", copy, "--resume", "--lr", 0.01)
    line = f"main.py: {copy}/run-1 is finished: a higher --epochs trains longer\n"
    assert finished.stderr == line and checksum(finished.stdout) == checksum_of(twin)
    assert contents(copy / "run-1") == contents(twin)
    program = edit(tmp_path, ("nn.Linear(500, 10)", "nn.Linear(500, 11)"))
    failed = go(program, "--log-dir", copy, "--resume", "--epochs", 4)
    assert failed.returncode == 1 and "size mismatch" in failed.stderr
    assert contents(copy / "run-1") == contents(twin)


def test_a_number_that_another_run_has_just_taken(train, tmp_path):
    other = partial(os.makedirs, tmp_path / "run-1" / "params")
    prepare = partial(act_before, tmp_path, "run-1", other)
    assert f"the record is in {tmp_path}/run-2 (" in train(tmp_path, prepare=prepare)
    assert [*(tmp_path / "run-1" / "params").iterdir()] == []


class CountingDict(dict):
    assignments = 0

    def __setitem__(self, name, text):
        self.assignments += 1
        super().__setitem__(name, text)


def test_the_text_of_a_table_is_copied_once_a_write(flags, tmp_path, monkeypatch):
    """And not once a row, which would take seconds an epoch after a million rows."""
    args = main.parse_arguments([str(flag) for flag in (*flags, tmp_path)])
    record = main.Record(args, {"model": main.LeNet()})
    record.tables = CountingDict(record.tables)
    for step in range(100):
        record.add("train.csv", step=step)
    before = record.tables.assignments
    record.write("train.csv")
    assert record.tables.assignments == before + 1


def test_checkpoints_that_cannot_be_read(go, copy, tmp_path):
    """Cut off, or made to do harm."""
    file = copy / "run-1" / "checkpoint.pt"
    hostile = pickle.dumps(Hostile(tmp_path / "made"), protocol=2)
    for content in (file.read_bytes()[:1000], hostile):
        file.write_bytes(content)
        line = error_line(go("main.py", "--log-dir", copy, "--resume", "--epochs", 4))
        assert f"error: {file} cannot be read" in line
        assert file.read_bytes() == content and not (tmp_path / "made").exists()


def test_a_run_that_is_still_going_on_cannot_be_resumed(start, go, flags, twin, tmp_path):
    pause = partial(signal.raise_signal, signal.SIGSTOP)
    prepare = partial(act_before, tmp_path, "epoch-02.tmp", pause)
    first = start("main.py", *flags, tmp_path, prepare=prepare)
    table = tmp_path / "run-1" / "test.csv"
    wait_for(lambda: table.exists() and len(rows(table)) == 2)
    assert "[Epoch  2] Average" in first.stdout.read_text()  # Each line is there at once.
    before = contents(tmp_path)
    line = error_line(go("main.py", *flags, tmp_path, "--resume"))
    assert line == f"main.py: error: {tmp_path}/run-1 is locked: its run is still going on"
    assert contents(tmp_path) == before
    os.kill(first.pid, signal.SIGCONT)
    assert end(first).returncode == 0
    assert results(tmp_path / "run-1") == results(twin)


def test_main_can_be_called_again(flags, tmp_path, monkeypatch, capsys):
    """After an interruption, for example in a notebook, where the process goes on."""
    flags = [str(flag) for flag in (*flags, tmp_path)]
    with monkeypatch.context() as patch:
        patch.setattr(main, "test", lambda *arguments: signal.default_int_handler(2, None))
        with pytest.raises(SystemExit, match="130") as interrupted:
            main.main(flags)
    main.main([*flags, "--resume"])
    assert interrupted.tb  # It keeps all objects alive, as a notebook does.
    assert "the record is in" in capsys.readouterr().out


def be_a_notebook():
    """Its output has no `reconfigure`."""
    sys.stdout = SimpleNamespace(write=lambda text: os.write(1, text.encode()), flush=int)


def test_in_a_notebook(train, tmp_path):
    assert "Done in" in train(tmp_path, prepare=be_a_notebook)
