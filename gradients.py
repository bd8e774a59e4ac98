"""Compare mini-batch gradients with the true gradient at every stored epoch of a run.

python gradients.py [LOG_DIR] [--mode train]    # all flags: python gradients.py --help

In eval mode (dropout off, batch norm on its running statistics) the loss is a mean over
images, and the mini-batch gradients average to the true gradient G, of all training
images. In train mode they do not: the table's last column shows by how much.
"""

import argparse
import copy
import os
import signal
import sys
from pathlib import Path

if __name__ == "__main__":  # Ctrl-C while PyTorch is still loading: no traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import numpy as np
import torch
from matplotlib.figure import Figure
from tqdm import tqdm

from main import LeNet, RunError, load_dataset, load_parameters, select_device

KEPT_BYTES = 2**31  # of mini-batch gradients held in memory; more are computed twice
HEADER = """\
                      norm of a batch           cosine with G         |g_b - G| / |G|
epoch norm of G    mean [  5 %,   95 %]    mean [  5 %,   95 %]    mean [  5 %,   95 %]\
  noise scale  |m - G| / |G|"""
ROW = "{:5}{:10.3g}" + "  {:6.3g} [{:6.3g},{:7.3g}]" * 3 + "{:13.4g}{:15.2g}"


def parse_arguments(argv=None):
    parser = argparse.ArgumentParser("gradients.py", allow_abbrev=False)
    parser.formatter_class = argparse.ArgumentDefaultsHelpFormatter
    parser.error = lambda line: parser.exit(2, f"gradients.py: error: {line}\n")
    add, names = parser.add_argument, ["auto", "mnist", "mnist-5k"]
    add("log_dir", nargs="?", default="./logs", metavar="LOG_DIR", help="of main.py")
    add("--data-dir", default="./data", metavar="DIR", help="has MNIST/raw/")
    add("--dataset", default="auto", choices=names, help="auto: as main.py's")
    add("--batch-size", type=int, default=128, metavar="N", help="images per batch")
    add("--mode", default="eval", choices=["eval", "train"], help="for mini-batches")
    add("--dropout", type=float, default=0.25, metavar="P", help="in train mode")
    add("--seed", type=int, default=1, metavar="N", help="of the shuffle and dropout")
    args = parser.parse_args(argv)
    if args.batch_size < (least := 2 if args.mode == "train" else 1):
        parser.error(f"argument --batch-size: {least} or more in {args.mode} mode")
    if not (0 <= args.dropout < 1 and 0 <= args.seed < 2**63):
        parser.error("--dropout must be 0 or more, below 1; --seed 0 to 2**63 - 1")
    return args


def load_model(path, dropout=0.25):
    """A LeNet with the parameters in a file. RunError: they are not a LeNet's."""
    model = LeNet(dropout)
    try:
        arrays = load_parameters(path)
        model.load_state_dict({k: torch.tensor(v) for k, v in arrays.items()})
    except (RunError, RuntimeError) as error:
        line = f"{path} is missing or no LeNet's: restore it, train, or name another"
        raise RunError(f"{line} log dir ({str(error)[-120:]})") from error
    return model.to(memory_format=torch.channels_last)  # the quicker one on a CPU


def random_batches(count, batch_size, seed):
    """A seeded random partition of `count` images: a list of int64 indices each."""
    order = np.random.default_rng(seed).permutation(count)
    batches = list(torch.from_numpy(order).split(batch_size))
    if batch_size > 1 and len(batches) > 1 and len(batches[-1]) == 1:
        batches[-2:] = [torch.cat(batches[-2:])]  # one is too few for batch norm
    if len(batches) < 2:
        raise RunError(f"--batch-size: choose one well below the {count} images")
    return batches


def batch_gradients(model, images, labels, batches, name):
    """Yields the gradient of each batch's mean loss as one vector, float32 P."""
    parameters = list(model.parameters())
    for batch in tqdm(batches, name, leave=False, disable=None):  # on terminals only
        loss = torch.nn.functional.cross_entropy(model(images[batch]), labels[batch])
        yield torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)])


def compare(model, images, labels, batches, mode="eval", name=None):
    """Compares the gradients g_b of the batches, a partition of N images, with G.

    Returns a dict: the norm of G in nats per unit of parameter; mean, 5th and 95th
    percentile over batches of the norm of g_b, of its cosine with G and of its distance
    |g_b - G| / |G|; the gradient noise scale, in images; and the distance |m - G| / |G|
    of m, the mean of g_b weighted by batch size. The model is left as it is.

    The noise scale is tr(S) / |G|^2 of McCandlish et al. 2018 (arXiv:1812.06162), where
    S = sum_i (g_i - G)(g_i - G)' / N is the covariance of the gradients of N images. A
    batch holds B_b of them, drawn without replacement: two that differ have covariance
    -S / (N - 1), so that E|g_b - G|^2 = tr(S) (N - B_b) / (B_b (N - 1)). Weighted by
    B_b / N these sum to tr(S) (M - 1) / (N - 1) over M batches: an estimate without
    bias. |G|^2 is exact. In train mode m, which training follows, replaces G in both.
    """
    weights = [len(batch) / len(images) for batch in batches]
    size = sum(parameter.numel() for parameter in model.parameters())
    kept, keep = [], mode == "eval" and len(batches) * size * 4 <= KEPT_BYTES
    model = copy.deepcopy(model).eval()  # train mode changes its running statistics
    true, shift = torch.zeros(2, size, dtype=torch.float64, device=images.device)
    gradients = batch_gradients(model, images, labels, batches, name)
    for gradient, weight in zip(gradients, weights):
        true.add_(gradient, alpha=weight)
        kept += [gradient] if keep else []
    if not keep:
        model.train(mode == "train")
        kept = batch_gradients(model, images, labels, batches, name)
    values, norm = [], true.norm()
    for gradient, weight in zip(kept, weights):
        gradient = gradient.double()
        difference = gradient - true
        shift.add_(difference, alpha=weight)  # ends as m - G
        length, cosine = gradient.norm(), gradient @ true / (gradient.norm() * norm)
        values.append(torch.stack([length, cosine, difference.norm() / norm]))
    values, norm = torch.stack(values).cpu().numpy(), norm.item()  # batches x 3
    row, distance = {"true_norm": norm}, shift.norm().item() / norm
    for key, column in zip(("norm", "cosine", "distance"), values.T):
        low, high = np.percentile(column, [5, 95])
        row |= {f"{key}_mean": column.mean(), f"{key}_p5": low, f"{key}_p95": high}
    spread = np.dot(weights, values[:, 2] ** 2) - distance**2  # about m, in |G|^2
    spread *= (norm / (true + shift).norm().item()) ** 2 / (len(batches) - 1)
    return row | {"noise_scale": spread * (len(images) - 1), "mean_distance": distance}


