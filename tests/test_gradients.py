"""Tests of gradients.py: its numbers against other ways to them, and as users run it."""

import csv
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import HOME, one_line, run

import gradients
from main import LeNet

COLUMNS = "epoch mode true_norm norm_mean norm_p5 norm_p95 cosine_mean cosine_p5"
COLUMNS += (
    " cosine_p95 distance_mean distance_p5 distance_p95 noise_scale mean_distance"
)


@pytest.fixture(scope="module")
def log_dir(small_mnist, tmp_path_factory):
    """The record of a real run of two short epochs; tests that change it copy it."""
    folder = tmp_path_factory.mktemp("run") / "logs"
    flags = ["--epochs", 2, "--batch-size", 50, "--lr", 0.02]
    done = run("main.py", *flags, "--data-dir", small_mnist, "--log-dir", folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def copied(log_dir, tmp_path):
    return shutil.copytree(log_dir, tmp_path / "logs")


@pytest.fixture
def call(capsys):
    """Runs main in this process, which is quicker; gives its line of error, if any."""
    numbers = signal.SIGINT, signal.SIGTERM
    handlers = [signal.getsignal(number) for number in numbers]

    def call(*arguments):
        try:
            return gradients.main(list(map(str, arguments)))
        except SystemExit as stop:
            assert "\n" not in stop.code and capsys.readouterr().err == ""
            assert stop.code.startswith("gradients.py: error: ")
            return stop.code

    yield call
    for number, handler in zip(numbers, handlers):  # which main sets
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def images(digits):
    """2,050 normalised images, float32 N x 1 x 28 x 28, and their int64 labels."""
    pixels, labels = (torch.tensor(np.array(part[:2050])) for part in digits)
    return (pixels[:, None].float() / 255 - 0.1307) / 0.3081, labels.long()


def model_of(log_dir, epoch=1):
    return gradients.load_model(log_dir / f"params/epoch-{epoch:02}.pkl")


def plain_gradient(log_dir, images, labels, epoch=1):
    """The full-batch gradient in float64 of a LeNet written out from its parameters."""
    with open(log_dir / f"params/epoch-{epoch:02}.pkl", "rb") as file:
        state = {k: torch.tensor(v).double() for k, v in pickle.load(file).items()}
    names = [name for name, _ in LeNet().named_parameters()]
    leaves = [state[name].requires_grad_() for name in names]

    def norm(x, prefix):
        shape = (1, -1) + (1,) * (x.dim() - 2)
        mean, variance, scale, shift = (
            state[f"{prefix}.{part}"].reshape(shape)
            for part in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / (variance + 1e-5).sqrt() * scale + shift

    x = images.double()
    for block, window in (("m.0", 3), ("m.1", 2)):
        weight, bias = state[f"{block}.0.weight"], state[f"{block}.0.bias"]
        x = norm(torch.nn.functional.conv2d(x, weight, bias), f"{block}.1")
        x = torch.nn.functional.max_pool2d(x, window).relu()
    x = x.flatten(1) @ state["m.3.weight"].T + state["m.3.bias"]
    x = norm(x, "m.4").relu() @ state["m.7.weight"].T + state["m.7.bias"]
    loss = -x.log_softmax(1)[torch.arange(len(labels)), labels].mean()
    return torch.cat([part.flatten() for part in torch.autograd.grad(loss, leaves)])


def image_gradients(model, images, labels):
    """The gradient of every image's loss in eval mode, float64 N x P, by torch.func."""
    model = model.double().eval()
    parameters = dict(model.named_parameters())

    def loss(parameters, image, label):
        logits = torch.func.functional_call(model, parameters, (image[None],))
        return torch.nn.functional.cross_entropy(logits, label[None])

    for module in model.modules():  # vmap refuses what changes its input
        if isinstance(module, torch.nn.ReLU):
            module.inplace = False
    per_image = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))
    parts = per_image(parameters, images.double(), labels)
    return torch.cat([parts[name].flatten(1) for name in parameters], 1)


