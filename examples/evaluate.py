"""Measure the top-1 and top-5 accuracy of a classifier on a folder of labeled images.

    pip install -e ".[examples]"
    python examples/evaluate.py imagenet/val --model vits14_reg_lc --layers 1

The folder, such as ImageNet's validation set, has one subfolder of images per class. Subfolders
named like the classifier's labels are matched by name; otherwise their sorted order must be the
order of the classes, as it is for ImageNet's n01440764, n01443537 and so on. For official models,
the accuracy stated in the official README is printed below the measured one.
"""

import argparse
import sys
from pathlib import Path

import common
import dinoreg
import features
from labeled import find_labeled

# Top-1 accuracies in percent from https://github.com/facebookresearch/dinov2/blob/main/README.md:
# of the released one-layer head (section "Evaluation"), and of the best linear head, of one or four
# layers (table at the top; dinov2/eval/linear.py). There is no figure for the released four-layer
# heads alone.
PUBLISHED = {
    "vits14": (81.1, 81.1),
    "vitb14": (84.5, 84.5),
    "vitl14": (86.3, 86.3),
    "vitg14": (86.5, 86.5),
    "vits14_reg": (80.8, 80.9),
    "vitb14_reg": (84.4, 84.6),
    "vitl14_reg": (86.5, 86.7),
    "vitg14_reg": (87.0, 87.1),
}


def count_hits(
    model: dinoreg.LinearClassifier, images: list[tuple[Path, int]], batch_size: int
) -> tuple[list[tuple[bool, bool]], dict[Path, str]]:
    """Whether the best class and the best five hold the class of each image, and why other images
    have no result.
    """
    results = dinoreg.classify(model, [path for path, _ in images], batch_size=batch_size)
    bar = features.progress(results, total=len(images), unit="image")
    hits, failed = [], {}
    for (path, label), result in zip(images, bar):
        if isinstance(result, Exception):
            failed[path] = dinoreg.reason(result)
        else:
            best = result.topk(min(5, len(result))).indices.tolist()
            hits.append((label == best[0], label in best))
    return hits, failed


def published(name: str, layers: int) -> str | None:
    """What the official README states about an official classifier; None for any other model."""
    arch = name.removeprefix("dinov2_").removesuffix("_lc")
    if arch not in PUBLISHED:
        return None
    one_layer, best = PUBLISHED[arch]
    if layers == 1:
        return f"the official README states {one_layer}% top-1 for this head"
    return (
        f"the official README states {best}% top-1 for the best linear head, "
        "and no figure for this one"
    )


def run(args: argparse.Namespace) -> int:
    model = dinoreg.load(args.model, args.layers, args.device)
    if not isinstance(model, dinoreg.LinearClassifier):
        raise ValueError(f"{args.model} has no classifier; those of official models end in _lc")
    labels = model.labels or [""] * model.linear_head.out_features
    hits, failed = count_hits(model, find_labeled(args.folder, labels), args.batch_size)
    status = common.report("evaluate", failed)
    if not hits:
        raise ValueError(f"{args.folder}: no image in its subfolders has a result")

    top1, top5 = (sum(hit) / len(hits) for hit in zip(*hits))
    split = f"{len(hits):,} images in {args.folder}"
    print(dinoreg.printable(f"{args.model}: top-1 {top1:.2%}, top-5 {top5:.2%} on {split}"))
    if statement := published(args.model, args.layers):
        print(statement)
    return status


def add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("folder", type=Path, help="has one subfolder of images per class")
    text = "an official classifier, or a file of one (default: %(default)s)"
    add("--model", default="vits14_reg_lc", help=text)
    text = "layers that the official classifier uses (default: 4)"
    add("--layers", type=int, choices=(1, 4), default=4, help=text)
    text = "images in a forward pass (default: %(default)s)"
    add("--batch-size", type=common.positive, default=32, metavar="B", help=text)
    common.add_device(parser)


def main(argv: list[str] | None = None) -> int:
    """0 if all went well, 1 if some images have no result, 2 if the run could not start."""
    return common.main(run, add_options, argv)


if __name__ == "__main__":
    sys.exit(main())
