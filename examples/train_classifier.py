"""Train a classifier on your images: a folder with one sub-folder per class, named like the class.

    pip install -e ".[examples]"
    python examples/train_classifier.py FOLDER --output mine.safetensors
    python -m dinoreg photo.jpg --weights mine.safetensors

A fifth of each class is for validation, and another, or the images of --test, for the accuracy that
is printed. The backbone runs once over the images, and its features are cached. On these:
  - a linear head is trained as in the official linear evaluation (dinov2/eval/linear.py): SGD with
    momentum, a cosine schedule, no weight decay, and one head for each of 13 learning rates; that
    of the best validation accuracy is kept;
  - or, with --knn, the nearest images vote, as in the official k-NN evaluation
    (dinov2/eval/knn.py).
With --finetune the backbone is trained as well, after the head (Kumar et al., 2022,
arXiv 2202.10054), with lower learning rates for earlier blocks (Bao et al., 2021,
arXiv 2106.08254).
"""

import argparse
import dataclasses
import functools
import math
import os
import sys
from collections import Counter
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import common
import dinoreg
from evaluate import find_classes, find_labelled

BATCH = 16  # images in a step of --finetune
HEAD_BATCH, HEAD_STEPS = 128, 2000
# The learning rates of a batch of 256.
LEARNING_RATES = [1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1]
TRAIN, VAL, TEST = range(3)  # the parts of the images
NEIGHBOURS = 20  # that vote in k-NN
THUMBNAIL = 16  # pixels: side of the images whose raw pixels are classified for comparison


