"""Compare the true gradient with mini-batch gradients, after every epoch of a run.

    python gradients.py                 # the newest run in ./logs
    python gradients.py --mode train    # with dropout and batch norm as in training
    python gradients.py logs/run-1 --batch-size 32

This is exercise 4 of the guide. It reads the parameters that main.py has stored in the folder of a
run, computes gradients under the settings of that run, and writes a table and a picture of them
there: gradients.csv and gradients.png or, with --mode train, gradients-train.csv and .png.

The true gradient G is that of the mean loss over all training images in eval mode, where dropout
is off and batch norm uses its running statistics. A mini-batch gradient g is that of the mean loss
over the images of a mini-batch, in the chosen mode. A gradient is a vector of P values,
one for each parameter of the model.
"""

import argparse
import itertools
import json
import os
import pickle
import sys
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # as in main.py, before PyTorch is imported

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator
from torch import nn

from main import LeNet, Loader, load_dataset, newest_run, seed_everything, select_device

SAMPLE = 100  # mini-batches: enough for a percentile, and 53 MB of gradients


def gradient(model, data, target):
    """Returns the gradient of the mean loss over a batch of images: P values."""
    model.zero_grad()
    loss = nn.functional.cross_entropy(model(data), target)
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def true_gradient(model, batches):
    """Returns the true gradient G: that of the mean loss over all images, in eval mode."""
    model.eval()
    total = 0
    images = 0
    for data, target in batches:
        total += len(data) * gradient(model, data, target)
        images += len(data)
    return total / images


def mini_batch_gradients(model, mini_batches, mode):
    """Returns the gradients g of K mini-batches as the rows of a matrix, K x P."""
    model.train(mode == "train")
    return torch.stack([gradient(model, data, target) for data, target in mini_batches])


class ArrayUnpickler(pickle.Unpickler):
    """Reads pickled numpy arrays, and refuses anything else.

    A pickle names functions to call when it is loaded: pickle.load would run whatever someone put
    in it.
    """

    # What the pickle of an array calls. The first is _reconstruct, whose module varies with numpy.
    FUNCTIONS = (np.array(0).__reduce__()[0], np.ndarray, np.dtype)

    def find_class(self, module, name):
        for function in self.FUNCTIONS:
            if function.__name__ == name:
                return function
        raise pickle.UnpicklingError(f"it calls {module}.{name}, which is not a part of an array")


def load_parameters(path):
    """Reads a params/epoch-NN.pkl: a dict from names to float32 numpy arrays.

    Unlike pickle.load, it runs no code from the file, but raises UnpicklingError.
    """
    with open(path, "rb") as file:
        return ArrayUnpickler(file).load()


def load_model(path, dropout, device):
    """Returns a LeNet with the parameters in a file."""
    model = LeNet(dropout)
    arrays = load_parameters(path)
    model.load_state_dict({name: torch.tensor(array) for name, array in arrays.items()})
    return model.to(device)


def compare(true, gradients, batch_size):
    """Compares K x P mini-batch gradients g with the true gradient G. Returns a dict:

    true_norm        |G|, in nats per unit of parameter
    norm_...         |g|, in nats per unit of parameter
    cosine_...       the cosine of the angle between g and G
    distance_...     |g - G| / |G|
    noise_scale      the gradient noise scale, in images

    The three dots stand for mean, p5 and p95: the mean, the 5th and the 95th percentile.
    """
    true_norm = true.norm()
    norms = gradients.norm(dim=1)
    measures = {
        "norm": norms,
        "cosine": gradients @ true / (norms * true_norm),
        "distance": (gradients - true).norm(dim=1) / true_norm,
    }
    row = {"true_norm": true_norm.item()}
    for name, values in measures.items():
        row[f"{name}_mean"] = values.mean().item()
        row[f"{name}_p5"] = values.quantile(0.05).item()
        row[f"{name}_p95"] = values.quantile(0.95).item()
    row["noise_scale"] = noise_scale(true, gradients, batch_size)
    return row


def noise_scale(true, gradients, batch_size):
    """Returns the gradient noise scale tr(S) / |G|^2, in images.

    This is the simple noise scale of McCandlish et al. 2018 (arXiv:1812.06162), section 2.2. S is
    the covariance of the gradients of single images, which need not be computed: g is a mean over n
    of them, with variance tr(S) / n. (As an epoch of N images uses each just once, its mini-batches
    have covariance -tr(S) / N, and variance tr(S) (1/n - 1/N): among them it is still tr(S) / n.)

    In train mode, S includes the noise of dropout and of batch norm's statistics, but G is still
    the gradient in eval mode.
    """
    trace = batch_size * gradients.var(dim=0).sum()
    return (trace / true.square().sum()).item()


def conclusion(epoch, scale, batch_size):
    """Explains an epoch's noise scale in two sentences.

    With the best learning rate for its batch size, a step lowers the loss in proportion to
    1 / (1 + noise scale / batch size): McCandlish et al. 2018, section 2.2. This assumes that the
    loss is equally curved in all directions, which is only roughly true of a neural network.
    """
    gain = (1 + scale / batch_size) / (1 + scale / (2 * batch_size))
    return (
        f"After epoch {epoch} the noise scale is {scale:.0f} images: a mini-batch of that size has"
        " as much signal as noise in its gradient.\nWith twice the batch size, a step does twice the"
        f" work and lowers the loss {gain:.2f} times as much, each at its best learning rate."
    )


