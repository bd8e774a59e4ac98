"""Draw the curves of runs of main.py: exercise 2 of the guide.

    python plot.py                        # the run in ./logs, even while it goes on
    python plot.py logs/run-1 logs        # two runs over one another
    python plot.py --output curves.pdf    # all flags: python plot.py --help

A run is read from train.csv and test.csv in its log dir, where its picture goes, too. A
picture of several runs goes to the current folder. Its legend tells them apart by the
flags that differ, which are read from checkpoint.pt in their log dirs.
"""

import argparse
import io
import math
import pickle
import sys
from pathlib import Path
from typing import NamedTuple

import pandas as pd
from matplotlib import cycler, rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import AutoLocator, LogLocator

TRAIN_COLUMNS = ["step", "epoch", "batch", "lr", "loss"]
TEST_COLUMNS = ["epoch", "step", "lr", "loss", "accuracy"]
FORMATS = [".png", ".pdf", ".svg"]

# Okabe and Ito's colours, which colour-blind readers can tell apart, but for yellow,
# which is too pale for lines on white.
COLOURS = [
    "#0072B2",  # blue
    "#D55E00",  # vermilion
    "#009E73",  # bluish green
    "#CC79A7",  # reddish purple
    "#000000",  # black
    "#E69F00",  # orange
    "#56B4E9",  # sky blue
]
# With markers, runs can be told apart in grey print, too. A line that is not solid does
# not hide the one under it.
MARKERS = ["o", "s", "D", "^", "v", "P", "X"]
LINE_STYLES = ["-", "--", "-.", ":", "-", "--", "-."]
# Seven looks, and the same again with hollow markers.
LOOKS = cycler(fillstyle=["full", "none"]) * (
    cycler(color=COLOURS) + cycler(marker=MARKERS) + cycler(linestyle=LINE_STYLES)
)

STYLE = {
    "axes.prop_cycle": LOOKS,  # The first line of each panel has the first look.
    "axes.formatter.useoffset": False,  # A tick says 99.2, not 0.2 under a +99.
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "font.size": 9,
    "grid.color": "0.9",
    "lines.linewidth": 1.4,
    "lines.markersize": 4,
    "savefig.dpi": 140,  # This makes 910 pixels of 6.5 inches, enough for a web page.
}


class Run(NamedTuple):
    """What is known of a run: a row for each step, and a row for each epoch."""

    train: pd.DataFrame
    test: pd.DataFrame


def stop(message):
    """Ends the program, with exit status 1, for a reason that was to be expected."""
    sys.exit(f"plot.py: error: {message}")


# ---------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------


def read_run(log_dir):
    """Returns the Run in a log dir; ends the program if there is none."""
    train = read_table(log_dir / "train.csv", TRAIN_COLUMNS)
    test = read_table(log_dir / "test.csv", TEST_COLUMNS)
    if train.empty:
        stop(f"{log_dir / 'train.csv'} has no steps yet: wait for the first of them")
    return Run(train, test)


def read_table(path, columns):
    """Returns the table in a csv file of main.py's, without a loss that is not finite.

    Ends the program if the file is missing, or is another one.
    """
    way_out = "run main.py first, or name another log dir"
    try:
        text = path.read_text()
        # While a run goes on, its last line may have been written only in part.
        whole_lines = io.StringIO(text.rpartition("\n")[0])
        # A run that fails ends with a loss of nan, which pandas takes for a missing
        # value, or of inf, which it would not.
        table = pd.read_csv(whole_lines, dtype=float, na_values=["inf", "-inf"])
    except OSError as error:
        stop(f"{path}: {error.strerror}: {way_out}")
    except ValueError:  # pandas' errors, and that of bytes that are no text
        stop(f"{path} is empty, or not a table of main.py's: {way_out}")
    if list(table.columns) != columns:
        stop(f"{path} has other columns than {','.join(columns)}: {way_out}")
    return table.dropna(subset=["loss"], ignore_index=True)


# ---------------------------------------------------------------------------------------
# Telling runs apart
# ---------------------------------------------------------------------------------------


