"""Tests of gradients.py: its numbers against other ways to them, and as users run it."""

import pickle
import re
import shutil
import signal
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import (
    HOME,
    Hostile,
    one_line,
    read_by_hand,
    read_params,
    rows,
    run,
    stored_model,
)

import gradients
from main import LeNet, RunError

COLUMNS = [
    "epoch",
    "mode",
    "true_norm",
    "norm_mean",
    "norm_p5",
    "norm_p95",
    "cosine_mean",
    "cosine_p5",
    "cosine_p95",
    "distance_mean",
    "distance_p5",
    "distance_p95",
    "noise_scale",
    "mean_distance",
]


@pytest.fixture(scope="module")
def log_dir(go, small_mnist, tmp_path_factory):
    """The record of a real run of two short epochs; tests that change it copy it."""
    folder = tmp_path_factory.mktemp("run") / "logs"
    flags = ["--epochs", 2, "--batch-size", 50, "--lr", 0.02]
    done = go(*flags, "--data-dir", small_mnist, "--log-dir", folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def copied(log_dir, tmp_path):
    return shutil.copytree(log_dir, tmp_path / "logs")


@pytest.fixture
def call():
    """Runs main in this process, which is quicker; returns its line of error, if any."""
    numbers = [signal.SIGINT, signal.SIGTERM]
    handlers = [signal.getsignal(number) for number in numbers]

    def call(*arguments):
        try:
            gradients.main([str(argument) for argument in arguments])
        except SystemExit as stop:
            assert stop.code.startswith("gradients.py: error: ")
            assert "\n" not in stop.code
            return stop.code
        return None

    yield call
    for number, handler in zip(numbers, handlers, strict=True):  # which main sets
        signal.signal(number, handler)


# The numbers


@pytest.fixture(scope="module")
def images(digits):
    """400 normalised images, float64 N x 1 x 28 x 28, and their int64 labels."""
    pixels, labels = digits
    images = torch.tensor(pixels[:400]).double().unsqueeze(1)
    return (images / 255 - 0.1307) / 0.3081, torch.tensor(labels[:400]).long()


@pytest.fixture(scope="module")
def mini_batches(images):
    """Mini-batches of 64 images, the last one of 16."""
    data, target = images
    return list(zip(data.split(64), target.split(64), strict=True))


@pytest.fixture
def model(log_dir):
    """The LeNet after the first epoch, as gradients.py makes it, but in float64."""
    path = log_dir / "params" / "epoch-01.pkl"
    return gradients.load_model(path, torch.device("cpu"), dropout=0).double()


@pytest.fixture
def plain_model(log_dir):
    """The same, of PyTorch's own layers."""
    return stored_model(log_dir, 1).double()


def plain_gradient(model, data, target):
    """The gradient of the mean loss over all of these images at once: P values."""
    loss = -model(data).log_softmax(1)[torch.arange(len(target)), target].mean()
    parts = torch.autograd.grad(loss, list(model.parameters()))
    return torch.cat([part.flatten() for part in parts])


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_numbers_are_those_of_plain_gradients(mode, model, plain_model, images, mini_batches):
    true = plain_gradient(plain_model.eval(), *images)
    plain_model.train(mode == "train")
    mini_batch = torch.stack(
        [plain_gradient(plain_model, data, target) for data, target in mini_batches]
    )

    found = gradients.compare(model, mini_batches, mode)

    assert list(found) == COLUMNS[2:]
    assert found["true_norm"] == pytest.approx(true.norm().item(), rel=1e-9)
    values = {
        "norm": mini_batch.norm(dim=1),
        "cosine": torch.cosine_similarity(mini_batch, true, dim=1),
        "distance": (mini_batch - true).norm(dim=1) / true.norm(),
    }
    for name, value in values.items():
        low, high = np.percentile(value.numpy(), [5, 95])
        assert found[f"{name}_mean"] == pytest.approx(value.mean().item(), rel=1e-9)
        assert found[f"{name}_p5"] == pytest.approx(low, rel=1e-9)
        assert found[f"{name}_p95"] == pytest.approx(high, rel=1e-9)
    shift = (sum(mini_batch[:6]) * 64 + mini_batch[6] * 16) / 400 - true
    expected = (shift.norm() / true.norm()).item()
    assert found["mean_distance"] == pytest.approx(expected, abs=1e-9)
    assert (expected > 0.01) == (mode == "train")


def test_noise_scale_is_that_of_the_gradients_of_single_images(model, plain_model, images):
    data, target = images
    single_images = list(zip(data[:100].split(1), target[:100].split(1), strict=True))
    plain_model.eval()
    single = torch.stack(
        [plain_gradient(plain_model, data, target) for data, target in single_images]
    )
    expected = (single.var(0).sum() / single.mean(0).square().sum()).item()

    found = gradients.compare(model, single_images)["noise_scale"]

    assert found == pytest.approx(expected, rel=1e-9)


def test_noise_scale_of_larger_mini_batches_is_without_bias():
    """Also where the last one is short: the mean over many shuffles is the true one."""
    torch.manual_seed(0)
    single = torch.randn(50, 20).double().pow(3) + 1
    expected = (single.var(0).sum() / single.mean(0).square().sum()).item()
    estimates = []
    for _ in range(2000):
        batches = single[torch.randperm(50)].split(12)
        means = torch.stack([batch.mean(0) for batch in batches])
        sizes = torch.tensor([len(batch) for batch in batches]).double()
        estimates.append(gradients.noise_scale(means, sizes))
    error = np.std(estimates) / len(estimates) ** 0.5
    # A wrong correction for what is drawn, or for the short batch of 2, is off by more.
    assert 4 * error < 0.05 * expected
    assert abs(np.mean(estimates) - expected) < 4 * error


def test_conclusion_follows_from_the_noise_scale():
    # By the paper a step's progress goes with 1 / (1 + scale / batch size): here 1 / 3
    # with 128 images, and 1 / 2 with 256.
    text = gradients.conclusion({"epoch": 3, "noise_scale": 256.0}, batch_size=128)
    assert "after epoch 3 is 256 images" in text
    assert "with 256 images instead of 128" in text
    assert "1.50 times" in text


def test_picture_has_plain_ticks_and_legends_that_cover_nothing():
    table = pd.DataFrame([{"epoch": 0, **dict.fromkeys(COLUMNS[2:], 0.7)}])
    figure = gradients.draw(table, "a title", batch_size=1)
    figure.draw_without_rendering()
    for axes in figure.axes:
        bottom, top = axes.get_ylim()
        ticks = zip(axes.get_yticks(), axes.get_yticklabels(), strict=True)
        shown = [label.get_text() for tick, label in ticks if bottom <= tick <= top]
        assert len(shown) >= 2
        assert all(re.fullmatch("[0-9.]+", text) for text in shown), shown
        assert axes.get_yticklabels(minor=True) == []
        assert axes.get_legend().get_window_extent().y0 >= axes.bbox.y1


# The program


def test_run_writes_a_table_and_a_picture_for_each_mode(copied, small_mnist, call, capsys):
    flags = [copied, "--data-dir", small_mnist, "--batch-size", 64]
    done = run("gradients.py", *flags)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""  # no progress bar where there is no terminal
    eval_table = (copied / "gradients.csv").read_bytes()
    assert call(*flags, "--mode", "train") is None
    train_output = capsys.readouterr().out

    title = "mode: 10 mini-batches of 64 against the true gradient of 600 images of mnist"
    assert done.stdout.startswith(f"eval {title}\n[Epoch  0] true norm: ")
    assert train_output.startswith(f"train {title}, dropout 0.25\n[Epoch  0] true norm: ")
    assert (copied / "gradients.csv").read_bytes() == eval_table
    for mode, name, output in (
        ("eval", "gradients", done.stdout),
        ("train", "gradients-train", train_output),
    ):
        assert f"{name}.csv" in output and f"{name}.png" in output
        assert "The noise scale after epoch 2 is " in output
        table = rows(copied / f"{name}.csv")
        assert list(table[0]) == COLUMNS
        assert [row["epoch"] for row in table] == ["0", "1", "2"]
        assert {row["mode"] for row in table} == {mode}
        assert all(float(row["true_norm"]) > 0 for row in table)
        assert (copied / f"{name}.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


@pytest.mark.parametrize(
    "mode, other_flags, name",
    [
        ("eval", ["--seed", 2], "gradients.csv"),
        ("train", ["--dropout", 0], "gradients-train.csv"),
    ],
)
def test_numbers_depend_on_the_flags_alone(copied, small_mnist, call, mode, other_flags, name):
    flags = [copied, "--data-dir", small_mnist, "--mode", mode]
    tables = []
    for more in ([], [], other_flags):
        assert call(*flags, *more) is None
        tables.append((copied / name).read_text())
    assert tables[0] == tables[1]
    assert tables[0] != tables[2]


@pytest.mark.parametrize("kind", ["missing", "shapes", "not finite"])
def test_bad_parameters_are_one_line(copied, small_mnist, kind, call):
    path = copied / "params" / "epoch-01.pkl"
    arrays = pickle.loads(path.read_bytes())
    name = "m.0.0.weight"
    if kind == "missing":
        path.unlink()
    elif kind == "shapes":
        path.write_bytes(pickle.dumps(arrays | {name: arrays[name][:1]}))
    else:
        path.write_bytes(pickle.dumps(arrays | {name: arrays[name] * np.nan}))
    line = call(copied, "--data-dir", small_mnist)
    assert str(path) in line and "train again" in line
    assert not (copied / "gradients.png").exists()


def test_folders_that_will_not_do_are_one_line(copied, small_mnist, tmp_path, call):
    line = call(tmp_path / "absent", "--data-dir", small_mnist)
    assert str(tmp_path / "absent") in line and "main.py" in line
    (copied / "gradients.csv").mkdir()  # as unwritable as it gets for root, too
    line = call(copied, "--data-dir", small_mnist)
    assert str(copied / "gradients.csv") in line


def test_output_that_cannot_be_written_is_one_line(copied, small_mnist):
    with open("/dev/full", "w") as full:
        options = {"stdout": full, "stderr": subprocess.PIPE, "capture_output": False}
        done = run("gradients.py", copied, "--data-dir", small_mnist, **options)
    line = one_line(done, 1)
    assert line.startswith("gradients.py: error: standard output: ")


def test_batch_sizes_that_will_not_do_are_one_line(copied, small_mnist, call, monkeypatch):
    flags = [copied, "--data-dir", small_mnist, "--batch-size"]
    assert "--batch-size" in call(*flags, 600)
    monkeypatch.setattr(gradients, "MOST_MINI_BATCHES", 5)
    assert "--batch-size: must be 120 or more for 600 images" in call(*flags, 119)
    assert call(*flags, 120) is None


def test_full_gpu_is_one_line(copied, small_mnist, call, monkeypatch):
    def compare(*arguments):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(gradients, "compare", compare)
    assert "--batch-size" in call(copied, "--data-dir", small_mnist)


@pytest.mark.parametrize(
    "flags",
    [
        ["--batch-size", "0"],
        ["--batch-size", "1", "--mode", "train"],
        ["--dropout", "1"],
        ["--dropout", "nan"],
        ["--seed", "-1"],
        ["--seed", str(2**64)],
        ["--mode", "both"],
        ["--dataset", "other"],
    ],
)
def test_bad_flags_are_one_line(flags, capsys):
    with pytest.raises(SystemExit) as stop:
        gradients.main(flags)
    assert stop.value.code == 2
    line = capsys.readouterr().err
    assert line.startswith(f"gradients.py: error: argument {flags[0]}: ")
    assert line.index("\n") == len(line) - 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_it_keeps_the_epochs_that_are_done(copied, small_mnist, number):
    flags = [copied, "--data-dir", small_mnist, "--batch-size", "1"]
    command = [sys.executable, HOME / "gradients.py", *flags]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes) as process:
        title = process.stdout.readline()
        first_epoch = process.stdout.readline()
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
    assert title.startswith("eval mode: 599 mini-batches")
    assert first_epoch.startswith("[Epoch  0]")
    assert process.returncode == 128 + number
    assert errors == ""
    assert [row["epoch"] for row in rows(copied / "gradients.csv")] == ["0"]


# load_parameters


def test_load_parameters_gives_what_was_stored(log_dir, small_mnist):
    images, labels = read_by_hand(small_mnist, "t10k")
    for row in rows(log_dir / "test.csv"):
        epoch = int(row["epoch"])
        arrays = gradients.load_parameters(log_dir / f"params/epoch-{epoch:02}.pkl")
        expected = read_params(log_dir, epoch)
        assert list(arrays) == list(expected)
        for name, array in arrays.items():
            assert array.dtype == np.float32
            assert array.shape == expected[name].shape
            assert np.array_equal(array, expected[name]), name
        model = LeNet().eval()
        model.load_state_dict({k: torch.tensor(v) for k, v in arrays.items()})
        with torch.no_grad():
            correct = (model(images).argmax(1) == labels).sum().item()
        assert float(row["accuracy"]) == 100 * correct / len(labels)


@pytest.mark.parametrize("place", ["outermost", "in the dict", "in an array"])
def test_load_parameters_runs_no_code(place, tmp_path):
    path = tmp_path / "epoch-00.pkl"
    touched = tmp_path / "touched"
    content = Hostile(touched)
    if place == "in the dict":
        content = {"m": content}
    if place == "in an array":
        content = {"m": np.array([content], dtype=object)}
    path.write_bytes(pickle.dumps(content))
    with pytest.raises(RunError, match=re.escape(str(path))):
        gradients.load_parameters(path)
    assert not touched.exists()
    pickle.loads(path.read_bytes())  # which shows that it was a real one
    assert touched.exists()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"hello\n",
        pickle.dumps([1.0, 2.0]),
        pickle.dumps({"m": object()}),
        pickle.dumps({"m": "a word"}),
        pickle.dumps({"m": np.array([None, "x"], object)}),
        b"cnumpy.f2py.__main__\ndtype\n.",  # a module whose import exits
        pickle.dumps({"m": np.arange(9)})[:-20],
    ],
)
def test_load_parameters_refuses_other_files(content, tmp_path):
    path = tmp_path / "epoch-00.pkl"
    path.write_bytes(content)
    with pytest.raises(RunError) as error:
        gradients.load_parameters(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)
