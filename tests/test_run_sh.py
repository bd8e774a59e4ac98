"""run.sh, started as its users start it: a copy of it beside main.py."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
from conftest import HOME, rows, wait_for

# With small_mnist these are ten steps an epoch.
TINY = ("--dataset", "mnist", "--batch-size", "64")


@pytest.fixture
def project(tmp_path):
    """A folder with run.sh and main.py, and a virtual environment that has this Python."""
    folder = tmp_path / "the project"
    (folder / ".venv" / "bin").mkdir(parents=True)
    use_python(folder / ".venv" / "bin", f'exec "{sys.executable}" "$@"')
    for name in ("run.sh", "main.py"):
        shutil.copy(HOME / name, folder)
    return folder


def use_python(folder, script):
    (folder / "python3").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "python3").chmod(0o755)


def print_arguments(folder):
    """Has Python print the GPUs, what it was given, one item a line, and what it can read."""
    use_python(folder, 'printf "%s\\n" "GPUs $CUDA_VISIBLE_DEVICES" "$@"; cat')


def take_hangups():
    """As in a terminal, even if the tests themselves are to survive a dropped connection."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture
def start(project):
    """Starts run.sh in a process group of its own, and leaves nothing running."""
    started = []

    def start(*arguments, shell=(), program=project / "run.sh", **settings):
        env = os.environ | {name: str(value) for name, value in settings.items()}
        options = {name: subprocess.PIPE for name in ("stdin", "stdout", "stderr")}
        options |= {"text": True, "start_new_session": True, "preexec_fn": take_hangups}
        process = subprocess.Popen([*shell, program, *arguments], env=env, cwd="/", **options)
        started.append(process)
        return process

    yield start
    for process in started:
        process.terminate()  # torchrun ends its workers, too
        process.communicate(timeout=40)


def finish(process, status=0):
    """Waits for a run; asserts its exit status, and that it printed nothing."""
    assert (*process.communicate("typed", timeout=60), process.returncode) == ("", "", status)


@pytest.mark.parametrize("how", ["run.sh", "bash run.sh", "sh run.sh", "link"])
def test_from_another_folder(project, start, small_mnist, tmp_path, how):
    (tmp_path / "link").symlink_to(project / "run.sh")
    options = {"program": tmp_path / "link"} if how == "link" else {"shell": how.split()[:-1]}
    finish(start(*TINY, "--epochs", "2", GPUID="", DATADIR=small_mnist, **options))
    log = (project / "logs" / "log.out").read_text()
    assert log.startswith("Training LeNet on MNIST\n")
    for line in ("batch_size:  64", "epochs:  2", "dropout:  0.3", "momentum:  0.9"):
        assert f"   {line}\n" in log
    assert len(rows(project / "logs" / "run-1" / "train.csv")) == 2 * 10


def test_one_log_and_a_resumed_run_under_its_own_flags(project, start, small_mnist):
    flags = (*TINY, "--dropout", "0.4")
    finish(start(*flags, "--resume", "--epochs", "1", GPUID="", DATADIR=small_mnist))
    finish(start("--resume", "--epochs", "2", GPUID=""))
    finish(start(*flags, "--epochs", "2", GPUID="", DATADIR=small_mnist))
    log = (project / "logs" / "log.out").read_text()
    assert "main.py: no run to resume in ./logs: starting one\n" in log
    assert log.count("Training LeNet on MNIST") == log.count("   dropout:  0.4\n") == 3
    ends = re.findall(r"the record is in (\S+) \(sha256 (\w{16})\)", log)
    (first, one_epoch), (resumed, two_epochs), (whole, expected) = ends
    assert first == resumed != whole and one_epoch != two_epochs == expected


