"""The README's commands, each run in its place, in a checkout with a small MNIST."""

import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest
from conftest import HOME

README = (HOME / "README.md").read_text()
COMMANDS = [
    line
    for block in re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    for line in block.splitlines()
]
ANOTHER_MACHINE = re.compile(r"ssh|scp|rsync|git |tmux|.*first-host")
TESTS = "python -m pytest -q tests"
REPLACED = {  # minutes, or half an hour; GPUs that may not be there
    "tests/benchmark.py": "tests/benchmark.py --rounds 1 --seeds 1 --epochs 1",
    'GPUID="0,1"': 'GPUID="-1,-1"',
}


@pytest.fixture(scope="module")
def checkout(small_mnist, tmp_path_factory):
    """A copy of what git holds, with MNIST in ./data and this Python as its venv."""
    folder = tmp_path_factory.mktemp("checkout")
    listed = subprocess.run(
        ["git", "ls-files"], cwd=HOME, check=True, capture_output=True, text=True
    )
    for name in listed.stdout.split():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(HOME / name, folder / name)
    shutil.copytree(small_mnist / "MNIST", folder / "data" / "MNIST")
    programs = folder / ".venv" / "bin"
    programs.mkdir(parents=True)
    (programs / "activate").write_text(f'PATH="{programs}:$PATH"\n')
    python = shlex.quote(sys.executable)
    script = f'[ "$1 $2" = "-m venv" ] || exec {python} "$@"'  # the venv is there
    scripts = {"python": script, "python3": script, "pip": f'{python} -m pip "$@"'}
    for program, script in scripts.items():
        (programs / program).write_text(f"#!/bin/bash\n{script}\n")
        (programs / program).chmod(0o755)
    return folder


def shell(checkout, line):
    """Runs a line of the README; what it puts into the background is waited for."""
    environment = os.environ | {"PATH": f"{checkout}/.venv/bin:{os.environ['PATH']}"}
    return subprocess.run(
        ["bash", "-c", line.removesuffix("&")],
        cwd=checkout,
        env=environment,
        capture_output=True,
        check=False,
        text=True,
        timeout=200,
    )


def test_the_test_command_is_what_ci_runs():
    assert TESTS in COMMANDS
    assert TESTS in (HOME / ".ci" / "run").read_text().splitlines()


def test_every_command_does_what_it_says(checkout):
    done = []
    for line in COMMANDS:
        if line == TESTS or ANOTHER_MACHINE.match(line):
            continue
        for part, other in REPLACED.items():
            line = line.replace(part, other)
        if line.startswith("tail -f"):
            line = f"timeout 1 {line}"
        finished = shell(checkout, line)
        assert finished.returncode == (124 if "tail -f" in line else 0), (
            f"{line}\n{finished.stderr}"
        )
        done.append(line)
    assert len(done) >= 14
    logs = checkout / "logs"
    epochs = [line.split(",")[0] for line in (logs / "run-1" / "test.csv").open()]
    assert epochs == ["epoch", *"12345"]  # three, and by --resume two more
    for name in ("run-1/curves.png", "curves.png", "gradients.csv", "small/log.out"):
        assert (logs / name).stat().st_size > 0, name


def test_what_it_shows_and_links_is_there():
    for target in re.findall(r"\]\(([^)]+)\)", README):
        assert target.startswith("http") or (HOME / target).is_file(), target
    assert len(README.splitlines()) <= 250
