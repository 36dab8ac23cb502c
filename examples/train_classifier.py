"""Train a classifier on your images: a folder with one subfolder per class, named like the class.

    pip install -e ".[examples]"
    python examples/train_classifier.py FOLDER --output mine.safetensors
    python -m dinoreg photo.jpg --model mine.safetensors

A fifth of each class, or the images of --test, are held out to measure accuracies. The backbone
runs once over all images, and its features are cached. On these features
  - a linear head is trained as in the official linear evaluation (dinov2/eval/linear.py): SGD with
    momentum, a cosine schedule, no weight decay, and one head for each of 13 learning rates; the
    best one on validation images, another fifth of each class, is kept;
  - or, with --knn, the nearest images vote, as in the official k-NN evaluation
    (dinov2/eval/knn.py).
With --finetune the backbone is trained as well, after the head (finetuning.py).

The accuracies of the most frequent class and of k-NN by raw pixels are printed for comparison.
Their neighbors are all images outside the test set, so they are the same with and without --knn.
"""

import argparse
import functools
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import common
import dinoreg
import features
import outputs
from finetuning import finetune
from labeled import find_classes, find_labeled, vote

TRAIN, VAL, TEST = range(3)  # the parts of the images
NEIGHBORS = 20  # that vote in k-NN
THUMBNAIL = 16  # pixels: side of the images whose raw pixels are classified for comparison
PIXELS = 3 * THUMBNAIL**2


def split(names: list[str], classes: Tensor, held_out: list[int]) -> Tensor:
    """The part of each image of classes (n,): a fifth of each class, at least one, in each part of
    held_out; else TRAIN. The first part is the same whether others follow or not.
    """
    generator, parts = torch.Generator().manual_seed(0), torch.full_like(classes, TRAIN)
    needed = 1 + len(held_out)
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


def load_features(
    args: argparse.Namespace, model: dinoreg.LinearClassifier, paths: list[Path]
) -> tuple[features.Cache, dict[Path, str]]:
    """A cache that has for each image its raw pixels and then what the linear layer sees of it,
    (PIXELS + F,); and why other images cannot be read.
    """

    def compute(x: Tensor) -> Tensor:
        pixels = F.interpolate(x, (THUMBNAIL, THUMBNAIL), mode="area").flatten(1)
        return torch.cat([pixels, model.linear_input(x)], dim=1).float()

    fingerprint = features.fingerprint(model.backbone, model.layers)
    cache = features.Cache("train_classifier", args.folder, fingerprint, not args.no_cache)
    apply = functools.partial(features.apply, transform=model.transform, device=args.device)
    return cache, cache.fill(functools.partial(apply, compute), paths)


# The linear head ----------------------------------------------------------------------------------

HEAD_BATCH, HEAD_STEPS = 128, 2000
# The learning rates of a batch of 256.
LEARNING_RATES = [1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1]


def train_head(
    model: dinoreg.LinearClassifier, x: Tensor, y: Tensor, val_x: Tensor, val_y: Tensor
) -> float:
    """The best learning rate. Trains a head for each on features x (n, F) of classes y (n,), and
    gives the model the head with the highest validation accuracy. All heads are one linear layer:
    without weight decay, a learning rate is equivalent to a factor of the loss."""
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
        loss = F.cross_entropy(logits, y, reduction="none").mean(dim=0)
        return loss, (logits.argmax(dim=1) == y).sum(dim=0)

    for _ in features.progress(range(HEAD_STEPS), unit="step"):
        batch = torch.randint(len(x), (HEAD_BATCH,), device=x.device)
        optimizer.zero_grad()
        (losses(x[batch], y[batch])[0] @ rates).backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        loss, right = losses(val_x, val_y)
        finite = [i for i in range(len(rates)) if loss[i].isfinite()]
        if not finite:
            raise ValueError("the loss of every head is NaN or infinity")
        best = max(finite, key=lambda i: (right[i].item(), -loss[i].item()))
        model.linear_head.weight.copy_(heads.weight.unflatten(0, (-1, K))[best])
        model.linear_head.bias.copy_(heads.bias.unflatten(0, (-1, K))[best])
    return LEARNING_RATES[best]


# From folders to a model --------------------------------------------------------------------------


def find_images(args: argparse.Namespace) -> tuple[list[str], list[tuple[Path, int, int]]]:
    """The names of the classes, and the images, each with its class and its part: TEST for those of
    --test, TRAIN for the others.
    """
    names = [path.name for path in find_classes(args.folder)]
    if len(names) < 2:
        raise ValueError(
            f"{args.folder}: two or more subfolders are needed, "
            f"one for each class; there are {len(names)}"
        )
    tests = find_labeled(args.test, names) if args.test else []
    images = [(path, i, TRAIN) for path, i in find_labeled(args.folder, names)]
    return names, images + [(path, i, TEST) for path, i in tests]


def load_model(args: argparse.Namespace, num_classes: int) -> dinoreg.LinearClassifier:
    """A trained backbone for images of --size pixels, with a new head."""
    backbone = common.load_backbone(args.model, args.device, size=args.size)
    if args.layers > backbone.n_blocks:
        raise ValueError(f"--layers must be at most {backbone.n_blocks}, got {args.layers}")
    return dinoreg.LinearClassifier(backbone, num_classes, args.layers).eval().to(args.device)


