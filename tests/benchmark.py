"""Time the guide's loop, two fair rivals and main.py side by side on this machine. It is not a test.

    python tests/benchmark.py               # the speed of each, and of main.py without each layer
    python tests/benchmark.py --busy 4      # main.py beside four programs that compute
    python tests/benchmark.py --accuracy    # after ten epochs, over seeds and schedules

They need MNIST in ./data, or in --data-dir, and a machine that has nothing else to do. They print
the tables of README.md and docs/results.md. All programs run on the CPU, with main.py's settings of
the machine (GOMP_SPINCOUNT and keep_freed_memory).

In a round, each program trains LeNet for two epochs in a process of its own. (With --busy, for one:
threads that wait for one another would take many minutes.) The time of a step is the mean over the
last epoch. The speed of a machine changes within minutes, so ratios compare programs of one round.
"""

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import torch
import torchnet as tnt
from torch import nn, optim
from torch.utils.data import DataLoader
from torchvision import datasets, transforms

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import main  # It sets GOMP_SPINCOUNT, which the processes of all programs inherit.

GUIDE = "the guide's loop"  # in today's PyTorch
RIVAL = "the rival"  # the same on tensors: images are normalised once, and then indexed
CHANNELS_LAST = "the rival in channels_last"  # all channels of a pixel side by side in memory
MAIN = "main.py"
SPINNING = "main.py with GOMP_SPINCOUNT=300000"  # the default of the library
PLAIN_MOMENTS = SimpleNamespace(apply=lambda x: (x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)))
# What takes the place of main.py's faster layers, by program.
PLAIN = {"FasterConvBN": nn.Sequential, "FasterDropout": nn.Dropout}
REPLACED = {
    GUIDE: PLAIN,
    RIVAL: PLAIN,
    CHANNELS_LAST: PLAIN,
    "main.py with nn.Dropout": {"FasterDropout": nn.Dropout},
    "main.py with nn.Sequential": {"FasterConvBN": nn.Sequential},
    "main.py with x.mean and x.var": {"ChannelMoments": PLAIN_MOMENTS},
}

marks = []  # the times at which each epoch began, and at which it ended


def guides_loaders(data_dir):
    """The guide's train_loader and test_loader."""
    transform = [transforms.ToTensor(), transforms.Normalize((0.1307,), (0.3081,))]
    transform = transforms.Compose(transform)
    train = datasets.MNIST(data_dir, train=True, transform=transform)
    test = datasets.MNIST(data_dir, train=False, transform=transform)
    return DataLoader(train, 128, shuffle=True), DataLoader(test, 1000, shuffle=True)


class TensorLoader:
    """Yields shuffled batches of images that are normalised once, and then indexed."""

    def __init__(self, pixels, labels, batch_size):
        self.images = main.normalise(pixels.unsqueeze(1))
        self.labels = labels
        self.batch_size = batch_size

    def __iter__(self):
        for batch in torch.randperm(len(self.images)).split(self.batch_size):
            yield self.images[batch], self.labels[batch]


def tensor_loaders(data_dir):
    """The rival's train_loader and test_loader."""
    _, train_set, test_set = main.load_dataset("mnist", data_dir)
    return TensorLoader(*train_set, 128), TensorLoader(*test_set, 1000)


def train_as_the_guide(program, data_dir, epochs, seed):
    """The guide's program, with its own loaders or the rival's; returns the accuracy."""
    main.keep_freed_memory()
    torch.manual_seed(seed)
    train_loader, test_loader = (guides_loaders if program == GUIDE else tensor_loaders)(data_dir)
    model = main.LeNet()
    if program == CHANNELS_LAST:
        model.to(memory_format=torch.channels_last)
    loss_function = nn.CrossEntropyLoss()
    optimizer = optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(epochs):
        marks.append(time.monotonic())
        model.train()
        for data, target in train_loader:
            optimizer.zero_grad()
            loss = loss_function(model(data), target)
            loss.backward()
            optimizer.step()
        marks.append(time.monotonic())
        accuracy = test_as_the_guide(model, loss_function, test_loader)
    return accuracy


@torch.no_grad()
def test_as_the_guide(model, loss_function, test_loader):
    """The guide's test(), with the accuracy where the guide by a slip has the error."""
    model.eval()
    test_loss = tnt.meter.AverageValueMeter()
    top1 = tnt.meter.ClassErrorMeter(accuracy=True)
    for data, target in test_loader:
        output = model(data)
        top1.add(output, target)
        test_loss.add(loss_function(output, target).item())
    return top1.value()[0]


