"""The CUDA graph: its rules with a stand-in for it, and itself where there is a GPU."""

import math
from contextlib import contextmanager, nullcontext
from functools import partial
from unittest import mock

import pytest
import torch
from conftest import one_line, run
from torch import nn, optim

import main

FLAGS = ("--epochs", 3, "--batch-size", 128, "--schedule", "cosine")


class StandInDevice(str):
    """A CPU that main takes for a GPU, by its type."""

    type = "cuda"


class StandInStream:
    def __init__(self, note):
        self.note = note

    def wait_stream(self, other):
        self.note("wait")


class StandInGraph:
    """As documented, the graph replays what was captured, with the same tensors."""

    def __init__(self, note):
        self.note = note

    def replay(self):
        self.note("replay")
        self.loss.copy_(self.captured_step())


def pretend_to_have_a_gpu(notes, capture_error=None):
    """Has main take this CPU for a GPU, and notes what it does with the graph."""

    def note(event):
        with open(notes, "a") as file:
            file.write(f"{event}\n")

    train_step = main.train_step

    def noted_step(model, loss_function, optimizer, data, target):
        note(f"step of {len(data)}")
        return train_step(model, loss_function, optimizer, data, target)

    @contextmanager
    def capture(graph):
        def captured(*arguments):
            # Nothing runs yet: the result is memory that a replay fills.
            graph.captured_step = partial(train_step, *arguments)
            graph.loss = torch.full((), math.nan)
            return graph.loss

        note("capture")
        if capture_error is not None:
            raise RuntimeError(capture_error)
        with mock.patch.object(main, "train_step", captured):
            yield

    main.train_step = noted_step
    main.select_device = lambda: StandInDevice("cpu")
    torch.cuda.CUDAGraph = lambda: StandInGraph(note)
    torch.cuda.graph = capture
    torch.cuda.Stream = lambda: StandInStream(note)
    torch.cuda.current_stream = lambda: StandInStream(note)
    torch.cuda.stream = nullcontext


def train(go, small_mnist, folder, *flags, **options):
    """Runs main in `folder` with the stand-in; returns the end and the notes."""
    folder.mkdir(exist_ok=True)
    paths = ("--data-dir", small_mnist, "--log-dir", folder / "logs")
    notes = folder / "notes"
    notes.touch()
    prepare = partial(pretend_to_have_a_gpu, notes, **options)
    finished = go(*paths, *FLAGS, *flags, prepare=prepare)
    return finished, notes.read_text().splitlines()


def test_a_replayed_run_leaves_the_same_record(go, small_mnist, tmp_path):
    replayed, notes = train(go, small_mnist, tmp_path / "replayed")
    assert (replayed.returncode, replayed.stderr) == (0, "")
    assert "   cuda:  True\n" in replayed.stdout
    # 600 images make four full batches and one of 88.
    first = 3 * ["wait", "step of 128", "wait"] + ["capture", "replay", "step of 88"]
    others = 4 * ["replay"] + ["step of 88"]
    assert notes == first + 2 * others

    eager, notes = train(go, small_mnist, tmp_path / "eager", "--no-graph")
    assert (eager.returncode, eager.stderr) == (0, "")
    assert notes == 3 * (4 * ["step of 128"] + ["step of 88"])
    names = ["train.csv", "test.csv", *(f"params/epoch-0{n}.pkl" for n in range(4))]
    for name in names:
        twin = tmp_path / "eager" / "logs" / name
        assert (tmp_path / "replayed" / "logs" / name).read_bytes() == twin.read_bytes()


def test_no_graph_may_change_when_a_run_is_resumed(go, small_mnist, tmp_path):
    train(go, small_mnist, tmp_path, "--schedule", "constant", "--epochs", 1)
    flags = ("--schedule", "constant", "--epochs", 2, "--resume", "--no-graph")
    finished, _ = train(go, small_mnist, tmp_path, *flags)
    assert (finished.returncode, finished.stderr) == (0, "")
    assert "[Epoch  1]" not in finished.stdout and "[Epoch  2]" in finished.stdout


def test_a_capture_that_fails_names_the_way_out(go, small_mnist, tmp_path):
    error = "operation not permitted\nwhen the stream is capturing"
    finished, notes = train(go, small_mnist, tmp_path, capture_error=error)
    line = one_line(finished, 1)
    assert "--no-graph" in line and " ".join(error.split()) in line
    assert notes[-1] == "capture"


# On a GPU


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_500_replayed_steps_are_500_eager_ones(digits):
    device = main.select_device()
    pixels, labels = digits
    images = torch.tensor(pixels).float().unsqueeze(1) / 255
    loader = main.Loader(images, torch.tensor(labels).long(), 128, device, seed=1)
    losses = {}
    for step in (main.train_step, main.GraphedStep(128)):
        torch.manual_seed(1)
        model = main.prepare(main.LeNet(), device).train()
        lr = torch.tensor(0.1, device=device)
        optimizer = optim.SGD(model.parameters(), lr, 0.9, fused=True)
        losses[step] = []
        for epoch in range(1, 14):
            loader.epoch = epoch
            lr.fill_(0.1 / epoch)  # as the schedule does
            for data, target in loader:
                loss = step(model, nn.CrossEntropyLoss(), optimizer, data, target)
                losses[step].append(loss)
    eager, replayed = (torch.stack(values).tolist() for values in losses.values())
    assert len(eager) > 500 and eager == replayed


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_resumed_run_on_a_gpu_has_the_bits_of_its_twin(small_mnist, tmp_path):
    flags = ("--data-dir", small_mnist, "--batch-size", 128, "--log-dir")
    assert run("main.py", *flags, tmp_path / "twin", "--epochs", 4).returncode == 0
    for epochs in (1, 2, 4):
        resume = ("--epochs", epochs, "--resume")
        finished = run("main.py", *flags, tmp_path / "resumed", *resume)
        assert finished.returncode == 0, finished.stderr
    for name in ("train.csv", "test.csv", "params/epoch-04.pkl"):
        twin = tmp_path / "twin" / name
        assert (tmp_path / "resumed" / name).read_bytes() == twin.read_bytes(), name
