"""plot.py, against csv files written here and numbers computed here by other means."""

import os
import re
import struct
import subprocess
import sys
from pathlib import Path

import matplotlib.colors
import numpy as np
import pytest
import torch
from conftest import HOME, one_line, run
from matplotlib import rc_context

import plot

TRAIN = "step,epoch,batch,lr,loss\n"
TEST = "epoch,step,lr,loss,accuracy\n"
TRAIN_LABEL = "Training loss (nats)\nbold: mean of 5 steps"
LOSS_LABEL = "Test loss\n(nats)"
ACCURACY_LABEL = "Test accuracy\n(%)"
RATE_LABEL = "Learning rate"


def write_run(log_dir, rates, length, seed=0):
    """Writes the tables of a run, an epoch for each rate; returns its training loss."""
    log_dir.mkdir(parents=True)
    losses = np.random.default_rng(seed).uniform(0.1, 2, len(rates) * length).round(6)
    train = TRAIN
    for index, loss in enumerate(losses):
        epoch, batch = divmod(index, length)
        train += f"{index + 1},{epoch + 1},{batch},{rates[epoch]},{loss}\n"
    test = TEST
    for epoch, rate in enumerate(rates, start=1):
        test += f"{epoch},{epoch * length},{rate},{1 / epoch},{90 + epoch}\n"
    (log_dir / "train.csv").write_text(train)
    (log_dir / "test.csv").write_text(test)
    return losses


def write_first_steps(log_dir, steps):
    """Writes the tables of a run that goes on, before its first test."""
    log_dir.mkdir()
    rows = [f"{step},1,{step - 1},0.1,2.5\n" for step in range(1, steps + 1)]
    (log_dir / "train.csv").write_text(TRAIN + "".join(rows))
    (log_dir / "test.csv").write_text(TEST)


def write_flags(log_dir, **settings):
    """Writes what plot.py reads of a checkpoint."""
    log_dir.mkdir(exist_ok=True)
    torch.save({"epoch": 1, "settings": settings}, log_dir / "checkpoint.pt")


def draw(*log_dirs):
    """The figure that plot.py draws of these runs, labelled with their folders' names."""
    with rc_context(plot.STYLE):
        runs = [plot.read_run(log_dir) for log_dir in log_dirs]
        return plot.draw(runs, [log_dir.name for log_dir in log_dirs])


def panels_of(figure):
    """The panels by their labels, from top to bottom."""
    return {panel.get_ylabel(): panel for panel in figure.axes}


def x_label(figure):
    return figure.axes[-1].get_xlabel()


def points(line):
    return line.get_xydata().tolist()


def png_size(path):
    content = path.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    assert content[-8:-4] == b"IEND"
    return struct.unpack(">II", content[16:24])


# What a user types, and gets


def test_one_run_without_loading_pytorch(tmp_path):
    write_run(tmp_path / "logs", [0.1, 0.1], 20)
    code = """
import sys, plot
print("imported")
plot.main([])
print("torch" in sys.modules)
"""
    finished = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(HOME)},
        capture_output=True,
        check=True,
        text=True,
    )
    path = Path("logs") / "curves.png"
    assert finished.stdout == f"imported\nThe curves are in {path}\nFalse\n"
    assert finished.stderr == ""
    width, height = png_size(tmp_path / path)
    assert width == 910
    assert height > 700
    assert os.listdir(tmp_path) == ["logs"]


