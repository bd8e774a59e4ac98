"""Compare the true gradient with mini-batch gradients, after every epoch of a run.

    python gradients.py                   # the run in ./logs
    python gradients.py --mode train      # with dropout and batch norm as in training
    python gradients.py slow --batch-size 32    # all flags: python gradients.py --help

This is the guide's exercise 4. It reads the parameters that main.py has stored in
LOG_DIR/params, computes the gradients, and writes a table and a picture of it:

    LOG_DIR/gradients.csv, gradients.png                in eval mode
    LOG_DIR/gradients-train.csv, gradients-train.png    with --mode train

The true gradient G is that of the mean loss over all training images in eval mode, in
which dropout is off and batch norm uses its running statistics. A mini-batch gradient g
is that of the mean loss over the images of one mini-batch, in the mode that is asked for.
A gradient is a vector of P values, one for each parameter of the model.
"""

import io
import math
import pickle
import signal
import sys
from pathlib import Path

if __name__ == "__main__":
    # While PyTorch is being loaded, Ctrl-C ends the program without a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator
from torch import nn
from tqdm import tqdm

from main import (
    LeNet,
    Loader,
    OneLineParser,
    RunError,
    disk_errors,
    exact,
    interrupt,
    load_dataset,
    name_file,
    one_line,
    prepare,
    select_device,
)

# All mini-batch gradients of an epoch are held in memory at once. A LeNet's takes 0.53 MB
# (132,220 parameters in float32): so many of them take 2.1 GB.
MOST_MINI_BATCHES = 4000


def make_parser():
    """Returns the parser of the command line."""
    parser = OneLineParser("gradients.py", description=__doc__.partition("\n")[0])
    parser.add_argument(
        "log_dir",
        nargs="?",
        default="./logs",
        metavar="LOG_DIR",
        help="folder that holds the record of a run of main.py",
    )
    parser.add_argument(
        "--mode",
        choices=["eval", "train"],
        default="eval",
        help="mode of dropout and batch norm for the mini-batch gradients",
    )
    parser.add_argument(
        "--batch-size", type=int, default=128, metavar="N", help="images per mini-batch"
    )
    parser.add_argument(
        "--dropout",
        type=float,
        default=0.25,
        metavar="P",
        help="dropout probability in train mode: give that of the run",
    )
    parser.add_argument(
        "--data-dir",
        default="./data",
        metavar="DIR",
        help="folder that holds MNIST/raw/; what is missing there is downloaded",
    )
    parser.add_argument(
        "--dataset",
        choices=["auto", "mnist", "mnist-5k"],
        default="auto",
        help="dataset that the run was trained on; auto as in main.py",
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=1,
        metavar="N",
        help="where the random numbers of shuffling and dropout start",
    )
    return parser


def parse_arguments(argv=None):
    """Returns the flags' values; exits with status 2 if one of them makes no sense."""
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.batch_size < 1:
        parser.error("argument --batch-size: must be 1 or more")
    if args.batch_size == 1 and args.mode == "train":
        parser.error("argument --batch-size: must be 2 or more, for batch norm")
    if not 0 <= args.dropout < 1:
        parser.error("argument --dropout: must be 0 or more, and below 1")
    if not 0 <= args.seed < 2**64:
        parser.error("argument --seed: must be 0 or more, and below 2**64")
    return args


# ---------------------------------------------------------------------------------------
# The stored parameters and the data
# ---------------------------------------------------------------------------------------


class ArrayUnpickler(pickle.Unpickler):
    """Reads pickles of numpy arrays, and refuses all others.

    A pickle names the functions that are to be called when it is read. pickle.load calls
    whatever a file names, and so runs any code that somebody has hidden in it.
    """

    # What the pickle of a numpy array calls. The first is numpy's _reconstruct, which has
    # another place in every other version of numpy.
    FUNCTIONS = (np.array(0).__reduce__()[0], np.ndarray, np.dtype)

    def find_class(self, module, name):
        for function in self.FUNCTIONS:
            if function.__name__ == name:
                return function
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def load_parameters(path):
    """Reads a params/epoch-NN.pkl: a dict from names to float32 numpy arrays.

    Unlike pickle.load, it runs no code that a file of somebody else's may hold. Raises
    RunError if the file cannot be read, or holds anything else.
    """
    parameters = {}
    try:
        content = Path(path).read_bytes()
        for name, array in ArrayUnpickler(io.BytesIO(content)).load().items():
            parameters[name] = np.asarray(array, dtype=np.float32)
    except Exception as error:  # Foreign bytes can raise nearly anything.
        raise RunError(
            f"{path} cannot be read as parameters ({one_line(error)}): train again, or"
            " name another log dir"
        ) from error
    return parameters


