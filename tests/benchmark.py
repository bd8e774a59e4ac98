"""Side by side on this machine: the guide's loop as written, and main.py.

    python tests/benchmark.py                 # speed: both in turn, several times over
    python tests/benchmark.py --accuracy      # of ten epochs, over seeds and schedules
    python tests/benchmark.py --json          # the same numbers, for machines

Every figure of the speed table is taken in a process of its own that trains two epochs
on MNIST at the guide's settings; the times are those of the second epoch. The accuracy
is that of the last epoch; on a CPU as many runs are made at once as it has cores, each
on one thread.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HOME = Path(__file__).resolve().parent.parent


def timed(function, times):
    """`function`, which from now on appends start and duration, in s, to `times`."""
    import torch

    def wrapper(*arguments, **keywords):
        start = time.time()
        result = function(*arguments, **keywords)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append((start, time.time() - start))
        return result

    return wrapper


def run_plain(data_dir, epochs, seed=1):
    """The guide's program in today's PyTorch, every step of it as the guide has it.

    Returns the lists of starts and durations of train and of test, in s, and the
    accuracy of the last epoch in percent.
    """
    import torch
    from torch import nn
    from torchvision import datasets, transforms

    def convbn(ci, co, ksz, psz):
        layers = nn.Conv2d(ci, co, ksz), nn.BatchNorm2d(co), nn.ReLU(True)
        return nn.Sequential(*layers, nn.MaxPool2d(psz, stride=psz), nn.Dropout(0.25))

    torch.manual_seed(seed)
    cuda = torch.cuda.is_available()
    transform = transforms.Compose(
        [transforms.ToTensor(), transforms.Normalize((0.1307,), (0.3081,))]
    )
    workers = {"num_workers": 1, "pin_memory": True} if cuda else {}
    loaders = [
        torch.utils.data.DataLoader(
            datasets.MNIST(data_dir, train=train, transform=transform),
            batch_size=128 if train else 1000,
            shuffle=True,
            **workers,
        )
        for train in (True, False)
    ]
    dense = nn.Linear(200, 500), nn.BatchNorm1d(500), nn.ReLU(True), nn.Dropout(0.25)
    blocks = convbn(1, 20, 5, 3), convbn(20, 50, 5, 2), nn.Flatten()
    model = nn.Sequential(*blocks, *dense, nn.Linear(500, 10))
    model = model.cuda() if cuda else model
    loss_function = nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    def train():
        model.train()
        for batch_ix, (data, target) in enumerate(loaders[0]):
            if cuda:
                data, target = data.cuda(), target.cuda()
            optimizer.zero_grad()
            loss = loss_function(model(data), target)
            loss.backward()
            optimizer.step()
            if batch_ix % 100 == 0 and batch_ix > 0:
                loss.item()

    @torch.no_grad()
    def test():
        model.eval()
        correct = 0
        for data, target in loaders[1]:
            if cuda:
                data, target = data.cuda(), target.cuda()
            output = model(data)
            correct += (output.argmax(1) == target).sum().item()
            loss_function(output, target).item()
        return 100 * correct / len(loaders[1].dataset)

    train_times, test_times = [], []
    train, test = timed(train, train_times), timed(test, test_times)
    for _ in range(epochs):
        train()
        accuracy = test()
    return train_times, test_times, accuracy


def run_ours(data_dir, epochs, seed=1, schedule="constant"):
    """main.py itself; returns what run_plain does. Its save() belongs to neither time."""
    sys.path.insert(0, str(HOME))
    import main

    train_times, test_times = [], []
    main.train = timed(main.train, train_times)
    main.test = timed(main.test, test_times)
    with tempfile.TemporaryDirectory() as log_dir:
        flags = ["--data-dir", data_dir, "--dataset", "mnist", "--log-dir", log_dir]
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        flags += ["--seed", str(seed), "--schedule", schedule]
        main.main([*flags, "--epochs", str(epochs)])
        sys.stdout = sys.__stdout__
        last = Path(log_dir, "test.csv").read_text().splitlines()[-1]
    return train_times, test_times, float(last.split(",")[-1])


def measure_speed(program, data_dir, started):
    """One process's figures: seconds, images per second and MiB."""
    import torch

    run = {"plain": run_plain, "ours": run_ours}[program]
    train_times, test_times, _ = run(data_dir, epochs=2)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    figures = {
        "train s/epoch": train_times[-1][1],
        "test s/epoch": test_times[-1][1],
        "start-up s": train_times[0][0] - float(started),
        "images/s": 60_000 / train_times[-1][1],
        "peak MiB": peak,
    }
    if torch.cuda.is_available():
        figures["peak GPU MiB"] = torch.cuda.max_memory_allocated() / 2**20
    return figures


