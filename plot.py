"""Draw the curves of runs of main.py: losses, accuracy, learning rate if it changes.

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

# Okabe and Ito's, but for their yellow, which is too pale for lines on white.
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#E69F00", "#56B4E9"]
LINE_STYLES = ("-", (0, (5, 1.5)), (0, (1.5, 1)), (0, (6, 1.5, 1.5, 1.5)))
MARKERS = "osD^v"  # 5, 4 and 7 share no factor: looks recur late, in grey print too
STYLE = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
STYLE |= {"axes.grid": True, "grid.color": "0.9", "axes.formatter.useoffset": False}


class PlotError(ValueError):
    """What prevents a plot, as one line for its user: what is wrong, and the way out."""


def read_table(path, header):
    """The whole rows of a csv file of main.py that have a loss that is finite."""
    try:
        text = path.read_bytes().decode(errors="replace")
    except OSError as error:
        line = f"{path}: {error.strerror}: name the log dir of a run of main.py"
        raise PlotError(line) from error
    if not text:
        raise PlotError(f"{path} is empty: name the log dir of a run of main.py")
    # A run writes blocks, not lines: what follows the last line end may be cut short.
    text = header if header.startswith(text) else text[: text.rfind("\n") + 1]
    try:
        if text.partition("\n")[0].strip() != header:
            raise ValueError("other columns")
        table = pd.read_csv(io.StringIO(text), dtype=float)
        wrong = ~np.isfinite(table.drop(columns="loss")) | (table < 0)
        wrong |= table[["step", "epoch"]] < 1
        if wrong.any(axis=None) or (table.step.diff() <= 0).any():
            raise ValueError("impossible numbers")
    except ValueError as error:
        line = f"{path} is broken or not by main.py, whose columns are {header}"
        raise PlotError(f"{line}: name another log dir or train again") from error
    return table[np.isfinite(table.loss)]


def read_run(log_dir):
    """Returns train.csv, test.csv and the steps per epoch, None while not yet known."""
    train = read_table(log_dir / "train.csv", "step,epoch,batch,lr,loss")
    test = read_table(log_dir / "test.csv", "epoch,step,lr,loss,accuracy")
    if not (train.loss > 0).any():
        line = f"{log_dir / 'train.csv'} has no steps yet that have a finite loss"
        raise PlotError(f"{line}: wait for main.py, or name another log dir")
    last = train.iloc[-1]
    if last.epoch > 1:
        return train, test, max(1, (last.step - last.batch - 1) / (last.epoch - 1))
    return train, test, test.step.iloc[0] / test.epoch.iloc[0] if len(test) else None


def running_mean(losses, window):
    """The mean of each loss and its neighbours in a centred window, cut at the ends."""
    return losses.rolling(window, center=True, min_periods=1).mean()


def draw(runs):
    """Returns a figure of runs, a dict from names to what read_run gives."""
    trains, tests, lengths = zip(*runs.values())
    window = min(51, max(map(len, trains)) // 20 | 1)
    panels = {"train": f"Training loss (nats)\nbold: mean of {window} steps"}
    if any(map(len, tests)):
        panels |= {"loss": "Test loss\n(nats)", "accuracy": "Test accuracy\n(%)"}
    if any(train.lr.nunique() > 1 for train in trains):
        panels["lr"] = "Learning rate"
    heights = [2.4] + [1.4] * (len(panels) - 1)
    figure = Figure((6.5, sum(heights) + 0.7), layout="constrained")
    rows = figure.subplots(
        len(panels), 1, sharex=True, squeeze=False, height_ratios=heights
    )
    axes, handles = dict(zip(panels, rows[:, 0])), []
    for i, (train, test, length) in enumerate(runs.values()):
        unit = length if all(lengths) else 1
        x, every = train.step / unit, max(1, len(train) // 8)
        look = {"color": COLOURS[i % 7], "linestyle": LINE_STYLES[i % 4], "lw": 1.4}
        dots = {"marker": MARKERS[i % 5], "markersize": 4, "zorder": 3}
        axes["train"].plot(x, train.loss, color=COLOURS[i % 7], alpha=0.3, lw=0.5)
        mean, dots_at = running_mean(train.loss, window), (every // 2, every)
        handles += axes["train"].plot(x, mean, markevery=dots_at, **look, **dots)
        for name in panels.keys() & {"loss", "accuracy"}:
            axes[name].plot(test.step / unit, test[name], **look, **dots)
        if "lr" in axes:
            axes["lr"].plot(x, train.lr, drawstyle="steps-pre", **look)
    for name, panel in axes.items():
        panel.set_ylabel(panels[name])
        if name != "accuracy":
            panel.set_yscale("log", nonpositive="mask")
            panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            panel.yaxis.set_minor_locator(NullLocator())
            panel.yaxis.set_major_formatter("{x:g}")
    panel.xaxis.set_major_formatter("{x:g}")
    panel.set_xlim(left=0)
    panel.set_xlabel(f"Training time ({'epochs' if all(lengths) else 'steps'})")
    figure.align_ylabels()
    if len(runs) > 1:
        columns, numbers = max(1, 70 // (max(map(len, runs)) + 10)), range(len(runs))
        legend = figure.legend(
            handles, numbers, loc="outside upper center", ncols=columns
        )
        for text, name in zip(legend.get_texts(), runs):
            text.set(text=name, parse_math=False)
    return figure


def main(argv=None):
    """Draws the curves; SystemExit with the documented status if that fails."""
    parser = argparse.ArgumentParser("plot.py", allow_abbrev=False)
    parser.error = lambda line: parser.exit(2, f"plot.py: error: {line}\n")
    text = "of the runs to compare (default: ./logs)"
    parser.add_argument("log_dirs", nargs="*", metavar="LOG_DIR", help=text)
    text = "also .pdf, .svg, ... (default: curves.png in the first log dir)"
    parser.add_argument("--output", metavar="FILE", help=text)
    args = parser.parse_args(argv)
    log_dirs = [Path(log_dir) for log_dir in args.log_dirs or ["./logs"]]
    output = Path(args.output or log_dirs[0] / "curves.png")
    suffixes = Figure().canvas.get_supported_filetypes()
    if output.suffix[1:].lower() not in suffixes:
        parser.error(f"--output {output}: end it in one of .{', .'.join(suffixes)}")
    try:
        runs = {str(log_dir): read_run(log_dir) for log_dir in log_dirs}
        with rc_context(STYLE):
            draw(runs).savefig(output, dpi=200)
    except PlotError as error:
        sys.exit(f"plot.py: error: {error}")
    except OSError as error:
        line = f"{output}: {error.strerror}: name a writable file with --output"
        sys.exit(f"plot.py: error: {line}")
    print(f"curves written to {output}")


if __name__ == "__main__":
    main()