def load_model(path, device, dropout=0.25):
    """Returns the LeNet whose parameters are in a file. RunError: they are not a LeNet's."""
    model = LeNet(dropout)
    parameters = load_parameters(path)
    try:
        state = {name: torch.tensor(array) for name, array in parameters.items()}
        model.load_state_dict(state)
    except RuntimeError as error:
        raise RunError(
            f"{path} holds the parameters of a model other than LeNet: train again, or"
            " name another log dir"
        ) from error
    return prepare(model, device)


def find_files(log_dir):
    """Returns the files of the stored parameters, that of epoch 0 first."""
    params = Path(log_dir, "params")
    count = len(list(params.glob("epoch-*.pkl")))
    if count == 0:
        raise RunError(
            f"{params} has no stored parameters: run main.py first, or name another log dir"
        )
    return [params / f"epoch-{epoch:02}.pkl" for epoch in range(count)]


def make_mini_batches(dataset, batch_size, seed, device):
    """Returns the shuffled training images as a list of mini-batches (data, target).

    Raises RunError if there are too few mini-batches to compare, or too many.
    """
    images = dataset.train_images
    labels = dataset.train_labels
    mini_batches = list(Loader(images, labels, batch_size, device, seed=seed))
    if len(mini_batches) < 2:
        raise RunError(
            f"argument --batch-size: choose one well below the {len(images)} images"
        )
    if len(mini_batches) > MOST_MINI_BATCHES:
        least = math.ceil(len(images) / MOST_MINI_BATCHES)
        raise RunError(
            f"argument --batch-size: must be {least} or more for {len(images)} images,"
            " so that all mini-batch gradients fit in memory"
        )
    return mini_batches


# ---------------------------------------------------------------------------------------
# The gradients
# ---------------------------------------------------------------------------------------


def mini_batch_gradients(model, mini_batches, description=None):
    """Returns the gradients of B mini-batches as the rows of a matrix, B x P.

    The model stays in its mode, eval or train. The gradients have its dtype.
    """
    loss_function = nn.CrossEntropyLoss()
    parameters = list(model.parameters())
    columns = sum(parameter.numel() for parameter in parameters)
    gradients = parameters[0].new_empty(len(mini_batches), columns)
    # disable=None shows the progress bar on a terminal only.
    progress = tqdm(mini_batches, desc=description, leave=False, disable=None)
    for batch_ix, (data, target) in enumerate(progress):
        model.zero_grad()
        output = model(data)
        loss = loss_function(output, target)
        loss.backward()
        gradients[batch_ix] = torch.cat([p.grad.flatten() for p in parameters])
    return gradients


def mean_gradient(gradients, sizes):
    """Returns the mean over images: that over the rows, weighted by their batch sizes."""
    return (sizes / sizes.sum()) @ gradients


def compare(model, mini_batches, mode="eval", description=None):
    """Compares the mini-batch gradients g of a model with the true gradient G.

    Returns a dict of numbers, which are the columns of the table:

    true_norm        |G|, in nats per unit of parameter
    norm_...         |g|, in nats per unit of parameter
    cosine_...       the cosine of the angle between g and G
    distance_...     |g - G| / |G|
    noise_scale      the gradient noise scale, in images
    mean_distance    |m - G| / |G|, where m is the mean of the g: 0 in eval mode

    The three dots stand for mean, p5 and p95: the mean, the 5th and the 95th percentile
    over the mini-batches. In train mode the model's running statistics change.
    """
    first_parameter = next(model.parameters())
    sizes = first_parameter.new_tensor([len(target) for _, target in mini_batches])
    # In eval mode the loss is a mean over images, and so is its gradient.
    gradients = mini_batch_gradients(model.eval(), mini_batches, description)
    true_gradient = mean_gradient(gradients, sizes)
    if mode == "train":
        del gradients  # Two such matrices at once would be too much memory.
        gradients = mini_batch_gradients(model.train(), mini_batches, description)

    true_norm = true_gradient.norm()
    norms = gradients.norm(dim=1)
    cosines = gradients @ true_gradient / (norms * true_norm)
    distances = distances_to(true_gradient, gradients) / true_norm
    difference = mean_gradient(gradients, sizes) - true_gradient
    return {
        "true_norm": true_norm.item(),
        **summary("norm", norms),
        **summary("cosine", cosines),
        **summary("distance", distances),
        "noise_scale": noise_scale(gradients, sizes),
        "mean_distance": (difference.norm() / true_norm).item(),
    }


