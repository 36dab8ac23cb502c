"""Train a linear segmentation head on your own photos and masks.

    pip install -e ".[examples]"
    python examples/train_segmenter.py IMAGES MASKS --output mine.safetensors
    python examples/segment.py PHOTO... --weights mine.safetensors

Each photo in the folder IMAGES has a mask of the same name in MASKS: a PNG file of the same size
that holds class indices (255 is ignored) or the colours of the classes. A text file, --classes,
names the classes. Without it they are named by their index and have the colours of the palette of
the first mask.

The protocol is the official linear evaluation (dinov2/eval/segmentation): batch norm and a linear
layer on the normalised patch tokens of the last block or the last four, logits upsampled
bilinearly, cross entropy, AdamW. Photos keep their aspect ratio and are not augmented, so that the
backbone runs once: its features are cached in float16. Training is shorter than the official 40,000
steps, at ten times the learning rate. A fifth of the photos is held out, unless --val names others.
"""

import argparse
import math
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.optim.lr_scheduler import OneCycleLR
from tqdm import tqdm

import common
import dinoreg
from dinoreg import DinoVisionTransformer
from masks import IGNORED, Classes, confusion, name_classes, read_classes, read_mask, score
from segment import Segmenter, classify_pixels, patch_features, save

BATCH = 8  # photos in a step
LEARNING_RATE = 0.01

Pair = tuple[Path, Path]  # a photo and its mask


def find_pairs(
    images: Path, masks: Path, classes: Classes | None, ignore: int
) -> tuple[list[Pair], list[str], int]:
    """Photos and their masks, what is wrong with others, and the number of classes that the masks'
    indices imply.
    """
    for folder in (images, masks):
        if not folder.is_dir():
            raise ValueError(f"{folder}: no such folder")
    if images.resolve() == masks.resolve():
        raise ValueError(f"{images}: photos and masks must be in different folders")
    photos, found = ({*dinoreg.find_images([folder])} - {folder} for folder in (images, masks))
    pairs = [
        (photo, masks / photo.relative_to(images).with_suffix(".png")) for photo in sorted(photos)
    ]
    errors = [
        f"{mask}: no photo of this name in {images}"
        for mask in sorted(found - {mask for _, mask in pairs})
    ]

    def count_classes(pair: Pair) -> int:
        try:
            indices = read_mask(pair[1], pair[0], classes, ignore)
        except ValueError as error:
            errors.append(str(error))
            return 0
        return 1 + int(indices[indices != IGNORED].max(initial=0))

    with ThreadPoolExecutor() as pool:
        counts = list(pool.map(count_classes, pairs))
    return [pair for pair, count in zip(pairs, counts) if count], errors, max(counts, default=0)


def compute_features(
    args: argparse.Namespace, backbone: DinoVisionTransformer, photos: list[Path]
) -> common.Features:
    """What the head sees of each photo, (layers * D, h, w), float16; or why the photo cannot be
    read.
    """

    def function(images: list[Tensor]) -> list[Tensor]:
        return [
            patch_features(backbone, x[None].to(args.device), args.layers)[0].half().cpu()
            for x in images
        ]

    P, transform = backbone.patch_size, backbone.transform
    read = partial(
        common.read_image, keep_aspect=True, patch_size=P, normalized=False, transform=transform
    )
    compute = partial(common.compute, function, read, transform=transform)
    options = [args.layers, args.resolution]
    return common.cached_features(
        compute, photos, args.images, "train_segmenter", args.model, options, not args.no_cache
    )[0]


def train(
    model: Segmenter, pairs: list[Pair], features: common.Features, ignore: int, steps: int
) -> None:
    """Train the head on the cached features of photos and their masks, resized to the input of the
    model.
    """
    device, P = model.backbone.pos_embed.device, model.backbone.patch_size

    def read(pair: Pair) -> tuple[Tensor, Tensor]:
        photo, path = pair
        _, h, w = features[photo].shape
        mask = Image.fromarray(read_mask(path, photo, model.classes, ignore))
        mask = np.array(mask.resize((w * P, h * P), Image.Resampling.NEAREST))
        # (layers * D, h, w) and (1, H, W)
        return features[photo].float(), torch.from_numpy(mask)[None].long()

    optimizer = torch.optim.AdamW(model.head.parameters(), lr=LEARNING_RATE, weight_decay=1e-4)
    schedule = OneCycleLR(
        optimizer,
        LEARNING_RATE,
        steps,
        pct_start=0.04,
        anneal_strategy="linear",
        cycle_momentum=False,
    )
    order = [pairs[i] for i in torch.utils.data.RandomSampler(pairs, num_samples=steps * BATCH)]
    batches = common.read_ahead(read, common.split_batches(order, BATCH))
    model.head.train()
    for batch in (bar := tqdm(batches, total=steps, unit="step")):
        batch = [(x.to(device), mask.to(device)) for x, mask in batch]
        # Of all photos together: (layers * D, N).
        tokens = torch.cat([x.flatten(1) for x, _ in batch], dim=1)
        logits = model.head(tokens[None, ..., None])[..., 0].split(
            [x[0].numel() for x, _ in batch], dim=2
        )
        loss, labelled = 0, 0
        for part, (x, mask) in zip(logits, batch):
            # (1, K, H, W)
            pixels = F.interpolate(part.unflatten(2, x.shape[1:]), mask.shape[1:], mode="bilinear")
            loss = loss + F.cross_entropy(pixels, mask, ignore_index=IGNORED, reduction="sum")
            labelled += (mask != IGNORED).sum().item()
        loss = loss / max(1, labelled)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        bar.set_postfix_str(f"loss {loss:.3f}")
    model.eval()


