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
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import HOME, Hostile, act_before, edit, end, error_line, read_params, rows, wait_for

import main

KILLS = int(os.environ.get("KILLS", "3"))
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
    names = ["checkpoint.pt", "machine.json", "main-00.py", *PARAMS]
    assert sorted(contents(twin)) == [*names, "settings.json", "test.csv", "train.csv"]
    assert (twin / "train.csv").read_text().startswith("step,epoch,batch,lr,loss\n1,1,0,0.1,")
    assert (twin / "test.csv").read_text().startswith("epoch,step,lr,loss,accuracy\n1,12,0.1,")
    given = {"data_dir": str(small_mnist), "batch_size": 50, "epochs": 3}
    given |= {"log_dir": str(twin.parent), "dataset": "mnist"}
    settings = json.loads((twin / "settings.json").read_text())
    assert settings == vars(main.parse_arguments([])) | given


def test_parameters_are_float32_arrays_under_the_models_names(twin):
    shapes = {name: tensor.shape for name, tensor in main.LeNet().state_dict().items()}
    for epoch in range(4):
        arrays = read_params(twin, epoch)
        assert {name: array.shape for name, array in arrays.items()} == shapes
        assert all(array.dtype == np.float32 for array in arrays.values())
        assert arrays["m.4.num_batches_tracked"] == epoch * 12


def test_the_program_and_the_machine(train, tmp_path):
    train(tmp_path, "--epochs", 1)
    program = edit(tmp_path, ("INTERVAL = 100", "INTERVAL = 10"))
    train(tmp_path, "--resume", program=program)
    run = tmp_path / "run-1"
    assert (run / "main-00.py").read_text() == (HOME / "main.py").read_text()
    assert (run / "main-01.py").read_text() == program.read_text()
    machine = json.loads((run / "machine.json").read_text())
    assert (machine["python"], machine["torch"]) == (platform.python_version(), torch.__version__)
    assert (machine["threads"], machine["processes"]) == (1, 1)


