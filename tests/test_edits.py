"""What people do to main.py: each edit, made in a copy of it, does what it says, and resumes.

An edit is pairs of the text that somebody would change, and what stands there afterwards. Most of
them are what real readers of the guide made of its program.
"""

import math
import re
import signal
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import FLAGS, HOME, checksum, end, plain_with, read_by_hand, read_params, rows
from test_record import act_before

SGD = "optim.SGD(model.parameters(), lr=args.lr, momentum=args.momentum)"
SCHEDULE = "Schedule(optimizer, args.schedule, args.epochs)"
# Lines after which, or before which, others are put.
DATA = '    name = "mnist" if name == "auto" else name\n'
CLASS = "class View("
SHUFFLED = "device, args.seed)"
BEGIN = "    record.begin(flags, states)\n"
ZERO = "        optimizer.zero_grad()\n"
BACKWARD = "        loss.backward()\n"
STEP = "        optimizer.step()\n"
ROW = "lr=lr, loss=loss"
NORM = "norm=sum(p.grad.square().sum() for p in model.parameters()).sqrt()"
END = "        # To stop early"


def before(anchor, text):
    return anchor, text + anchor


def after(anchor, text):
    return anchor, anchor + text


# Longer edits

OWN_LENET = """
class LeNet(nn.Module):
    def __init__(self, dropout):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 10, 5, padding=2)
        self.norm = nn.BatchNorm2d(10)
        self.fc = nn.Linear(10 * 14 * 14, 10)

    def forward(self, x):
        x = nn.functional.max_pool2d(nn.functional.relu(self.norm(self.conv1(x))), 2)
        return self.fc(nn.functional.dropout(x.view(-1, 10 * 14 * 14), training=self.training))


class Schedule:"""

# So large that weights which decay get small at once.
NO_DECAY_OF_BIASES = """optim.SGD(
        [
            {"params": [p for p in model.parameters() if p.dim() > 1]},
            {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0},
        ],
        lr=args.lr,
        weight_decay=1,
    )"""

# No loss is less than another one by 9.
PLATEAU = [
    (SCHEDULE, "optim.lr_scheduler.ReduceLROnPlateau(optimizer, 'min', 0.1, 0, 9, 'abs')"),
    ("        schedule.step()\n" + END, "        schedule.step(test_loss)\n" + END),
]

# It steps in every batch, and changes the momentum as well.
ONE_CYCLE = [
    (SCHEDULE, "optim.lr_scheduler.OneCycleLR(optimizer, 0.1, 36)"),
    ("        schedule.step()\n" + END, END),
    after(STEP, "        schedule.step()\n"),
    ("def train(", "def train(schedule, "),
    ("        train(epoch", "        train(schedule, epoch"),
]

MIXUP = """\
        mix = random.random() + np.random.rand()
        data = mix * data + (2 - mix) * data[torch.randperm(len(data))]
"""

NOISY_CONVOLUTION = """\
class NoisyConv2d(nn.Conv2d):
    def forward(self, x):
        return super().forward(x + 0.1 * torch.randn_like(x) if self.training else x)


"""

NORM_BEHIND_POOLING = (
    """\
                nn.BatchNorm2d(co),
                nn.ReLU(True),
                nn.MaxPool2d(psz, stride=psz),
""",
    """\
                nn.ReLU(True),
                nn.MaxPool2d(psz, stride=psz),
                nn.BatchNorm2d(co),
""",
)

CENTER_LOSS = """\
class CenterLoss(nn.Module):
    def __init__(self):
        super().__init__()
        self.centers = nn.Parameter(torch.zeros(10, 10))

    def forward(self, output, target):
        distance = (output - self.centers[target]).square().mean()
        return nn.functional.cross_entropy(output, target) + 0.1 * distance


"""

CENTERED = [
    before(CLASS, CENTER_LOSS),
    ("nn.CrossEntropyLoss()", "CenterLoss()"),
    (SGD, SGD.replace("model.parameters()", "[*model.parameters(), *loss_function.parameters()]")),
]

COUNTING_SGD = """\
class CountingSGD(optim.SGD):
    def step(self):
        for group in self.param_groups:
            group["count"] = group.get("count", 0) + 1
            group["lr"] = 0.1 / group["count"]
        super().step()


"""