@pytest.mark.parametrize("gpus", ["-1", "-1,-1"])  # no such GPUs: on the CPU
def test_hangup_and_kill(start, small_mnist, tmp_path, gpus):
    settings = {"GPUID": gpus, "DATADIR": small_mnist, "LOGDIR": tmp_path / "my logs"}
    log = settings["LOGDIR"] / "log.out"
    process = start(*TINY, "--epochs", "5000", **settings)
    wait_for(lambda: log.exists() and "[Epoch  1]" in log.read_text())
    # As with tail -f: the lines come while it runs.
    os.killpg(process.pid, signal.SIGHUP)
    time.sleep(1)
    seen = log.read_text().count("[Epoch")
    wait_for(lambda: f"[Epoch {seen + 1:2}]" in log.read_text())
    process.terminate()
    process.wait(20)
    # torchrun, which ends its workers, has a status of its own.
    assert process.returncode == (130 if gpus == "-1" else 1)
    assert ("main.py: interrupted; --resume continues" in log.read_text()) == (gpus == "-1")
    command = ["ps", "-eo", "args"]
    left = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert str(settings["LOGDIR"]) not in left
    finish(start("--resume", "--epochs", "1", **settings))  # which is done
    assert "(sha256 " in log.read_text()


@pytest.mark.parametrize(
    "settings, gpus, processes",
    [
        ({}, "0", 1),
        ({"GPUID": ""}, "", 1),
        ({"GPUID": "1,2,5"}, "1,2,5", 3),
    ],
)
def test_gpus_and_flags(project, start, settings, gpus, processes):
    print_arguments(project / ".venv" / "bin")
    finish(start("--lr", "two words", **settings))
    torchrun = ["-m", "torch.distributed.run", f"--nproc-per-node={processes}"]
    torchrun += ["--standalone", "--local-addr=127.0.0.1"]
    flags = "--log-dir ./logs --data ./data --batch-size 128 --dropout 0.3 --momentum 0.9"
    flags = [*flags.split(), "--epochs", "10", "--lr", "two words"]
    lines = (project / "logs" / "log.out").read_text().splitlines()
    assert lines == [f"GPUs {gpus}", "-u", *torchrun * (processes > 1), "main.py", *flags]
    assert (project / "data").is_dir()


@pytest.mark.parametrize("resume", ["--resume", "--resume=old/run-7", "--resume old/run-7"])
@pytest.mark.parametrize("there", [True, False])
@pytest.mark.parametrize("settings", [{}, {"DATADIR": "my data"}])
def test_flags_of_a_run_that_is_there(project, start, resume, there, settings):
    print_arguments(project / ".venv" / "bin")
    run = project / ("logs/run-1" if resume == "--resume" else "old/run-7")
    run.mkdir(parents=True)
    if there:
        (run / "checkpoint.pt").touch()
    finish(start(*resume.split(), **settings))
    given = (project / "logs" / "log.out").read_text()
    assert ("--dropout\n0.3\n" in given) == (not there)
    # A run that is there has a data dir of its own, too, but what is given now wins.
    assert ("--data\n" in given) == (not there or bool(settings))
    assert ("--data\nmy data\n" in given) == bool(settings)
    assert "--log-dir\n./logs\n" in given and "\n--resume" in given


def test_python_on_the_path_without_a_virtual_environment(project, start, tmp_path):
    shutil.rmtree(project / ".venv")
    print_arguments(tmp_path)
    finish(start(PATH=f"{tmp_path}:{os.environ['PATH']}"))
    assert "main.py\n" in (project / "logs" / "log.out").read_text()


def test_errors_are_in_the_log(project, start):
    finish(start("--epochs", "none"), status=2)
    assert "main.py: error: " in (project / "logs" / "log.out").read_text()


@pytest.mark.parametrize("folder, named", [("main.py/x", "main.py"), ("full", "full/log.out")])
def test_no_place_for_the_log(project, start, folder, named):
    print_arguments(project / ".venv" / "bin")
    (project / "full" / "log.out").mkdir(parents=True)  # which no file can replace
    process = start(LOGDIR=folder)
    output, errors = process.communicate(timeout=20)
    assert process.returncode == 1 and output == ""
    assert len(errors.splitlines()) == 1 and named in errors
