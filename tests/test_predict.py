"""predict.py: what it reads in the test digits, and in pictures that are drawn here."""

import re
import shutil

import numpy as np
import pytest
import torch
from conftest import Hostile, error_line, plain_with, read_by_hand, read_params
from PIL import Image, ImageDraw, ImageOps
from scipy import ndimage

import predict

# The lines of ten digits, as points "x,y" in a field that is 100 wide and 150 high.
DIGITS = {
    0: ["50,0 15,20 0,75 15,130 50,150 85,130 100,75 85,20 50,0"],
    1: ["52,0 48,150"],
    2: ["5,35 25,5 65,0 95,30 85,65 5,148 100,145"],
    3: ["10,15 50,0 90,20 85,50 40,70 90,90 95,125 50,150 5,135"],
    4: ["30,0 5,85 100,80", "75,20 65,150"],
    5: ["90,2 40,5", "15,8 12,65 60,58 95,95 70,140 30,150 0,135"],  # The top bar is apart.
    6: ["75,0 30,35 5,100 25,145 65,145 85,110 60,80 15,105"],
    7: ["0,8 95,0 60,70 40,150"],
    8: ["80,20 50,0 20,20 25,50 85,105 75,140 40,150 10,130 20,100 75,50 80,20"],
    9: ["85,30 55,0 15,20 12,55 45,75 80,55 85,30 70,150"],
}
SIZE = (320, 384)


def draw_mask(digit, pen=18):
    """Draws a digit, 150 pixels high, in white on black."""
    mask = Image.new("L", SIZE)
    for line in DIGITS[digit]:
        points = [110 + int(number) for number in re.findall(r"\d+", line)]
        ImageDraw.Draw(mask).line(points, fill=255, width=pen, joint="curve")
    return mask


def clear(mask, ink):
    """Ink on transparent paper."""
    return Image.merge("LA", [Image.new("L", mask.size, ink), mask]).convert("RGBA")


def shade(mask):
    """A photograph, dark on light, with a soft shadow that falls on it from the left."""
    light = 0.4 + 0.6 / (1 + np.exp(np.linspace(8, -8, mask.width)))
    return Image.fromarray(((220 - 0.75 * np.asarray(mask)) * light).astype(np.uint8))


# How a picture of each kind is made from a digit in white on black.
KINDS = {
    "dark on light.png": ImageOps.invert,
    "light on dark.jpg": lambda mask: ImageOps.colorize(mask, "#203020", "#e0e0d0"),
    "same grey, same red.png": lambda mask: ImageOps.colorize(mask, "#648014", "#6459dc"),
    "clear, white ink.png": lambda mask: clear(mask, 255),
    "turned.jpg": lambda mask: ImageOps.invert(mask).transpose(Image.Transpose.ROTATE_90),
    "in a shadow.jpg": shade,
    "desk.png": lambda mask: ImageOps.expand(ImageOps.invert(mask), (31, 0, 0, 0), fill=0),
    "thin pen in a large photograph.jpg": lambda mask: ImageOps.invert(mask.resize((1280, 1536))),
}


@pytest.fixture(scope="module")
def run(train, tmp_path_factory):
    """The only run in its logs: a network that was trained on 600 digits."""
    folder = tmp_path_factory.mktemp("trained") / "logs"
    train(folder, "--epochs", 8)
    return folder / "run-1"


@pytest.fixture
def drawn(monkeypatch):
    """A list that will hold the images and the titles that predict.py draws."""
    arguments = []
    monkeypatch.setattr(predict, "draw", lambda *given: arguments.extend(given[:2]))
    return arguments


def test_a_large_picture_takes_little_memory():
    picture = predict.flatten(ImageOps.invert(draw_mask(5)).resize((6400, 7680)).convert("P"))
    assert picture.size == (167, 200) and picture.getextrema()[0][0] < 50  # It keeps its lines.


@pytest.mark.parametrize("kind", KINDS)
def test_digits_in_pictures_are_read(go, run, tmp_path, kind):
    names = [f"{digit} {kind}" for digit in DIGITS]
    exif = Image.Exif()
    exif[274] = 6 if "turned" in kind else 1  # the orientation that turns it upright
    for digit, name in zip(DIGITS, names, strict=True):
        mask = draw_mask(digit, pen=1 if "thin" in kind else 18)
        KINDS[kind](mask).save(tmp_path / name, exif=exif)
    finished = go("predict.py", "--run", run, *names, cwd=tmp_path)
    assert (finished.returncode, finished.stderr) == (0, f"predict.py: {run} after epoch 8\n")
    line = rf"^(\d) {re.escape(kind)}: (\d) \(\d+\.\d%\)$"
    answers = re.findall(line, finished.stdout, re.MULTILINE)
    # After ten epochs on all of MNIST, it is at least nine of each kind.
    assert len(answers) == 10 and sum(a == b for a, b in answers) >= 8, answers


def test_what_the_network_sees_is_like_mnist(run, tmp_path, drawn):
    KINDS["dark on light.png"](draw_mask(7)).save(tmp_path / "7.png")
    predict.main(["--run", str(run), str(tmp_path / "7.png")])
    (image,), (title,) = drawn
    assert (image.dtype, image.shape, image.max()) == (torch.uint8, (28, 28), 255)
    assert 0.08 < (image / 255).mean() < 0.25  # bright ink, dark paper
    rows, columns = np.nonzero(image.numpy())
    assert np.ptp(rows) + 1 == 20 and 12 <= np.ptp(columns) + 1 <= 16  # 168 high, 113 wide
    assert ndimage.center_of_mass(image.numpy()) == pytest.approx((13.5, 13.5), abs=0.6)
    assert title.startswith("7 (")


