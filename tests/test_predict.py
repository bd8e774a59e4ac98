"""predict.py: what it reads on test digits, and on pictures that are drawn here."""

import os
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from conftest import HOME, Hostile, error_line, plain_with, read_by_hand, read_params
from PIL import Image, ImageDraw, ImageFilter, ImageOps

# The lines of ten digits, in a field that is 100 wide and 150 high, as points "x,y".
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


def draw_mask(digit, scale=1, pen=18):
    """Draws a digit, 150 pixels high, in white on black in a picture of 320 x 384; all scaled."""
    mask = Image.new("L", [scale * side for side in SIZE])
    for line in DIGITS[digit]:
        places = [map(int, point.split(",")) for point in line.split()]
        points = [((x + 110) * scale, (y + 110) * scale) for x, y in places]
        ImageDraw.Draw(mask).line(points, fill=255, width=pen, joint="curve")
    return mask


def put_on(paper, ink, mask):
    return Image.composite(
        Image.new("RGB", mask.size, ink), Image.new("RGB", mask.size, paper), mask
    )


def clear(mask, ink):
    """Transparent paper, whose hidden colour is black as in the exports of drawing programs."""
    return Image.composite(
        Image.new("RGBA", SIZE, ink), Image.new("RGBA", SIZE, (0, 0, 0, 0)), mask
    )


def shade(mask, darkest=0.4):
    """A photograph with a soft shadow that falls on it from the left."""
    x = np.linspace(0, 1, mask.width)
    light = darkest + (1 - darkest) / (1 + np.exp((0.5 - x) / 0.06))
    return Image.fromarray(((220 - np.asarray(mask) * 0.75) * light).astype(np.uint8))


def vignette(mask):
    y, x = np.mgrid[-1 : 1 : mask.height * 1j, -1 : 1 : mask.width * 1j]
    pixels = (230 - np.asarray(mask) * 0.75) * (1 - 0.35 * (x * x + y * y))
    return Image.fromarray(pixels.astype(np.uint8))


def add(picture, box):
    ImageDraw.Draw(picture).rectangle(box, fill="black")
    return picture


def deep(mask, dtype, paper, ink):
    """Paper and ink as numbers of more than 8 bits."""
    return Image.fromarray((paper + (ink - paper) * (np.asarray(mask) / 255)).astype(dtype))


def turned(mask):
    """On its side, with the EXIF orientation that sets it right; saved as JPEG."""
    picture = ImageOps.invert(mask).transpose(Image.Transpose.ROTATE_90)
    picture.getexif()[274] = 6
    return picture


# What is made of a digit in white on black.
KINDS = {
    "dark on light.png": ImageOps.invert,
    "light on dark.jpg": lambda mask: put_on("#203020", "#e0e0d0", mask),
    "same grey.png": lambda mask: put_on("#008040", "#d02020", mask),
    "blurred.jpg": lambda mask: ImageOps.invert(mask.filter(ImageFilter.GaussianBlur(4))),
    "palette.gif": lambda mask: put_on("#ffee80", "#2030c0", mask).quantize(8),
    "clear, black ink.png": lambda mask: clear(mask, "black"),
    "clear, white ink.png": lambda mask: clear(mask, "white"),
    "clear, grey and alpha.png": lambda mask: clear(mask, "black").convert("LA"),
    "clear.gif": lambda mask: clear(mask.point(lambda value: 255 * (value > 99)), "blue"),
    "16 bits.png": lambda mask: deep(mask, np.uint16, 60000, 9000),
    "32 bits.tif": lambda mask: deep(mask, np.int32, 9000, 60000),
    "float.tif": lambda mask: deep(mask, np.float32, 0.9, 0.1),
    "turned.jpg": turned,
    "soft shadow.jpg": shade,
    "light on dark in a shadow.jpg": lambda mask: shade(ImageOps.invert(mask)),
    "vignette.jpg": vignette,
    "cropped.png": lambda mask: ImageOps.invert(mask.crop(mask.getbbox())),
    "desk.png": lambda mask: add(ImageOps.invert(mask), (0, 0, 30, 400)),
    "light desk.png": lambda mask: ImageOps.invert(add(ImageOps.invert(mask), (0, 350, 400, 400))),
    "thin pen in a large photograph.jpg": ImageOps.invert,
    "dust.png": lambda mask: add(ImageOps.invert(mask), (280, 30, 290, 40)),
}