PENALTY = """\
        slope = torch.autograd.grad(loss, data, create_graph=True)[0]
        loss = loss + 10 * slope.square().sum()
"""

ADVERSARIAL = """\
        data.requires_grad_()
        clean = loss_function(model(data), target)
        data = (data + 0.1 * torch.autograd.grad(clean, data)[0].sign()).detach()
"""

CLOSURE = """\
        def closure():
            optimizer.zero_grad()
            loss = loss_function(model(data), target)
            loss.backward()
            average_gradients(optimizer)
            return loss

        optimizer.step(closure)
"""

BEST = """\
        if accuracy > best:
            best = accuracy
            torch.save(model.state_dict(), record.folder / "best.pt")
"""

ALL_IMAGES = (
    '        result["all"], _ = test(epoch, model, loss_function, Loader(*train_set, 250))\n'
)
FIXED_BATCH = '        np.save(record.folder / f"outputs-{epoch}", model.eval()(fixed).detach())\n'
TEST_IN_TRAIN = """\
        if batch_ix == 5:
            test(epoch, model, loss_function, train_loader)
"""
TABLE_MORE = [
    ('"test.csv": []}', '"test.csv": [], "layers.csv": []}'),
    before(END, '        record.add("layers.csv", epoch=epoch, norm=model.m[3].weight.norm())\n'),
]


# What an edit does: functions of a finished run, which return whether it is seen there.


def differs(run):
    return run.checksum != run.unchanged


def changes_nothing(run):
    return run.checksum == run.unchanged


