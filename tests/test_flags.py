"""The command line: what its flags take, refuse, and mean if they are left out."""

import os
import re
import subprocess
import sys

import pytest
from conftest import HOME, OFFLINE, one_line, run

import main

DEFAULTS = {  # as in the guide, and then the flags that it does not have
    "--batch-size": 128,
    "--epochs": 10,
    "--lr": 0.1,
    "--dropout": 0.25,
    "--momentum": 0.9,
    "--data-dir": "./data",
    "--dataset": "auto",
    "--schedule": "constant",
    "--seed": 1,
    "--log-dir": "./logs",
    "--resume": False,
    "--no-graph": False,
}


def refused(capsys, *arguments):
    """Parses flags that make no sense; returns the line of error."""
    with pytest.raises(SystemExit) as stop:
        main.parse_arguments(arguments)
    output, errors = capsys.readouterr()
    assert stop.value.code == 2 and output == ""
    assert errors.startswith("main.py: error: ") and errors.count("\n") == 1
    return errors


def test_defaults():
    values = vars(main.parse_arguments([]))
    expected = {
        flag.removeprefix("--").replace("-", "_"): value
        for flag, value in DEFAULTS.items()
    }
    assert values == expected
    assert main.parse_arguments(["--data", "D"]).data_dir == "D"  # as in run.sh


@pytest.mark.parametrize(
    "flag, values",
    [
        ("--batch-size", "1.5 x inf"),
        ("--epochs", "2.5 x"),
        ("--lr", "abc -inf"),
        ("--dropout", "x"),
        ("--momentum", "x"),
        ("--seed", "0.5 x"),
        ("--dataset", "cifar MNIST"),
        ("--schedule", "linear"),
        ("--no-such-flag", "1"),
        ("--epoch", "1"),  # no abbreviations
        ("--batch", "64"),
        ("--data-di", "."),
        ("--res", ""),
    ],
)
def test_flags_that_make_no_sense(capsys, flag, values):
    for value in values.split() or [None]:
        arguments = [flag] if value is None else [flag, value]
        assert flag in refused(capsys, *arguments)


@pytest.mark.parametrize(
    "flag, values, range_of_values",
    [
        ("--batch-size", "0 1 -3", "2 or more"),
        ("--epochs", "0 -1", "1 or more"),
        ("--lr", "0 -1 nan inf", "above 0, and finite"),
        ("--dropout", "1 -0.1 nan inf", "0 or more, and below 1"),
        ("--momentum", "1 -1 nan inf", "0 or more, and below 1"),
        ("--seed", f"-1 {2**64}", "0 or more, and below 2**64"),
    ],
)
def test_values_out_of_range_are_told_the_range(capsys, flag, values, range_of_values):
    for value in values.split():
        line = refused(capsys, flag, value)
        assert flag in line and f"must be {range_of_values}" in line, value


def test_the_ends_of_the_ranges_are_taken():
    flags = "--batch-size 2 --epochs 1 --lr 1e-30 --dropout 0 --momentum 0 --seed 0"
    main.parse_arguments(flags.split())
    main.parse_arguments(["--seed", str(2**64 - 1)])


@pytest.mark.parametrize(
    "flag, value",
    [("--seed", 2**64 - 1), ("--batch-size", 10**30), ("--epochs", 10**30)],
)
def test_huge_numbers_leave_no_traceback(go, small_mnist, tmp_path, flag, value):
    paths = ("--data-dir", small_mnist, "--log-dir", tmp_path)
    finished = go(*paths, flag, value, "--lr", 1e30)  # which ends what has started
    line = one_line(finished, 1)
    assert "lower --lr" in line


def test_flags_as_a_user_gets_them_wrong(tmp_path):
    finished = run("main.py", "--lr", "nan", cwd=tmp_path)
    line = one_line(finished, 2)
    assert line.startswith("main.py: error: ") and "--lr" in line
    assert finished.stdout == "" and list(tmp_path.iterdir()) == []


def test_help_names_every_flag(capsys):
    with pytest.raises(SystemExit) as stop:
        main.parse_arguments(["--help"])
    output, errors = capsys.readouterr()
    assert stop.value.code == 0 and errors == ""
    for flag in [*DEFAULTS, "--data"]:
        assert re.search(rf"{flag}\b(?!-)", output), flag


def test_importing_does_nothing(tmp_path):
    finished = subprocess.run(
        [sys.executable, "-c", "import main", "--no-such-flag"],
        cwd=tmp_path,
        env=os.environ | OFFLINE | {"PYTHONPATH": str(HOME)},
        capture_output=True,
        check=False,
    )
    assert (finished.returncode, finished.stdout, finished.stderr) == (0, b"", b"")
    assert list(tmp_path.iterdir()) == []
