"""Time the guide's loop and main.py side by side on this machine. It is not a test.

    python tests/benchmark.py               # the speed of both, in five pairs of runs
    python tests/benchmark.py --others      # that of Lightning and Keras, too
    python tests/benchmark.py --accuracy    # after ten epochs, over seeds and schedules

All of them need MNIST in ./data, or in --data-dir, and print tables for a README.

Speed. A pair is one run of each program, one after the other, each in a process of its
own, which trains LeNet at the guide's settings for three epochs and tests it after each
of them. The speed of a machine changes within minutes. So a ratio compares two runs of
the same pair, and the table gives the median of these ratios, with the lowest and the
highest of them. The seconds of an epoch are the median of all epochs but the first, in
which memory is reserved and CUDA graphs are recorded. Peak memory is that of the process
itself and, on a GPU, what PyTorch has reserved there.

The machine must have nothing else to do: the threads of PyTorch spin while they wait, and
both programs lose time to any other, but not the same share of it.

All runs of main.py have the same seed. So they must end in the same bytes.

On CUDA, `main.py --no-graph` is one more program, and its runs must end in the same bytes
as those with the graph. The clock is read when the GPU has done all its work. None of
this has been run on CUDA yet: no GPU was at hand.

Accuracy. The guide's loop, and main.py under each schedule, are trained once per seed.
"""

import argparse
import csv
import hashlib
import importlib.metadata
import importlib.util
import json
import math
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
from typing import NamedTuple

from tqdm import tqdm

# PyTorch and what is built on it are imported inside the functions that need them: a
# process is to load what its program loads, and nothing else.

HOME = Path(__file__).resolve().parent.parent

GUIDE = "guide's loop"

# The guide's settings, which are also the defaults of main.py's flags.
BATCH_SIZE = 128
TEST_BATCH_SIZE = 1000
LEARNING_RATE = 0.1
MOMENTUM = 0.9
DROPOUT = 0.25


class Run(NamedTuple):
    """One run of a program, in a process and a folder of its own."""

    program: str  # a key of PROGRAMS
    data_dir: str  # an absolute path
    epochs: int
    seed: int = 1
    flags: tuple = ()  # more flags, for main.py only


# ---------------------------------------------------------------------------------------
# The programs. Each does a Run, marks the epochs, and returns its last test accuracy, in
# percent.
# ---------------------------------------------------------------------------------------


def mark(marks, name):
    """Appends the time, in seconds, to the marks of this name.

    Of every epoch there are three: "train" when its training begins, "test" when that is
    over and its test begins, and "end" when that is over, too.
    """
    torch = sys.modules.get("torch")  # Not always there: Keras runs on JAX, too.
    if torch is not None and torch.cuda.is_available():
        torch.cuda.synchronize()
    marks[name].append(time.monotonic())  # All processes have this clock in common.


def make_loaders(data_dir):
    """The guide's train_loader and test_loader."""
    import torch
    from torchvision import datasets, transforms

    transform = transforms.Compose(
        [transforms.ToTensor(), transforms.Normalize((0.1307,), (0.3081,))]
    )
    kwargs = {}
    if torch.cuda.is_available():
        kwargs = {"num_workers": 1, "pin_memory": True}
    train_loader = torch.utils.data.DataLoader(
        datasets.MNIST(data_dir, train=True, transform=transform),
        batch_size=BATCH_SIZE,
        shuffle=True,
        **kwargs,
    )
    test_loader = torch.utils.data.DataLoader(
        datasets.MNIST(data_dir, train=False, transform=transform),
        batch_size=TEST_BATCH_SIZE,
        shuffle=True,
        **kwargs,
    )
    return train_loader, test_loader


def make_lenet():
    """The guide's LeNet. What the guide calls View is nn.Flatten in today's PyTorch."""
    from torch import nn

    def convbn(ci, co, ksz, psz, p):
        return nn.Sequential(
            nn.Conv2d(ci, co, ksz),
            nn.BatchNorm2d(co),
            nn.ReLU(True),
            nn.MaxPool2d(psz, stride=psz),
            nn.Dropout(p),
        )

    return nn.Sequential(
        convbn(1, 20, 5, 3, DROPOUT),
        convbn(20, 50, 5, 2, DROPOUT),
        nn.Flatten(),
        nn.Linear(50 * 2 * 2, 500),
        nn.BatchNorm1d(500),
        nn.ReLU(True),
        nn.Dropout(DROPOUT),
        nn.Linear(500, 10),
    )


