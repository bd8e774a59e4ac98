"""Read digits with a network that main.py has trained.

python predict.py                       # the test digits, with a picture of the mistakes
python predict.py digit.png photo.jpg   # pictures of one digit each
python predict.py --run logs/run-1      # with a run other than the newest in ./logs

A picture is a drawing or a photograph of one upright digit, dark on light or light on dark.
Shadows, specks and the edge of a desk do no harm; lines or other writing around the digit do.
"""

import argparse
import json
import math
import os
import sys
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # as in main.py, before PyTorch is imported

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image, ImageOps
from scipy import ndimage

from main import LeNet, load_dataset, newest_run, normalise, seed_everything


@torch.no_grad()
def read(model, images):
    """Returns the digits that the model reads in N images, and its confidence in percent."""
    batches = images.unsqueeze(1).split(250)  # each n x 1 x 28 x 28
    outputs = torch.cat([model(normalise(batch)) for batch in batches])  # N x 10
    probabilities, digits = outputs.softmax(dim=1).max(dim=1)
    return digits, 100 * probabilities


def flatten(picture):
    """Returns a picture upright, as RGB that fits in 200 x 200 pixels, on white or black paper where
    it is transparent."""
    if picture.mode in ("1", "P"):  # In these modes, a smaller picture would lose thin lines.
        picture = picture.convert("RGBA")
    picture.thumbnail((200, 200))  # now: a large picture would take gigabytes below
    picture = ImageOps.exif_transpose(picture).convert("RGBA")
    papers = [Image.new("RGBA", picture.size, paper) for paper in ("white", "black")]
    on_white, on_black = [Image.alpha_composite(paper, picture).convert("RGB") for paper in papers]
    visible = max(high - low for low, high in on_white.getextrema()) >= 50  # of 255
    return on_white if visible else on_black  # White ink is visible only on black.


def find_digit(picture):
    """Returns which pixels of an RGB picture are the digit, as booleans.

    Raises ValueError if it is blank. A small picture is first scaled to 200 x 200 pixels. The
    lengths and thresholds below were chosen by trying them on drawn digits.
    """
    colours = np.asarray(ImageOps.contain(picture, (200, 200)), dtype=float)
    # Shadows are wider than this blur, and strokes are narrower.
    contrast = colours - ndimage.gaussian_filter(colours, (22, 22, 0))
    # Of red, green and blue, use the one that shows the ink best.
    contrast = contrast[..., np.abs(contrast).max(axis=(0, 1)).argmax()]
    # There is more paper than ink. With the cube root, strong and weak contrast count alike.
    if np.cbrt(contrast).sum() > 0:  # dark on light
        contrast = -contrast
    if contrast.max() < 25:  # of 255: only shadows or noise
        raise ValueError("the picture is blank")
    pieces, _ = ndimage.label(contrast > 0.3 * contrast.max(), np.ones((3, 3)))
    lengths = [max(pieces[place].shape) for place in ndimage.find_objects(pieces)]
    border = {*pieces[0], *pieces[-1], *pieces[:, 0], *pieces[:, -1]} - {0}  # 0 is the paper.
    for number in border:  # It is more likely the edge of a desk than a digit.
        lengths[number - 1] /= 4
    longest = 1 + np.argmax(lengths)
    # A digit may have several pieces, like a 5 whose top bar is apart.
    near = {*pieces[ndimage.binary_dilation(pieces == longest, iterations=20)]} - {0}
    return np.isin(pieces, [longest, *(near - border)])


