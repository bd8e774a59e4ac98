"""gradients.py: its numbers against a computation that shares no code with it."""

import pickle
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import Hostile, error_line, plain_with, read_by_hand, read_params, rows
from matplotlib.collections import LineCollection
from matplotlib.lines import Line2D
from torch import nn

import gradients
import main

# The images of each mini-batch, in the order that main.py's seed 1 gives.
main.seed_everything(1)
MINI_BATCHES = np.split(np.random.permutation(600), 10)


@pytest.fixture(scope="module")
def run(train, tmp_path_factory):
    """A run of two epochs with settings of its own."""
    log_dir = tmp_path_factory.mktemp("logs")
    train(log_dir, "--epochs", 2, "--dropout", 0.3, "--batch-size", 60, "--lr", 0.02)
    return log_dir / "run-1"


@pytest.fixture
def copied(run, tmp_path):
    return shutil.copytree(run, tmp_path / "run-1")


def plain_gradient(plain, images, labels):
    loss = nn.functional.cross_entropy(plain(images), labels)
    return torch.cat([part.flatten() for part in torch.autograd.grad(loss, [*plain.parameters()])])


def test_numbers_are_those_of_single_images(go, run, small_mnist):
    finished = go("gradients.py", run)
    assert (finished.returncode, finished.stderr) == (0, "")
    title = "eval mode: 10 mini-batches of 60 against the true gradient of 600 images of mnist"
    assert finished.stdout.startswith(f"{title}\n[Epoch  0] true norm: ")
    assert (run / "gradients.png").read_bytes()[:4] == b"\x89PNG"
    table = rows(run / "gradients.csv")
    assert [(row["epoch"], row["mode"]) for row in table] == [(n, "eval") for n in "012"]

    plain = plain_with(read_params(run, 2).values()).double().eval()
    images, labels = read_by_hand(small_mnist, "train")
    pairs = zip(images.double().split(1), labels.split(1), strict=True)
    single = torch.stack([plain_gradient(plain, *pair) for pair in pairs])  # 600 x P
    g = torch.stack([single[batch].mean(0) for batch in MINI_BATCHES])
    true = single.mean(0)
    measures = {
        "norm": g.norm(dim=1),
        "cosine": torch.cosine_similarity(g, true, dim=1),
        "distance": (g - true).norm(dim=1) / true.norm(),
    }
    expected = {"true_norm": true.norm(), "noise_scale": 60 * g.var(0).sum() / true.norm() ** 2}
    for name, values in measures.items():
        expected[f"{name}_mean"] = values.mean()
        expected[f"{name}_p5"], expected[f"{name}_p95"] = np.percentile(values, [5, 95])
    for name, value in expected.items():
        assert float(table[2][name]) == pytest.approx(float(value), rel=1e-3), name
    # By the paper, a step's progress goes with 1 / (1 + scale / batch size).
    scale = float(table[2]["noise_scale"])
    gain = (1 + scale / 60) / (1 + scale / 120)
    assert f"After epoch 2 the noise scale is {scale:.0f} images" in finished.stdout
    assert f"lowers the loss {gain:.2f} times" in finished.stdout


def test_train_mode_has_the_dropout_of_the_run(go, copied, small_mnist):
    def norms():
        finished = go("gradients.py", copied, "--mode", "train")
        assert finished.returncode == 0 and ", dropout 0." in finished.stdout
        return [float(row["norm_mean"]) for row in rows(copied / "gradients-train.csv")]

    with_dropout = norms()
    assert (copied / "gradients-train.png").exists()
    # The dropout of an epoch does not depend on the epochs before.
    (copied / "params" / "epoch-00.pkl").unlink()
    assert norms() == pytest.approx(with_dropout[1:], rel=1e-4)
    # Without dropout, the gradients are those of a plain network in training.
    settings = (copied / "settings.json").read_text()
    (copied / "settings.json").write_text(settings.replace('"dropout": 0.3', '"dropout": 0.0'))
    plain = plain_with(read_params(copied, 2).values()).train()
    images, labels = read_by_hand(small_mnist, "train")
    gradients = [plain_gradient(plain, images[batch], labels[batch]) for batch in MINI_BATCHES]
    expected = torch.stack(gradients).norm(dim=1).mean().item()
    assert norms()[-1] == pytest.approx(expected, rel=1e-3) != with_dropout[-1]


def test_nothing_is_drawn_over_a_curve():
    """The bars come before the curves, and the legends stand above the panels."""
    names = ["norm_mean", "norm_p5", "norm_p95", "cosine_mean", "cosine_p5", "cosine_p95"]
    row = dict.fromkeys(["true_norm", "noise_scale", *names], 1.0)
    figure = gradients.draw(pd.DataFrame([{"epoch": n} | row for n in range(3)]), "title", 128)
    figure.draw_without_rendering()
    for panel in figure.axes:
        drawn = [type(artist) for artist in panel.get_children()]
        assert LineCollection not in drawn[drawn.index(Line2D) :]
        assert panel.get_legend().get_window_extent().ymin >= panel.bbox.ymax
        assert all(float(tick).is_integer() for tick in panel.get_xticks())


# The first 100 of 120, and without a last one of 40 images.
@pytest.mark.parametrize("batch_size, count", [(5, 100), (70, 8)])
def test_mini_batches_and_epochs(go, copied, batch_size, count):
    for epoch, other in ((0, "99"), (1, "100")):
        (copied / "params" / f"epoch-0{epoch}.pkl").rename(copied / f"params/epoch-{other}.pkl")
    finished = go("gradients.py", copied, "--batch-size", batch_size)
    title = f"{count} mini-batches of {batch_size} against the true gradient of 600"
    assert title in finished.stdout and "\nAfter epoch 100 the" in finished.stdout
    assert [row["epoch"] for row in rows(copied / "gradients.csv")] == ["2", "99", "100"]


def test_what_cannot_be_compared_is_one_line(go, copied, tmp_path):
    assert "no run in ./logs" in error_line(go("gradients.py", cwd=tmp_path))
    assert "nowhere" in error_line(go("gradients.py", copied, "--data-dir", tmp_path / "nowhere"))
    assert "--batch-size" in error_line(go("gradients.py", copied, "--batch-size", 600))
    assert "--batch-size" in error_line(go("gradients.py", copied, "--batch-size", 1), 2)


def test_load_parameters_reads_arrays_and_nothing_else(run, tmp_path):
    path = run / "params" / "epoch-02.pkl"
    np.testing.assert_equal(gradients.load_parameters(path), read_params(run, 2))
    hostile = np.array([Hostile(tmp_path / "made")], dtype=object)
    contents = [pickle.dumps({"m": value}) for value in (hostile, nn.ReLU())]
    contents += [b"cnumpy.f2py.__main__\ndtype2\n."]  # a module whose import exits
    for content in contents:
        (tmp_path / "file").write_bytes(content)
        with pytest.raises(pickle.UnpicklingError, match="not a part of an array"):
            gradients.load_parameters(tmp_path / "file")
    assert not (tmp_path / "made").exists()
    pickle.loads(contents[0])  # which shows that it was a real one
    assert (tmp_path / "made").exists()