def distances_to(vector, gradients):
    """Returns the distances |g - vector| of the rows g of B x P gradients: B values."""
    # Row by row, since `gradients - vector` would take as much memory again.
    return torch.stack([(gradient - vector).norm() for gradient in gradients])


def summary(name, values):
    """Returns the mean, and the 5th and 95th percentile, of one value per mini-batch."""
    return {
        f"{name}_mean": values.mean().item(),
        f"{name}_p5": values.quantile(0.05).item(),
        f"{name}_p95": values.quantile(0.95).item(),
    }


def noise_scale(gradients, sizes):
    """Returns the gradient noise scale tr(S) / |m|^2, in images.

    This is the simple noise scale of McCandlish et al. 2018 (arXiv:1812.06162), section
    2.2. S is the covariance of the gradients of single images, with N - 1 as its divisor,
    and m is their mean, both over all N training images. The gradients are B x P, those
    of mini-batches of these sizes, B values.

    As in the paper's appendix A.1, tr(S) is found without the gradients of single images.
    The gradient g of a mini-batch of n images is a mean over n of the N, drawn without
    replacement. The variance of such a mean is known: over all possible draws,

        mean of |g - m|^2 = tr(S) (1/n - 1/N).

    Both sides are averaged over the mini-batches, weighted by n, and tr(S) is solved for,
    which gives an estimate without bias.

    In train mode, the noise of dropout and batch norm is a part of S. Some of it remains
    in m, so that a noise scale that is not far below N images is estimated too low.
    """
    images = sizes.sum()
    weights = sizes / images
    mean = mean_gradient(gradients, sizes)
    squared_distances = distances_to(mean, gradients).square()
    trace = (weights @ squared_distances) / (weights @ (1 / sizes - 1 / images))
    return (trace / mean.square().sum()).item()


# ---------------------------------------------------------------------------------------
# The table, the picture, and what they say
# ---------------------------------------------------------------------------------------


def print_row(row):
    """Prints the most important numbers of an epoch."""
    print(
        f"[Epoch {row['epoch']:2}] true norm: {row['true_norm']:.3g},"
        f" mini-batch norm: {row['norm_mean']:.3g}, cosine: {row['cosine_mean']:.3f},"
        f" noise scale: {row['noise_scale']:.0f} images",
        flush=True,
    )


# These colours of Okabe and Ito's can be told apart by the colour-blind, too.
BLUE = "#0072B2"
ORANGE = "#D55E00"
GREEN = "#009E73"


def draw(table, title, batch_size):
    """Returns a figure of the table."""
    figure = Figure(figsize=(8.5, 3.6), layout="constrained")
    figure.suptitle(title, fontsize=9)
    norm_axes, cosine_axes, scale_axes = figure.subplots(1, 3)

    norm_axes.set_ylabel("norm (nats per unit of parameter)")
    norm_axes.plot(
        table.epoch, table.true_norm, "s-", color=BLUE, label="true gradient"
    )
    draw_mini_batches(norm_axes, table, "norm")
    use_logarithmic_scale(norm_axes)

    cosine_axes.set_ylabel("cosine with the true gradient")
    draw_mini_batches(cosine_axes, table, "cosine")

    scale_axes.set_ylabel("gradient noise scale (images)")
    scale_axes.plot(
        table.epoch, table.noise_scale, "D-", color=GREEN, label="noise scale"
    )
    scale_axes.axhline(
        batch_size, color="black", linestyle="--", label=f"batch size {batch_size}"
    )
    use_logarithmic_scale(scale_axes)

    for axes in (norm_axes, cosine_axes, scale_axes):
        axes.set_xlabel("epoch (0: before training)")
        axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
        # Above the axes, where it covers no point.
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), frameon=False, fontsize=8)
    return figure


def draw_mini_batches(axes, table, name):
    """Draws the mean over mini-batches, and a bar from the 5th to the 95th percentile."""
    axes.plot(
        table.epoch,
        table[f"{name}_mean"],
        "o-",
        color=ORANGE,
        label="mini-batches: mean",
    )
    axes.vlines(
        table.epoch,
        table[f"{name}_p5"],
        table[f"{name}_p95"],
        color=ORANGE,
        alpha=0.3,
        linewidth=5,
        zorder=1,  # behind the lines
        label="90 % of them",
    )


