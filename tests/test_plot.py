"""plot.py, against csv files written here and numbers computed here by other means."""

import os
import re
import struct
import subprocess
import sys

import matplotlib.colors
import numpy as np
import pytest
from conftest import HOME, one_line, run

import plot

TRAIN, TEST = "step,epoch,batch,lr,loss\n", "epoch,step,lr,loss,accuracy\n"
TESTED = ["Test loss\n(nats)", "Test accuracy\n(%)"]


def write_run(log_dir, rates, length, seed=0):
    """Writes the record of a run, an epoch for each rate; returns its training loss."""
    log_dir.mkdir(parents=True)
    losses = np.random.default_rng(seed).uniform(0.1, 2, len(rates) * length).round(6)
    train, test = TRAIN, TEST
    for i, loss in enumerate(losses):
        epoch, batch = divmod(i, length)
        train += f"{i + 1},{epoch + 1},{batch},{rates[epoch]},{loss}\n"
    for epoch, rate in enumerate(rates, 1):
        test += f"{epoch},{epoch * length},{rate},{1 / epoch},{90 + epoch}\n"
    (log_dir / "train.csv").write_text(train)
    (log_dir / "test.csv").write_text(test)
    return losses


def drawn(*log_dirs):
    """The panels that plot.py draws of these runs, by their labels."""
    figure = plot.draw({log_dir.name: plot.read_run(log_dir) for log_dir in log_dirs})
    panels = {panel.get_ylabel(): panel for panel in figure.axes}
    assert len(panels) == len(figure.axes)
    assert all(panel.lines for panel in figure.axes)
    return panels


def png_size(path):
    content = path.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n" and content[-8:-4] == b"IEND"
    return struct.unpack(">II", content[16:24])


def test_the_default_is_a_png_in_the_log_dir(tmp_path):
    write_run(tmp_path / "logs", [0.1, 0.1], 20)
    finished = run("plot.py", cwd=tmp_path)
    assert (finished.returncode, finished.stderr) == (0, "")
    assert (
        finished.stdout == f"curves written to {os.path.join('logs', 'curves.png')}\n"
    )
    width, height = png_size(tmp_path / "logs" / "curves.png")
    assert width == 1300 and height > 1000
    assert sorted(os.listdir(tmp_path)) == ["logs"]


def test_a_record_of_main(small_mnist, tmp_path):
    flags = ["--epochs", 2, "--batch-size", 100, "--schedule", "cosine"]
    flags += ["--data-dir", small_mnist, "--log-dir", tmp_path / "logs"]
    assert run("main.py", *flags).returncode == 0
    panels = drawn(tmp_path / "logs")
    assert list(panels)[1:] == [*TESTED, "Learning rate"]
    steps = panels["Learning rate"].lines[0].get_xydata()
    np.testing.assert_allclose(steps[:, 0], np.arange(1, 13) / 6)
    np.testing.assert_allclose(steps[:, 1], [0.1] * 6 + [0.05] * 6)


def test_svg_names_the_axes_and_the_runs(tmp_path):
    names = ["fast", "slow", "_hidden", "$\\odd$"]
    for seed, name in enumerate(names):
        write_run(tmp_path / name, [0.1, 0.05], 20, seed)
    (tmp_path / "matplotlibrc").write_text("svg.fonttype: none\n")
    environment = os.environ | {"MPLCONFIGDIR": str(tmp_path)}
    options = {"cwd": tmp_path, "env": environment}
    finished = run("plot.py", *names, "--output", "curves.svg", **options)
    assert (finished.returncode, finished.stderr) == (0, "")
    svg = (tmp_path / "curves.svg").read_text()
    texts = [text.strip() for text in re.findall(r"<(?:text|tspan)[^>]*>([^<]*)<", svg)]
    labels = ["Training loss (nats)", "bold: mean of 3 steps", "Test loss", "(nats)"]
    labels += ["Test accuracy", "(%)", "Learning rate", "Training time (epochs)"]
    for text in labels + names:
        assert texts.count(text) == 1, (text, texts)
    assert not (tmp_path / "fast" / "curves.png").exists()


@pytest.mark.parametrize("name, start", [("a.pdf", b"%PDF-"), ("b.PNG", b"\x89PNG")])
def test_other_formats(tmp_path, capsys, name, start):
    write_run(tmp_path / "logs", [0.1], 3)
    plot.main([str(tmp_path / "logs"), "--output", str(tmp_path / name)])
    assert capsys.readouterr().out == f"curves written to {tmp_path / name}\n"
    assert (tmp_path / name).read_bytes().startswith(start)


