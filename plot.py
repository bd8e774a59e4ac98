"""Draw the curves of runs of main.py: exercise 2 of the guide.

python plot.py                          # the newest run in ./logs, even while it is running
python plot.py logs/run-1 logs/run-2    # several runs in one plot
python plot.py --output curves.pdf      # in any format that matplotlib supports
"""

import argparse
import io
import json
import os
import signal
import sys
from pathlib import Path

os.environ["MPLBACKEND"] = "agg"  # A notebook sets it to a backend that may not be installed here.
import matplotlib.pyplot as plt
import pandas as pd


def read_table(path, columns):
    """Returns the csv file as a table with at least these columns, possibly with no rows."""
    try:
        text = path.read_text()
        text = text[: text.rfind("\n") + 1]  # During the run, a line may be half written,
        text = text or ",".join(columns)  # or there may be none yet.
        table = pd.read_csv(io.StringIO(text))
        table[columns].astype(float)
    except (OSError, ValueError, KeyError) as error:
        sys.exit(f"plot.py: error: {path} is not a table from main.py: {error}")
    return table


def read_run(folder):
    """Returns the two tables of a run, for training and for testing."""
    # Testing comes last in an epoch: if read first, it is never ahead of training.
    test = read_table(folder / "test.csv", ["epoch", "step", "loss"])
    train = read_table(folder / "train.csv", ["step", "epoch", "batch", "lr", "loss"])
    if train.empty:
        sys.exit(f"plot.py: error: {folder / 'train.csv'} has no steps yet: wait for the first")
    return train, test


def read_settings(folder):
    """Returns the settings of a run that may affect its curves: a dict, empty if unknown."""
    try:
        settings = json.loads((folder / "settings.json").read_text())
    except (OSError, ValueError):
        return {}
    return {name: settings[name] for name in settings if name not in ("resume", "log_dir")}


def label_runs(folders):
    """Returns a label for each run: its settings that differ between the runs, or its folder."""
    runs = [read_settings(folder) for folder in folders]
    labels = []
    for folder, settings in zip(folders, runs, strict=True):
        differing = []
        for name, value in settings.items():
            if any(other.get(name) != value for other in runs):
                differing.append(f"{name} {value}")
        is_unique = differing and runs.count(settings) == 1
        labels.append(", ".join(differing) if is_unique else str(folder))
    return labels


def epochs_done(train, test):
    """Returns the epochs done after each step: e - 1 + (b + 1) / n after batch b of n of epoch e."""
    # The number of batches changes if a run is resumed with another batch size.
    batches = train.groupby("epoch").batch.max() + 1
    if test.epoch.iloc[-1] < train.epoch.iloc[-1]:
        # The last epoch is still going on: most likely it will have as many as the one before.
        batches.iloc[-1] = batches.iloc[-2:].max()
    return train.epoch - 1 + (train.batch + 1) / train.epoch.map(batches)


def draw(runs, labels):
    """Returns a figure of runs, each a pair of tables, with a panel for each kind of curve."""
    names = ["training loss"]
    tests = [test for _, test in runs if len(test) > 0]
    if tests:
        names += ["test loss"]
    if any("accuracy" in test for test in tests):
        names += ["test accuracy (%)"]
    if any(train.lr.nunique() > 1 for train, _ in runs):
        names += ["learning rate"]
    figure, axes = plt.subplots(
        len(names), sharex=True, squeeze=False, layout="constrained", figsize=(8, 2.2 * len(names))
    )
    panels = dict(zip(names, axes.flat, strict=True))
    for name, panel in panels.items():
        panel.set_ylabel(name)
        panel.grid(alpha=0.3)
        if name != "test accuracy (%)":
            panel.set_yscale("log")
    # Epochs let you compare different batch sizes, but each run needs a whole one.
    unit = "epoch" if len(tests) == len(runs) else "step"
    axes[-1, 0].set_xlabel(unit)
    for number, ((train, test), label) in enumerate(zip(runs, labels, strict=True)):
        draw_run(panels, train, test, unit, label, number)
    if len(runs) > 1:
        figure.legend(loc="outside upper center", ncols=2 if len(runs) > 3 else 1)
    return figure


def draw_run(panels, train, test, unit, label, number):
    """Draws the curves of a run. The unit of the x axis is "epoch" or "step"."""
    times = epochs_done(train, test) if unit == "epoch" else train.step
    colour = f"C{number % 10}"
    look = {"color": colour, "marker": "osD^vPX*"[number % 8], "markersize": 5}
    some = len(train) // 5 + 1  # a marker at the first step, perhaps the only one, and a few more
    window = min(50, 1 + len(train) // 10)  # steps
    mean = train.loss.rolling(window, center=True, min_periods=1).mean()
    panels["training loss"].plot(times, train.loss, color=colour, alpha=0.2, linewidth=0.5)
    panels["training loss"].plot(times, mean, markevery=some, label=label, **look)
    if "learning rate" in panels:
        panels["learning rate"].plot(times, train.lr, markevery=some, **look)
    if len(test) > 0:
        panels["test loss"].plot(test[unit], test.loss, **look)
    if "accuracy" in test and len(test) > 0:
        panels["test accuracy (%)"].plot(test[unit], test.accuracy, **look)


def main(argv=None):
    """Draws the given runs, or the newest one. Exits with a message if it cannot."""
    parser = argparse.ArgumentParser("plot.py", description="Draw the curves of runs of main.py.")
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN", help="folders of runs")
    parser.add_argument("--output", type=Path, metavar="FILE", help="the picture (curves.png)")
    args = parser.parse_args(argv)
    folders = args.runs
    if not folders:
        folders = [path for path in Path("logs").glob("run-*") if path.name[4:].isdecimal()]
        folders = sorted(folders, key=lambda folder: int(folder.name[4:]))[-1:]
    if not folders:
        sys.exit("plot.py: error: there is no run in ./logs: run main.py first, or name a folder")
    output = args.output or (folders[0] if len(folders) == 1 else Path()) / "curves.png"
    plt.style.use("tableau-colorblind10")  # whose colours the colour-blind can tell apart
    figure = draw([read_run(folder) for folder in folders], label_runs(folders))
    try:
        figure.savefig(output, dpi=120)
    except (OSError, ValueError) as error:  # ValueError: matplotlib cannot write this format
        sys.exit(f"plot.py: error: {output}: {error}")
    print(f"The curves are in {output}")


if __name__ == "__main__":
    if hasattr(signal, "SIGPIPE"):  # Windows has none.
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `python plot.py | head` ends quietly.
    main()