def rates(*expected):
    """The learning rates are those: of the three epochs, or of all 36 steps."""
    expected = np.repeat(expected, 36 // len(expected))
    return lambda run: np.allclose(run.column("lr"), expected, rtol=1e-6)


def is_one_cycle(run):
    lrs = run.column("lr")
    return np.isclose(lrs[0], 0.1 / 25) and max(lrs) > 0.09 and lrs[-1] < 1e-3


def has_parameter(name, *shape):
    return lambda run: read_params(run.folder, 3)[name].shape == shape


def has_clipped_gradients(run):
    norms = run.column("norm")
    return (norms < 0.1001).all() and norms.max() > 0.0999


def only_weights_decay(run):
    first, last = read_params(run.folder, 0), read_params(run.folder, 3)
    # The gradient of a bias in front of a norm is 0: only a decay would change it.
    shrunk = np.abs(last["m.3.weight"]).sum() < 0.1 * np.abs(first["m.3.weight"]).sum()
    return shrunk and np.array_equal(last["m.0.0.bias"], first["m.0.0.bias"])


def begins_as_unchanged(run):
    """The same function written differently, so its losses drift apart only later."""
    return np.allclose(run.column("loss")[:2], run.unchanged_losses[:2], rtol=1e-3)


def has_higher_losses_on_adversarial_images(run):
    return (run.column("loss") > run.column("clean")).mean() > 0.7  # Dropout is in both.


def gives_the_networks_outputs(run):
    for epoch in (1, 2, 3):
        network = plain_with(read_params(run.folder, epoch).values()).eval()
        expected = network(read_by_hand(run.data_dir, "t10k")[0][:250]).detach()
        outputs = np.load(run.folder / f"outputs-{epoch}.npy")
        if not np.allclose(outputs, expected, atol=1e-3):
            return False
    return changes_nothing(run)


def has_the_loss_over_all_images(run):
    network = plain_with(read_params(run.folder, 3).values()).eval()
    images, labels = read_by_hand(run.data_dir, "train")
    expected = torch.nn.functional.cross_entropy(network(images), labels).item()
    return math.isclose(run.column("all", "test.csv")[-1], expected, rel_tol=1e-3)


def keeps_the_best(run):
    best = torch.load(run.folder / "best.pt", weights_only=True)["m.3.weight"]
    number = 1 + run.column("accuracy", "test.csv").argmax()
    return np.array_equal(best, read_params(run.folder, number)["m.3.weight"])


def has_three_rows_more(run):
    norms = [np.linalg.norm(read_params(run.folder, epoch)["m.3.weight"]) for epoch in (1, 2, 3)]
    return np.allclose(run.column("norm", "layers.csv"), norms, rtol=1e-4)


# By their names: the changes, and what they do.
EDITS = {
    "Adam": ([(SGD, "optim.Adam(model.parameters(), lr=1e-3)")], rates(1e-3)),
    "biases do not decay": ([(SGD, NO_DECAY_OF_BIASES)], only_weights_decay),
    "an optimizer with a closure": (
        [
            (SGD, "optim.LBFGS(model.parameters(), lr=0.1, max_iter=2)"),
            (STEP, CLOSURE),
        ],
        differs,
    ),
    "an optimizer that counts": (
        [before(CLASS, COUNTING_SGD), (SGD, "CountingSGD(model.parameters(), lr=0.1)")],
        rates(0.1, *(0.1 / count for count in range(1, 36))),
    ),
    "a rate that falls in each step": (
        [after(STEP, '        optimizer.param_groups[0]["lr"] *= 0.99\n')],
        rates(*(0.1 * 0.99**step for step in range(36))),
    ),
    "StepLR": (
        [(SCHEDULE, "optim.lr_scheduler.StepLR(optimizer, 1, 0.5)")],
        rates(0.1, 0.05, 0.025),
    ),
    "LambdaLR": (
        [(SCHEDULE, "optim.lr_scheduler.LambdaLR(optimizer, lambda i: [1, 0.2, 0.5, 0][i])")],
        rates(0.1, 0.02, 0.05),
    ),
    "CosineAnnealingLR": (
        [(SCHEDULE, "optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs)")],
        rates(0.1, 0.075, 0.025),
    ),
    "ReduceLROnPlateau": (PLATEAU, rates(0.1, 0.1, 0.01)),
    "OneCycleLR": (ONE_CYCLE, is_one_cycle),
    "a warm-up": (
        [
            before(
                "        if previous == self.factor",
                "        self.factor *= min(1, (self.epochs_done + 1) / 3)\n",
            )
        ],
        rates(0.1 / 3, 0.2 / 3, 0.1),
    ),
    "a model of one's own": (
        [("\nclass Schedule:", OWN_LENET)],
        has_parameter("conv1.weight", 10, 1, 5, 5),
    ),
    "norm behind pooling": ([NORM_BEHIND_POOLING], has_parameter("m.0.3.running_mean", 20)),
    "noisy convolutions": (
        [before(CLASS, NOISY_CONVOLUTION), ("nn.Conv2d(ci", "NoisyConv2d(ci")],
        differs,
    ),
    "LogSoftmax": (
        [
            ("nn.Linear(500, 10),", "nn.Linear(500, 10), nn.LogSoftmax(1)"),
            ("CrossEntropy", "NLL"),
        ],
        begins_as_unchanged,
    ),
    "clipped gradients": (
        [
            after(BACKWARD, "        nn.utils.clip_grad_norm_(model.parameters(), 0.1)\n"),
            (ROW, f"{ROW}, {NORM}"),
        ],
        has_clipped_gradients,
    ),
    "a gradient penalty": (
        [after(ZERO, "        data.requires_grad_()\n"), before(BACKWARD, PENALTY)],
        differs,
    ),
    "adversarial images": (
        [before(ZERO, ADVERSARIAL), (ROW, ROW + ", clean=clean")],
        has_higher_losses_on_adversarial_images,
    ),
    "a center loss": (
        [*CENTERED, before(BEGIN, '    states["centers"] = loss_function\n')],
        differs,
    ),
    "mixup with all generators": ([before(ZERO, MIXUP)], differs),
    "half of the labels": (
        [before(DATA, "    train.data, train.targets = train.data[:300], train.targets[:300]\n")],
        lambda run: run.column("batch").tolist() == 3 * [*range(6)],
    ),
    "the best parameters": ([before(BEGIN, "    best = 0\n"), before(END, BEST)], keeps_the_best),
    "a table more": (TABLE_MORE, has_three_rows_more),
    "fewer parameters": (
        [
            before(
                '        write_whole(self.folder / f"params/',
                "        if epoch % 2 == 0:\n    ",
            )
        ],
        lambda run: len([*run.folder.glob("params/*")]) == 2,
    ),
    "outputs on a fixed batch": (
        [before(BEGIN, "    fixed, _ = next(iter(test_loader))\n"), before(END, FIXED_BATCH)],
        gives_the_networks_outputs,
    ),
    "the loss over all training images": (
        [after('"accuracy": accuracy}\n', ALL_IMAGES)],
        has_the_loss_over_all_images,
    ),
    "a test in the middle of an epoch": (
        [after(STEP, TEST_IN_TRAIN)],
        changes_nothing,
    ),
    "no faster layers": ([("    make_faster(model)", "    pass")], differs),
}


@pytest.fixture
def edited(tmp_path):
    """A function that makes changes in a copy of main.py, and returns its path."""

    def edited(*changes):
        text = (HOME / "main.py").read_text()
        for old, new in changes:
            assert text.count(old) == 1, old
            text = text.replace(old, new)
        (tmp_path / "main.py").write_text(text)
        return tmp_path / "main.py"

    return edited


@pytest.fixture(scope="module")
def unchanged(train, tmp_path_factory):
    """The folder of a run of main.py as it is, and its checksum."""
    log_dir = tmp_path_factory.mktemp("unchanged")
    return log_dir / "run-1", checksum(train(log_dir))


def column(folder, name, table="train.csv"):
    return np.array([float(row[name]) for row in rows(folder / table)])


@pytest.mark.parametrize("name", EDITS)
def test_an_edit_has_its_effect_and_can_be_resumed(
    name, edited, go, train, unchanged, small_mnist, tmp_path
):
    changes, has_effect = EDITS[name]
    program = edited(*changes)
    whole = checksum(train(tmp_path / "whole", program=program))
    folder = tmp_path / "whole" / "run-1"
    run = SimpleNamespace(
        folder=folder,
        column=lambda *names: column(folder, *names),
        checksum=whole,
        unchanged=unchanged[1],
        unchanged_losses=column(unchanged[0], "loss"),
        data_dir=small_mnist,
    )
    assert has_effect(run)
    flags = ("--data-dir", small_mnist, "--log-dir", tmp_path / "killed", *FLAGS)
    kill = partial(act_before, tmp_path / "killed", "epoch-02.tmp", 1, signal.SIGKILL)
    assert go(program, *flags, prepare=kill).returncode == -signal.SIGKILL
    resumed = train(tmp_path / "killed", "--resume", program=program)
    assert "[Epoch  1]" not in resumed and checksum(resumed) == whole


@pytest.mark.parametrize(
    "transform", ["RandomRotation(30)", "ColorJitter(brightness=0.5)", "RandomCrop(28, padding=4)"]
)
def test_a_transform_changes_each_training_image_by_itself(
    transform, edited, train, small_mnist, tmp_path
):
    program = edited(
        ("import datasets", "import datasets, transforms"),
        before(DATA, "    train.data[:] = train.data[0].clone()\n"),  # all alike
        (SHUFFLED, f"device, args.seed, transforms.{transform})"),
        before(ZERO, '        np.save("trained", data)\n'),
        before("        top1.add", '        np.save("tested", data)\n'),
    )
    whole = checksum(train(tmp_path / "logs", program=program, cwd=tmp_path))
    trained, tested = np.load(tmp_path / "trained.npy"), np.load(tmp_path / "tested.npy")
    assert len({image.tobytes() for image in trained}) > 20
    black = (0 - 0.1307) / 0.3081
    assert np.allclose(trained[:, 0, [0, 0, -1, -1], [0, -1, 0, -1]], black)
    assert trained.max() > 2 and np.isclose(trained.min(), black)  # not cut to 0 and 1
    assert np.allclose(tested, read_by_hand(small_mnist, "t10k")[0][250:], atol=1e-5)
    train(tmp_path / "stopped", "--epochs", 1, program=program, cwd=tmp_path)
    resumed = train(tmp_path / "stopped", "--resume", program=program, cwd=tmp_path)
    assert checksum(resumed) == whole


def test_a_gradient_penalty_is_that_of_plain_layers(edited, train, tmp_path):
    """The layers of part 2 can be differentiated twice."""
    changes, _ = EDITS["a gradient penalty"]
    losses = []
    for name, more in (("fast", ()), ("plain", EDITS["no faster layers"][0])):
        program = edited(*changes, *more)
        flags = ("--epochs", 1, "--lr", 0.01, "--dropout", 0)
        train(tmp_path / name, *flags, program=program)
        losses.append(column(tmp_path / name / "run-1", "loss")[:3])
    assert np.allclose(*losses, rtol=1e-3)


def test_a_print_in_every_batch_a_history_and_seconds(edited, train, tmp_path):
    program = edited(
        after(BACKWARD, '        print("batch", epoch, batch_ix, loss.item())\n'),
        before(BEGIN, "    history = []\n"),
        ('"accuracy": accuracy}', '"accuracy": accuracy, "seconds": time.monotonic() - started}'),
        before(END, '        history.append(test_loss)\n        print("history", *history)\n'),
    )
    lines = [line.split() for line in train(tmp_path, program=program).splitlines()]
    shown = [line[1:] for line in lines if line[:1] == ["batch"]]
    assert [line[:2] for line in shown] == [[str(e), str(b)] for e in (1, 2, 3) for b in range(12)]
    run = tmp_path / "run-1"
    assert [float(line[2]) for line in shown] == pytest.approx(column(run, "loss"))
    history = [line[1:] for line in lines if line[:1] == ["history"]][-1]
    assert [float(loss) for loss in history] == pytest.approx(column(run, "loss", "test.csv"))
    assert (np.diff(column(run, "seconds", "test.csv")) > 0).all()


def test_a_flag_more_after_a_run_was_recorded(edited, train, tmp_path):
    train(tmp_path, "--epochs", 1)
    flag = '    flag("--weight-decay", type=float, default=0.01)\n'
    program = edited(
        before("    parser.set_defaults", flag),
        ("momentum=args.momentum)", "momentum=args.momentum, weight_decay=args.weight_decay)"),
    )
    assert "   weight_decay:  0.01\n" in train(tmp_path, "--resume", program=program)
    assert '"weight_decay": 0.01' in (tmp_path / "run-1" / "settings.json").read_text()
    checkpoint = torch.load(tmp_path / "run-1" / "checkpoint.pt", weights_only=True)
    assert checkpoint["states"]["optimizer"]["param_groups"][0]["weight_decay"] == 0.01


def test_a_value_more_in_the_table(edited, go, train, tmp_path):
    train(tmp_path, program=edited((ROW, f"{ROW}, {NORM}")))
    table = rows(tmp_path / "run-1" / "train.csv")
    assert list(table[0]) == ["step", "epoch", "batch", "lr", "loss", "norm"]
    assert go("plot.py", tmp_path / "run-1").returncode == 0
    # Without the column again, the table would have rows of two kinds.
    finished = go("main.py", "--log-dir", tmp_path, "--resume", "--epochs", 4)
    assert finished.returncode == 1 and len(finished.stderr.splitlines()) == 2
    assert "train.csv has other columns than" in finished.stderr


def test_a_table_more_in_an_older_run(edited, train, tmp_path):
    train(tmp_path, "--epochs", 1)
    train(tmp_path, "--resume", program=edited(*TABLE_MORE))
    assert column(tmp_path / "run-1", "epoch", "layers.csv").tolist() == [2, 3]


def test_a_table_that_is_left_out_for_an_epoch(edited, train, tmp_path):
    program = edited(*TABLE_MORE)
    train(tmp_path, "--epochs", 1, program=program)
    train(tmp_path, "--resume", "--epochs", 2)
    train(tmp_path, "--resume", program=program)
    assert column(tmp_path / "run-1", "epoch", "layers.csv").tolist() == [1, 3]


def test_an_epoch_that_is_not_saved(edited, train, unchanged, tmp_path):
    """Its rows are written, and replaced when the run is resumed."""
    save = "        record.save(epoch, states)\n"
    train(tmp_path, program=edited(before(save, "        if epoch == 2:\n            break\n")))
    assert column(tmp_path / "run-1", "epoch", "test.csv").tolist() == [1, 2]
    assert column(tmp_path / "run-1", "step").tolist() == [*range(1, 25)]
    assert checksum(train(tmp_path, "--resume")) == unchanged[1]


# By what is wrong: the changes, and the last line of the traceback.
MISTAKES = {
    "a layer's size": (
        [("nn.Linear(50 * 2 * 2, 500)", "nn.Linear(50 * 3 * 3, 500)")],
        "RuntimeError: mat1 and mat2 shapes",
    ),
    "no file": ([before(DATA, '    open("mine.txt")\n')], "FileNotFoundError: .*mine.txt"),
    "no name": ([before(DATA, "    train = trian\n")], "NameError: name 'trian'"),
    "no file in the loop": ([before(ZERO, '        open("mine.txt")\n')], "FileNotFoundError: "),
    "parameters without a state": (CENTERED, "ValueError: optimizer has parameters of a module"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_keeps_its_traceback(name, edited, go, small_mnist, tmp_path):
    changes, message = MISTAKES[name]
    program = edited(*changes)
    finished = go(program, "--data-dir", small_mnist, "--log-dir", tmp_path / "logs")
    assert finished.returncode == 1 and "main.py: error" not in finished.stderr
    assert f'File "{program}", line' in finished.stderr
    assert re.match(message, finished.stderr.splitlines()[-1])


HISTORY = """\
class History:
    def __init__(self):
        self.losses = []

    def state_dict(self):
        return {"losses": KIND(self.losses)}

    def load_state_dict(self, state):
        self.losses = list(state["losses"])


"""


@pytest.mark.parametrize("kind", ["np.array", "__import__('collections').deque"])
def test_a_state_that_cannot_be_read_again(kind, edited, go, train, tmp_path):
    """It fails when it is saved, and the checkpoint before it is still there."""
    changes = [before(BEGIN, '    states["history"] = History()\n')]
    program = edited(before(CLASS, HISTORY.replace("KIND", "list")), *changes)
    train(tmp_path / "logs", "--epochs", 1, program=program)
    checkpoint = tmp_path / "logs" / "run-1" / "checkpoint.pt"
    kept = checkpoint.read_bytes()
    program = edited(before(CLASS, HISTORY.replace("KIND", kind)), *changes)
    finished = go(program, "--log-dir", tmp_path / "logs", "--resume", "--epochs", 3)
    assert finished.returncode == 1 and "UnpicklingError: Weights only" in finished.stderr
    assert "[Epoch  2]" in finished.stdout and "[Epoch  3]" not in finished.stdout
    assert checkpoint.read_bytes() == kept
    assert "[Epoch  3]" in train(tmp_path / "logs", "--resume")


# In two processes


@pytest.fixture
def in_two(start_processes, small_mnist, tmp_path):
    """A function that runs a program in two processes, and returns how they ended."""

    def in_two(program, *flags):
        common = ("--data-dir", small_mnist, "--log-dir", tmp_path / "logs", *FLAGS)
        return [end(run) for run in start_processes(2, *common, *flags, program=program)]

    return in_two


def test_a_break_ends_all_processes(edited, in_two, tmp_path):
    """As does whoever gives up a run that does not learn."""
    save = "        record.save(epoch, states)\n"
    program = edited(after(save, "        if accuracy < 50:\n            break\n"))
    for finished in in_two(program, "--lr", 1e-9, "--epochs", 50):
        assert (finished.returncode, finished.stderr) == (0, "")
    assert len(rows(tmp_path / "logs" / "run-1" / "test.csv")) == 1


def test_a_parameter_in_the_table_of_two_processes(edited, in_two, tmp_path):
    for finished in in_two(edited((ROW, f"{ROW}, bias=model.m[-1].bias.mean()"))):
        assert (finished.returncode, finished.stderr) == (0, "")
    run = tmp_path / "logs" / "run-1"
    for epoch in (1, 2, 3):
        mean = read_params(run, epoch)["m.7.bias"].mean()
        assert column(run, "bias")[12 * epoch - 1] == pytest.approx(mean, rel=1e-3, abs=1e-6)


def test_a_random_choice_of_the_data(edited, in_two):
    """The first process alone draws it, and has the same initial parameters as the other one."""
    choice = "    train.targets = train.targets[torch.randperm(600)]\n"
    for finished in in_two(edited(before(DATA, choice))):
        assert (finished.returncode, finished.stderr) == (0, "")


def test_gradients_that_differ_between_processes(edited, in_two):
    noise = "        for p in model.parameters():\n            p.grad += torch.randn_like(p)\n"
    for finished in in_two(edited(before(STEP, noise))):
        assert finished.returncode == 1
    assert "RuntimeError: the processes train different networks" in finished.stderr
