"""What people change in main.py: each change does what it says, and its run can be resumed.

A change is a text that occurs once in main.py, and what replaces it. The first ones stand in
README.md; most of the others were made by real readers of the guide in its program.
"""

import json
import re
import shutil
import signal
from functools import partial

import numpy as np
import pytest
import torch
from conftest import HOME, act_before, checksum, edit, mnist_data, read_by_hand, rows, write_idx

TABLE = (HOME / "README.md").read_text().partition("| you want | what to do |\n")[2]
TABLE = TABLE.partition("\n\n")[0]

SGD = "optim.SGD(model.parameters(), lr=args.lr, momentum=args.momentum)"
SCHEDULE = "Schedule(optimizer, args.schedule, args.epochs)"
RETURN = "return name, (train.data, train.targets), (test.data, test.targets)"
# Other lines are put before or after these.
DATA = '    name = "mnist" if name == "auto" else name\n'
CLASS = "class View("
PARSE = "    args = parser.parse_args(argv)\n    if"
LOADER = "device, shuffle=True"
RECORD = "    record = Record(args, states)  # the files of the run\n"
RESTORE = "    record.restore()  # If the run is resumed, the states are now those after its last epoch.\n"
OUTPUT = "        output = model(data)  #"
BACKWARD = "        loss.backward()\n"
AVERAGE = "        average_gradients(optimizer)\n"
NORM = "                nn.BatchNorm2d(co),\n"
POOL = "                nn.MaxPool2d(psz, stride=psz),\n"
STEP = "        optimizer.step()\n"
SCHEDULE_STEP = "        schedule.step()\n"
SAVE = "        record.save(epoch)\n"


def before(anchor, text):
    return anchor, text + anchor


def after(anchor, text):
    return anchor, anchor + text


def shown(beginning):
    """The code in README's table that begins so."""
    return re.search(f"`({re.escape(beginning)}[^`]*)`", TABLE)[1]


# How each row of README's table is followed.
README = {
    "to see something in every step": [after(BACKWARD, f"        {shown('print(')}\n")],
    "another optimizer": [(SGD, shown("optim.Adam("))],
    "another layer or model": [
        (f"{shown('nn.ReLU(True)')},\n{POOL}", f"{shown('nn.Tanh()')},\n{POOL}")
    ],
    "another loss function": [("nn.CrossEntropyLoss()", shown("nn.CrossEntropyLoss(label"))],
    "clipped gradients": [after(AVERAGE, f"        {shown('nn.utils.clip')}\n")],
    "another schedule": [(SCHEDULE, shown("optim.lr_scheduler.StepLR("))],
    "one more value in `train.csv`": [("loss=loss)", f"loss=loss, {shown('bias=')})")],
    "one more value in `test.csv`": [
        ("accuracy=accuracy)", f"accuracy=accuracy, {shown('norm=')})")
    ],
    "one more table": [
        ('"test.csv": ""', '"test.csv": "", ' + shown('"epochs.csv')),
        before(SCHEDULE_STEP, "        " + shown('record.add("epochs') + "\n"),
    ],
    "one more flag": [
        before(PARSE, f"    {shown('flag(').replace('0.0', '0.01')}\n"),
        ("momentum=args.momentum)", f"momentum=args.momentum, weight_decay={shown('args.w')})"),
    ],
    "augmented images": [
        before("import filelock\n", f"{shown('from torchvision')}\n"),
        (LOADER, f"{LOADER}, {shown('transform=')}"),
    ],
    "other data, or less": [(RETURN, shown("return name, (train.data[:6"))],
    "to test on training images": [(RETURN, shown("return name, (train.data[:-"))],
    "to stop early": [after(SAVE, f"        {shown('if accuracy')}\n")],
    "to keep something when a run is resumed, such as a second optimizer": [
        before(RECORD, f"    {shown('states[')}\n")
    ],
    "PyTorch's own layers, for example for `torch.func`, `torch.export` or `torch.jit.script`": [
        (f"return {shown('FasterConvBN(')}", f"return {shown('nn.Sequential(')}"),
        (f"{shown('FasterDropout(')}p)", f"{shown('nn.Dropout(')}p)"),
        (f"{shown('FasterDropout(')}dropout)", f"{shown('nn.Dropout(')}dropout)"),
    ],
}
# The rows that change no result within three epochs.
LOOKING = ("to see", "another schedule", "to stop early", "to keep")

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

