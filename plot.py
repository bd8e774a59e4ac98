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
from matplotlib.ticker import LogLocator

# Okabe and Ito's, but for their yellow, which is too pale for lines on white.
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#E69F00", "#56B4E9"]
LINE_STYLES = ("-", (0, (5, 1.5)), (0, (1.5, 1)), (0, (6, 1.5, 1.5, 1.5)))
MARKERS = "osD^v"  # 7, 4 and 5 share no factor: looks recur late, in grey print too
STYLE = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
STYLE |= {"axes.grid": True, "grid.color": "0.9", "axes.formatter.useoffset": False}
STYLE |= {"lines.linewidth": 1.4, "lines.markersize": 4, "text.parse_math": False}


def read_table(path, header):
    """The rows with a finite loss; ValueError if main.py cannot have written them."""
    text = path.read_text("utf-8", "replace")
    text = f"{header}\n" if text and header.startswith(text) else text
    # A run writes blocks, not lines: what follows the last line end may be cut short.
    text = text[: text.rfind("\n") + 1]
    try:
        table = pd.read_csv(io.StringIO(text), dtype=float)
        others = table.drop(columns="loss", errors="ignore")
        possible = ((0 <= others) & (others < np.inf)).all(axis=None)
        if ",".join(table) != header or not possible or any(table.step.diff() <= 0):
            raise ValueError("other columns or impossible numbers")
    except ValueError as error:
        raise ValueError(f"{path} is empty, broken or not {header}") from error
    return table[np.isfinite(table.loss)]


def read_run(log_dir):
    """Returns train.csv, test.csv and the steps per epoch, None while not yet known."""
    train = read_table(log_dir / "train.csv", "step,epoch,batch,lr,loss")
    test = read_table(log_dir / "test.csv", "epoch,step,lr,loss,accuracy")
    if not (train.loss > 0).any():
        raise ValueError(f"{log_dir / 'train.csv'} has no steps yet with a finite loss")
    return train, test, (test.step / test.epoch).max() if len(test) else None


def draw(runs):
    """Returns a figure of runs, a dict from names to what read_run gives."""
    trains, tests, lengths = zip(*runs.values())
    window = min(51, max(map(len, trains)) // 20 | 1)
    labels = {"train": f"Training loss (nats)\nbold: mean of {window} steps"}
    if any(map(len, tests)):
        labels |= {"loss": "Test loss\n(nats)", "accuracy": "Test accuracy\n(%)"}
    if any(train.lr.nunique() > 1 for train in trains):
        labels["lr"] = "Learning rate"
    heights, rows = [2.4] + [1.4] * (len(labels) - 1), [[name] for name in labels]
    figure = Figure((6.5, sum(heights) + 0.7), layout="constrained")
    axes = figure.subplot_mosaic(rows, sharex=True, height_ratios=heights)
    for i, (name, (train, test, length)) in enumerate(runs.items()):
        unit, every = length if all(lengths) else 1, max(1, len(train) // 8)
        x = train.step / unit
        mean = train.loss.rolling(window, center=True, min_periods=1).mean()
        look = {"color": COLOURS[i % 7], "ls": LINE_STYLES[i % 4], "zorder": 3}
        look["marker"], label = MARKERS[i % 5], f" {name}"  # one in _ would be hidden
        few = look | {"markevery": (every // 2, every)}
        axes["train"].plot(x, train.loss, color=COLOURS[i % 7], alpha=0.3, lw=0.5)
        axes["train"].plot(x, mean, label=label, **few)
        for column in labels.keys() & {"loss", "accuracy"}:
            axes[column].plot(test.step / unit, test[column], **look)
        if "lr" in axes:
            axes["lr"].plot(x, train.lr, drawstyle="steps-pre", **few)
    for name, panel in axes.items():
        panel.set_ylabel(labels[name])
        if name != "accuracy":
            panel.set_yscale("log", nonpositive="mask", subs=[])
            panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            panel.yaxis.set_major_formatter("{x:g}")
    panel.xaxis.set_major_formatter("{x:g}")
    panel.set_xlim(left=0)
    panel.set_xlabel(f"Training time ({'epochs' if all(lengths) else 'steps'})")
    figure.align_ylabels()
    if len(runs) > 1:
        columns = max(1, 70 // (max(map(len, runs)) + 10))
        figure.legend(loc="outside upper center", ncols=columns, frameon=False)
    return figure


def main(argv=None):
    """Draws the curves; SystemExit with the documented status if that fails."""
    parser = argparse.ArgumentParser("plot.py", allow_abbrev=False)
    parser.description = __doc__.partition("\n")[0]
    parser.error = lambda line: parser.exit(2, f"plot.py: error: {line}\n")
    add = parser.add_argument
    add("log_dirs", nargs="*", type=Path, metavar="LOG_DIR", help="default: ./logs")
    add("--output", type=Path, metavar="FILE", help="default: first LOG_DIR/curves.png")
    args = parser.parse_args(argv)
    log_dirs = args.log_dirs or [Path("logs")]
    output = args.output or log_dirs[0] / "curves.png"
    suffixes = Figure().canvas.get_supported_filetypes()
    if output.suffix[1:].lower() not in suffixes:
        parser.error(f"--output {output}: end it in one of .{', .'.join(suffixes)}")
    way_out = "run main.py first, or name another log dir"
    try:
        runs = {str(log_dir): read_run(log_dir) for log_dir in log_dirs}
        way_out = f"name another file than {output} with --output"
        with rc_context(STYLE):
            draw(runs).savefig(output, dpi=200)
    except (OSError, RuntimeError, ValueError) as error:
        sys.exit(f"plot.py: error: {error}: {way_out}")
    print(f"curves written to {output}")


if __name__ == "__main__":
    main()
