"""The README and docs/: every command as it stands, the example, and the links.

The commands run one after the other in a checkout with a small MNIST, but for those that
need a second machine or a GPU. Those that start with `python NAME.py` are forked from a
process that has PyTorch loaded, all others are run by a shell.
"""

import multiprocessing
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
from conftest import HOME, rows
from PIL import Image, ImageDraw

README = (HOME / "README.md").read_text()
PAGES = {HOME / "README.md": README}
PAGES |= {page: page.read_text() for page in sorted(HOME.glob("docs/*.md"))}
ANOTHER_MACHINE = re.compile(
    r"git |rsync|scp|ssh|tmux|cd your-repository|.*first-host|.*cuda\.is_available"
)
TWO_GPUS = 'GPUID="0,1"'  # What run.sh does then is tested in test_run_sh.py.
TESTS = "python -m pytest -q tests"  # These are they.
REPLACED = {
    # With its defaults it would take an hour.
    "tests/benchmark.py": "tests/benchmark.py --pairs 1 --seeds 1 --epochs 2",
    # It would not end.
    "tail -f": "timeout 1 tail -n +1 -f",
}
TIMED_OUT = 124  # the exit status of `timeout`

# The lines of ten digits, in a field that is 100 wide and 150 high, as points "x,y".
DIGITS = {
    0: ["50,0 15,20 0,75 15,130 50,150 85,130 100,75 85,20 50,0"],
    1: ["52,0 48,150"],
    2: ["5,35 25,5 65,0 95,30 85,65 5,148 100,145"],
    3: ["10,15 50,0 90,20 85,50 40,70 90,90 95,125 50,150 5,135"],
    4: ["30,0 5,85 100,80", "75,20 65,150"],
    5: ["90,5 20,8 12,65 60,58 95,95 70,140 30,150 0,135"],
    6: ["75,0 30,35 5,100 25,145 65,145 85,110 60,80 15,105"],
    7: ["0,8 95,0 60,70 40,150"],
    8: ["80,20 50,0 20,20 25,50 85,105 75,140 40,150 10,130 20,100 75,50 80,20"],
    9: ["85,30 55,0 15,20 12,55 45,75 80,55 85,30 70,150"],
}


def code_blocks(text, language):
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def commands(text):
    return [line for block in code_blocks(text, "sh") for line in block.splitlines()]


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
    scripts = {
        # The virtual environment is there.
        "python3": f'[ "$1 $2" = "-m venv" ] || exec "{sys.executable}" "$@"',
        "python": f'exec "{sys.executable}" "$@"',
        # The packages that the tests run with stay as they are.
        "pip": f'exec "{sys.executable}" -m pip "$@" --dry-run',
    }
    for name, script in scripts.items():
        (programs / name).write_text(f"#!/bin/bash\n{script}\n")
        (programs / name).chmod(0o755)
    return folder


def run_in_a_shell(checkout, line):
    """Runs a command as it stands; what it puts into the background is waited for."""
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


