"""What people change in main.py: each change does what it says, and its run can be resumed.

A change is a text that occurs once in main.py, and what replaces it. Most of them were made by
real readers of the guide in its program; some stand in README.md.
"""

import re
import signal
from functools import partial

import numpy as np
import pytest
import torch
from conftest import HOME, act_before, checksum, edit, read_by_hand, read_params, rows

README = (HOME / "README.md").read_text()

SGD = "optim.SGD(model.parameters(), lr=args.lr, momentum=args.momentum)"
SCHEDULE = "Schedule(optimizer, args.schedule, args.epochs)"
# Other lines are put before or after these.
DATA = '    name = "mnist" if name == "auto" else name\n'
ORDER = "        order = torch.from_numpy("
CLASS = "class View("
BEGIN = "    record.begin(flags, states)\n"
ZERO = "        optimizer.zero_grad()\n"
BACKWARD = "        loss.backward()\n"
NORM = "                nn.BatchNorm2d(co),\n"
POOL = "                nn.MaxPool2d(psz, stride=psz),\n"
STEP = "        optimizer.step()\n"
SCHEDULE_STEP = "        schedule.step()\n"
SAVE = "        record.save(epoch, states)\n"


def before(anchor, text):
    return anchor, text + anchor


def after(anchor, text):
    return anchor, anchor + text


def shown(beginning):
    """The code in README.md that begins so."""
    return re.search(f"`({re.escape(beginning)}[^`]*)`", README)[1]


TWO_GROUPS = """optim.Adam(
        [{"params": model.m[0].parameters(), "lr": 0.01}, {"params": model.m[1:].parameters()}]
    )"""

COUNTING_SGD = """\
class CountingSGD(optim.SGD):
    def step(self):
        group = self.param_groups[0]
        group["count"] = group.get("count", 0) + 1
        group["lr"] = 0.1 / group["count"]
        super().step()


"""

OWN_LENET = """\
class LeNet(nn.Sequential):
    def __init__(self, dropout):
        super().__init__(nn.Flatten(), nn.Linear(784, 10))


"""

MIXUP = """\
        mix = random.random() + np.random.rand()
        data = mix * data + (2 - mix) * data[torch.randperm(len(data))]
"""

CENTER_LOSS = """\
class CenterLoss(nn.Embedding):
    def forward(self, output, target):
        return (output - super().forward(target)).square().mean()


"""

CENTERED = [
    before(CLASS, CENTER_LOSS),
    ("nn.CrossEntropyLoss()", "CenterLoss(10, 10)"),
    (SGD, SGD.replace("model.parameters()", "[*model.parameters(), *loss_function.parameters()]")),
]

ADVERSARIAL = """\
        slope = torch.autograd.grad(loss, data)[0]
        data = (data + 0.1 * slope.sign()).detach()
        loss = loss_function(model(data), target)
"""

NOISY = """\
class Noisy(nn.Conv2d):
    def forward(self, x):
        return super().forward(x + 0.1 * torch.randn_like(x))


"""

TABLE_MORE = [
    ('"test.csv": []}', '"test.csv": [], "epochs.csv": []}'),
    before(SCHEDULE_STEP, '        record.add("epochs.csv", epoch=epoch)\n'),
]

# By name: the changes, and the learning rate of each of the 36 steps.
EDITS = {
    "Adam, two groups": ([(SGD, TWO_GROUPS)], 36 * [0.01]),
    "an optimizer that counts its steps": (
        [before(CLASS, COUNTING_SGD), (SGD, "CountingSGD(model.parameters(), lr=0.1)")],
        [0.1] + [0.1 / count for count in range(1, 36)],
    ),
    "StepLR": (
        [(SCHEDULE, shown("optim.lr_scheduler.StepLR(").replace("step_size=3", "step_size=1"))],
        np.repeat([0.1, 0.01, 0.001], 12),
    ),
    "ReduceLROnPlateau": (  # for a value that should rise, but the loss falls
        [
            (SCHEDULE, 'optim.lr_scheduler.ReduceLROnPlateau(optimizer, "max", patience=0)'),
            ("schedule.step()", "schedule.step(test_loss)"),
        ],
        np.repeat([0.1, 0.1, 0.01], 12),
    ),
    "a warm-up": (
        [("= self.factor, 1.0", "= self.factor, min(1, (self.epochs_done + 1) / 3)")],
        np.repeat([0.1 / 3, 0.2 / 3, 0.1], 12),
    ),
    "half of the labels": (
        [before(DATA, "    train.data, train.targets = train.data[:300], train.targets[:300]\n")],
        18 * [0.1],
    ),
    "half of the order": ([before(ORDER, "        order = order[::2]\n")], 18 * [0.1]),
}
SAME_RATES = {
    "another model": [before("class Schedule:", OWN_LENET)],
    "norm behind pooling": [(NORM, ""), after(POOL, NORM)],
    "noisy convolutions": [before(CLASS, NOISY), ("nn.Conv2d(ci, co, ksz)", "Noisy(ci, co, ksz)")],
    "adversarial images": [
        after(ZERO, "        data.requires_grad_()\n"),
        before(BACKWARD, ADVERSARIAL),
    ],
    "accumulated gradients": [
        (ZERO, ""),
        (STEP, "        if batch_ix % 5 == 4:\n    " + STEP + "    " + ZERO),
    ],
    "bfloat16": [
        ("LeNet(args.dropout).to(device)", "LeNet(args.dropout).to(device, torch.bfloat16)"),
        ("yield normalise(data)", "yield normalise(data).bfloat16()"),
    ],
    "a closure": [
        ("optimizer.step()", "optimizer.step(lambda: loss_function(model(data), target))"),
    ],
    "mixup with all generators": [before(ZERO, MIXUP)],
    "a center loss": [*CENTERED, before(BEGIN, '    states["centers"] = loss_function\n')],
    "one more table": TABLE_MORE,
    "fewer saved parameters": [before("write_whole(self.folder / f", "epoch % 2 or ")],
}
EDITS |= {name: (changes, 36 * [0.1]) for name, changes in SAME_RATES.items()}