def make_image(digit):
    """Returns the digit that find_digit found as an image like MNIST's [1]: uint8, 28 x 28.

    It is scaled to fit in 20 x 20 pixels, keeping its proportions, and then placed so that its
    centre of mass is in the middle. Thin strokes are made as wide as MNIST's.
    """
    digit = np.pad(digit, 25)  # room for wider strokes
    length = np.ptp(np.nonzero(digit), axis=1).max()
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
    figure = Figure(figsize=(8, 1.1 * rows), layout="constrained")
    for place, (image, title) in enumerate(zip(images, titles, strict=True), start=1):
        panel = figure.add_subplot(rows, 10, place)
        panel.imshow(np.asarray(image), cmap="gray_r")
        panel.set_title(title, fontsize=8)
        panel.axis("off")
    figure.savefig(path, dpi=120)


def read_test_digits(model, images, labels, output):
    """Prints the accuracy, and draws the mistakes, the most confident first."""
    digits, percents = read(model, images)
    wrong = torch.nonzero(digits != labels).flatten()
    print(f"Accuracy: {100 * (1 - len(wrong) / len(labels)):.2f}% of {len(labels)} test images")
    drawn = wrong[percents[wrong].argsort(descending=True)]
    drawn = drawn[:80]  # Eight rows of ten fit on a screen.
    titles = [f"{labels[ix]} as {digits[ix]}\n{percents[ix]:.0f}%" for ix in drawn]
    draw(images[drawn], titles, output)
    print(f"{len(drawn)} of {len(wrong)} mistakes are in {output}, the most confident ones first")


def read_pictures(model, paths, output):
    """Prints what is read in pictures, and draws what the network saw.

    Exits with status 1 if a picture cannot be read, but only after the others.
    """
    images, titles = [], []
    for path in paths:
        try:
            picture = flatten(Image.open(path))
        except Exception as error:  # Broken files can raise almost any error.
            line = f"predict.py: error: {path}: {error} (PNG and JPEG files can be read)"
            print(line, file=sys.stderr)
            continue
        try:
            image = torch.tensor(make_image(find_digit(picture)))
        except ValueError as error:
            print(f"predict.py: error: {path}: {error}", file=sys.stderr)
        else:
            [answer], [percent] = read(model, image.unsqueeze(0))
            images.append(image)
            titles.append(f"{answer} ({percent:.1f}%)")
            print(f"{path}: {titles[-1]}")
    if images:
        draw(images, titles, output)
        print(f"What the network saw is in {output}")
    if len(images) < len(paths):
        sys.exit(1)


def main(argv=None):
    """Runs the program. Exits with a message if there is no run to read with."""
    parser = argparse.ArgumentParser("predict.py", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("pictures", nargs="*", metavar="PICTURE", help="of a digit each (if none: the test digits)")
    add("--run", type=Path, metavar="RUN", help="folder of the run (the newest in ./logs)")
    add("--data-dir", metavar="DIR", help="folder of the test digits (as in the run)")
    add("--output", type=Path, metavar="FILE", help="file to draw in (in the run's folder)")
    args = parser.parse_args(argv)
    run = args.run or newest_run("logs")
    if run is None:
        sys.exit("predict.py: error: there is no run in ./logs: run main.py first, or name a --run")
    settings = json.loads((run / "settings.json").read_text())
    checkpoint = torch.load(run / "checkpoint.pt", map_location="cpu", weights_only=True)
    model = LeNet()
    model.load_state_dict(checkpoint["states"]["model"])
    print(f"predict.py: {run} after epoch {checkpoint['epoch']}", file=sys.stderr)
    if checkpoint["epoch"] == 0:
        print("predict.py: warning: THIS NETWORK HAS NOT BEEN TRAINED", file=sys.stderr)
    model.eval()  # Dropout is off, and batch norm uses its running statistics.
    if args.pictures:
        read_pictures(model, args.pictures, args.output or run / "pictures.png")
    else:
        data_dir = args.data_dir or settings["data_dir"]
        seed_everything(settings["seed"])  # as main.py does, in case data is random
        _, _, (images, labels) = load_dataset(settings["dataset"], data_dir)
        read_test_digits(model, images, labels, args.output or run / "mistakes.png")


if __name__ == "__main__":
    main()
