"""run.sh, started as its users start it: a copy of it, with this Python on the PATH."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import HOME, rows, wait_for

# With small_mnist these are ten steps an epoch.
TINY = ("--dataset", "mnist", "--batch-size", "64")


@pytest.fixture
def project(tmp_path):
    folder = tmp_path / "the project"
    folder.mkdir()
    for name in ("run.sh", "main.py"):
        shutil.copy(HOME / name, folder)
    return folder


@pytest.fixture
def start(project):
    """Starts run.sh in a process group of its own, and leaves nothing running."""
    started = []

    def start(*arguments, path=Path(sys.executable).parent, cwd="/", **settings):
        names = ("GPUID", "LOGDIR", "DATADIR", "PYTHON")
        env = {k: v for k, v in os.environ.items() if k not in names}
        env["PATH"] = f"{path}{os.pathsep}{env['PATH']}"
        env |= {k: str(v) for k, v in settings.items()}
        command = [project / "run.sh", *arguments]
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        process = subprocess.Popen(
            command, env=env, cwd=cwd, start_new_session=True, **options
        )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            process.terminate()  # torchrun ends its workers, too
            try:
                process.wait(40)
            except subprocess.TimeoutExpired:
                process.kill()
        process.communicate()


@pytest.fixture
def stand_in(tmp_path):
    """A folder with a `python` that prints what it was given, one item a line."""
    folder = tmp_path / "bin"
    folder.mkdir()
    python = folder / "python"
    python.write_text('#!/bin/sh\nprintf "%s\\n" "GPUs $CUDA_VISIBLE_DEVICES" "$@"\n')
    python.chmod(0o755)
    return folder


def finish(process, status=0):
    """Waits for a run; asserts its exit status, and that it printed nothing."""
    output = process.communicate(timeout=60)
    assert (process.returncode, *output) == (status, "", "")


def wait_for_line(text, log, process):
    """Waits until the text is in the log of a run that goes on."""

    def is_there():
        content = log.read_text() if log.exists() else "no log"
        assert process.poll() is None, content
        return text in content

    wait_for(is_there)


def test_from_another_folder(project, start, small_mnist, tmp_path):
    finish(start(*TINY, "--epochs", "2", cwd=tmp_path, DATADIR=small_mnist))
    lines = (project / "logs" / "log.out").read_text().splitlines()
    assert lines[0] == "Training LeNet on MNIST"
    settings = dict(line.split(":  ") for line in lines if ":  " in line)
    settings = {name.strip(): value for name, value in settings.items()}
    assert settings["batch_size"] == "64" and settings["epochs"] == "2"  # the user's
    assert settings["dropout"] == "0.3" and settings["momentum"] == "0.9"
    assert sum("Average test loss" in line for line in lines) == 2
    assert len(rows(project / "logs" / "train.csv")) == 2 * 10
    assert (project / "data").exists() is False  # DATADIR was given
    assert sorted(path.name for path in tmp_path.iterdir()) == ["the project"]


@pytest.mark.parametrize("gpus", ["-1", "-1,-1"])  # no such GPUs: on the CPU
def test_hangup_and_kill(start, small_mnist, tmp_path, gpus):
    settings = {"GPUID": gpus, "DATADIR": small_mnist, "LOGDIR": tmp_path / "my logs"}
    log = settings["LOGDIR"] / "log.out"
    process = start(*TINY, "--epochs", "5000", **settings)
    wait_for_line("[Epoch  1]", log, process)
    # As with tail -f: the lines come while it runs, which wait_for_line asserts.
    os.killpg(process.pid, signal.SIGHUP)
    time.sleep(1)
    seen = log.read_text().count("[Epoch")
    wait_for_line(f"[Epoch {seen + 1:2}]", log, process)
    process.terminate()
    process.wait(20)
    # torchrun, which ends its workers, has a status of its own
    assert process.returncode == (143 if gpus == "-1" else 1)
    content = log.read_text()
    assert "main.py: interrupted; " in content and "--resume" in content
    command = ["ps", "-eo", "args"]
    left = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert str(settings["LOGDIR"]) not in left


def test_two_processes_complete(start, small_mnist, tmp_path):
    settings = {"GPUID": "-1,-1", "DATADIR": small_mnist, "LOGDIR": tmp_path / "logs"}
    finish(start(*TINY, "--epochs", "1", **settings))
    content = (tmp_path / "logs" / "log.out").read_text()
    for line in ("Training LeNet on MNIST", "[Epoch  1] Average"):
        assert content.count(line) == 1, content
    train = rows(tmp_path / "logs" / "train.csv")
    assert [int(row["step"]) for row in train] == list(range(1, 11))
    assert len(rows(tmp_path / "logs" / "test.csv")) == 1
    params = sorted(path.name for path in (tmp_path / "logs" / "params").iterdir())
    assert params == ["epoch-00.pkl", "epoch-01.pkl"]
    assert (tmp_path / "logs" / "checkpoint.pt").exists()


@pytest.mark.parametrize(
    "settings, gpus, processes",
    [
        ({}, "0", 1),
        ({"GPUID": "3"}, "3", 1),
        ({"GPUID": ""}, "", 1),
        ({"GPUID": "0,1"}, "0,1", 2),
        ({"GPUID": "1,2,5"}, "1,2,5", 3),
    ],
)
def test_gpus(project, start, stand_in, settings, gpus, processes):
    finish(start("--lr", "two words", path=stand_in, **settings))
    torchrun = ["-m", "torch.distributed.run", "--standalone"]
    torchrun += [f"--nproc-per-node={processes}"]
    flags = "--data-dir ./data --log-dir ./logs --batch-size 128 --dropout 0.3"
    flags = [*flags.split(), "--momentum", "0.9", "--epochs", "10", "--lr", "two words"]
    lines = (project / "logs" / "log.out").read_text().splitlines()
    assert lines[:2] == [f"GPUs {gpus}", "-u"]
    assert lines[2:] == torchrun * (processes > 1) + ["main.py", *flags]
    assert (project / "data").is_dir()


def test_earlier_logs_are_kept(project, start, stand_in):
    for seed in "123":
        finish(start("--seed", seed, path=stand_in))
    logs = [project / "logs" / name for name in ("log-1.out", "log-2.out", "log.out")]
    assert [log.read_text().splitlines()[-1] for log in logs] == ["1", "2", "3"]
    assert sorted((project / "logs").glob("[!.]*")) == logs


@pytest.fixture
def waiting(tmp_path):
    """A folder with a `python` that trains until it is killed."""
    folder = tmp_path / "waiting"
    folder.mkdir()
    python = folder / "python"
    python.write_text("#!/bin/sh\necho training\nexec sleep 1000\n")
    python.chmod(0o755)
    return folder


def test_a_second_run_leaves_the_log_of_the_first_alone(
    project, start, stand_in, waiting, tmp_path
):
    log = project / "logs" / "log.out"
    first = start(path=waiting)
    wait_for_line("training", log, first)
    second = start(path=stand_in)
    output, errors = second.communicate(timeout=20)
    assert second.returncode == 1 and output == ""
    (line,) = errors.splitlines()
    assert line.startswith("run.sh: another run is using LOGDIR=./logs")
    assert [path.name for path in log.parent.glob("*.out")] == ["log.out"]
    assert log.read_text() == "training\n"
    finish(start(path=stand_in, LOGDIR=tmp_path / "other"))
    first.kill()  # After which nothing holds the lock.
    first.wait()
    finish(start(path=stand_in))
    assert (log.parent / "log-1.out").read_text() == "training\n"


def test_where_there_is_no_flock(project, start, stand_in, tmp_path):
    """As on macOS: it goes on."""
    programs = ("bash", "sh", "dirname", "readlink", "mkdir", "mv")
    for name in programs:
        (stand_in / name).symlink_to(shutil.which(name))
    for _ in range(2):
        finish(start(PATH=stand_in))
    logs = sorted(path.name for path in (project / "logs").glob("*.out"))
    assert logs == ["log-1.out", "log.out"]


def test_errors_are_in_the_log(project, start):
    finish(start("--epochs", "none"), status=2)
    assert "main.py: error: " in (project / "logs" / "log.out").read_text()


def test_no_python(project, start):
    finish(start(PYTHON="no-such-python"), status=127)
    assert "no-such-python: not found" in (project / "logs" / "log.out").read_text()


@pytest.mark.parametrize("name", ["LOGDIR", "DATADIR"])
def test_no_folder(project, start, name):
    process = start(**{name: "main.py/folder"})
    output, errors = process.communicate(timeout=20)
    assert process.returncode == 1 and output == ""
    assert len(errors.splitlines()) == 1 and "main.py" in errors
    assert not (project / "logs" / "log.out").exists()
