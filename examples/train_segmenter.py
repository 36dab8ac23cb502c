"""Train a linear segmentation head on your own photos and masks.

    pip install -e ".[examples]"
    python examples/train_segmenter.py IMAGES MASKS --output mine.safetensors
    python examples/segment.py PHOTO... --weights mine.safetensors

Each photo in the folder IMAGES has a mask of the same name in MASKS: a PNG file of the same size
that holds class indices (255 is ignored) or the colors of the classes. A text file, --classes,
names the classes. Without it they are named by their index and have the colors of the palette of
the first mask. A fifth of the photos is held out, unless --val names others.

The protocol is the official linear evaluation (dinov2/eval/segmentation): batch norm and a linear
layer on the normalized patch tokens of the last block or the last four, logits upsampled
bilinearly, cross entropy, AdamW. Photos keep their aspect ratio and are not augmented, so the
backbone runs once: its features are cached in float16. Training is shorter than the official 40,000
steps, at ten times the learning rate, and the loss takes every second row and column of pixels.
"""

import argparse
import math
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.optim.lr_scheduler import OneCycleLR

import common
import dinoreg
import features
import outputs
import segmentation
from segmentation import IGNORED, Classes, Segmenter, read_mask

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
    unused = sorted(found - {mask for _, mask in pairs})
    errors = [f"{mask}: no photo of this name in {images}" for mask in unused]

    def count_classes(pair: Pair) -> int:
        try:
            indices = read_mask(pair[1], pair[0], classes, ignore)
        except ValueError as error:
            errors.append(str(error))
            return 0
        return 1 + int(indices[indices != IGNORED].max(initial=0))

    with ThreadPoolExecutor() as pool:
        counts = list(
            features.progress(pool.map(count_classes, pairs), desc="masks", total=len(pairs))
        )
    return [pair for pair, count in zip(pairs, counts) if count], errors, max(counts, default=0)


def compute_features(
    backbone: dinoreg.DinoVisionTransformer, layers: int, photos: Sequence[Path]
) -> Iterator[Tensor | str]:
    """What the head sees of each photo, (layers * D, h, w), float16; or why the photo cannot be
    used.
    """
    device, P, transform = backbone.pos_embed.device, backbone.patch_size, backbone.transform

    def function(images: list[Tensor]) -> Iterator[Tensor]:
        for x in images:  # of different sizes
            (tokens,) = segmentation.patch_features(backbone, x[None].to(device), layers)
            yield tokens.half().cpu()

    read = partial(
        features.read_image, keep_aspect=True, patch_size=P, normalized=False, transform=transform
    )
    return features.compute(function, read, photos, transform)


def train(
    model: Segmenter, pairs: list[Pair], cache: features.Cache, ignore: int, steps: int
) -> None:
    """Train the head on the cached features of photos, and on their masks resized to half of the
    model's input.
    """
    device, P = model.backbone.pos_embed.device, model.backbone.patch_size
    optimizer = torch.optim.AdamW(model.head.parameters(), lr=LEARNING_RATE, weight_decay=1e-4)
    options = {"pct_start": 0.04, "anneal_strategy": "linear", "cycle_momentum": False}
    schedule = OneCycleLR(optimizer, LEARNING_RATE, steps, **options)

    def read(pair: Pair) -> np.ndarray:
        return read_mask(pair[1], pair[0], model.classes, ignore)

    order = [pairs[i] for i in torch.utils.data.RandomSampler(pairs, num_samples=steps * BATCH)]
    batches = list(features.split_batches(order, BATCH))
    model.head.train()
    images = zip(batches, features.read_ahead(read, batches))
    bar = features.progress(images, desc="training", total=steps)
    for batch, masks in bar:
        # From the cache on the disk, since the features of all photos may not fit into memory.
        tokens = [cache[photo].to(device).float() for photo, _ in batch]  # (layers * D, h, w) each
        # The head sees the patches of all photos together: (layers * D, N).
        joined = torch.cat([x.flatten(1) for x in tokens], dim=1)
        logits = model.head(joined[None, ..., None])[0, ..., 0]  # (K, N)
        loss, labeled = 0, 0
        for x, part, mask in zip(tokens, logits.split([x[0].numel() for x in tokens], 1), masks):
            h, w = x.shape[1:]
            # Every second row and column of pixels: a quarter of the work, the same accuracy.
            size = w * P // 2, h * P // 2
            mask = Image.fromarray(mask).resize(size, Image.Resampling.NEAREST)
            mask = torch.from_numpy(np.array(mask)).to(device).long()  # (H / 2, W / 2)
            pixels = F.interpolate(part.unflatten(1, (h, w))[None], mask.shape, mode="bilinear")
            loss += F.cross_entropy(pixels, mask[None], ignore_index=IGNORED, reduction="sum")
            labeled += (mask != IGNORED).sum().item()
        loss = loss / max(1, labeled)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        bar.set_postfix_str(f"loss {loss:.3f}")
    model.eval()


