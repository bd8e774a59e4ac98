"""Read digits with the network that main.py has trained.

python predict.py                       # the test digits, with a picture of the mistakes
python predict.py digit.png photo.jpg   # pictures of one digit each
python predict.py --run logs/run-1      # another run than the newest one in ./logs

A picture is a drawing or a photograph of one upright digit, dark on light or light on dark. Shadows,
specks and the edge of a desk do no harm; lines or other writing around the digit do.
"""

import argparse
import json
import math
import os
import signal
import sys
from collections import Counter
from pathlib import Path

os.environ["MPLBACKEND"] = "agg"  # A notebook sets it to a backend that may not be installed here.
import matplotlib.pyplot as plt
import numpy as np
import torch
from PIL import Image, ImageOps
from scipy import ndimage

from main import LeNet, load_dataset, newest_run, normalise


@torch.no_grad()
def read(model, pixels):
    """Returns the digits that the model reads in N images, and how sure it is, in percent."""
    batches = pixels.unsqueeze(1).split(250)
    outputs = torch.cat([model(normalise(batch)) for batch in batches])  # N x 10
    probabilities, digits = outputs.softmax(dim=1).max(dim=1)
    return digits.tolist(), (100 * probabilities).tolist()


def flatten(picture):
    """Returns a picture of any mode as RGB, on white paper where it is transparent."""
    if picture.mode[0] in "IF":  # integers or floats of any range
        values = np.asarray(picture, dtype=float)
        values = np.interp(values, (values.min(), values.max()), (0, 255))
        picture = Image.fromarray(values.astype(np.uint8))
    picture = picture.convert("RGBA")
    for paper in ("white", "black"):  # White ink shows only on black.
        flat = Image.alpha_composite(Image.new("RGBA", picture.size, paper), picture)
        flat = flat.convert("RGB")
        if max(high - low for low, high in flat.getextrema()) >= 50:  # of 255
            break
    return flat


def find_digit(picture):
    """Returns the pixels of the digit in an RGB picture, as booleans, or None if there is none.

    Lengths are in pixels of a picture of 200 x 200. They were tried on drawn digits.
    """
    colours = np.asarray(ImageOps.contain(picture, (200, 200)), dtype=float)
    # Shadows are wider than this blur, and strokes are narrower.
    contrast = colours - ndimage.gaussian_filter(colours, (22, 22, 0))
    # Take red, green or blue, whichever shows the ink best.
    contrast = contrast[..., np.abs(contrast).max(axis=(0, 1)).argmax()]
    # There is more paper than ink. The root counts pixels, however much they differ.
    if np.cbrt(contrast).sum() > 0:  # dark on light
        contrast = -contrast
    if contrast.max() < 25:  # of 255: shadows, or noise
        return None
    ink = contrast > 0.3 * contrast.max()
    pieces, _ = ndimage.label(ink, np.ones((3, 3)))
    border = {*pieces[0], *pieces[-1], *pieces[:, 0], *pieces[:, -1]}
    lengths = [max(pieces[place].shape) for place in ndimage.find_objects(pieces)]
    for number in border - {0}:  # It is more likely the edge of a desk than a digit.
        lengths[number - 1] /= 4
    longest = 1 + np.argmax(lengths)
    # Strokes of a digit may be apart.
    near = {*pieces[ndimage.binary_dilation(pieces == longest, iterations=20)]}
    return np.isin(pieces, [longest, *(near - border - {0})])


def make_image(digit):
    """Returns a digit, given as booleans, made as those of MNIST [1]: uint8, 28 x 28.

    It is scaled to fit into 20 x 20 pixels, with its proportions kept, and put into 28 x 28 pixels
    so that its centre of mass comes to the middle. Thin strokes are made as wide as MNIST's.
    """
    digit = np.pad(digit, 25)  # for wider strokes
    rows, columns = np.nonzero(digit)
    length = max(np.ptp(rows), np.ptp(columns))
    width = 2 * ndimage.distance_transform_edt(digit).max()
    missing = max(length / 8 - width, 0)  # MNIST's strokes are some 2.5 of 20 pixels wide.
    digit = ndimage.distance_transform_edt(~digit) <= missing / 2
    ink = Image.fromarray(digit.astype(np.uint8) * 255)
    ink = ImageOps.autocontrast(ImageOps.contain(ink.crop(ink.getbbox()), (20, 20)))
    y, x = ndimage.center_of_mass(np.asarray(ink))
    image = Image.new("L", (28, 28))
    image.paste(ink, (round(13.5 - x), round(13.5 - y)))
    return np.array(image)


