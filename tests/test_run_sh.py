"""run.sh, started as its users start it: a copy of it beside main.py."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
from conftest import HOME, wait_for, write_scripts

# Prints the GPUs, the arguments, one a line, and what there is on standard input; then it fails.
STAND_IN = 'printf "%s\\n" "GPUs $CUDA_VISIBLE_DEVICES" "$@"; cat; echo failed >&2; exit 3'


@pytest.fixture
def project(tmp_path):
    """A folder with run.sh, main.py, and a virtual environment with a stand-in for Python."""
    folder = tmp_path / "the project"
    write_scripts(folder / ".venv" / "bin", {"python3": STAND_IN})
    for name in ("run.sh", "main.py"):
        shutil.copy(HOME / name, folder)
    return folder


@pytest.fixture
def start(project):
    """Starts run.sh in a process group of its own, and leaves nothing running."""
    started = []
    # If nohup made the tests ignore hangups, run.sh would, too; a handler is not inherited.
    before = signal.signal(signal.SIGHUP, lambda *_: None)

    def start(*arguments, command=("the project/run.sh",), cwd=project.parent, **settings):
        environ = {name: os.environ[name] for name in os.environ if not name.startswith("CUDA")}
        process = subprocess.Popen(
            [*command, *arguments],
            env=environ | {name: str(value) for name, value in settings.items()},
            cwd=cwd,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.terminate()  # torchrun ends its workers, too
        process.communicate(timeout=40)
    signal.signal(signal.SIGHUP, before)


def finish(process, status=3, message=""):
    """Waits for a run; asserts its exit status, and what it printed on the terminal."""
    output, _ = process.communicate("typed", timeout=60)
    assert process.returncode == status and re.fullmatch(message, output), output


@pytest.mark.parametrize(
    "command, settings, gpus, processes",
    [
        (["the project/run.sh"], {}, "0", 1),
        (["./link"], {"GPUID": "1,2,5", "CUDA_VISIBLE_DEVICES": "0"}, "1,2,5", 3),
        (["sh", "the project/run.sh"], {"GPUID": "", "CUDA_VISIBLE_DEVICES": "0"}, "", 1),
        # What a batch system has set stays: another GPU, none, or one by its name.
        (["the project/run.sh"], {"CUDA_VISIBLE_DEVICES": "1"}, "1", 1),
        (["the project/run.sh"], {"CUDA_VISIBLE_DEVICES": ""}, "", 1),
        (
            ["the project/run.sh"],
            {"CUDA_VISIBLE_DEVICES": "GPU-8932f937-d72c"},
            *["GPU-8932f937-d72c", 1],
        ),
    ],
)
def test_what_python_is_given(project, start, tmp_path, command, settings, gpus, processes):
    (tmp_path / "link").symlink_to(project / "run.sh")
    torchrun = ["-m", "torch.distributed.run", f"--nproc-per-node={processes}"]
    torchrun += ["--standalone", "--local-addr=127.0.0.1"]
    flags = "--log-dir ./logs --batch-size 128 --dropout 0.3 --momentum 0.9 --epochs 10 --lr"
    flags = [*flags.split(), "two words"]
    lines = [f"GPUs {gpus}", "-u", *torchrun * (processes > 1), "main.py", *flags, "failed"]
    for count in (1, 2):  # One log has what all runs print.
        finish(start("--lr", "two words", command=command, **settings))
        assert (project / "logs" / "log.out").read_text().splitlines() == lines * count


def test_a_copy_that_a_batch_system_starts(project, start, tmp_path):
    """It runs where it was submitted, and nowhere else than beside a main.py."""
    spool = tmp_path / "spool"
    spool.mkdir()
    shutil.copy(project / "run.sh", spool / "job")
    message = f"run.sh: error: there is no main.py beside it, or in {tmp_path}\n"
    finish(start(command=["spool/job"]), 1, re.escape(message))
    finish(start(command=["spool/job"], SLURM_SUBMIT_DIR=project))
    finish(start(command=[spool / "job"], cwd=project))
    assert (project / "logs" / "log.out").read_text().count("main.py") == 2
    assert [path.name for path in spool.iterdir()] == ["job"]


@pytest.mark.parametrize("flag", ["--log-dir=logs/b", "--log-dir logs/b"])
def test_the_log_dir_is_set_before_the_command(project, start, flag):
    message = "run.sh: error: instead of --log-dir, put LOGDIR=FOLDER before the command\n"
    finish(start("--resume", *flag.split()), 2, message)
    assert not (project / "logs").exists()


@pytest.mark.parametrize("gpus", ["-1", "-1,-1"])  # no such GPUs: on the CPU
def test_hangup_and_kill(project, start, small_mnist, tmp_path, gpus):
    write_scripts(project / ".venv" / "bin", {"python3": f'exec "{sys.executable}" "$@"'})
    settings = {"GPUID": gpus, "DATADIR": small_mnist, "LOGDIR": tmp_path / "my logs"}
    log = settings["LOGDIR"] / "log.out"
    process = start("--epochs", "5000", **settings)
    wait_for(lambda: log.exists() and "[Epoch  1]" in log.read_text())
    os.killpg(process.pid, signal.SIGHUP)
    time.sleep(1)
    seen = log.read_text().count("[Epoch")
    wait_for(lambda: f"[Epoch {seen + 1:2}]" in log.read_text())
    process.terminate()
    # torchrun, which ends its workers, has a status of its own.
    assert process.wait(20) == (130 if gpus == "-1" else 1)
    assert ("main.py: interrupted; --resume continues" in log.read_text()) == (gpus == "-1")
    left = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True)
    assert str(settings["LOGDIR"]) not in left.stdout
    finish(start("--resume", "--epochs", "1", **settings), 0)  # which is done
    assert "(sha256 " in log.read_text()


@pytest.mark.parametrize("resume", ["--resume", "--resume=old/run-7", "--resume old/run-7"])
@pytest.mark.parametrize("there", [True, False])
def test_flags_of_a_run_that_is_there(project, start, resume, there):
    run = project / ("logs/run-1" if resume == "--resume" else "old/run-7")
    run.mkdir(parents=True)
    if there:
        (run / "checkpoint.pt").touch()
    finish(start(*resume.split(), DATADIR="my data"))
    given = (project / "logs" / "log.out").read_text()
    assert ("--dropout\n0.3\n" in given) == (not there)
    assert "--log-dir\n./logs\n" in given and "--data\nmy data\n" in given
    assert "\n".join(resume.split()) in given


def test_cron(project, start, tmp_path):
    """Python on the path, without a virtual environment, and with nothing else set."""
    shutil.rmtree(project / ".venv")
    write_scripts(tmp_path, {"python3": STAND_IN})
    bare = ["env", "-i", f"PATH={tmp_path}:/usr/bin:/bin", "sh", "-c", "'the project/run.sh'"]
    finish(start(command=bare))
    assert (project / "logs" / "log.out").read_text().startswith("GPUs 0\n")