@torch.inference_mode()
def evaluate(model: Segmenter, pairs: list[Pair], cache: features.Cache, ignore: int) -> dict:
    """The scores of the head on photos, compared with their masks at full resolution."""
    confusions = 0
    for photo, path in features.progress(pairs, desc="testing", unit="image"):
        truth = read_mask(path, photo, model.classes, ignore)
        x = cache[photo][None].to(model.backbone.pos_embed.device).float()
        predicted = segmentation.classify_pixels(model.head(x)[0], *truth.shape)
        confusions += segmentation.confusion(truth, predicted, len(model.classes))
    return segmentation.score(confusions, model.classes)


def run(args: argparse.Namespace) -> int:
    outputs.check_new_file(args.output, ".safetensors", args.model)
    backbone = common.load_backbone(args.model, args.device, size=args.resolution, whole=True)
    if args.layers > backbone.n_blocks:
        raise ValueError(f"--layers must be at most {backbone.n_blocks}, got {args.layers}")
    classes = segmentation.read_classes(args.classes) if args.classes else None
    pairs, errors, count = find_pairs(args.images, args.masks, classes, args.ignore)
    held_out, more, other = find_pairs(*args.val, classes, args.ignore) if args.val else ([], [], 0)
    if pairs and not classes:
        classes = segmentation.name_classes(max(count, other), pairs[0][1])

    key = features.fingerprint(backbone, args.layers)
    cache = features.Cache("train_segmenter", args.images, key, enabled=not args.no_cache)
    function = partial(compute_features, backbone, args.layers)
    unreadable = cache.fill(function, [photo for photo, _ in pairs + held_out])
    for error in errors + more:
        dinoreg.complain(error, "train_segmenter")
    status = common.report("train_segmenter", unreadable) or int(bool(errors + more))
    pairs, held_out = (
        [pair for pair in part if pair[0] not in unreadable] for part in (pairs, held_out)
    )
    if not args.val:
        order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(0))
        fifth = math.ceil(len(pairs) / 5)
        pairs, held_out = [pairs[i] for i in order[fifth:]], [pairs[i] for i in order[:fifth]]
    if not pairs or not held_out:
        needed = "one photo to train on and one to hold out are needed, with masks that can be used"
        raise ValueError(f"{args.images}: {needed}")
    if len(classes) < 2:
        found = f"the masks hold a single class, 0, and perhaps {args.ignore}, which is ignored"
        raise ValueError(f"{args.masks}: {found}")

    torch.manual_seed(0)
    model = Segmenter(backbone, classes, args.layers).to(args.device).eval()
    train(model, pairs, cache, args.ignore, args.steps)
    scores = evaluate(model, held_out, cache, args.ignore)
    print(segmentation.describe_scores(scores, f"{len(held_out)} held-out photos"))
    segmentation.save(model, args.output)
    print(f"{args.output} written: python examples/segment.py PHOTO --weights {args.output}")
    return status


def add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("images", type=Path, metavar="IMAGES", help="folder of photos")
    text = "folder of their masks: PNG files of class indices or colors"
    add("masks", type=Path, metavar="MASKS", help=text)
    text = "held-out photos and masks (default: a fifth of all)"
    add("--val", type=Path, nargs=2, metavar=("IMAGES", "MASKS"), help=text)
    text = "class names: one per line, with or without #rrggbb"
    add("--classes", type=Path, metavar="FILE", help=text)
    text = "index of unlabeled pixels (default: %(default)s)"
    add("--ignore", type=int, default=IGNORED, metavar="INDEX", help=text)
    common.add_model(parser)
    common.add_resolution(parser, default=448)
    text = "last blocks whose patch tokens the head sees (default: 1)"
    add("--layers", type=int, choices=(1, 4), default=1, help=text)
    text = f"training steps, of {BATCH} photos each (default: %(default)s)"
    add("--steps", type=common.positive, default=500, help=text)
    common.add_output(parser, "segmenter.safetensors")
    text = "compute all features, and keep none in the cache folder"
    add("--no-cache", action="store_true", help=text)
    common.add_device(parser)


def main(argv: list[str] | None = None) -> int:
    """0; 1 if some photos or masks could not be used; 2 if the run could not start."""
    return common.main(run, add_options, argv)


if __name__ == "__main__":
    sys.exit(main())