@pytest.fixture(scope="module")
def unchanged(train, tmp_path_factory):
    """The checksum of a run of main.py as it is."""
    return checksum(train(tmp_path_factory.mktemp("unchanged")))


def column(log_dir, table, name):
    return [float(row[name]) for row in rows(log_dir / "run-1" / table)]


@pytest.mark.parametrize("name", EDITS)
def test_an_edited_run_and_its_resumption(name, go, train, unchanged, flags, tmp_path):
    changes, rates = EDITS[name]
    program = edit(tmp_path, *changes)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    expected = checksum(train(whole, program=program))
    assert expected != unchanged
    assert column(whole, "train.csv", "lr") == pytest.approx(rates)
    kill = partial(act_before, killed, "epoch-02.tmp", 1, signal.raise_signal, signal.SIGKILL)
    assert go(program, *flags, killed, prepare=kill).returncode == -signal.SIGKILL
    resumed = train(killed, "--resume", program=program)
    assert "[Epoch  1]" not in resumed and checksum(resumed) == expected


def test_what_only_looks_changes_nothing(train, unchanged, tmp_path):
    """A test in the middle of an epoch, outputs on a fixed batch, the loss of all training images,
    a history, and LogSoftmax apart."""
    look = """
        model.eval()
        print("outputs", model(fixed).exp().sum(1).mean().item())
        test(epoch, model, loss_function, Loader(*train_set, 250, device))
        history["accuracy"].append(accuracy)
        print(max(history["accuracy"]))
"""
    middle = "if batch_ix == 5:\n            test(epoch, model, loss_function, train_loader)\n"
    program = edit(
        tmp_path,
        after(STEP, f"        {middle}"),
        ("nn.Linear(500, 10),", "nn.Linear(500, 10), nn.LogSoftmax(1),"),
        ("nn.CrossEntropyLoss()", "nn.NLLLoss()"),
        after(BEGIN, "    history = {'accuracy': []}\n    fixed = next(iter(test_loader))[0]\n"),
        before(SCHEDULE_STEP, look),
    )
    output = train(tmp_path, program=program)
    sums = [float(total) for total in re.findall("outputs (.*)", output)]
    assert sums == pytest.approx([1, 1, 1]) and output.count("Average") == 9
    assert checksum(output) == unchanged


def test_a_transform_changes_each_training_image_by_itself(train, small_mnist, tmp_path):
    transform = "transforms.RandomRotation(30), transforms.ColorJitter(brightness=0.5)"
    program = edit(
        tmp_path,
        ("import datasets", "import datasets, transforms"),
        before(DATA, "    train.data[:] = train.data[0].clone()\n"),  # all alike
        ("device, args.seed)", f"device, args.seed, transforms.Compose([{transform}]))"),
        before(ZERO, '        np.save("trained", data)\n'),
        before("        top1.add", '        np.save("tested", data)\n'),
    )
    train(tmp_path, "--epochs", 1, program=program, cwd=tmp_path)
    trained, tested = np.load(tmp_path / "trained.npy"), np.load(tmp_path / "tested.npy")
    assert len({image.tobytes() for image in trained}) > 20
    black = (0 - 0.1307) / 0.3081
    assert np.allclose(trained[:, 0, [0, 0, -1, -1], [0, -1, 0, -1]], black)
    assert np.isclose(trained.min(), black) and trained.max() > 2  # not clipped to 0 and 1
    # The last batch of 300 images, which are tested 250 at a time.
    assert np.allclose(tested, read_by_hand(small_mnist, "t10k")[0][250:], atol=1e-5)