def train_main(program, data_dir, epochs, seed, schedule="constant"):
    """main.py; returns the accuracy."""
    train = main.train

    def timed_train(*arguments):
        marks.append(time.monotonic())
        train(*arguments)
        marks.append(time.monotonic())

    main.train = timed_train
    flags = ["--data-dir", data_dir, "--dataset", "mnist", "--epochs", str(epochs)]
    main.main([*flags, "--seed", str(seed), "--schedule", schedule])
    with open("logs/run-1/test.csv", newline="") as file:
        return float(list(csv.DictReader(file))[-1]["accuracy"])


def run_program(program, *details):
    """Prints the time, in seconds, of a step in the last epoch, and the accuracy."""
    for name, layer in REPLACED.get(program, {}).items():
        setattr(main, name, layer)
    train = train_main if program.startswith(MAIN) else train_as_the_guide
    accuracy = train(program, *details)
    step = (marks[-1] - marks[-2]) / 469  # steps an epoch
    print(json.dumps({"step": step, "accuracy": accuracy}))


def in_a_process(*details):
    """Runs a program in a process and a folder of its own; returns what it printed, as a dict."""
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    if details[0] == SPINNING:
        environment["GOMP_SPINCOUNT"] = "300000"
    command = [sys.executable, __file__, "--call", json.dumps(details)]
    with tempfile.TemporaryDirectory() as folder:
        started = time.monotonic()
        output = subprocess.check_output(command, cwd=folder, env=environment, text=True)
        return json.loads(output.splitlines()[-1]) | {"process": time.monotonic() - started}


def compare_speed(args):
    """Prints the table of all programs, perhaps beside others that keep the CPU busy."""
    programs, rivals, epochs = [GUIDE, RIVAL, CHANNELS_LAST, MAIN], [GUIDE, RIVAL], 2
    programs += [program for program in REPLACED if program.startswith(MAIN)]
    if args.busy:
        programs, rivals, epochs = [MAIN, SPINNING], [MAIN], 1
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(args.busy)]
    rounds = []
    try:
        for number in range(args.rounds):
            order = programs if number % 2 == 0 else programs[::-1]
            rounds.append({name: in_a_process(name, args.data_dir, epochs, 1) for name in order})
            print(f"round {number + 1} of {args.rounds}", file=sys.stderr)
    finally:
        for process in busy:
            process.kill()
    ratios = [f"of {name}" for name in rivals]
    print_row("program", "ms a step", *ratios, f"process of {epochs} epochs, s")
    print_row(*["---"] * (3 + len(rivals)))
    for name in programs:
        step = 1000 * statistics.median(result[name]["step"] for result in rounds)
        process = statistics.median(result[name]["process"] for result in rounds)
        ratios = [ratio_of_steps(rounds, name, other) for other in rivals]
        print_row(name, f"{step:.1f}", *ratios, f"{process:.1f}")


def print_row(*cells):
    print(f"| {' | '.join(cells)} |", flush=True)


def ratio_of_steps(rounds, name, other):
    """Returns the time of a step in terms of that of another program: the median, and the range."""
    ratios = sorted(result[name]["step"] / result[other]["step"] for result in rounds)
    return f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"


def compare_accuracy(args):
    """Prints the accuracy after ten epochs, of one run after the other."""
    print_row("program", "schedule", "mean ± deviation", "seeds 1 to 5")
    print_row(*["---"] * 4)
    for name, *schedule in ((GUIDE,), (MAIN,), (MAIN, "step"), (MAIN, "cosine")):
        results = [in_a_process(name, args.data_dir, 10, seed, *schedule) for seed in range(1, 6)]
        accuracies = [result["accuracy"] for result in results]
        mean = f"{statistics.mean(accuracies):.2f} ± {statistics.stdev(accuracies):.2f}"
        each = ", ".join(f"{accuracy:.2f}" for accuracy in accuracies)
        print_row(name, *(schedule or ["constant"]), mean, each)


def parse_and_run():
    parser = argparse.ArgumentParser("benchmark.py", description=__doc__.partition("\n")[0])
    parser.add_argument("--data-dir", type=os.path.abspath, default="./data", metavar="DIR")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="of all programs")
    parser.add_argument("--busy", type=int, default=0, metavar="N", help="other programs at work")
    parser.add_argument("--accuracy", action="store_true", help="not speed")
    parser.add_argument("--call", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.call:
        run_program(*args.call)
        return
    print(main.describe_machine(), end="\n\n")
    (compare_accuracy if args.accuracy else compare_speed)(args)


if __name__ == "__main__":
    parse_and_run()