@pytest.mark.parametrize("epochs, window", [(1, 3), (2, 5), (30, 51)])
def test_training_loss_and_its_running_mean(tmp_path, epochs, window):
    losses = write_run(tmp_path / "logs", [0.1] * epochs, 50)
    panels = drawn(tmp_path / "logs")
    (label, panel), half = next(iter(panels.items())), window // 2
    assert label == f"Training loss (nats)\nbold: mean of {window} steps"
    light, dark = panel.lines
    for line in (light, dark):
        np.testing.assert_allclose(line.get_xdata(), np.arange(1, len(losses) + 1) / 50)
    np.testing.assert_array_equal(light.get_ydata(), losses)
    means = [losses[max(0, i - half) : i + half + 1].mean() for i in range(len(losses))]
    np.testing.assert_allclose(dark.get_ydata(), means)
    assert light.get_alpha() < 0.5 and light.get_linewidth() < dark.get_linewidth()
    assert panel.get_xlim()[0] == 0


def test_tests_line_up_with_steps_of_runs_of_unlike_lengths(tmp_path):
    write_run(tmp_path / "a", [0.1, 0.1, 0.1], 40)
    write_run(tmp_path / "b", [0.2, 0.2], 10)
    panels = drawn(tmp_path / "a", tmp_path / "b")
    assert list(panels)[1:] == TESTED  # each rate is constant
    loss, accuracy = (panels[label] for label in TESTED)
    for i, epochs in enumerate(([1, 2, 3], [1, 2])):
        x, values = np.array(epochs), loss.lines[i].get_xydata().T
        np.testing.assert_allclose(values, [x, 1 / x])
        np.testing.assert_allclose(accuracy.lines[i].get_xydata().T, [x, 90 + x])
    scales = [panel.get_yscale() for panel in panels.values()]
    assert scales == ["log", "log", "linear"]
    assert accuracy.get_xlabel() == "Training time (epochs)"


def test_runs_differ_in_colour_line_and_marker(tmp_path):
    log_dirs = [tmp_path / str(i) for i in range(12)]
    for log_dir in log_dirs:
        write_run(log_dir, [0.1], 2)
    *_, panel = drawn(*log_dirs).values()
    colours = [matplotlib.colors.to_hex(line.get_color()) for line in panel.lines]
    markers = [line.get_marker() for line in panel.lines]
    styles = [str(line._dash_pattern) for line in panel.lines]
    assert len(set(colours)) == 7 and len(set(zip(markers, styles))) == 12
    okabe_ito = "#000000 #e69f00 #56b4e9 #009e73 #f0e442 #0072b2 #d55e00 #cc79a7"
    assert all(colour in okabe_ito for colour in colours)


def test_learning_rate_where_any_run_changes_it(tmp_path):
    write_run(tmp_path / "a", [0.1, 0.1], 4)
    write_run(tmp_path / "b", [0.1, 0.01], 4)
    panel = drawn(tmp_path / "a", tmp_path / "b")["Learning rate"]
    a, b = panel.lines
    assert list(a.get_ydata()) == [0.1] * 8
    assert list(b.get_ydata()) == [0.1] * 4 + [0.01] * 4
    assert b.get_drawstyle() == "steps-pre" and panel.get_yscale() == "log"


@pytest.mark.parametrize("half", ["", "4", "4,2,1", "4,2,1,0.1,0.", "4,2,1,0.1,0.5"])
def test_half_a_line_is_left_out(tmp_path, half):
    losses = write_run(tmp_path / "logs", [0.1], 3)
    for name in ("train.csv", "test.csv"):
        with open(tmp_path / "logs" / name, "a") as file:
            file.write(half)
    label, panel = next(iter(drawn(tmp_path / "logs").items()))
    assert list(panel.lines[0].get_ydata()) == list(losses)
    assert label.endswith("mean of 1 steps")


@pytest.mark.parametrize("test", [TEST, TEST[:-1], TEST[:9], TEST + "1,3,0."])
def test_no_test_yet(tmp_path, test):
    (tmp_path / "train.csv").write_text(TRAIN + "1,1,0,0.1,2.5\n2,1,1,0.1,")
    (tmp_path / "test.csv").write_text(test)
    (panel,) = drawn(tmp_path).values()
    assert panel.get_xlabel() == "Training time (steps)"  # an epoch's length is unknown
    assert [line.get_xydata().tolist() for line in panel.lines] == [[[1, 2.5]]] * 2
    assert panel.lines[1].get_marker() not in ("", "None")  # else one step is invisible


def test_a_picture_of_the_first_steps(tmp_path):
    (tmp_path / "train.csv").write_text(TRAIN + "1,1,0,0.1,2.5\n2,1,1,0.1,")
    (tmp_path / "test.csv").write_text(TEST)
    plot.main([str(tmp_path)])
    assert png_size(tmp_path / "curves.png")[1] < 700  # one panel