def test_two_runs_of_main(small_mnist, tmp_path):
    shared = ["--data-dir", small_mnist, "--epochs", 2]
    small_batches = ["--batch-size", 50, "--log-dir", tmp_path / "logs"]
    large_batches = ["--batch-size", 100, "--log-dir", tmp_path / "other"]
    assert run("main.py", *shared, *small_batches).returncode == 0
    cosine = ["--schedule", "cosine"]
    assert run("main.py", *shared, *large_batches, *cosine).returncode == 0

    finished = run("plot.py", "logs", "other", cwd=tmp_path)
    assert finished.returncode == 0
    assert finished.stdout == "The curves are in curves.png\n"
    assert png_size(tmp_path / "curves.png")[0] == 910
    assert not (tmp_path / "logs" / "curves.png").exists()

    log_dirs = [tmp_path / "logs", tmp_path / "other"]
    assert plot.label_runs(log_dirs) == [
        "batch-size 50, schedule constant",
        "batch-size 100, schedule cosine",
    ]
    rates = panels_of(draw(*log_dirs))[RATE_LABEL]
    small, large = rates.lines
    # 600 images: an epoch has 12 steps of 50, or 6 of 100.
    np.testing.assert_allclose(small.get_xdata(), np.arange(1, 25) / 12)
    np.testing.assert_allclose(large.get_xdata(), np.arange(1, 13) / 6)
    np.testing.assert_allclose(small.get_ydata(), [0.1] * 24)
    np.testing.assert_allclose(large.get_ydata(), [0.1] * 6 + [0.05] * 6)


def test_the_picture_names_axes_units_and_runs(tmp_path, capsys):
    for lr in ("0.1", "0.05"):
        write_run(tmp_path / lr, [lr, "0.01"], 20)
        write_flags(tmp_path / lr, lr=float(lr), seed=1)
    output = str(tmp_path / "curves.svg")
    log_dirs = [str(tmp_path / "0.1"), str(tmp_path / "0.05")]
    with rc_context({"svg.fonttype": "none"}):  # as text, not as shapes of letters
        plot.main([*log_dirs, "--output", output])
    assert capsys.readouterr().out == f"The curves are in {output}\n"
    svg = (tmp_path / "curves.svg").read_text()
    texts = [text.strip() for text in re.findall(r"<(?:text|tspan)[^>]*>([^<]*)<", svg)]
    labels = [TRAIN_LABEL, LOSS_LABEL, ACCURACY_LABEL, RATE_LABEL]
    expected = "\n".join(labels).splitlines()
    expected += ["Training time (epochs)", "lr 0.1", "lr 0.05"]
    expected.remove("(nats)")
    for text in expected:
        assert texts.count(text) == 1, (text, texts)


@pytest.mark.parametrize("name, start", [("a.pdf", b"%PDF-"), ("b.PNG", b"\x89PNG")])
def test_other_formats(tmp_path, name, start):
    write_run(tmp_path / "logs", [0.1], 3)
    plot.main([str(tmp_path / "logs"), "--output", str(tmp_path / name)])
    assert (tmp_path / name).read_bytes().startswith(start)


def test_a_run_named_twice_is_one_run(tmp_path, capsys):
    write_run(tmp_path / "logs", [0.1], 3)
    plot.main([str(tmp_path / "logs"), f"{tmp_path}/logs/"])
    path = tmp_path / "logs" / "curves.png"
    assert capsys.readouterr().out == f"The curves are in {path}\n"


# The legend


@pytest.mark.parametrize(
    "flags, labels",
    [
        ([{"lr": 0.1}, {"lr": 0.05}], ["lr 0.1", "lr 0.05"]),
        (
            [{"lr": 0.1, "batch_size": 9}, {"lr": 0.05, "batch_size": 10}],
            ["lr 0.1, batch-size 9", "lr 0.05, batch-size 10"],
        ),
        (
            [{"lr": 0.1, "seed": 1}, {"lr": 0.1, "seed": 2}, {"lr": 0.2, "seed": 1}],
            ["lr 0.1, seed 1", "lr 0.1, seed 2", "lr 0.2, seed 1"],
        ),
        ([{"lr": 0.1}, {"lr": 0.1}], ["folder 0", "folder 1"]),
        (
            [{"lr": 0.1}, {"lr": 0.2}, {"lr": 0.1}],
            ["lr 0.1, folder 0", "lr 0.2", "lr 0.1, folder 2"],
        ),
        ([{"lr": 0.1}, None, {"lr": 0.2}], ["lr 0.1", "folder 1", "lr 0.2"]),
        ([{"lr": 0.1}, None], ["folder 0", "folder 1"]),
    ],
)
def test_labels_say_what_differs(tmp_path, monkeypatch, flags, labels):
    monkeypatch.chdir(tmp_path)
    log_dirs = [Path(str(number)) for number in range(len(flags))]
    for log_dir, settings in zip(log_dirs, flags, strict=True):
        if settings is not None:
            write_flags(log_dir, **settings)
    assert plot.label_runs(log_dirs) == labels