def draw(images, titles, path):
    """Draws images of 28 x 28 pixels, ten in a row, with their titles."""
    rows = max(math.ceil(len(images) / 10), 1)
    figure = plt.figure(figsize=(8, 1.1 * rows), layout="constrained")
    for place, (image, title) in enumerate(zip(images, titles, strict=True), start=1):
        panel = figure.add_subplot(rows, 10, place)
        panel.imshow(image, cmap="gray_r")
        panel.set_title(title, fontsize=8)
        panel.axis("off")
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:  # ValueError: not a format of matplotlib's
        sys.exit(f"predict.py: error: {path}: {error}: name another file with --output")


def read_test_digits(model, dataset, data_dir, output):
    """Prints the accuracy and the most frequent confusions, and draws the mistakes."""
    _, _, (images, labels) = load_dataset(dataset, data_dir)
    results = zip(images, labels.tolist(), *read(model, images), strict=True)
    mistakes = [result for result in results if result[1] != result[2]]  # label and digit
    print(f"Accuracy: {100 * (1 - len(mistakes) / len(labels)):.2f}% of {len(labels)} test images")
    confusions = Counter((label, digit) for _, label, digit, _ in mistakes)
    for (label, digit), count in confusions.most_common(10):
        print(f"{label} read as {digit}: {count} time{'s' if count > 1 else ''}")
    mistakes.sort(key=lambda mistake: -mistake[3])  # the surest first
    mistakes = mistakes[:80]  # Eight rows of ten fit on a screen.
    titles = [f"{label} as {digit}\n{percent:.0f} %" for _, label, digit, percent in mistakes]
    draw([image for image, *_ in mistakes], titles, output)
    print(f"The mistakes are in {output}")


def load_image(path):
    """Returns the digit in a picture as an image like MNIST's, or None if it cannot be read."""
    try:
        picture = ImageOps.exif_transpose(Image.open(path))
    except Exception as error:  # Damaged files can raise nearly anything.
        print(f"predict.py: error: {path}: {error}", file=sys.stderr)
        return None
    digit = find_digit(flatten(picture))
    if digit is None:
        print(f"predict.py: error: {path}: the picture is blank", file=sys.stderr)
        return None
    return make_image(digit)


def read_pictures(model, paths, output):
    """Prints what is read in pictures, and draws what the network saw; returns if all were read."""
    loaded = {path: load_image(path) for path in paths}
    images = {path: image for path, image in loaded.items() if image is not None}
    if images:
        pixels = torch.tensor(np.stack(list(images.values())))
        titles = []
        for path, digit, percent in zip(images, *read(model, pixels), strict=True):
            titles.append(f"{digit} ({percent:.1f} %)")
            print(f"{path}: {titles[-1]}")
        draw(pixels, titles, output)
        print(f"What the network saw of them is in {output}")
    return len(images) == len(loaded)


def main(argv=None):
    """Runs the program. Exits with status 1 if there is no run, or a picture cannot be read."""
    parser = argparse.ArgumentParser("predict.py", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    flag = parser.add_argument
    flag("pictures", nargs="*", metavar="PICTURE", help="of a digit (without any: the test digits)")
    flag("--run", type=Path, metavar="RUN", help="its folder (the newest in ./logs)")
    flag("--data-dir", metavar="DIR", help="folder of the test digits (as in the run)")
    flag("--output", type=Path, metavar="FILE", help="the picture (in the run's folder)")
    args = parser.parse_args(argv)
    run = args.run or newest_run("logs")
    if run is None:
        sys.exit("predict.py: error: there is no run in ./logs: run main.py first, or name a --run")
    model = LeNet()
    try:
        checkpoint = torch.load(run / "checkpoint.pt", map_location="cpu", weights_only=True)
        model.load_state_dict(checkpoint["states"]["model"])
        settings = json.loads((run / "settings.json").read_text())
    except Exception as error:  # as above
        sys.exit(f"predict.py: error: {run} is not a whole run of this network: {error!r}")
    model.eval()  # Dropout is off, and batch norm uses its running statistics.
    output = args.output or run / ("pictures.png" if args.pictures else "mistakes.png")
    if not args.pictures:
        data_dir = args.data_dir or settings["data_dir"]
        read_test_digits(model, settings["dataset"], data_dir, output)
    elif not read_pictures(model, args.pictures, output):
        sys.exit(1)


if __name__ == "__main__":
    if hasattr(signal, "SIGPIPE"):  # Windows has none.
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `python predict.py | head` ends quietly.
    main()