def test_mistakes_are_those_of_a_plain_network(run, small_mnist, drawn, monkeypatch, capsys):
    monkeypatch.chdir(run.parent.parent)  # It takes the newest run in ./logs.
    predict.main([])
    images, labels = read_by_hand(small_mnist, "t10k")
    with torch.no_grad():
        outputs = plain_with(read_params(run, 8).values()).eval()(images)
    percents, digits = (100 * outputs.softmax(1)).max(1)
    wrong = digits != labels
    accuracy = 100 - 100 * wrong.double().mean().item()
    shown, line = capsys.readouterr().out.splitlines()
    assert shown == f"Accuracy: {accuracy:.2f}% of 300 test images"
    count = int(wrong.sum())
    assert line.startswith(f"{count} of {count} mistakes are in logs/run-1/mistakes.png, the most ")
    surest = percents[wrong].sort(descending=True).values.tolist()
    for image, title, percent in zip(*drawn, surest, strict=True):
        normal = (image / 255 - 0.1307) / 0.3081
        place = (images[:, 0] - normal).abs().amax((1, 2)).argmin()  # among the test images
        label, digit, shown = re.fullmatch(r"(\d) as (\d)\n(\d+)%", title).groups()
        assert [int(label), int(digit)] == [labels[place], digits[place]]
        assert abs(int(shown) - percent) < 0.6  # rounded


def test_no_mistakes_are_an_empty_row_and_paper_is_white(tmp_path):
    for images in ([], np.zeros((1, 28, 28))):
        predict.draw(images, [""] * len(images), tmp_path / "drawn.png")
        picture = Image.open(tmp_path / "drawn.png")
        assert picture.height == 132 and picture.convert("L").getextrema() == (255, 255)


def test_pictures_that_cannot_be_read_get_a_line_each(go, run, tmp_path):
    Image.new("L", (50, 50), 255).save(tmp_path / "blank.png")
    shade(Image.new("L", SIZE)).save(tmp_path / "shadow.png")
    draw_mask(3).save(tmp_path / "3.png")
    for name in ("cut.png", "cut.jpg"):
        draw_mask(3).save(tmp_path / name)
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:1000])
    (tmp_path / "phone.heic").write_bytes(b"\0\0\0\x1cftypheic" + bytes(999))
    Image.new("1", (20_000, 10_000)).save(tmp_path / "huge.png")
    exif = Image.Exif()
    exif[271], exif[274] = "maker", 6
    broken = exif.tobytes().replace(b"\x01\x0f", b"\x01\x3e")  # a text where numbers should be
    draw_mask(3).save(tmp_path / "exif.jpg", exif=broken)
    names = ["blank.png", "shadow.png", "cut.png", "cut.jpg", "no.png", "huge.png", "exif.jpg"]
    names.append("phone.heic")
    finished = go("predict.py", "--run", run, *names, "3.png", cwd=tmp_path)
    assert finished.returncode == 1
    _, *lines = finished.stderr.splitlines()
    assert [line.split(": ")[:3] for line in lines] == [["predict.py", "error", n] for n in names]
    assert lines[-1].endswith(" (PNG and JPEG files can be read)")
    assert finished.stdout.startswith("3.png: 3 (")


def test_the_newest_run_with_a_warning_if_it_is_not_trained(go, run, small_mnist, tmp_path):
    def count(number, epoch):
        """A run with so many finished epochs."""
        copied = shutil.copytree(run, tmp_path / "logs" / f"run-{number}")
        checkpoint = torch.load(copied / "checkpoint.pt", weights_only=True)
        torch.save(checkpoint | {"epoch": epoch}, copied / "checkpoint.pt")

    assert "no run in ./logs" in error_line(go("predict.py", cwd=tmp_path))
    count(9, 3)
    finished = go("predict.py", "--data-dir", small_mnist, "--output", "drawn.png", cwd=tmp_path)
    assert finished.stderr == "predict.py: logs/run-9 after epoch 3\n"
    assert (tmp_path / "drawn.png").exists()
    count(10, 0)
    (tmp_path / "logs" / "run-11").mkdir()
    finished = go("predict.py", "--data-dir", small_mnist, cwd=tmp_path)
    warning = "predict.py: warning: THIS NETWORK HAS NOT BEEN TRAINED\n"
    assert finished.stderr == f"predict.py: logs/run-10 after epoch 0\n{warning}"
    finished = go("predict.py", "--run", run, "--data-dir", tmp_path / "empty")
    assert str(tmp_path / "empty") in finished.stderr.splitlines()[-1]  # It wins over the run's.


def test_nothing_in_a_checkpoint_is_run(go, run, tmp_path):
    copied = shutil.copytree(run, tmp_path / "run-1")
    torch.save(Hostile(tmp_path / "made"), copied / "checkpoint.pt")
    assert go("predict.py", "--run", copied).returncode == 1
    assert not (tmp_path / "made").exists()