def label_runs(log_dirs):
    """Returns a label for each run: the flags that differ, as in `lr 0.1, seed 2`.

    No two labels are equal: where flags do not tell a run from all others, or are not
    known, the label names its folder.
    """
    flags_of_runs = [read_flags(log_dir) for log_dir in log_dirs]
    differing = differing_flags(flags_of_runs)
    descriptions = []
    for flags in flags_of_runs:
        parts = [f"{name} {flags[name]}" for name in differing if name in flags]
        descriptions.append(", ".join(parts))
    labels = []
    for log_dir, description in zip(log_dirs, descriptions, strict=True):
        if description == "":
            labels.append(f"folder {log_dir}")
        elif descriptions.count(description) > 1:
            labels.append(f"{description}, folder {log_dir}")
        else:
            labels.append(description)
    return labels


def read_flags(log_dir):
    """Returns the flags of a run, a dict from names to text; {} if not known."""
    # Imported only here, since it takes seconds, and a single run needs no label.
    import torch

    path = log_dir / "checkpoint.pt"
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        settings = dict(checkpoint["settings"])
    except (  # This is what a file that is missing, broken or foreign can raise.
        OSError,
        EOFError,
        LookupError,
        RuntimeError,
        TypeError,
        ValueError,
        pickle.UnpicklingError,
    ):
        return {}
    return {name.replace("_", "-"): str(value) for name, value in settings.items()}


def differing_flags(flags_of_runs):
    """Returns the names of the flags that do not have the same value in all runs."""
    values = {}
    for flags in flags_of_runs:
        for name, value in flags.items():
            values.setdefault(name, set()).add(value)
    return [name for name in values if len(values[name]) > 1]


# ---------------------------------------------------------------------------------------
# Drawing: a function for each kind of panel, and the figure made of them
# ---------------------------------------------------------------------------------------