OTHERS = {
    "Adam, two groups": [(SGD, TWO_GROUPS)],
    "an optimizer that counts its steps": [
        before(CLASS, COUNTING_SGD),
        (SGD, "CountingSGD(model.parameters(), lr=0.1)"),
    ],
    "StepLR": [(SCHEDULE, shown("optim.lr_scheduler.StepLR(").replace("=3", "=1"))],
    "ReduceLROnPlateau": [  # for a value that should rise by 9 in each epoch
        (SCHEDULE, f"{shown('optim.lr_scheduler.Reduce')[:-1]}, 'max', 0.1, 0, 9, 'abs')"),
        ("schedule.step()", shown("schedule.step(test")),
    ],
    "a warm-up": [
        ("rules = [", 'rules = ["warm-up", '),
        ('choices=rules, default="constant"', 'choices=rules, default="warm-up"'),
        ("factor = 1.0", "factor = min(1, (self.epochs_done + 1) / 3)"),
    ],
    "another model": [before("class Schedule:", OWN_LENET)],
    "norm behind pooling": [(NORM, ""), after(POOL, NORM)],
    "noisy convolutions": [before(CLASS, NOISY), ("nn.Conv2d(ci, co, ksz)", "Noisy(ci, co, ksz)")],
    "adversarial images": [
        before(OUTPUT, "        data.requires_grad_()\n"),
        before(BACKWARD, ADVERSARIAL),
    ],
    "accumulated gradients": [
        ("        optimizer.zero_grad()\n" + OUTPUT, OUTPUT),
        (
            STEP,
            "        if batch_ix % 5 == 4:\n    " + STEP + "            optimizer.zero_grad()\n",
        ),
    ],
    "bfloat16": [
        ("LeNet(args.dropout).to(device)", "LeNet(args.dropout).to(device, torch.bfloat16)"),
        ("yield normalise(data)", "yield normalise(data).bfloat16()"),
        ("top1.add(output, target)", "top1.add(output.float(), target)"),
    ],
    "a closure": [
        ("optimizer.step()", "optimizer.step(lambda: loss_function(model(data), target))"),
    ],
    "mixup with all generators": [before(OUTPUT, MIXUP)],
    "a center loss": [
        before(CLASS, CENTER_LOSS),
        ("nn.CrossEntropyLoss()", "CenterLoss(10, 10)"),
        (
            SGD,
            SGD.replace("model.parameters()", "[*model.parameters(), *loss_function.parameters()]"),
        ),
        before(RECORD, '    states["centers"] = loss_function\n'),
    ],
    "a flag that is a path": [
        before(PARSE, '    flag("--own", type=Path, default=".")\n'),
        after(RESTORE, "    (record.folder / args.own / 'own.csv').touch()\n"),
        ("loss=loss)", "loss=loss, more=1)"),
    ],
}
# The learning rate of each step, if it is not 0.1 in 36 steps.
RATES = {
    "another optimizer": 36 * [0.001],
    "to test on training images": 12 * [0.1],
    "Adam, two groups": 36 * [0.01],
    "an optimizer that counts its steps": [0.1 / max(count, 1) for count in range(36)],
    "StepLR": np.repeat([0.1, 0.01, 0.001], 12),
    "ReduceLROnPlateau": np.repeat([0.1, 0.1, 0.01], 12),
    "a warm-up": np.repeat([0.1 / 3, 0.2 / 3, 0.1], 12),
}


@pytest.fixture(scope="module")
def unchanged(train, tmp_path_factory):
    """The checksum of a run of main.py as it is."""
    return checksum(train(tmp_path_factory.mktemp("unchanged")))


@pytest.fixture(scope="module")
def large_mnist(tmp_path_factory):
    """A data dir of 6,600 training images, in place of 60,000; they take batches of 500."""
    folder = tmp_path_factory.mktemp("large")
    images, labels = (np.resize(array, (6600, *array.shape[1:])) for array in mnist_data())
    for part, size in (("train", 6600), ("t10k", 300)):
        write_idx(folder / "MNIST" / "raw", part, images[:size].reshape(-1, 28, 28), labels[:size])
    return ("--data-dir", folder, "--batch-size", 500)


def column(log_dir, table, name):
    return [float(row[name]) for row in rows(log_dir / "run-1" / table)]


def test_all_rows_of_the_table_are_tested():
    labels = [line.split(" | ")[0].strip("| ") for line in TABLE.splitlines()[1:]]
    assert labels == [*README, "to start it from Python"]