@pytest.fixture(scope="module")
def logs(train, tmp_path_factory):
    """A log dir with a network that was trained on 600 digits."""
    folder = tmp_path_factory.mktemp("trained") / "logs"
    train(folder, "--epochs", 8)
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_digits_in_pictures_are_read(go, logs, tmp_path, kind):
    names = []
    for digit in DIGITS:
        names.append(f"{digit} {kind}")
        look = {"scale": 4, "pen": 3} if "thin" in kind else {}
        picture = KINDS[kind](draw_mask(digit, **look))
        picture.save(tmp_path / names[-1], exif=picture.getexif())
    finished = go("predict.py", "--run", logs / "run-1", *names, cwd=tmp_path)
    assert (finished.returncode, finished.stderr) == (0, "")
    lines = finished.stdout.splitlines()[:10]
    assert all(re.fullmatch(rf"\d {re.escape(kind)}: \d \(\d+\.\d %\)", line) for line in lines)
    # A network of ten epochs on MNIST reads at least nine of each kind.
    assert sum(line[0] == line.split(": ")[1][0] for line in lines) >= 8, lines


def test_what_the_network_sees_is_made_as_mnist(tmp_path):
    import predict

    ImageOps.invert(draw_mask(7)).save(tmp_path / "7.png")
    image = predict.load_image(tmp_path / "7.png")
    assert (image.dtype, image.shape, image.max()) == (np.uint8, (28, 28), 255)
    assert image[0].max() == 0 and 0.08 < image.mean() / 255 < 0.25  # bright ink, dark paper
    rows, columns = np.nonzero(image)
    assert np.ptp(rows) + 1 == 20 and 12 <= np.ptp(columns) + 1 <= 16  # 168 high, 113 wide
    places = np.arange(28)
    assert abs(image.sum(axis=1) @ places / image.sum() - 13.5) <= 0.6
    assert abs(image.sum(axis=0) @ places / image.sum() - 13.5) <= 0.6


def test_test_digits_are_read_as_by_a_plain_network(go, logs, small_mnist):
    run = logs / "run-1"
    finished = go("predict.py", cwd=logs.parent)  # the newest run in ./logs
    assert (finished.returncode, finished.stderr) == (0, "")
    images, labels = read_by_hand(small_mnist, "t10k")
    with torch.no_grad():
        outputs = plain_with(read_params(run, 8).values()).eval()(images)
    digits = outputs.argmax(1)
    wrong = digits != labels
    accuracy = 100 - 100 * wrong.double().mean().item()
    assert finished.stdout.startswith(f"Accuracy: {accuracy:.2f}% of 300 test images\n")
    expected = Counter(zip(labels[wrong].tolist(), digits[wrong].tolist(), strict=True))
    found = re.findall(r"^(\d) read as (\d): (\d+) times?$", finished.stdout, re.MULTILINE)
    counts = [int(count) for *_, count in found]
    assert counts == sorted(expected.values(), reverse=True)[:10]
    assert all(expected[int(a), int(b)] == int(count) for a, b, count in found)
    with Image.open(run / "mistakes.png") as picture:
        assert picture.width > 800


