"""predict.py: what it reads on test digits, and on pictures that are drawn here."""

import re
import shutil
from collections import Counter

import pytest
import torch
from conftest import error_line, plain_with, read_by_hand, read_params
from PIL import Image, ImageDraw, ImageFilter, ImageOps

# The lines of ten digits, in a field that is 100 wide and 150 high, as points "x,y".
DIGITS = {
    0: ["50,0 15,20 0,75 15,130 50,150 85,130 100,75 85,20 50,0"],
    1: ["52,0 48,150"],
    2: ["5,35 25,5 65,0 95,30 85,65 5,148 100,145"],
    3: ["10,15 50,0 90,20 85,50 40,70 90,90 95,125 50,150 5,135"],
    4: ["30,0 5,85 100,80", "75,20 65,150"],
    5: ["90,5 20,8 12,65 60,58 95,95 70,140 30,150 0,135"],
    6: ["75,0 30,35 5,100 25,145 65,145 85,110 60,80 15,105"],
    7: ["0,8 95,0 60,70 40,150"],
    8: ["80,20 50,0 20,20 25,50 85,105 75,140 40,150 10,130 20,100 75,50 80,20"],
    9: ["85,30 55,0 15,20 12,55 45,75 80,55 85,30 70,150"],
}
# Size, pen, place, polarity, blur and kind of file.
LOOKS = {
    "usual": {"scale": 1, "pen": 18},
    "small": {"scale": 0.3, "pen": 5, "light": True},
    "large, in a corner": {"scale": 3, "pen": 30, "x": 30, "y": 150, "suffix": "jpg"},
    "light on dark": {"scale": 1, "pen": 14, "light": True, "x": 200},
    "thick and blurred": {"scale": 2, "pen": 40, "blur": 4, "suffix": "jpg"},
}


def draw_digit(folder, digit, scale, pen, x=150, y=40, light=False, blur=0, suffix="png"):
    """Draws a digit, `scale` times 150 pixels high, on paper with a shadow."""
    side = round(320 * scale)
    # The gradient, from 0 to 255, becomes paper, from 126 to 253.
    paper = Image.linear_gradient("L").resize((side, round(1.2 * side)))
    picture = paper.point(lambda value: 126 + value // 2)
    for line in DIGITS[digit]:
        places = [map(int, point.split(",")) for point in line.split()]
        points = [((x + left) * scale, (y + top) * scale) for left, top in places]
        ImageDraw.Draw(picture).line(points, fill=40, width=pen, joint="curve")
    picture = ImageOps.invert(picture) if light else picture
    path = folder / f"{digit}.{suffix}"
    picture.filter(ImageFilter.GaussianBlur(blur)).save(path)
    return path


@pytest.fixture(scope="module")
def logs(train, tmp_path_factory):
    """A log dir with a network that was trained on 600 digits."""
    folder = tmp_path_factory.mktemp("trained") / "logs"
    train(folder, "--epochs", 8)
    return folder


def test_test_digits_are_read_as_by_a_plain_network(go, logs, small_mnist):
    finished = go("predict.py", cwd=logs.parent)  # the newest run in ./logs
    assert (finished.returncode, finished.stderr) == (0, "")
    images, labels = read_by_hand(small_mnist, "t10k")
    with torch.no_grad():
        digits = plain_with(read_params(logs / "run-1", 8).values()).eval()(images).argmax(1)
    wrong = digits != labels
    assert finished.stdout.startswith(
        f"Accuracy: {100 - 100 * wrong.double().mean().item():.2f}% of 300 test digits\n"
    )
    expected = Counter(zip(labels[wrong].tolist(), digits[wrong].tolist(), strict=True))
    found = re.findall(r"^(\d) read as (\d): (\d+) times?$", finished.stdout, re.MULTILINE)
    counts = [int(count) for *_, count in found]
    assert counts == sorted(expected.values(), reverse=True)[:10]
    assert all(expected[int(a), int(b)] == int(count) for a, b, count in found)
    with Image.open(logs / "run-1" / "mistakes.png") as picture:
        assert picture.width > 800


@pytest.mark.parametrize("look", LOOKS)
def test_drawn_digits_are_read(go, logs, tmp_path, look):
    paths = [draw_digit(tmp_path, digit, **LOOKS[look]).name for digit in DIGITS]
    finished = go("predict.py", "--run", logs / "run-1", *paths, cwd=tmp_path)
    assert (finished.returncode, finished.stderr) == (0, "")
    lines = finished.stdout.splitlines()[:10]
    assert all(re.fullmatch(r"\d\.(png|jpg): \d \(\d+\.\d %\)", line) for line in lines)
    right = [line[0] == line.split()[1] for line in lines]
    # A network of ten epochs on MNIST reads all ten. Without the inversion, the crop, the
    # centring or the normalisation, this one reads at most seven.
    assert sum(right) >= 8, lines
    assert (logs / "run-1" / "pictures.png").exists()


def test_pictures_that_cannot_be_read_get_a_line_each(go, logs, tmp_path):
    Image.new("L", (50, 50), 255).save(tmp_path / "blank.png")
    Image.new("L", (50, 50), 0).save(tmp_path / "black.png")
    Image.new("L", (1, 1), 9).save(tmp_path / "tiny.png")
    (tmp_path / "text.png").write_text("hello")
    whole = draw_digit(tmp_path, 3, **LOOKS["usual"])
    (tmp_path / "cut.png").write_bytes(whole.read_bytes()[:900])
    bad = ["blank.png", "black.png", "tiny.png", "text.png", "cut.png", "nowhere.png"]
    finished = go("predict.py", "--run", logs / "run-1", *bad, "3.png", cwd=tmp_path)
    assert finished.returncode == 1
    lines = finished.stderr.splitlines()
    assert [line.split(": ")[2] for line in lines] == bad
    assert all(line.startswith("predict.py: error: ") for line in lines)
    assert finished.stdout.startswith("3.png: 3 (")


def test_runs_that_cannot_be_read(go, logs, tmp_path):
    assert "no run in ./logs" in error_line(go("predict.py", cwd=tmp_path))
    assert "nowhere" in error_line(go("predict.py", "--run", tmp_path / "nowhere"))
    broken = shutil.copytree(logs / "run-1", tmp_path / "broken")
    (broken / "checkpoint.pt").write_text("hello")
    assert str(broken) in error_line(go("predict.py", "--run", broken))