def test_a_loss_that_is_not_finite(tmp_path):
    write_run(tmp_path / "logs", [0.1], 3)
    with open(tmp_path / "logs" / "train.csv", "a") as file:
        file.write("4,2,0,0.1,nan\n")
    panel = next(iter(drawn(tmp_path / "logs").values()))
    assert len(panel.lines[0].get_ydata()) == 3


NO_STEPS = "has no steps yet"
FOREIGN = "is empty, broken or not"
BAD = {
    "missing": ("train.csv", None, "No such file"),
    "missing test": ("test.csv", None, "No such file"),
    "empty": ("train.csv", b"", FOREIGN),
    "empty test": ("test.csv", b"", FOREIGN),
    "half a header": ("train.csv", b"step,ep", NO_STEPS),
    "header": ("train.csv", TRAIN.encode(), NO_STEPS),
    "half a row": ("train.csv", TRAIN.encode() + b"1,1,0,0.", NO_STEPS),
    "no number": ("train.csv", TRAIN.encode() + b"1,1,0,0.1,nan\n", NO_STEPS),
    "other columns": ("train.csv", b"a,b\n1,2\n", FOREIGN),
    "the other file": ("train.csv", TEST.encode() + b"1,3,0.1,2,90\n", FOREIGN),
    "words": ("train.csv", TRAIN.encode() + b"1,1,0,0.1,high\n", FOREIGN),
    "a short row": ("test.csv", TEST.encode() + b"1,3,0.1,2\n", FOREIGN),
    "a long row": ("train.csv", TRAIN.encode() + b"1,1,0,1,1\n2,1,1,1,1,1\n", FOREIGN),
    "long rows": ("train.csv", TRAIN.encode() + b"1,1,0,1,1,1\n2,1,1,1,1,1\n", FOREIGN),
    "steps go back": ("train.csv", TRAIN.encode() + b"2,1,0,1,1\n1,1,1,1,1\n", FOREIGN),
    "bytes": ("train.csv", bytes(range(256)) * 9, FOREIGN),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_records_end_in_one_line(tmp_path, capsys, case):
    name, content, reason = BAD[case]
    write_run(tmp_path / "logs", [0.1], 3)
    if content is None:
        (tmp_path / "logs" / name).unlink()
    else:
        (tmp_path / "logs" / name).write_bytes(content)
    with pytest.raises(SystemExit) as stop:  # here, as a process for each takes long
        plot.main([str(tmp_path / "logs")])
    line = stop.value.code
    assert line.startswith("plot.py: error: ") and "\n" not in line
    assert str(tmp_path / "logs" / name) in line and reason in line
    assert line.endswith("run main.py first, or name another log dir")
    assert not (tmp_path / "logs" / "curves.png").exists()
    assert capsys.readouterr().out == ""


def test_errors_as_users_see_them(tmp_path):
    write_run(tmp_path / "logs", [0.1], 3)
    line = one_line(run("plot.py", cwd=tmp_path / "logs"), 1)
    assert os.path.join("logs", "train.csv") in line
    (tmp_path / "empty").mkdir()
    line = one_line(run("plot.py", "logs", "empty", cwd=tmp_path), 1)
    assert os.path.join("empty", "train.csv") in line
    assert line.endswith("run main.py first, or name another log dir")


@pytest.mark.parametrize("output", ["none/a.png", "folder.pdf"])
def test_an_output_that_cannot_be_written(tmp_path, output):
    write_run(tmp_path / "logs", [0.1], 3)
    (tmp_path / "folder.pdf").mkdir()
    finished = run("plot.py", "logs", "--output", output, cwd=tmp_path)
    line = one_line(finished, 1)
    assert output in line and line.endswith("with --output") and not finished.stdout


@pytest.mark.parametrize("flags", [["--output", "a.xyz"], ["--output", "a"], ["--out"]])
def test_bad_flags(tmp_path, flags):
    write_run(tmp_path / "logs", [0.1], 3)
    line = one_line(run("plot.py", *flags, cwd=tmp_path), 2)
    assert line.startswith("plot.py: error: ") and flags[-1] in line
    assert os.listdir(tmp_path) == ["logs"]


def test_importing_does_nothing(tmp_path):
    code = "import sys, plot; print('torch' in sys.modules or 'pyplot' in dir(plot))"
    environment = os.environ | {"PYTHONPATH": str(HOME)}
    options = {"cwd": tmp_path, "env": environment, "capture_output": True}
    command = [sys.executable, "-c", code]
    finished = subprocess.run(command, check=True, text=True, **options)
    assert (finished.stdout, finished.stderr) == ("False\n", "")
    assert not os.listdir(tmp_path)