@pytest.mark.parametrize("name", [*README, *OTHERS])
def test_an_edited_run_and_its_resumption(name, go, train, unchanged, flags, large_mnist, tmp_path):
    program = edit(tmp_path, *(README | OTHERS)[name])
    more = large_mnist if "train.data[:" in program.read_text().partition(DATA)[2] else ()
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    expected = checksum(train(whole, *more, program=program))
    assert (expected == unchanged) == name.startswith(LOOKING)
    assert column(whole, "train.csv", "lr") == pytest.approx(RATES.get(name, 36 * [0.1]))
    kill = partial(act_before, killed, "epoch-02.tmp", signal.raise_signal, signal.SIGKILL)
    finished = go(program, *flags, killed, *more, prepare=kill)
    assert finished.returncode == -signal.SIGKILL
    resumed = train(killed, *more, "--resume", program=program)
    assert "[Epoch  1]" not in resumed and checksum(resumed) == expected


def test_it_can_be_started_from_python(go, small_mnist, tmp_path):
    (tmp_path / "data").symlink_to(small_mnist)
    script = tmp_path / "script.py"
    script.write_text(f"{shown('import main')}\n{shown('main.main(')}\n")
    assert "[Epoch  3]" in go(script, cwd=tmp_path).stdout


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
        after(RESTORE, "    history = {'accuracy': []}\n    fixed = next(iter(test_loader))[0]\n"),
        before(SCHEDULE_STEP, look),
        *README["to see something in every step"],
    )
    output = train(tmp_path, program=program)
    sums = [float(total) for total in re.findall("outputs (.*)", output)]
    assert sums == pytest.approx([1, 1, 1]) and output.count("Average") == 9
    assert checksum(output) == unchanged
    losses = re.findall(r"^\d+ (\S+)$", output, re.MULTILINE)
    assert [float(loss) for loss in losses] == pytest.approx(column(tmp_path, "train.csv", "loss"))


