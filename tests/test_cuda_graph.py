"""The CUDA graph: its rules with a stand-in for it, and itself where there is a GPU."""

from functools import partial

import pytest
import torch
from conftest import run
from torch import nn, optim

import main

FLAGS = ("--epochs", 3, "--batch-size", 128, "--schedule", "cosine")


@pytest.fixture
def events(monkeypatch):
    """What happens to torch.cuda.make_graphed_callables, which runs on a CPU here.

    As documented, what is captured runs at replays only, on the tensors it was captured
    with, and gives its result in the same memory every time.
    """
    events = []

    def make_graphed_callables(function, sample_args, num_warmup_iters=3):
        assert num_warmup_iters == 0  # a warm-up would train
        (static,), result = sample_args, torch.full((), torch.nan)
        events.append(("capture", len(static)))

        def replay(index):
            assert index.shape == static.shape and index is not static
            events.append(("replay", len(index)))
            return result.copy_(function(static.copy_(index)))

        return replay

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", make_graphed_callables)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # if there is one
    return events


def test_three_batches_of_a_size_run_before_its_graph(events):
    def step(index, size):
        assert size == len(index)
        if events[-1] != ("replay", len(index)):
            events.append(("eager", len(index)))
        return index.sum()

    known, batches, losses = {}, torch.arange(140).split(16), []  # eight, and one of 12
    for _ in range(4):
        for index in batches:
            events.append(("next", len(index)))
            losses.append(main.replayed(step, known, index, len(index)).item())
    assert losses == 4 * [index.sum().item() for index in batches]
    assert torch.equal(torch.cat(batches), torch.arange(140))  # none was overwritten
    for size, count in ((16, 32), (12, 4)):
        happened = [event for event, length in events if length == size]
        graph = ["capture", "replay", *(count - 4) * ["next", "replay"]]
        assert happened == 3 * ["next", "eager"] + ["next", *graph]


def test_a_replayed_run_leaves_the_same_record(
    events, small_mnist, tmp_path, monkeypatch
):
    def train(epoch, model, step, *others):
        return plain_train(epoch, model, partial(main.replayed, step, known), *others)

    known, plain_train = {}, main.train
    flags = [*map(str, FLAGS), "--data-dir", str(small_mnist), "--log-dir"]
    main.main([*flags, str(tmp_path / "eager")])
    assert events == []
    monkeypatch.setattr(main, "train", train)
    main.main([*flags, str(tmp_path / "replayed")])
    assert events.count(("capture", 128)) == 1 and ("capture", 88) not in events
    assert events.count(("replay", 128)) == 3 * 4 - 3
    for path in (tmp_path / "eager").rglob("*.*"):
        if path.suffix in (".csv", ".pkl"):
            twin = tmp_path / "replayed" / path.relative_to(tmp_path / "eager")
            assert twin.read_bytes() == path.read_bytes(), path


@pytest.mark.parametrize("name", ["constant", "step", "cosine"])
def test_the_schedule_writes_into_the_tensor_that_a_graph_reads(name):
    def optimizer(lr):
        return optim.SGD([nn.Parameter(torch.zeros(1))], lr, fused=True)

    ours, numbers = optimizer(torch.tensor(0.1)), optimizer(0.1)
    lr = ours.param_groups[0]["lr"]
    schedules = [main.Schedule(o, name, 8) for o in (ours, numbers)]
    for _ in range(8):
        assert ours.param_groups[0]["lr"] is lr
        assert lr.item() == pytest.approx(numbers.param_groups[0]["lr"], rel=1e-6)
        for schedule in schedules:
            schedule.optimizer.step()
            schedule.step()


# On a GPU


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_500_replayed_steps_are_500_eager_ones(digits):
    device = main.select_device()
    images = torch.tensor(digits[0][:, None], dtype=torch.float32, device=device) / 255
    labels, losses = torch.tensor(digits[1], device=device), []
    for wrap in (lambda step: step, lambda step: partial(main.replayed, step, {})):
        torch.manual_seed(1)
        network = main.LeNet().to(device, memory_format=torch.channels_last).train()
        lr = torch.tensor(0.1, device=device)
        optimizer = optim.SGD(network.parameters(), lr, 0.9, fused=True)
        loss = nn.CrossEntropyLoss()
        step = wrap(partial(main.train_step, network, loss, optimizer, images, labels))
        losses.append([])
        for epoch in range(13):
            lr.fill_(0.1 / (1 + epoch))  # as the schedule does
            for index, size in main.shuffled_batches(images, 128, 1, epoch):
                losses[-1].append(step(index, size).item())
    assert len(losses[0]) > 500 and losses[0] == losses[1]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_resumed_run_on_a_gpu_has_the_bits_of_its_twin(small_mnist, tmp_path):
    flags = ("--data-dir", small_mnist, *FLAGS[2:4], "--log-dir")
    assert run("main.py", *flags, tmp_path / "twin", "--epochs", 4).returncode == 0
    for epochs in (1, 2, 4):
        resume = ("--epochs", epochs, "--resume")
        finished = run("main.py", *flags, tmp_path / "resumed", *resume)
        assert finished.returncode == 0, finished.stderr
    for name in ("train.csv", "test.csv", "params/epoch-04.pkl"):
        contents = [(tmp_path / d / name).read_bytes() for d in ("twin", "resumed")]
        assert contents[0] == contents[1], name