def run(args: argparse.Namespace) -> int:
    if args.output.suffix != ".safetensors" or not os.access(args.output.parent, os.W_OK):
        raise ValueError(
            f"{args.output}: must be a .safetensors file in a folder that can be written to"
        )
    backbone = common.load_backbone(args.model, args.device)
    if args.layers > backbone.n_blocks:
        raise ValueError(f"--layers must be at most {backbone.n_blocks}, got {args.layers}")
    common.set_resolution(backbone, args.resolution)  # segment.py does the same
    classes = read_classes(args.classes) if args.classes else None
    pairs, errors, count = find_pairs(args.images, args.masks, classes, args.ignore)
    held_out, more, other = find_pairs(*args.val, classes, args.ignore) if args.val else ([], [], 0)
    if pairs and not classes:
        classes = name_classes(max(count, other), pairs[0][1])
    features = compute_features(args, backbone, [photo for photo, _ in pairs + held_out])
    errors += more + [f"{photo}: {x}" for photo, x in features.items() if isinstance(x, str)]
    for error in errors:
        print(f"train_segmenter: {error}", file=sys.stderr)
    pairs, held_out = (
        [pair for pair in part if isinstance(features[pair[0]], Tensor)]
        for part in (pairs, held_out)
    )
    if not args.val:
        pairs = [
            pairs[i] for i in torch.randperm(len(pairs), generator=torch.Generator().manual_seed(0))
        ]
        fifth = math.ceil(len(pairs) / 5)
        pairs, held_out = pairs[fifth:], pairs[:fifth]
    if not pairs or not held_out:
        raise ValueError(
            f"{args.images}: one photo to train on and one to hold out are needed, "
            "with masks that can be used"
        )
    if len(classes) < 2:
        raise ValueError(
            f"{args.masks}: the masks hold a single class, 0, "
            f"and perhaps {args.ignore}, which is ignored"
        )

    torch.manual_seed(0)
    model = Segmenter(backbone, classes, args.layers).to(args.device).eval()
    train(model, pairs, features, args.ignore, args.steps)
    confusions = 0
    with torch.inference_mode():
        for photo, path in tqdm(held_out, unit="image"):
            truth = read_mask(path, photo, classes, args.ignore)  # of full resolution
            (logits,) = model.head(features[photo][None].float().to(args.device))
            confusions += confusion(truth, classify_pixels(logits, *truth.shape), len(classes))
    scores = score(confusions, classes)
    mean, accuracy = scores["mean_iou"], scores["pixel_accuracy"]
    print(f"mean IoU {mean:.1%}, pixel accuracy {accuracy:.1%} on {len(held_out)} held-out photos")
    for name, iou in scores["iou"].items():
        print(f"{'does not occur' if iou is None else f'{iou:.1%}':>8}  {name}")
    save(model, args.output)
    print(f"{args.output} written: python examples/segment.py PHOTO --weights {args.output}")
    return 1 if errors else 0


def main(argv: list[str] | None = None) -> int:
    """0 if all went well, 1 if some photos or masks could not be used, 2 if the run could not
    start.
    """
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("images", type=Path, metavar="IMAGES", help="folder of photos")
    add(
        "masks",
        type=Path,
        metavar="MASKS",
        help="folder of their masks: PNG files of class indices or colours",
    )
    add(
        "--val",
        type=Path,
        nargs=2,
        metavar=("IMAGES", "MASKS"),
        help="held-out photos and masks (default: a fifth of all)",
    )
    add(
        "--classes",
        type=Path,
        metavar="FILE",
        help="class names: one per line, with or without #rrggbb",
    )
    add(
        "--ignore",
        type=int,
        default=IGNORED,
        metavar="INDEX",
        help="index of unlabelled pixels (default: %(default)s)",
    )
    add(
        "--model",
        default="vits14_reg",
        help="an official backbone, or a file (default: %(default)s)",
    )
    common.add_resolution(parser, default=448)
    add(
        "--layers",
        type=int,
        choices=(1, 4),
        default=1,
        help="last blocks whose patch tokens the head sees (default: 1)",
    )
    add(
        "--steps",
        type=common.positive,
        default=500,
        help=f"training steps, of {BATCH} photos each (default: %(default)s)",
    )
    add(
        "-o",
        "--output",
        type=Path,
        default=Path("segmenter.safetensors"),
        metavar="FILE",
        help="default: %(default)s",
    )
    common.add_no_cache(parser)
    common.add_device(parser)
    return common.run(run, parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