def test_titles_and_order_of_the_mistakes(logs, small_mnist, monkeypatch):
    import predict

    images, labels = read_by_hand(small_mnist, "t10k")
    model = plain_with(read_params(logs / "run-1", 2).values()).eval()  # It makes more mistakes.
    with torch.no_grad():
        percents, digits = (100 * model(images).softmax(1)).max(1)
    drawn = []
    monkeypatch.setattr(predict, "draw", lambda *arguments: drawn.extend(arguments))
    predict.read_test_digits(model, "mnist", small_mnist, "mistakes.png")
    found = [re.fullmatch(r"(\d) as (\d)\n(\d+) %", title).groups() for title in drawn[1]]
    assert len(found) == min(80, (digits != labels).sum())
    surest = percents[digits != labels].sort(descending=True).values.tolist()
    for image, title, percent in zip(drawn[0], found, surest, strict=False):
        normal = (image / 255 - 0.1307) / 0.3081
        place = (images[:, 0] - normal).abs().amax((1, 2)).argmin()  # among the test images
        assert [int(text) for text in title[:2]] == [labels[place], digits[place]]
        assert abs(int(title[2]) - percent) < 0.6  # rounded


@pytest.mark.parametrize("count, rows", [(0, 1), (9, 1), (10, 1), (11, 2), (80, 8)])
def test_no_row_is_empty(monkeypatch, tmp_path, count, rows):
    import predict

    monkeypatch.setattr(plt.Figure, "savefig", lambda *_, **__: None)
    predict.draw(np.zeros((count, 28, 28)), ["1"] * count, tmp_path / "drawn.png")
    figure = plt.gcf()
    assert (figure.get_figheight(), len(figure.axes)) == (pytest.approx(1.1 * rows), count)


def test_output_data_dir_and_any_backend_of_matplotlib(go, logs, small_mnist, tmp_path):
    run = shutil.copytree(logs / "run-1", tmp_path / "run", ignore=shutil.ignore_patterns("*.png"))
    settings = (run / "settings.json").read_text()
    moved = shutil.copytree(small_mnist, tmp_path / "moved")
    (run / "settings.json").write_text(settings.replace(str(small_mnist), str(tmp_path / "gone")))
    assert "gone" in error_line(go("predict.py", "--run", run))
    output = tmp_path / "drawn.png"
    command = [sys.executable, HOME / "predict.py", "--run", run, "--data-dir", moved]
    # A notebook sets MPLBACKEND; `| head` closes the pipe.
    process = subprocess.Popen(
        [*command, "--output", output],
        env=os.environ | {"MPLBACKEND": "module://nowhere"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() == -signal.SIGPIPE
    assert output.exists() and not (run / "mistakes.png").exists()
    draw_mask(3).save(tmp_path / "3.png")
    finished = go(
        "predict.py", "--run", run, "--output", tmp_path / "no" / "x.png", tmp_path / "3.png"
    )
    assert re.search(r"x\.png.*--output", error_line(finished))
    assert ": 3 (" in finished.stdout  # The answer comes first.


def test_pictures_that_cannot_be_read_get_a_line_each(go, logs, tmp_path):
    Image.new("L", (50, 50), 255).save(tmp_path / "blank.png")
    shade(Image.new("L", SIZE)).save(tmp_path / "shadow.png")
    Image.new("L", (1, 1), 9).save(tmp_path / "tiny.png")
    Image.new("RGBA", (50, 50), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    (tmp_path / "text.png").write_text("hello")
    draw_mask(3).save(tmp_path / "3.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "3.png").read_bytes()[:600])
    names = ["blank.png", "shadow.png", "tiny.png", "clear.png", "text.png", "cut.png", "no.png"]
    finished = go("predict.py", "--run", logs / "run-1", *names, "3.png", cwd=tmp_path)
    assert finished.returncode == 1
    lines = finished.stderr.splitlines()
    assert [line.split(": ")[2] for line in lines] == names
    assert all(line.startswith("predict.py: error: ") for line in lines)
    assert finished.stdout.startswith("3.png: 3 (")


def test_runs_that_cannot_be_read(go, logs, tmp_path):
    assert "no run in ./logs" in error_line(go("predict.py", cwd=tmp_path))
    assert "nowhere" in error_line(go("predict.py", "--run", tmp_path / "nowhere"))
    run = shutil.copytree(logs / "run-1", tmp_path / "run-1")
    torch.save(Hostile(tmp_path / "it ran"), run / "checkpoint.pt")
    assert "run-1" in error_line(go("predict.py", "--run", run))
    assert not (tmp_path / "it ran").exists()