def test_mini_batches_average_to_the_true_gradient(log_dir, images):
    true = plain_gradient(log_dir, *images)
    batches = gradients.random_batches(2050, 128, 3)
    row = gradients.compare(model_of(log_dir), *images, batches)
    # in float32 rounding decides which of two nearly equal values is the maximum
    assert row["true_norm"] == pytest.approx(true.norm().item(), rel=1e-3)

    images, model = (images[0].double(), images[1]), model_of(log_dir).double().eval()
    assert [len(batch) for batch in batches] == [128] * 16 + [2]
    assert torch.equal(torch.cat(batches).sort()[0], torch.arange(2050))
    found = list(gradients.batch_gradients(model, *images, batches, None))
    mean = sum(g.double() * len(b) for g, b in zip(found, batches)) / 2050
    assert (mean - true).norm() < 1e-9 * true.norm()

    row = gradients.compare(model, *images, batches)
    assert row["true_norm"] == pytest.approx(true.norm().item(), rel=1e-9)
    assert row["mean_distance"] < 1e-9
    stacked = torch.stack(found).double()
    values = {"norm": stacked.norm(dim=1)}
    values["cosine"] = stacked @ true / (stacked.norm(dim=1) * true.norm())
    values["distance"] = (stacked - true).norm(dim=1) / true.norm()
    for name, value in values.items():
        assert row[f"{name}_mean"] == pytest.approx(value.mean().item(), rel=1e-6)
        for part, level in (("p5", 0.05), ("p95", 0.95)):
            expected = torch.quantile(value, level).item()
            assert row[f"{name}_{part}"] == pytest.approx(expected, rel=1e-6)


def test_gradients_that_do_not_fit_memory_are_computed_twice(
    log_dir, images, monkeypatch
):
    batches = gradients.random_batches(2050, 256, 3)
    kept = gradients.compare(model_of(log_dir), *images, batches)
    monkeypatch.setattr(gradients, "KEPT_BYTES", 0)
    again = gradients.compare(model_of(log_dir), *images, batches)
    assert again.pop("mean_distance") < 1e-5 and kept.pop("mean_distance") < 1e-5
    assert again == pytest.approx(kept, rel=1e-5)


def test_noise_scale_is_that_of_the_gradients_of_single_images(log_dir, images):
    images = images[0][:121].double(), images[1][:121]
    model = model_of(log_dir).double()
    single = image_gradients(model_of(log_dir), *images)
    true = single.mean(0)
    expected = (((single - true) ** 2).sum() / 121 / (true @ true)).item()

    def scale(batch_size, seed=0):
        batches = gradients.random_batches(121, batch_size, seed)
        return gradients.compare(model, *images, batches)["noise_scale"]

    assert scale(1) == pytest.approx(expected, rel=1e-6)  # exact, whatever the shuffle
    # without bias, though the last batch is short or long: over 100 shuffles of the
    # gradients of the images the mean is within four of its standard errors
    estimates = []
    for seed in range(100):
        batches = gradients.random_batches(121, 16, seed)
        means = torch.stack([single[batch].mean(0) for batch in batches])
        weights = torch.tensor([len(batch) / 121 for batch in batches])
        spread = (weights * ((means - true) ** 2).sum(1)).sum() * 120
        estimates.append((spread / (len(batches) - 1) / (true @ true)).item())
        if seed < 3:  # the formula retyped here is that of the program
            assert scale(16, seed) == pytest.approx(estimates[-1], rel=1e-6)
    error = np.std(estimates) / len(estimates) ** 0.5
    assert error < 0.03 * expected
    assert abs(np.mean(estimates) - expected) < 4 * error


def test_train_mode_differs_and_leaves_the_model_as_it_is(log_dir, images):
    model = model_of(log_dir)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    batches = gradients.random_batches(2050, 128, 3)
    row = gradients.compare(model, *images, batches, "train")
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert row["mean_distance"] > 0.05
    true = plain_gradient(log_dir, *images).norm().item()
    assert row["true_norm"] == pytest.approx(true, rel=1e-3)