def split(names: list[str], classes: Tensor, held_out: list[int]) -> Tensor:
    """The part of each image of classes (n,): a fifth of each class, at least one, in each part of
    held_out; else TRAIN.
    """
    generator, parts, needed = (
        torch.Generator().manual_seed(0),
        torch.full_like(classes, TRAIN),
        1 + len(held_out),
    )
    for i, name in enumerate(names):
        members = torch.where(classes == i)[0]
        if len(members) < needed:
            raise ValueError(
                f"{name}: a class needs {needed} or more images that can be read; "
                f"there are {len(members)}"
            )
        members = members[torch.randperm(len(members), generator=generator)]
        for part, chosen in zip(held_out, members.split(max(1, len(members) // 5))):
            parts[chosen] = part
    return parts


def compute_features(
    args: argparse.Namespace, model: dinoreg.LinearClassifier, paths: list[Path]
) -> common.Features:
    """For each image file, its raw pixels (P,) and then what the linear layer sees of it (F,); or
    why it cannot be read.
    """

    def function(x: Tensor) -> Tensor:
        pixels = F.interpolate(x, (THUMBNAIL, THUMBNAIL), mode="area").flatten(1)
        return torch.cat([pixels, model.linear_input(x)], dim=1).float()

    compute = functools.partial(
        common.apply, function, transform=model.transform, device=args.device
    )
    options = [model.layers, model.transform.size]
    return common.cached_features(
        compute, paths, args.folder, "train_classifier", args.model, options, not args.no_cache
    )[0]


def train_head(
    model: dinoreg.LinearClassifier, x: Tensor, y: Tensor, val_x: Tensor, val_y: Tensor
) -> float:
    """The best learning rate. Trains a head for each on features x (n, F) of classes y (n,), and
    gives the model the head with the highest validation accuracy. All heads are one linear layer:
    without weight decay, a learning rate is equivalent to a factor of the loss."""
    from tqdm import tqdm

    rates = torch.tensor(LEARNING_RATES, device=x.device) * HEAD_BATCH / 256
    K = model.linear_head.out_features
    heads = nn.Linear(x.shape[1], len(rates) * K, device=x.device)
    nn.init.normal_(heads.weight, std=0.01)
    nn.init.zeros_(heads.bias)
    optimizer = torch.optim.SGD(heads.parameters(), lr=1.0, momentum=0.9, weight_decay=0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, HEAD_STEPS, eta_min=0)

    def losses(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """The loss of each head on features (B, F), and its number of correct predictions."""
        logits = heads(x).unflatten(1, (-1, K)).mT  # (B, K, heads)
        y = y[:, None].expand(-1, len(rates))
        return F.cross_entropy(logits, y, reduction="none").mean(dim=0), (
            logits.argmax(dim=1) == y
        ).sum(dim=0)

    for _ in tqdm(range(HEAD_STEPS), unit="step", disable=None):
        batch = torch.randint(len(x), (HEAD_BATCH,), device=x.device)
        optimizer.zero_grad()
        (losses(x[batch], y[batch])[0] @ rates).backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        loss, right = losses(val_x, val_y)
        best = max(range(len(rates)), key=lambda i: (right[i].item(), -loss[i].item()))
        model.linear_head.weight.copy_(heads.weight.unflatten(0, (-1, K))[best])
        model.linear_head.bias.copy_(heads.bias.unflatten(0, (-1, K))[best])
    return LEARNING_RATES[best]


def parameter_groups(model: dinoreg.LinearClassifier, lr: float, decay: float = 0.75) -> list[dict]:
    """Parameter groups: the learning rate falls by a factor from each layer to the one before; only
    matrices decay.
    """
    last, groups = model.backbone.n_blocks + 1, {}
    for name, parameter in model.named_parameters():
        layer = last if name.startswith(("backbone.norm", "linear_head")) else 0
        if name.startswith("backbone.blocks"):
            layer = 1 + int(name.split(".")[2])
        weight_decay = 0.05 if parameter.ndim > 1 and name.endswith("weight") else 0.0
        empty = {"params": [], "lr": lr * decay ** (last - layer), "weight_decay": weight_decay}
        groups.setdefault((layer, weight_decay), empty)["params"].append(parameter)
    return list(groups.values())


def random_crop(
    path: Path, numbers: Tensor, size: int, flip: bool, transform: dinoreg.Transform
) -> Tensor:
    """A crop (3, size, size) of 35 to 100 % of an image, of ratio 3:4 to 4:3, given five random
    numbers in [0, 1).
    """
    x = dinoreg.preprocess(path, size * 3 // 2, True, 1, transform=transform)
    area, shape, top, left, mirror = numbers.tolist()
    H, W = x.shape[1:]
    side, stretch = math.sqrt((0.35 + 0.65 * area) * H * W), (4 / 3) ** (shape - 0.5)
    h, w = min(H, round(side * stretch)), min(W, round(side / stretch))
    top, left = round(top * (H - h)), round(left * (W - w))
    x = x[None, :, top : top + h, left : left + w]
    x = F.interpolate(x, (size, size), mode="bicubic", antialias=True)[0]
    return x.flip(2) if flip and mirror < 0.5 else x  # horizontally


def finetune(
    model: dinoreg.LinearClassifier, paths: list[Path], classes: Tensor, args: argparse.Namespace
) -> None:
    """Train the whole model on images and their classes (n,)."""
    from tqdm import tqdm

    on_gpu, (size, _), steps = (
        args.device == "cuda",
        model.transform.size,
        args.epochs * math.ceil(len(paths) / BATCH),
    )
    model.backbone.grad_checkpointing = on_gpu  # a third slower, for a fraction of the memory
    optimizer = torch.optim.AdamW(parameter_groups(model, lr=1e-4))
    rates = [group["lr"] for group in optimizer.param_groups]
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, rates, steps, pct_start=0.1, cycle_momentum=False
    )
    model.train()
    order = [batch for _ in range(args.epochs) for batch in torch.randperm(len(paths)).split(BATCH)]
    # Random numbers are drawn here, as threads would draw in any order.
    items = ([(paths[i], torch.rand(5)) for i in batch] for batch in order)
    images = common.read_ahead(
        lambda item: random_crop(*item, size, not args.no_flip, model.transform), items
    )
    for batch, crops in zip(bar := tqdm(order, unit="step", disable=None), images):
        with torch.autocast(args.device, torch.bfloat16, enabled=on_gpu):
            logits = model(torch.stack(crops).to(args.device))
        loss = F.cross_entropy(logits.float(), classes[batch].to(args.device))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        bar.set_postfix_str(f"loss {loss:.3f}")
    model.eval()


def report(kind: str, names: list[str], classes: Tensor, predicted: Tensor) -> None:
    """Print the accuracy and the most frequent confusions."""
    pairs = list(zip(classes.tolist(), predicted.tolist()))
    wrong = Counter(pair for pair in pairs if pair[0] != pair[1])
    print(f"{kind}: {1 - wrong.total() / len(pairs):.1%} of {len(pairs)} test images are right")
    for (label, other), count in wrong.most_common(5):
        print(f"{count:4} x  {names[label]} taken for {names[other]}")


def load_model(args: argparse.Namespace, num_classes: int) -> dinoreg.LinearClassifier:
    """A trained backbone for images of --size pixels, with a new head."""
    backbone = common.load_backbone(args.model)
    common.set_square(backbone, args.size)
    if args.layers > backbone.n_blocks:
        raise ValueError(f"--layers must be at most {backbone.n_blocks}, got {args.layers}")
    if args.finetune:
        config = dataclasses.replace(backbone.config, drop_path_rate=0.1)
        backbone = dinoreg.from_state_dict(
            backbone.state_dict(), config, transform=backbone.transform
        )
    return dinoreg.LinearClassifier(backbone, num_classes, args.layers).eval()


def run(args: argparse.Namespace) -> int:
    names = [path.name for path in find_classes(args.folder)]
    if len(names) < 2:
        raise ValueError(
            f"{args.folder}: two or more sub-folders are needed, "
            f"one for each class; there are {len(names)}"
        )
    images = [(path, i, TRAIN) for path, i in find_labelled(args.folder, names)]
    images += [(path, i, TEST) for path, i in find_labelled(args.test, names)] if args.test else []
    held_out = [VAL] * (not args.knn) + [TEST] * (not args.test)
    # This fails early if there are too few.
    split(names, torch.tensor([i for _, i, part in images if part == TRAIN]), held_out)
    if not args.knn and (
        args.output.suffix != ".safetensors" or not os.access(args.output.parent, os.W_OK)
    ):
        raise ValueError(
            f"{args.output}: must be a .safetensors file in a folder that can be written to"
        )

    model = load_model(args, len(names)).to(args.device)
    features = compute_features(args, model, [path for path, *_ in images])
    status = common.report(
        "train_classifier", {path: x for path, x in features.items() if isinstance(x, str)}
    )
    images = [image for image in images if isinstance(features[image[0]], Tensor)]
    paths = [path for path, *_ in images]
    y, parts = (torch.tensor([image[i] for image in images]) for i in (1, 2))
    parts[parts == TRAIN] = split(names, y[parts == TRAIN], held_out)
    train, val, test = (torch.where(parts == part)[0] for part in (TRAIN, VAL, TEST))
    if not len(test):
        raise ValueError(f"{args.test}: no image in its sub-folders can be read")
    pixels, x = torch.stack([features[path] for path in paths]).tensor_split(
        [3 * THUMBNAIL**2], dim=1
    )

    votes, majority = F.one_hot(y[train]).float(), y[train].bincount().argmax()
    predicted = common.vote(pixels[train], votes, pixels[test], NEIGHBOURS).argmax(dim=1)
    by_pixels, by_majority = (
        (prediction == y[test]).float().mean() for prediction in (predicted, majority)
    )
    print(
        f"k-NN of {THUMBNAIL} x {THUMBNAIL} pixels: {by_pixels:.1%}; "
        f"always {names[majority]}: {by_majority:.1%}"
    )
    if args.knn:
        # The CLS token of the last block; the mean of the patches follows.
        cls = x.unflatten(1, (args.layers + 1, -1))[:, -2]
        report(
            "k-NN",
            names,
            y[test],
            common.vote(cls[train], votes, cls[test], NEIGHBOURS).argmax(dim=1),
        )
        print("no file is written: `python -m dinoreg` serves linear classifiers")
        return status
    torch.manual_seed(0)
    rate = train_head(
        model, *(tensor.to(args.device) for tensor in (x[train], y[train], x[val], y[val]))
    )
    predicted = model.linear_head(x[test].to(args.device)).argmax(dim=1).cpu()
    report(f"linear head, learning rate {rate:g}", names, y[test], predicted)
    if args.finetune:
        finetune(model, [paths[i] for i in train], y[train], args)
        logits = common.apply(model, [paths[i] for i in test], model.transform, args.device)
        report(
            f"fine-tuned, {args.epochs} epochs",
            names,
            y[test],
            torch.stack(list(logits)).argmax(dim=1),
        )
    dinoreg.save(model, args.output, names)
    print(f"{args.output} written: python -m dinoreg IMAGE --weights {args.output}")
    return status


def main(argv: list[str] | None = None) -> int:
    """0 if all went well, 1 if some images could not be read, 2 if it could not run."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("folder", type=Path, help="has one sub-folder of images per class")
    add(
        "--test",
        type=Path,
        metavar="FOLDER",
        help="test images, in the same sub-folders (default: a fifth of each class)",
    )
    add(
        "--model",
        default="vits14_reg",
        help="an official backbone, or a file (default: %(default)s)",
    )
    add(
        "--size",
        type=common.positive,
        metavar="PIXELS",
        help="side of the central crop (default: the model's)",
    )
    add(
        "--layers",
        type=int,
        choices=(1, 4),
        default=1,
        help="last blocks whose CLS tokens the head sees (default: 1)",
    )
    kinds = parser.add_mutually_exclusive_group()
    kinds.add_argument(
        "--knn", action="store_true", help="only report the accuracy of a k-NN classifier"
    )
    kinds.add_argument(
        "--finetune", action="store_true", help="train the backbone as well; best on a GPU"
    )
    add("--epochs", type=common.positive, default=10, help="for --finetune (default: %(default)s)")
    add(
        "--no-flip",
        action="store_true",
        help="no horizontal flips in --finetune: for text and digits",
    )
    add(
        "-o",
        "--output",
        type=Path,
        default=Path("classifier.safetensors"),
        metavar="FILE",
        help="default: %(default)s",
    )
    common.add_no_cache(parser)
    common.add_device(parser)
    return common.run(run, parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
