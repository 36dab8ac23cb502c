"""Measure the top-1 and top-5 accuracy of a classifier on a folder of labelled images.

    pip install -e ".[examples]"
    python examples/evaluate.py imagenet/val --model vits14_reg_lc --layers 1

The folder, such as ImageNet's validation set, has one sub-folder of images per class. Sub-folders
named like the classifier's labels are matched by name; otherwise their sorted order must be the
order of the classes, as it is for ImageNet's n01440764, n01443537 and so on. For official models,
the accuracy stated in the official README is printed below the measured one.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import common
import dinoreg

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


def find_classes(folder: Path) -> list[Path]:
    """The sub-folders of a folder, sorted, without hidden ones: one for each class."""
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder")
    return sorted(
        path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")
    )


def find_labelled(folder: Path, labels: Sequence[str]) -> list[tuple[Path, int]]:
    """The image files in a folder's sub-folders, each with the index of its class. Sub-folders are
    matched with labels by name, or else by order. Raises a ValueError if they are not the classes.
    """
    folders = find_classes(folder)
    if len(folders) != len(labels):
        raise ValueError(
            f"{folder}: {len(folders)} sub-folders, "
            f"but the model has {len(labels)} classes; make one for each"
        )
    unknown = [path.name for path in folders if path.name not in labels]
    if unknown and len(unknown) < len(labels):
        raise ValueError(
            f"{folder}: some sub-folders are named like classes of the model, "
            f"but {unknown[0]!r} is not"
        )
    order = range(len(labels)) if unknown else [labels.index(path.name) for path in folders]
    return [
        (path, i)
        for one, i in zip(folders, order)
        for path in dinoreg.find_images([one])
        if path != one
    ]


def knn_accuracy(
    function: Callable[[Tensor], Tensor],
    transform: dinoreg.Transform,
    device: str,
    train: list[Path],
    queries: list[Path],
) -> float:
    """The share of queries whose class, the name of their folder, is the vote of the 20 images in
    train of the most similar features, which a function computes from images (B, 3, H, W). Images
    that cannot be read are left out."""

    def features(paths: list[Path]) -> tuple[Tensor, np.ndarray]:
        results = zip(paths, common.apply(function, paths, transform, device))
        rows, names = zip(
            *((x.float(), path.parent.name) for path, x in results if isinstance(x, Tensor))
        )
        return torch.stack(rows), np.array(names)

    (x, names), (y, truth) = features(train), features(queries)
    classes = np.unique(names)
    labels = torch.from_numpy(names[:, None] == classes).float()
    return float((classes[common.vote(x, labels, y, k=20).argmax(dim=1)] == truth).mean())


def run(args: argparse.Namespace) -> int:
    from tqdm import tqdm

    model = dinoreg.load(args.model, args.layers, args.device)
    if not isinstance(model, dinoreg.LinearClassifier):
        raise ValueError(
            f"{args.model} has no classifier; official models with one have names that end in _lc"
        )
    images = find_labelled(args.folder, model.labels or [""] * model.linear_head.out_features)
    results = dinoreg.classify(model, [path for path, _ in images], batch_size=args.batch_size)
    # hits: whether the best and the five best classes of an image hold its own.
    hits, unreadable = [], {}
    for (path, label), result in zip(
        images, tqdm(results, total=len(images), unit="image", disable=None)
    ):
        if isinstance(result, Exception):
            unreadable[path] = dinoreg.reason(result)
        else:
            best = result.topk(min(5, len(result))).indices.tolist()
            hits.append((label == best[0], label in best))
    status = common.report("evaluate", unreadable)
    if not hits:
        raise ValueError(f"{args.folder}: no image in its sub-folders can be read")

    top1, top5 = (sum(hit) / len(hits) for hit in zip(*hits))
    print(f"{args.model}: top-1 {top1:.2%}, top-5 {top5:.2%} of {len(hits):,} images")
    if statement := published(args.model, args.layers):
        print(statement)
    return status


def main(argv: list[str] | None = None) -> int:
    """0 if all went well, 1 if some images could not be read, 2 if the run could not start."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("folder", type=Path, help="has one sub-folder of images per class")
    add(
        "--model",
        default="vits14_reg_lc",
        help="an official classifier or a file of one (default: %(default)s)",
    )
    add(
        "--layers",
        type=int,
        choices=(1, 4),
        default=4,
        help="layers that the official classifier uses (default: 4)",
    )
    add(
        "--batch-size",
        type=common.positive,
        default=32,
        metavar="B",
        help="images in a pass (default: %(default)s)",
    )
    common.add_device(parser)
    return common.run(run, parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
