"""The README and docs/: every command as it stands, what it says it prints, and the links.

The commands run one after the other in a checkout with a small MNIST, but for those that need a
second machine or a GPU.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import HOME, checksum
from PIL import Image, ImageDraw

import main

README = (HOME / "README.md").read_text()
PAGES = {page: page.read_text() for page in (HOME / "README.md", *sorted(HOME.glob("docs/*.md")))}
ELSEWHERE = re.compile(r"git |rsync|scp|ssh|cd your-repository|tmux|.*cuda\.is_available")
TESTS = "python -m pytest -q tests"  # These are they.
REPLACED = {
    "tests/benchmark.py": "tests/benchmark.py --help",  # It would take half an hour.
    "tail -f": "timeout 1 tail -n +1 -f",  # It would not end.
}


def code_blocks(text, language):
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def commands(text):
    """The commands on a page; one that goes on in the next line ends with &&."""
    lines = "".join(code_blocks(text, "sh")).replace("&&\n", "&& ").splitlines()
    return [line for line in lines if not ELSEWHERE.match(line)]


@pytest.fixture(scope="module")
def checkout(small_mnist, tmp_path_factory):
    """A copy of what git holds, with MNIST in ./data and this Python as its venv."""
    folder = tmp_path_factory.mktemp("checkout")
    listed = subprocess.run(["git", "ls-files"], cwd=HOME, check=True, stdout=subprocess.PIPE)
    for name in listed.stdout.decode().split():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(HOME / name, folder / name)
    shutil.copytree(small_mnist / "MNIST", folder / "data" / "MNIST")
    programs = folder / ".venv" / "bin"
    programs.mkdir(parents=True)
    (programs / "activate").write_text(f'PATH="{programs}:$PATH"\n')
    scripts = {
        "python3": f'[ "$1 $2" = "-m venv" ] || exec "{sys.executable}" "$@"',  # It is there.
        "python": f'exec "{sys.executable}" "$@"',
        "pip": f'exec "{sys.executable}" -m pip "$@" --dry-run',  # Packages stay as they are.
    }
    for name, script in scripts.items():
        (programs / name).write_text(f"#!/bin/bash\n{script}\n")
        (programs / name).chmod(0o755)
    picture = Image.new("L", (280, 320), 255)
    ImageDraw.Draw(picture).line([(80, 60), (200, 60), (130, 260)], fill=20, width=25)
    picture.save(folder / "digit.png")
    return folder


@pytest.fixture(scope="module")
def outputs(checkout, go):
    """What the commands print, by command. Asserts that each ends as it should."""
    environment = os.environ | {"PATH": f"{checkout}/.venv/bin:{os.environ['PATH']}"}
    outputs = {}
    for line in [line for text in PAGES.values() for line in commands(text)]:
        if TESTS in line:
            continue
        command = line
        for part, other in REPLACED.items():
            command = command.replace(part, other)
        if command.startswith("python ") and not re.search("[|&>]", command):  # quicker
            program, *arguments = shlex.split(command)[1:]
            finished = go(checkout / program, *arguments, cwd=checkout)
        else:  # What runs in the background is waited for.
            shell = ["bash", "-c", command.removesuffix("&")]
            options = {"cwd": checkout, "env": environment, "capture_output": True, "text": True}
            finished = subprocess.run(shell, check=False, **options)
        expected = 124 if command.startswith("timeout 1") else 0
        assert finished.returncode == expected, f"{command}\n{finished.stderr}"
        outputs[line] = finished.stdout
    return outputs


def test_the_test_command_is_what_ci_runs():
    assert TESTS in commands(README)
    assert TESTS in (HOME / ".ci" / "run").read_text().splitlines()


def test_every_command_does_what_it_says(checkout, outputs):
    assert "Training LeNet on MNIST" in outputs["tail -f logs/log.out"]
    assert outputs["python predict.py digit.png"].startswith("digit.png: 7 (")
    whole, resumed = (output for line, output in outputs.items() if "| tail" in line)
    assert checksum(whole) == checksum(resumed)
    runs = [checkout / "logs" / f"run-{number}" for number in (1, 2)]
    written = ["curves.png", "logs/small/log.out", "logs/small/run-1/test.csv"]
    written += [next(run for run in runs if (run / "pictures.png").exists()) / "mistakes.png"]
    for name in written:
        assert (checkout / name).stat().st_size > 0, name
    assert any((run / "gradients-train.png").exists() for run in runs)


def test_flags_are_those_of_main():
    table = dict(re.findall(r"^\| `(--[a-z-]+) .*?` \| (\S*) ?\|", README, re.MULTILINE))
    defaults = {
        f"--{name.replace('_', '-')}": value
        for name, value in vars(main.parse_arguments([])).items()
    }
    assert table == {name: "" if value is None else str(value) for name, value in defaults.items()}


def test_functions_are_those_of_main():
    section = README.partition("## Reading the code")[2].partition("## Changing")[0]
    for cell in re.findall(r"^\|[^|]*\| (`.*?) \|", section, re.MULTILINE):
        for name in re.findall(r"`(\w+)`", cell):
            assert hasattr(main, name), name


def test_what_is_shown_and_linked_is_there():
    for page, text in PAGES.items():
        for target in re.findall(r"\]\(([^)]+)\)", text):
            if target.startswith(("http://", "https://", "#")):
                continue
            assert Path(page.parent, target.partition("#")[0]).is_file(), target