@pytest.mark.parametrize("kind", ["text", "cut off", "another program's", "a list"])
def test_a_checkpoint_that_cannot_be_read(tmp_path, kind):
    path = tmp_path / "checkpoint.pt"
    if kind == "text":
        path.write_text("lr 0.1")
    elif kind == "cut off":
        write_flags(tmp_path, lr=0.1)
        os.truncate(path, path.stat().st_size // 2)
    elif kind == "another program's":
        torch.save({"state_dict": {}}, path)
    else:
        torch.save(["lr", 0.1], path)
    assert plot.read_flags(tmp_path) == {}


def test_the_legend_is_above_the_panels_and_has_room(tmp_path):
    log_dirs = [tmp_path / f"{number} has quite a long label" for number in range(8)]
    for log_dir in log_dirs:
        write_run(log_dir, [0.1], 2)
    figure = draw(*log_dirs)
    figure.draw_without_rendering()
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.texts] == [path.name for path in log_dirs]
    box = legend.get_window_extent()
    top_panel = figure.axes[0].get_window_extent()
    assert 0 < box.x0 < box.x1 < figure.bbox.x1
    assert top_panel.y1 < box.y0 < box.y1 < figure.bbox.y1
    assert top_panel.height > 2 * figure.dpi  # inches
    assert draw(log_dirs[0]).legends == []


def test_runs_differ_in_all_panels(tmp_path):
    log_dirs = [tmp_path / str(number) for number in range(14)]
    for log_dir in log_dirs:
        write_run(log_dir, [0.1, 0.01], 2)
    panels = panels_of(draw(*log_dirs))
    light = panels[TRAIN_LABEL].lines[:14]
    bold = panels[TRAIN_LABEL].lines[14:]
    looks = [look(line) for line in bold]
    assert len(set(looks)) == 14
    # The first seven differ in each respect by which some reader tells them apart.
    assert len({line.get_color() for line in bold[:7]}) == 7
    assert len({line.get_marker() for line in bold[:7]}) == 7
    assert [line.get_color() for line in light] == [line.get_color() for line in bold]
    for label in (LOSS_LABEL, ACCURACY_LABEL, RATE_LABEL):
        assert [look(line) for line in panels[label].lines] == looks
    okabe_ito = "#000000 #e69f00 #56b4e9 #009e73 #f0e442 #0072b2 #d55e00 #cc79a7"
    for line in bold:
        assert matplotlib.colors.to_hex(line.get_color()) in okabe_ito


def look(line):
    return line.get_color(), line.get_marker(), line.get_fillstyle()


# The curves


