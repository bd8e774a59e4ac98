"""Draw the curves of training runs: losses, accuracy, a learning rate that changes.

python plot.py                                 # the run in ./logs, also a running one
python plot.py logs slow --output curves.pdf   # two runs over one another
"""

import argparse
import io
import sys
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

HEADERS = {
    "train.csv": "step,epoch,batch,lr,loss",
    "test.csv": "epoch,step,lr,loss,accuracy",
}
# Okabe and Ito's colours but for the yellow, which is too pale for lines on white. The
# three lengths share no factor, so that looks recur late, also where print is grey.
COLOURS = "#0072B2 #D55E00 #009E73 #CC79A7 #000000 #E69F00 #56B4E9".split()
LINE_STYLES = ("-", (0, (5, 1.5)), (0, (1.5, 1)), (0, (6, 1.5, 1.5, 1.5)))
MARKERS = "osD^v"


class PlotError(ValueError):
    """What prevents a plot, as one line for its user: what is wrong, and the way out."""


def read_table(path):
    """The whole rows of train.csv or test.csv; PlotError if main.py wrote no such."""
    header = HEADERS[path.name]
    try:
        text = path.read_bytes().decode(errors="replace")
    except OSError as error:
        line = f"{path}: {error.strerror}: name the log dir of a run of main.py"
        raise PlotError(line) from error
    if not text:
        raise PlotError(f"{path} is empty: name the log dir of a run of main.py")
    # A run writes blocks, not lines, so what follows the last line end is no number.
    text = header if header.startswith(text) else text[: text.rfind("\n") + 1]
    line = f"{path} is broken or not by main.py, whose columns are {header}"
    foreign = PlotError(f"{line}: name another log dir or run main.py again")
    if text.partition("\n")[0].strip() != header:
        raise foreign
    try:  # as text, to tell a missing number from a loss that is not a number
        table = pd.read_csv(io.StringIO(text), dtype=str, keep_default_na=False)
        shifted = not isinstance(table.index, pd.RangeIndex)  # by a surplus number
        if shifted or table.isna().any(axis=None):
            raise foreign
        table = table.astype(float)
    except ValueError as error:
        raise foreign from error
    others = table.drop(columns="loss")
    ordered = table.step.is_monotonic_increasing and table.step.is_unique
    if not ordered or not (np.isfinite(others) & (others >= 0)).all(axis=None):
        raise foreign
    if not (table[["step", "epoch"]] >= 1).all(axis=None):
        raise foreign
    table["loss"] = table.loss.where(np.isfinite(table.loss) & (table.loss > 0))
    return table


def read_run(log_dir):
    """Returns train.csv, test.csv and the steps per epoch, None while not yet known."""
    train, test = (read_table(Path(log_dir, name)) for name in HEADERS)
    path = Path(log_dir, "train.csv")
    if train.loss.isna().all():
        found = (
            "finite loss: lower the --lr of" if len(train) else "steps yet: wait for"
        )
        raise PlotError(f"{path} has no {found} main.py, or name another log dir")
    last, length = train.iloc[-1], None
    if last.epoch > 1:
        length = (last.step - last.batch - 1) / (last.epoch - 1)
    elif len(test):
        length = test.step[0] / test.epoch[0]
    if length is not None and length < 1:
        raise PlotError(f"{path} counts no steps per epoch: run main.py again")
    return train, test, length


def running_mean(losses, window):
    """The mean of each loss and its neighbours in a centred window, cut at the ends."""
    return losses.rolling(window, center=True, min_periods=1).mean()