def run_guide(run, marks):
    """The guide's program, statement by statement, in today's PyTorch."""
    import torch
    from torch import nn, optim

    torch.manual_seed(run.seed)
    train_loader, test_loader = make_loaders(run.data_dir)
    model = make_lenet()
    loss_function = nn.CrossEntropyLoss()
    if torch.cuda.is_available():
        model.cuda()
        loss_function.cuda()
    optimizer = optim.SGD(model.parameters(), lr=LEARNING_RATE, momentum=MOMENTUM)

    accuracies = []
    for epoch in range(1, run.epochs + 1):
        mark(marks, "train")
        guide_train(epoch, model, loss_function, optimizer, train_loader)
        mark(marks, "test")
        with torch.no_grad():
            accuracy = guide_test(epoch, model, loss_function, test_loader)
        mark(marks, "end")
        accuracies.append(accuracy)
    return accuracies[-1]


def guide_train(epoch, model, loss_function, optimizer, train_loader):
    """The guide's train()."""
    import torch

    model.train()
    for batch_ix, (data, target) in enumerate(train_loader):
        if torch.cuda.is_available():
            data, target = data.cuda(), target.cuda()
        optimizer.zero_grad()
        output = model(data)
        loss = loss_function(output, target)
        loss.backward()
        optimizer.step()
        if batch_ix % 100 == 0 and batch_ix > 0:
            print(f"[Epoch {epoch:2}, batch {batch_ix:3}] training loss: {loss.item():.4f}")


def guide_test(epoch, model, loss_function, test_loader):
    """The guide's test(), with the accuracy where the guide by a slip has the error."""
    import torch
    import torchnet as tnt

    model.eval()
    test_loss = tnt.meter.AverageValueMeter()
    top1 = tnt.meter.ClassErrorMeter(accuracy=True)
    for data, target in test_loader:
        if torch.cuda.is_available():
            data, target = data.cuda(), target.cuda()
        output = model(data)
        loss = loss_function(output, target)
        top1.add(output, target)
        test_loss.add(loss.item())
    print(
        f"[Epoch {epoch:2}] Average test loss: {test_loss.value()[0]:.3f},"
        f" accuracy: {top1.value()[0]:.2f}%\n"
    )
    return top1.value()[0]


