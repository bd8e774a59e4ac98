"""What a student does to main.py: each edit, made in a copy of it, works at once.

An edit is the text that somebody would change, and what stands there afterwards.
"""

import math
import warnings
from functools import partial

import pytest
from conftest import FLAGS, HOME, checksum, end, error_line, rows

SGD = "optim.SGD(model.parameters(), lr=args.lr, momentum=args.momentum)"
BACKWARD = "        loss.backward()\n"

OWN_LENET = """
class LeNet(nn.Module):
    def __init__(self, dropout):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 10, 5)
        self.bn1 = nn.BatchNorm2d(10)
        self.conv2 = nn.Conv2d(10, 20, 5, padding=2)
        self.drop = nn.Dropout(dropout)
        self.fc1 = nn.Linear(20 * 6 * 6, 50)
        self.fc2 = nn.Linear(50, 10)

    def forward(self, x):
        x = nn.functional.relu(nn.functional.max_pool2d(self.bn1(self.conv1(x)), 2))
        x = nn.functional.max_pool2d(nn.functional.relu(self.conv2(x)), 2)
        x = self.drop(nn.functional.relu(self.fc1(x.view(-1, 20 * 6 * 6))))
        return self.fc2(x)


class Schedule:"""

TWO_GROUPS = """optim.SGD(
        [{"params": model.m[:2].parameters(), "lr": 0.01}, {"params": model.m[2:].parameters()}],
        lr=args.lr,
        momentum=args.momentum,
    )"""

AVERAGED = (
    ('"optimizer": optimizer}', '"optimizer": optimizer, "ema": ema}'),
    ("    states = {", "    ema = optim.swa_utils.AveragedModel(model)\n    states = {"),
    ("        # To stop early", "        ema.update_parameters(model)\n        # To stop early"),
)

# A schedule that steps in every batch, and changes the momentum as well.
ONE_CYCLE = (
    (
        "Schedule(optimizer, args.schedule, args.epochs)",
        "optim.lr_scheduler.OneCycleLR(optimizer, 0.1, 36)",
    ),
    ("        schedule.step()\n    make_faster", "        pass\n    make_faster"),
    ("        schedule.step()\n        # To stop", "        # To stop"),
    ("        optimizer.step()\n", "        optimizer.step()\n        schedule.step()\n"),
    ("def train(", "def train(schedule, "),
    ("        train(epoch", "        train(schedule, epoch"),
    ('"optimizer": optimizer}', '"optimizer": optimizer, "schedule": schedule}'),
)

MIXUP = """
        mix = random.random() + np.random.rand()
        data = mix * data + (2 - mix) * data[torch.randperm(len(data))]
        optimizer.zero_grad()
"""