def draw(table, title, batch_size):
    """Returns a figure of the table."""
    figure = Figure(figsize=(10, 4.5), layout="constrained")
    panels = norms, cosines, scales = figure.subplots(1, 3)
    figure.suptitle(title, fontsize="medium")
    for panel, name in ((norms, "norm"), (cosines, "cosine")):
        ends = table[f"{name}_p5"], table[f"{name}_p95"]
        look = {"color": "C0", "alpha": 0.3, "linewidth": 5}
        panel.vlines(table.epoch, *ends, **look, label="90% of the mini-batches")
        panel.plot(table.epoch, table[f"{name}_mean"], "o-", color="C0", label="their mean")
    norms.plot(table.epoch, table.true_norm, "s-", color="C1", label="true gradient")
    scales.plot(table.epoch, table.noise_scale, "D-", color="C3", label="noise scale")
    scales.axhline(batch_size, color="black", linestyle="--", label=f"batch size {batch_size}")
    norms.set(ylabel="norm (nats per unit of parameter)", yscale="log")
    cosines.set(ylabel="cosine with the true gradient")
    scales.set(ylabel="gradient noise scale (images)", yscale="log")
    for panel in (norms, scales):  # 1, 2, 5, 10, 20, ...
        panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.yaxis.set_major_formatter("{x:g}")
        panel.yaxis.set_minor_formatter("")
    for panel in panels:
        panel.set_xlabel("epoch (0: before training)")
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        panel.legend(loc="lower center", bbox_to_anchor=(0.5, 1))  # above the panel
    return figure


def compare_epochs(folder, settings, mode):
    """Compares the gradients at every stored epoch; writes the table and its picture."""
    device = select_device()
    seed_everything(settings["seed"])  # as main.py does, for random data; also for mini-batches
    dataset, (pixels, labels), _ = load_dataset(settings["dataset"], settings["data_dir"])
    dropout, batch_size = settings["dropout"], settings["batch_size"]
    shuffled = Loader(pixels, labels, batch_size, device, shuffle=True)
    sample = [batch for batch in itertools.islice(shuffled, SAMPLE) if len(batch[1]) == batch_size]
    if len(sample) < 2:
        sys.exit(f"gradients.py: error: --batch-size must be well below {len(pixels)} images")
    batches = Loader(pixels, labels, 250, device)  # for the true gradient: any size will do
    title = f"{mode} mode: {len(sample)} mini-batches of {batch_size} against the true gradient"
    title += f" of {len(pixels)} images of {dataset}"
    if mode == "train":
        title += f", dropout {dropout}"
    print(title, flush=True)

    name = folder / ("gradients" if mode == "eval" else "gradients-train")
    rows = []
    numbers = sorted(int(path.stem[6:]) for path in folder.glob("params/epoch-*.pkl"))
    for epoch in numbers:
        model = load_model(folder / f"params/epoch-{epoch:02}.pkl", dropout, device)
        seed_everything(settings["seed"])  # for dropout
        true = true_gradient(model, batches)
        gradients = mini_batch_gradients(model, sample, mode)
        rows.append({"epoch": epoch, "mode": mode} | compare(true, gradients, batch_size))
        table = pd.DataFrame(rows)
        table.to_csv(f"{name}.csv", index=False, float_format="%.9g")
        line = "[Epoch {epoch:2}] true norm: {true_norm:.3g}, mini-batch norm: {norm_mean:.3g},"
        line += " cosine: {cosine_mean:.3f}, noise scale: {noise_scale:.0f} images"
        print(line.format(**rows[-1]), flush=True)
    draw(table, title, batch_size).savefig(f"{name}.png", dpi=120)
    print(f"The table is in {name}.csv, and a picture of it in {name}.png\n")
    print(conclusion(epoch, rows[-1]["noise_scale"], batch_size))


def main(argv=None):
    """Runs the program. Exits with a message if there is no run, or if a flag makes no sense."""
    parser = argparse.ArgumentParser("gradients.py", description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("run", nargs="?", type=Path, metavar="RUN", help="folder of the run (the newest in ./logs)")
    help_text = "mode of the model for the mini-batch gradients (eval)"
    add("--mode", choices=["eval", "train"], default="eval", help=help_text)
    add("--batch-size", type=int, metavar="N", help="images per mini-batch (as in the run)")
    add("--data-dir", metavar="DIR", help="folder of MNIST/raw/ (as in the run)")
    args = parser.parse_args(argv)
    if args.batch_size is not None and args.batch_size < 2:
        parser.error("argument --batch-size: must be 2 or more")
    folder = args.run or newest_run("logs")
    if folder is None:
        sys.exit("gradients.py: error: there is no run in ./logs: run main.py first")
    settings = json.loads((folder / "settings.json").read_text())
    for name in ("batch_size", "data_dir"):
        settings[name] = getattr(args, name) or settings[name]
    compare_epochs(folder, settings, args.mode)


if __name__ == "__main__":
    main()
