"""plot.py: it draws what is in the tables, whatever state the runs are in."""

import json

import pandas as pd
import pytest
from conftest import error_line

import plot

SETTINGS = {"lr": 0.1, "seed": 1, "schedule": "constant", "log_dir": "./logs", "resume": None}


def make_run(folder, batches=(40, 40), tested=True, **settings):
    """Writes the tables of a run with so many batches in each epoch, whose loss falls."""
    folder.mkdir(parents=True)
    (folder / "checkpoint.pt").touch()
    places = [(epoch, b) for epoch, count in enumerate(batches, 1) for b in range(count)]
    train = [(n, *place, 0.1, 2 / n) for n, place in enumerate(places, 1)]
    test = [(n, sum(batches[:n]), 0.1, 1 / n, 90 + n) for n in range(1, len(batches) + tested)]
    columns = ["step", "epoch", "batch", "lr", "loss"], ["epoch", "step", "lr", "loss", "accuracy"]
    pd.DataFrame(train, columns=columns[0]).to_csv(folder / "train.csv", index=False)
    pd.DataFrame(test, columns=columns[1]).to_csv(folder / "test.csv", index=False)
    (folder / "settings.json").write_text(json.dumps(SETTINGS | settings))
    return folder


def drawn(*folders):
    """The figure of these runs, and its panels by their labels."""
    figure = plot.draw([plot.read_run(folder) for folder in folders], plot.label_runs(folders))
    return figure, {axes.get_ylabel(): axes for axes in figure.axes}


def test_the_newest_run_by_default(go, tmp_path):
    assert "no run in ./logs" in error_line(go("plot.py", cwd=tmp_path))
    for number in (1, 9, 10):
        make_run(tmp_path / "logs" / f"run-{number}")
    make_run(tmp_path / "logs" / "run-old")
    (make_run(tmp_path / "logs" / "run-11") / "checkpoint.pt").unlink()
    finished = go("plot.py", cwd=tmp_path)
    assert (finished.returncode, finished.stderr) == (0, "")
    assert finished.stdout == "The curves are in logs/run-10/curves.png\n"
    assert (tmp_path / "logs" / "run-10" / "curves.png").read_bytes()[:4] == b"\x89PNG"


def test_curves_are_those_of_the_tables(tmp_path):
    run = make_run(tmp_path / "run")
    table = pd.read_csv(run / "train.csv")
    table.loc[40:, "lr"] = 0.01
    table.to_csv(run / "train.csv", index=False)
    figure, panels = drawn(run)
    assert list(panels) == ["training loss", "test loss", "test accuracy (%)", "learning rate"]
    assert [axes.get_yscale() for axes in panels.values()] == ["log", "linear", "linear", "log"]
    assert all(float(tick).is_integer() for tick in figure.axes[-1].get_xticks())
    assert figure.axes[-1].get_xlabel() == "epoch" and not figure.legends
    times = pytest.approx([step / 40 for step in range(1, 81)])
    light, mean = panels["training loss"].lines
    assert list(light.get_xdata()) == times and list(light.get_ydata()) == list(table.loss)
    assert mean.get_ydata()[40] == pytest.approx(table.loss[36:45].mean())
    assert mean.get_linewidth() > light.get_linewidth() and light.get_alpha() < 0.5
    assert panels["test loss"].lines[0].get_xydata().tolist() == [[1, 1], [2, 0.5]]
    assert panels["test accuracy (%)"].lines[0].get_xydata().tolist() == [[1, 91], [2, 92]]
    rate = panels["learning rate"].lines[0]
    assert list(rate.get_xdata()) == times and list(rate.get_ydata()) == list(table.lr)


def test_runs_are_told_apart(tmp_path):
    folders = [make_run(tmp_path / f"run-{n}", lr=lr) for n, lr in enumerate((0.1, 0.2, 0.3))]
    figure, panels = drawn(*folders)
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["lr 0.1", "lr 0.2", "lr 0.3"]
    colours = [line.get_color() for line in legend.legend_handles]
    markers = {line.get_marker() for line in legend.legend_handles}
    assert len(set(colours)) == len(markers) == 3
    for axes in panels.values():
        assert list(dict.fromkeys(line.get_color() for line in axes.lines)) == colours


@pytest.mark.parametrize(
    "batches, tested, unit, times",
    [
        ((2, 4, 1), True, "epoch", [0.5, 1, 1.25, 1.5, 1.75, 2, 3]),
        ((2, 4), False, "epoch", [0.5, 1, 1.25, 1.5, 1.75, 2]),  # more than in the epoch before
        ((4, 1), False, "epoch", [0.25, 0.5, 0.75, 1, 1.25]),
        ((4,), False, "step", [1, 2, 3, 4]),
    ],
)
def test_places_of_a_run_with_other_batch_sizes(tmp_path, batches, tested, unit, times):
    figure, panels = drawn(make_run(tmp_path / "run", batches, tested))
    for line in panels["training loss"].lines:
        assert list(line.get_xdata()) == times
    assert figure.axes[-1].get_xlabel() == unit


@pytest.mark.parametrize(
    "file, text, panels",
    [
        ("test.csv", "", 1),  # no test yet
        ("test.csv", "epoch,step,lr,loss,error\n1,40,0.1,1,9\n", 2),  # a student's own columns
        ("train.csv", "step,epoch,batch,lr,loss\n1,1,0,0.1,2\n2,1,1,0.1,nan\n", 3),  # diverged
    ],
)
def test_runs_in_any_state(go, tmp_path, file, text, panels):
    run = make_run(tmp_path / "run-1")
    (run / file).write_text(text)
    (tmp_path / "log.out").touch()
    make_run(tmp_path / "run-2")
    finished = go("plot.py", *sorted(tmp_path.iterdir()), cwd=tmp_path)  # as with logs/*
    assert (finished.returncode, finished.stderr) == (0, "")
    assert (tmp_path / "curves.png").exists() and len(drawn(run)[1]) == panels


def test_a_run_without_steps(go, tmp_path):
    run = make_run(tmp_path / "run")
    for text in ("", "step,epoch,batch,lr,loss\n"):
        (run / "train.csv").write_text(text)
        assert "train.csv has no steps yet" in error_line(go("plot.py", run))


@pytest.mark.parametrize(
    "settings, labels",
    [
        ([{"lr": 0.1, "log_dir": "a"}, {"lr": 0.2, "log_dir": "b"}], ["lr 0.1", "lr 0.2"]),
        ([{"lr": 0.1}, {"lr": 0.2, "seed": 2}], ["RUN 0", "RUN 1"]),
        ([{"log_dir": "a", "machine": "A"}, {"log_dir": "b", "machine": "B"}], ["RUN 0", "RUN 1"]),
        ([{"seed": 1}, {"seed": 1}, {"seed": 2}], ["RUN 0", "RUN 1", "RUN 2"]),
    ],
)
def test_labels_are_the_one_setting_that_differs(tmp_path, settings, labels):
    folders = [make_run(tmp_path / str(n), **given) for n, given in enumerate(settings)]
    assert plot.label_runs(folders) == [label.replace("RUN ", f"{tmp_path}/") for label in labels]
