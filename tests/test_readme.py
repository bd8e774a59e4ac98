"""The README and docs/: every command as it stands, what it says it prints, and the links.

The commands run one after the other in a copy of the project with a small MNIST, but for those
that need a second machine or a GPU.
"""

import ast
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
TESTS = "python -m pytest -q tests"  # These are they.
REPLACED = {
    "tests/benchmark.py": "tests/benchmark.py --help",  # It would take half an hour.
    "tail -f": "timeout 1 tail -n +1 -f",  # It would not end.
    "pip install torch torchvision --index-url https://download.pytorch.org/whl/cpu": "true",
}
# What is not of the project: created in a clone, and what other programs say.
LEFT_OUT = shutil.ignore_patterns(".git", ".venv", "data", "logs", "shared", "*cache*")
FOREIGN = re.compile(r"No module named|ensurepip|pip|visdom|torchvision::|cuda:")


def code_blocks(text, language):
    blocks = re.findall(rf"^ *```{language}\n(.*?)^ *```", text, re.DOTALL | re.MULTILINE)
    return [textwrap.dedent(block) for block in blocks]


def commands(text):
    """The commands on a page; one that goes on in the next line ends with &&."""
    lines = "".join(code_blocks(text, "sh")).replace("&&\n", "&& ").splitlines()
    return [line for line in lines if not ELSEWHERE.match(line)]


def write_script(path, script):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/bash\n{script}\n")
    path.chmod(0o755)


@pytest.fixture(scope="module")
def checkout(small_mnist, tmp_path_factory):
    """A copy of the project, with MNIST in ./data and this Python as its venv."""
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


def test_every_command_does_what_it_says(checkout, outputs):
    assert "Training LeNet on MNIST" in outputs["tail -f logs/log.out"]
    assert outputs["python predict.py --run logs/run-1 digit.png"].startswith("digit.png: 7 (")
    whole, resumed = (output for line, output in outputs.items() if "| tail" in line)
    assert checksum(whole) == checksum(resumed)
    drawn = ["curves.png", "gradients.png", "gradients-train.png", "mistakes.png", "pictures.png"]
    drawn = [f"logs/run-1/{name}" for name in drawn]
    for name in ["curves.png", "logs/small/run-1/test.csv", *drawn]:
        assert (checkout / name).stat().st_size > 0, name


def test_python_on_the_page_runs(checkout, outputs):
    for block in code_blocks(README, "python"):
        subprocess.run([sys.executable, "-c", block], cwd=checkout, check=True)
    assert (checkout / "loss.png").exists()


def test_shown_outputs_and_columns_are_those_of_main(checkout, outputs, go):
    def without_numbers(line):
        return re.sub(r"\b[0-9a-f]{16}\b|[\d.]+", "0", " ".join(line.split()))

    # As many steps as it takes for a training loss to be printed.
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


def texts_of_functions():
    """For each function of the programs, the words of all its texts but the docstring."""
    for program in HOME.glob("*.py"):
        for function in ast.walk(ast.parse(program.read_text())):
            if isinstance(function, ast.FunctionDef):
                parts = [part for line in function.body[1:] for part in ast.walk(line)]
                texts = [part.value for part in parts if isinstance(part, ast.Constant)]
                yield set(re.findall("[a-z-]+", " ".join(map(str, texts)).lower()))


def test_quoted_messages_are_in_the_programs():
    """The words of each are all in the texts of one function."""
    texts = list(texts_of_functions())
    section = README.partition("## If something goes wrong")[2].partition("\n## ")[0]
    cells = re.findall(r"^\| (.*?) \|", section, re.MULTILINE)
    quoted = re.findall("`([^`]+)`", "\n".join(cells))
    messages = [text for text in quoted if not FOREIGN.search(text)]
    assert messages
    for message in messages:
        # Paths, numbers and `nan` are put in when it is printed.
        words = re.sub(r"main\.py: error:|\S+/\S+|\bnan\b", "", message).lower()
        words = set(re.findall("[a-z-]+", words))
        assert words and any(words <= text for text in texts), message


def test_functions_are_those_of_main():
    table = re.search(r"^\|[^|]*\| `main.py` \|.*?\n\n", README, re.MULTILINE | re.DOTALL)[0]
    names = re.findall(
        r"`(\w+)`", " ".join(re.findall(r"^\|[^|]*\| (`.*?) \|", table, re.MULTILINE))
    )
    assert {"train", "test", "run"} <= set(names)
    assert [name for name in names if not hasattr(main, name)] == []


def test_what_is_shown_and_linked_is_there():
    for page, text in PAGES.items():
        for target in re.findall(r"\]\(([^)]+)\)", text):
            if target.startswith(("http://", "https://", "#")):
                continue
            assert Path(page.parent, target.partition("#")[0]).is_file(), target


@pytest.mark.parametrize(
    "lint, given, known, expected",
    [
        ("true", None, True, "/shared/data"),
        ("true", "/mine", True, "/mine"),
        ("true", None, False, ""),
        ('[ "$1" != format ]', None, True, None),
        ('[ "$1" != check ]', None, True, None),
    ],
)
def test_ci_runs_the_tests_unless_lint_fails(lint, given, known, expected, tmp_path):
    """With stand-ins for the programs; they say where the tests look for MNIST."""
    ci = tmp_path / "project" / ".ci" / "run"
    ci.parent.mkdir(parents=True)
    shutil.copy(HOME / ".ci" / "run", ci)
    programs = ci.parent.parent / ".venv" / "bin"
    stand_ins = {"python3": ":", "pip": ":", "ruff": lint, "python": 'echo "$*:$MNIST_DIR" >tested'}
    for name, script in stand_ins.items():
        write_script(programs / name, script)
    if known:
        (tmp_path / "shared" / "data" / "MNIST" / "raw").mkdir(parents=True)
    environment = {"PATH": f"{programs}:{os.environ['PATH']}"}
    if given:
        environment["MNIST_DIR"] = given
    finished = subprocess.run([ci], env=environment, capture_output=True, check=False)
    tested = ci.parent.parent / "tested"
    assert (finished.returncode == 0) == tested.exists() == (expected is not None)
    if expected is not None:
        where = f"{tmp_path}{expected}" if expected == "/shared/data" else expected
        assert tested.read_text() == f"{TESTS.removeprefix('python ')}:{where}\n"
    assert TESTS in commands(README)
