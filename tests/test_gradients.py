"""gradients.py: its numbers against a computation that shares no code with it."""

import io
import pickle
import shutil

import numpy as np
import pytest
import torch
from conftest import Hostile, error_line, plain_with, read_by_hand, read_params, rows
from torch import nn

import gradients

CPU = {"CUDA_VISIBLE_DEVICES": ""}


@pytest.fixture(scope="module")
def run(train, tmp_path_factory):
    """A run of two epochs with settings of its own."""
    log_dir = tmp_path_factory.mktemp("logs")
    flags = ("--epochs", 2, "--dropout", 0.3, "--batch-size", 60, "--lr", 0.02)
    train(log_dir, *flags, environ=CPU)
    return log_dir / "run-1"


@pytest.fixture
def compare(go):
    """A function that runs gradients.py to its end, without a GPU."""
    return lambda *arguments, **options: go("gradients.py", *arguments, environ=CPU, **options)


@pytest.fixture
def copied(run, tmp_path):
    return shutil.copytree(run, tmp_path / "run-1")


def per_image_gradients(run, epoch, data_dir):
    """The gradient of each training image in eval mode, float64: N x P."""
    plain = plain_with(read_params(run, epoch).values()).double().eval()
    images, labels = read_by_hand(data_dir, "train")
    found = []
    for image, label in zip(images.double(), labels, strict=True):
        loss = -plain(image[None]).log_softmax(1)[0, label]
        parts = torch.autograd.grad(loss, list(plain.parameters()))
        found.append(torch.cat([part.flatten() for part in parts]))
    return torch.stack(found)


def test_numbers_are_those_of_single_images(compare, run, small_mnist):
    finished = compare(run)
    assert (finished.returncode, finished.stderr) == (0, "")
    title = "eval mode: 10 mini-batches of 60 against the true gradient of 600 images of mnist"
    assert finished.stdout.startswith(f"{title}\n[Epoch  0] true norm: ")
    table = rows(run / "gradients.csv")
    assert [(row["epoch"], row["mode"]) for row in table] == [(n, "eval") for n in "012"]
    with open(run / "gradients.png", "rb") as picture:
        assert picture.read(4) == b"\x89PNG"

    row = {name: float(value) for name, value in table[2].items() if name != "mode"}
    single = per_image_gradients(run, 2, small_mnist)
    order = np.random.default_rng([1, 0]).permutation(600)  # as in main.py, for the same seed
    g = torch.stack([single[batch].mean(0) for batch in np.split(order, 10)])
    true = single.mean(0)
    assert row["true_norm"] == pytest.approx(true.norm().item(), rel=1e-4)
    measures = {
        "norm": g.norm(dim=1),
        "cosine": torch.cosine_similarity(g, true, dim=1),
        "distance": (g - true).norm(dim=1) / true.norm(),
    }
    for name, values in measures.items():
        low, high = np.percentile(values.numpy(), [5, 95])
        expected = {"mean": values.mean().item(), "p5": low, "p95": high}
        for key, value in expected.items():
            assert row[f"{name}_{key}"] == pytest.approx(value, rel=1e-3)
    # The estimate from ten mini-batches; that from many shuffles is the definition's.
    scales = []
    for seed in range(40):
        order = np.random.default_rng(seed).permutation(600)
        shuffled = torch.stack([single[batch].mean(0) for batch in np.split(order, 10)])
        scales.append(gradients.noise_scale(true, shuffled, 60))
    definition = (single.var(0).sum() / true.square().sum()).item()
    error = np.std(scales) / len(scales) ** 0.5
    assert 4 * error < 0.08 * definition and abs(np.mean(scales) - definition) < 4 * error
    assert row["noise_scale"] == pytest.approx(definition, rel=0.6)


def test_train_mode_has_the_dropout_of_the_run(compare, copied, small_mnist):
    """Without dropout, the gradients are those of a plain network in training."""
    norms = {}
    settings = (copied / "settings.json").read_text()
    for dropout in ("0.3", "0.0"):
        text = settings.replace('"dropout": 0.3', f'"dropout": {dropout}')
        (copied / "settings.json").write_text(text)
        finished = compare(copied, "--mode", "train")
        assert finished.returncode == 0 and f", dropout {dropout}\n" in finished.stdout
        norms[dropout] = [float(row["norm_mean"]) for row in rows(copied / "gradients-train.csv")]
    assert (copied / "gradients-train.png").exists()
    plain = plain_with(read_params(copied, 2).values()).train()
    images, labels = read_by_hand(small_mnist, "train")
    expected = []
    for batch in np.split(np.random.default_rng([1, 0]).permutation(600), 10):
        loss = nn.functional.cross_entropy(plain(images[batch]), labels[batch])
        parts = torch.autograd.grad(loss, list(plain.parameters()))
        expected.append(torch.cat([part.flatten() for part in parts]).norm().item())
    assert norms["0.0"][2] == pytest.approx(np.mean(expected), rel=1e-3) != norms["0.3"][2]
    # The dropout of an epoch does not depend on the epochs before.
    (copied / "settings.json").write_text(settings)
    (copied / "params" / "epoch-00.pkl").unlink()
    (copied / "params" / "epoch-01.pkl").unlink()
    compare(copied, "--mode", "train")
    (row,) = rows(copied / "gradients-train.csv")
    assert float(row["norm_mean"]) == pytest.approx(norms["0.3"][2], rel=1e-4)


