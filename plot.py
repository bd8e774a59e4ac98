"""Draw the curves of runs of main.py: exercise 2 of the guide.

python plot.py                          # the newest run in ./logs, even while it is running
python plot.py logs/run-1 logs/run-2    # several runs in one picture
python plot.py --output curves.pdf      # in any format that matplotlib supports
"""

import argparse
import json
import sys
from pathlib import Path

import matplotlib.style
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator


def newest_run():
    """Returns the newest run in ./logs, as main.py --resume chooses it. Exits if there is none."""
    runs = [path.parent for path in Path("logs").glob("run-*/checkpoint.pt")]
    runs = [run for run in runs if run.name[4:].isdecimal()]
    if not runs:
        sys.exit("plot.py: error: there is no run in ./logs: run main.py first, or name a folder")
    return max(runs, key=lambda run: int(run.name[4:]))


def read_table(path):
    """Returns a table, without rows if nothing has been written to it yet."""
    try:
        return pd.read_csv(path)
    except pd.errors.EmptyDataError:
        return pd.DataFrame(columns=["epoch", "step", "lr", "loss"])


def read_run(folder):
    """Returns the two tables of a run, for training and for testing."""
    # Testing comes last in an epoch: if read first, it is never ahead of training.
    test = read_table(folder / "test.csv")
    train = read_table(folder / "train.csv")
    if train.empty:
        sys.exit(f"plot.py: error: {folder / 'train.csv'} has no steps yet: wait for the first")
    return train, test


def label_runs(folders):
    """Returns a label for each run: the one setting in which all differ, or else its folder."""
    runs = [json.loads((folder / "settings.json").read_text()) for folder in folders]
    differing = []
    for name in runs[0]:
        values = {str(run.get(name)) for run in runs}
        if len(values) > 1 and name not in ("resume", "log_dir", "machine"):
            differing.append(name)
    labels = [", ".join(f"{name} {run.get(name)}" for name in differing) for run in runs]
    is_clear = len(differing) == 1 and len(set(labels)) == len(labels)
    return labels if is_clear else [str(folder) for folder in folders]


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
    if any(len(test) > 0 for _, test in runs):
        names += ["test loss"]
    if any("accuracy" in test for _, test in runs):
        names += ["test accuracy (%)"]
    if any(train.lr.nunique() > 1 for train, _ in runs):
        names += ["learning rate"]
    figure = Figure(figsize=(8, 2.2 * len(names)), layout="constrained")
    axes = figure.subplots(len(names), sharex=True, squeeze=False).flat
    panels = dict(zip(names, axes, strict=True))
    for name, panel in panels.items():
        panel.set_ylabel(name)
        panel.grid(alpha=0.3)
        if name in ("training loss", "learning rate"):
            panel.set_yscale("log")
    # Epochs let you compare different batch sizes, but each run needs a whole one.
    unit = "epoch" if all(len(test) > 0 for _, test in runs) else "step"
    panel.set_xlabel(unit)
    panel.xaxis.set_major_locator(MaxNLocator(integer=True))  # no half epochs
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
    if "accuracy" in test:
        panels["test accuracy (%)"].plot(test[unit], test.accuracy, **look)


def main(argv=None):
    """Draws the given runs, or the newest one."""
    parser = argparse.ArgumentParser("plot.py", description="Draw the curves of runs of main.py.")
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN", help="folders of runs")
    parser.add_argument("--output", type=Path, metavar="FILE", help="the picture (curves.png)")
    args = parser.parse_args(argv)
    # `logs/*` also names the log of run.sh.
    folders = [run for run in args.runs if not run.is_file()] or [newest_run()]
    output = args.output or (folders[0] if len(folders) == 1 else Path()) / "curves.png"
    # The colour-blind can tell these colours apart.
    with matplotlib.style.context("tableau-colorblind10"):
        draw([read_run(folder) for folder in folders], label_runs(folders)).savefig(output, dpi=120)
    print(f"The curves are in {output}")


if __name__ == "__main__":
    main()