def use_logarithmic_scale(axes):
    """Makes the y axis logarithmic, with ticks at 1, 2, 5, 10, 20 and so on."""
    axes.set_yscale("log")
    axes.minorticks_off()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    bottom, top = axes.get_ylim()
    if top < 10 * bottom:
        axes.set_ylim(bottom / 3, top * 3)  # enough for two ticks to be within


def conclusion(row, batch_size):
    """Returns in plain words what an epoch's noise scale means for the batch size.

    With the best learning rate for its batch size, a step lowers the loss in proportion
    to 1 / (1 + noise scale / batch size): McCandlish et al. 2018, section 2.2.
    """
    scale = row["noise_scale"]
    progress = 1 / (1 + scale / batch_size)
    progress_of_twice = 1 / (1 + scale / (2 * batch_size))
    ratio = progress_of_twice / progress
    return (
        f"The noise scale after epoch {row['epoch']} is {scale:.0f} images."
        " It says what larger batches would bring:\n"
        f"with {2 * batch_size} images instead of {batch_size}, a step is twice the work"
        f" and lowers the loss {ratio:.2f} times\n"
        "as much, each with its best learning rate. (2 times would be the most, 1 time no"
        " gain.)"
    )


# ---------------------------------------------------------------------------------------
# main
# ---------------------------------------------------------------------------------------


def run(args):
    """Compares the gradients at every stored epoch, and writes the table and picture."""
    log_dir = Path(args.log_dir)
    device = select_device()
    files = find_files(log_dir)
    models = [load_model(file, device, args.dropout) for file in files]
    dataset = load_dataset(args.dataset, args.data_dir)
    mini_batches = make_mini_batches(dataset, args.batch_size, args.seed, device)
    title = make_title(args, dataset, mini_batches)
    csv_file, picture_file = result_files(log_dir, args.mode)

    print(title, flush=True)
    rows = []
    for epoch, model in enumerate(models):
        torch.manual_seed(args.seed)  # for dropout
        result = compare(model, mini_batches, args.mode, f"Epoch {epoch}")
        if not all(map(math.isfinite, result.values())):
            raise RunError(
                f"{files[epoch]} has gradients that are 0 or not finite: train again,"
                " with another --lr"
            )
        row = {"epoch": epoch, "mode": args.mode, **result}
        rows.append(row)
        table = pd.DataFrame(rows)
        # After every epoch, so that the table keeps what is done if this is stopped.
        with disk_errors(log_dir):
            table.to_csv(csv_file, index=False, float_format=exact)
        print_row(row)
    with disk_errors(log_dir):
        draw(table, title, args.batch_size).savefig(picture_file, dpi=200)
    print(f"The table is in {csv_file}, and a picture of it in {picture_file}\n")
    print(conclusion(rows[-1], args.batch_size))


def make_title(args, dataset, mini_batches):
    """Returns a line that says what is compared."""
    title = (
        f"{args.mode} mode: {len(mini_batches)} mini-batches of {args.batch_size} against"
        f" the true gradient of {len(dataset.train_images)} images of {dataset.name}"
    )
    if args.mode == "train":
        title += f", dropout {args.dropout:g}"
    return title


def result_files(log_dir, mode):
    """Returns the names of the table and of the picture, which each mode has for itself."""
    name = "gradients"
    if mode == "train":
        name = "gradients-train"
    return log_dir / f"{name}.csv", log_dir / f"{name}.png"


def main(argv=None):
    """Runs the program. Raises SystemExit if it cannot do as the flags say:

    - 2 if a flag makes no sense;
    - 130 or 143 after SIGINT or SIGTERM;
    - a line of text, which Python prints before it exits with 1, if anything else fails
      that can be expected to fail. A defect of the program keeps its traceback.
    """
    args = parse_arguments(argv)
    signal.signal(signal.SIGINT, interrupt)
    signal.signal(signal.SIGTERM, interrupt)
    try:
        run(args)
    except RunError as error:
        sys.exit(f"gradients.py: error: {error}")
    except torch.OutOfMemoryError:
        sys.exit("gradients.py: error: the GPU's memory is full: lower --batch-size")
    except OSError as error:
        sys.exit(f"gradients.py: error: {name_file(error)}: {error.strerror}")


if __name__ == "__main__":
    main()