def report(kind: str, y: Tensor, predicted: Tensor, names: Sequence[str] = ()) -> None:
    """Print the accuracy and, given the names of the classes, the most frequent confusions."""
    print(dinoreg.printable(f"{(predicted == y).float().mean():8.1%}  {kind}"))
    wrong = Counter((i, j) for i, j in zip(y.tolist(), predicted.tolist()) if names and i != j)
    for (i, j), count in wrong.most_common(5):
        print(dinoreg.printable(f"{count:10} x  {names[i]} taken for {names[j]}"))


def report_votes(
    args: argparse.Namespace, names: list[str], x: Tensor, y: Tensor, test: Tensor
) -> None:
    """Print the accuracies, on the images where test (n,) is True, of what needs no training."""
    votes, majority = F.one_hot(y[~test]).float(), y[~test].bincount().argmax()

    def neighbors(x: Tensor) -> Tensor:
        return vote(x[~test], votes, x[test], NEIGHBORS).argmax(dim=1)

    where = f"in {args.test}" if args.test else f"held out from {args.folder}"
    print(dinoreg.printable(f"accuracy on the {test.sum():,} test images {where}:"))
    report(f"always {names[majority]}", y[test], majority.expand(len(y[test])))
    report(f"k-NN of {THUMBNAIL} x {THUMBNAIL} pixels", y[test], neighbors(x[:, :PIXELS]))
    if args.knn:
        # The CLS token of the last block; the mean of the patches follows.
        cls = x[:, PIXELS:].unflatten(1, (args.layers + 1, -1))[:, -2]
        report("k-NN of CLS tokens", y[test], neighbors(cls), names)


def run(args: argparse.Namespace) -> int:
    names, images = find_images(args)
    held_out = [TEST] * (not args.test) + [VAL] * (not args.knn)
    # This fails early if there are too few.
    split(names, torch.tensor([i for _, i, part in images if part == TRAIN]), held_out)
    if not args.knn:
        outputs.check_new_file(args.output, ".safetensors", args.model)
    model = load_model(args, len(names))
    cache, unreadable = load_features(args, model, [path for path, *_ in images])
    status = common.report("train_classifier", unreadable)
    images = [image for image in images if image[0] not in unreadable]
    y, parts = (torch.tensor([image[i] for image in images]) for i in (1, 2))
    parts[parts == TRAIN] = split(names, y[parts == TRAIN], held_out)
    train, val, test = (torch.where(parts == part)[0] for part in (TRAIN, VAL, TEST))
    if not len(test):
        raise ValueError(f"{args.test}: no image in its subfolders can be read")

    x = torch.stack([cache[path] for path, *_ in images])
    report_votes(args, names, x, y, parts == TEST)
    if args.knn:
        print("no file is written: python -m dinoreg runs linear classifiers only")
        return status
    torch.manual_seed(0)
    x, classes = x[:, PIXELS:].to(args.device), y.to(args.device)
    rate = train_head(model, x[train], classes[train], x[val], classes[val])
    predicted = model.linear_head(x[test]).argmax(dim=1).cpu()
    report(f"linear head, learning rate {rate:g}", y[test], predicted, names)
    if args.finetune:
        train_paths, test_paths = ([images[i][0] for i in part] for part in (train, test))
        model = finetune(model, train_paths, y[train], args.epochs, not args.no_flip)
        results = [*features.apply(model, test_paths, model.transform, args.device)]
        if problems := [x for x in results if isinstance(x, str)]:
            raise ValueError(f"after fine-tuning: {problems[0]}")
        predicted = torch.stack(results).argmax(dim=1)
        report(f"fine-tuned, {args.epochs} epochs", y[test], predicted, names)
    dinoreg.save(model, args.output, names)
    output = dinoreg.printable(str(args.output))
    print(f"{output} written: python -m dinoreg IMAGE --model {output}")
    return status


def add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("folder", type=Path, help="has one subfolder of images per class")
    text = "test images, in the same subfolders (default: a fifth of each class)"
    add("--test", type=Path, metavar="FOLDER", help=text)
    common.add_model(parser)
    common.add_size(parser)
    text = "last blocks whose CLS tokens the head sees (default: 1)"
    add("--layers", type=int, choices=(1, 4), default=1, help=text)
    kinds = parser.add_mutually_exclusive_group()
    text = "only print the accuracy of a k-NN classifier"
    kinds.add_argument("--knn", action="store_true", help=text)
    text = "train the backbone as well, best on a GPU: on two CPU cores, ViT-S/14 takes about "
    text += "5 min for 100 images and 10 epochs"
    kinds.add_argument("--finetune", action="store_true", help=text)
    add("--epochs", type=common.positive, default=10, help="for --finetune (default: %(default)s)")
    text = "no horizontal flips in --finetune: for text and digits"
    add("--no-flip", action="store_true", help=text)
    add("--no-cache", action="store_true", help="compute all features, and keep none")
    common.add_output(parser, "classifier.safetensors")
    common.add_device(parser)


def main(argv: list[str] | None = None) -> int:
    """0 if all went well, 1 if some images could not be read, 2 if it could not run."""
    return common.main(run, add_options, argv)


if __name__ == "__main__":
    sys.exit(main())
