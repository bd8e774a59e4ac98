"""The README and docs/: commands, what they print, and links.

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

import pytest
from conftest import HOME, checksum, write_scripts
from PIL import Image, ImageDraw

import main

PAGES = [HOME / "README.md", *sorted(HOME.glob("docs/*.md"))]
TEXT = "\n".join(page.read_text() for page in PAGES)
# Commands for another machine or a GPU, and the one that would run this test again.
ELSEWHERE = re.compile(r"git |rsync|scp|ssh|cd your-repo|tmux|.*cuda\.is_avail|python -m pytest")
REPLACED = {
    "tests/benchmark.py": "tests/benchmark.py --help",  # It would take half an hour.
    "tail -f": "cat",  # It would not end.
    "--epochs 20": "--epochs 4",
    "--schedule cosine": "--schedule cosine --batch-size 4 --epochs 1",  # It prints batch 100.
}


def code_blocks(language):
    blocks = re.findall(rf"^ *```{language}\n(.*?)^ *```", TEXT, re.DOTALL | re.MULTILINE)
    return [textwrap.dedent(block) for block in blocks]


@pytest.fixture(scope="module")
def checkout(small_mnist, tmp_path_factory):
    """A copy of the project, with MNIST in ./data and this Python as its virtual environment."""
    folder = tmp_path_factory.mktemp("copy") / "Übung 1"
    others = shutil.ignore_patterns(".git", ".venv", "data", "logs", "shared", "*cache*")
    shutil.copytree(HOME, folder, ignore=others)
    shutil.copytree(small_mnist / "MNIST", folder / "data" / "MNIST")
    scripts = {
        "activate": "",
        "python3": f'[ "$1 $2" = "-m venv" ] || exec "{sys.executable}" "$@"',  # It is there.
        "python": f'exec "{sys.executable}" "$@"',
        "pip": "",  # The packages are there.
    }
    write_scripts(folder / ".venv" / "bin", scripts)
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
    # These commands continue on the next line.
    lines = "".join(code_blocks("sh")).replace("&&\n", "&& ").replace("&\nwhile", "& while")
    for line in [line for line in lines.splitlines() if not ELSEWHERE.match(line)]:
        command = line
        for part, other in REPLACED.items():
            command = command.replace(part, other)
        if command.startswith("python ") and not re.search("[|&>]", command):  # quicker
            program, *arguments = shlex.split(command)[1:]
            finished = go(checkout / program, *arguments, cwd=checkout)
        else:  # Without the & at its end, a command is waited for.
            shell = ["bash", "-c", command.removesuffix("&")]
            finished = subprocess.run(shell, check=False, **options)
        assert finished.returncode == 0, f"{command}\n{finished.stderr}"
        outputs[line] = finished.stdout
    return outputs


def test_every_command_does_what_it_says(checkout, outputs):
    assert "Training LeNet on MNIST" in outputs["tail -f logs/log.out"]
    assert outputs["python predict.py --run logs/run-1 digit.png"].startswith("digit.png: 7 (")
    whole, resumed = (output for line, output in outputs.items() if "| tail" in line)
    assert checksum(whole) == checksum(resumed)
    assert len(list(checkout.glob("logs/killed/run-*"))) == 1  # It was killed, and it was resumed.
    files = ["curves.png", "logs/small/run-1/test.csv", "logs/run-*/curves.png"]
    drawn = ["gradients.png", "gradients-train.png", "mistakes.png", "pictures.png"]
    for pattern in (*files, *(f"logs/run-1/{name}" for name in drawn)):
        assert list(checkout.glob(pattern)), pattern


def test_python_on_the_page_runs(checkout, outputs):
    for block in code_blocks("python"):
        subprocess.run([sys.executable, "-c", block], cwd=checkout, check=True)


def test_shown_outputs_and_columns_are_those_of_main(checkout, outputs):
    def without_numbers(line):
        return re.sub(r"\b[0-9a-f]{16}\b|[\d.]+", "0", " ".join(line.split()))

    programs = ["python main.py --schedule cosine", "python gradients.py logs/run-1"]
    printed = "".join(outputs[program] for program in programs).splitlines()
    printed = [without_numbers(line) for line in printed]
    shown = "".join(code_blocks("text")).splitlines()
    assert len(shown) > 5
    for line in shown:
        assert line.strip() == "..." or without_numbers(line) in printed, line
    columns = dict(re.findall(r"`(t\w+\.csv)`.*?`(\w+(?:,\w+)+)`", TEXT))
    for name in ("train.csv", "test.csv"):
        assert (checkout / "logs" / "run-1" / name).read_text().startswith(columns[name] + "\n")


def test_what_is_named_and_linked_is_there():
    table = TEXT.partition("| the guide | `main.py` |")[2].partition("\n\n")[0]
    names = re.findall(r"`(\w+)`", table)
    assert len(names) > 5 and all(hasattr(main, name) for name in names)
    for page in PAGES:
        for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
            if not target.startswith(("http://", "https://", "#")):
                assert (page.parent / target.partition("#")[0]).is_file(), target