def draw(rows, title, batch_size, path):
    """Draws the rows into a PNG file, in the colours of Okabe and Ito."""
    figure = Figure(figsize=(11, 4), dpi=120, layout="constrained")
    figure.suptitle(title, fontsize=10)
    norms, cosines, scales = figure.subplots(1, 3)
    column = {key: [row[key] for row in rows] for key in rows[0]}
    epochs, label = column["epoch"], "mini-batches: mean, 5 to 95 %"
    for axes, key in ((norms, "norm"), (cosines, "cosine")):
        axes.plot(epochs, column[f"{key}_mean"], "o-", c="#D55E00", label=label)
        band = column[f"{key}_p5"], column[f"{key}_p95"]
        axes.fill_between(epochs, *band, color="#D55E00", alpha=0.2, lw=0)
        axes.vlines(epochs, *band, color="#D55E00", alpha=0.4)  # one epoch has no area
    norms.plot(epochs, column["true_norm"], "s-", c="#0072B2", label="true gradient")
    scales.plot(epochs, column["noise_scale"], "o-", c="#009E73", label="noise scale")
    scales.axhline(batch_size, c="#000000", ls="--", label=f"batch size {batch_size}")
    norms.set(yscale="log", ylabel="gradient norm (nats per unit of parameter)")
    cosines.set(ylabel="cosine with the true gradient (no unit)")
    scales.set(yscale="log", ylabel="gradient noise scale (images)")
    for axes in (norms, cosines, scales):
        axes.set_xlabel("epoch (0: before training)")
        axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
        axes.legend(fontsize=8)
    figure.savefig(path, format="png")


def main(argv=None):
    """Does as the flags say; SystemExit with the documented status if that fails."""
    args, rows = parse_arguments(argv), []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: sys.exit(128 + number))
    log_dir, temporary = Path(args.log_dir), Path(args.log_dir, "gradients.tmp")
    try:
        count = len(list(log_dir.glob("params/epoch-*[0-9].pkl")))  # numbered from 0
        files = [log_dir / f"params/epoch-{i:02}.pkl" for i in range(max(count, 1))]
        device = select_device(0)
        models = [load_model(file, args.dropout).to(device) for file in files]
        dataset, images, labels, *_ = load_dataset(args.dataset, args.data_dir)
        batches = random_batches(len(images), args.batch_size, args.seed)
        images, labels, *batches = (x.to(device) for x in (images, labels, *batches))
        title = f"{args.mode} mode: {len(batches)} mini-batches of {args.batch_size} "
        title += f"against the true gradient of {len(images)} images of {dataset}"
        title += f", dropout {args.dropout:g}" if args.mode == "train" else ""
        temporary.touch()  # fails now, not after minutes of work, in a read-only folder
        temporary.unlink()
        print(title, HEADER, sep="\n", flush=True)
        for epoch, (file, model) in enumerate(zip(files, models)):
            torch.manual_seed(args.seed)  # for dropout
            row = compare(model, images, labels, batches, args.mode, f"Epoch {epoch}")
            if not np.isfinite(list(row.values())).all():
                raise RunError(f"{file} gives gradients not finite or 0: train again")
            print(ROW.format(epoch, *row.values()), flush=True)
            rows.append({"epoch": epoch, "mode": args.mode} | row)
        lines = [rows[0], *(row.values() for row in rows)]
        temporary.write_text("".join(",".join(map(str, x)) + "\n" for x in lines))
        os.replace(temporary, log_dir / "gradients.csv")
        draw(rows, title, args.batch_size, temporary)
        os.replace(temporary, log_dir / "gradients.png")
        scale, size = row["noise_scale"], args.batch_size
        text = "few steps" if scale < size else "steps nearly in proportion, up to it"
        line = (
            f"At epoch {epoch} the noise scale is {scale:.4g} images: batches of more"
        )
        print(line, f"than {size} would save {text}.")
    except RunError as error:
        sys.exit(f"gradients.py: error: {' '.join(str(error).split())}")
    except OSError as error:
        sys.exit(f"gradients.py: error: {error}: is {log_dir} writable?")


if __name__ == "__main__":
    main()
