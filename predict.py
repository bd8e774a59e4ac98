"""Read digits with the network that main.py has trained.

python predict.py                       # the test digits, with a picture of its mistakes
python predict.py digit.png photo.jpg   # pictures of digits, dark on light or light on dark
python predict.py --run logs/run-1      # another run than the newest one in ./logs
"""

import argparse
import json
import sys
from collections import Counter
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from PIL import Image, ImageOps

from main import LeNet, load_dataset, newest_run, normalise


@torch.no_grad()
def read(model, images):
    """Returns the digits that the model reads in N images, and how sure it is, in percent."""
    outputs = torch.cat([model(batch) for batch in images.split(250)])  # N x 10
    probabilities, digits = outputs.softmax(dim=1).max(dim=1)
    return digits.tolist(), (100 * probabilities).tolist()


def load_picture(path):
    """Returns the digit in a picture, made as those of MNIST [1]: uint8, 28 x 28.

    It is scaled to fit into 20 x 20 pixels, with its proportions kept, and put into 28 x 28 pixels
    so that its centre of mass comes to the middle. Raises ValueError if the picture is empty.
    """
    grey = ImageOps.exif_transpose(Image.open(path)).convert("L")
    darkest, lightest = grey.getextrema()
    if lightest - darkest < 50:  # of 255
        raise ValueError("the picture is blank")
    # At least half of the picture is paper. It becomes 0, and the strongest ink 255.
    if np.median(grey) > (darkest + lightest) / 2:  # dark on light
        grey = ImageOps.invert(grey)
    ink = ImageOps.autocontrast(grey, cutoff=(50, 0))
    ink = ink.point(lambda value: value if value >= 128 else 0)
    left, top, right, bottom = ink.getbbox()
    side = max(right - left, bottom - top)
    ink = ink.crop((left, top, left + side, top + side)).resize((20, 20))
    ink = ImageOps.autocontrast(ink)  # Thin lines have become faint.
    weights = np.asarray(ink) / np.sum(ink)
    x = weights.sum(axis=0) @ np.arange(20)
    y = weights.sum(axis=1) @ np.arange(20)
    image = Image.new("L", (28, 28))
    image.paste(ink, (round(14 - x), round(14 - y)))
    return np.array(image)


def draw(images, titles, path):
    """Draws images of 28 x 28 pixels, ten in a row, with their titles."""
    rows = len(images) // 10 + 1
    figure = plt.figure(figsize=(8, 1.1 * rows), layout="constrained")
    for place, (image, title) in enumerate(zip(images, titles, strict=True), start=1):
        panel = figure.add_subplot(rows, 10, place)
        panel.imshow(image, cmap="gray_r")
        panel.set_title(title, fontsize=8)
        panel.axis("off")
    figure.savefig(path, dpi=120)


def read_test_digits(model, run):
    """Prints the accuracy and the most frequent confusions, and draws the mistakes."""
    settings = json.loads((run / "settings.json").read_text())
    _, _, (images, labels) = load_dataset(settings["dataset"], settings["data_dir"])
    results = zip(images[:, 0], labels.tolist(), *read(model, images), strict=True)
    mistakes = [result for result in results if result[1] != result[2]]  # label and digit
    print(f"Accuracy: {100 * (1 - len(mistakes) / len(labels)):.2f}% of {len(labels)} test digits")
    confusions = Counter((label, digit) for _, label, digit, _ in mistakes)
    for (label, digit), count in confusions.most_common(10):
        print(f"{label} read as {digit}: {count} time{'s' if count > 1 else ''}")
    mistakes = sorted(mistakes, key=lambda mistake: -mistake[3])[:79]  # the surest first
    titles = [f"{label} as {digit}\n{percent:.0f} %" for _, label, digit, percent in mistakes]
    draw([image for image, *_ in mistakes], titles, run / "mistakes.png")
    print(f"The mistakes are in {run / 'mistakes.png'}")


def read_pictures(model, run, paths):
    """Prints what is read in pictures, draws what the network saw, and returns their number."""
    images = {}
    for path in paths:
        try:
            images[path] = load_picture(path)
        except Exception as error:  # Damaged files can raise nearly anything.
            print(f"predict.py: error: {path}: {error}", file=sys.stderr)
    if images:
        pixels = torch.tensor(np.stack(list(images.values())))
        titles = []
        for path, digit, percent in zip(images, *read(model, normalise(pixels)), strict=True):
            titles.append(f"{digit} ({percent:.1f} %)")
            print(f"{path}: {titles[-1]}")
        draw(pixels, titles, run / "pictures.png")
        print(f"What the network saw of them is in {run / 'pictures.png'}")
    return len(images)


def main(argv=None):
    """Runs the program. Exits with status 1 if there is no run, or a picture cannot be read."""
    parser = argparse.ArgumentParser("predict.py", description=__doc__.partition("\n")[0])
    parser.add_argument("pictures", nargs="*", metavar="PICTURE", help="of a digit")
    parser.add_argument("--run", type=Path, metavar="RUN", help="its folder (the newest in ./logs)")
    args = parser.parse_args(argv)
    run = args.run or newest_run("logs")
    if run is None:
        sys.exit("predict.py: error: there is no run in ./logs: run main.py first")
    model = LeNet()
    try:
        checkpoint = torch.load(run / "checkpoint.pt", map_location="cpu", weights_only=True)
        model.load_state_dict(checkpoint["states"]["model"])
    except Exception as error:  # as above
        sys.exit(f"predict.py: error: {run} has no network that can be read: {error!r}")
    model.eval()  # Dropout is off, and batch norm uses its running statistics.
    if not args.pictures:
        read_test_digits(model, run)
    elif read_pictures(model, run, args.pictures) < len(args.pictures):
        sys.exit(1)


if __name__ == "__main__":
    main()