def test_changes_that_the_readme_shows(go, train, tmp_path):
    program = edit(
        tmp_path,
        (SGD, shown("optim.Adam(")),
        ("nn.CrossEntropyLoss()", shown("nn.CrossEntropyLoss(")),
        after(BACKWARD, f"        {shown('print(')}\n"),
        before(STEP, f"        {shown('nn.utils.clip_grad_norm_(')}\n"),
        ("lr=lr, loss=loss", f"lr=lr, loss=loss, {shown('bias=')}"),
        ('"accuracy": accuracy}', '"accuracy": accuracy, "seconds": time.monotonic() - started}'),
        after(SAVE, f"        {shown('if accuracy')}\n"),
    )
    lines = re.findall(r"^\d+ (\S+)$", train(tmp_path, program=program), re.MULTILINE)
    losses = column(tmp_path, "train.csv", "loss")
    assert [float(line) for line in lines] == pytest.approx(losses)
    bias = read_params(tmp_path / "run-1", 3)["m.7.bias"].mean()
    assert column(tmp_path, "train.csv", "bias")[-1] == pytest.approx(bias)
    assert len(column(tmp_path, "test.csv", "seconds")) == 3
    assert go("plot.py", tmp_path / "run-1").returncode == 0
    # Without the column again, the table would have rows of two kinds.
    program = edit(tmp_path, (SGD, shown("optim.Adam(")))
    finished = go(program, "--log-dir", tmp_path, "--resume", "--epochs", 4)
    assert finished.returncode == 1 and len(finished.stderr.splitlines()) == 2
    assert "train.csv has other columns than" in finished.stderr


def test_one_more_flag_after_a_run_was_recorded(train, tmp_path):
    train(tmp_path, "--epochs", 1)
    program = edit(
        tmp_path,
        before("    parser.set_defaults", f"    {shown('flag(').replace('0.0', '0.01')}\n"),
        ("momentum=args.momentum)", "momentum=args.momentum, weight_decay=args.weight_decay)"),
    )
    assert "   weight_decay:  0.01\n" in train(tmp_path, "--resume", program=program)
    checkpoint = torch.load(tmp_path / "run-1" / "checkpoint.pt", weights_only=True)
    assert checkpoint["states"]["optimizer"]["param_groups"][0]["weight_decay"] == 0.01


def test_one_more_table_in_some_epochs(train, tmp_path):
    program = edit(tmp_path, *TABLE_MORE)
    train(tmp_path, "--epochs", 1)
    train(tmp_path, "--epochs", 2, "--resume", program=program)
    train(tmp_path, "--epochs", 3, "--resume")
    train(tmp_path, "--epochs", 4, "--resume", program=program)
    assert column(tmp_path, "epochs.csv", "epoch") == [2, 4]


def test_a_row_after_the_last_epoch_is_written_once(train, tmp_path):
    row = '    record.add("test.csv", epoch=4, step=0, lr=0, loss=1, accuracy=0)\n'
    program = edit(tmp_path, before("    checksum = in_first", row))
    outputs = [train(tmp_path, *more, program=program) for more in ((), ("--resume",))]
    assert checksum(outputs[0]) == checksum(outputs[1])
    assert column(tmp_path, "test.csv", "epoch") == [1, 2, 3, 4]


def test_an_epoch_that_is_not_saved(train, unchanged, tmp_path):
    """Its rows are written, and replaced when the run is resumed."""
    stop = "        if epoch == 2:\n            break\n"
    train(tmp_path, program=edit(tmp_path, before(SAVE, stop)))
    assert column(tmp_path, "test.csv", "epoch") == [1, 2]
    assert column(tmp_path, "train.csv", "step") == [*range(1, 25)]
    assert checksum(train(tmp_path, "--resume")) == unchanged


def test_a_state_that_cannot_be_read_again(go, train, unchanged, flags, tmp_path):
    """The run fails when it is saved, and can be resumed from the checkpoint before it."""
    state = '"factor": self.factor'
    array = "np.ones(3) if self.epochs_done == 2 else 0"
    program = edit(tmp_path, (state + "}", f'{state}, "array": {array}}}'))
    finished = go(program, *flags, tmp_path)
    assert finished.returncode == 1 and "UnpicklingError: Weights only" in finished.stderr
    resumed = train(tmp_path, "--resume")
    assert "[Epoch  1]" not in resumed and checksum(resumed) == unchanged


@pytest.mark.parametrize(
    "changes, message",
    [
        ([("nn.Linear(50 * 2 * 2", "nn.Linear(50 * 3 * 3")], "RuntimeError: mat1 and mat2 shapes"),
        ([before(ZERO, '        open("mine.txt")\n')], "FileNotFoundError: .*mine.txt"),
        ([before(DATA, "    train = trian\n")], "NameError: name 'trian'"),
        (CENTERED, "ValueError: optimizer has parameters of a module that is not in `states`"),
    ],
)
def test_a_mistake_keeps_its_traceback(changes, message, go, flags, tmp_path):
    program = edit(tmp_path, *changes)
    finished = go(program, *flags, tmp_path)
    assert finished.returncode == 1 and "main.py: error" not in finished.stderr
    assert f'File "{program}", line' in finished.stderr
    assert re.match(message, finished.stderr.splitlines()[-1])
