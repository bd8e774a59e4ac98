"""Draw the curves of runs of main.py: exercise 2 of the guide.

python plot.py                          # the newest run in ./logs, even while it goes on
python plot.py logs/run-1 logs/run-2    # runs over one another
python plot.py --output curves.pdf      # in any format that matplotlib writes
"""

import argparse
import io
import json
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd


def read_table(path, columns):
    """Returns the csv file as a table with at least these columns, perhaps without a row."""
    try:
        text = path.read_text()
        text = text[: text.rfind("\n") + 1]  # While the run goes on, a line may be half written,
        text = text or ",".join(columns)  # or none be there yet.
        table = pd.read_csv(io.StringIO(text))
        table[columns].astype(float)
    except (OSError, ValueError, KeyError) as error:
        sys.exit(f"plot.py: error: {path} is not a table of main.py's: {error}")
    return table


def read_run(folder):
    """Returns the two tables of a run, for training and for testing."""
    train = read_table(folder / "train.csv", ["step", "lr", "loss"])
    test = read_table(folder / "test.csv", ["epoch", "step", "loss", "accuracy"])
    if train.empty:
        sys.exit(f"plot.py: error: {folder / 'train.csv'} has no steps yet: wait for the first")
    return train, test


def label_runs(folders):
    """Returns a label for each run: the settings in which they differ, or else its folder."""
    settings = []
    for folder in folders:
        try:
            known = json.loads((folder / "settings.json").read_text())
        except (OSError, ValueError):
            known = {}
        settings.append({name: known[name] for name in known if name not in ("resume", "log_dir")})
    names = dict.fromkeys(name for known in settings for name in known)
    differing = [name for name in names if len({str(known.get(name)) for known in settings}) > 1]
    labels = [", ".join(f"{name} {known.get(name)}" for name in differing) for known in settings]
    return [
        str(folder) if labels.count(label) > 1 or not known else label
        for folder, known, label in zip(folders, settings, labels, strict=True)
    ]


def draw(runs, labels):
    """Returns a figure of runs, each a pair of tables, with a panel for each kind of curve."""
    names = ["training loss"]
    if any(len(test) > 0 for _, test in runs):
        names += ["test loss", "test accuracy (%)"]
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
    in_epochs = all(len(test) > 0 for _, test in runs)
    axes[-1, 0].set_xlabel("epoch" if in_epochs else "step")
    for number, ((train, test), label) in enumerate(zip(runs, labels, strict=True)):
        # Runs with other batch sizes can be compared by epochs, but not by steps.
        unit = test.step.iloc[-1] / test.epoch.iloc[-1] if in_epochs else 1
        draw_run(panels, train, test, unit, label, number)
    if len(runs) > 1:
        figure.legend(loc="outside upper center", ncols=2 if len(runs) > 3 else 1)
    return figure


def draw_run(panels, train, test, unit, label, number):
    """Draws the curves of a run. The unit of the x axis is so many steps: an epoch, or one."""
    colour = f"C{number % 10}"
    look = {"color": colour, "marker": "osD^vPX*"[number % 8], "markersize": 5}
    times = train.step / unit
    window = min(50, 1 + len(train) // 10)  # steps
    mean = train.loss.rolling(window, center=True, min_periods=1).mean()
    panels["training loss"].plot(times, train.loss, color=colour, alpha=0.2, linewidth=0.5)
    panels["training loss"].plot(times, mean, markevery=0.2, label=label, **look)
    if len(test) > 0:
        panels["test loss"].plot(test.step / unit, test.loss, **look)
        panels["test accuracy (%)"].plot(test.step / unit, test.accuracy, **look)
    if "learning rate" in panels:
        panels["learning rate"].plot(times, train.lr, markevery=0.2, **look)


def main(argv=None):
    """Draws the runs that are named, or the newest one; exits with a line where it cannot."""
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
    except (OSError, ValueError) as error:  # ValueError: not a format of matplotlib's
        sys.exit(f"plot.py: error: {output}: {error}")
    print(f"The curves are in {output}")


if __name__ == "__main__":
    main()