def test_a_transform_changes_each_training_image_by_itself(train, small_mnist, tmp_path):
    transform = "transforms.RandomRotation(30), transforms.ColorJitter(brightness=0.5)"
    program = edit(
        tmp_path,
        ("import datasets\n", "import datasets, transforms\n"),
        before(DATA, "    train.data[:] = train.data[0].clone()\n"),  # all alike
        (LOADER, f"{LOADER}, transform=transforms.Compose([{transform}])"),
        before(OUTPUT, '        np.save("trained", data)\n'),
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


@pytest.mark.parametrize("schedule, rate", [("constant", 1), ("step", 0.1), ("cosine", 0.5)])
def test_what_changes_in_the_optimizers_line_wins(schedule, rate, train, tmp_path):
    """The rest goes on: here the momentum, which the program has set by hand."""
    start = edit(tmp_path, after(RESTORE, "    optimizer.param_groups[0]['momentum'] = 0.5\n"))
    train(tmp_path, "--epochs", 4, "--schedule", schedule, program=start)
    program = edit(
        tmp_path, (SGD, "optim.SGD(model.parameters(), lr=0.03, momentum=0.9, weight_decay=0.01)")
    )
    train(tmp_path, "--resume", "--epochs", 8, program=program)
    assert column(tmp_path, "test.csv", "lr")[4] == pytest.approx(0.03 * rate)
    checkpoint = torch.load(tmp_path / "run-1" / "checkpoint.pt", weights_only=True)
    group = checkpoint["states"]["optimizer"]["param_groups"][0]
    assert (group["weight_decay"], group["momentum"]) == (0.01, 0.5)
    # --schedule wins, too, and a new flag is recorded.
    train(tmp_path, "--resume", "--epochs", 9, "--schedule", "constant", program=program)
    assert column(tmp_path, "test.csv", "lr")[8] == pytest.approx(0.03)
    assert json.loads((tmp_path / "run-1" / "settings.json").read_text())["epochs"] == 9


def test_one_more_table_in_some_epochs(train, tmp_path):
    program = edit(tmp_path, *README["one more table"])
    train(tmp_path, "--epochs", 1)
    train(tmp_path, "--epochs", 2, "--resume", program=program)
    train(tmp_path, "--epochs", 3, "--resume")
    train(tmp_path, "--epochs", 4, "--resume", program=program)
    assert column(tmp_path, "epochs.csv", "epoch") == [2, 4]


def test_a_row_keeps_the_values_of_its_step(train, tmp_path):
    values = "kept=model.m[-1].bias[0], read=model.m[-1].bias[0].item()"
    train(tmp_path, program=edit(tmp_path, ("loss=loss)", f"loss=loss, {values})")))
    kept, read = (column(tmp_path, "train.csv", name) for name in ("kept", "read"))
    assert kept == pytest.approx(read) and len({*kept}) == 36


def test_a_value_that_is_no_number_fails_in_its_row(go, flags, tmp_path):
    program = edit(tmp_path, ("loss=loss)", "loss=loss, note='LeNet')"))
    assert "loss=loss, note='LeNet')" in go(program, *flags, tmp_path).stderr


def test_predict_sees_the_random_data_of_the_run(go, train, tmp_path):
    """Here test labels that are shuffled at random."""
    shuffled = "test.targets = test.targets[torch.randperm(300)]"
    program = edit(tmp_path, before(DATA, f"    {shuffled}\n"))
    train(tmp_path, "--seed", 5, program=program)
    shutil.copy(HOME / "predict.py", tmp_path)
    output = go(tmp_path / "predict.py", "--run", tmp_path / "run-1").stdout
    assert f"Accuracy: {column(tmp_path, 'test.csv', 'accuracy')[-1]:.2f}%" in output


def test_a_row_after_the_last_epoch_is_written_once(train, go, tmp_path):
    row = '    record.add("test.csv", epoch=4, step=0, lr=0, loss=1, accuracy=0)\n'
    program = edit(tmp_path, before("    seconds = time", row))
    outputs = [train(tmp_path, program=program)]
    outputs += [go(program, "--log-dir", tmp_path, "--resume").stdout]
    assert checksum(outputs[0]) == checksum(outputs[1])
    assert column(tmp_path, "test.csv", "epoch") == [1, 2, 3, 4]


def test_an_epoch_that_is_not_saved(train, unchanged, tmp_path):
    """Its rows are written, and replaced when the run is resumed."""
    stop = "        if epoch == 2:\n            break\n"
    train(tmp_path, program=edit(tmp_path, before(SAVE, stop)))
    assert column(tmp_path, "test.csv", "epoch") == [1, 2]
    assert column(tmp_path, "train.csv", "step") == [*range(1, 25)]
    assert checksum(train(tmp_path, "--resume")) == unchanged


@pytest.mark.parametrize(
    "old, new, error",
    [
        ("nn.Linear(50 * 2 * 2", "nn.Linear(50 * 3 * 3", "RuntimeError"),
        (BACKWARD, f'{BACKWARD}        open("mine.txt")\n', "FileNotFoundError"),
        (DATA, f"    train = trian\n{DATA}", "NameError"),
        (DATA, f"    train.data = train.data[train.targets < 5]\n{DATA}", "ValueError"),
        # Rows of two kinds in a table: another column, and another order of the same columns.
        ("batch=batch_ix, lr=lr", "lr=lr, **({'batch': 1} if batch_ix else {})", "ValueError"),
        (
            "batch=batch_ix, lr=lr",
            "**[{'lr': 1, 'batch': 1}, {'batch': 1, 'lr': 1}][batch_ix]",
            "ValueError",
        ),
    ],
)
def test_a_mistake_keeps_its_traceback(old, new, error, go, flags, tmp_path):
    program = edit(tmp_path, (old, new))
    finished = go(program, *flags, tmp_path)
    assert finished.returncode == 1 and "main.py: error" not in finished.stderr
    assert f'File "{program}", line' in finished.stderr
    assert finished.stderr.splitlines()[-1].startswith(f"{error}: ")


@pytest.mark.parametrize("epoch", [0, 2])
def test_states_that_could_not_be_restored_are_not_saved(epoch, go, train, flags, tmp_path):
    """Here a number of numpy's, from the start or from an epoch on. What is saved can be resumed."""
    value = f"np.float64(1) if self.epochs_done >= {epoch} else 1.0"
    program = edit(tmp_path, ('"name": self.name}', f'"name": self.name, "best": {value}}}'))
    finished = go(program, *flags, tmp_path)
    assert finished.returncode == 1 and "UnpicklingError: " in finished.stderr
    assert ("[Epoch  2]" in finished.stdout) == (epoch == 2)
    assert ("[Epoch  2]" in train(tmp_path, "--resume")) and not (tmp_path / "run-3").exists()