def draw_training_loss(axes, runs, labels):
    """The loss of every step, light, and its running mean, bold."""
    longest = max(len(run.train) for run in runs)
    window = min(max(5, longest // 20), 50)  # a twentieth of a run, but 5 to 50 steps
    axes.set_ylabel(f"Training loss (nats)\nbold: mean of {window} steps")
    light = {"linewidth": 0.5, "alpha": 0.3}
    if len(runs) > 1:
        light["alpha"] = 0.15  # Over one another they get darker.
    axes.set_prop_cycle(color=COLOURS)
    for run in runs:
        axes.plot(run.train["time"], run.train["loss"], **light)
    axes.set_prop_cycle(LOOKS)
    for run, label in zip(runs, labels, strict=True):
        mean = run.train["loss"].rolling(window, center=True, min_periods=1).mean()
        markers = choose_markers(run.train)
        axes.plot(run.train["time"], mean, label=label, markevery=markers)
    use_log_scale(axes)


def draw_test_loss(axes, runs):
    """The mean loss of the test images after each epoch."""
    axes.set_ylabel("Test loss\n(nats)")
    for run in runs:
        markers = choose_markers(run.test)
        axes.plot(run.test["time"], run.test["loss"], markevery=markers)
    use_log_scale(axes)


def draw_test_accuracy(axes, runs):
    """The share of test images that are classified right after each epoch."""
    axes.set_ylabel("Test accuracy\n(%)")
    for run in runs:
        markers = choose_markers(run.test)
        axes.plot(run.test["time"], run.test["accuracy"], markevery=markers)
    top = axes.get_ylim()[1]
    axes.set_ylim(top=min(top, 100))  # The margin above the lines ends there, too.


def draw_learning_rate(axes, runs):
    """The learning rate of every step."""
    axes.set_ylabel("Learning rate")
    for run in runs:
        markers = choose_markers(run.train)
        axes.plot(
            run.train["time"], run.train["lr"], drawstyle="steps-pre", markevery=markers
        )
    use_log_scale(axes)


def choose_markers(table):
    """Returns the first row of a table that has a marker, and how far the next is.

    Some eight markers show whose line it is; a marker for each step would hide it.
    """
    distance = max(1, len(table) // 8)
    return (distance // 2, distance)


def use_log_scale(axes):
    """Makes the y axis of a panel logarithmic, with as many ticks as it has room for.

    It is called after the lines are drawn, which decide on the range of the axis.
    """
    axes.set_yscale("log", subs=[])
    axes.yaxis.set_major_formatter("{x:g}")
    bottom, top = axes.get_ylim()
    # For more than numticks powers of ten, LogLocator would give no ticks at all.
    if top < 10 * bottom:
        locator = AutoLocator()  # such as 0.2, 0.25, 0.3
    elif top < 1000 * bottom:
        locator = LogLocator(subs=[1, 2, 5], numticks=20)  # 0.1, 0.2, 0.5, 1
    else:
        locator = LogLocator(subs=[1, 3], numticks=20)  # 0.1, 0.3, 1
    axes.yaxis.set_major_locator(locator)


def draw(runs, labels):
    """Returns a figure of the runs, with a panel for each kind of curve they have."""
    unit = add_time(runs)
    tested = any(len(run.test) > 0 for run in runs)
    rate_changes = any(run.train["lr"].nunique() > 1 for run in runs)
    heights = {"training loss": 2.2}  # of the panels, in inches
    if tested:
        heights["test loss"] = 1.4
        heights["test accuracy"] = 1.4
    if rate_changes:
        heights["learning rate"] = 1.4
    height = sum(heights.values()) + 0.5  # with the label of the x axis
    figure = Figure(figsize=(6.5, height), layout="constrained")
    panels = figure.subplot_mosaic(
        [[name] for name in heights],
        height_ratios=list(heights.values()),
        sharex=True,
    )
    draw_training_loss(panels["training loss"], runs, labels)
    if tested:
        draw_test_loss(panels["test loss"], runs)
        draw_test_accuracy(panels["test accuracy"], runs)
    if rate_changes:
        draw_learning_rate(panels["learning rate"], runs)
    lowest = figure.axes[-1]
    lowest.set_xlabel(f"Training time ({unit})")
    lowest.set_xlim(left=0)
    figure.align_ylabels()
    if len(runs) > 1:
        add_legend(figure, labels)
    return figure


def add_time(runs):
    """Adds the column time, for the x axis, to all tables, and returns its unit.

    The unit is epochs, so that runs with other batch sizes can be compared. How many
    steps an epoch has is known from the first test on. As long as one of the runs has
    none, the unit is steps.
    """
    if any(run.test.empty for run in runs):
        for run in runs:
            run.train["time"] = run.train["step"]
            run.test["time"] = run.test["step"]
        return "steps"
    for run in runs:
        last_test = run.test.iloc[-1]
        steps_per_epoch = last_test["step"] / last_test["epoch"]
        run.train["time"] = run.train["step"] / steps_per_epoch
        run.test["time"] = run.test["epoch"]
    return "epochs"


def add_legend(figure, labels):
    """Puts the legend above the panels, which keep their heights."""
    # The figure is 95 letters wide. Beside a label are its line and gaps: 8 letters.
    longest = max(len(label) for label in labels)
    columns = max(1, 95 // (longest + 8))
    rows = math.ceil(len(labels) / columns)
    figure.legend(loc="outside upper center", ncols=columns, frameon=False)
    figure.set_figheight(figure.get_figheight() + 0.2 * rows)


# ---------------------------------------------------------------------------------------
# main
# ---------------------------------------------------------------------------------------


class OneLineParser(argparse.ArgumentParser):
    """Says in one line what is wrong with a flag, without the usage before it.

    main.py has the same class. To import it from there would load PyTorch.
    """

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}\n")


def parse_arguments(argv=None):
    """Returns the flags' values; exits with status 2 if one of them makes no sense."""
    parser = OneLineParser(
        "plot.py", description="Draw the curves of runs of main.py.", allow_abbrev=False
    )
    parser.add_argument(
        "log_dirs",
        nargs="*",
        type=Path,
        default=[Path("logs")],
        metavar="LOG_DIR",
        help="of a run of main.py (default: ./logs)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="a .png, .pdf or .svg (default: curves.png, in the log dir of a single"
        " run, or in the current folder for several)",
    )
    args = parser.parse_args(argv)
    args.log_dirs = list(dict.fromkeys(args.log_dirs))  # each of them once
    if args.output is None:
        folder = args.log_dirs[0] if len(args.log_dirs) == 1 else Path()
        args.output = folder / "curves.png"
    if args.output.suffix.lower() not in FORMATS:
        parser.error(
            f"argument --output: {args.output} must end in {' or '.join(FORMATS)}"
        )
    return args


def main(argv=None):
    """Draws the runs as the flags say. Raises SystemExit if it cannot."""
    args = parse_arguments(argv)
    runs = [read_run(log_dir) for log_dir in args.log_dirs]
    labels = [""]
    if len(runs) > 1:
        labels = label_runs(args.log_dirs)
    with rc_context(STYLE):
        figure = draw(runs, labels)
        try:
            figure.savefig(args.output)
        except OSError as error:
            stop(f"{args.output}: {error.strerror}: name another file with --output")
    print(f"The curves are in {args.output}")


if __name__ == "__main__":
    main()