# By what they do: the changes, as pairs of old and new text.
EDITS = {
    "another optimizer": [(SGD, "optim.Adam(model.parameters(), lr=1e-3)")],
    "two groups of parameters": [(SGD, TWO_GROUPS)],
    "a model of one's own": [("\nclass Schedule:", OWN_LENET)],
    "a schedule of PyTorch's": [
        (
            "Schedule(optimizer, args.schedule, args.epochs)",
            "optim.lr_scheduler.StepLR(optimizer, 1, 0.5)",
        )
    ],
    "clipped gradients": [
        (BACKWARD, BACKWARD + "        nn.utils.clip_grad_norm_(model.parameters(), 0.1)\n")
    ],
    "label smoothing": [("CrossEntropyLoss()", "CrossEntropyLoss(label_smoothing=0.1)")],
    "a state more": list(AVERAGED),
    "a schedule that steps in every batch": ONE_CYCLE,
    "mixup with all generators": [("        optimizer.zero_grad()\n", MIXUP)],
    "a smaller interval": [("INTERVAL = 100", "INTERVAL = 5")],
    "no faster layers": [("    make_faster(model)\n", "")],
    "a stride": [
        ("nn.Conv2d(ci, co, ksz)", "nn.Conv2d(ci, co, ksz, padding=ksz // 2)"),
        ("View(50 * 2 * 2)", "View(50 * 4 * 4)"),
        ("nn.Linear(50 * 2 * 2, 500)", "nn.Linear(50 * 4 * 4, 500)"),
    ],
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
    """The checksum of main.py as it is."""
    return checksum(train(tmp_path_factory.mktemp("unchanged")))


@pytest.mark.parametrize("name", EDITS)
def test_an_edit_counts_and_can_be_resumed(name, edited, train, unchanged, tmp_path):
    program = edited(*EDITS[name])
    whole = checksum(train(tmp_path / "whole", program=program))
    assert (whole == unchanged) == (name in ("a smaller interval", "a state more"))
    train(tmp_path / "stopped", "--epochs", 1, program=program)
    # PyTorch's schedules warn of their steps before the optimizer's first.
    quiet = partial(warnings.simplefilter, "ignore")
    resumed = train(tmp_path / "stopped", "--resume", program=program, prepare=quiet)
    assert "[Epoch  1]" not in resumed and checksum(resumed) == whole


def test_rates_are_those_of_the_optimizer(edited, train, tmp_path):
    train(tmp_path / "adam", program=edited(*EDITS["another optimizer"]))
    table = rows(tmp_path / "adam" / "run-1" / "train.csv")
    assert {row["lr"] for row in table} == {"0.001"}
    train(tmp_path / "step", program=edited(*EDITS["a schedule of PyTorch's"]))
    table = rows(tmp_path / "step" / "run-1" / "train.csv")
    assert [row["lr"] for row in table] == ["0.1"] * 12 + ["0.05"] * 12 + ["0.025"] * 12


def test_a_print_is_seen_for_every_batch(edited, train, tmp_path):
    change = (BACKWARD, BACKWARD + "        print(epoch, batch_ix, loss.item())\n")
    lines = train(tmp_path, program=edited(change)).splitlines()
    shown = [line.split() for line in lines if line[:1].isdigit()]
    assert [line[:2] for line in shown] == [[str(e), str(b)] for e in (1, 2, 3) for b in range(12)]
    recorded = [float(row["loss"]) for row in rows(tmp_path / "run-1" / "train.csv")]
    assert [float(line[2]) for line in shown] == pytest.approx(recorded)


def test_a_flag_more_after_a_run_was_recorded(edited, train, tmp_path):
    train(tmp_path, "--epochs", 1)
    flag = '    flag("--weight-decay", type=float, default=0.01)\n'
    program = edited(
        ("    parser.set_defaults", flag + "    parser.set_defaults"),
        ("momentum=args.momentum)", "momentum=args.momentum, weight_decay=args.weight_decay)"),
    )
    assert "   weight_decay:  0.01\n" in train(tmp_path, "--resume", program=program)
    assert '"weight_decay": 0.01' in (tmp_path / "run-1" / "settings.json").read_text()


def test_a_value_more_in_the_table(edited, go, train, tmp_path):
    norm = "norm=sum(p.grad.square().sum() for p in model.parameters()).sqrt()"
    program = edited(("lr=lr, loss=loss)", f"lr=lr, loss=loss, {norm})"))
    train(tmp_path, program=program)
    table = rows(tmp_path / "run-1" / "train.csv")
    assert list(table[0]) == ["step", "epoch", "batch", "lr", "loss", "norm"]
    norms = [float(row["norm"]) for row in table]
    assert len(set(norms)) == 36 and all(0 < norm < math.inf for norm in norms)
    assert go("plot.py", tmp_path / "run-1").returncode == 0
    # Without the column again, the table would have rows of two kinds.
    line = error_line(go("main.py", "--log-dir", tmp_path, "--resume", "--epochs", 4))
    assert "train.csv has other columns than" in line


def test_a_mistake_keeps_its_traceback(edited, go, small_mnist, tmp_path):
    mistake = "nn.Linear(50 * 3 * 3, 500)"
    program = edited(("nn.Linear(50 * 2 * 2, 500)", mistake))
    finished = go(program, "--data-dir", small_mnist, "--log-dir", tmp_path / "logs")
    assert finished.returncode == 1 and "main.py: error" not in finished.stderr
    assert f'File "{program}", line' in finished.stderr and "in forward" in finished.stderr
    assert finished.stderr.splitlines()[-1].startswith("RuntimeError: mat1 and mat2 shapes")


def test_a_break_ends_all_processes(edited, start_processes, small_mnist, tmp_path):
    save = "        record.save(epoch, states)\n"
    program = edited((save, save + "        if accuracy > 20:\n            break\n"))
    flags = ("--data-dir", small_mnist, "--log-dir", tmp_path / "logs", *FLAGS, "--epochs", 50)
    for process in start_processes(2, *flags, program=program):
        finished = end(process)
        assert (finished.returncode, finished.stderr) == (0, "")
    assert len(rows(tmp_path / "logs" / "run-1" / "test.csv")) < 20


def test_another_dataset(edited, go, small_mnist, tmp_path):
    """Its files in its own folder, which the messages name."""
    program = edited(("datasets.MNIST", "datasets.FashionMNIST"))
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.parent.mkdir()
    raw.symlink_to(small_mnist / "MNIST" / "raw")
    flags = ("--data-dir", tmp_path, "--log-dir", tmp_path / "logs", *FLAGS)
    assert go(program, *flags).returncode == 0
    raw.unlink()
    raw.mkdir()
    assert str(raw) in error_line(go(program, *flags, "--dataset", "mnist"))