def measure_accuracy(program, data_dir, epochs, seed, *schedule):
    """One process's accuracy after the last epoch, in percent."""
    run = {"plain": run_plain, "ours": run_ours}[program]
    return run(data_dir, int(epochs), int(seed), *schedule)[-1]


def in_a_process(*measurement, threads=None):
    """What a measurement gives, taken in a new process."""
    command = [sys.executable, __file__, "--measure", *map(str, measurement)]
    environment = os.environ | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
    output = subprocess.run(
        command, check=True, stdout=subprocess.PIPE, env=environment
    )
    return json.loads(output.stdout)


def machine():
    """What this runs on, in words."""
    import torch

    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text().splitlines()
        name = next(
            (x.split(":")[1] for x in lines if x.startswith("model name")), name
        )
    if torch.cuda.is_available():
        name = f"{torch.cuda.get_device_name()}, {name}"
    cores = len(os.sched_getaffinity(0))
    return f"{name.strip()}, {cores} cores, PyTorch {torch.__version__}"


def compare_speed(data_dir, rounds):
    """Figures of both programs, measured in turn: {program: [figures of a process]}."""
    found = {"plain": [], "ours": []}
    for _ in range(rounds):
        for program, figures in found.items():
            figures.append(in_a_process("speed", program, data_dir, time.time()))
    return found


def print_speed(found):
    """A line per figure: median (lowest to highest) of both programs, and the ratio."""
    print(f"{'':14} {'the guide loop':>26} {'main.py':>26} {'ours / loop':>12}")
    for figure in found["ours"][0]:
        cells, medians = [], []
        for name in ("plain", "ours"):
            values = [figures[figure] for figures in found[name]]
            medians.append(statistics.median(values))
            spread = f"({min(values):.4g} to {max(values):.4g})"
            cells.append(f"{medians[-1]:.4g} {spread}")
        ratio = medians[1] / medians[0]
        print(f"{figure:14} {cells[0]:>26} {cells[1]:>26} {ratio:12.3f}")


def compare_accuracy(data_dir, seeds, epochs):
    """Last accuracy in percent over the seeds: {program: [accuracy of a seed]}."""
    import torch

    threads = None if torch.cuda.is_available() else 1
    found = {}
    with ThreadPoolExecutor(len(os.sched_getaffinity(0)) if threads else 1) as pool:
        for row in ("plain", "ours constant", "ours step", "ours cosine"):
            program, *schedule = row.split()
            for seed in range(1, seeds + 1):
                what = "accuracy", program, data_dir, epochs, seed, *schedule
                run = pool.submit(in_a_process, *what, threads=threads)
                found.setdefault(row, []).append(run)
    return {row: [run.result() for run in runs] for row, runs in found.items()}


def print_accuracy(found):
    """A line per program: mean, standard deviation and the accuracies themselves."""
    for row, values in found.items():
        mean = statistics.mean(values)
        deviation = statistics.stdev(values) if len(values) > 1 else float("nan")
        print(f"{row:14} {mean:.2f} +- {deviation:.2f}   {values}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--data-dir", default="./data", metavar="DIR", help="has MNIST/raw/")
    add("--rounds", type=int, default=3, metavar="N", help="processes of each program")
    add("--accuracy", action="store_true", help="compare accuracies, not speeds")
    add("--seeds", type=int, default=5, metavar="N", help="1 to N, for the accuracy")
    add("--epochs", type=int, default=10, metavar="N", help="of which the last counts")
    add("--json", action="store_true", help="print for machines to read")
    add("--measure", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        measure = {"speed": measure_speed, "accuracy": measure_accuracy}
        print(json.dumps(measure[args.measure[0]](*args.measure[1:])))
        return
    if args.accuracy:
        found = compare_accuracy(args.data_dir, args.seeds, args.epochs)
        show = print_accuracy
    else:
        found = compare_speed(args.data_dir, args.rounds)
        show = print_speed
    if args.json:
        print(json.dumps({"machine": machine(), "found": found}))
    else:
        print(machine())
        show(found)


if __name__ == "__main__":
    main()