def run_main(run, marks):
    """main.py itself, whose train() and test() are timed."""
    sys.path.insert(0, str(HOME))
    import main

    train = main.train
    test = main.test

    def timed_train(*arguments):
        mark(marks, "train")
        train(*arguments)

    def timed_test(*arguments):
        mark(marks, "test")
        result = test(*arguments)
        mark(marks, "end")
        return result

    main.train = timed_train
    main.test = timed_test
    main.main(
        [
            *("--data-dir", run.data_dir),
            *("--dataset", "mnist"),
            *("--epochs", str(run.epochs)),
            *("--seed", str(run.seed)),
            *("--log-dir", "logs"),
            *run.flags,
        ]
    )
    with open("logs/test.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    return float(rows[-1]["accuracy"])


def run_lightning(run, marks):
    """The guide's model and loaders under a Trainer of Lightning, as it is by default."""
    import lightning

    class Marks(lightning.Callback):
        def on_train_epoch_start(self, trainer, module):
            mark(marks, "train")

        def on_validation_start(self, trainer, module):
            if not trainer.sanity_checking:
                mark(marks, "test")

        def on_validation_end(self, trainer, module):
            if not trainer.sanity_checking:
                mark(marks, "end")

    lightning.seed_everything(run.seed)
    train_loader, test_loader = make_loaders(run.data_dir)
    model = make_lightning_module()
    trainer = lightning.Trainer(max_epochs=run.epochs, callbacks=[Marks()])
    trainer.fit(model, train_loader, test_loader)
    return 100 * trainer.callback_metrics["test_accuracy"].item()


def make_lightning_module():
    """The guide's LeNet as Lightning's documentation has a user write it."""
    import lightning
    from torch import optim
    from torch.nn import functional

    class LitLeNet(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = make_lenet()

        def training_step(self, batch, batch_ix):
            data, target = batch
            loss = functional.cross_entropy(self.model(data), target)
            self.log("train_loss", loss)
            return loss

        def validation_step(self, batch, batch_ix):
            data, target = batch
            output = self.model(data)
            correct = output.argmax(dim=1) == target
            self.log("test_loss", functional.cross_entropy(output, target))
            self.log("test_accuracy", correct.float().mean())

        def configure_optimizers(self):
            return optim.SGD(self.parameters(), lr=LEARNING_RATE, momentum=MOMENTUM)

    return LitLeNet()


def run_keras(run, marks):
    """The guide's model as Keras's own MNIST example has it: compile() and fit()."""
    os.environ.setdefault("KERAS_BACKEND", "torch")
    import keras

    class Marks(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            mark(marks, "train")

        def on_test_begin(self, logs=None):
            self.model.get_weights()  # JAX may be at work still: this waits for it.
            mark(marks, "test")

        def on_test_end(self, logs=None):
            mark(marks, "end")

    keras.utils.set_random_seed(run.seed)
    train_images, train_labels = read_for_keras(run.data_dir, "train")
    test_images, test_labels = read_for_keras(run.data_dir, "t10k")
    model = make_keras_model()
    model.compile(
        optimizer=keras.optimizers.SGD(LEARNING_RATE, momentum=MOMENTUM),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    history = model.fit(
        train_images,
        train_labels,
        batch_size=BATCH_SIZE,
        epochs=run.epochs,
        validation_data=(test_images, test_labels),
        validation_batch_size=TEST_BATCH_SIZE,
        callbacks=[Marks()],
    )
    return 100 * history.history["val_accuracy"][-1]


def make_keras_model():
    """The layers of the guide's LeNet, with what Keras has as their defaults."""
    import keras
    from keras import layers

    return keras.Sequential(
        [
            keras.Input((28, 28, 1)),
            layers.Conv2D(20, 5),
            layers.BatchNormalization(),
            layers.Activation("relu"),
            layers.MaxPooling2D(3),
            layers.Dropout(DROPOUT),
            layers.Conv2D(50, 5),
            layers.BatchNormalization(),
            layers.Activation("relu"),
            layers.MaxPooling2D(2),
            layers.Dropout(DROPOUT),
            layers.Flatten(),
            layers.Dense(500),
            layers.BatchNormalization(),
            layers.Activation("relu"),
            layers.Dropout(DROPOUT),
            layers.Dense(10),
        ]
    )


def read_for_keras(data_dir, part):
    """Images, float32 N x 28 x 28 x 1 and normalised, and labels, uint8, of MNIST."""
    import numpy as np

    raw = Path(data_dir, "MNIST", "raw")
    # Before the values there is a header: 16 bytes for images, 8 bytes for labels.
    pixels = np.fromfile(raw / f"{part}-images-idx3-ubyte", np.uint8)[16:]
    labels = np.fromfile(raw / f"{part}-labels-idx1-ubyte", np.uint8)[8:]
    images = (pixels.reshape(-1, 28, 28, 1).astype(np.float32) / 255 - 0.1307) / 0.3081
    return images, labels


PROGRAMS = {
    GUIDE: run_guide,
    "main.py": run_main,
    "Lightning": run_lightning,
    "Keras": run_keras,
}


# ---------------------------------------------------------------------------------------
# Processes
# ---------------------------------------------------------------------------------------


def in_a_process(function, *arguments, environment=None):
    """Returns what a function of this file returns when a new process calls it.

    The process works in a folder of its own, which is deleted afterwards. What it prints
    is shown only if it fails, and then the benchmark is over.
    """
    name = function.__name__
    command = [sys.executable, __file__, "--call", name, json.dumps(arguments)]
    with tempfile.TemporaryDirectory() as folder:
        finished = subprocess.run(
            command,
            check=False,
            cwd=folder,
            env=os.environ | (environment or {}),
            capture_output=True,
            text=True,
        )
        if finished.returncode != 0:
            sys.exit(
                f"{finished.stderr}benchmark.py: error: {name}{arguments} ended with"
                f" status {finished.returncode}, and the benchmark with it"
            )
        return json.loads(Path(folder, "answer.json").read_text())


def answer(name, arguments):
    """Calls a function of this file, in the process that in_a_process() has started."""
    functions = {"describe_machine": describe_machine, "run_program": run_program}
    value = functions[name](*json.loads(arguments))
    Path("answer.json").write_text(json.dumps(value))


def run_program(*values):
    """Does the Run that has these values; returns what there is to know of it."""
    run = Run(*values)
    marks = {"train": [], "test": [], "end": []}
    accuracy = PROGRAMS[run.program](run, marks)
    outcome = {
        "marks": marks,  # in seconds
        "accuracy": accuracy,  # in percent
        "memory": peak_memory(),  # in MiB
        "record": digest_record(),
    }
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        outcome["GPU memory"] = torch.cuda.max_memory_reserved() / 2**20  # in MiB
    return outcome


def peak_memory():
    """The most memory that this process has had so far, in MiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    bytes_per_unit = 1 if sys.platform == "darwin" else 1024
    return peak * bytes_per_unit / 2**20


def digest_record():
    """A digest of each table and parameter file of main.py's; none of other programs."""
    logs = Path("logs")
    files = [*logs.glob("*.csv"), *logs.glob("params/*")]
    return {
        str(file.relative_to(logs)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files
    }


def describe_machine():
    """What this runs on: in words, whether there is CUDA, and how many threads run.

    It is called first, and loads what the programs load: the first of them is not to be
    the only one that waits for the disk.
    """
    import torch

    for package in ("torchvision", "torchnet"):
        importlib.import_module(package)
    threads = torch.get_num_threads()
    words = [f"{name_processor()}, {threads} threads"]
    cuda = torch.cuda.is_available()
    if cuda:
        words.append(f"{torch.cuda.get_device_name()} with CUDA {torch.version.cuda}")
    words.append(f"Python {platform.python_version()}")
    words.append(f"PyTorch {torch.__version__}")
    return {"words": ", ".join(words), "cuda": cuda, "threads": threads}


def name_processor():
    """The processor's name, as Linux or else Python knows it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()


# ---------------------------------------------------------------------------------------
# Speed
# ---------------------------------------------------------------------------------------


def compare_speed(args):
    """Prints a table for each program, to be compared with the guide's loop."""
    warn_if_busy()
    machine = in_a_process(describe_machine)
    programs = select_programs(args, machine["cuda"])
    images = count_images(args.data_dir)
    pairs = []
    for number in tqdm(range(args.pairs), desc="pairs", disable=None):
        titles = list(programs)
        if number % 2 == 1:
            titles.reverse()  # so that no program always has the first turn
        pairs.append({title: measure(programs[title], images) for title in titles})

    print(f"{machine['words']}. Pairs: {args.pairs}.")
    print("Medians over the pairs; of the ratios, the lowest and the highest, too.")
    for title in programs:
        if title != GUIDE:
            print()
            print_table(speed_rows(pairs, title))
    print()
    compare_records(pairs)


def warn_if_busy():
    """Warns if other programs have been computing in the last minute."""
    load = os.getloadavg()[0]  # the mean number of threads that computed, or wanted to
    if load > 0.5:
        print(
            f"benchmark.py: warning: other programs are computing (load {load:.1f}):"
            " the ratios will be off",
            file=sys.stderr,
        )


def select_programs(args, cuda):
    """The programs to run, by the titles that they have in the tables."""
    run = Run(GUIDE, args.data_dir, args.epochs)
    programs = {GUIDE: run, "main.py": run._replace(program="main.py")}
    if cuda:
        eager = run._replace(program="main.py", flags=("--no-graph",))
        programs["main.py --no-graph"] = eager
    if args.others and is_installed("lightning"):
        title = f"Lightning {importlib.metadata.version('lightning')}"
        programs[title] = run._replace(program="Lightning")
    backend = os.environ.get("KERAS_BACKEND", "torch")
    if args.others and is_installed("keras") and is_installed(backend):
        title = f"Keras {importlib.metadata.version('keras')} on {backend}"
        programs[title] = run._replace(program="Keras")
    return programs


def is_installed(package):
    """Whether a package can be imported; if not, says that it is left out."""
    if importlib.util.find_spec(package) is not None:
        return True
    print(f"benchmark.py: {package} is not installed: left out", file=sys.stderr)
    return False


def measure(run, images):
    """The figures of a run on so many training images, and the record it has written."""
    started = time.monotonic()
    outcome = in_a_process(run_program, *run)
    ended = time.monotonic()

    marks = outcome["marks"]
    train_seconds = after_the_first(marks["train"], marks["test"])
    test_seconds = after_the_first(marks["test"], marks["end"])
    steps = math.ceil(images / BATCH_SIZE)
    figures = {
        "training, s per epoch": train_seconds,
        "test, s per epoch": test_seconds,
        "start to end of epoch 1, s": marks["end"][0] - started,
        f"whole process, {run.epochs} epochs, s": ended - started,
        "training, ms per step": 1000 * train_seconds / steps,
        "training, images per s": images / train_seconds,
        "peak memory, MiB": outcome["memory"],
    }
    if "GPU memory" in outcome:
        figures["peak GPU memory, MiB"] = outcome["GPU memory"]
    figures[f"accuracy after {run.epochs} epochs, %"] = outcome["accuracy"]
    return {"figures": figures, "record": outcome["record"]}


def after_the_first(starts, ends):
    """The median of the durations between starts and ends, but for the first."""
    durations = [end - start for start, end in zip(starts, ends, strict=True)]
    return statistics.median(durations[1:])


def speed_rows(pairs, title):
    """The rows of the table that compares the program of this title with the guide's."""
    rows = [("figure", GUIDE, title, "ratio")]
    for figure in pairs[0][title]["figures"]:
        guide_values = [pair[GUIDE]["figures"][figure] for pair in pairs]
        values = [pair[title]["figures"][figure] for pair in pairs]
        ratios = [
            value / guide_value for value, guide_value in zip(values, guide_values, strict=True)
        ]
        guide_median = digits(statistics.median(guide_values))
        median = digits(statistics.median(values))
        ratio = digits(statistics.median(ratios))
        spread = f"({digits(min(ratios))} to {digits(max(ratios))})"
        rows.append((figure, guide_median, median, f"{ratio} {spread}"))
    return rows


def digits(value):
    """A number with three significant digits, or with all of those before the point."""
    return f"{value:.0f}" if value >= 100 else f"{value:#.3g}"


def print_table(rows):
    """Prints rows as a table in Markdown, the first of them as its head."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    head, *body = rows
    for row in (head, ["-" * width for width in widths], *body):
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        print(f"| {' | '.join(cells)} |")


def compare_records(pairs):
    """Says whether all runs of main.py have written the same bytes; if not, exits."""
    results = [result for pair in pairs for result in pair.values()]
    records = [result["record"] for result in results if result["record"]]
    different = set()
    for record in records:
        for name, _ in record.items() ^ records[0].items():
            different.add(name)
    if different:
        sys.exit(
            f"benchmark.py: error: the {len(records)} runs of main.py, all of one seed,"
            f" differ in {', '.join(sorted(different))}"
        )
    if len(records) == 1:
        print("The bytes that main.py wrote were not compared: it ran once.")
        return
    compared = sorted({Path(name).parts[0] for name in records[0]})
    print(f"The {len(records)} runs of main.py ended in the same bytes: {', '.join(compared)}.")


# ---------------------------------------------------------------------------------------
# Accuracy
# ---------------------------------------------------------------------------------------


def compare_accuracy(args):
    """Prints a table of the accuracies of the guide's loop and of main.py's schedules."""
    machine = in_a_process(describe_machine)
    run = Run(GUIDE, args.data_dir, args.epochs)
    rows = {(GUIDE, "constant"): run}  # whose runs differ in nothing but their seed
    for schedule in ("constant", "step", "cosine"):
        flags = ("--schedule", schedule)
        rows["main.py", schedule] = run._replace(program="main.py", flags=flags)
    seeds = range(1, args.seeds + 1)
    runs = [row._replace(seed=seed) for row in rows.values() for seed in seeds]
    accuracies = measure_accuracies(runs, machine)

    print(f"{machine['words']}. Epochs: {args.epochs}.")
    print("Accuracy of the last epoch on the test images, in percent.")
    print()
    table = [("program", "schedule", "mean ± deviation", f"seeds 1 to {args.seeds}")]
    for (program, schedule), row in rows.items():
        of_row = [accuracies[row._replace(seed=seed)] for seed in seeds]
        each = ", ".join(f"{accuracy:.2f}" for accuracy in of_row)
        table.append((program, schedule, mean_and_deviation(of_row), each))
    print_table(table)


def measure_accuracies(runs, machine):
    """The accuracy of each run, in percent, by run.

    On a CPU as many runs are made at once as there are threads, each on one of them:
    that takes less time than one after the other on all of them.
    """
    workers = 1 if machine["cuda"] else machine["threads"]
    environment = {} if machine["cuda"] else {"OMP_NUM_THREADS": "1"}

    def accuracy(run):
        outcome = in_a_process(run_program, *run, environment=environment)
        return outcome["accuracy"]

    with ThreadPoolExecutor(workers) as pool:
        results = pool.map(accuracy, runs)
        progress = tqdm(results, desc="runs", total=len(runs), disable=None)
        return dict(zip(runs, progress, strict=True))


def mean_and_deviation(values):
    """The mean of the values and, if there are several, their standard deviation."""
    mean = f"{statistics.mean(values):.2f}"
    if len(values) == 1:
        return mean
    return f"{mean} ± {statistics.stdev(values):.2f}"


# ---------------------------------------------------------------------------------------
# main
# ---------------------------------------------------------------------------------------


def parse_arguments():
    """Returns the flags' values; exits with status 2 if one of them makes no sense."""
    parser = argparse.ArgumentParser(
        prog="benchmark.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage=argparse.SUPPRESS,  # An error is one line, without the usage before it.
        allow_abbrev=False,
    )
    parser.add_argument(
        "--data-dir",
        default="./data",
        metavar="DIR",
        help="has MNIST/raw/ (default: ./data)",
    )
    parser.add_argument("--pairs", type=int, default=5, metavar="N", help="default: 5")
    parser.add_argument(
        "--others", action="store_true", help="Lightning and Keras, too, if installed"
    )
    parser.add_argument("--accuracy", action="store_true", help="compare accuracies, not speeds")
    parser.add_argument(
        "--seeds",
        type=int,
        default=5,
        metavar="N",
        help="1 to N, for --accuracy (default: 5)",
    )
    parser.add_argument("--epochs", type=int, metavar="N", help="default: 3, for --accuracy 10")
    parser.add_argument("--call", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.epochs is None:
        args.epochs = 10 if args.accuracy else 3
    if args.pairs < 1:
        parser.error("argument --pairs: must be 1 or more")
    if args.seeds < 1:
        parser.error("argument --seeds: must be 1 or more")
    if args.epochs < 1:
        parser.error("argument --epochs: must be 1 or more")
    if args.epochs < 2 and not args.accuracy:
        parser.error("argument --epochs: must be 2 or more: the first does not count")
    return args


def check_data(data_dir):
    """Exits if a file of MNIST is missing."""
    raw = Path(data_dir, "MNIST", "raw")
    for part in ("train", "t10k"):
        for kind in ("images-idx3", "labels-idx1"):
            file = raw / f"{part}-{kind}-ubyte"
            if not file.is_file():
                sys.exit(
                    f"benchmark.py: error: {file} is missing: name with --data-dir the"
                    " folder that has MNIST/raw/, or run main.py, which downloads it"
                )


def count_images(data_dir):
    """The number of MNIST's training images, as their labels' file says it."""
    file = Path(data_dir, "MNIST", "raw", "train-labels-idx1-ubyte")
    return int.from_bytes(file.read_bytes()[4:8], "big")


def main():
    """Runs the benchmark, or in a process of its own one of its functions."""
    args = parse_arguments()
    if args.call:
        answer(*args.call)
        return
    check_data(args.data_dir)
    args.data_dir = str(Path(args.data_dir).resolve())
    if args.accuracy:
        compare_accuracy(args)
    else:
        compare_speed(args)


if __name__ == "__main__":
    main()