@pytest.mark.parametrize(
    "batch_size, mini_batches",
    [(5, 100), (70, 8)],  # the first 100 of 120; without a last one of 40 images
)
def test_mini_batches_and_epochs(compare, copied, small_mnist, tmp_path, batch_size, mini_batches):
    """Flags that are given win over the run's own."""
    moved = shutil.copytree(small_mnist, tmp_path / "moved")
    settings = (copied / "settings.json").read_text()
    (copied / "settings.json").write_text(settings.replace(str(small_mnist), "nowhere"))
    for epoch, other in ((0, "99"), (1, "100")):
        (copied / "params" / f"epoch-0{epoch}.pkl").rename(copied / f"params/epoch-{other}.pkl")
    finished = compare(copied, "--batch-size", batch_size, "--data-dir", moved)
    title = f"{mini_batches} mini-batches of {batch_size} against the true gradient of 600"
    assert title in finished.stdout and "\nAfter epoch 100 the" in finished.stdout
    assert [row["epoch"] for row in rows(copied / "gradients.csv")] == ["2", "99", "100"]


def test_conclusion_follows_from_the_noise_scale():
    # By the paper a step's progress goes with 1 / (1 + scale / batch size): here 1 / 3 with 128
    # images, and 1 / 2 with 256.
    text = gradients.conclusion(3, 256.0, 128)
    assert "After epoch 3 the noise scale is 256 images" in text and "1.50 times" in text


def test_what_cannot_be_compared_is_one_line(compare, copied, tmp_path):
    assert "no run in ./logs" in error_line(compare(cwd=tmp_path))
    assert "nowhere" in error_line(compare(tmp_path / "nowhere"))
    assert "--batch-size" in error_line(compare(copied, "--batch-size", 600))
    assert "--batch-size" in error_line(compare(copied, "--batch-size", 1), 2)
    path = copied / "params" / "epoch-01.pkl"
    arrays = pickle.loads(path.read_bytes())
    path.write_bytes(pickle.dumps(arrays | {"m.0.0.weight": arrays["m.0.0.weight"][:1]}))
    assert str(path) in error_line(compare(copied))
    shutil.rmtree(copied / "params")
    assert str(copied) in error_line(compare(copied))


@pytest.mark.parametrize(
    "output", [torch.zeros(2, 1, 28, 28), torch.zeros(2, 2), torch.zeros(20), (torch.zeros(2, 10),)]
)
def test_other_outputs_than_logits_are_one_line(output):
    model = nn.Identity()
    model.forward = lambda images: output
    with pytest.raises(SystemExit, match=r"^gradients.py: error: the model's output"):
        gradients.gradient(model, torch.zeros(2, 1, 28, 28), torch.tensor([3, 7]))


# load_parameters


def test_load_parameters_gives_what_was_stored(run):
    arrays = gradients.load_parameters(run / "params" / "epoch-02.pkl")
    np.testing.assert_equal(arrays, read_params(run, 2))
    assert {array.dtype.name for array in arrays.values()} == {"float32"}


def test_load_parameters_runs_no_code(tmp_path):
    touched = tmp_path / "touched"
    hostile = Hostile(touched)
    for content in (hostile, {"m": hostile}, {"m": np.array([hostile], dtype=object)}):
        (tmp_path / "file").write_bytes(pickle.dumps(content))
        with pytest.raises(SystemExit, match=str(tmp_path / "file")):
            gradients.load_parameters(tmp_path / "file")
        assert not touched.exists()
    pickle.load(io.BytesIO(pickle.dumps(hostile)))  # which shows that it was a real one
    assert touched.exists()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"hello\n",
        pickle.dumps([1.0, 2.0]),
        pickle.dumps({"m": "a word"}),
        pickle.dumps({"m": nn.ReLU()}),
        pickle.dumps({"m": np.arange(9)})[:-20],
        b"cnumpy.f2py.__main__\ndtype\n.",  # a module whose import exits
    ],
)
def test_load_parameters_refuses_other_files(content, tmp_path):
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(SystemExit, match="cannot be read as parameters"):
        gradients.load_parameters(tmp_path / "file")
