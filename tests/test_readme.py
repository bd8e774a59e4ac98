"""The README and docs/: the commands as they stand, what they are said to print, and the links.

The commands run one after the other in a copy of the project with a small MNIST, except those
that need a second machine or a GPU.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from conftest import HOME, checksum
from PIL import Image, ImageDraw

import main

README = (HOME / "README.md").read_text()
PAGES = {page: page.read_text() for page in (HOME / "README.md", *sorted(HOME.glob("docs/*.md")))}
ELSEWHERE = re.compile(r"git |rsync|scp|ssh|cd your-repository|tmux|.*cuda\.is_available")
TESTS = "python -m pytest -q tests"  # It would run this test again.
REPLACED = {
    "tests/benchmark.py": "tests/benchmark.py --help",  # It would take half an hour.
    "tail -f": "timeout 1 tail -n +1 -f",  # It would not end.
    "--epochs 20": "--epochs 8",
    "sleep 5": "sleep 2",
    "pip install torch torchvision --index-url https://download.pytorch.org/whl/cpu": "true",
}
# What is not part of the project.
LEFT_OUT = shutil.ignore_patterns(".git", ".venv", "data", "logs", "shared", "*cache*")


def code_blocks(text, language):
    blocks = re.findall(rf"^ *```{language}\n(.*?)^ *```", text, re.DOTALL | re.MULTILINE)
    return [textwrap.dedent(block) for block in blocks]


def commands(text):
    """The commands on a page. One that continues on the next line ends with &&."""
    lines = "".join(code_blocks(text, "sh")).replace("&&\n", "&& ").splitlines()
    return [line for line in lines if not ELSEWHERE.match(line)]


def write_script(path, script):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/bash\n{script}\n")
    path.chmod(0o755)


@pytest.fixture(scope="module")
def checkout(small_mnist, tmp_path_factory):
    """A copy of the project, with MNIST in ./data and this Python as its virtual environment."""
    folder = tmp_path_factory.mktemp("copy") / "Übung 1"
    shutil.copytree(HOME, folder, ignore=LEFT_OUT)
    shutil.copytree(small_mnist / "MNIST", folder / "data" / "MNIST")
    programs = folder / ".venv" / "bin"
    scripts = {
        "activate": f'PATH="{programs}:$PATH"',
        "python3": f'[ "$1 $2" = "-m venv" ] || exec "{sys.executable}" "$@"',  # It is there.
        "python": f'exec "{sys.executable}" "$@"',
        "pip": f'exec "{sys.executable}" -m pip "$@" --dry-run',  # Packages stay as they are.
    }
    for name, script in scripts.items():
        write_script(programs / name, script)
    picture = Image.new("L", (280, 320), 255)
    ImageDraw.Draw(picture).line([(80, 60), (200, 60), (130, 260)], fill=20, width=25)
    picture.save(folder / "digit.png")
    return folder


@pytest.fixture(scope="module")
def outputs(checkout, go):
    """What the commands print, by command. Asserts that each of them succeeds."""
    environment = os.environ | {"PATH": f"{checkout}/.venv/bin:{os.environ['PATH']}"}
    options = {"cwd": checkout, "env": environment, "capture_output": True, "text": True}
    outputs = {}
    for line in [line for text in PAGES.values() for line in commands(text) if line != TESTS]:
        command = line
        for part, other in REPLACED.items():
            command = command.replace(part, other)
        if command.startswith("python ") and not re.search("[|&>]", command):  # quicker
            program, *arguments = shlex.split(command)[1:]
            finished = go(checkout / program, *arguments, cwd=checkout)
        else:  # Without the & at its end, a command is waited for.
            shell = ["bash", "-c", command.removesuffix("&")]
            finished = subprocess.run(shell, check=False, **options)
        expected = 124 if command.startswith("timeout 1") else 0
        assert finished.returncode == expected, f"{command}\n{finished.stderr}"
        outputs[line] = finished.stdout
    return outputs


def test_every_command_does_what_it_says(checkout, outputs):
    assert "Training LeNet on MNIST" in outputs["tail -f logs/log.out"]
    assert outputs["python predict.py --run logs/run-1 digit.png"].startswith("digit.png: 7 (")
    whole, resumed = (output for line, output in outputs.items() if "| tail" in line)
    assert checksum(whole) == checksum(resumed)
    files = ["curves.png", "logs/small/run-1/test.csv", "logs/run-*/curves.png"]
    drawn = ["gradients.png", "gradients-train.png", "mistakes.png", "pictures.png"]
    for pattern in (*files, *(f"logs/run-1/{name}" for name in drawn)):
        assert list(checkout.glob(pattern)), pattern


def test_python_on_the_page_runs(checkout, outputs):
    for block in code_blocks(README, "python"):
        subprocess.run([sys.executable, "-c", block], cwd=checkout, check=True)
    assert (checkout / "loss.png").exists()


def test_shown_outputs_and_columns_are_those_of_main(checkout, outputs, go):
    def without_numbers(line):
        return re.sub(r"\b[0-9a-f]{16}\b|[\d.]+", "0", " ".join(line.split()))

    # A training loss is printed every 100 steps.
    finished = go(checkout / "main.py", "--batch-size", 4, "--epochs", 1, cwd=checkout)
    printed = finished.stdout + outputs["python gradients.py logs/run-1"]
    printed = [without_numbers(line) for line in printed.splitlines()]
    shown = [line for line in "".join(code_blocks(README, "text")).splitlines() if line.strip()]
    assert len(shown) > 5
    for line in shown:
        assert line.strip() == "..." or without_numbers(line) in printed, line
    run = checkout / re.search(r"record is in (\S+)", finished.stdout)[1]
    columns = dict(re.findall(r"`(t\w+\.csv)`.*?`(\w+(?:,\w+)+)`", README))
    for name in ("train.csv", "test.csv"):
        assert (run / name).read_text().startswith(columns[name] + "\n")


def test_functions_are_those_of_main():
    table = README.partition("| the guide | `main.py` |")[2].partition("\n\n")[0]
    cells = [line.split("|")[2] for line in table.splitlines()[2:]]
    names = re.findall(r"`(\w+)`", " ".join(cells))
    assert {"train", "test", "run"} <= set(names)
    assert all(hasattr(main, name) for name in names)


def test_what_is_shown_and_linked_is_there():
    for page, text in PAGES.items():
        for target in re.findall(r"\]\(([^)]+)\)", text):
            if not target.startswith(("http://", "https://", "#")):
                assert Path(page.parent, target.partition("#")[0]).is_file(), target


@pytest.mark.parametrize("failing", ["format", "check", None])
def test_ci_runs_the_tests_unless_lint_fails(failing, tmp_path):
    """With stand-ins for the programs, and MNIST where it is during development."""
    project = tmp_path / "project"
    (project / ".ci").mkdir(parents=True)
    shutil.copy(HOME / ".ci" / "run", project / ".ci")
    (tmp_path / "shared" / "data" / "MNIST" / "raw").mkdir(parents=True)
    scripts = {"python3": ":", "pip": ":", "ruff": f'[ "$1" != {failing} ]'}
    scripts["python"] = 'echo "python $*, $MNIST_DIR" > tested'
    for name, script in scripts.items():
        write_script(project / ".venv" / "bin" / name, script)
    environment = {"PATH": f"{project}/.venv/bin:{os.environ['PATH']}"}
    finished = subprocess.run([project / ".ci" / "run"], env=environment, check=False)
    assert (finished.returncode == 0) == (project / "tested").exists() == (failing is None)
    if failing is None:
        assert (project / "tested").read_text() == f"{TESTS}, {tmp_path}/shared/data\n"
    assert TESTS in commands(README)