def draw(runs, names):
    """Returns the figure of runs, each as read_run gives it, over one another."""
    window = min(101, max(len(train) for train, _, _ in runs) // 10 | 1)
    panels = {"train": f"Training loss (nats)\nbold: mean of {window} steps"}
    if any(test.loss.notna().any() for _, test, _ in runs):
        panels["loss"] = "Test loss\n(nats)"
    if any(len(test) for _, test, _ in runs):
        panels["accuracy"] = "Test accuracy\n(%)"
    if any(train.lr.nunique() > 1 for train, _, _ in runs):
        panels["lr"] = "Learning rate"
    heights = [2.4] + [1.4] * (len(panels) - 1)
    figure = Figure((6.5, sum(heights) + 0.7), layout="constrained")
    figure.get_layout_engine().set(h_pad=0.06)
    grid = {"height_ratios": heights}
    rows = figure.subplots(len(panels), sharex=True, squeeze=False, gridspec_kw=grid)
    axes, handles = dict(zip(panels, rows[:, 0])), []
    in_epochs = all(length for _, _, length in runs)
    for i, (train, test, length) in enumerate(runs):
        unit = length if in_epochs else 1
        colour, style = COLOURS[i % 7], LINE_STYLES[i % 4]
        look = {"color": colour, "linestyle": style, "linewidth": 1.4}
        look |= {"marker": MARKERS[i % 5], "markersize": 4, "zorder": 4}
        x, mean = train.step / unit, running_mean(train.loss, window)
        pale = {"color": colour, "alpha": 0.3, "linewidth": 0.5, "zorder": 2}
        axes["train"].plot(x, train.loss, **pale)
        every = max(1, len(train) // 8)
        handles += axes["train"].plot(x, mean, **look, markevery=(every // 2, every))
        for name in panels.keys() & {"loss", "accuracy"}:
            axes[name].plot(test.step / unit, test[name], **look)
        if "lr" in axes:
            look |= {"marker": "", "drawstyle": "steps-pre"}
            axes["lr"].plot(x, train.lr, **look)
    for name, panel in axes.items():
        panel.set_ylabel(panels[name])
        panel.grid(color="0.9", linewidth=0.6)
        panel.spines[["top", "right"]].set_visible(False)
        if name == "accuracy":
            panel.ticklabel_format(axis="y", useOffset=False)
            continue
        panel.set_yscale("log", nonpositive="mask")
        panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.yaxis.set_minor_locator(NullLocator())
        panel.yaxis.set_major_formatter("{x:g}")
    panel.set_xlim(left=0)
    panel.set_xlabel("Training time (epochs)" if in_epochs else "Training time (steps)")
    figure.align_ylabels()
    if len(runs) > 1:
        columns = max(1, 70 // (max(map(len, names)) + 10))
        place = {"loc": "outside upper center", "ncols": columns, "frameon": False}
        legend = figure.legend(handles, list(map(str, range(len(runs)))), **place)
        for text, name in zip(legend.get_texts(), names):
            text.set(text=name, parse_math=False)
    return figure


def main(argv=None):
    """Draws the curves; SystemExit with the documented status if that fails."""
    parser = argparse.ArgumentParser("plot.py", allow_abbrev=False)
    parser.description = "Draw the training and test curves of runs of main.py."
    parser.error = lambda line: parser.exit(2, f"plot.py: error: {line}\n")
    text = "log dirs of the runs to compare (default: ./logs)"
    parser.add_argument("log_dirs", nargs="*", metavar="LOG_DIR", help=text)
    text = "picture to write, such as a .pdf (default: curves.png in the first log dir)"
    parser.add_argument("--output", metavar="FILE", help=text)
    args = parser.parse_args(argv)
    log_dirs = [Path(log_dir) for log_dir in args.log_dirs or ["./logs"]]
    output = Path(args.output or log_dirs[0] / "curves.png")
    suffixes = Figure().canvas.get_supported_filetypes()
    if output.suffix[1:].lower() not in suffixes:
        parser.error(f"--output {output}: end it in one of .{', .'.join(suffixes)}")
    names = [log_dir.resolve().name for log_dir in log_dirs]
    if len(set(names)) < len(names):
        names = list(map(str, log_dirs))
    try:
        runs = [read_run(log_dir) for log_dir in log_dirs]
        with rc_context({"font.size": 9, "axes.labelsize": 9}):
            draw(runs, names).savefig(output, dpi=200)
    except PlotError as error:
        sys.exit(f"plot.py: error: {error}")
    except OSError as error:
        line = f"{output}: {error.strerror}: name a writable file with --output"
        sys.exit(f"plot.py: error: {line}")
    print(f"curves written to {output}")


if __name__ == "__main__":
    main()