def test_no_batch_is_of_one_image_unless_all_are():
    sizes = [len(batch) for batch in gradients.random_batches(101, 20, 0)]
    assert sizes == [20, 20, 20, 20, 21]
    assert len(gradients.random_batches(101, 1, 0)) == 101


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_run_writes_table_csv_and_picture(copied, small_mnist, mode):
    flags = ["--data-dir", small_mnist, "--batch-size", 64, "--mode", mode]
    done = run("gradients.py", copied, *flags)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""  # no progress bar where there is no terminal
    lines = done.stdout.splitlines()
    title = f"{mode} mode: 10 mini-batches of 64 against the true gradient of 600"
    assert lines[0].startswith(title)
    assert ("dropout 0.25" in lines[0]) == (mode == "train")
    assert [line.split()[0] for line in lines[3:6]] == ["0", "1", "2"]
    assert lines[6].startswith("At epoch 2 the noise scale is ") and lines[6][-1] == "."
    assert len(lines) == 7 and "batches of more than 64 would save " in lines[6]
    with open(copied / "gradients.csv") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == COLUMNS.split()
    assert [(row["epoch"], row["mode"]) for row in rows] == [(k, mode) for k in "012"]
    for row in rows:
        shift = float(row["mean_distance"])
        assert shift > 0.01 if mode == "train" else shift < 1e-5
        for name in ("norm", "cosine", "distance"):
            low, mean, high = (float(row[f"{name}_{k}"]) for k in ("p5", "mean", "p95"))
            assert low < mean < high
    assert (copied / "gradients.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert not (copied / "gradients.tmp").exists()


def test_same_seed_same_numbers(copied, small_mnist, call):
    found = []
    for seed in (1, 1, 2):
        flags = ["--data-dir", small_mnist, "--mode", "train", "--seed", seed]
        assert call(copied, *flags) is None
        found.append((copied / "gradients.csv").read_text())
    assert found[0] == found[1] != found[2]


class Foreign:
    def __reduce__(self):
        return os.getcwd, ()


def damage(path, kind):
    with open(path, "rb") as file:
        content = file.read()
    arrays = pickle.loads(content)
    first = next(iter(arrays))
    if kind == "missing":
        path.unlink()
    elif kind == "names":
        path.write_bytes(pickle.dumps({"other": arrays.pop(first), **arrays}))
    elif kind == "shapes":
        path.write_bytes(pickle.dumps(arrays | {first: arrays[first][:1]}))
    elif kind == "not finite":
        path.write_bytes(pickle.dumps(arrays | {first: arrays[first] * np.nan}))
    else:
        foreign = pickle.dumps(Foreign())
        path.write_bytes(
            {"empty": b"", "half": content[:9999], "foreign": foreign}[kind]
        )


KINDS = ["missing", "empty", "half", "foreign", "names", "shapes", "not finite"]


@pytest.mark.parametrize("kind", KINDS)
def test_bad_parameters_are_one_line(copied, small_mnist, kind, call):
    damage(copied / "params/epoch-01.pkl", kind)
    if kind == "names":
        line = one_line(run("gradients.py", copied, "--data-dir", small_mnist), 1)
    else:
        line = call(copied, "--data-dir", small_mnist)
    assert "epoch-01.pkl" in line and "train" in line
    assert not (copied / "gradients.csv").exists()


def test_folders_that_will_not_do_are_one_line(copied, small_mnist, tmp_path, call):
    (tmp_path / "empty").mkdir()
    for name in ("empty", "absent"):
        line = call(tmp_path / name, "--data-dir", small_mnist)
        assert name in line and "log dir" in line
    (copied / "gradients.tmp").mkdir()  # as unwritable as it gets for root, too
    done = run("gradients.py", copied, "--data-dir", small_mnist)
    assert "gradients.tmp" in one_line(done, 1) and "writable" in one_line(done, 1)


def test_broken_dataset_and_too_large_batches(copied, small_mnist, tmp_path, call):
    line = call(copied, "--data-dir", small_mnist, "--batch-size", 600)
    assert "--batch-size" in line
    broken = shutil.copytree(small_mnist, tmp_path / "data")
    (broken / "MNIST/raw/train-images-idx3-ubyte").write_bytes(b"\0\0\10\3half")
    done = run("gradients.py", copied, "--data-dir", broken)
    assert "train-images-idx3-ubyte" in one_line(done, 1)
    assert not list(copied.glob("gradients.*"))


BAD_FLAGS = [
    ["--batch-size", "0"],
    ["--batch-size", "1", "--mode", "train"],
    ["--dropout", "1"],
    ["--seed", "-1"],
    ["--seed", str(2**63)],
    ["--mode", "both"],
    ["--dataset", "other"],
    ["one", "two"],
]


@pytest.mark.parametrize("flags", BAD_FLAGS)
def test_bad_flags_are_one_line(flags, capsys):
    with pytest.raises(SystemExit) as stop:
        gradients.parse_arguments(flags)
    assert stop.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("gradients.py: error: ")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_without_traceback(copied, small_mnist, number):
    command = [sys.executable, "-u", HOME / "gradients.py", copied, "--batch-size", "1"]
    command += ["--data-dir", small_mnist]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(list(map(str, command)), **pipes) as process:
        process.stdout.readline()  # the title: it is about to compute
        time.sleep(0.3)
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert errors == ""