@pytest.mark.parametrize("epochs, window", [(1, 5), (8, 20), (30, 50)])
def test_training_loss_and_its_running_mean(tmp_path, epochs, window):
    losses = write_run(tmp_path / "logs", [0.1] * epochs, 50)
    panel = draw(tmp_path / "logs").axes[0]
    assert panel.get_ylabel() == f"Training loss (nats)\nbold: mean of {window} steps"
    light, bold = panel.lines
    for line in (light, bold):
        np.testing.assert_allclose(line.get_xdata(), np.arange(1, len(losses) + 1) / 50)
    np.testing.assert_array_equal(light.get_ydata(), losses)
    means = []
    for index in range(len(losses)):
        first = max(0, index - window // 2)
        means.append(losses[first : index - window // 2 + window].mean())
    np.testing.assert_allclose(bold.get_ydata(), means)
    assert light.get_alpha() < 0.5
    assert light.get_linewidth() < bold.get_linewidth()
    assert panel.get_xlim()[0] == 0


def test_runs_of_unlike_lengths_in_epochs(tmp_path):
    write_run(tmp_path / "a", [0.1, 0.1, 0.1], 40)
    write_run(tmp_path / "b", [0.2, 0.2], 10)
    figure = draw(tmp_path / "a", tmp_path / "b")
    panels = panels_of(figure)
    # Each rate is constant: it has no panel.
    assert list(panels)[1:] == [LOSS_LABEL, ACCURACY_LABEL]
    a, b = panels[LOSS_LABEL].lines
    assert points(a) == [[1, 1], [2, 1 / 2], [3, 1 / 3]]
    assert points(b) == [[1, 1], [2, 1 / 2]]
    a, b = panels[ACCURACY_LABEL].lines
    assert points(a) == [[1, 91], [2, 92], [3, 93]]
    assert points(b) == [[1, 91], [2, 92]]
    scales = [panel.get_yscale() for panel in figure.axes]
    assert scales == ["log", "log", "linear"]
    assert x_label(figure) == "Training time (epochs)"


def test_learning_rate_where_any_run_changes_it(tmp_path):
    write_run(tmp_path / "a", [0.1, 0.1], 4)
    write_run(tmp_path / "b", [0.1, 0.01], 4)
    panel = panels_of(draw(tmp_path / "a", tmp_path / "b"))[RATE_LABEL]
    a, b = panel.lines
    assert list(a.get_ydata()) == [0.1] * 8
    assert list(b.get_ydata()) == [0.1] * 4 + [0.01] * 4
    assert b.get_drawstyle() == "steps-pre"
    assert panel.get_yscale() == "log"


@pytest.mark.parametrize("highest, lowest", [(0.052, 0.0199), (1, 0.03), (2, 0.0001)])
def test_axes_of_loss_have_some_ticks_but_not_too_many(tmp_path, highest, lowest):
    write_run(tmp_path / "logs", [0.1, 0.1], 4)
    rows = f"1,4,0.1,{highest},91\n2,8,0.1,{lowest},99.99\n"
    (tmp_path / "logs" / "test.csv").write_text(TEST + rows)
    panels = panels_of(draw(tmp_path / "logs"))
    panels[LOSS_LABEL].figure.draw_without_rendering()
    bottom, top = panels[LOSS_LABEL].get_ylim()
    ticks = panels[LOSS_LABEL].get_yticks()
    assert 3 <= sum(bottom <= tick <= top for tick in ticks) <= 10
    assert panels[ACCURACY_LABEL].get_ylim()[1] == 100


# A run that goes on, and one that failed


@pytest.mark.parametrize("part", ["4,2,1", "4,2,1,0.1,0.5"])
def test_part_of_a_line_is_left_out(tmp_path, part):
    losses = write_run(tmp_path / "logs", [0.1], 3)
    for name in ("train.csv", "test.csv"):
        with open(tmp_path / "logs" / name, "a") as file:
            file.write(part)
    panels = panels_of(draw(tmp_path / "logs"))
    assert list(panels[TRAIN_LABEL].lines[0].get_ydata()) == list(losses)
    assert points(panels[LOSS_LABEL].lines[0]) == [[1, 1]]


def test_no_test_yet(tmp_path):
    write_first_steps(tmp_path / "logs", 1)
    figure = draw(tmp_path / "logs")
    (panel,) = figure.axes
    light, bold = panel.lines
    assert points(light) == points(bold) == [[1, 2.5]]
    assert bold.get_marker() not in ("", "None")  # else one step is invisible
    assert x_label(figure) == "Training time (steps)"  # an epoch's length is not known
    plot.main([str(tmp_path / "logs")])
    assert png_size(tmp_path / "logs" / "curves.png")[1] < 500  # one panel


def test_no_test_yet_of_one_of_two_runs(tmp_path):
    write_run(tmp_path / "a", [0.1, 0.1], 10)
    write_first_steps(tmp_path / "b", 3)
    figure = draw(tmp_path / "a", tmp_path / "b")
    assert x_label(figure) == "Training time (steps)"
    panels = panels_of(figure)
    a, b = panels[TRAIN_LABEL].lines[:2]
    assert a.get_xdata().tolist() == list(range(1, 21))
    assert b.get_xdata().tolist() == [1, 2, 3]
    a, b = panels[LOSS_LABEL].lines
    assert points(a) == [[10, 1], [20, 1 / 2]]
    assert points(b) == []


def test_losses_that_are_not_finite_are_left_out(tmp_path):
    losses = write_run(tmp_path / "logs", [0.1], 3)
    with open(tmp_path / "logs" / "train.csv", "a") as file:
        file.write("4,2,0,0.1,inf\n5,2,1,0.1,nan\n")
    light, bold = draw(tmp_path / "logs").axes[0].lines
    assert list(light.get_ydata()) == list(losses)
    assert len(bold.get_ydata()) == 3


# Errors

NO_STEPS = "has no steps yet"
FOREIGN = "not a table of main.py's"
BAD = {
    "missing": ("train.csv", None, "No such file"),
    "missing test": ("test.csv", None, "No such file"),
    "empty": ("train.csv", b"", FOREIGN),
    "bytes": ("train.csv", bytes(range(256)) * 9, FOREIGN),
    "words": ("test.csv", TEST.encode() + b"1,3,0.1,high,90\n", FOREIGN),
    "the other table": ("train.csv", TEST.encode() + b"1,3,0.1,2,9\n", "other columns"),
    "header": ("train.csv", TRAIN.encode(), NO_STEPS),
    "nothing finite": ("train.csv", TRAIN.encode() + b"1,1,0,0.1,nan\n", NO_STEPS),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_tables_end_in_one_line(tmp_path, case):
    name, content, reason = BAD[case]
    write_run(tmp_path / "logs", [0.1], 3)
    path = tmp_path / "logs" / name
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content)
    with pytest.raises(SystemExit) as stop:
        plot.main([str(tmp_path / "logs")])
    line = stop.value.code
    assert line.startswith(f"plot.py: error: {path}")
    assert reason in line
    assert "\n" not in line
    way_out = "wait for the first" if reason == NO_STEPS else "name another log dir"
    assert way_out in line
    assert not (tmp_path / "logs" / "curves.png").exists()


def test_an_error_as_users_see_it(tmp_path):
    write_run(tmp_path / "logs", [0.1], 3)
    line = one_line(run("plot.py", "logs", "none", cwd=tmp_path), 1)
    assert line.startswith(f"plot.py: error: {Path('none') / 'train.csv'}: No such file")
    assert os.listdir(tmp_path) == ["logs"]


@pytest.mark.parametrize("output", ["none/a.png", "folder.pdf"])
def test_an_output_that_cannot_be_written(tmp_path, capsys, output):
    write_run(tmp_path / "logs", [0.1], 3)
    (tmp_path / "folder.pdf").mkdir()
    path = str(tmp_path / output)
    with pytest.raises(SystemExit) as stop:
        plot.main([str(tmp_path / "logs"), "--output", path])
    assert stop.value.code.startswith(f"plot.py: error: {path}: ")
    assert stop.value.code.endswith("name another file with --output")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("flags", [["--output", "a.xyz"], ["--output", "a"], ["--out"]])
def test_bad_flags(tmp_path, monkeypatch, capsys, flags):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "logs", [0.1], 3)
    with pytest.raises(SystemExit) as stop:
        plot.main(flags)
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("plot.py: error: ")
    assert flags[-1] in line
    assert sorted(os.listdir(tmp_path / "logs")) == ["test.csv", "train.csv"]