def run_forked(checkout, line):
    """Runs `python NAME.py ...` as a shell would, but in a forked process."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["conftest", "pandas", "torch._dynamo"])
    output = checkout / "output"
    errors = checkout / "errors"
    with pytest.MonkeyPatch.context() as patch:  # for the fork server's own start
        patch.setenv("PYTHONPATH", str(HOME / "tests"))
        process = context.Process(
            target=be_python, args=(checkout, shlex.split(line)[1:], output, errors)
        )
        process.start()
    process.join(200)
    return SimpleNamespace(
        returncode=process.exitcode,
        stdout=output.read_text(),
        stderr=errors.read_text(),
    )


def be_python(folder, arguments, output, errors):
    """Does in this process, in a folder, what `python` does with these arguments."""
    for descriptor, path in ((1, output), (2, errors)):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, descriptor)
    os.chdir(folder)
    sys.argv = arguments
    program = folder / arguments[0]
    sys.path.insert(0, str(program.parent))
    del sys.modules["main"]  # It is that of HOME, not that of the folder.
    runpy.run_path(str(program), run_name="__main__")


def draw_digit(digit, path, scale, pen):
    """Draws a digit, `scale` times 150 pixels high, on paper with a shadow."""
    side = round(320 * scale)
    # The gradient, from 0 to 255, becomes paper, from 126 to 253.
    paper = Image.linear_gradient("L").resize((side, round(1.2 * side)))
    picture = paper.point(lambda value: 126 + value // 2)
    for line in DIGITS[digit]:
        points = []
        for point in line.split():
            x, y = map(int, point.split(","))
            points.append(((150 + x) * scale, (40 + y) * scale))
        ImageDraw.Draw(picture).line(points, fill=40, width=pen, joint="curve")
    picture.save(path)


def test_the_test_command_is_what_ci_runs():
    assert TESTS in commands(README)
    assert TESTS in (HOME / ".ci" / "run").read_text().splitlines()


@pytest.fixture(scope="module")
def outputs(checkout):
    """What the commands print, by command. Asserts that each ends as it should."""
    (checkout / "read_digits.py").write_text(code_blocks(README, "python")[0])
    # So thin a line is lost if the contrast is not stretched after scaling it down.
    draw_digit(0, checkout / "digit.png", scale=3, pen=8)
    outputs = {}
    for line in [line for text in PAGES.values() for line in commands(text)]:
        if TESTS in line or TWO_GPUS in line or ANOTHER_MACHINE.match(line):
            continue
        command = line
        for part, other in REPLACED.items():
            command = command.replace(part, other)
        run = run_forked if command.startswith("python ") else run_in_a_shell
        finished = run(checkout, command)
        expected = TIMED_OUT if command.startswith("timeout") else 0
        assert finished.returncode == expected, f"{command}\n{finished.stderr}"
        outputs[line] = finished.stdout
    return outputs


def test_every_command_does_what_it_says(checkout, outputs):
    assert len(outputs) >= 14
    assert "Training LeNet on MNIST" in outputs["tail -f logs/log.out"]
    assert outputs["python read_digits.py digit.png"].splitlines()[-1] == "digit.png: 0"
    lengthened = rows(checkout / "logs" / "run-1" / "test.csv")
    assert [int(row["epoch"]) for row in lengthened] == list(range(1, 13))
    written = (
        "curves.png",  # of the two runs
        "logs/curves.png",
        "logs/small/log.out",
        "logs/gradients.csv",
        "logs/gradients-train.png",
    )
    for name in written:
        assert (checkout / name).stat().st_size > 0, name


@pytest.mark.usefixtures("outputs")  # which leaves a trained network there
@pytest.mark.parametrize("scale, pen", [(1, 18), (0.3, 5), (3, 30)])
def test_the_example_reads_digits_of_other_sizes(checkout, scale, pen):
    names = [f"{digit}.png" for digit in DIGITS]
    for digit, name in enumerate(names):
        draw_digit(digit, checkout / name, scale, pen)
    finished = run_forked(checkout, f"python read_digits.py {' '.join(names)}")
    read = finished.stdout.splitlines()[-len(names) :]
    right = set(read) & {f"{digit}.png: {digit}" for digit in DIGITS}
    # Eight networks, each trained on 600 images, read all ten. Without the inversion, the
    # crop, the centring or the normalisation, they read at most seven.
    assert len(right) >= 8, (finished.stderr, read)


def anchors(text):
    """The names that GitHub gives to the headings of a page, to link to them."""
    headings = re.findall(r"^#+ (.+)$", text.lower(), re.MULTILINE)
    return [re.sub(r"[^\w -]", "", heading).replace(" ", "-") for heading in headings]


def test_what_is_shown_and_linked_is_there():
    for page, text in PAGES.items():
        for target in re.findall(r"\]\(([^)]+)\)", text):
            if target.startswith(("http://", "https://")):
                continue
            name, _, anchor = target.partition("#")
            linked = page.parent / name
            assert linked.is_file(), target
            if anchor:
                assert anchor in anchors(linked.read_text()), target
