"""plot.py: it draws what is in the tables, whatever state the runs are in."""

import json
import subprocess
import sys

import matplotlib.pyplot as plt
import pandas as pd
import pytest
from conftest import HOME, error_line
from PIL import Image

import plot

SETTINGS = {"lr": 0.1, "seed": 1, "schedule": "constant", "log_dir": "./logs", "resume": None}


def make_run(folder, epochs=2, steps=40, **settings):
    """Writes the tables of a run, whose loss falls from step to step."""
    folder.mkdir(parents=True)
    train = [(n + 1, n // steps + 1, n % steps, 0.1, 2 / (n + 1)) for n in range(epochs * steps)]
    test = [(n, n * steps, 0.1, 1 / n, 90 + n) for n in range(1, epochs + 1)]
    columns = ["step", "epoch", "batch", "lr", "loss"], ["epoch", "step", "lr", "loss", "accuracy"]
    pd.DataFrame(train, columns=columns[0]).to_csv(folder / "train.csv", index=False)
    pd.DataFrame(test, columns=columns[1]).to_csv(folder / "test.csv", index=False)
    (folder / "settings.json").write_text(json.dumps(SETTINGS | settings))
    return folder


def panels(figure):
    return {axes.get_ylabel(): axes for axes in figure.axes}


def test_the_newest_run_by_default(go, tmp_path):
    for number in (1, 9, 10):
        make_run(tmp_path / "logs" / f"run-{number}")
    finished = go("plot.py", cwd=tmp_path)
    assert (finished.returncode, finished.stderr) == (0, "")
    assert finished.stdout == "The curves are in logs/run-10/curves.png\n"
    with Image.open(tmp_path / "logs" / "run-10" / "curves.png") as picture:
        assert 800 < picture.width < 1200


def test_curves_are_those_of_the_tables(tmp_path):
    folder = make_run(tmp_path / "run")
    train, test = plot.read_run(folder)
    drawn = panels(plot.draw([(train, test)], [""]))
    assert list(drawn) == ["training loss", "test loss", "test accuracy (%)"]
    light, mean = drawn["training loss"].lines
    assert list(light.get_xdata()) == [step / 40 for step in range(1, 81)]
    assert list(light.get_ydata()) == list(train.loss)
    assert mean.get_ydata()[40] == pytest.approx(train.loss[36:45].mean(), rel=0.01)
    assert mean.get_linewidth() > light.get_linewidth() and light.get_alpha() < 0.5
    (accuracy,) = drawn["test accuracy (%)"].lines
    assert (list(accuracy.get_xdata()), list(accuracy.get_ydata())) == ([1, 2], [91, 92])
    train.loc[40:, "lr"] = 0.01
    assert "learning rate" in panels(plot.draw([(train, test)], [""]))
    plt.close("all")


STATES = {
    "half a line": lambda run: (run / "train.csv").open("a").write("81,3,0,0."),
    "no test": lambda run: (run / "test.csv").write_text(""),
    "a column more": lambda run: add_column(run / "train.csv"),
    "diverged": lambda run: (run / "train.csv").open("a").write("81,3,0,0.1,nan\n"),
    "no settings": lambda run: (run / "settings.json").unlink(),
}


def add_column(path):
    pd.read_csv(path).assign(norm=1.0).to_csv(path, index=False)


@pytest.mark.parametrize("state", STATES)
def test_runs_in_any_state(state, go, tmp_path):
    STATES[state](make_run(tmp_path / "run-1"))
    for runs in (["run-1"], ["run-1", str(make_run(tmp_path / "run-2", steps=20))]):
        finished = go("plot.py", *runs, "--output", "curves.svg", cwd=tmp_path)
        assert (finished.returncode, finished.stderr) == (0, "")
        assert (tmp_path / "curves.svg").stat().st_size > 1000


def test_a_half_written_line_is_left_out(tmp_path):
    run = make_run(tmp_path / "run")
    (run / "train.csv").open("a").write("81,3,0,0.")
    assert len(plot.read_run(run)[0]) == 80


@pytest.mark.parametrize(
    "settings, labels",
    [
        ([{"lr": 0.1}, {"lr": 0.2}], ["lr 0.1", "lr 0.2"]),
        ([{"lr": 0.1}, {"lr": 0.2, "seed": 2}], ["lr 0.1, seed 1", "lr 0.2, seed 2"]),
        ([{"log_dir": "a"}, {"log_dir": "b"}], ["RUN 0", "RUN 1"]),
        ([{"seed": 1}, {"seed": 1}, {"seed": 2}], ["RUN 0", "RUN 1", "seed 2"]),
        ([{"seed": 1}, None], ["lr 0.1, seed 1, schedule constant", "RUN 1"]),
    ],
)
def test_labels_are_the_settings_that_differ(tmp_path, settings, labels):
    folders = []
    for number, known in enumerate(settings):
        folders.append(make_run(tmp_path / f"{number}", **(known or {})))
        if known is None:
            (folders[-1] / "settings.json").unlink()
    expected = [label.replace("RUN ", f"{tmp_path}/") for label in labels]
    assert plot.label_runs(folders) == expected


def test_what_cannot_be_drawn_is_one_line(go, tmp_path):
    assert "no run in ./logs" in error_line(go("plot.py", cwd=tmp_path))
    run = make_run(tmp_path / "run")
    assert "curves.xyz" in error_line(go("plot.py", run, "--output", "curves.xyz", cwd=tmp_path))
    assert "nowhere" in error_line(go("plot.py", run, "--output", "nowhere/x.png", cwd=tmp_path))
    (run / "train.csv").write_text("step,epoch,batch,lr,loss\n")
    assert "train.csv has no steps yet" in error_line(go("plot.py", run))
    (run / "train.csv").write_text("a,b\n1,2\n")
    assert "train.csv is not a table" in error_line(go("plot.py", run))
    (run / "train.csv").unlink()
    assert "train.csv" in error_line(go("plot.py", run))


def test_it_loads_neither_pytorch_nor_main():
    code = "import plot, sys; sys.exit(bool({'torch', 'main'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=HOME, check=False).returncode == 0