def fill_the_disk():
    """Makes writing fail as on a full disk, but not that of the few lines which are printed."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))  # bytes in a file


INTERRUPTED = "main.py: interrupted; --resume continues after the last finished epoch\n"
# What happens to a run, its exit status, and its line of error.
KILLED = (partial(signal.raise_signal, signal.SIGKILL), -signal.SIGKILL, "")
TERMINATED = (partial(signal.raise_signal, signal.SIGTERM), 130, INTERRUPTED)
CTRL_C = (partial(signal.raise_signal, signal.SIGINT), 130, INTERRUPTED)
DISK_FULL = (fill_the_disk, 1, "main.py: error: --log-dir: File too large\n")
# The file, and the operation on it before which it happens. A checkpoint is opened and then
# renamed: operations 3 and 4 are those of the second checkpoint, of epoch 1.
STOPS = [
    (*KILLED, "epoch-00.tmp", 1),
    (*KILLED, "test.csv", 5),
    (*KILLED, "checkpoint.tmp", 4),
    *((*KILLED, "*", count) for count in random.Random(KILLS).sample(range(1, 45), KILLS)),
    (*TERMINATED, "train.csv", 3),
    (*CTRL_C, "epoch-02.tmp", 1),
    (*DISK_FULL, "checkpoint.tmp", 3),
]


@pytest.mark.parametrize("action, status, line, name, count", STOPS)
def test_stopped_and_resumed(action, status, line, name, count, go, flags, twin, tmp_path):
    prepare = partial(act_before, tmp_path, name, count, action)
    finished = go("main.py", *flags, tmp_path, prepare=prepare)
    assert (finished.returncode, finished.stderr) == (status, line)
    is_begun = (tmp_path / "run-1" / "checkpoint.pt").exists()
    resumed = go("main.py", *flags, tmp_path, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    # A run that was stopped before its first checkpoint is started again.
    assert resumed.stderr.startswith("main.py: resuming") == is_begun
    assert results(main.newest_run(tmp_path)) == results(twin)


def watch_the_disk(folder):
    """Makes the program fail if a checkpoint takes its place before all is on the disk."""
    synced = {}
    fsync = os.fsync

    def watched_fsync(descriptor):
        fsync(descriptor)
        status = os.fstat(descriptor)
        synced[status.st_ino] = status.st_size

    def hook(event, details):
        if event == "os.rename" and Path(details[0]).name == "checkpoint.tmp":
            for file in folder.rglob("*.*"):
                status = file.stat()
                if synced.get(status.st_ino, 0) != status.st_size:
                    raise RuntimeError(f"{file} is not on the disk")

    os.fsync = watched_fsync
    sys.addaudithook(hook)


def test_a_checkpoint_comes_last(train, tmp_path):
    train(tmp_path, "--epochs", 1, prepare=partial(watch_the_disk, tmp_path))


def test_rows_are_written_with_each_printed_loss(go, flags, tmp_path):
    # The table is opened twice at the start, then at batch 100 and at the end of the epoch.
    prepare = partial(act_before, tmp_path, "train.csv", 4, signal.raise_signal, signal.SIGKILL)
    killed = go("main.py", *flags, tmp_path, "--batch-size", 4, prepare=prepare)
    assert "[Epoch  1, batch 100]" in killed.stdout and "Average" in killed.stdout
    table = rows(tmp_path / "run-1" / "train.csv")
    assert [int(row["step"]) for row in table] == [*range(1, 102)]


def test_log_dirs_that_will_not_do(go, flags, tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("nowhere")
    for name, reason in (("file", "Not a directory"), ("link", "No such file or directory")):
        line = error_line(go("main.py", *flags, tmp_path / name))
        assert line == f"main.py: error: {tmp_path / name}/run-1: {reason}"


def test_given_flags_win_then_recorded_ones_then_defaults(go, copy, tmp_path):
    run = copy / "run-1"
    other = ("--epochs", 4, "--lr", 0.05, "--momentum", 0, "--log-dir", tmp_path / "elsewhere")
    assert go("main.py", "--resume", run, *other).returncode == 0
    settings = json.loads((run / "settings.json").read_text())
    names = ("epochs", "lr", "batch_size", "dropout")
    assert [settings[name] for name in names] == [4, 0.05, 50, 0.25]
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
    def times():
        return {path: path.stat().st_mtime_ns for path in copy.rglob("*") if path.name != ".lock"}

    before = times()
    output = train(copy, "--resume", "--lr", 0.01)
    assert times() == before
    files = [copy / "run-1" / name for name in ("train.csv", "test.csv", *PARAMS)]
    content = b"".join(file.read_bytes() for file in files)
    assert f"(sha256 {hashlib.sha256(content).hexdigest()[:16]})" in output


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


def test_a_run_that_is_still_going_on_cannot_be_resumed(start, go, flags, twin, tmp_path):
    pause = partial(signal.raise_signal, signal.SIGSTOP)
    prepare = partial(act_before, tmp_path, "epoch-02.tmp", 1, pause)
    first = start("main.py", *flags, tmp_path, prepare=prepare)
    table = tmp_path / "run-1" / "test.csv"
    wait_for(lambda: table.exists() and len(rows(table)) == 2)
    assert "[Epoch  2] Average" in first.stdout.read_text()  # Each line is there at once.
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


def test_main_leaves_no_lock_behind(flags, tmp_path, monkeypatch):
    """After an interruption or an error, for example in a notebook, where the process goes on."""
    flags = [str(flag) for flag in (*flags, tmp_path)]
    with monkeypatch.context() as patch:
        patch.setattr(main, "test", lambda *arguments: signal.default_int_handler(2, None))
        with pytest.raises(SystemExit, match="130") as interrupted:
            main.main(flags)
    checkpoint = tmp_path / "run-1" / "checkpoint.pt"
    content = checkpoint.read_bytes()
    checkpoint.write_bytes(content[:1000])
    with pytest.raises(SystemExit, match="missing or damaged") as damaged:
        main.main([*flags, "--resume"])
    checkpoint.write_bytes(content)
    main.main([*flags, "--resume"])
    assert interrupted.tb and damaged.tb  # They keep all objects alive, as a notebook does.


def close_output():
    os.close(1)
    sys.stdout = None


def be_a_notebook():
    """Its output has no `reconfigure`."""
    sys.stdout = SimpleNamespace(write=lambda text: os.write(1, text.encode()), flush=int)


@pytest.mark.parametrize(
    "options", [{"prepare": close_output}, {"prepare": be_a_notebook}, {"environ": {"RANK": "1"}}]
)
def test_unusual_surroundings(options, train, tmp_path):
    # At batch 100, there is something to print beside the progress bar.
    output = train(tmp_path, "--batch-size", 5, "--epochs", 1, **options)
    assert len(rows(tmp_path / "run-1" / "test.csv")) == 1
    assert ("Done in" in output) == (options.get("prepare") != close_output)


def break_pipe():
    """Leaves standard output as it is after `head` in `python main.py | head` has ended."""
    reader, writer = os.pipe()
    os.dup2(writer, 1)
    os.close(reader)


def test_output_into_a_pipe_that_is_closed(go, flags, tmp_path):
    finished = go("main.py", *flags, tmp_path, prepare=break_pipe)
    assert (finished.returncode, finished.stderr) == (1, "")
